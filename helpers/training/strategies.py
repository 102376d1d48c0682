"""Part 1's strategies: what each one freezes, draws anew and trains."""

import copy

from torch.optim import Adam

from helpers.models import stages, with_fresh_head
from helpers.models.mlp import MLP
from helpers.training.freezing import freeze, freeze_to, param_groups, unfreeze
from helpers.training.loop import cross_entropy, train
from helpers.training.scoring import extract_features


def pretrain(task, *, hidden=64, epochs=50, lr=1e-3):
    """Train every parameter of a new `MLP` on the task: backbone and head.

    Parameters
    ----------
    task : Task
    hidden : int, default=64
        Width of the backbone's first two layers.
    epochs : int, default=50
        Full-batch steps.
    lr : float, default=1e-3
        Adam's learning rate.

    Returns
    -------
    model : MLP
    history : dict of str to list of float
    """
    model = MLP(task.X_train.shape[1], hidden=hidden, n_classes=task.n_classes)
    # fused: default Adam's square root is not rounded the same by every processor vendor
    optimizer = Adam(model.parameters(), lr=lr, fused=True)
    return model, train(model, *task.train, optimizer=optimizer, epochs=epochs)


def feature_extraction(pretrained, task, *, epochs=40, lr=1e-3):
    """Train a fresh head on the features of the frozen backbone (linear probing).

    Parameters
    ----------
    pretrained : MLP
        Stays as it is: a copy is trained.
    task : Task
    epochs, lr
        As in `pretrain`.

    Returns
    -------
    model : MLP
    history : dict of str to list of float
    """
    model = with_fresh_head(pretrained, task.n_classes)
    freeze(model.backbone)
    optimizer = Adam(model.head.parameters(), lr=lr, fused=True)
    return model, train(model, *task.train, optimizer=optimizer, epochs=epochs)


def fine_tune(pretrained, task, *, from_stage=1, epochs=50, lr=2e-4, head_lr=1e-3):
    """Train a fresh head, and the backbone from one stage on at a rate of its own.

    Parameters
    ----------
    pretrained : MLP
        Stays as it is: a copy is trained.
    task : Task
    from_stage : int, default=1
        The first stage that is trained; the stages below it are frozen.
    epochs : int, default=50
        Full-batch steps.
    lr, head_lr : float
        Adam's learning rates: small for pre-trained weights, larger for the fresh head.

    Returns
    -------
    model : MLP
    history : dict of str to list of float
    """
    model = with_fresh_head(pretrained, task.n_classes)
    freeze_to(stages(model), from_stage)
    rates = {"backbone": lr, "head": head_lr} if from_stage < 3 else {"head": head_lr}
    optimizer = Adam(param_groups(model, rates), fused=True)
    return model, train(model, *task.train, optimizer=optimizer, epochs=epochs)


def adapt(pretrained, X, y, *, from_stage=2, epochs=60, lr=5e-4, fresh_head=True):
    """Train the top of the model on a few labelled rows of a new domain.

    Parameters
    ----------
    pretrained : MLP
        Stays as it is: a copy is trained.
    X : Tensor of shape (n, d)
    y : int64 Tensor of shape (n,)
        The labelled rows of the new domain, and no others.
    from_stage, epochs, lr
        As in `fine_tune`, with one learning rate for all.
    fresh_head : bool, default=True
        Whether the head starts anew, as published, or from the pre-trained one.

    Returns
    -------
    model : MLP
    history : dict of str to list of float
    """
    model = with_fresh_head(pretrained) if fresh_head else copy.deepcopy(pretrained)
    freeze_to(stages(model), from_stage)
    optimizer = Adam(param_groups(model, {"": lr}), fused=True)
    return model, train(model, X, y, optimizer=optimizer, epochs=epochs)


def linear_probe(model, X, y, *, epochs=200, lr=1e-2):
    """Train the head of `model` on the cached features of its frozen backbone.

    Parameters
    ----------
    model : nn.Module
        Changed in place: everything but its ``head`` is frozen.
    X : Tensor of shape (n, d)
    y : int64 Tensor of shape (n,)
    epochs : int, default=200
        Full-batch steps.
    lr : float, default=1e-2
        Adam's learning rate.

    Returns
    -------
    dict of str to list of float
        The history of `train`.
    """
    freeze(model)
    unfreeze(model.head)
    optimizer = Adam(model.head.parameters(), lr=lr, fused=True)
    return train(model.head, extract_features(model, X), y, optimizer=optimizer, epochs=epochs)


def lp_ft(model, X, y, *, epochs=100, lr=1e-3, probe_epochs=200, probe_lr=1e-2):
    """Probe, then fine-tune: a fitted head no longer pulls the features out of shape.

    Parameters
    ----------
    model : nn.Module
        Changed in place; all of it is trained in the second phase.
    X : Tensor of shape (n, d)
    y : int64 Tensor of shape (n,)
    epochs, lr : int, float
        Of the fine-tuning.
    probe_epochs, probe_lr : int, float
        Of the linear probe before it.

    Returns
    -------
    dict of str to list of float
        The history of the fine-tuning.

    References
    ----------
    Kumar et al. (2022), section 3.4, arXiv:2202.10054.
    """
    linear_probe(model, X, y, epochs=probe_epochs, lr=probe_lr)
    unfreeze(model)
    optimizer = Adam(model.parameters(), lr=lr, fused=True)
    return train(model, X, y, optimizer=optimizer, epochs=epochs)


def gradual_unfreezing(model, X, y, *, epochs=100, lr=1e-3):
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

    References
    ----------
    Howard & Ruder (2018), section 3.3, arXiv:1801.06146.
    """
    parts = stages(model)
    for n in reversed(range(len(parts))):
        freeze_to(parts, n)
        optimizer = Adam(param_groups(model, {"": lr}), fused=True)
        train(model, X, y, optimizer=optimizer, epochs=max(epochs // len(parts), 1))


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
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    start = {
        k: p.detach().clone() for k, p in trained.items() if not f"{k}.".startswith(f"{fresh}.")
    }

    def _loss(model, x, y):
        moved = (p - start[k] for k, p in model.named_parameters() if k in start)
        return cross_entropy(model, x, y) + alpha / 2 * sum((d**2).sum() for d in moved)

    return _loss
