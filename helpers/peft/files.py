"""What was trained, as a small file: exact, and tied to its base."""

import hashlib
import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from helpers import files
from helpers.peft.four_bits import QuantizedLinear
from helpers.peft.surgery import adapters, unwrapped


def save_trainable(model, path):
    """Write what was trained, and nothing else, to a safetensors file.

    That is every trainable parameter, all that an adapter adds (such as VeRA's frozen projection),
    the buffers of modules with trainable parameters of their own, and running statistics, which
    training moves where nobody looks. The file also holds the adapters' settings, a digest of these
    tensors and one of each tensor of the frozen base. A crash or a full disk leaves the file that
    was there before.

    Parameters
    ----------
    model : nn.Module
        Or torch's wrapper of it: compiled, data-parallel, averaged.
    path : str or Path

    Raises
    ------
    ValueError
        If nothing is trainable, an adapter is disabled, or torch wraps a module within the model.
    """
    model = _running(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"nothing to save: every parameter of {type(model).__name__} is frozen")
    held, base = _split(model)
    notes = dict(base=" ".join(_digests(model, base).values()), adapters=json.dumps(_shown(model)))
    files.write(path, _packed(held, **notes))


@torch.no_grad()
def load_trainable(model, path, *, check_base=True):
    """Copy what `save_trainable` wrote into a model, bit for bit.

    Everything is checked before anything changes.

    Parameters
    ----------
    model : nn.Module
        The same base with the same adapters and the same unfrozen parts, on any device. Only the
        adapters' dropout may differ.
    path : str or Path
    check_base : bool, default=True
        Refuse a base whose frozen tensors are not those that were there, bit for bit.

    Raises
    ------
    ValueError
        If the file is damaged or not ours, or belongs to other adapters, parts or weights.
    """
    tensors, notes = _read(path)
    if not {"digest", "base", "adapters"} <= notes.keys():
        raise ValueError(f"{path} was not written by save_trainable: its metadata are not there")
    held, base = _split(model)
    there = json.loads(notes["adapters"])
    _compare(path, there, _shown(model), "not adapted", "inject what was saved")
    cure = "unfreeze what was trained, no more, before loading"
    _compare(path, _shapes(tensors), _shapes(held), "not trained", cure)
    dtypes = ({name: t.dtype for name, t in side.items()} for side in (tensors, held))
    _compare(path, *dtypes, None, "load into a model of the file's dtype, and cast it afterwards")
    if check_base:
        _check_base(path, notes["base"], _digests(model, base))
    for name, t in tensors.items():
        held[name].copy_(t)


def _plain(model):
    """Return the model that torch's wrappers hold; refuse one that holds a part of it."""
    model = unwrapped(model)
    names = {m: name for name, m in model.named_modules()}
    for m, name in names.items():
        if unwrapped(m) is not m:
            raise ValueError(
                f"{name!r} is a {type(m).__name__} inside the model: put back what it holds,"
                f" model.set_submodule({name!r}, model.get_submodule({names[unwrapped(m)]!r}))"
            )
    return model


def _running(model):
    """Return the plain model; refuse disabled adapters, which would come back enabled."""
    model = _plain(model)
    for name, a in adapters(model).items():
        if not a.enabled:
            raise ValueError(
                f"{name!r} is disabled, and a file would enable it: save outside of"
                " adapters_disabled, or set its attribute enabled to True"
            )
    return model


def _split(model):
    """Return the tensors that a file holds, and those of the base, by their names in the state."""
    model = _plain(model)
    mine = _added(model) | _statistics(model) | {p for p in model.parameters() if p.requires_grad}
    for m in model.modules():
        trained = any(p.requires_grad for p in m.parameters(recurse=False))
        if trained and not isinstance(m, QuantizedLinear):  # whose codes are the base's
            mine.update(m.buffers(recurse=False))
    found = _state(model)
    held = {name: t for name, t in found.items() if t in mine}
    return held, {name: t for name, t in found.items() if t not in mine}


def _state(model):
    """Return the tensors of a model's state, tied ones once."""
    found = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if isinstance(t, torch.Tensor):
            found.setdefault(t, name)
    return {name: t for t, name in found.items()}


def _added(model):
    """Return the tensors that are adapters' own and not their bases'."""
    return set().union(*(_tensors(a) - _tensors(a.base) for a in adapters(model).values()))


def _statistics(model):
    """Return the running statistics, which move though nothing is trained."""
    norms = (m for m in model.modules() if m._buffers.get("running_mean") is not None)
    return set().union(*(m.buffers(recurse=False) for m in norms))


def _tensors(module):
    return {*module.parameters(), *module.buffers()}


def _shown(model):
    """Return the settings of adapters that must agree; dropout acts in training alone."""
    out = {}
    for name, a in adapters(unwrapped(model)).items():
        settings = (f"{key}={value}" for key, value in a.settings.items() if key != "dropout")
        out[name] = f"{type(a).__name__}({', '.join(settings)})"
    return out


def _shapes(tensors):
    return {name: f"of shape {tuple(t.shape)}" for name, t in tensors.items()}


def _compare(path, there, here, lack, cure, of="the model"):
    """Refuse the first name whose description in the file is not the model's."""
    for name in here | there:
        a, b = there.get(name, lack), here.get(name, lack)
        if a != b:
            raise ValueError(f"{name!r} is {a} in {path}, but {b} in {of}: {cure}")


def _digests(model, tensors):
    """Return eight digits for each tensor of a base, a four-bit weight being what it stands for."""
    four = {m.scales: m for m in unwrapped(model).modules() if isinstance(m, QuantizedLinear)}
    codes, out = {b for m in four.values() for b in m.buffers()}, {}
    for name, t in tensors.items():
        if t in four:
            name, t = name.removesuffix("scales") + "weight", four[t].weight
        elif t in codes or t.is_meta:
            continue
        out[name] = f"{zlib.crc32(_bytes(t), zlib.crc32(_label(name, t))):08x}"
    return out


def _check_base(path, note, here):
    """Refuse a base with other digits than those that a file has noted."""
    there = note.split()
    odd = [f"{name!r} differs" for name, digits in here.items() if digits not in there]
    if odd or len(here) != len(there):
        what = odd[0] if odd else f"{len(there)} tensors were frozen, not {len(here)}"
        raise ValueError(
            f"{path} belongs to another base: {what}; load into the base that it was saved from, or"
            " pass check_base=False if this is it in another dtype or number of bits"
        )


def _digest(tensors, **notes):
    sha = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(_label(name, tensors[name]))
        sha.update(_bytes(tensors[name]))
    return sha.hexdigest()


def _label(name, t):
    return f"{name} {t.dtype} {tuple(t.shape)}\n".encode()


def _bytes(t):
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _packed(tensors, **notes):
    """Return a safetensors file that holds the digest of its contents."""
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    notes |= {"format": "pt"}
    return save(tensors, notes | {"digest": _digest(tensors, **notes)})


def _read(path):
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: load_trainable reads a file, load_peft a folder")
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
