"""Part 1's strategies: what each one freezes, draws anew and trains."""

import copy

from torch.optim import Adam

from helpers.freezing import freeze, freeze_to, param_groups
from helpers.models import MLP, stages, with_fresh_head
from helpers.training import train


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
