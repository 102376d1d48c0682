"""Peft's adapter_config.json: what its fields ask for, and which layers they name."""

import json
import math
import re

import torch

from helpers.peft.base import is_conv1d
from helpers.peft.layers import IA3, OFT, PrefixTuning, PromptTuning, Tuned
from helpers.peft.lora import DoRA, LoRA, VeRA
from helpers.peft.surgery import adapters

# Settings in an adapter_config.json that may be left out, with peft's defaults
DEFAULTS = {
    "LORA": dict(r=8, lora_alpha=8.0, lora_dropout=0.0, use_rslora=False, use_dora=False)
    | dict(rank_pattern={}, alpha_pattern={}),
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

PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}  # what may differ by layer in LoRA


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
    """Return the fields of peft's config, on which adapters agree, or which have patterns."""
    found = adapters(model)
    each = {name: _in_peft(name, a)[0] for name, a in found.items()}
    first, config = next((name, dict(fields)) for name, fields in each.items())
    varied = PATTERNS if config["peft_type"] == "LORA" else {}
    for name, fields in each.items():
        for key in config | fields:
            a, b = fields.get(key), config.get(key)
            if a != b and key not in varied:
                raise ValueError(
                    f"{name!r} has {key}={a!r}, {first!r} {key}={b!r}: peft's folder has one {key},"
                    " so keep such a model by save_trainable"
                )
    for key, pattern in varied.items():
        config[pattern] = _odd({name: fields[key] for name, fields in each.items()}, config[key])
    if config["peft_type"] in ("LORA", "VERA", "IA3"):
        config["fan_in_fan_out"] = any(is_conv1d(a.base) for a in found.values())
    return config


def _odd(values, default):
    """Return the values that are not the default, by names as peft's patterns have them."""
    odd = {name: values[name] for name in sorted(values) if values[name] != default}
    if any(_by_pattern(name, odd, default) != value for name, value in values.items()):
        odd = {f"^{re.escape(name)}": value for name, value in odd.items()}
    return odd


def _by_pattern(name, pattern, default):
    """Return a layer's value by peft's rule: the first regular expression of an end of its name."""
    fits = (value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(fits, pattern.get(name, default))


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


def _asked(text):
    """Return the fields of an adapter_config.json that change outputs."""
    return {field: value for field, value in json.loads(text).items() if field not in IDLE}


def _read_config(text):
    """Return the fields of an adapter_config.json, with peft's defaults for those left out."""
    config = json.loads(text)  # bytes, which are UTF-8
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


def _check_settings(config, model):
    """Refuse a field that asks for another computation than that of the model's adapters."""
    ours, conv1d = _config(model), {is_conv1d(a.base) for a in adapters(model).values()}
    used = {*PATTERNS, *PATTERNS.values()} if config["peft_type"] == "LORA" else ()
    for field, value in config.items():
        if field in used:
            continue
        unset = value is None or value is False or value in ("", [], {})
        same = value == ours[field] if field in ours else unset or field in (*NAMING, *IDLE)
        if field == "fan_in_fan_out" and len(conv1d) == 2:
            continue  # peft's value is that of the last layer
        if not same or (isinstance(value, float) and not math.isfinite(value)):
            here = f"it is {ours[field]!r} here" if field in ours else "it is not computed here"
            raise ValueError(f"{field}={value!r}: {here}")
