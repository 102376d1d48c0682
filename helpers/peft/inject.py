"""Surgery on a model: put a technique's layers in, fold them back, switch them off for a while.

Every ``inject_*`` takes a model and the layers to adapt, returns their names, and trains nothing
but what it adds there; what else is trained is the caller's:
``freeze(model); inject_lora(model, ["q_proj", "v_proj"]); unfreeze(model.head)``. A target is a
module's whole name or its end, from a dot on. What cannot be done is refused before anything has
changed.
"""

from inspect import signature

from helpers.peft import layers, lora
from helpers.peft.base import _like, check_linear, sizes, uniform
from helpers.peft.four_bits import check_rank
from helpers.peft.surgery import _check_untied, _has, _naming, _own, find, find_experts, replace


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
        of GPT-2's Conv1D; also of parameters that hold a matrix for each expert.
    r, lora_alpha, rslora, dropout, init, generator
        As in `helpers.peft.LoRA`.

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
    found, experts = find(model, targets, experts=True), find_experts(model, targets)
    if experts and (dropout or init != "lora"):
        raise ValueError(f"{min(experts)!r} holds experts as parameters: no {dropout=} or {init=}")
    names = {found[name]: own for name, own in experts.items()}
    options = dict(rslora=rslora, generator=generator)

    def _make(base):
        if base in names:
            return lora.ExpertLoRA(base, names[base], r, lora_alpha, **options)
        adapter = lora.LoRA(base, r, lora_alpha, dropout=dropout, init=init, **options)
        check_rank(r, sizes(base))  # above it there is more to train, and no more that can change
        return adapter

    return replace(model, found, _make)


def inject_dora(model, targets, *, r=8, lora_alpha=16, rslora=False, dropout=0.0, generator=None):
    """Split linear layers into magnitude and direction, and turn the direction by LoRA (DoRA).

    Parameters
    ----------
    model, targets
        As in `inject_lora`, also what is returned and refused.
    r, lora_alpha, rslora, dropout, generator
        As in `helpers.peft.DoRA`.

    Returns
    -------
    list of str
    """
    options = dict(rslora=rslora, dropout=dropout, generator=generator)

    def _make(base):
        adapter = lora.DoRA(base, r, lora_alpha, **options)
        check_rank(r, sizes(base))
        return adapter

    return replace(model, find(model, targets), _make)


def inject_vera(model, targets, *, r=256, d_initial=0.1, generator=None):
    """Add v * (B (u * (A x))) to linear layers, with one frozen random A and B for all (VeRA).

    Parameters
    ----------
    model, targets
        As in `inject_lora`, also what is returned and refused.
    r : int, default=256
        Rank; as only vectors are trained, it may exceed a layer's size.
    d_initial, generator
        As in `helpers.peft.VeRA`, and of A and B; None is torch's global stream.

    Returns
    -------
    list of str
    """
    lora.check_settings(r)
    found = find(model, targets)
    widths = [_naming(name, check_linear, base) for name, base in found.items()]
    d_in, d_out = (max(side) for side in zip(*widths, strict=True))
    options = dict(like=_like(next(iter(found.values()))), generator=generator)
    A = uniform((r, d_in), (6 / d_in) ** 0.5, **options)  # He et al.'s bound
    B = uniform((d_out, r), (6 / r) ** 0.5, **options)
    shared = lora.Projection(A, B)
    return replace(model, found, lambda base: lora.VeRA(base, shared, d_initial=d_initial))


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
        As in `helpers.peft.OFT`.

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
        As in `helpers.peft.BottleneckAdapter`.

    Returns
    -------
    list of str
    """
    options = dict(parallel=parallel, scale=scale, generator=generator)

    def _make(base):
        return layers.BottleneckAdapter(base, reduction_factor, **options)

    return replace(model, find(model, targets), _make)


def inject_prompt(model, targets, *, num_virtual_tokens=8, std=0.02, generator=None):
    """Put trained vectors before the sequence that an embedding hands to the model.

    The model must take the longer sequence and read its result off the original tokens, as
    `helpers.models.Encoder` does from its ``embed``.

    Parameters
    ----------
    model, targets
        As in `inject_lora`, but of modules that return (B, T, d) and tell d.
    num_virtual_tokens, std, generator
        As in `helpers.peft.PromptTuning`.

    Returns
    -------
    list of str
    """

    def _make(base):
        return layers.PromptTuning(base, num_virtual_tokens, std=std, generator=generator)

    names = replace(model, find(model, targets), _make)
    for module in model.modules():
        held = any(isinstance(m, layers.PromptTuning) for m in module.modules())
        if held and {"input_ids", "attention_mask"} <= {*signature(module.forward).parameters}:
            module.register_forward_pre_hook(layers.make_room, with_kwargs=True)
    return names


def inject_prefix(model, targets, *, num_virtual_tokens=8, std=0.02, generator=None):
    """Put trained keys and values before those that attention modules compute.

    Parameters
    ----------
    model, targets
        As in `inject_lora`, but of attention modules that offer what
        `helpers.peft.PrefixTuning` needs, as `helpers.models.Attention` does.
    num_virtual_tokens, std, generator
        As in `helpers.peft.PrefixTuning`.

    Returns
    -------
    list of str
    """

    def _make(base):
        return layers.PrefixTuning(base, num_virtual_tokens, std=std, generator=generator)

    return replace(model, find(model, targets), _make)


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
    found = _own(model, lambda m: _has(m, "bias")) if targets is None else find(model, targets)
    for name, p in model.named_parameters() if targets is None else ():
        end = name.rpartition(".")[2]
        if "bias" in end and end != "bias" and not p.requires_grad:
            raise ValueError(f"{name!r} would be left out: name the modules to train instead")
    return replace(model, found, lambda base: _tuned(model, base, ["bias"]))


def inject_layer_norm(model, targets=None):
    """Train each layer norm's ``weight`` and ``bias`` (LayerNorm tuning).

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    targets : sequence of str, optional
        Names, or ends of names, of modules with a weight; None is every module with a
        weight whose class is called LayerNorm or RMSNorm, or ends so.

    Returns
    -------
    list of str
        As in `inject_lora`, which also says what is refused.
    """
    found = _own(model, _is_norm) if targets is None else find(model, targets)
    names = {base: [n for n in ("weight", "bias") if _has(base, n)] for base in found.values()}
    return replace(model, found, lambda base: _tuned(model, base, names[base]))


def _is_norm(module):
    """Whether a module is a layer norm with a weight: torch's, or one that is called so.

    The RMS norms of the Llama family are classes of transformers of their own.
    """
    return _has(module, "weight") and type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


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
