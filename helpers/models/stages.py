"""A model's parts from bottom to top, and fresh heads."""

import copy

from torch import nn

from helpers.models.encoder import Encoder


def stages(model):
    """Return the parts of `model` that freezing goes by, bottom to top.

    Parameters
    ----------
    model : nn.Module
        An `MLP`, an `Encoder`, a `TextClassifier`, or any model of whose direct children (a
        `Sequential`, `ModuleList` or `Encoder` child counts as its own children) each is used once,
        in order of definition.

    Returns
    -------
    dict of str to nn.Module
        Dotted name to module; modules without parameters are left out.

    Raises
    ------
    ValueError
        If a parameter sits on `model` itself: no stage would freeze it.
    """
    for name, _ in model.named_parameters(recurse=False):
        raise ValueError(f"{name!r} belongs to no stage: move it into a child module")
    parts = {}
    for name, child in model.named_children():
        if isinstance(child, Encoder):
            parts |= {f"{name}.{k}": m for k, m in stages(child).items()}
        elif isinstance(child, nn.Sequential | nn.ModuleList):
            parts |= {f"{name}.{k}": m for k, m in child.named_children()}
        else:
            parts[name] = child
    return {name: part for name, part in parts.items() if any(True for _ in part.parameters())}


def with_fresh_head(model, n_classes=None):
    """Return a copy of `model` whose head is new, as for a new task.

    The head is drawn from torch's global random stream and is trainable; everything else is
    copied, so `model` itself can serve again.

    Parameters
    ----------
    model : nn.Module
        Has a linear layer ``head``.
    n_classes : int, optional
        Outputs of the new head; None is as many as before.

    Returns
    -------
    nn.Module
    """
    model = copy.deepcopy(model)
    old = model.head
    model.head = nn.Linear(
        old.in_features,
        n_classes or old.out_features,
        dtype=old.weight.dtype,
        device=old.weight.device,
    )
    return model
