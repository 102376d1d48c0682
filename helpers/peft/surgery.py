"""Surgery on a model: find layers, replace them, fold them back, switch them off for a while."""

from contextlib import contextmanager

import torch
from torch import nn

from helpers.peft.base import Adapter
from helpers.peft.four_bits import QuantizedLinear


def adapters(model):
    """Return the adapters in `model`.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to Adapter
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}


@contextmanager
def adapters_disabled(model):
    """Switch all adapters off; on leaving, each returns to the state that it was in before.

    Parameters
    ----------
    model : nn.Module
    """
    before = {adapter: adapter.enabled for adapter in adapters(model).values()}
    for adapter in before:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in before.items():
            adapter.enabled = enabled


@torch.no_grad()
def merge(model):
    """Fold every adapter into a plain layer in its place; outputs stay, and so do the base's names.

    The merged layers are frozen. Dropout has no part in them, whatever mode the model is in.
    Merging a model without adapters does nothing.

    Parameters
    ----------
    model : nn.Module
        Changed in place.

    Returns
    -------
    list of str
        Names of the merged layers.

    Raises
    ------
    ValueError
        If an adapter cannot be a plain layer, is disabled, or shares its base's weight with another
        layer, which would change with it. Nothing is merged then.
    """
    found = adapters(model)
    names = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for name, adapter in found.items():
        kind = type(adapter).__name__
        if adapter.merged is None:
            raise ValueError(f"{name!r} is a {kind}: it has no equal plain layer, so keep it as is")
        if not adapter.enabled:
            raise ValueError(f"{name!r} is disabled: enable it, or the outputs would change")
        for p in adapter.base.parameters():
            if len(names[id(p)]) > 1:
                raise ValueError(
                    f"{names[id(p)]} are tied, so merging {name!r} would change both: untie them by"
                    " copying the parameter"
                )
    for name, adapter in reversed(found.items()):  # inner ones first
        _set(model, name, adapter.merged())
    return list(found)


def find(model, targets):
    """Return the modules that `targets` name.

    Parameters
    ----------
    model : nn.Module
    targets : sequence of str
        A whole dotted name, or the end of one from a dot on: "q_proj" is "blocks.0.q_proj" and not
        "blocks.0.freq_proj".

    Returns
    -------
    dict of str to nn.Module
        In the model's order.

    Raises
    ------
    ValueError
        If a target matches nothing.
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets={targets!r} must be a list of one or more names of layers")
    modules = dict(model.named_modules())
    found = set()
    for target in targets:
        fits = [n for n in modules if n and f".{n}".endswith(f".{target}")]
        if not fits:
            leaves = [(n, m) for n, m in modules.items() if not [*m.children()]]
            held = [n for n, m in leaves if [*m.parameters()] or isinstance(m, QuantizedLinear)]
            known = list(dict.fromkeys(n.rpartition(".")[2] for n in held))
            raise ValueError(f"no layer is called {target!r}; among its layers are {known}")
        found.update(fits)
    return {name: module for name, module in modules.items() if name in found}


def replace(model, found, make):
    """Replace modules by what `make` makes of them; on a refusal leave the model as it was.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    found : dict of str to nn.Module
        Exact names in `model`, as `find` returns them.
    make : callable
        ``make(base)`` returns the `Adapter` that owns `base`, or another layer in its place.

    Returns
    -------
    list of str
        The names.

    Raises
    ------
    ValueError
        If a layer has an adapter already, is not called by its parent, is held by several modules,
        or `make` refuses it. The message names the layer.
    """
    modules, places = dict(model.named_modules()), {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), {})[name] = modules.get(name.rpartition(".")[0])
    for name, base in found.items():
        _reachable(name, base, modules[name.rpartition(".")[0]], places[id(base)])
    for name in found:
        if around := [outer for outer in found if name.startswith(f"{outer}.")]:
            raise ValueError(f"{around[0]!r} contains {name!r}: adapt one of them")
    owned = [(base, dict(base._parameters), dict(base._buffers)) for base in found.values()]
    flags = [(p, p.requires_grad, p.grad) for base in found.values() for p in base.parameters()]
    try:
        made = {name: _naming(name, make, base) for name, base in found.items()}
    except Exception:
        for base, parameters, buffers in owned:
            base._parameters.clear(), base._parameters.update(parameters)
            base._buffers.clear(), base._buffers.update(buffers)
        for p, trained, gradient in flags:
            p.requires_grad_(trained).grad = gradient
        raise
    for name, module in made.items():
        _set(model, name, module)
    return list(made)


def _reachable(name, base, parent, places):
    """Refuse a layer that has an adapter, that nobody calls, or that several modules hold."""
    taken = base if isinstance(base, Adapter) else parent
    if isinstance(taken, Adapter) and base in (taken, taken.base):
        kind = type(taken).__name__
        raise ValueError(f"{name!r} has an adapter already, {kind}: merge it, or choose another")
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        raise ValueError(
            f"{name!r} would be bypassed: torch's {type(parent).__name__} reads its weight instead"
            " of calling it, so use a model that calls its layers"
        )
    if sum(owner is not None for owner in places.values()) > 1:
        raise ValueError(f"{list(places)} are one layer, and an adapter would reach one of them")


def _naming(name, function, base):
    try:
        return function(base)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def _check_untied(model, base, names):
    held = [p for _, p in model.named_parameters(remove_duplicate=False)]
    for name in names:
        if sum(p is getattr(base, name) for p in held) > 1:
            raise ValueError(f"its {name} is tied to another layer's: untie them by copying it")


def _has(module, name):
    return name in dict(module.named_parameters(recurse=False))


def _own(model, wanted):
    """Return the modules that are `wanted`, those which have or are adapters left out."""
    taken = {part for adapter in adapters(model).values() for part in (adapter, adapter.base)}
    if wanted(model):
        kind = type(model).__name__
        raise ValueError(f"a parameter sits on the {kind} itself: move it into a child module")
    found = {n: m for n, m in model.named_modules() if m not in taken and wanted(m)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer of that kind to train")
    return found


def _set(model, name, module):
    above, _, end = name.rpartition(".")
    setattr(model.get_submodule(above), end, module)
