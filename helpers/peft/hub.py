"""A folder of Hugging Face's peft, written and read."""

import copy
import json
import math
import re
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from helpers import files
from helpers.peft.base import check_linear, is_conv1d
from helpers.peft.files import _compare, _is_own, _packed, _read
from helpers.peft.layers import IA3, OFT, PrefixTuning, PromptTuning, Tuned
from helpers.peft.lora import DoRA, LoRA, Projection, VeRA
from helpers.peft.surgery import adapters, replace

# Settings in an adapter_config.json that may be left out, with peft's defaults
DEFAULTS = {
    "LORA": dict(r=8, lora_alpha=8.0, lora_dropout=0.0, use_rslora=False, use_dora=False),
    "VERA": dict(r=256, d_initial=0.1),
    "IA3": {},
    "OFT": dict(oft_block_size=32, use_cayley_neumann=True),
    "LN_TUNING": {},
}

# Fields that name modules, and fields that change no output: they describe, tell how the values
# that are overwritten were drawn, or add to a field that is refused
NAMING = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules")

IDLE = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "init_lora_weights", "init_weights", "init_ia3_weights"),
    *("projection_prng_key", "megatron_core", "qalora_group_size", "runtime_config", "eps"),
    "num_cayley_neumann_terms",
)


@torch.no_grad()
def save_peft(model, folder):
    """Write a folder from which ``peft.PeftModel.from_pretrained(base, folder)`` is this model.

    LoRA, rsLoRA, DoRA, VeRA, (IA)3, OFT and LayerNorm tuning go as they are. PiSSA goes as the
    equal LoRA of rank 2r, s [B, -B0] [A; A0], whose dropout also acts on the input of A0. Modules
    that are trained outside the adapters, such as a head, go whole.

    On a base that `helpers.peft.quantize_layers` changed, the folder belongs to that base after
    `helpers.peft.dequantize_layers`, not to the original weights: what A and B learned makes up
    for rounding, too, and LoftQ's start is made of it.

    Parameters
    ----------
    model : nn.Module
    folder : str or Path
        Gets adapter_config.json and adapter_model.safetensors.

    Raises
    ------
    ValueError
        If peft has no such layer, two layers differ in method or settings, or a parameter is
        trained where peft would not copy it, or not it alone.

    References
    ----------
    https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    names, copied = list(adapters(model)), _trained_modules(model)
    if not names:
        raise ValueError(f"no adapter in {type(model).__name__}: save_trainable keeps a head alone")
    inside = tuple(f"{name}." for name in names)
    modules = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    if others := [name for name in _copied(modules, copied) if name not in copied]:
        raise ValueError(f"with {copied} peft would copy {others[0]!r}, too: rename one of them")
    config = _config(model) | dict(inference_mode=True, modules_to_save=copied or None)
    exact = _targets(config | {"target_modules": names}, modules) == names
    config["target_modules"] = names if exact else _pattern(names)
    if config["peft_type"] == "IA3":
        inputs = [name for name, a in adapters(model).items() if a.settings["feedforward"]]
        exact = [name for name in names if name.endswith(tuple(inputs))] == inputs
        config["feedforward_modules"] = inputs if exact else _pattern(inputs)
    text = json.dumps(config, indent=2, sort_keys=True)
    data = _packed(_layout(model, copied), config=text)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "adapter_model.safetensors", data)
    files.write(folder / "adapter_config.json", text.encode())


@torch.no_grad()
def load_peft(model, folder):
    """Put the adapters of a folder from `save_peft` or peft into a model, and copy all its values.

    Values are cast to the model's dtype, as peft does. What else is trained stays the caller's:
    unfreeze a head to train it on. Everything is checked before anything changes.

    Parameters
    ----------
    model : nn.Module
        The plain base.
    folder : str or Path
        With adapter_config.json and adapter_model.safetensors.

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
        model, or are not finite.
    """
    path, weights = (Path(folder, f"adapter_{n}") for n in ("config.json", "model.safetensors"))
    if not weights.exists() and weights.with_suffix(".bin").exists():
        raise ValueError(f"{folder} holds a pickle, which can run code: save it as safetensors")
    text = path.read_text(encoding="utf-8")
    tensors, notes = _read(weights)
    if notes.get("config", text) != text:
        raise ValueError(f"{path} is not the one that {weights.name} was written with")
    for name in adapters(model):
        raise ValueError(f"{name!r} has an adapter: load into the plain base")
    empty = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    twin = copy.deepcopy(model, empty | {id(b): b.to("meta") for b in model.buffers()})
    try:  # on a twin without data
        config = _read_config(text)
        copied = _install(twin, config)
        _check_settings(config, twin)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    wanted = _layout(twin, copied)
    sides = ({k: f"of shape {tuple(t.shape)}" for k, t in d.items()} for d in (tensors, wanted))
    _compare(weights, *sides, "not there", "its settings and the model must fit its tensors")
    for key, t in tensors.items():
        dtype = wanted[key].dtype
        if t.dtype != dtype and not (t.is_floating_point() and dtype.is_floating_point):
            raise ValueError(f"{key!r} is {t.dtype} in {weights}, but {dtype} in the model")
        if not t.to(dtype).isfinite().all():
            raise ValueError(f"{key!r} in {weights} has values that are no finite {dtype}")
    _install(model, config)
    for key, t in _layout(model, copied).items():
        t.copy_(tensors[key])
    return list(adapters(model))


def _in_peft(name, a):
    """Return an adapter's fields of peft's config and its tensors, which are views if they can."""
    s, why = a.settings, "peft has no such layer"
    if isinstance(a, LoRA):
        A, B, r, alpha = a.lora_A, a.lora_B, s["r"], s["lora_alpha"]
        if s["init"] == "pissa":
            A, B, r = torch.cat([A, a.start_A]), torch.cat([B, -a.start_B], 1), 2 * r
            alpha *= math.sqrt(2) if s["rslora"] else 2  # the same s
        fields = dict(peft_type="LORA", r=r, lora_alpha=alpha, lora_dropout=s["dropout"])
        fields |= dict(use_rslora=s["rslora"], use_dora=isinstance(a, DoRA), bias="none")
        magnitude = {"lora_magnitude_vector": a.magnitude} if fields["use_dora"] else {}
        return fields, {"lora_A.weight": A, "lora_B.weight": B} | magnitude
    if isinstance(a, VeRA):
        fields = dict(peft_type="VERA", **s, vera_dropout=0.0, bias="none", save_projection=True)
        return fields, {"vera_lambda_b": a.lambda_b, "vera_lambda_d": a.lambda_d}
    if isinstance(a, IA3):
        shape = (1, -1) if s["feedforward"] else (-1, 1)
        return dict(peft_type="IA3"), {"ia3_l": a.ia3_l.view(shape)}
    if isinstance(a, OFT) and not is_conv1d(a.base):
        fields = dict(peft_type="OFT", r=0, oft_block_size=s["block_size"], bias="none")
        fields |= dict(use_cayley_neumann=False, module_dropout=0.0)
        return fields, {"oft_R.weight": a.oft_R}
    if isinstance(a, Tuned) and set(s["names"]) == set(a.base.state_dict()):
        tensors = {f"ln_tuning_layers.{key}": p for key, p in a.tuned().items()}
        return dict(peft_type="LN_TUNING"), tensors
    if isinstance(a, PromptTuning | PrefixTuning):
        why = "peft has it in a wrapper for models of transformers, not in a layer"
    raise ValueError(f"{name!r} is a {type(a).__name__} of a {type(a.base).__name__}: {why}")


def _config(model):
    """Return the fields of peft's config on which all adapters agree."""
    found = adapters(model)
    (first, fields), *others = ((name, _in_peft(name, a)[0]) for name, a in found.items())
    for name, other in others:
        if other != fields:
            raise ValueError(
                f"{name!r} is {other}, {first!r} {fields}: peft's folder has one setting"
            )
    if fields["peft_type"] in ("LORA", "VERA", "IA3"):
        fields["fan_in_fan_out"] = any(is_conv1d(a.base) for a in found.values())
    return fields


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
    return out


def _trained_modules(model):
    """Return the outermost modules that are trained outside the adapters."""
    found, owners = adapters(model), []
    for name, p in model.named_parameters():
        owner = name.rpartition(".")[0]
        if not p.requires_grad or _is_own(name, found):
            continue
        if any(a.startswith(owner and f"{owner}.") or owner.startswith(f"{a}.") for a in found):
            place = owner or "the model itself"
            raise ValueError(f"peft cannot train {name!r}: an adapter is in or around {place!r}")
        if not any(f"{owner}.".startswith(f"{o}.") for o in owners):
            owners.append(owner)
    return owners


def _pattern(names):
    return "|".join(map(re.escape, names))


def _fits(wanted, name, dot="."):
    """Peft's rule: a regular expression of the whole name, or a list of ends of it."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name)
    return any(f"{dot}{name}".endswith(f"{dot}{end}") for end in wanted or [])


def _copied(modules, ends):
    return [name for name in modules if name and _fits(list(ends or []), name, dot="")]


def _targets(config, modules):
    """Return the modules that peft adapts: those that fit, are not excluded and not copied."""
    inside = "|".join(config["modules_to_save"] or [])
    return [
        name
        for name in modules
        if _fits(config["target_modules"], name)
        and not _fits(config.get("exclude_modules"), name)
        and not (inside and re.match(rf"(^|.*\.)({inside})($|\..*)", name))
    ]


def _read_config(text):
    """Return the fields of an adapter_config.json, with peft's defaults for those left out."""
    config = json.loads(text)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in DEFAULTS:
        raise ValueError(f"peft_type={kind!r} is not computed here, only {', '.join(DEFAULTS)}")
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"init_lora_weights={init!r} may belong to a base that it changed: let peft save it"
            " with path_initial_model_for_weight_conversion, as a plain LoRA"
        )
    return dict.fromkeys(NAMING) | DEFAULTS[kind] | config


def _install(model, config):
    """Put adapters where the config has them; return the names of the modules that it copies."""
    modules = [name for name, _ in model.named_modules()]
    found = {name: model.get_submodule(name) for name in _targets(config, modules)}
    if not found:
        raise ValueError(f"target_modules={config['target_modules']!r} fits no layer")
    shared = {b for name, b in found.items() if _fits(config["feedforward_modules"], name, dot="")}
    if config["peft_type"] == "VERA":
        d_in, d_out = map(max, zip(*map(check_linear, found.values()), strict=True))
        like = next(iter(found.values())).weight
        A, B = like.new_empty(config["r"], d_in), like.new_empty(d_out, config["r"])
        shared = Projection(A, B)
    replace(model, found, lambda base: _adapter(base, config, shared))
    return _copied(modules, config["modules_to_save"])


def _adapter(base, config, shared):
    if config["peft_type"] == "LORA":
        method = DoRA if config["use_dora"] else LoRA
        options = dict(rslora=config["use_rslora"], dropout=config["lora_dropout"])
        options |= dict(generator=torch.Generator())  # torch's global stream stays as it was
        return method(base, config["r"], config["lora_alpha"], **options)
    if config["peft_type"] == "VERA":
        return VeRA(base, shared, d_initial=config["d_initial"])
    if config["peft_type"] == "IA3":
        return IA3(base, feedforward=base in shared)
    if config["peft_type"] == "OFT":
        return OFT(base, config["oft_block_size"])
    return Tuned(base, [name for name, _ in base.named_parameters()])


def _check_settings(config, model):
    """Refuse a field that asks for another computation than that of the model's adapters."""
    ours, conv1d = _config(model), {is_conv1d(a.base) for a in adapters(model).values()}
    for field, value in config.items():
        unset = value is None or value is False or value in ("", [], {})
        same = value == ours[field] if field in ours else unset or field in (*NAMING, *IDLE)
        if field == "fan_in_fan_out" and len(conv1d) == 2:
            continue  # peft's value is that of the last layer
        if not same or (isinstance(value, float) and not math.isfinite(value)):
            here = f"it is {ours[field]!r} here" if field in ours else "it is not computed here"
            raise ValueError(f"{field}={value!r}: {here}")
