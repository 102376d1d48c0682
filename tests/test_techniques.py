"""Part 2's experiments: the kept pre-training, each technique's share, and what is measured."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from helpers import training
from helpers.models import TinyTransformer
from helpers.peft import inject, surgery
from helpers.study import part2, reproducible, spectrum, tuning
from helpers.study.part2 import LINEAR, TECHNIQUES, WAYS, prepare, samples
from helpers.training import (
    costs,
    count_parameters,
    evaluate,
    fit,
    freeze,
    operations,
    predict,
    strategies,
    train,
    unfreeze,
)
from tests.test_training import copied, moved

QUICK = {"epochs": 3, "target": "faint"}
DRAWN = ["LoRA on q, v", "LoRA", "LoRA+", "DoRA", "VeRA", "prompt tuning", "prefix tuning"]
DRAWN += ["adapters, Houlsby", "adapters, Pfeiffer", "adapters, parallel"]
TRAINED = {  # besides the head's 330; two blocks with d = 32, d_ff = 64
    **dict.fromkeys(("from scratch", "full fine-tuning", "LP-FT"), 18_026 - 330),
    "linear probing": 0,
    "BitFit": 2 * (4 * 32 + 64 + 32 + 2 * 32) + 2 * 32,
    "LayerNorm tuning": 5 * 2 * 32,
    "LoRA on q, v": 2 * 2 * 4 * (32 + 32),
    **dict.fromkeys(("LoRA", "LoRA+", "PiSSA"), 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64))),
    "DoRA": 2 * 4 * (4 * (32 + 32) + 2 * (32 + 64)) + 2 * (5 * 32 + 64),
    "VeRA": 12 * 16 + 2 * (5 * 32 + 64),
    "OFT": 2 * (5 * 32 + 64) // 8 * (8 * 7 // 2),
    "adapters, Houlsby": 4 * (2 * 4 * 32 + 4 + 32),
    **dict.fromkeys(("adapters, Pfeiffer", "adapters, parallel"), 2 * (2 * 8 * 32 + 8 + 32)),
    "(IA)3": 2 * (32 + 32 + 64),
    "prompt tuning": 4 * 32,
    "prefix tuning": 2 * 2 * 4 * 32,
}


def same(a, b):
    return a.state_dict().keys() == b.state_dict().keys() and not moved(a, copied(b))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def quickly(seen):
    """Return a `train` of one epoch that notes the rows of each call."""
    return lambda model, X, y, **options: (
        seen.append((X, y)) or train(model, X, y, **options | {"epochs": 1})
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pre-trained models: seed 0 as it is, seed 1 after one epoch."""
    folder = tmp_path_factory.mktemp("pretrained")
    part2.pretrained(0, folder=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "train", quickly([]))
        part2.pretrained(1, folder=folder)
    return folder


@pytest.fixture
def begin(folder, monkeypatch):
    """Seed 0's start; whoever asks for a pre-trained model gets it from this module's folder."""
    real = part2.pretrained
    monkeypatch.setattr(part2, "pretrained", lambda seed, **_: real(seed, folder=folder))
    return part2.start(0)


@pytest.fixture
def trainings(monkeypatch):
    seen = []
    monkeypatch.setattr(strategies, "train", quickly(seen))
    return seen


def test_a_kept_model_is_the_trained_one_and_the_random_stream_stays(trainings, tmp_path):
    models, after = [], []
    for _ in range(2):
        torch.manual_seed(5), np.random.seed(5)
        models.append(part2.pretrained(0, folder=tmp_path / "new"))
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
    before = part2.pretrained(0, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="pre-training anew") as told:
        again = part2.pretrained(0, folder=tmp_path)
    assert len(told) == 1 and told[0].filename == __file__ and str(path) in str(told[0].message)
    assert same(again, before) and list(tmp_path.iterdir()) == [path] and len(trainings) == 2
    assert same(part2.pretrained(0, folder=tmp_path), before) and len(trainings) == 2


@pytest.mark.parametrize(
    "owner, name, value",
    [
        (part2, "version", lambda name: "0.1"),
        (torch, "get_num_threads", lambda: 99),
        (torch.backends.cpu, "get_cpu_capability", lambda: "other"),
        (part2.Path, "read_bytes", lambda path: b"other code"),
        (part2.os, "environ", {"MKL_CBWR": "other"}),
        (part2.os, "environ", {"ATEN_CPU_CAPABILITY": "other"}),
    ],
)
def test_whatever_the_weights_depend_on_leads_to_another_file(
    owner, name, value, monkeypatch, tmp_path
):
    monkeypatch.setattr(strategies, "train", lambda *args, **options: None)
    monkeypatch.setattr(part2.os, "environ", {})
    for seed in (0, 1):
        part2.pretrained(seed, folder=tmp_path)
    monkeypatch.setattr(owner, name, value)
    part2.pretrained(0, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_pre_training_learns_the_source_and_a_start_is_it_under_a_fresh_head(folder):
    model, begin = part2.pretrained(0, folder=folder), part2.start(0, folder=folder)
    for target in part2.TARGETS:
        rows = samples(0, target)
        assert evaluate(model, *rows["source"]).accuracy > 0.95
        assert evaluate(model, *rows["test"]).accuracy < 0.75  # there is something to adapt to
    assert moved(begin, copied(model)) == ["head.weight", "head.bias"]
    assert same(begin, part2.start(0, folder=folder))
    other = part2.start(1, folder=folder)
    assert not torch.equal(begin.head.weight, other.head.weight)


def test_no_image_is_in_two_sets_and_targets_differ_in_the_shift_alone(monkeypatch):
    monkeypatch.setitem(part2.TARGETS, "raw", [])
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


@pytest.mark.parametrize("name", TECHNIQUES)
def test_the_technique_and_the_head_are_trained_and_nothing_else(name, begin):
    before, X = copied(begin), samples(0, "faint")["few"][0]
    model = prepare(begin, TECHNIQUES[name], seed=3)
    old = {name for name, _ in begin.named_parameters() if not name.startswith("head.")}
    plain = {n: n.replace(".base.", ".") for n, _ in model.named_parameters()}
    everything = name in ("from scratch", "full fine-tuning", "LP-FT")
    assert trainable(model) == {n for n in plain if everything or plain[n] not in old}
    assert count_parameters(model).trainable == TRAINED[name] + 330
    assert not moved(begin, before) and len(trainable(begin)) == 39 and not surgery.adapters(begin)
    gap = (predict(model, X) - predict(begin, X)).abs().max()
    assert (gap < 1e-12) == (name not in ("prompt tuning", "prefix tuning"))
    assert same(model, prepare(begin, TECHNIQUES[name], seed=3))
    assert same(model, prepare(begin, TECHNIQUES[name], seed=4)) == (name not in DRAWN)


@pytest.mark.parametrize("name", ["LoRA+", "LoRA", "full fine-tuning", "linear probing", "LP-FT"])
def test_lora_plus_and_lp_ft_train_their_own_way_and_others_in_one_group(name, begin, monkeypatch):
    calls = []

    def spy(model, X, y, *, optimizer, epochs):
        names = {id(p): n for n, p in model.named_parameters()}
        groups = [(g["lr"], {names[id(p)] for p in g["params"]}) for g in optimizer.param_groups]
        calls.append((epochs, groups))
        return train(model, X, y, optimizer=optimizer, epochs=epochs)

    monkeypatch.setattr(strategies, "train", spy)
    model = prepare(begin, TECHNIQUES[name])
    trained, before = trainable(model), copied(model)
    history = WAYS.get(name, fit)(model, *samples(0, "faint")["few"], lr=0.016, epochs=7)
    assert set(moved(model, before)) == trained and set(history) == {"loss"}
    A, B = ({n for n in trained if n.endswith(end)} for end in ("lora_A", "lora_B"))
    expected = [(7, [(0.016, trained)])]
    if name == "LoRA+":
        expected = [(7, [(0.001, A), (0.016, B), (0.016, trained - A - B)])]
    if name == "LP-FT":
        expected = [(3, [(1e-2, {"weight", "bias"})]), (4, [(0.016, trained)])]
    assert calls == expected


def test_techniques_start_alike_and_scores_are_those_of_the_rows_asked_for(begin, monkeypatch):
    starts, scores = [], []

    def prepared(model, technique, *, seed):
        starts.append(copy.deepcopy(model))
        return prepare(model, technique, seed=seed)

    def scored(model, X, y):
        scores.append(evaluate(model, X, y))
        assert torch.equal(X, rows[score_on][0])
        return scores[-1]

    monkeypatch.setattr(part2, "prepare", prepared)
    monkeypatch.setattr(training, "evaluate", scored)
    rates = {"LoRA": 1e-2, "from scratch": 3e-3, "linear probing": (1e-2, 1e-3), "LP-FT": (0.1,)}
    names = ["not adapted", "LoRA", "from scratch", "linear probing, 0.01"]
    rows = samples(0, "faint")
    for score_on in ("test", "validation"):
        scores.clear()
        found = part2.compare_techniques(0, rates=rates, score_on=score_on, **QUICK)
        assert list(found) == [*names, "linear probing, 0.001", "LP-FT, 0.1", "margin"]
        assert found.pop("margin") == min(score.margin for score in scores)
        assert list(found.values()) == [100 * score.accuracy for score in scores]
        assert scores[0] == evaluate(part2.pretrained(0), *rows[score_on])
    assert [same(model, begin) for model in starts] == [True, False, True, True, True] * 2
    with reproducible(0):
        assert same(starts[1], TinyTransformer())


def test_a_score_is_a_function_of_seed_rate_technique_and_setting_alone(begin):
    rates = {"LoRA": 1e-2, "VeRA": 1e-2, "from scratch": 1e-2}
    first = part2.compare_techniques(0, rates=rates, **QUICK)
    torch.manual_seed(1)
    assert part2.compare_techniques(0, rates=dict(reversed(rates.items())), **QUICK) == first
    assert part2.compare_techniques(1, rates=rates, **QUICK) != first
    one = {"rates": {"mine": 1e-2}, "techniques": {"mine": TECHNIQUES["LoRA"]}}
    assert part2.compare_techniques(0, **one, **QUICK)["mine"] == first["LoRA"]
    for option in ({"epochs": 4}, {"per_class": 4}, {"target": "turned"}):
        other = part2.compare_techniques(0, **one, **QUICK | option)
        assert other["mine"] != first["LoRA"]


def test_rates_are_tried_on_validation_rows_and_averaged_over_seeds(monkeypatch):
    def planted(seed, *, rates, **options):
        assert options == {"target": "turned", "score_on": "validation", "per_class": 7} | table
        assert rates == {"a": list(part2.RATES), "LoRA": list(part2.RATES[:-1])}
        return {
            column: seed * lr
            for name, several in rates.items()
            for lr, column in tuning.columns(name, several).items()
        } | {"not adapted": 50.0, "margin": 0.1}

    table = {"techniques": {"a": None, "LoRA": None}}
    monkeypatch.setattr(part2, "compare_techniques", planted)
    found = part2.try_rates("turned", [1, 2, 6], workers=1, per_class=7, **table)
    assert found["a"] == {lr: round(3 * lr, 9) for lr in part2.RATES}
    assert list(found["LoRA"]) == list(part2.RATES[:-1])  # the last one is unstable


def two_layers():
    with reproducible(0):
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        return model, torch.randn(7, 6), torch.arange(7) % 3


def test_operations_are_the_products_of_forward_and_backward():
    model, X, y = two_layers()
    low, high = 2 * 7 * 6 * 5, 2 * 7 * 5 * 3
    assert operations(model, X, y) == 2 * low + 3 * high  # no gradient of the input
    assert all(p.grad is None for p in model.parameters())
    freeze(model[2])
    assert operations(model, X, y) == 2 * low + 2 * high
    freeze(model)
    unfreeze(model[2])
    assert operations(model, X, y) == low + 2 * high
    freeze(model)
    unfreeze(model[2].bias)
    assert operations(model, X, y) == low + high
    inject.inject_lora(model, ["0"], r=2)
    of_A, of_B = 2 * 7 * 6 * 2, 2 * 7 * 2 * 5
    assert operations(model, X, y) == low + 2 * high + (of_A + of_B) + (of_A + 2 * of_B)


@pytest.mark.parametrize("tokens, layers", [(8, 2), (4, 1), (16, 1)])
def test_operations_count_attention(tokens, layers):
    with reproducible(0):
        model = TinyTransformer(n_tokens=tokens, patch=64 // tokens, n_layers=layers)
        X, y = torch.randn(5, 64), torch.arange(5)
    linear = layers * 2 * 5 * tokens * (4 * 32 * 32 + 2 * 32 * 64)
    embed, head = 2 * 5 * 64 * 32, 2 * 5 * 32 * 10
    product = layers * 2 * 5 * tokens * tokens * 32  # q k', or the weights times v
    whole = 3 * (linear + head) + 2 * embed + (2 + 5) * product
    assert operations(model, X, y) == whole
    probe = prepare(model, TECHNIQUES["linear probing"])
    assert operations(probe, X, y) == linear + embed + 2 * head + 2 * product
    prefix = prepare(model, TECHNIQUES["prefix tuning"])
    freeze(prefix.blocks)
    longer = 2 * product * (tokens + 4) // tokens
    assert operations(prefix, X, y) == linear + embed + 2 * head + longer


def test_activation_bytes_are_exact_on_two_layers_and_none_below_a_probe():
    model, X, y = two_layers()
    hidden, logits = 7 * 5 * 8, 7 * 3 * 8 + 8  # log-softmax and its sum of weights
    assert costs.activation_bytes(model, X, y) == hidden + logits  # not the input
    freeze(model[0])  # the hidden units are the head's input
    assert costs.activation_bytes(model, X, y) == hidden + logits
    freeze(model)
    unfreeze(model[2].bias)
    assert costs.activation_bytes(model, X, y) == logits
    model = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 5).double(), nn.Flatten())
    assert costs.activation_bytes(model, X, y) == 7 * 15 * 8 + 8  # nor a view of it
    with reproducible(0):
        probe = prepare(TinyTransformer(), TECHNIQUES["linear probing"])
        rows = torch.randn(9, 64), torch.arange(9)
    assert costs.activation_bytes(probe, *rows) == 9 * 32 * 8 + 9 * 10 * 8 + 8


def test_step_memory_counts_what_is_trained_apart_from_what_is_there():
    names = ["weights", "gradients", "optimiser state", "activations"]
    assert costs.step_memory(3, 100, 50) == dict(zip(names, (800, 24, 48, 50), strict=True))
    found = costs.step_memory(3, 100, 50, weight=2, gradient=1, state=12)
    assert found == dict(zip(names, (200, 3, 36, 50), strict=True))


def test_linear_weights_are_merged_and_the_model_stays(begin):
    model = prepare(begin, TECHNIQUES["LoRA"])
    for adapter in surgery.adapters(model).values():
        nn.init.normal_(adapter.lora_B)
    before, found = copy.deepcopy(model), spectrum.linear_weights(model)
    assert same(model, before) and len(trainable(model)) == 26
    names = [f"{i}.attention.{name}" for i in range(2) for name in LINEAR[:4]]
    names += [f"{i}.feed_forward.{name}" for i in range(2) for name in LINEAR[4:]]
    assert set(found) == set(names) == set(spectrum.linear_weights(begin))
    for name, W in found.items():
        adapter = model.blocks.get_submodule(name)
        expected = adapter.base.weight + 2 * adapter.lora_B @ adapter.lora_A
        assert torch.allclose(W, expected, atol=1e-12) and not W.requires_grad


def test_intruders_are_the_planted_new_directions_among_the_strongest():
    rng = torch.Generator().manual_seed(0)
    draw = torch.randn(16, 16, generator=rng, dtype=torch.float64)
    U, V = torch.linalg.qr(draw).Q, torch.linalg.qr(draw[:10, :10]).Q
    old, new = U[:, :10], U[:, 10:]
    strengths = torch.arange(10, 0, -1).double()
    W0 = old * strengths @ V.T
    assert spectrum.intruders(W0, W0) == 0
    for n in range(4):
        W = W0 + 50 * new[:, :n] @ V[:, 10 - n :].T
        assert spectrum.intruders(W, W0) == spectrum.intruders(0.01 * W, 7 * W0) == n
    assert spectrum.intruders(W0 + 50 * torch.outer(old[:, 9], V[:, 9]), W0) == 0  # the last one
    weak = (old * strengths)[:, :9] @ V[:, :9].T + 0.5 * new[:, :1] @ V[:, 9:].T  # the tenth
    assert spectrum.intruders(weak, W0) == 0 and spectrum.intruders(weak, W0, k=10) == 1
    for cosine, count in {0.59: 1, -0.59: 1, 0.61: 0, -0.61: 0}.items():
        mixed = cosine * old[:, 0] + (1 - cosine**2) ** 0.5 * new[:, 0]
        W = W0 + 20 * torch.outer(mixed, V[:, 0]) - 10 * torch.outer(old[:, 0], V[:, 0])
        assert spectrum.intruders(W, W0) == count
        assert spectrum.intruders(W, W0, threshold=0.5) == 0


def test_length_and_direction_of_rows_are_told_apart():
    W0 = torch.tensor([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    scaled = torch.tensor([[2.0], [0.5], [1.0]]) * W0
    assert spectrum.magnitude_and_direction(scaled, W0) == pytest.approx((2, 0), abs=1e-12)
    for angle in (0.3, 3.0):
        c, s = np.cos(angle), np.sin(angle)
        found = spectrum.magnitude_and_direction(W0 @ torch.tensor([[c, s], [-s, c]]), W0)
        assert found == pytest.approx((0, 1 - c), abs=1e-12)


def test_the_spectrum_of_an_update_has_share_size_and_intruders(begin, monkeypatch):
    rates = {"LoRA": 1e-2, "full fine-tuning": 1e-2}
    found = spectrum.update_spectrum(0, rates=rates, **QUICK)
    assert list(found) == [f"{n}/{k}" for n in rates for k in ("share", "size", "intruders")]
    assert found["LoRA/share"] == pytest.approx(100) and found["LoRA/size"] > 1
    assert 50 < found["full fine-tuning/share"] < 99
    assert spectrum.update_spectrum(0, rates=rates, **QUICK) == found

    def grown(model, X, y, **options):
        for name in spectrum.linear_weights(model):
            model.blocks.get_submodule(name).weight.data *= 1.25

    monkeypatch.setattr(training, "fit", grown)
    weights = spectrum.linear_weights(begin).values()
    energies = [torch.linalg.svdvals(W) ** 2 for W in weights]
    share = np.mean([(100 * e[:4].sum() / e.sum()).item() for e in energies])
    found = spectrum.update_spectrum(0, rates={"full fine-tuning": 1e-2}, **QUICK)
    assert list(found.values()) == pytest.approx([share, 25, 0])


MERGED = "merged into plain layers: True, same outputs: True"
KEPT = "stays as it is: there is no plain layer that computes the same"
NORMS_AND_ALL = "project, norm1, q_proj, k_proj, v_proj, out_proj, norm2, fc1, fc2, norm, head"
FACTS = {
    "LoRA": (12, ", ".join(LINEAR), "3,914 / 21,610  (18.1%)", "as before", 37, MERGED),
    "BitFit": (19, NORMS_AND_ALL, "970 / 18,026  (5.4%)", "as before", 38, MERGED),
    "prompt tuning": (1, "embed", "458 / 18,154  (2.5%)", "changed by its new tokens", 37, KEPT),
    "adapters, Houlsby": (4, "out_proj, fc2", "1,498 / 19,194  (7.8%)", "as before", 37, KEPT),
}
FACTS["LoRA+"] = FACTS["LoRA"]


@pytest.mark.parametrize("name", FACTS)
def test_a_demonstration_says_what_holds(name, begin):
    model, history, facts = part2.demonstrate(name, 0, lr=1e-2, **QUICK)
    modules, ends, count, changed, frozen, after = FACTS[name]
    assert facts == [
        f"Adapted: {modules} module{'s' * (modules != 1)} ({ends})",
        f"Trainable: {count}, 330 of them in the head",
        f"Outputs after injection, before training: {changed}",
        f"Frozen tensors that moved in 3 steps: 0 of {frozen}",
        "Disabled, the base's outputs return exactly: True",
        f"After training: {after}",
        f"Test rows right: {evaluate(model, *samples(0, 'faint')['test']).correct} of 497",
    ]
    assert len(history["loss"]) == 3 and len(surgery.adapters(model)) == modules
    trained = prepare(begin, TECHNIQUES[name], seed=0)
    WAYS.get(name, fit)(trained, *samples(0, "faint")["few"], lr=1e-2, epochs=3)
    assert same(model, trained)


def test_a_demonstration_says_what_does_not_hold(begin, monkeypatch):
    def clumsy(model, X, y, **options):
        model.blocks[0].attention.q_proj.base.weight.data += 1

    monkeypatch.setattr(training, "fit", clumsy)
    monkeypatch.setattr(part2.peft, "merge", lambda model: model.head.bias.data.add_(1e-6))
    _, _, facts = part2.demonstrate("LoRA", 0, lr=1e-2, **QUICK)
    assert facts[3:6] == [
        "Frozen tensors that moved in 3 steps: 1 of 37",
        "Disabled, the base's outputs return exactly: False",
        "After training: merged into plain layers: False, same outputs: False",
    ]


@pytest.mark.parametrize("look", [part2.demonstrate, spectrum.update_spectrum])
def test_from_scratch_has_no_start_to_look_at(look, begin):
    rates = {"lr": 1e-2} if look is part2.demonstrate else {"rates": {"from scratch": 1e-2}}
    names = ["from scratch"] if look is part2.demonstrate else []
    with pytest.raises(ValueError, match="'from scratch' has no pre-trained start"):
        look(*names, 0, **rates, **QUICK)


def test_each_purpose_has_a_stream_of_its_own(begin):
    lora = prepare(begin, TECHNIQUES["LoRA"], seed=0).blocks[0].attention.q_proj.lora_A
    initial = next(TinyTransformer().embed.parameters())
    drawn = [lora.flatten()[:100], begin.head.weight.flatten()[:100], initial.flatten()[:100]]
    related = np.corrcoef([t.detach().numpy() for t in drawn])
    assert np.abs(related[np.triu_indices(3, 1)]).max() < 0.4
