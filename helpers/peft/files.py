"""What was trained, as a small file: exact, and tied to its base."""

import hashlib
import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from helpers import files
from helpers.peft.surgery import adapters


def save_trainable(model, path):
    """Write what was trained, and nothing else, to a safetensors file.

    That is every trainable parameter, all that an adapter adds (such as VeRA's frozen projection),
    and the buffers of modules with trainable parameters of their own. The file also holds the
    adapters' settings and a digest of these tensors and one of the frozen base. A crash or a full
    disk leaves the file that was there before.

    Parameters
    ----------
    model : nn.Module
    path : str or Path

    Raises
    ------
    ValueError
        If nothing is trainable.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"nothing to save: every parameter of {type(model).__name__} is frozen")
    held, base = _split(model)
    found = {n: {"method": type(a).__name__, **a.settings} for n, a in adapters(model).items()}
    files.write(path, _packed(held, base=_digest(base), adapters=json.dumps(found)))


@torch.no_grad()
def load_trainable(model, path):
    """Copy what `save_trainable` wrote into a model, bit for bit.

    Everything is checked before anything changes.

    Parameters
    ----------
    model : nn.Module
        The same base with the same adapters and the same unfrozen parts, on any device. Only the
        adapters' dropout may differ.
    path : str or Path

    Raises
    ------
    ValueError
        If the file is damaged or not ours, or belongs to other adapters, parts or weights.
    """
    tensors, notes = _read(path)
    if not {"digest", "base", "adapters"} <= notes.keys():
        raise ValueError(f"{path} was not written by save_trainable: its metadata are not there")
    there = {name: _shown(**settings) for name, settings in json.loads(notes["adapters"]).items()}
    here = {n: _shown(type(a).__name__, **a.settings) for n, a in adapters(model).items()}
    _compare(path, there, here, "not adapted", "inject what was saved")
    held, base = _split(model)
    sides = ({n: f"{t.dtype} {tuple(t.shape)}" for n, t in d.items()} for d in (tensors, held))
    _compare(path, *sides, "not trained", "unfreeze what was trained, no more, before loading")
    if notes["base"] != _digest(base):
        raise ValueError(f"{path} belongs to another base: this model's frozen weights differ")
    for name, t in tensors.items():
        held[name].copy_(t)


def _split(model):
    """Return the tensors that a file holds, and those of the base under their plain names."""
    found = sorted(adapters(model), key=len, reverse=True)  # an inner one before its outer one
    lasting, held, base = model.state_dict(keep_vars=True), {}, {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        owner = model.get_submodule(name.rpartition(".")[0])
        trained = any(p.requires_grad for p in owner.parameters(recurse=False))
        if t.requires_grad or _is_own(name, found) or (trained and not isinstance(t, nn.Parameter)):
            held[name] = t
        elif name in lasting:
            for adapter in found:
                if name.startswith(f"{adapter}.base."):
                    name = adapter + name.removeprefix(f"{adapter}.base")
            base[name] = t
    return {name: t for name, t in held.items() if name in lasting}, base


def _is_own(name, found):
    """Whether a tensor is an adapter's own and not its base's."""
    return any(name.startswith(f"{a}.") and not name.startswith(f"{a}.base.") for a in found)


def _shown(method, dropout=None, **settings):
    return f"{method}({', '.join(f'{key}={value}' for key, value in settings.items())})"


def _compare(path, there, here, lack, cure):
    """Refuse the first name whose description in the file is not the model's."""
    for name in here | there:
        a, b = there.get(name, lack), here.get(name, lack)
        if a != b:
            raise ValueError(f"{name!r} is {a} in {path}, but {b} in the model: {cure}")


def _digest(tensors, **notes):
    sha = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        sha.update(t.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def _packed(tensors, **notes):
    """Return a safetensors file that holds the digest of its contents."""
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    notes |= {"format": "pt"}
    return save(tensors, notes | {"digest": _digest(tensors, **notes)})


def _read(path):
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from None
    signed = {key: note for key, note in notes.items() if key != "digest"}
    if notes.keys() & {"digest", "config"} and notes.get("digest") != _digest(tensors, **signed):
        raise ValueError(f"{path} is damaged: its digest is that of other contents")
    return tensors, notes
