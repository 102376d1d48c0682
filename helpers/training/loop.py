"""One training loop, one evaluation, and features cached from a frozen backbone."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from helpers.data import check_rows
from helpers.training.freezing import check_optimizer
from helpers.training.scoring import _place, _set_modes, evaluate, predict

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
        A scalar.
    """
    return F.cross_entropy(model(x), y)


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

    Normalisation layers whose parameters are all frozen run in eval mode, so that their running
    statistics stay as they were. Each module is left in the mode it came in.

    Parameters
    ----------
    model : nn.Module
    X : Tensor of shape (n, ...)
    y : int64 Tensor of shape (n,)
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
        Scored after each epoch.
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
        Per epoch: "loss", the mean training loss seen by its steps, and with `validation`
        "validation_loss" and "validation_accuracy".

    Raises
    ------
    ValueError
        If rows or settings are unusable, nothing is trainable, the optimizer lacks a trainable
        parameter, or it has state for a frozen one (it would move it still).
    FloatingPointError
        If the loss is not finite; the message names the step.
    """
    device = _place(model, device)
    check_rows(X, y, name="training data")
    n_classes = predict(model, X[:1]).shape[-1]
    check_rows(X, y, n_classes=n_classes, name="training data")
    if validation is not None:
        check_rows(*validation, n_classes=n_classes, name="validation data")
    if patience is not None and validation is None:
        raise ValueError(f"patience={patience} needs validation=(X, y): early stopping looks there")
    batch_size = len(X) if batch_size is None else batch_size
    for name, value in {"epochs": epochs, "batch_size": batch_size, "patience": patience}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if warmup_steps < 0 or (clip_norm is not None and clip_norm <= 0):
        raise ValueError(f"{warmup_steps=} must be 0 or more, {clip_norm=} above 0 or None")
    check_optimizer(model, optimizer)
    X, y = X.to(device), y.to(device)
    generator = generator or torch.Generator().manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * math.ceil(len(X) / batch_size)
    history = {"loss": []}
    if validation is not None:
        history |= {"validation_loss": [], "validation_accuracy": []}
    step, best, best_state = 0, math.inf, None
    modes = {module: module.training for module in model.modules()}
    try:
        _train_mode(model)
        for epoch in range(epochs):
            full = batch_size >= len(X)  # one batch has no order: no random number is drawn
            order = None if full else torch.randperm(len(X), generator=generator).to(device)
            total = 0.0
            for rows in [slice(None)] if full else order.split(batch_size):
                factor = _rate_factor(step, steps, warmup_steps, cosine)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                optimizer.zero_grad()
                value = loss(model, X[rows], y[rows])
                if not torch.isfinite(value):
                    raise FloatingPointError(
                        f"the loss is {value.item()} at step {step + 1} of {steps} (epoch"
                        f" {epoch + 1}): lower the learning rate or set clip_norm"
                    )
                value.backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(trained, clip_norm)
                optimizer.step()
                total += value.item() * len(y[rows])
                step += 1
            history["loss"].append(total / len(X))
            if validation is None:
                continue
            score = evaluate(model, *validation)
            history["validation_loss"].append(score.loss)
            history["validation_accuracy"].append(score.accuracy)
            if score.loss < best:
                best, best_epoch = score.loss, epoch
                if patience is not None:
                    best_state = {k: v.clone() for k, v in model.state_dict().items()}
            elif patience is not None and epoch - best_epoch >= patience:
                break
        if best_state is not None:
            model.load_state_dict(best_state)
    finally:
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        _set_modes(modes)
    return history


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


def _rate_factor(step, steps, warmup_steps, cosine):
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if not cosine:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
