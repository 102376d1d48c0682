"""Surgery on a model: find layers, replace them, fold them back, switch them off for a while."""

import inspect
from collections import Counter
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
        If an adapter cannot be a plain layer, is disabled, would make values that are not finite,
        or shares its base's weight with another layer, which would change with it. Nothing is
        merged then.
    """
    found = adapters(model)
    names = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    for name, adapter in found.items():
        kind = type(adapter).__name__
        if adapter.changed is None:
            raise ValueError(f"{name!r} is a {kind}: it has no equal plain layer, so keep it as is")
        if not adapter.enabled:
            raise ValueError(f"{name!r} is disabled: enable it, or the outputs would change")
        for p in adapter.base.parameters():
            if len(names[p]) > 1:
                raise ValueError(
                    f"{names[p]} are tied, so merging {name!r} would change both: untie them by"
                    " copying the parameter"
                )
        for own, t in adapter.changed().items():
            if not t.isfinite().all():
                raise ValueError(
                    f"{name!r} merged has values of {own} that are no finite {t.dtype}: load a"
                    " sound adapter, or unload this one"
                )
    for name, adapter in reversed(found.items()):  # inner ones first
        _set(model, name, adapter.merged())
    return list(found)


@torch.no_grad()
def unload(model):
    """Take every adapter out: the base returns bit for bit, and what adapters learned is lost.

    All of the base is frozen, as it was under the adapters. What was merged before stays in it.

    Parameters
    ----------
    model : nn.Module
        Changed in place.

    Returns
    -------
    list of str
        Names of the layers that had an adapter.
    """
    found = adapters(model)
    for name, adapter in reversed(found.items()):  # inner ones first
        _set(model, name, adapter.removed())
    return list(found)


def unwrapped(model):
    """Return the model that torch's wrappers hold: compiled, data-parallel, averaged; or itself.

    Parameters
    ----------
    model : nn.Module
    """
    wrappers = ("torch._dynamo", "torch.nn.parallel", "torch.optim", "torch.distributed")
    if any(kind.__module__.startswith(wrappers) for kind in type(model).__mro__):
        for name in ("_orig_mod", "module", "_checkpoint_wrapped_module"):
            if name in model._modules:
                return unwrapped(model._modules[name])
    return model


def find(model, targets, *, experts=False):
    """Return the modules that `targets` name.

    Parameters
    ----------
    model : nn.Module
    targets : sequence of str
        A whole dotted name, or the end of one from a dot on: "q_proj" is "blocks.0.q_proj" and not
        "blocks.0.freq_proj".
    experts : bool, default=False
        A target may also be a parameter as in `find_experts`; its module is returned.

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
        fits = [n for n in modules if n and _named(n, target)]
        fits = fits or [*(find_experts(model, [target]) if experts else ())]
        if not fits:
            _no_layer(model, target)
        found.update(fits)
    return {name: module for name, module in modules.items() if name in found}


def find_experts(model, targets):
    """Return the modules that hold, as one parameter, a matrix for each of their experts.

    Parameters
    ----------
    model : nn.Module
    targets : sequence of str
        Names of such parameters, of three axes, or ends of them, as in `find`.

    Returns
    -------
    dict of str to list of str
        Name of a module to the names of its parameters; none where no target is one.
    """
    found = {}
    for name, p in model.named_parameters():
        if p.ndim == 3 and any(_named(name, target) for target in targets):
            owner, _, own = name.rpartition(".")
            found.setdefault(owner, []).append(own)
    return found


def _named(name, target):
    return f".{name}".endswith(f".{target}")


def _no_layer(model, target):
    """Refuse a target that no layer is called by, and say what would be right."""
    for name, p in model.named_parameters():
        if _named(name, target):
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(
                f"{name!r} is a parameter of shape {tuple(p.shape)} of a {kind}, not a layer:"
                " inject_lora alone adapts parameters, if they hold a matrix for each expert"
            )
    leaves = [(n, m) for n, m in model.named_modules() if not [*m.children()]]
    held = [n for n, m in leaves if [*m.parameters()] or isinstance(m, QuantizedLinear)]
    known = list(dict.fromkeys(n.rpartition(".")[2] for n in held))
    raise ValueError(f"no layer is called {target!r}; among its layers are {known}")


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
        or `make` refuses it, or a wrapper holds the model. The message names the offender.
    """
    if unwrapped(model) is not model:
        kind = type(model).__name__
        raise ValueError(f"a {kind} holds the model: adapt the model in it, then wrap it again")
    modules, places = dict(model.named_modules()), {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), {})[name] = modules.get(name.rpartition(".")[0])
    for name, base in found.items():
        _reachable(name, base, modules[name.rpartition(".")[0]], places[id(base)])
    uses = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    for name, base in found.items():
        if any(uses[p] > 1 for p in base.parameters(recurse=False)):
            _called(name, base, modules)
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


def _called(name, base, modules):
    """Refuse a layer that its parent's code does not call, where another has the same weight."""
    mine = {*base.parameters(recurse=False)}
    alike = {n: m for n, m in modules.items() if type(m) is type(base) and m is not base}
    twins = [n for n, m in alike.items() if mine & {*m.parameters()}]
    above, _, end = name.rpartition(".")
    parent = type(modules[above])
    try:
        code = inspect.getsource(parent)
    except (OSError, TypeError):  # a class without source code
        return
    if twins and f"self.{end} = " in code and f"self.{end}(" not in code:
        raise ValueError(f"{parent.__name__} does not call {name!r}: name one of its twins {twins}")


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
    if not name:
        raise ValueError(f"the {type(model).__name__} itself is the adapter: pass what holds it")
    above, _, end = name.rpartition(".")
    setattr(model.get_submodule(above), end, module)
