"""One base, many adapters, one batch: each row goes through an adapter of its own."""

import copy

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from helpers.peft.arithmetic import _check_same, _uses
from helpers.peft.files import _added, _plain, _split, _tensors
from helpers.peft.four_bits import QuantizedLinear
from helpers.peft.lora import LoRA
from helpers.peft.surgery import adapters, replace
from helpers.training import freeze


class MixedBatch(nn.Module):
    """y_i = model_k(x_i) for each row i of a batch, k being the row's adapter, in one forward pass.

    The weights of `base` are shared with it. Copied from each model are A and s B, padded with
    zeros to the largest rank, and the modules trained outside adapters, such as a head. It is for
    inference: nothing has a gradient, dropout is off, and running statistics are each model's own.

    Parameters
    ----------
    base : nn.Module
        The plain model. Modules that are adapted or trained take one tensor, (B, ...).
    models : dict of str to nn.Module
        Adapted copies of it: LoRA, rsLoRA or PiSSA of any rank, lora_alpha and targets.

    Raises
    ------
    ValueError
        If a model's frozen tensors are not the base's, it has an adapter that is disabled or not
        LoRA, a trained tensor is tied or of another shape than the base's, or of two modules one
        inside the other both would be replaced.

    References
    ----------
    Chen et al. (2023), section 4 (Punica), arXiv:2310.18547; Sheng et al. (2023), section 5
    (S-LoRA), arXiv:2311.03285.
    """

    def __init__(self, base, models):
        super().__init__()
        if not models or None in models:
            raise ValueError("models must hold one model or more by name; None is the plain base")
        base, models = _plain(base), {name: _plain(model) for name, model in models.items()}
        for name in adapters(base):
            raise ValueError(f"{name!r} of base has an adapter: pass the plain model")
        there = {key: t for tensors in _split(base) for key, t in tensors.items()}
        parts = {name: _parts(name, model) for name, model in models.items()}
        for name, (_, trained, frozen) in parts.items():
            _check_base(name, trained, frozen, there)
        self.numbers = {name: k for k, name in enumerate([None, *models])}
        own = {p: nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
        own |= {b: b for b in base.buffers()}
        self.model = copy.deepcopy(base, {id(t): mine for t, mine in own.items()})
        targets = {name for loras, _, _ in parts.values() for name in loras}
        owners = {name.rpartition(".")[0] for _, trained, _ in parts.values() for name in trained}
        owners = {n for n in owners if not any(n.startswith(f"{above}.") for above in owners)}
        found = {n: m for n, m in self.model.named_modules() if n in targets | owners}
        names = {m: n for n, m in found.items()}

        def _make(module):
            name, pairs, versions = names[module], [], []
            for k, (loras, _, frozen) in parts.items():
                pairs.append(_low_rank(loras[name]) if name in loras else None)
                if name in owners:
                    part = loras[name].base if name in loras else models[k].get_submodule(name)
                    memo = {id(t): own[there[key]] for key, t in frozen.items()}  # not copied
                    versions.append(copy.deepcopy(part, memo))
            return _PerRow(module, pairs, versions)

        replace(self.model, found, _make)
        for module in self.model.modules():
            if hasattr(module, "skips_padding"):
                module.skips_padding = False  # layers must know rows
        freeze(self.eval())

    @torch.no_grad()
    def forward(self, x, names, **options):
        """Return the model's output, row i of `x` going through the adapter ``names[i]``.

        The name of the plain base is None; `options` are the model's.
        """
        if isinstance(names, str) or len(names) != len(x):
            raise ValueError(f"names={names!r} must be a list of {len(x)} names, one for each row")
        if unknown := [name for name in names if name not in self.numbers]:
            raise ValueError(f"no adapter is called {unknown[0]!r}: there are {list(self.numbers)}")
        rows = torch.tensor([self.numbers[name] for name in names], device=x.device)
        layers = [m for m in self.model.modules() if isinstance(m, _PerRow)]
        try:
            for layer in layers:
                layer.rows = rows
            return self.model(x, **options)
        finally:
            for layer in layers:
                layer.rows = ()  # the next batch has others


class _PerRow(nn.Module):
    """y_i = f_k(x_i) + s_k B_k A_k x_i, k being the adapter of row i and 0 the plain base.

    Where `versions` is empty, f_k is the base's f; `pairs` holds an adapter's A and s B', or None.
    """

    def __init__(self, base, pairs, versions):
        super().__init__()
        self.base, self.versions, self.rows = base, nn.ModuleList(versions), ()
        self.register_buffer("A", None)
        self.register_buffer("B", None)
        if any(pairs):
            A, B = next(pair for pair in pairs if pair)
            As, Bs = zip(*(pair or (A[:0], B[:0]) for pair in [None, *pairs]), strict=True)
            self.A = pad_sequence(As, batch_first=True)  # (1 + N, r, in), r the largest rank
            self.B = pad_sequence(Bs, batch_first=True)  # (1 + N, r, out)

    def forward(self, x):
        if len(x) != len(self.rows):
            raise ValueError(f"a layer got {len(x)} rows, but there are {len(self.rows)} names")
        y = self.base(x)
        for k, version in enumerate(self.versions, 1):
            mine = self.rows == k
            if mine.any():
                y[mine] = version(x[mine])
        if self.A is not None:
            A, B = self.A[self.rows], self.B[self.rows]  # (B, r, in), (B, r, out)
            x = x.reshape(len(x), -1, x.shape[-1]).to(A.dtype)  # (B, T, in)
            h = torch.bmm(A, x.mT)  # (B, r, T): quicker than (B, T, r), as in AddLowRank
            rows = y.view(len(x), -1, y.shape[-1]).to(A.dtype)  # (B, T, out)
            y = torch.baddbmm(rows, h.mT, B).view_as(y).to(y.dtype)
        return y


def serving_memory(model, n):
    """Return the bytes of a `MixedBatch` of n models like this one, and of n fine-tuned models.

    The first holds the base once, each model's trained modules, and n + 1 pairs of A and s B for
    each layer, one of which is the plain base's zeros. Fine-tuned models hold no codes of four
    bits, which nothing can train, but the weights that these stand for.

    Parameters
    ----------
    model : nn.Module
        With LoRA.
    n : int

    Returns
    -------
    mixed, fine_tuned : int
    """
    model = _plain(model)
    loras, trained, _ = _parts("the model", model)
    pairs = sum(t.nbytes for a in loras.values() for t in _low_rank(a))
    outside = sum(t.nbytes for t in trained.values())
    base = sum(t.nbytes for t in _tensors(model) - _added(model))
    four = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    codes = sum(b.nbytes for m in four for b in m.buffers())
    weights = sum(m.like.element_size() * m.in_features * m.out_features for m in four)
    return base + (n + 1) * pairs + n * outside, n * (base - codes + weights)


def _parts(name, model):
    """Return a model's LoRA layers, the tensors trained outside them, and the frozen ones."""
    loras, uses = adapters(model), _uses(model)
    for layer, a in loras.items():
        if type(a) is not LoRA or not a.enabled:
            kind = type(a).__name__ if a.enabled else "disabled"
            raise ValueError(f"{layer!r} of {name!r} is {kind}: only enabled LoRA can be mixed")
    held, frozen = _split(model)
    added = _added(model)
    trained = {key: t for key, t in held.items() if t not in added}
    for key, t in trained.items():
        if "." not in key or uses[t] > 1:
            why = "belongs to no module below the model" if "." not in key else "is tied to another"
            raise ValueError(f"{key!r} of {name!r} was trained and {why}: it cannot differ by row")
    return loras, trained, frozen


def _check_base(name, trained, frozen, there):
    """Refuse a model that is not an adapted copy of the base whose tensors are `there`."""
    _check_same(trained | frozen, there, repr(name), "base")
    for key, t in frozen.items():
        if not torch.equal(t, there[key]):
            raise ValueError(
                f"{key!r} of {name!r} is frozen and differs from base's: pass the base that was"
                " adapted, or unfreeze it if it was trained"
            )


def _low_rank(lora):
    """Return A of shape (r, in) and s B' of shape (r, out), for PiSSA of rank 2r."""
    A, B = lora.lora_A, lora.lora_B
    if lora.settings["init"] == "pissa":
        A, B = torch.cat([A, lora.start_A]), torch.cat([B, -lora.start_B], 1)
    return A.detach(), lora.scaling * B.detach().T
