"""Techniques by name: what each sets free in a text encoder, from which head, at which rate."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from helpers import training
from helpers.peft.inject import inject_bitfit, inject_lora

PROBE_C = 0.1  # of linear probing's logistic head, from which most techniques go on

HEAD_RATE = 1e-3  # of the head, whatever the rate of what is below it

# the layers that make queries and values, as models call them; the last two make keys as well
QUERY_VALUE = ("q_proj v_proj", "query value", "q_lin v_lin", "query_proj value_proj", "q v")
QUERY_VALUE += ("Wqkv", "in_proj")


def epochs_for(n, batch_size, contrastive=False):
    """Return how many passes over n rows a fit makes: 3 or more, and about 20 steps or more.

    Parameters
    ----------
    n, batch_size : int
    contrastive : bool, default=False
        Whether pairs are compared, in batches four times as large: 5 passes and 15 steps or more.

    Returns
    -------
    int
    """
    if contrastive:
        return max(5, round(15 / math.ceil(n / (4 * batch_size))))
    return max(3, round(20 / math.ceil(n / batch_size)))


def _inside(blocks):
    """Return the modules in some blocks, by their names in the model."""
    named = {name: block.named_modules() for name, block in blocks.items()}
    return {f"{name}.{n}": m for name, modules in named.items() for n, m in modules if n}


def _lora(model, blocks, generator):
    inside = _inside(blocks)
    for pair in map(str.split, QUERY_VALUE):
        names = [name for name in inside if name.rpartition(".")[2] in pair]
        if {name.rpartition(".")[2] for name in names} == {*pair}:
            inject_lora(model, names, r=8, lora_alpha=16, generator=generator)
            return
    kind = type(model.encoder).__name__
    raise ValueError(f"a {kind} has no query and value layers of a known name: take LP-FT")


def _bitfit(model, blocks, generator):
    biases = {n: getattr(m, "bias", None) for n, m in _inside(blocks).items()}
    names = [name for name, bias in biases.items() if isinstance(bias, nn.Parameter)]
    if not names:
        raise ValueError(f"the blocks of a {type(model.encoder).__name__} have no bias: take LoRA")
    inject_bitfit(model, names)


def _whole(model, blocks, generator):
    """Train blocks as they are: they are copied, for the encoder is shared."""
    for name, block in blocks.items():
        model.set_submodule(name, copy.deepcopy(block))
        training.unfreeze(model.get_submodule(name))


def _scratch(model, blocks, generator):
    model.encoder = copy.deepcopy(model.encoder)
    training.from_scratch(model)


class Recipe(NamedTuple):
    """How a technique trains.

    Attributes
    ----------
    change : callable or None
        ``change(model, blocks, generator)`` puts what is trained into the upper blocks of a frozen
        model; None leaves the head alone to be fitted.
    lr : float
        Adam's rate of what `change` sets free.
    top : float
        The share of the blocks, from the top, that may change; below them outputs are cached.
    head_first : bool
        Whether training starts from linear probing's head, or from a random one.
    contrastive : bool
        Whether features are trained to be near within a class, the classes' names being texts of
        theirs where they are words, and the head is fitted afterwards.
    C : float
        Inverse penalty of the logistic head.
    """

    change: Callable | None = None
    lr: float = 0.0
    top: float = 1.0
    head_first: bool = True
    contrastive: bool = False
    C: float = PROBE_C


TECHNIQUES = {  # the cheapest first
    "zero labels": Recipe(head_first=False),
    "linear probing": Recipe(),
    "LoRA, top half": Recipe(_lora, 3e-3, top=0.5),
    "LoRA, contrastive": Recipe(_lora, 1e-3, top=0.5, head_first=False, contrastive=True, C=0.01),
    "LoRA": Recipe(_lora, 3e-3),
    "BitFit": Recipe(_bitfit, 3e-3),
    "LP-FT": Recipe(_whole, 1e-4),
    "full fine-tuning": Recipe(_whole, 1e-4, head_first=False),
    "from scratch": Recipe(_scratch, 1e-3, head_first=False),
}
