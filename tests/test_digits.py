"""Digits for Part 3: the rows of a seed, and the kept pre-training."""

import numpy as np
import pytest
import torch

from helpers.models import TinyTransformer
from helpers.study import digits, part2, reproducible
from helpers.study.digits import samples
from helpers.study.part2 import LINEAR, prepare
from helpers.training import evaluate, strategies, train
from tests.test_training import copied, moved


def same(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and not moved(a, copied(b))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def quickly(seen):
    """Return a `train` of one epoch that notes the rows of each call."""
    return lambda model, X, y, **options: (
        seen.append((X, y)) or train(model, X, y, **options | {"epochs": 1})
    )


@pytest.fixture
def trainings(monkeypatch):
    seen = []
    monkeypatch.setattr(strategies, "train", quickly(seen))
    return seen


def test_a_kept_model_is_the_trained_one_and_the_random_stream_stays(trainings, tmp_path):
    models, after = [], []
    for _ in range(2):
        torch.manual_seed(5), np.random.seed(5)
        models.append(digits.pretrained(0, folder=tmp_path / "new"))
        after.append((torch.rand(1).item(), np.random.rand()))
    torch.manual_seed(5), np.random.seed(5)
    assert after == [(torch.rand(1).item(), np.random.rand())] * 2
    assert len(trainings) == 1 and same(*models)
    assert torch.equal(trainings[0][0], samples(0, "turned")["source"][0])
    for model in models:
        assert len(trainable(model)) == 39 and model.head.weight.dtype == torch.float64
        assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-4_000] + bytes([data[-4_000] ^ 1]) + data[-3_999:],
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data[:-100],
        lambda data: b"",
    ],
    ids=["a bit of a weight", "a bit of the header", "truncated", "empty"],
)
def test_a_damaged_file_is_told_of_and_made_again(damage, trainings, tmp_path):
    before = digits.pretrained(0, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="pre-training anew") as told:
        again = digits.pretrained(0, folder=tmp_path)
    assert len(told) == 1 and told[0].filename == __file__ and str(path) in str(told[0].message)
    assert same(again, before) and list(tmp_path.iterdir()) == [path] and len(trainings) == 2
    assert same(digits.pretrained(0, folder=tmp_path), before) and len(trainings) == 2


@pytest.mark.parametrize(
    "owner, name, value",
    [
        (digits, "version", lambda name: "0.1"),
        (torch, "get_num_threads", lambda: 99),
        (torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        (digits.Path, "read_bytes", lambda path: b"other code"),
        (digits.os, "environ", {"MKL_CBWR": "other"}),
        (digits.os, "environ", {"ATEN_CPU_CAPABILITY": "other"}),
    ],
)
def test_whatever_the_weights_depend_on_leads_to_another_file(
    owner, name, value, monkeypatch, tmp_path
):
    monkeypatch.setattr(strategies, "train", lambda *args, **options: None)
    monkeypatch.setattr(digits.os, "environ", {})
    for seed in (0, 1):
        digits.pretrained(seed, folder=tmp_path)
    monkeypatch.setattr(owner, name, value)
    digits.pretrained(0, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_pre_training_learns_the_source(tmp_path):
    model = digits.pretrained(0, folder=tmp_path)
    for target in digits.TARGETS:
        rows = samples(0, target)
        assert evaluate(model, *rows["source"]).accuracy > 0.95
        assert evaluate(model, *rows["test"]).accuracy < 0.75  # there is something to adapt to


def test_no_image_is_in_two_sets_and_targets_differ_in_the_shift_alone(monkeypatch):
    monkeypatch.setitem(digits.TARGETS, "raw", [])
    raw, small = (samples(3, "raw", per_class=k) for k in (25, 4))
    sizes = {"source": 800, "few": 250, "validation": 200, "test": 497, "source test": 497}
    assert {name: len(y) for name, (_, y) in raw.items()} == sizes
    assert len({row.numpy().tobytes() for X, _ in raw.values() for row in X}) == 1747
    assert raw["few"][1].bincount().tolist() == [25] * 10
    assert torch.equal(raw["few"][0].view(10, 25, 64)[:, :4], small["few"][0].view(10, 4, 64))
    for target in ("faint", "turned"):
        torch.manual_seed(1), np.random.seed(1)
        for name, (X, y) in samples(3, target, per_class=25).items():
            images, labels = raw[name]
            assert torch.equal(y, labels) and X.dtype == torch.float64
            if name.startswith("source"):
                assert torch.equal(X, images)
            elif target == "turned":
                turned = torch.rot90(images.view(-1, 8, 8), 1, (1, 2)).flatten(1)
                assert torch.allclose(X, turned, atol=1e-9, rtol=0)
            else:
                noise = X - (0.35 + 0.3 * images)
                assert noise.std().item() == pytest.approx(0.1, rel=0.05)
                assert abs(noise.mean().item()) < 0.005
    first, again, other = (samples(seed, "faint")["few"] for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("technique", [part2.lora(*LINEAR, r=2), part2.everything])
def test_what_is_prepared_is_a_copy_that_follows_the_seed(technique):
    with reproducible(0):
        base = TinyTransformer()
        before, whole = copied(base), technique is part2.everything
        one, again, other = (prepare(base, technique, seed=seed) for seed in (3, 3, 4))
    assert not moved(base, before) and len(trainable(base)) == 39
    assert same(one, again) and same(one, other) == whole
    head, wanted = {"head.weight", "head.bias"}, trainable(base)
    if not whole:
        names = [name for name, _ in one.named_parameters()]
        wanted = {n for n in names if n.endswith(("lora_A", "lora_B"))} | head
    assert trainable(one) == wanted and len(wanted) == (39 if whole else 2 * 12 + 2)
    with reproducible(0):
        probe = prepare(base, part2.head_only)
    assert trainable(probe) == head
