"""Training: one loop that moves what is trainable, scores that are sums, and no side effects."""

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW
from torch.utils.checkpoint import checkpoint

from helpers.models import MLP
from helpers.peft import adapters_disabled, inject_lora, inject_prompt
from helpers.study import reproducible
from helpers.training import (
    activation_bytes,
    cross_entropy,
    evaluate,
    extract_features,
    freeze,
    operations,
    param_groups,
    predict,
    score,
    train,
    unfreeze,
)
from tests.small import TinyTransformer


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
        ((X[:0], Y[:0]), "data: X has no rows"),
        ((X, Y[:3].numpy()), r"data: y has shape \(3,\), expected \(4,\)"),
        ((X.numpy().astype(object), Y), "data: X is a ndarray of dtype object, expected a table"),
        ((X, list("abcd")), "data: y is a list of dtype <U1, expected a table of numbers"),
        ((X, Y[:, None]), r"data: y has shape \(4, 1\), expected \(4,\)"),
        ((X / 0, Y), "data: X holds 80 NaN or infinite values"),
        ((X, Y - 100), "data: label -100 is out of range, expected 0"),
        ((X, Y + 1), r"data: label 4 is out of range, expected 0..3 \(one model output per class"),
        ((X, Y.double()), "data: y is torch.float64, expected integers from 0"),
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
        ({"epochs": 0}, "epochs=0 must be an integer, 1 or more"),
        ({"epochs": 2.0}, "epochs=2.0 must be an integer, 1 or more"),
        ({"epochs": True}, "epochs=True must be an integer, 1 or more"),
        ({"epochs": torch.nan}, "epochs=nan must be an integer, 1 or more"),
        ({"batch_size": 0}, "batch_size=0 must be an integer, 1 or more"),
        ({"batch_size": "2"}, "batch_size='2' must be an integer, 1 or more"),
        ({"batch_size": np.float64(2)}, "batch_size=.*2.0.* must be an integer, 1 or more"),
        ({"patience": 0, "validation": rows()}, "patience=0 must be an integer, 1 or more"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be above 0 or None"),
        ({"clip_norm": torch.nan}, "clip_norm=nan must be above 0 or None"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be an integer, 0 or more"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5 must be an integer, 0 or more"),
        ({"warmup_steps": 1000, "epochs": 5}, "warmup_steps=1000 must be below 5, the number of"),
        ({"warmup_steps": 4, "epochs": 2, "batch_size": 2}, "warmup_steps=4 must be below 4"),
        ({"optimizer": SGD(MLP().parameters())}, "the optimizer does not hold 'backbone.0.weight'"),
    ],
)
def test_unusable_settings_are_refused_before_anything_moves(options, told):
    model = MLP()
    before = copied(model)
    settings = {"optimizer": SGD(model.parameters()), "epochs": 1} | options
    with pytest.raises(ValueError, match=told):
        train(model, X, Y, **settings)
    assert not moved(model, before)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients_is_refused_in_words(off):
    model = MLP()
    with (
        off(),
        pytest.raises(ValueError, match=r"gradients are off: train outside of torch.no_grad"),
    ):
        train(model, X, Y, optimizer=SGD(model.parameters()), epochs=1)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True])
def test_scoring_nothing_or_in_no_batches_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} must be an integer, 1 or more"):
        predict(MLP(), X, batch_size=batch_size)
    assert torch.equal(predict(model := MLP(), X, batch_size=None), predict(model, X))
    with pytest.raises(ValueError, match=r"^X has no rows"):
        predict(MLP(), X[:0])
    with pytest.raises(ValueError, match=r"^scored rows: logits has no rows"):
        score(X[:0], Y[:0])
    with pytest.raises(ValueError, match=r"^scored rows: y has shape \(3,\), expected \(4,\)"):
        score(X, Y[:3])


# --- a trainable parameter that no gradient reaches ---


class Uses(nn.Module):
    """Calls its layer, checkpoints it, or computes with a weight that no adapter sees."""

    def __init__(self, how):
        super().__init__()
        self.norm, self.how = nn.BatchNorm1d(20), how  # whose statistics the first pass moves
        self.fc, self.head = nn.Linear(20, 20, bias=False), nn.Linear(20, 4)

    def forward(self, x):
        x = self.norm(x)
        if self.how == "checkpoints":
            return self.head(checkpoint(self.fc, x, use_reentrant=True))
        return self.head(x @ self.fc.base.weight.T if self.how == "bypasses" else self.fc(x))


def adapted(how):
    model = Uses(how)
    freeze(model.fc, *([model.norm] if how == "checkpoints" else []))
    inject_lora(model, ["fc"], r=2)
    return model


class FillsWithZeros(SGD):
    """Leaves gradients of 0 where there is none, as optimizers of older torch did."""

    def zero_grad(self, set_to_none=False):
        super().zero_grad(set_to_none=False)


UNREACHED = {  # a model, its loss, and the first name that is told
    "bypassed": (lambda: adapted("bypasses"), cross_entropy, "'fc.lora_A', 'fc.lora_B': freeze"),
    "reentrant": (lambda: adapted("checkpoints"), cross_entropy, "'fc.lora_A', 'fc.lora_B': "),
    "part of the model": (MLP, lambda m, x, y: m.backbone(x).mean(), "'head.weight', 'head.bias'"),
    "no graph": (MLP, lambda m, x, y: m(x).detach().mean(), "'backbone.0.weight'.* and 5 more: "),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("optimizer", [SGD, FillsWithZeros])
@pytest.mark.parametrize("case", UNREACHED)
def test_what_no_gradient_reaches_is_refused_before_anything_moves(case, optimizer):
    make, loss, told = UNREACHED[case]
    model = make()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None  # stale
    before = copied(model)
    optimizer = optimizer((p for p in model.parameters() if p.requires_grad), lr=0.1)
    with pytest.raises(ValueError, match=f"^no gradient reaches {told}") as error:
        train(model, *rows(), optimizer=optimizer, epochs=2, loss=loss)
    assert not moved(model, before) and "\n" not in str(error.value)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    cured = adapted("calls")
    groups = param_groups(cured, {"": 0.1})
    assert train(cured, *rows(), optimizer=SGD(groups), epochs=2)["loss"][1] < 2


def test_disabled_adapters_and_a_prompt_that_is_never_called_are_not_trained_in_silence():
    model = adapted("calls")
    optimizer = SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    with adapters_disabled(model), pytest.raises(ValueError, match=r"no gradient .* 'fc.lora_A'"):
        train(model, *rows(), optimizer=optimizer, epochs=1)
    model = TinyTransformer()
    model.tokens = nn.Embedding(3, 2)  # tied to others, say: the model calls those
    freeze(model)
    inject_prompt(model, ["tokens"], num_virtual_tokens=2)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=r"no gradient reaches 'tokens.prompt': freeze"):
        train(model, torch.ones(4, 64), Y, optimizer=optimizer, epochs=1)


# --- rows of any dtype, and targets of any kind ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "given",
    [
        lambda X: X.double(),
        lambda X: X.half(),
        lambda X: X.numpy().astype(">f4"),
        lambda X: X.numpy().astype(np.float64)[::-1][::-1],
        lambda X: np.broadcast_to(X.numpy(), X.shape),
        lambda X: X.tolist(),
    ],
    ids=["double", "half", "other byte order", "reversed", "read-only", "list"],
)
def test_rows_are_cast_to_the_models_dtype(given, dtype):
    (X, y), found = rows(), []
    X = X.half().float()  # so that no cast of the given rows rounds, to bfloat16 apart
    for rows_ in ((X.to(dtype), y), (given(X), y.int().numpy()), (given(X), y.to(torch.uint8))):
        torch.manual_seed(0)
        model = nn.Sequential(OrderedDict(backbone=nn.Linear(20, 8), head=nn.Linear(8, 4)))
        options = {"optimizer": SGD(model.to(dtype).parameters(), lr=0.1), "epochs": 2}
        history = train(model, *rows_, batch_size=16, validation=rows_, **options)
        scored = evaluate(model, *rows_)
        freeze(model.backbone)
        costs = operations(model, *rows_), activation_bytes(model, *rows_)
        made = predict(model, rows_[0]), extract_features(model, rows_[0])
        assert {t.dtype for t in made} == {dtype}
        found.append((history, scored, costs, [t.tolist() for t in made]))
    assert found[0] == found[1] == found[2]


class Wraps(nn.Module):
    """An adapter wider than the layer that it wraps."""

    def __init__(self, base):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.base = base

    def forward(self, x):
        return (self.base(x) * self.scale).to(x)


def test_rows_fit_the_layer_that_an_adapter_wraps_and_a_model_without_parameters():
    model = nn.Sequential(Wraps(nn.Linear(20, 4, dtype=torch.bfloat16)))
    assert predict(model, X).dtype == torch.bfloat16
    assert torch.equal(predict(nn.Flatten(), X.float()), X.float())


@pytest.mark.parametrize(
    "call",
    [
        lambda m, X: predict(m, X),
        lambda m, X: evaluate(m, X, Y),
        lambda m, X: extract_features(m, X),
        lambda m, X: train(m, X, Y, optimizer=SGD(m.head.parameters(), lr=0.1), epochs=1),
    ],
    ids=["predict", "evaluate", "extract_features", "train"],
)
@pytest.mark.parametrize(
    "size, wide, narrow",
    [(1e6, torch.float32, torch.float16), (1e200, torch.float64, torch.float32)],
    ids=str,
)
def test_values_beyond_the_models_dtype_are_refused_naming_both(call, size, wide, narrow):
    model = MLP().to(narrow)
    freeze(model.backbone)
    before = copied(model)
    told = rf"\d+ values of {wide} rows are infinite in the model's {narrow}: .*model.to\({wide}\)"
    with pytest.raises(ValueError, match=told):
        call(model, (X * size).to(wide))
    assert not moved(model, before)


def test_rows_with_a_graph_or_of_inference_mode_can_be_trained_on():
    model, (X, y) = MLP(), rows()
    with torch.inference_mode():
        embedded = X * 2
    for given in (embedded, X * nn.Parameter(torch.tensor(2.0))):
        train(model, given, y, optimizer=SGD(model.parameters()), epochs=2)


def test_half_precision_scores_are_summed_in_single_precision():
    logits, y = torch.randn(3000, 4) * 40, torch.arange(3000) % 4  # the losses sum up to 2e5
    half = logits.half()
    scored, wanted = score(half, y), score(half.float(), y)
    assert (scored.loss, scored.correct) == (wanted.loss, wanted.correct)
    value = cross_entropy(lambda x: x, half, y)
    assert value.dtype == torch.float32 and value == pytest.approx(wanted.loss, rel=1e-5)


def test_a_model_may_return_an_object_that_has_logits():
    class Wrapped(MLP):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    plain, wrapped, task = MLP(), Wrapped(), rows()
    wrapped.load_state_dict(plain.state_dict())
    for model in (plain, wrapped):
        train(model, *task, optimizer=SGD(model.parameters(), lr=0.1), epochs=2)
    assert evaluate(plain, *task) == evaluate(wrapped, *task)
    freeze(wrapped.backbone)
    assert extract_features(wrapped, task[0]).shape == (40, 32)
    wrapped.forward = lambda x: SimpleNamespace(last_hidden_state=x)
    with pytest.raises(ValueError, match="a Wrapped returns a SimpleNamespace without logits"):
        train(wrapped, *task, optimizer=SGD(wrapped.parameters(), lr=0.1), epochs=1)
    wrapped.forward = lambda x: x @ wrapped.head.weight.new_ones(20, 32) @ wrapped.head.weight.T
    with pytest.raises(ValueError, match="the head was called with 0 rows for 40 of X"):
        extract_features(wrapped, task[0])


def squared(model, x, y):
    assert x.dtype == y.dtype  # older torch has no gradient of a loss of two dtypes
    return F.mse_loss(model(x)[:, 0], y)


def per_token(model, x, y):  # x and y of shape (B, T)
    return F.cross_entropy(model(x).transpose(1, 2), y)


def multi_label(model, x, y):
    return F.binary_cross_entropy_with_logits(model(x), y.to(x))


def whole_batch(model, x, y):
    if len(y) != 4:
        raise ValueError(f"a batch of {len(y)}, not the whole")
    return cross_entropy(model, x, y)


def padded(model, x, y):
    return F.cross_entropy(model(x), y, ignore_index=-1)


ROWS = np.sin(np.arange(480.0).reshape(24, 20))
OWN = {  # a model, rows of any kind, and the loss that reads them
    "regression": (
        lambda: MLP(n_classes=1).double(),
        torch.from_numpy(ROWS),
        torch.arange(24) / 24,
        squared,
    ),
    "numpy": (lambda: MLP(n_classes=1).float(), ROWS, np.linspace(0, 1, 24), squared),
    "multi-label": (MLP, ROWS, ROWS[:, :4] > 0, multi_label),
    "per token": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)),
        torch.arange(48).view(24, 2) % 9,
        np.arange(48, dtype=np.int32).reshape(24, 2) % 7,
        per_token,
    ),
    "padding": (MLP, ROWS, np.arange(24) % 5 - 1, padded),
}


@pytest.mark.parametrize("case", OWN)
def test_a_loss_of_ones_own_decides_what_y_may_be_and_when_to_stop(case):
    make, X, y, loss = OWN[case]
    model = make()
    options = {"epochs": 4, "batch_size": 10, "loss": loss, "validation": (X[:7], y[:7])}
    optimizer = SGD(model.parameters(), lr=0.01)
    history = train(model, X, y, optimizer=optimizer, **options)
    assert list(history) == ["loss", "validation_loss"]
    again = train(model, X, y, optimizer=SGD(model.parameters(), lr=0.0), **options | {"epochs": 1})
    assert again["validation_loss"][0] == history["validation_loss"][-1] < 9


def test_early_stopping_goes_by_the_loss_that_is_trained():
    (X, y), model = rows(12), normed(nn.Dropout(0.5))
    validation = torch.randn(30, 20), torch.randn(30)
    options = {"validation": validation, "patience": 5, "loss": squared, "epochs": 300}
    history = train(model, X, y * 1.0, optimizer=Adam(model.parameters(), lr=1e-2), **options)
    losses = history["validation_loss"]
    assert losses.index(min(losses)) == len(losses) - 6 < 200
    returned = F.mse_loss(predict(model, validation[0])[:, 0], validation[1]).item()
    assert returned == pytest.approx(min(losses), abs=1e-12)


@pytest.mark.parametrize(
    "y, options, told",
    [
        (Y[:3] * 1.0, {}, "^training data: y has 3 rows and X 4, expected as many"),
        (Y / torch.tensor([1, 0, 1, 0]), {}, "^training data: y holds 2 NaN .* in row 1"),
        (Y * 1.0, {"validation": (X, Y[:1])}, "^validation data: y has 1 rows and X 4"),
        (
            Y,
            {"loss": lambda m, x, y: m(x)[:, 0]},
            r"^the loss is a Tensor of shape \(4,\), expected",
        ),
        (
            Y,
            {"loss": lambda m, x, y: 1.0},
            r"^the loss is a float of shape \(\), expected a Tensor",
        ),
        (
            Y,
            {"loss": whole_batch, "validation": (X[:3], Y[:3])},
            "^a batch of 3, not the whole",  # before the first epoch, not after it
        ),
    ],
)
def test_what_a_loss_of_ones_own_cannot_read_is_refused_before_anything_moves(y, options, told):
    model = normed(nn.BatchNorm1d(8))
    before = copied(model)
    settings = {"loss": squared, "epochs": 3, "optimizer": SGD(model.parameters(), lr=0.1)}
    with pytest.raises(ValueError, match=told):
        train(model, X, y, **settings | options)
    assert not moved(model, before)


@pytest.mark.parametrize("shape", [(2, 3, 4), (4,)])
def test_outputs_that_are_no_logits_of_classes_ask_for_a_loss_of_ones_own(shape):
    model = nn.Sequential(nn.Linear(20, 24 // (2 if len(shape) == 1 else 1)))
    model.append(nn.Unflatten(1, (3, 8)) if len(shape) == 3 else nn.Flatten(0))
    with pytest.raises(
        ValueError, match=r"^training data: .* expected \(n, C\): others need a loss"
    ):
        train(model, X, Y, optimizer=SGD(model.parameters(), lr=0.1), epochs=1)


# --- batch norm and a batch of one row ---


def bare():
    """Batch norm that has no running statistics to go by in eval mode."""
    return nn.BatchNorm1d(8, track_running_stats=False)


class Pooled(nn.Module):
    """Batch norm over pixels, which one row has enough of, then (if `twice`) over their mean."""

    def __init__(self, twice):
        super().__init__()
        self.conv, self.pixels = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
        self.mean = nn.BatchNorm1d(4) if twice else nn.Identity()

    def forward(self, x):
        return self.mean(self.pixels(self.conv(x.view(-1, 1, 4, 5))).mean((2, 3)))


@pytest.mark.parametrize("loss", [cross_entropy, lambda m, x, y: cross_entropy(m, x, y)])
@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: normed(nn.BatchNorm1d(8)), "backbone.1"),
        (lambda: normed(bare()), "backbone.1"),
        (lambda: normed(bare().requires_grad_(False)), "backbone.1"),  # frozen, and no help
        (lambda: Pooled(True), "mean"),
    ],
)
@pytest.mark.parametrize("n, batch_size, works", [(33, 16, 17), (40, 39, 40), (9, 1, 3)])
def test_a_batch_of_one_is_refused_under_batch_norm_with_a_size_that_works(
    n, batch_size, works, make, name, loss
):
    model, task = make(), rows(n)
    before, options = copied(model), {"epochs": 2, "loss": loss}
    optimizer = SGD(model.parameters(), lr=0.1)
    told = f"^batch_size={batch_size} makes a batch of one row of {n}, .* '{name}' .*={works} works"
    with pytest.raises(ValueError, match=told):
        train(model, *task, optimizer=optimizer, batch_size=batch_size, **options)
    assert not moved(model, before)
    train(model, *task, optimizer=optimizer, batch_size=works, **options)


def test_one_row_is_enough_for_frozen_batch_norm_and_for_one_over_pixels():
    frozen, task = normed(nn.BatchNorm1d(8)), rows(33)
    freeze(frozen.backbone[1])
    for model in (frozen, Pooled(False)):
        train(model, *task, optimizer=SGD(model.parameters(), lr=0.1), epochs=1, batch_size=16)
    model = normed(nn.BatchNorm1d(8))
    with pytest.raises(
        ValueError, match=r"a batch of one row of 1, .*: it takes two rows, or freeze"
    ):
        train(model, *rows(1), optimizer=SGD(model.parameters(), lr=0.1), epochs=1)
