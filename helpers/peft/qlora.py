"""Layers in four bits under an adapter: QLoRA's base and LoftQ's start."""

import torch

from helpers.peft.base import check_linear, matrix, with_parameters
from helpers.peft.four_bits import QuantizedLinear, loftq, quantize
from helpers.peft.lora import LoRA
from helpers.peft.surgery import _check_untied, _set, find, replace


def quantize_layers(model, targets, *, code="nf4", block_size=64):
    """Round the weights of linear layers to four bits; an adapter can sit on them afterwards.

    The weights are then no parameters, so nothing can train them; biases stay as they are.

    Parameters
    ----------
    model, targets
        As in `inject_lora`, also what is returned and refused, and so are a layer that is
        quantised already and one whose weight is tied to another layer's.
    code, block_size
        As in `helpers.peft.quantize`.

    Returns
    -------
    list of str
    """

    def _make(base):
        q = quantize(_full(model, base), code=code, block_size=block_size)
        return QuantizedLinear(q, base.bias).train(base.training)

    return replace(model, find(model, targets), _make)


def dequantize_layers(model):
    """Put a linear layer with what its codes stand for in the place of each quantised one.

    Outputs stay, adapters too. What `helpers.peft.save_peft` writes then belongs to the base
    that is left, in full precision; peft does not know these codes.

    Parameters
    ----------
    model : nn.Module
        Changed in place.

    Returns
    -------
    list of str
        Names of the layers, none if nothing is quantised.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, base in found.items():
        _set(model, name, with_parameters(base, {"weight": base.weight}))
    return list(found)


def inject_loftq(
    model,
    targets,
    *,
    r=8,
    lora_alpha=16,
    rslora=False,
    dropout=0.0,
    code="nf4",
    block_size=64,
    steps=5,
):
    """Quantise linear layers, and start LoRA from the best s B A for what that lost (LoftQ).

    The adapter is a `helpers.peft.LoRA` on a `helpers.peft.QuantizedLinear`, as after
    `quantize_layers` and `inject_lora`; both start at other values. So A and B belong to this base
    alone: disabled, it is not the quantised model that `quantize_layers` makes.

    Parameters
    ----------
    model, targets
        As in `quantize_layers`, also what is returned and refused.
    r, lora_alpha, rslora, dropout
        As in `helpers.peft.LoRA`.
    code, block_size, steps
        As in `helpers.peft.loftq`.

    Returns
    -------
    list of str
    """
    options = dict(rslora=rslora, dropout=dropout)

    def _make(base):
        W = _full(model, base)
        lora = LoRA(base, r, lora_alpha, generator=torch.Generator(), **options)
        names = dict(code=code, block_size=block_size, steps=steps)
        q, A, B = loftq(W, r, scaling=lora.scaling, **names)
        lora.base = QuantizedLinear(q, base.bias).train(base.training)
        lora.lora_A.data, lora.lora_B.data = A, B
        return lora

    return replace(model, find(model, targets), _make)


def _full(model, base):
    """Return W of a linear layer in full precision, which is no other layer's."""
    check_linear(base)
    if isinstance(base, QuantizedLinear):
        raise ValueError(f"it is quantised already, to {base.code}: quantise the original")
    _check_untied(model, base, ["weight"])
    return matrix(base).detach()
