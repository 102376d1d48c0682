"""Strategies: what each one freezes, draws anew and trains, and at which rates."""

import copy

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam

from helpers.models import stages, with_fresh_head
from helpers.training.freezing import freeze_to, param_groups, unfreeze
from helpers.training.loop import cross_entropy, train


def fit(model, X, y, *, lr, epochs, **options):
    """Train what is trainable by a new Adam: `train` with the series' optimizer.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    X : Tensor of shape (n, ...)
    y : int64 Tensor of shape (n,)
    lr : float or dict of str to float
        One learning rate, or several by name as `param_groups` takes them.
    epochs : int
        Passes over the rows; each is one step on all of them without a ``batch_size``.
    **options : object
        Of `train`.

    Returns
    -------
    dict of str to list of float
        The history of `train`.

    Raises
    ------
    ValueError
        If the rates do not fit what is trainable, as `param_groups` says, or the rows or options
        are unusable, as `train` says.
    """
    rates = lr if isinstance(lr, dict) else {"": lr}
    # fused: default Adam's square root is not rounded the same by every processor vendor
    optimizer = Adam(param_groups(model, rates), fused=True)
    return train(model, X, y, optimizer=optimizer, epochs=epochs, **options)


def fine_tune(
    base, X, y, *, lr, epochs, from_stage, head_lr=None, n_classes=None, fresh_head=True, **options
):
    """Train a copy of a pre-trained model from one stage on, under a fresh head.

    Feature extraction trains the head alone (``from_stage=-1``), fine-tuning some or all of the
    backbone as well, and domain adaptation does so on a few rows of a new domain.

    Parameters
    ----------
    base : nn.Module
        Pre-trained; has a linear layer ``head``; stays as it is.
    X : Tensor of shape (n, ...)
    y : int64 Tensor of shape (n,)
    lr : float
        Adam's learning rate.
    epochs : int
        Passes over the rows.
    from_stage : int
        The first of the model's `stages` that is trained; those below it are frozen. 0 trains all,
        and negative numbers count from the top: -1 trains the head alone.
    head_lr : float, optional
        Another one for the head, which is fresh; None is `lr`.
    n_classes : int, optional
        Outputs of the fresh head; None is as many as before.
    fresh_head : bool, default=True
        Whether the head starts anew, from torch's global random stream, or from the pre-trained
        one.
    **options : object
        Of `train`.

    Returns
    -------
    model : nn.Module
    history : dict of str to list of float

    Raises
    ------
    ValueError
        If there are fewer stages, the head would stay frozen, or the rows are unusable.
    """
    model = with_fresh_head(base, n_classes) if fresh_head else copy.deepcopy(base)
    freeze_to(stages(model), from_stage)
    rates = {"head": lr if head_lr is None else head_lr}
    if any(p.requires_grad for k, p in model.named_parameters() if not k.startswith("head.")):
        rates[""] = lr
    return model, fit(model, X, y, lr=rates, epochs=epochs, **options)


def logistic_head(features, y, *, C=1.0, weights=None):
    """Return the linear layer that minimises ||W||^2 / 2 + C sum_i w_i CE_i, to the optimum.

    Linear probing without a rate or a number of steps to choose, and the start of LP-FT: assign it
    to a model's ``head``. Of two classes, the first one's row of W is 0, as in scikit-learn.

    Parameters
    ----------
    features : Tensor of shape (n, d)
        As `extract_features` returns them.
    y : int64 Tensor of shape (n,)
        Labels 0..C-1, each present.
    C : float, default=1.0
        Weight of the rows against the penalty.
    weights : Tensor of shape (n,), optional
        w; None is 1 for each row.

    Returns
    -------
    nn.Linear
        Of the dtype of `features`.

    Raises
    ------
    ValueError
        If a class has no row.
    """
    n_classes = int(y.max()) + 1
    if missing := sorted(set(range(n_classes)) - set(y.tolist())):
        raise ValueError(f"no row of class {missing[0]}: labels must be 0..{n_classes - 1}")
    rows = features.detach().double().numpy()
    fitted = LogisticRegression(C=C, solver="newton-cg", tol=1e-11, max_iter=1000)
    fitted.fit(rows, y.numpy(), None if weights is None else weights.numpy())
    W, b = fitted.coef_, fitted.intercept_
    if n_classes == 2:  # scikit-learn's two classes share one row
        W, b = np.concatenate([0 * W, W]), np.concatenate([0 * b, b])
    head = nn.Linear(W.shape[1], n_classes, dtype=features.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(W))
        head.bias.copy_(torch.as_tensor(b))
    return head


def gradual_unfreezing(model, X, y, *, epochs=100, lr=1e-3, down_to=0, **options):
    """Train the head alone first, then unfreeze one more stage at a time, top to bottom.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    X : Tensor of shape (n, d)
    y : int64 Tensor of shape (n,)
    epochs : int, default=100
        In all, shared equally by the phases.
    lr : float, default=1e-3
        Adam's learning rate. Each phase has a new optimizer: one built earlier would not know
        the stages that were frozen then.
    down_to : int, default=0
        The lowest of the model's `stages` that is trained in the end.
    **options : object
        Of `train`.

    References
    ----------
    Howard & Ruder (2018), section 3.3, arXiv:1801.06146.
    """
    parts = stages(model)
    for n in reversed(range(down_to, len(parts))):
        freeze_to(parts, n)
        fit(model, X, y, lr=lr, epochs=max(epochs // (len(parts) - down_to), 1), **options)


def from_scratch(model):
    """Draw all weights of a model anew, as torch initialises its layers; all are trainable.

    Parameters
    ----------
    model : nn.Module
        Changed in place, by torch's global stream.
    """
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    unfreeze(model)


def l2_sp(model, *, alpha, fresh="head"):
    """Return the loss cross-entropy + alpha / 2 * ||w - w0||^2, w0 being the weights now.

    Parameters
    ----------
    model : nn.Module
        Its trainable parameters are pulled to where they start (SP: starting point).
    alpha : float
        Strength of the pull.
    fresh : str, default="head"
        Prefix of the new parameters, which have no pre-trained start and are not pulled.

    Returns
    -------
    callable
        A ``loss`` for `train`.

    References
    ----------
    Li, Grandvalet & Davoine (2018), section 3.2, arXiv:1802.01483.
    """
    start = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and not f"{name}.".startswith(f"{fresh}.")
    }

    def _loss(model, x, y):
        moved = (model.get_parameter(name) - w0 for name, w0 in start.items())
        return cross_entropy(model, x, y) + alpha / 2 * sum((d**2).sum() for d in moved)

    return _loss


def contrastive(temperature=0.1):
    """Return the loss that pulls a row's features to those of its class, away from all others.

    For row i of a batch it is the mean, over the other rows j of its class, of
    -log(exp(cos(z_i, z_j) / T) / sum_k exp(cos(z_i, z_k) / T)), k being any other row. All pairs of
    a batch are compared, each row is read once; the head is not: freeze it, and fit it afterwards,
    by `logistic_head`.

    Parameters
    ----------
    temperature : float, default=0.1
        T; the smaller it is, the more the nearest rows count.

    Returns
    -------
    callable
        A ``loss`` for `train`, of a model with ``features``. A row without another of its
        class in the batch is only pushed away.

    References
    ----------
    Khosla et al. (2020), equation 2, arXiv:2004.11362.
    """

    def _loss(model, x, y):
        z = F.normalize(model.features(**x))  # (B, d)
        alone = torch.eye(len(y), dtype=torch.bool, device=z.device)
        logits = (z @ z.T / temperature).masked_fill(alone, -torch.inf)  # (B, B)
        same = (y[:, None] == y) & ~alone
        others = same.sum(1)
        own = logits.log_softmax(1).masked_fill(~same, 0).sum(1) / others.clamp(min=1)
        return -own.sum() / (others > 0).sum().clamp(min=1)

    return _loss
