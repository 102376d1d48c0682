"""Surgery on a model: put a technique's layers in, fold them back, switch them off for a while.

Every ``inject_*`` takes a model and the layers to adapt, returns their names, and trains nothing
but what it adds there; what else is trained is the caller's:
``freeze(model); inject_lora(model, ["q_proj", "v_proj"]); unfreeze(model.head)``. A target is a
module's whole name or its end, from a dot on. What cannot be done is refused before anything has
changed.
"""

from contextlib import contextmanager
from numbers import Integral

import torch
from torch import nn

from helpers import layers
from helpers.layers import Adapter, sizes
from helpers.quantize import QuantizedLinear, loftq, quantize


def inject_lora(
    model,
    targets,
    *,
    r=8,
    lora_alpha=16,
    rslora=False,
    dropout=0.0,
    init="lora",
    generator=None,
):
    """Add s B A x to linear layers (LoRA, rsLoRA, PiSSA).

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    targets : sequence of str
        Names, or ends of names, of `torch.nn.Linear` layers, plain or from `quantize_layers`, or
        of GPT-2's Conv1D.
    r, lora_alpha, rslora, dropout, init, generator
        As in `helpers.layers.LoRA`.

    Returns
    -------
    list of str
        Names of the adapted layers.

    Raises
    ------
    ValueError
        If a target matches nothing, or a layer is of another kind, too small for `r`, already
        adapted, or would be bypassed.
    """
    options = dict(rslora=rslora, dropout=dropout, init=init, generator=generator)
    return replace(
        model, find(model, targets), lambda base: layers.LoRA(base, r, lora_alpha, **options)
    )


def quantize_layers(model, targets, *, code="nf4", block_size=64):
    """Round the weights of linear layers to four bits; an adapter can sit on them afterwards.

    The weights are then no parameters, so nothing can train them; biases stay as they are.

    Parameters
    ----------
    model, targets
        As in `inject_lora`, also what is returned and refused, and so are a layer that is
        quantised already and one whose weight is tied to another layer's.
    code, block_size
        As in `helpers.quantize.quantize`.

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

    Outputs stay, adapters too. What `helpers.checkpoint.save_peft` writes then belongs to the base
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
        _set(model, name, layers.with_matrix(base, base.weight))
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

    The adapter is a `helpers.layers.LoRA` on a `helpers.quantize.QuantizedLinear`, as after
    `quantize_layers` and `inject_lora`; both start at other values. So A and B belong to this base
    alone: disabled, it is not the quantised model that `quantize_layers` makes.

    Parameters
    ----------
    model, targets
        As in `quantize_layers`, also what is returned and refused.
    r, lora_alpha, rslora, dropout
        As in `helpers.layers.LoRA`.
    code, block_size, steps
        As in `helpers.quantize.loftq`.

    Returns
    -------
    list of str
    """
    options = dict(rslora=rslora, dropout=dropout)

    def _make(base):
        W = _full(model, base)
        lora = layers.LoRA(base, r, lora_alpha, generator=torch.Generator(), **options)
        names = dict(code=code, block_size=block_size, steps=steps)
        q, A, B = loftq(W, r, scaling=lora.scaling, **names)
        lora.base = QuantizedLinear(q, base.bias).train(base.training)
        lora.lora_A.data, lora.lora_B.data = A, B
        return lora

    return replace(model, find(model, targets), _make)


def inject_dora(model, targets, *, r=8, lora_alpha=16, rslora=False, dropout=0.0, generator=None):
    """Split linear layers into magnitude and direction, and turn the direction by LoRA (DoRA).

    Parameters
    ----------
    model, targets
        As in `inject_lora`, also what is returned and refused.
    r, lora_alpha, rslora, dropout, generator
        As in `helpers.layers.DoRA`.

    Returns
    -------
    list of str
    """
    options = dict(rslora=rslora, dropout=dropout, generator=generator)
    return replace(
        model, find(model, targets), lambda base: layers.DoRA(base, r, lora_alpha, **options)
    )


def inject_vera(model, targets, *, r=256, d_initial=0.1, generator=None):
    """Add v * (B (u * (A x))) to linear layers, with one frozen random A and B for all (VeRA).

    Parameters
    ----------
    model, targets
        As in `inject_lora`, also what is returned and refused.
    r : int, default=256
        Rank; as only vectors are trained, it may exceed a layer's size.
    d_initial, generator
        As in `helpers.layers.VeRA`, and of A and B; None is torch's global stream.

    Returns
    -------
    list of str
    """
    if not isinstance(r, Integral) or r < 1:
        raise ValueError(f"rank r={r} must be an integer, 1 or more")
    found = find(model, targets)
    for name, base in found.items():
        _naming(name, layers.check_linear, base)
    widths = [sizes(base) for base in found.values()]
    like = next(iter(found.values())).weight
    d_in, d_out = (max(side) for side in zip(*widths, strict=True))
    A = layers.uniform((r, d_in), (6 / d_in) ** 0.5, like=like, generator=generator)  # He et al.'s
    B = layers.uniform((d_out, r), (6 / r) ** 0.5, like=like, generator=generator)
    shared = layers.Projection(A, B)
    return replace(model, found, lambda base: layers.VeRA(base, shared, d_initial=d_initial))


def inject_ia3(model, targets, *, feedforward=()):
    """Rescale the outputs of linear layers, and the inputs of others, by one vector each ((IA)3).

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    targets : sequence of str
        Layers whose outputs are rescaled: keys and values, in the paper. May be empty where there
        are `feedforward` layers.
    feedforward : sequence of str, default=()
        Layers whose inputs are rescaled: the second one of each feed-forward block.

    Returns
    -------
    list of str
        As in `inject_lora`, which also says what is refused.
    """
    outputs = find(model, targets) if targets or not feedforward else {}
    inputs = find(model, feedforward) if feedforward else {}
    if both := outputs.keys() & inputs.keys():
        raise ValueError(f"{min(both)!r} is in targets and in feedforward: name it once")
    is_input = dict.fromkeys(outputs.values(), False) | dict.fromkeys(inputs.values(), True)
    found = {name: m for name, m in model.named_modules() if m in is_input}
    return replace(model, found, lambda b: layers.IA3(b, feedforward=is_input[b]))


def inject_oft(model, targets, *, block_size=8):
    """Rotate the inputs of linear layers by a block-diagonal orthogonal matrix (OFT).

    Parameters
    ----------
    model, targets
        As in `inject_lora`, also what is returned and refused.
    block_size : int, default=8
        As in `helpers.layers.OFT`.

    Returns
    -------
    list of str
    """
    return replace(model, find(model, targets), lambda base: layers.OFT(base, block_size))


def inject_adapter(
    model, targets, *, reduction_factor=16, parallel=False, scale=1.0, generator=None
):
    """Put a bottleneck adapter behind, or parallel to, modules that map a tensor to a tensor.

    On a transformer's last linear layers of attention and feed-forward block, before the residual
    sum, that is Houlsby's placement; on the feed-forward block's alone Pfeiffer's.

    Parameters
    ----------
    model, targets
        As in `inject_lora`, but of any modules that hold linear layers.
    reduction_factor, parallel, scale, generator
        As in `helpers.layers.BottleneckAdapter`.

    Returns
    -------
    list of str
    """
    options = dict(parallel=parallel, scale=scale, generator=generator)
    return replace(
        model,
        find(model, targets),
        lambda base: layers.BottleneckAdapter(base, reduction_factor, **options),
    )


def inject_prompt(model, targets, *, num_virtual_tokens=8, std=0.02, generator=None):
    """Put trained vectors before the sequence that an embedding hands to the model.

    The model must take the longer sequence and read its result off the original tokens, as
    `helpers.models.TinyTransformer` does from its ``embed``.

    Parameters
    ----------
    model, targets
        As in `inject_lora`, but of modules that return (B, T, d).
    num_virtual_tokens, std, generator
        As in `helpers.layers.PromptTuning`.

    Returns
    -------
    list of str
    """
    options = dict(std=std, generator=generator)
    return replace(
        model,
        find(model, targets),
        lambda base: layers.PromptTuning(base, num_virtual_tokens, **options),
    )


def inject_prefix(model, targets, *, num_virtual_tokens=8, std=0.02, generator=None):
    """Put trained keys and values before those that attention modules compute.

    Parameters
    ----------
    model, targets
        As in `inject_lora`, but of attention modules that offer what
        `helpers.layers.PrefixTuning` needs, as `helpers.models.Attention` does.
    num_virtual_tokens, std, generator
        As in `helpers.layers.PrefixTuning`.

    Returns
    -------
    list of str
    """
    options = dict(std=std, generator=generator)
    return replace(
        model,
        find(model, targets),
        lambda base: layers.PrefixTuning(base, num_virtual_tokens, **options),
    )


def inject_bitfit(model, targets=None):
    """Train each module's ``bias`` (BitFit).

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    targets : sequence of str, optional
        Names, or ends of names, of modules with a bias; None is all of them.

    Returns
    -------
    list of str
        As in `inject_lora`, which also says what is refused.
    """
    everywhere = targets is None
    found = _own(model, lambda m: _has(m, "bias")) if everywhere else find(model, targets)
    return replace(model, found, lambda base: _tuned(model, base, ["bias"]))


def inject_layer_norm(model, targets=None):
    """Train each layer norm's ``weight`` and ``bias`` (LayerNorm tuning).

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    targets : sequence of str, optional
        Names, or ends of names, of modules with a weight; None is every `torch.nn.LayerNorm` and
        `torch.nn.RMSNorm`.

    Returns
    -------
    list of str
        As in `inject_lora`, which also says what is refused.
    """
    norms = (nn.LayerNorm, nn.RMSNorm)
    everywhere = targets is None
    found = _own(model, lambda m: isinstance(m, norms)) if everywhere else find(model, targets)
    names = {base: [n for n in ("weight", "bias") if _has(base, n)] for base in found.values()}
    return replace(model, found, lambda base: _tuned(model, base, names[base]))


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


def _tuned(model, base, names):
    if not names or not all(_has(base, name) for name in names):
        wanted = " or ".join(names or ["weight"])
        raise ValueError(f"{type(base).__name__} has no parameter {wanted} to train")
    if getattr(base, "running_mean", None) is not None:
        kind = type(base).__name__
        raise ValueError(
            f"a {kind} keeps running statistics, which training would move: leave it out"
        )
    _check_untied(model, base, names)
    return layers.Tuned(base, names)


def _full(model, base):
    """Return W of a linear layer in full precision, which is no other layer's."""
    layers.check_linear(base)
    if isinstance(base, QuantizedLinear):
        raise ValueError(f"it is quantised already, to {base.code}: quantise the original")
    _check_untied(model, base, ["weight"])
    return layers.matrix(base).detach()


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
