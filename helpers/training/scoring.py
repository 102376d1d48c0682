"""What a model answers, how much of it is right, and the features its head reads."""

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from helpers.data import as_rows, check_classes, check_whole
from helpers.training.batches import (
    _apply,
    _by_length,
    _call,
    _checked,
    _inputs,
    _labelled,
    _n_rows,
    _take,
    _unpacked,
)  # fmt: skip


class Score(NamedTuple):
    """What a model got right, summed over examples.

    Attributes
    ----------
    correct, n : int
        Rows whose largest logit is their label's, and rows scored.
    loss : float
        Mean cross-entropy per row, in nats.
    margin : float
        Smallest gap between a row's two largest logits: the closest of these decisions. Rounding
        that moves logits by as much, on another processor, can change `correct`.
    """

    correct: int
    n: int
    loss: float
    margin: float

    @property
    def accuracy(self):
        """Return correct / n."""
        return self.correct / self.n


def predict(model, X, *, batch_size=256, device="auto"):
    """Return the logits of the rows of X, in eval mode and without gradients.

    Rows of tokens go through the model in order of their lengths, each batch cut to its longest
    row; what comes back is in the order of X.

    Parameters
    ----------
    model : nn.Module
        Returns logits, or as the models of transformers do an object that has them.
    X : array of shape (n, ...), dict or tuple of Tensor, Dataset or DataLoader
        At least one row: no model need say of what shape nothing is. Floating numbers are cast to
        the model's dtype. A tuple's or a dict's tensors are a model's several inputs; labels in a
        dataset or loader, as `train` takes them, are not read.
    batch_size : int, default=256
        Rows per forward pass, which bounds the memory needed; None takes all of them in one.
    device : str or torch.device, default="auto"
        As in `train`.

    Returns
    -------
    Tensor of shape (n, C)

    Raises
    ------
    ValueError
        If there are no rows, or a value is infinite in the model's dtype.
    """
    logits, _ = _scored(model, X, None, batch_size, device)
    return logits


def evaluate(model, X, y=None, *, batch_size=256, device="auto"):
    """Count correct rows and average the cross-entropy, both as sums over examples.

    Parameters
    ----------
    model : nn.Module
    X : array of shape (n, ...), dict or tuple of Tensor, Dataset or DataLoader
        As in `predict`.
    y : array of shape (n,), optional
        Class indices, of any integer dtype; None where X holds them, as in `train`.
    batch_size : int, default=256
        Rows per forward pass; it does not change the result.
    device : str or torch.device, default="auto"
        As in `train`.

    Returns
    -------
    Score

    Raises
    ------
    ValueError
        If the rows are unusable or a label has no output.
    FloatingPointError
        If the loss is not finite.
    """
    name = "evaluation data"
    logits, y = _scored(model, X, y, batch_size, device, name=name)
    return score(logits, y, name=name)


def _scored(model, X, y, batch_size, device, *, name=None):
    """Return logits and labels of all rows; with a name, labels must be there and are checked."""
    if isinstance(X, DataLoader):
        if y is not None:
            raise ValueError("a DataLoader has labels: leave y out")
        parts = [_scored(model, *_unpacked(b), batch_size, device, name=name) for b in X]
        if not parts:
            raise ValueError("the DataLoader has no batches: expected one or more")
        logits, labels = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(labels) if name else None
    X, y = _labelled(X, y, name=name or "X")
    if name:
        X, y = _checked(model, X, y, name=name)
    return _by_batch(lambda x: _logits(model, x), model, X, batch_size, device), y


@torch.no_grad()
def _by_batch(f, model, X, batch_size, device):
    """Return f of all rows of X, batch by batch, the model in eval mode; in the order of X."""
    like, X = _place(model, device), _inputs(X)
    if hasattr(X, "check"):
        X.check(model)
    check_whole(1, batch_size=batch_size)
    n = _n_rows(X)
    order = _by_length(X)
    rows = torch.arange(n) if order is None else order
    with _kept_modes(model):
        model.eval()
        parts = rows.split(int(batch_size or n))
        found = [f(_fit(_take(X, part), like)) for part in parts]
    if found[0].ndim == 3:  # as many tokens as the longest row has
        T = max(part.shape[1] for part in found)
        found = [F.pad(part, (0, 0, 0, T - part.shape[1])) for part in found]
    found = torch.cat(found)
    return found if order is None else found[order.argsort()]


def score(logits, y, *, name="scored rows"):
    """Score logits that are there already; `evaluate` computes them.

    Parameters
    ----------
    logits : Tensor of shape (n, C)
        Those of half precision are summed up in single precision.
    y : array of shape (n,)
        Class indices, of any integer dtype.
    name : str, default="scored rows"
        What the error message calls these rows.

    Returns
    -------
    Score

    Raises
    ------
    ValueError
        If there are no rows, or not one label below C for each.
    FloatingPointError
        If the loss is not finite: what a diverged model gets right means nothing.
    """
    logits = as_rows(logits, name=f"{name}: logits")
    n, C = len(logits), _n_classes(logits, name)
    y = check_classes(y, n, n_classes=C, name=name).to(logits.device)
    loss = F.cross_entropy(_wide(logits), y, reduction="sum").item() / n
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of the scored rows is {loss}: training has diverged")
    top = logits.topk(min(2, logits.shape[-1])).values
    return Score(
        correct=int((logits.argmax(-1) == y).sum()),
        n=n,
        loss=loss,
        margin=(top[:, 0] - top[:, -1]).min().item(),
    )


def extract_features(model, X, *, head="head", batch_size=256, device="auto"):
    """Return what `model.head` reads, computed once: the features of a frozen backbone.

    ``train(model.head, extract_features(model, X), y, ...)`` gives the head that training it
    through the frozen backbone gives, without running the backbone each epoch (dropout in the
    backbone apart: features are those of eval mode).

    Parameters
    ----------
    model : nn.Module
        All but its head is frozen.
    X : array of shape (n, ...), dict or tuple of Tensor, Dataset or DataLoader
        As in `predict`.
    head : str, default="head"
        What the model calls its head.
    batch_size : int, default=256
        Rows per forward pass.
    device : str or torch.device, default="auto"
        As in `train`.

    Returns
    -------
    Tensor of shape (n, k)

    Raises
    ------
    ValueError
        If a parameter below the head is trainable (its features would go stale), or the model
        does not call its head once with a row for each row of X.
    """
    module = model.get_submodule(head)
    heads = {id(p) for p in module.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in heads:
            raise ValueError(f"{name!r} is trainable, so its features go stale: freeze it first")
    seen = []
    hook = module.register_forward_pre_hook(lambda head, args: seen.append(args[0]))

    def _read(x):
        seen.clear()
        _call(model, x)
        if (read := sum(map(len, seen))) != _n_rows(x):
            told = f"the head was called with {read} rows for {_n_rows(x)} of X"
            raise ValueError(f"{told}: expected as many")
        return torch.cat(seen)

    try:
        if isinstance(X, DataLoader):
            parts = [_by_batch(_read, model, _unpacked(b)[0], batch_size, device) for b in X]
            return torch.cat(parts)
        return _by_batch(_read, model, _labelled(X, None)[0], batch_size, device)
    finally:
        hook.remove()


def _logits(model, x):
    """Return what a model answers: its output or, of a transformers' output, the logits in it."""
    output = _call(model, x)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        kinds = f"a {type(model).__name__} returns a {type(output).__name__}"
        raise ValueError(f"{kinds} without logits: train and score a model with a head")
    return logits


def _n_classes(logits, name):
    if logits.ndim != 2:
        told = f"the model's output has shape {tuple(logits.shape)}"
        raise ValueError(f"{name}: {told}, expected (n, C): others need a loss of your own")
    return logits.shape[1]


def _wide(logits):
    """Return half-precision numbers in single precision, which a sum over many rows needs."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _place(model, device):
    """Move the model unless "auto"; return a tensor of the device and dtype that its rows need.

    Adapters may be wider than the layer they wrap: its `base` is what rows must fit.
    """
    if device != "auto":
        model.to(device)
    layers = (m for m in model.modules() if not isinstance(getattr(m, "base", None), nn.Module))
    held = (t for m in layers for t in (*m.parameters(False), *m.buffers(False)))
    return next((t for t in held if t.is_floating_point()), torch.empty(0))


def _fit(rows, like):
    """Return rows on the device of `like`, floating numbers in its dtype."""
    return _apply(lambda x: _cast(x, like), rows)


def _cast(rows, like):
    rows = rows.to(like.device)
    if not rows.is_floating_point() or rows.dtype == like.dtype:
        return rows
    cast = rows.to(like.dtype)
    if lost := int((cast.isinf() & rows.isfinite()).sum()):
        raise ValueError(
            f"{lost} values of {rows.dtype} rows are infinite in the model's {like.dtype}: scale"
            f" them down, or use model.to({rows.dtype})"
        )
    return cast


@contextmanager
def _kept_modes(model):
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
