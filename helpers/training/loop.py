"""One training loop: what it refuses before anything moves, its steps, its early stopping."""

import copy
import math
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from helpers.data import check_classes, check_whole
from helpers.training.batches import _checked, _labelled, _take, _unpacked
from helpers.training.checks import _check_reached, _first_step
from helpers.training.freezing import check_optimizer
from helpers.training.scoring import (
    _fit,
    _kept_modes,
    _logits,
    _n_classes,
    _place,
    _wide,
    evaluate,
    predict,
)

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def cross_entropy(model, x, y):
    """Return the mean of -log softmax(model(x))[y], `train`'s default loss.

    Parameters
    ----------
    model : nn.Module
    x : Tensor of shape (B, ...), dict or tuple of Tensor
    y : int64 Tensor of shape (B,)

    Returns
    -------
    Tensor
        A scalar, in single precision if the logits are in half.
    """
    return F.cross_entropy(_wide(_logits(model, x)), y)


def train(
    model,
    X,
    y=None,
    *,
    optimizer,
    epochs,
    batch_size=None,
    generator=None,
    loss=cross_entropy,
    validation=None,
    patience=None,
    clip_norm=None,
    warmup_steps=0,
    cosine=False,
    device="auto",
):
    """Minimise the mean loss over the rows of X by steps of `optimizer`.

    What cannot be trained is refused before a step is made, with the model as it was. Normalisation
    layers whose parameters are all frozen run in eval mode, so that their running statistics stay
    as they were. Each module is left in the mode it came in.

    Parameters
    ----------
    model : nn.Module
        Of any floating dtype. In half precision most small steps are rounded to none: train in
        single precision what is trained.
    X : array of shape (n, ...), dict or tuple of Tensor, Dataset or DataLoader
        Floating numbers, which are cast to the model's dtype, or token ids. A dict's or a tuple's
        tensors are a model's several inputs, ``model(**X)`` or ``model(*X)``; a batch is cut to
        its longest row by a dict's "mask" or "attention_mask". A dataset is read into memory.
    y : array of shape (n, ...), optional
        Class indices of shape (n,), or what a `loss` of your own reads: any finite numbers. None
        where X holds them: as "labels" or "label" of a dict, or last in a dataset's tuples.
    optimizer : torch.optim.Optimizer
        Holds every trainable parameter of `model`: build it after freezing and unfreezing.
    epochs : int
        Passes over the rows.
    batch_size : int, optional
        Rows per step; None takes all of them in one step, and a loader's batches as they come.
    generator : torch.Generator, optional
        Of the batch order; None is a new one with seed 0.
    loss : callable, default=cross_entropy
        ``loss(model, x, y)``, the scalar to minimise, a mean over rows.
    validation : tuple of (X, y), or Dataset or DataLoader, optional
        Scored after each epoch, in eval mode.
    patience : int, optional
        Stop after this many epochs without a lower validation loss and return to the weights of
        the best epoch.
    clip_norm : float, optional
        Largest norm of the whole gradient.
    warmup_steps : int, default=0
        Steps over which the learning rates rise linearly to those of `optimizer`.
    cosine : bool, default=False
        After the warm-up, lower the rates to 0 along half a cosine (Loshchilov & Hutter 2017,
        section 3, arXiv:1608.03983).
    device : str or torch.device, default="auto"
        Where to train; the model is moved there. "auto" is where the model already is.

    Returns
    -------
    dict of str to list of float
        Per epoch: "loss", the mean training loss seen by its steps; with `validation`
        "validation_loss", the mean of `loss` over its rows, and with the default loss
        "validation_accuracy".

    Raises
    ------
    ValueError
        If rows or settings are unusable, nothing is trainable, the optimizer lacks a trainable
        parameter, or it has state for a frozen one (it would move it still); if the first backward
        pass leaves a trainable parameter without a gradient (a layer that chance or a router
        leaves out of the first batch counts), or batch norm would see a batch of one.
    FloatingPointError
        If the loss is not finite; the message names the step.
    """
    rows = _rows(model, X, y, batch_size, loss, device)
    validation = _prepared_validation(model, validation, loss, device)
    steps = _check_settings(rows, epochs, validation, patience, clip_norm, warmup_steps)
    check_optimizer(model, optimizer)
    generator = generator or torch.Generator().manual_seed(0)
    history, step, stopping = {"loss": []}, 0, _Stopping(model, patience)
    with _training(model, optimizer) as rates:
        for epoch in range(epochs):
            total = seen = 0
            for x, target in rows.batches(generator):
                _set_rates(optimizer, rates, _rate_factor(step, steps, warmup_steps, cosine))
                optimizer.zero_grad()
                with nullcontext() if step else _first_step(model, rows):
                    when = f"at step {step + 1} of {steps} (epoch {epoch + 1})"
                    value = _gradients(model, x, target, loss, clip_norm, when)
                optimizer.step()
                total, seen = total + value * len(target), seen + len(target)
                step += 1
            history["loss"].append(total / seen)
            if validation and stopping.due(history, _validation(model, loss, *validation)):
                break
        stopping.restore()
    return history


class _InMemory:
    """Rows in memory, in a new order each epoch."""

    def __init__(self, X, y, batch_size):
        check_whole(1, batch_size=batch_size)
        self.X, self.y, self.n = X, y, len(y)
        self.batch_size = self.n if batch_size is None else int(batch_size)
        self.steps = math.ceil(self.n / self.batch_size)

    def batches(self, generator):
        if self.batch_size >= self.n:  # one batch has no order: no random number is drawn
            orders = [slice(None)]
        else:
            order = torch.randperm(self.n, generator=generator)
            orders = order.to(self.y.device).split(self.batch_size)
        for rows in orders:
            yield _take(self.X, rows), self.y[rows]


class _Loaded:
    """A loader's batches, each checked when it comes."""

    def __init__(self, loader, prepare):
        self.loader, self.prepare, self.classes = loader, prepare, None
        try:
            self.steps = len(loader)
        except TypeError:
            raise ValueError("the DataLoader has no length: give its dataset one") from None
        self.batch_size = loader.batch_size or 2  # a sampler of one's own makes batches of any size
        whole = loader.drop_last or loader.batch_size is None
        self.n = self.steps * self.batch_size if whole else len(loader.dataset)

    def batches(self, generator):
        for batch in self.loader:
            X, y, self.classes = self.prepare(*_unpacked(batch), classes=self.classes)
            yield X, y


def _rows(model, X, y, batch_size, loss, device):
    """Return training rows, which are checked, on the model's device and in its dtype."""
    like = _place(model, device)
    if isinstance(X, DataLoader):
        if y is not None or batch_size is not None:
            raise ValueError("a DataLoader has labels and a batch size: leave y and batch_size out")
        return _Loaded(X, partial(_prepared, model, loss=loss, like=like, name="training batch"))
    X, y, _ = _prepared(model, X, y, loss, like, "training data")
    return _InMemory(X, y, batch_size)


def _prepared(model, X, y, loss, like, name, classes=None):
    """Return checked rows on the model's device and in its dtype, and its number of classes."""
    own = loss is not cross_entropy
    X, y = _checked(model, *_labelled(X, y, name=name), classes=not own, name=name)
    if not own:
        classes = classes or _n_classes(predict(model, _take(X, slice(2))), name)
        check_classes(y, len(y), n_classes=classes, name=name)
    return _fit(X, like), _fit(y, like), classes


def _prepared_validation(model, rows, loss, device):
    """Return validation rows checked, or a loader of them, which a loss of one's own can score."""
    if rows is None:
        return None
    X, y = rows if isinstance(rows, tuple) else (rows, None)
    if isinstance(X, DataLoader):
        if loss is not cross_entropy or y is not None:
            cure = "give rows for a loss of your own" if y is None else "leave y out"
            raise ValueError(f"the validation DataLoader has labels for evaluate: {cure}")
        return X, y
    X, y, _ = _prepared(model, X, y, loss, _place(model, device), "validation data")
    if loss is not cross_entropy:  # a loss that cannot score these rows fails here
        _validation(model, loss, X, y)
    return X, y


def _check_settings(rows, epochs, validation, patience, clip_norm, warmup_steps):
    """Refuse settings that cannot work; return the number of steps."""
    check_whole(1, epochs=epochs, patience=patience)
    check_whole(0, warmup_steps=warmup_steps)
    steps = epochs * rows.steps
    if warmup_steps >= steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be below {steps}, the number of steps")
    if clip_norm is not None and not clip_norm > 0:  # NaN is not
        raise ValueError(f"{clip_norm=} must be above 0 or None")
    if patience is not None and validation is None:
        raise ValueError(f"patience={patience} needs validation=(X, y): early stopping looks there")
    if not torch.is_grad_enabled():
        raise ValueError("gradients are off: train outside of torch.no_grad and inference_mode")
    return steps


def _gradients(model, x, y, loss, clip_norm, when):
    """Leave a batch's gradients, clipped, in the parameters; return its loss."""
    value = loss(model, x, y)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        kind = f"{type(value).__name__} of shape {tuple(getattr(value, 'shape', ()))}"
        raise ValueError(f"the loss is a {kind}, expected a Tensor of one number")
    number = value.item()
    if not math.isfinite(number):
        told = f"the loss is {number} {when}"
        raise FloatingPointError(f"{told}: lower the learning rate or set clip_norm")
    if value.requires_grad:
        value.backward()
    else:
        _check_reached(model)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), clip_norm)
    return number


@torch.no_grad()
def _validation(model, loss, X, y, batch_size=256):
    """Score validation rows: their mean loss and, if it is cross-entropy, their accuracy."""
    if loss is cross_entropy:
        score = evaluate(model, X, y)
        return {"validation_loss": score.loss, "validation_accuracy": score.accuracy}
    with _kept_modes(model):
        model.eval()
        parts = torch.arange(len(y), device=y.device).split(batch_size)
        losses = [float(loss(model, _take(X, part), y[part])) * len(part) for part in parts]
        mean = sum(losses) / len(y)
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss of the validation rows is {mean}")
    return {"validation_loss": mean}


class _Stopping:
    """Early stopping: after `patience` epochs without a lower loss, back to the best one."""

    def __init__(self, model, patience):
        self.model, self.patience, self.best = model, patience, None

    def due(self, history, scores):
        """Note an epoch's scores; return whether it should be the last."""
        for name, value in scores.items():
            history.setdefault(name, []).append(value)
        if self.patience is None:
            return False
        losses = history["validation_loss"]
        since = len(losses) - 1 - losses.index(min(losses))
        if since == 0:
            self.best = copy.deepcopy(self.model.state_dict())
        return since >= self.patience

    def restore(self):
        """Return to the weights of the best epoch."""
        if self.best is not None:
            self.model.load_state_dict(self.best)


@contextmanager
def _training(model, optimizer):
    """Yield the learning rates; in the end rates and modes are as before and gradients dropped."""
    rates = [group["lr"] for group in optimizer.param_groups]
    with _kept_modes(model):
        try:
            _train_mode(model)
            yield rates
        finally:
            optimizer.zero_grad()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def _train_mode(model):
    """Train mode, except normalisation layers that are frozen: their buffers stay as they are.

    A layer without parameters of its own goes by the nearest enclosing module that has some.
    """
    model.train()
    for name, module in model.named_modules():
        if isinstance(module, NORMS):
            owner = module
            while name and not any(True for _ in owner.parameters()):
                name = name.rpartition(".")[0]
                owner = model.get_submodule(name)
            if not any(p.requires_grad for p in owner.parameters()):
                module.eval()


def _set_rates(optimizer, rates, factor):
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor


def _rate_factor(step, steps, warmup_steps, cosine):
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if not cosine:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
