"""One training loop: what it refuses before anything moves, its steps, its early stopping."""

import copy
import math
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from helpers.data import check_classes, check_rows, check_whole
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

BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def cross_entropy(model, x, y):
    """Return the mean of -log softmax(model(x))[y], `train`'s default loss.

    Parameters
    ----------
    model : nn.Module
    x : Tensor of shape (B, ...)
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
    y,
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
    X : array of shape (n, ...)
        Floating numbers, which are cast to the model's dtype.
    y : array of shape (n, ...)
        Class indices of shape (n,), or what a `loss` of your own reads: any finite numbers.
    optimizer : torch.optim.Optimizer
        Holds every trainable parameter of `model`: build it after freezing and unfreezing.
    epochs : int
        Passes over the rows.
    batch_size : int, optional
        Rows per step; None takes all of them in one step.
    generator : torch.Generator, optional
        Of the batch order; None is a new one with seed 0.
    loss : callable, default=cross_entropy
        ``loss(model, x, y)``, the scalar to minimise, a mean over rows.
    validation : tuple of (X, y), optional
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
    (X, y), validation = _prepared(model, (X, y), validation, loss, device)
    batch_size = len(X) if batch_size is None else batch_size
    steps = _check_settings(X, epochs, batch_size, validation, patience, clip_norm, warmup_steps)
    check_optimizer(model, optimizer)
    generator = generator or torch.Generator().manual_seed(0)
    history, step, stopping = {"loss": []}, 0, _Stopping(model, patience)
    with _training(model, optimizer) as rates:
        for epoch in range(epochs):
            total = 0.0
            for rows in _batches(X, batch_size, generator):
                _set_rates(optimizer, rates, _rate_factor(step, steps, warmup_steps, cosine))
                optimizer.zero_grad()
                with nullcontext() if step else _first_step(model, len(X), batch_size):
                    when = f"at step {step + 1} of {steps} (epoch {epoch + 1})"
                    value = _gradients(model, X[rows], y[rows], loss, clip_norm, when)
                optimizer.step()
                total += value * len(y[rows])
                step += 1
            history["loss"].append(total / len(X))
            if validation and stopping.due(history, _validation(model, loss, *validation)):
                break
        stopping.restore()
    return history


def _prepared(model, rows, validation, loss, device):
    """Return both sets of rows checked, on the model's device and in its dtype."""
    like, own, found = _place(model, device), loss is not cross_entropy, []
    for name, given in {"training data": rows, "validation data": validation}.items():
        if given is None:
            found.append(None)
            continue
        X, y = check_rows(*given, classes=not own, name=name)
        if not own:
            C = _n_classes(predict(model, X[:2]), name)
            check_classes(y, len(X), n_classes=C, name=name)
        found.append((_fit(X, like), _fit(y, like)))
    if own and validation is not None:  # a loss that cannot score these rows fails here
        _validation(model, loss, *found[1])
    return found


def _check_settings(X, epochs, batch_size, validation, patience, clip_norm, warmup_steps):
    """Refuse settings that cannot work; return the number of steps."""
    check_whole(1, epochs=epochs, batch_size=batch_size, patience=patience)
    check_whole(0, warmup_steps=warmup_steps)
    steps = epochs * math.ceil(len(X) / batch_size)
    if warmup_steps >= steps:
        raise ValueError(f"warmup_steps={warmup_steps} must be below {steps}, the number of steps")
    if clip_norm is not None and not clip_norm > 0:  # NaN is not
        raise ValueError(f"{clip_norm=} must be above 0 or None")
    if patience is not None and validation is None:
        raise ValueError(f"patience={patience} needs validation=(X, y): early stopping looks there")
    if not torch.is_grad_enabled():
        raise ValueError("gradients are off: train outside of torch.no_grad and inference_mode")
    return steps


def _batches(X, batch_size, generator):
    """Return the rows of each batch, in a new order each time."""
    if batch_size >= len(X):  # one batch has no order: no random number is drawn
        return [slice(None)]
    return torch.randperm(len(X), generator=generator).to(X.device).split(int(batch_size))


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


@contextmanager
def _first_step(model, n, batch_size):
    """Refuse what a first pass shows to be untrainable, with the model's statistics put back."""
    buffers = [(b, b.clone()) for b in model.buffers() if b.is_floating_point() or b.ndim == 0]
    hooks = _batch_norm_hooks(model, n, batch_size)
    model.zero_grad()  # some optimizers fill gradients with 0 where none must be
    try:
        yield
        _check_reached(model)
    except BaseException:
        for buffer, before in buffers:
            buffer.copy_(before)
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _check_reached(model):
    names = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"no gradient reaches {', '.join(map(repr, names[:3]))}{more}: freeze what the loss"
            " does not use, or have the model call these layers, not read their weights (under"
            " gradient checkpointing set use_reentrant=False)"
        )


def _batch_norm_hooks(model, n, batch_size):
    """Look at what batch norm reads, if one row will be a batch: one value has no variance."""
    first = min(batch_size, n)
    if (n % batch_size or first) > 1:
        return []
    works = [b for b in range(2, n + 1) if b > batch_size and n % b != 1]
    cure = f"batch_size={works[0]} works" if works else "it takes two rows"
    names = {m: name for name, m in model.named_modules() if isinstance(m, BATCH_NORM)}

    def _look(module, args):
        x = args[0]  # (B, C, ...)
        if x.numel() <= first * x.shape[1]:
            more = "" if module.running_mean is None else ", or freeze the layer"
            raise ValueError(
                f"batch_size={batch_size} makes a batch of one row of {n}, which batch norm"
                f" {names[module]!r} cannot standardise: {cure}{more}"
            )

    active = [m for m in names if m.training or m.running_mean is None]
    return [m.register_forward_pre_hook(_look) for m in active]


@torch.no_grad()
def _validation(model, loss, X, y, batch_size=1024):
    """Score validation rows: their mean loss and, if it is cross-entropy, their accuracy."""
    if loss is cross_entropy:
        score = evaluate(model, X, y)
        return {"validation_loss": score.loss, "validation_accuracy": score.accuracy}
    with _kept_modes(model):
        model.eval()
        batches = zip(X.split(batch_size), y.split(batch_size), strict=True)
        mean = sum(float(loss(model, x, t)) * len(x) for x, t in batches) / len(X)
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
