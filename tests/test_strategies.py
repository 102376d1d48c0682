"""Strategies: the published numbers, what each one trains, and the properties that it claims."""

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from helpers.data import published_task, shifted_domain
from helpers.models import MLP, Encoder, TextClassifier, stages, with_fresh_head
from helpers.study import reproducible
from helpers.study.published import PUBLISHED, fast_forward, replay
from helpers.training import (
    contrastive,
    count_parameters,
    cross_entropy,
    fine_tune,
    fit,
    freeze,
    l2_sp,
    logistic_head,
    predict,
    strategies,
    train,
)
from tests.test_training import copied, moved

ROOT = Path(__file__).parent.parent
STAGES = ["backbone.0", "backbone.2", "backbone.4", "head"]


@cache
def logits_and_labels(earlier):
    """Run the published cells after `earlier` ones: logits (5, 100, 4) and labels (5, 100)."""
    runs = replay(published_task(), earlier).values()
    return torch.stack([predict(m, X) for m, X, _ in runs]), torch.stack([y for *_, y in runs])


@pytest.mark.parametrize(
    "earlier, published", [(8, [81, 55, 76, 57, 58]), (0, [84, 61, 81, 44, 46])]
)
def test_published_numbers_follow_from_the_kernels_history(earlier, published):
    logits, y = logits_and_labels(earlier)
    assert (logits.argmax(-1) == y).sum(1).tolist() == published


def test_fast_forward_draws_what_the_earlier_cells_draw():
    task, of = published_task(), PUBLISHED
    torch.manual_seed(42), np.random.seed(42)
    for _ in range(3):
        base = MLP()
        fit(base, *task.train, lr=1e-3, epochs=2)
    fine_tune(base, *task.train, **of["features"])
    for _ in range(3):
        fine_tune(base, *task.train, **of["tuning"])
    for _ in range(3):
        X, y = shifted_domain(*task.test, scale=1.5, rng=np.random)
        fine_tune(base, X[:20], y[:20], **of["adaptation"])
    run = torch.rand(1), np.random.rand()
    torch.manual_seed(42), np.random.seed(42)
    fast_forward(task, 8, "pre-training")
    MLP()
    fast_forward(task, 8, "feature extraction")
    with_fresh_head(base)
    fast_forward(task, 8, "fine-tuning")
    assert (torch.rand(1), np.random.rand()) == run


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
    script = "import sys, torch; from tests.test_strategies import logits_and_labels; "
    script += "torch.save(logits_and_labels(8)[0], sys.argv[1])"
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | setting
    command = [sys.executable, "-c", script, str(tmp_path / "logits.pt")]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    here, there = logits_and_labels(8)[0], torch.load(tmp_path / "logits.pt")
    margin = here.topk(2).values.diff().abs().min().item()
    drift = (here - there).abs().max().item()
    told = f"the closest of 500 decisions has margin {margin:.1e}, logits drift by {drift:.1e}"
    assert torch.equal(here.argmax(-1), there.argmax(-1)), told
    assert drift < 0.01, told  # which can exceed the margin: the counts stand by luck


@pytest.fixture
def pretrained():
    with reproducible(0):
        task = published_task(n_samples=120)
        model = MLP()
        fit(model, *task.train, lr=1e-3, epochs=5)
        yield model, task


@pytest.mark.parametrize(
    "options, first, count",
    [
        ({"from_stage": -1}, 3, 132),  # feature extraction
        ({"from_stage": 3, "head_lr": 1e-2}, 3, 132),
        ({"from_stage": 1, "head_lr": 1e-2}, 1, 6_372),
        ({"from_stage": 0}, 0, 7_716),
        ({"from_stage": 2}, 2, 2_212),
        ({"from_stage": 3, "fresh_head": False}, 3, 132),
    ],
)
def test_each_strategy_trains_what_it_says_on_a_copy(pretrained, options, first, count):
    base, task = pretrained
    before = copied(base)
    model, history = fine_tune(base, *task.train, lr=1e-3, epochs=3, **options)
    trained = [k for k in before if k.rpartition(".")[0] in STAGES[first:]]
    assert moved(model, before) == trained and count_parameters(model) == (count, 7_716)
    assert not moved(base, before) and all(p.requires_grad for p in base.parameters())
    assert all(p.grad is None for p in base.parameters()) and len(history["loss"]) == 3
    if not options.get("fresh_head", True):
        assert (model.head.weight - base.head.weight).abs().max() < 0.01


def test_a_head_of_another_task_learns_at_a_rate_of_its_own(pretrained):
    base, (X, y) = pretrained[0], pretrained[1].train
    torch.manual_seed(1)
    fresh = with_fresh_head(base, 2)
    torch.manual_seed(1)
    rates = {"lr": 1e-9, "head_lr": 1e-2, "n_classes": 2}
    model, history = fine_tune(base, X, y % 2, from_stage=0, epochs=3, batch_size=32, **rates)
    steps = {k: (p - fresh.get_parameter(k)).abs().max() for k, p in model.named_parameters()}
    assert max(step for k, step in steps.items() if k.startswith("backbone")) < 1e-7
    assert steps["head.weight"] > 5e-3 and len(history["loss"]) == 3


def test_a_fresh_head_is_never_forgotten(pretrained):
    base, task = pretrained
    with pytest.raises(ValueError, match=r"the rates for \['head'\] cover nothing; trainable are"):
        fine_tune(base, *task.train, lr=1e-3, epochs=1, from_stage=4)
    with pytest.raises(ValueError, match="cannot freeze to stage 5: there are 4"):
        fine_tune(base, *task.train, lr=1e-3, epochs=1, from_stage=5)


def test_fit_takes_one_rate_or_several_and_passes_options_on(pretrained):
    model, task = pretrained
    before, several = copied(model), copy.deepcopy(model)
    first = fit(model, *task.train, lr=1e-2, epochs=2, batch_size=32, clip_norm=1.0)
    rates = {"backbone": 1e-2, "head": 1e-2}
    assert fit(several, *task.train, lr=rates, epochs=2, batch_size=32, clip_norm=1.0) == first
    assert not moved(several, copied(model)) and moved(model, before) == list(before)
    with pytest.raises(ValueError, match=r"no learning rate for 'head\.weight'"):
        fit(model, *task.train, lr={"backbone": 1e-2}, epochs=1)


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


@pytest.mark.parametrize("down_to, phases", [(0, 4), (2, 2), (3, 1)])
def test_gradual_unfreezing_goes_down_to_a_stage(pretrained, monkeypatch, down_to, phases):
    model, task = pretrained
    before, seen = copied(model), []

    def recorded(model, *rows, optimizer, epochs, **options):
        seen.append((epochs, count_parameters(model).trainable, options))
        return train(model, *rows, optimizer=optimizer, epochs=epochs, **options)

    monkeypatch.setattr(strategies, "train", recorded)
    strategies.gradual_unfreezing(model, *task.train, epochs=8, down_to=down_to, batch_size=40)
    assert moved(model, before) == list(before)[2 * down_to :]
    counts = [132, 2_212, 6_372, 7_716]
    assert seen == [(8 // phases, n, {"batch_size": 40}) for n in counts[:phases]]


def test_gradual_unfreezing_of_a_text_classifier_ends_at_a_block():
    with reproducible(0):
        encoder = Encoder(vocab=9, d=4, n_layers=3, n_heads=2, d_ff=5, positions=6)
        model = TextClassifier(encoder, 2)
        before, down_to = copied(model), list(stages(model)).index("encoder.blocks.2")
        X = {"ids": torch.randint(0, 9, (8, 6)), "mask": torch.ones(8, 6).long()}
        strategies.gradual_unfreezing(model, X, torch.arange(8) % 2, epochs=4, down_to=down_to)
    above = ("encoder.blocks.2.", "head.")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if name.startswith(above)}
    flat = {name for name in trained if "k_proj.bias" in name}  # softmax ignores it
    assert trained - flat <= set(moved(model, before)) <= trained


@pytest.fixture
def points():
    """Return rows of four overlapping classes, labels and weights."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 4
    X = rng.normal(size=(60, 5)) + 0.8 * rng.normal(size=(4, 5))[y]
    return torch.tensor(X), torch.tensor(y), torch.tensor(rng.integers(1, 4, size=60))


def objective_gradient(head, X, y, C, weights):
    losses = weights * F.cross_entropy(head(X), y, reduction="none")
    value = head.weight.square().sum() / 2 + C * losses.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(head.parameters()))])


@pytest.mark.parametrize("C", [0.03, 1.0, 30.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_logistic_head_is_at_the_optimum_that_scikit_learn_finds(points, C, weighted):
    X, y, weights = points
    head = logistic_head(X, y, C=C, weights=weights if weighted else None)
    assert [p.requires_grad for p in head.parameters()] == [True, True]
    weights = weights if weighted else torch.ones(60)
    start = objective_gradient(nn.Linear(5, 4, dtype=X.dtype), X, y, C, weights)
    assert objective_gradient(head, X, y, C, weights).norm() < 1e-6 * start.norm()
    other = LogisticRegression(C=C, solver="lbfgs", tol=1e-10, max_iter=10_000)
    other.fit(X.numpy(), y.numpy(), weights.numpy())
    expected = torch.as_tensor(other.predict_log_proba(X.numpy()))
    torch.testing.assert_close(head(X).log_softmax(1), expected, atol=1e-4, rtol=0)


def test_a_weight_of_a_logistic_head_counts_a_row_as_often(points):
    X, y, weights = points
    repeated = logistic_head(X.repeat_interleave(weights, 0), y.repeat_interleave(weights))
    head = logistic_head(X, y, weights=weights)
    torch.testing.assert_close(head.weight, repeated.weight, atol=1e-8, rtol=0)
    torch.testing.assert_close(head.bias, repeated.bias, atol=1e-8, rtol=0)
    assert (head.weight - logistic_head(X, y).weight).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_logistic_head_of_two_classes_answers_as_scikit_learn(points, dtype):
    X, y = points[0].to(dtype).requires_grad_(), points[1] % 2
    head = logistic_head(X, y, C=0.5)
    assert head.weight.shape == (2, 5) and head.weight.dtype == head.bias.dtype == dtype
    other = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000).fit(X.detach(), y)
    expected = torch.as_tensor(other.predict_proba(X.detach()), dtype=dtype)
    torch.testing.assert_close(head(X).softmax(1), expected, atol=1e-5, rtol=0)


def test_a_logistic_head_refuses_a_class_without_rows(points):
    X, y, _ = points
    with pytest.raises(ValueError, match=r"no row of class 1: labels must be 0\.\.3"):
        logistic_head(X[y != 1], y[y != 1])


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


def test_l2_sp_pulls_a_copy_and_a_wrapped_model_to_the_same_start(pretrained):
    model, (X, y) = pretrained[0], pretrained[1].train
    loss = l2_sp(model, alpha=0.5)
    for other in (copy.deepcopy(model), torch.compile(model, backend="eager")):
        for p in other.parameters():
            p.data += 0.1
        added = (loss(other, X, y) - cross_entropy(other, X, y)).item()
        assert added == pytest.approx(0.5 / 2 * 0.1**2 * 7_584, rel=1e-9)
    with pytest.raises(AttributeError, match="backbone"):
        loss(nn.Linear(20, 4), X, y)


class Rows(nn.Module):
    """A model whose features are parameters, to see where a loss moves them."""

    def __init__(self, z):
        super().__init__()
        self.z = nn.Parameter(z)

    def features(self, rows):
        return self.z[rows]


def test_contrastive_is_the_published_loss_of_all_pairs_of_a_batch():
    y, T = torch.tensor([0, 1, 0, 0, 1, 2]), 0.3
    model = Rows(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
    loss = contrastive(T)(model, {"rows": torch.arange(6)}, y)
    s = F.cosine_similarity(model.z[:, None], model.z, dim=2).div(T).exp()
    terms = [
        [-torch.log(s[i, j] / (s[i].sum() - s[i, i])) for j in range(6) if j != i and y[j] == y[i]]
        for i in range(6)
    ]
    each = [sum(of) / len(of) for of in terms if of]  # class 2 has a single row
    torch.testing.assert_close(loss, sum(each) / len(each))


@pytest.mark.parametrize("y, moves", [([0, 1, 0, 1, 2], True), ([0, 1, 2, 3, 4], False), ([0], 0)])
def test_contrastive_learns_from_pairs_of_a_class_alone(y, moves):
    model = Rows(torch.randn(len(y), 4, generator=torch.Generator().manual_seed(0)))
    X, y = {"rows": torch.arange(len(y))}, torch.tensor(y)
    before = model.z.detach().clone()
    history = train(model, X, y, optimizer=SGD([model.z], 0.1), epochs=50, loss=contrastive())
    assert torch.equal(model.z, before) != moves
    if moves:
        z = F.normalize(model.z.detach())
        cosines, same = z @ z.T, y[:, None] == y
        assert cosines[same].min() > cosines[~same].max()
        assert history["loss"][-1] < history["loss"][0]
