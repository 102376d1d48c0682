"""Strategies: the published numbers, what each one trains, and the properties that it claims."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam

from helpers.data import published_task, shifted_domain
from helpers.models import with_fresh_head
from helpers.study import reproducible
from helpers.training import (
    adapt,
    count_parameters,
    cross_entropy,
    evaluate,
    feature_extraction,
    fine_tune,
    freeze,
    l2_sp,
    linear_probe,
    lp_ft,
    predict,
    strategies,
    train,
)
from tests.test_training import copied, moved

ROOT = Path(__file__).parent.parent
EARLIER = ("pretrain",) * 2 + ("fine_tune",) * 3 + ("adapt",) * 3
STAGES = ["backbone.0", "backbone.2", "backbone.4", "head"]


@cache
def replay(*earlier):
    """Run the published cells after `earlier` ones: logits (5, 100, 4) and labels (5, 100)."""
    torch.manual_seed(42)
    np.random.seed(42)
    task, n = published_task(), earlier.count("pretrain")
    for cell in [*earlier[:n], "pretrain", "extract", *earlier[n:], "fine_tune", "adapt"]:
        if cell == "pretrain":
            base, _ = strategies.pretrain(task)
        elif cell == "extract":
            features, _ = feature_extraction(base, task)
        elif cell == "fine_tune":
            tuned, _ = fine_tune(base, task)
        else:
            X, y = shifted_domain(*task.test, scale=1.5, rng=np.random)
            adapted, _ = adapt(base, X[:20], y[:20])
    scored = [(m, *task.test) for m in (base, features, tuned)] + [(base, X, y), (adapted, X, y)]
    return torch.stack([predict(m, X) for m, X, _ in scored]), torch.stack([y for *_, y in scored])


@pytest.mark.parametrize(
    "earlier, published", [(EARLIER, [81, 55, 76, 57, 58]), ((), [84, 61, 81, 44, 46])]
)
def test_published_numbers_follow_from_the_kernels_history(earlier, published):
    logits, y = replay(*earlier)
    assert (logits.argmax(-1) == y).sum(1).tolist() == published


@pytest.mark.parametrize(
    "setting",
    [
        {"ATEN_CPU_CAPABILITY": "default"},
        {"ATEN_CPU_CAPABILITY": "avx2"},
        {"MKL_CBWR": "COMPATIBLE"},
        {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
    ],
    ids=str,
)
def test_no_decision_behind_the_published_numbers_changes_with_the_processor(setting, tmp_path):
    script = "import sys, torch; from tests.test_strategies import EARLIER, replay; "
    script += "torch.save(replay(*EARLIER)[0], sys.argv[1])"
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | setting
    command = [sys.executable, "-c", script, str(tmp_path / "logits.pt")]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    here, there = replay(*EARLIER)[0], torch.load(tmp_path / "logits.pt")
    margin = here.topk(2).values.diff().abs().min().item()
    drift = (here - there).abs().max().item()
    told = f"the closest of 500 decisions has margin {margin:.1e}, logits drift by {drift:.1e}"
    assert torch.equal(here.argmax(-1), there.argmax(-1)), told
    assert drift < 0.01, told  # which can exceed the margin: the counts stand by luck


@pytest.fixture
def pretrained():
    with reproducible(0):
        task = published_task(n_samples=120)
        yield strategies.pretrain(task, epochs=5)[0], task


@pytest.mark.parametrize(
    "strategy, options, first, count",
    [
        (feature_extraction, {}, 3, 132),
        (fine_tune, {}, 1, 6_372),
        (fine_tune, {"from_stage": 0}, 0, 7_716),
        (fine_tune, {"from_stage": 3}, 3, 132),
        (adapt, {}, 2, 2_212),
        (adapt, {"fresh_head": False, "from_stage": 3}, 3, 132),
    ],
)
def test_each_strategy_trains_what_it_says_on_a_copy(pretrained, strategy, options, first, count):
    base, task = pretrained
    before = copied(base)
    rows = task.train if strategy is adapt else (task,)
    model, history = strategy(base, *rows, epochs=3, **options)
    trained = [k for k in before if k.rpartition(".")[0] in STAGES[first:]]
    assert moved(model, before) == trained and count_parameters(model) == (count, 7_716)
    assert not moved(base, before) and all(p.requires_grad for p in base.parameters())
    assert all(p.grad is None for p in base.parameters()) and len(history["loss"]) == 3
    if not options.get("fresh_head", True):
        assert (model.head.weight - base.head.weight).abs().max() < 0.01


def test_a_linear_probe_is_head_training_and_lp_ft_starts_where_it_ends(pretrained):
    base, task = pretrained
    probed, through, tuned = (with_fresh_head(base) for _ in range(3))
    through.load_state_dict(probed.state_dict())
    tuned.load_state_dict(probed.state_dict())
    before = copied(probed)
    linear_probe(probed, *task.train, epochs=50, lr=1e-2)
    assert moved(probed, before) == ["head.weight", "head.bias"]
    freeze(through.backbone)
    optimizer = Adam(through.head.parameters(), lr=1e-2, fused=True)
    train(through, *task.train, optimizer=optimizer, epochs=50)
    torch.testing.assert_close(probed.head.weight, through.head.weight, atol=1e-12, rtol=0)
    losses = lp_ft(tuned, *task.train, epochs=2, probe_epochs=50)["loss"]
    assert losses[0] == pytest.approx(evaluate(probed, *task.train).loss, abs=1e-12)
    assert losses[1] < losses[0] and moved(tuned, copied(probed)) == list(before)


def test_gradual_unfreezing_adds_one_stage_per_phase_with_a_new_optimizer(pretrained, monkeypatch):
    model, task = pretrained
    phases, optimizers = [], []

    def recorded(model, *rows, optimizer, **options):
        before = copied(model)
        train(model, *rows, optimizer=optimizer, **options)
        phases.append(moved(model, before))
        optimizers.append(optimizer)

    monkeypatch.setattr(strategies, "train", recorded)
    names = list(model.state_dict())
    strategies.gradual_unfreezing(model, *task.train, epochs=8)
    assert phases == [names[6:], names[4:], names[2:], names]
    assert len(set(map(id, optimizers))) == 4
    assert {int(s["step"]) for o in optimizers for s in o.state.values()} == {2}


def test_l2_sp_adds_the_squared_distance_and_holds_weights_near_the_start(pretrained):
    model, (X, y) = pretrained[0], pretrained[1].train
    freeze(model.backbone[0])
    start, loss = copied(model), l2_sp(model, alpha=0.5)
    assert loss(model, X, y) == cross_entropy(model, X, y)
    for p in model.parameters():
        p.data += 0.1
    added = (loss(model, X, y) - cross_entropy(model, X, y)).item()
    assert added == pytest.approx(0.5 / 2 * 0.1**2 * 6_240, rel=1e-9)
    distances = []
    for alpha in (0.0, 0.1, 1.0):
        model.load_state_dict(start)
        loss, optimizer = l2_sp(model, alpha=alpha), SGD(model.parameters(), lr=0.2)
        train(model, X, y, optimizer=optimizer, epochs=100, loss=loss)
        backbone = model.backbone.state_dict(prefix="backbone.").items()
        distances.append(sum((t - start[k]).norm() ** 2 for k, t in backbone))
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0
