"""A folder of Hugging Face's peft, written and read."""

import copy
import json
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from helpers import files
from helpers.peft.base import _like, check_linear
from helpers.peft.files import (
    _added,
    _check_base,
    _compare,
    _digests,
    _packed,
    _plain,
    _read,
    _running,
    _shapes,
    _state,
    _statistics,
    _tensors,
)
from helpers.peft.hub_config import (
    PATTERNS,
    _asked,
    _by_pattern,
    _check_settings,
    _config,
    _copied,
    _fits,
    _in_peft,
    _pattern,
    _read_config,
    _targets,
)
from helpers.peft.layers import IA3, OFT, Tuned
from helpers.peft.lora import DoRA, LoRA, Projection, VeRA
from helpers.peft.surgery import adapters, replace

SHARED = ("base_model.vera_A", "base_model.vera_B")  # older peft reads them with .default behind


@torch.no_grad()
def save_peft(model, folder):
    """Write a folder from which ``peft.PeftModel.from_pretrained(base, folder)`` is this model.

    LoRA, rsLoRA, DoRA, VeRA, (IA)3, OFT and LayerNorm tuning go as they are, ranks and alphas of
    LoRA layer by layer. PiSSA goes as the equal LoRA of rank 2r, s [B, -B0] [A; A0], whose dropout
    also acts on the input of A0. Modules that are trained outside the adapters, such as a head, go
    whole, and so do running statistics. Our metadata hold a digest of the rest of the base.

    On a base that `helpers.peft.quantize_layers` changed, the folder belongs to that base, also
    after `helpers.peft.dequantize_layers`, not to the original weights: what A and B learned makes
    up for rounding, too, and LoftQ's start is made of it.

    Parameters
    ----------
    model : nn.Module
        Or torch's wrapper of it: compiled, data-parallel, averaged.
    folder : str or Path
        Gets adapter_config.json and adapter_model.safetensors.

    Raises
    ------
    ValueError
        If peft has no such layer, two layers differ in what peft keeps once, a parameter is
        trained where peft would not copy it, or not it alone, an adapter is disabled, or torch
        wraps a module within the model.

    References
    ----------
    https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    model = _running(model)
    names, copied = list(adapters(model)), _trained_modules(model)
    if not names:
        raise ValueError(f"no adapter in {type(model).__name__}: save_trainable keeps a head alone")
    inside = tuple(f"{name}." for name in names)
    modules = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    if others := [name for name in _copied(modules, copied) if name not in copied]:
        raise ValueError(f"with {copied} peft would copy {others[0]!r}, too: rename one of them")
    config = _config(model) | _origin(model)
    config |= dict(inference_mode=True, modules_to_save=copied or None)
    exact = _targets(config | {"target_modules": names}, modules) == names
    config["target_modules"] = names if exact else _pattern(names)
    if config["peft_type"] == "IA3":
        inputs = [name for name, a in adapters(model).items() if a.settings["feedforward"]]
        exact = [name for name in names if name.endswith(tuple(inputs))] == inputs
        config["feedforward_modules"] = inputs if exact else _pattern(inputs)
    text = json.dumps(config, indent=2, sort_keys=True)
    tensors = _layout(model, copied)
    tensors |= {f"{key}.default": tensors[key] for key in SHARED if key in tensors}
    data = _packed(
        tensors, config=json.dumps(_asked(text)), base=" ".join(_rest(model, copied).values())
    )
    files.write(Path(folder, "adapter_model.safetensors"), data)
    files.write(Path(folder, "adapter_config.json"), text.encode())


@torch.no_grad()
def load_peft(model, folder, *, check_base=True):
    """Put the adapters of a folder from `save_peft` or peft into a model, and copy all its values.

    Values are cast to the model's dtype, as peft does. What else is trained stays the caller's:
    unfreeze a head to train it on. Everything is checked before anything changes.

    Parameters
    ----------
    model : nn.Module
        The plain base, not yet compiled, data-parallel or averaged.
    folder : str or Path
        With adapter_config.json and adapter_model.safetensors.
    check_base : bool, default=True
        Refuse a base whose tensors are not those that were there, bit for bit. That is known of a
        folder from `save_peft` alone.

    Returns
    -------
    list of str
        Names of the adapted layers.

    Raises
    ------
    FileNotFoundError
        If one of the two files is missing.
    ValueError
        If a setting asks for what is not computed here, or the tensors fit neither settings nor
        model, or are not finite, or the base is another one.
    """
    path, weights = (Path(folder, f"adapter_{n}") for n in ("config.json", "model.safetensors"))
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file: load_peft reads a folder, load_trainable a file")
    if not weights.exists() and weights.with_suffix(".bin").exists():
        raise ValueError(f"{folder} holds a pickle, which can run code: save it as safetensors")
    data = path.read_bytes()
    tensors, notes = _read(weights)
    if _plain(model) is not model:
        kind = type(model).__name__
        raise ValueError(f"a {kind} holds the model: load into the model in it, then wrap it again")
    for name in adapters(model):
        raise ValueError(f"{name!r} has an adapter: load into the plain base")
    empty = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    twin = copy.deepcopy(model, empty | {id(b): b.to("meta") for b in model.buffers()})
    try:  # on a twin without data
        config = _read_config(data)
        copied = _install(twin, config)
        _check_settings(config, twin)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    if "config" in notes and _asked(notes["config"]) != _asked(data):
        raise ValueError(f"{path} is not the one that {weights.name} was written with")
    tensors = _completed(tensors, model, copied)
    wanted = _layout(twin, copied)
    cure = "its settings and the model must fit its tensors"
    _compare(weights, _shapes(tensors), _shapes(wanted), "not there", cure)
    if check_base and "base" in notes:
        _check_base(folder, notes["base"], _rest(model, copied))
    _check_values(weights, tensors, wanted)
    _install(model, config)
    for key, t in _layout(model, copied).items():
        t.copy_(tensors[key])
    return list(adapters(model))


def _origin(model):
    """Return the fields that tell peft's and transformers' Auto classes what to load first."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    kind = dict(base_model_class=type(model).__name__, parent_library=type(model).__module__)
    return dict(base_model_name_or_path=str(name) if name else None, auto_mapping=kind)


def _layout(model, copied):
    """Return a folder's tensors by peft's keys, views of the model's own if they can."""
    out = {}
    for name, a in adapters(model).items():
        out |= {f"base_model.model.{name}.{key}": t for key, t in _in_peft(name, a)[1].items()}
        if isinstance(a, VeRA):
            if out.setdefault("base_model.vera_A", a.projection.A) is not a.projection.A:
                raise ValueError(f"{name!r} was injected apart, and peft's VeRA has one projection")
            out["base_model.vera_B"] = a.projection.B
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in copied:
        module = model.get_submodule(name)
        if any(uses[id(p)] > 1 for p in module.parameters()):
            raise ValueError(f"{name!r} shares a parameter, which peft's copy would untie")
        out |= {f"base_model.model.{name}.{key}": t for key, t in module.state_dict().items()}
    return out | _moving(model, copied)


def _moving(model, copied):
    """Return the running statistics outside the modules that go whole, by peft's keys."""
    whole = tuple(f"{name}." for name in copied)
    found = {n: t for n, t in _state(model).items() if t in _statistics(model)}
    return {f"base_model.model.{n}": t for n, t in found.items() if not n.startswith(whole)}


def _rest(model, copied):
    """Return the digests of what a folder does not hold: the base, less what goes whole."""
    gone = [_added(model), _statistics(model), *(_tensors(model.get_submodule(n)) for n in copied)]
    gone = set().union(*gone)
    return _digests(model, {name: t for name, t in _state(model).items() if t not in gone})


def _completed(tensors, model, copied):
    """Return a folder's tensors under one name each, with running statistics that it may lack."""
    named = {
        key.removesuffix(".default") if key[:-8] in SHARED else key: tensors[key]
        for key in sorted(tensors, reverse=True)
    }
    return _moving(model, copied) | named


def _check_values(path, tensors, wanted):
    """Refuse values that the model's dtypes cannot hold."""
    for key, t in tensors.items():
        dtype = wanted[key].dtype
        if t.dtype != dtype and not (t.is_floating_point() and dtype.is_floating_point):
            raise ValueError(f"{key!r} is {t.dtype} in {path}, but {dtype} in the model")
        if not t.to(dtype).isfinite().all():
            raise ValueError(f"{key!r} in {path} has values that are no finite {dtype}")


def _trained_modules(model):
    """Return the outermost modules that are trained outside the adapters."""
    found, own, owners = adapters(model), _added(model), []
    for name, p in model.named_parameters():
        owner = name.rpartition(".")[0]
        if not p.requires_grad or p in own:
            continue
        if any(a.startswith(owner and f"{owner}.") or owner.startswith(f"{a}.") for a in found):
            place = owner or "the model itself"
            raise ValueError(f"peft cannot train {name!r}: an adapter is in or around {place!r}")
        if not any(f"{owner}.".startswith(f"{o}.") for o in owners):
            owners.append(owner)
    return owners


def _install(model, config):
    """Put adapters where the config has them; return the names of the modules that it copies."""
    modules = [name for name, _ in model.named_modules()]
    found = {name: model.get_submodule(name) for name in _targets(config, modules)}
    if not found:
        raise ValueError(f"target_modules={config['target_modules']!r} fits no layer")
    shared = {b for name, b in found.items() if _fits(config["feedforward_modules"], name, dot="")}
    if config["peft_type"] == "VERA":
        d_in, d_out = map(max, zip(*map(check_linear, found.values()), strict=True))
        like = _like(next(iter(found.values())))
        A, B = like.new_empty(config["r"], d_in), like.new_empty(d_out, config["r"])
        shared = Projection(A, B)
    names = {base: name for name, base in found.items()}
    replace(model, found, lambda base: _adapter(names[base], base, config, shared))
    return _copied(modules, config["modules_to_save"])


def _adapter(name, base, config, shared):
    if config["peft_type"] == "LORA":
        r, alpha = (_by_pattern(name, config[p] or {}, config[key]) for key, p in PATTERNS.items())
        method = DoRA if config["use_dora"] else LoRA
        options = dict(rslora=config["use_rslora"], dropout=config["lora_dropout"])
        options |= dict(generator=torch.Generator())  # torch's global stream stays as it was
        return method(base, r, alpha, **options)
    if config["peft_type"] == "VERA":
        return VeRA(base, shared, d_initial=config["d_initial"])
    if config["peft_type"] == "IA3":
        return IA3(base, feedforward=base in shared)
    if config["peft_type"] == "OFT":
        return OFT(base, config["oft_block_size"])
    return Tuned(base, [name for name, _ in base.named_parameters()])
