"""What a step costs: operations and bytes, counted and not estimated."""

import torch
from torch.utils import flop_counter

from helpers.training.batches import _checked, _tensors
from helpers.training.loop import cross_entropy
from helpers.training.scoring import _fit, _place


def saved_bytes(forward, *, given):
    """Count what a forward pass keeps for the backward pass, each storage once.

    Parameters
    ----------
    forward : callable
        Without arguments; runs the model and its loss, on any device.
    given : iterable of Tensor
        What is in memory anyway, and left out: parameters, buffers and inputs.

    Returns
    -------
    int
        Bytes.
    """
    kept = set()  # of the storages themselves, which keeps them alive: none takes another's place

    def _note(tensor):
        kept.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(_note, lambda tensor: tensor):
        forward()
    return sum(s.nbytes() for s in kept - {t.untyped_storage() for t in given})


def stored_bytes(model):
    """Return the bytes of a model's parameters and buffers, each storage counted once.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    int
    """
    kept = {}
    for t in (*model.parameters(), *model.buffers()):
        storage = t.untyped_storage()
        kept[storage.data_ptr() or id(t)] = storage.nbytes()  # on the meta device all are at 0
    return sum(kept.values())


def operations(model, X, y):
    """Count the floating-point operations of one training step's forward and backward pass.

    Matrix products and attention are counted, a multiplication and an addition as two. Element-wise
    work, the optimiser's step and the small matrices that OFT inverts are left out.

    Parameters
    ----------
    model : nn.Module
    X : array of shape (n, ...), dict or tuple of Tensor
    y : array of shape (n,)
        Class indices, of any integer dtype.

    Returns
    -------
    int
    """
    aten = torch.ops.aten
    more = {  # operators that torch's own list leaves out, and those that they count like
        aten.addmm_: flop_counter.addmm_flop,
        aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop,
    }
    more = {operator: formula.__wrapped__ for operator, formula in more.items()}
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=more)
    with counter:
        cross_entropy(model, *_rows(model, X, y)).backward()
    model.zero_grad()
    return counter.get_total_flops()


def activation_bytes(model, X, y):
    """Measure what a forward pass keeps for the backward pass, parameters and input left out.

    Parameters
    ----------
    model : nn.Module
    X : array of shape (n, ...), dict or tuple of Tensor
    y : array of shape (n,)
        Class indices, of any integer dtype.

    Returns
    -------
    int
        Bytes, each storage counted once.
    """
    X, y = _rows(model, X, y)
    given = [*model.parameters(), *model.buffers(), *_tensors(X), y]
    return saved_bytes(lambda: cross_entropy(model, X, y), given=given)


def step_memory(trainable, total, activations, *, weight=8, gradient=8, state=16):
    """Return the memory of a training step, by what it is for.

    Parameters
    ----------
    trainable, total : int
        Parameters.
    activations : int
        Bytes kept for the backward pass.
    weight, gradient, state : int
        Bytes of each weight, of each trained weight's gradient and of its optimiser state; the
        defaults are those of Adam in float64: two moments.

    Returns
    -------
    dict of str to int
        Bytes.
    """
    return {
        "weights": weight * total,
        "gradients": gradient * trainable,
        "optimiser state": state * trainable,
        "activations": activations,
    }


def _rows(model, X, y):
    like = _place(model, "auto")
    return tuple(_fit(t, like) for t in _checked(model, X, y))
