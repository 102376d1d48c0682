"""Training: one loop that moves what is trainable, scores that are sums, and no side effects."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from helpers.models import MLP
from helpers.study import reproducible
from helpers.training import (
    cross_entropy,
    evaluate,
    extract_features,
    freeze,
    param_groups,
    predict,
    train,
    unfreeze,
)


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


def rows(n=40):
    X, wrong = torch.randn(n, 20), torch.arange(n) // 30  # labels after the 30th are wrong
    return X, (X[:, :4].argmax(1) + wrong) % 4


def normed(norm):
    layers = {"backbone": nn.Sequential(nn.Linear(20, 8), norm, nn.ReLU()), "head": nn.Linear(8, 4)}
    return nn.Sequential(OrderedDict(layers))


def copied(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def moved(model, before):
    return [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]


def test_same_seed_same_history():
    task, histories, weights = rows(), [], []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = MLP()
        optimizer, order = Adam(model.parameters()), torch.Generator().manual_seed(seed)
        options = {"epochs": 3, "batch_size": 16, "generator": order}
        histories.append(train(model, *task, optimizer=optimizer, **options))
        weights.append(model.head.weight)
    assert histories[0] == histories[1] != histories[2]
    assert torch.equal(weights[0], weights[1])


def test_training_is_the_textbook_loop():
    (X, y), model, reference = rows(), MLP(), MLP()
    reference.load_state_dict(model.state_dict())
    cross_entropy(model, X, y).backward()  # a stale gradient is no part of the first step
    train(model, X, y, optimizer=Adam(model.parameters()), epochs=3)
    optimizer = Adam(reference.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(X), y).backward()
        optimizer.step()
    assert not moved(model, reference.state_dict())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batch_size", [1, 7, 16, 40, None])
def test_losses_are_means_over_examples_and_each_epoch_sees_each_row_once(batch_size):
    (X, y), model, seen = rows(), MLP(), []

    def recorded(model, x, y):
        seen.append(x[:, 0])
        return cross_entropy(model, x, y)

    options = {"epochs": 2, "batch_size": batch_size, "loss": recorded}
    history = train(model, X, y, optimizer=SGD(model.parameters(), lr=0.0), **options)
    whole = nn.functional.cross_entropy(model(X), y).item()
    score = evaluate(model, X, y, batch_size=batch_size or 1024)
    assert [*history["loss"], score.loss] == pytest.approx([whole] * 3, abs=1e-12)
    assert score.correct == (model(X).argmax(1) == y).sum() == score.accuracy * 40
    first, second = torch.cat(seen).chunk(2)
    for epoch in (first, second):
        assert torch.equal(epoch.sort().values, X[:, 0].sort().values)
    assert torch.equal(first, second) == (batch_size in (40, None))


def test_early_stop_returns_to_the_best_epoch():
    model, task, validation = normed(nn.BatchNorm1d(8)), rows(12), rows(200)
    options = {"epochs": 200, "validation": validation, "patience": 5}
    history = train(model, *task, optimizer=Adam(model.parameters(), lr=1e-2), **options)
    losses = history["validation_loss"]
    best = min(losses)
    assert 0 < losses.index(best) == len(losses) - 6 < 150
    assert len(history["loss"]) == len(history["validation_accuracy"]) == len(losses)
    assert evaluate(model, *validation).loss == best
    assert evaluate(model, *validation).accuracy == history["validation_accuracy"][-6]


def test_clipping_bounds_the_whole_gradient():
    task, start = rows(), copied(MLP())
    lengths = []
    for clip_norm in (None, 0.01, 1e6):
        model = MLP()
        model.load_state_dict(start)
        train(model, *task, optimizer=SGD(model.parameters(), lr=1), epochs=1, clip_norm=clip_norm)
        steps = [t - start[name] for name, t in model.state_dict().items()]
        lengths.append(torch.cat([s.flatten() for s in steps]).norm().item())
    assert lengths[1] == pytest.approx(0.01, rel=1e-3) and lengths[0] == lengths[2] > 0.1


@pytest.mark.parametrize(
    "warmup_steps, cosine, factors",
    [
        (0, False, [1, 1, 1, 1, 1, 1]),
        (4, False, [0.25, 0.5, 0.75, 1, 1, 1]),
        (2, True, [0.5, 1, 1, 0.8535534, 0.5, 0.1464466]),
        (0, True, [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_rates_follow_warmup_and_cosine_and_are_restored(warmup_steps, cosine, factors):
    model, seen = MLP(), []
    optimizer = SGD(param_groups(model, {"backbone": 0.1, "head": 0.2}))

    def recorded(model, x, y):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return cross_entropy(model, x, y) * (torch.nan if len(seen) == 7 else 1)

    options = {"batch_size": 16, "warmup_steps": warmup_steps, "cosine": cosine, "loss": recorded}
    train(model, *rows(), optimizer=optimizer, epochs=2, **options)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor([[f / 10, f / 5] for f in factors]))
    with pytest.raises(FloatingPointError, match=r"nan at step 1 of 6 \(epoch 1\)"):
        train(model, *rows(), optimizer=optimizer, epochs=2, **options)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_a_divergent_rate_is_told_with_its_step_and_never_scored():
    model = MLP()
    optimizer = SGD(model.parameters(), lr=1e200)
    train(model, *rows(), optimizer=optimizer, epochs=1)
    with pytest.raises(FloatingPointError, match="the loss of the scored rows is"):
        evaluate(model, *rows())
    with pytest.raises(FloatingPointError, match=r"the loss is .* at step 1 of 9 \(epoch 1\)"):
        train(model, *rows(), optimizer=optimizer, epochs=3, batch_size=16)


@pytest.mark.parametrize("optimizer", [Adam, AdamW, SGD])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_only_trainable_parameters_and_their_buffers_move(frozen, affine, optimizer):
    model = normed(nn.BatchNorm1d(8, affine=affine))
    if frozen:
        freeze(model.backbone)
    before = copied(model)
    optimizer = optimizer(model.parameters(), lr=0.1, weight_decay=0.1)
    train(model, *rows(), optimizer=optimizer, epochs=2, batch_size=16)
    assert moved(model, before) == [k for k in before if not frozen or k.startswith("head")]


CALLS = {
    "train": lambda m, X, y: train(m, X, y, optimizer=Adam(m.parameters()), epochs=2, batch_size=9),
    "evaluate": evaluate,
    "predict": lambda m, X, y: predict(m, X),
    "fail": lambda m, X, y: train(m, X, y, optimizer=SGD(m.parameters(), lr=1e300), epochs=4),
}


@pytest.mark.parametrize("call", CALLS)
def test_modes_and_global_state_are_left_as_they_were(call):
    def state():
        globals_ = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
        return globals_, torch.get_rng_state().tolist(), [m.training for m in model.modules()]

    model, task = normed(nn.BatchNorm1d(8)), rows()
    model.backbone[1].eval()
    before = state()
    try:
        CALLS[call](model, *task)
    except FloatingPointError:
        assert call == "fail"
    assert state() == before


def test_predict_is_eval_mode_without_gradients():
    model, (X, _) = normed(nn.Dropout(0.9)), rows()
    logits = predict(model, X, batch_size=7)
    assert not logits.requires_grad and model.training
    torch.testing.assert_close(logits, model.eval()(X).detach(), atol=1e-12, rtol=0)


def test_head_on_cached_features_equals_training_through_the_frozen_backbone():
    through, cached, (X, y) = MLP(), MLP(), rows()
    cached.load_state_dict(through.state_dict())
    options = {"epochs": 30, "batch_size": 16, "clip_norm": 0.5, "cosine": True}
    for model in (through, cached):
        freeze(model.backbone)
    train(through, X, y, optimizer=AdamW(through.head.parameters(), lr=0.01), **options)
    features = extract_features(cached, X, batch_size=7)
    assert not features.requires_grad
    train(cached.head, features, y, optimizer=AdamW(cached.head.parameters(), lr=0.01), **options)
    for name, t in through.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], t, atol=1e-12, rtol=0)
    unfreeze(cached.backbone[4])
    with pytest.raises(ValueError, match=r"'backbone.4.weight' is trainable"):
        extract_features(cached, X)


@pytest.mark.parametrize("device", ["auto", "cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_and_device_are_kept(dtype, device):
    (X, y), model = rows(), MLP().to(dtype)
    X = X.to(dtype)
    options = {"epochs": 2, "batch_size": 16, "clip_norm": 1.0, "validation": (X, y), "patience": 1}
    train(model, X, y, optimizer=Adam(model.parameters()), device=device, **options)
    assert evaluate(model, X, y, device=device).n == 40
    made = [*model.parameters(), predict(model, X, device=device)]
    freeze(model.backbone)
    made.append(extract_features(model, X, device=device))
    kind = "cpu" if device == "auto" else device
    assert {(t.dtype, t.device.type) for t in made} == {(dtype, kind)}


X, Y = torch.ones(4, 20, dtype=torch.float64), torch.arange(4)


@pytest.mark.parametrize(
    "bad, told",
    [
        ((X[:0], Y[:0]), "data has no rows"),
        ((X, Y[:, None]), r"data: y has shape \(4, 1\), expected \(4,\)"),
        ((X / 0, Y), "data: X holds 80 NaN or infinite values"),
        ((X, Y - 100), "data: label -100 is out of range, expected 0"),
        ((X, Y + 1), r"data: label 4 is out of range, expected 0..3 \(one model output per class"),
        ((X, Y.double()), "data: y is torch.float64, expected torch.int64"),
        ((X.long(), Y), "data: X is torch.int64, expected floating-point"),
    ],
)
@pytest.mark.parametrize("split", ["training", "validation", "evaluation"])
def test_unusable_rows_are_refused_before_anything_moves(split, bad, told):
    model = MLP()
    before, optimizer = copied(model), Adam(model.parameters())
    with pytest.raises(ValueError, match=f"^{split} {told}"):
        if split == "evaluation":
            evaluate(model, *bad)
        elif split == "validation":
            train(model, X, Y, optimizer=optimizer, epochs=1, validation=bad)
        else:
            train(model, *bad, optimizer=optimizer, epochs=1)
    assert not moved(model, before)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"patience": 2}, r"patience=2 needs validation=\(X, y\)"),
        ({"epochs": 0}, "epochs=0 must be 1 or more"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"patience": 0, "validation": rows()}, "patience=0 must be 1 or more"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 above 0 or None"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be 0 or more"),
        ({"optimizer": SGD(MLP().parameters())}, "the optimizer does not hold 'backbone.0.weight'"),
    ],
)
def test_unusable_settings_are_refused(options, told):
    model = MLP()
    settings = {"optimizer": SGD(model.parameters()), "epochs": 1} | options
    with pytest.raises(ValueError, match=told):
        train(model, X, Y, **settings)
