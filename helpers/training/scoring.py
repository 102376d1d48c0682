"""What a model answers, how much of it is right, and the features its head reads."""

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from helpers.data import as_rows, check_classes, check_rows, check_whole


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


@torch.no_grad()
def predict(model, X, *, batch_size=1024, device="auto"):
    """Return the logits of the rows of X, in eval mode and without gradients.

    Parameters
    ----------
    model : nn.Module
        Returns logits, or as the models of transformers do an object that has them.
    X : array of shape (n, ...)
        At least one row: no model need say of what shape nothing is. Floating numbers are cast to
        the model's dtype.
    batch_size : int, default=1024
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
    like, X = _place(model, device), as_rows(X)
    check_whole(1, batch_size=batch_size)
    with _kept_modes(model):
        model.eval()
        batches = X.split(int(batch_size or len(X)))
        return torch.cat([_logits(model, _fit(x, like)) for x in batches])


def evaluate(model, X, y, *, batch_size=1024, device="auto"):
    """Count correct rows and average the cross-entropy, both as sums over examples.

    Parameters
    ----------
    model : nn.Module
    X : array of shape (n, ...)
        Floating numbers, cast to the model's dtype.
    y : array of shape (n,)
        Class indices, of any integer dtype.
    batch_size : int, default=1024
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
    X, y = check_rows(X, y, name="evaluation data")
    return score(predict(model, X, batch_size=batch_size, device=device), y, name="evaluation data")


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


def extract_features(model, X, *, batch_size=1024, device="auto"):
    """Return what `model.head` reads, computed once: the features of a frozen backbone.

    ``train(model.head, extract_features(model, X), y, ...)`` gives the head that training it
    through the frozen backbone gives, without running the backbone each epoch (dropout in the
    backbone apart: features are those of eval mode).

    Parameters
    ----------
    model : nn.Module
        Has a ``head``; all its other parameters are frozen.
    X : array of shape (n, ...)
        As in `predict`.
    batch_size : int, default=1024
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
    heads = {id(p) for p in model.head.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in heads:
            raise ValueError(f"{name!r} is trainable, so its features go stale: freeze it first")
    seen = []
    hook = model.head.register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    try:
        predict(model, X, batch_size=batch_size, device=device)
    finally:
        hook.remove()
    if (read := sum(map(len, seen))) != len(X):
        raise ValueError(
            f"the head was called with {read} rows for {len(X)} of X: expected as many"
        )
    return torch.cat(seen)


def _logits(model, x):
    """Return what a model answers: its output or, of a transformers' output, the logits in it."""
    output = model(x)
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
