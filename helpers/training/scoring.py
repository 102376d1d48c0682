"""What a model answers, how much of it is right, and the features its head reads."""

import math
from typing import NamedTuple

import torch
from torch.nn import functional as F

from helpers.data import check_rows


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
    X : Tensor of shape (n, ...)
    batch_size : int, default=1024
        Rows per forward pass, which bounds the memory needed.
    device : str or torch.device, default="auto"
        As in `train`.

    Returns
    -------
    Tensor of shape (n, C)
    """
    device = _place(model, device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return torch.cat([model(x.to(device)) for x in X.split(batch_size)])
    finally:
        _set_modes(modes)


def evaluate(model, X, y, *, batch_size=1024, device="auto"):
    """Count correct rows and average the cross-entropy, both as sums over examples.

    Parameters
    ----------
    model : nn.Module
    X : Tensor of shape (n, ...)
    y : int64 Tensor of shape (n,)
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
    check_rows(X, y, name="evaluation data")
    logits = predict(model, X, batch_size=batch_size, device=device)
    check_rows(X, y, n_classes=logits.shape[-1], name="evaluation data")
    return score(logits, y.to(logits.device))


def score(logits, y):
    """Score logits that are there already; `evaluate` computes them.

    Parameters
    ----------
    logits : Tensor of shape (n, C)
    y : int64 Tensor of shape (n,)

    Returns
    -------
    Score

    Raises
    ------
    FloatingPointError
        If the loss is not finite: what a diverged model gets right means nothing.
    """
    loss = F.cross_entropy(logits, y, reduction="sum").item() / len(y)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss of the scored rows is {loss}: training has diverged")
    top = logits.topk(min(2, logits.shape[-1])).values
    return Score(
        correct=int((logits.argmax(-1) == y).sum()),
        n=len(y),
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
    X : Tensor of shape (n, ...)
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
        If a parameter below the head is trainable: its features would go stale.
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
    return torch.cat(seen)


def _place(model, device):
    """Move the model unless "auto", and return the device it is on."""
    if device != "auto":
        model.to(device)
    return next(model.parameters()).device


def _set_modes(modes):
    for module, mode in modes.items():
        module.training = mode
