"""What is trained: `requires_grad` is the only truth, everything here sets or reads it."""

from typing import NamedTuple

from torch import nn


class Count(NamedTuple):
    """How many parameters are trained, and how many there are.

    Printed as ``Trainable: 132 / 7,716  (1.7%)``.

    Attributes
    ----------
    trainable, total : int
    """

    trainable: int
    total: int

    @property
    def fraction(self):
        """Return trainable / total, 0 for a model without parameters."""
        return self.trainable / max(self.total, 1)

    def __str__(self):
        return f"Trainable: {self.trainable:,} / {self.total:,}  ({self.fraction:.1%})"


def freeze(*modules):
    """Train nothing in `modules`: gradients are neither computed nor kept.

    A gradient left in ``.grad`` is dropped: an optimizer that still holds the parameter would
    apply it, and its momentum and weight decay, at the next step.

    Parameters
    ----------
    *modules : nn.Module or nn.Parameter
    """
    for p in _parameters(modules):
        p.requires_grad_(False)
        p.grad = None


def unfreeze(*modules):
    """Train every parameter of `modules`.

    An optimizer built before does not know them: build it afterwards.

    Parameters
    ----------
    *modules : nn.Module or nn.Parameter
    """
    for p in _parameters(modules):
        p.requires_grad_(True)


def freeze_to(stages, n):
    """Freeze the first `n` stages and train the others.

    Parameters
    ----------
    stages : dict of str to nn.Module
        Bottom to top, as `helpers.models.stages` returns them.
    n : int
        The number of frozen stages, so the index of the first one that is trained. Negative
        numbers count from the top: -1 trains the last stage alone.

    Raises
    ------
    ValueError
        If there are fewer than `n` stages.

    References
    ----------
    Howard & Ruder (2018), section 3.3, arXiv:1801.06146.
    """
    if not -len(stages) <= n <= len(stages):
        raise ValueError(f"cannot freeze to stage {n}: there are {len(stages)}, {list(stages)}")
    parts = list(stages.values())
    freeze(*parts[:n])
    unfreeze(*parts[n:])


def count_parameters(model):
    """Count the parameters of `model`, a shared one once.

    Weights in few bits count as the numbers that they stand for: a module's ``n_quantized``, which
    its buffers hold in codes, and bitsandbytes' parameters of two codes a byte.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    Count
        Trainable and total, which print as one line.
    """
    sizes = [(_numbers(p), p.requires_grad) for p in model.parameters()]
    coded = sum(m.n_quantized for m in model.modules() if hasattr(type(m), "n_quantized"))
    return Count(sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes) + coded)


def param_groups(model, rates):
    """Put each trainable parameter into the group of the prefix or ending that fits its name.

    ``AdamW(param_groups(model, {"head": 1e-3, "": 1e-4}))`` trains the head at 1e-3 and all
    the rest at 1e-4 (discriminative learning rates); ``{"": 1e-4, ".lora_B": 16e-4}`` trains
    LoRA's B sixteen times as fast as its A (LoRA+).

    Parameters
    ----------
    model : nn.Module
    rates : dict of str to float
        Dotted prefix of parameter names to learning rate. Prefixes end where a name has a dot:
        "backbone.1" fits "backbone.1.weight", not "backbone.10.weight"; "" fits all names. A key
        that starts with a dot is the end of names. An ending wins over a prefix, and of two of a
        kind the longer one.

    Returns
    -------
    list of dict
        One optimizer group for each key of `rates`: its "params" and its "lr".

    Raises
    ------
    ValueError
        If a key is given a rate and gets no parameter, or a trainable parameter gets no rate.

    References
    ----------
    Howard & Ruder (2018), section 3.2, arXiv:1801.06146; Hayou et al. (2024), section 4 (LoRA+),
    arXiv:2402.12354.
    """
    groups = {key: [] for key in rates}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        fitting = [
            (key.startswith("."), len(key), key)
            for key in rates
            if (name.endswith(key) if key[:1] == "." else f"{name}.".startswith(key and f"{key}."))
        ]
        if not fitting:
            raise ValueError(f"no learning rate for {name!r}: {list(rates)} do not fit its name")
        groups[max(fitting)[-1]].append(p)
    if unused := [key for key, params in groups.items() if not params]:
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        raise ValueError(f"the rates for {unused} cover nothing; trainable are {trainable}")
    return [{"params": params, "lr": rates[key]} for key, params in groups.items()]


def check_optimizer(model, optimizer):
    """Refuse an optimizer that was built for another set of trainable parameters.

    Parameters
    ----------
    model : nn.Module
    optimizer : torch.optim.Optimizer

    Raises
    ------
    ValueError
        If nothing is trainable, a trainable parameter is in no group, or a frozen one has state
        (momentum and weight decay would move it whenever it has a gradient).
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(f"nothing to train: every parameter of {type(model).__name__} is frozen")
    if absent := [name for name, p in trainable.items() if id(p) not in held]:
        raise ValueError(
            f"the optimizer does not hold {absent[0]!r} ({len(absent)} trainable parameters are"
            " in no group): build it after unfreezing"
        )
    for name, p in model.named_parameters():
        if not p.requires_grad and optimizer.state.get(p):
            raise ValueError(
                f"{name!r} is frozen but the optimizer has momentum for it: build a new optimizer"
                " after freezing"
            )


def _numbers(p):
    state = getattr(p, "quant_state", None)  # of bitsandbytes, once it has packed the weight
    return p.numel() if state is None else state.shape.numel()


def _parameters(modules):
    for m in modules:
        yield from [m] if isinstance(m, nn.Parameter) else m.parameters()
