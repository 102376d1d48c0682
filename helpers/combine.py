"""One base, many adapters: switch by name, add and subtract what was learned, serve mixed batches.

A vector is a dict of tensors by parameter name: what is added to a base's parameters.
"""

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from helpers.checkpoint import _split
from helpers.freezing import freeze
from helpers.inject import adapters, merge, replace
from helpers.layers import DoRA, LoRA, is_conv1d, matrix


def adapter_state(model):
    """Return copies of what was trained and what adapters add: what `save_trainable` writes.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to Tensor
    """
    return {name: t.detach().clone() for name, t in _split(model)[0].items()}


@torch.no_grad()
def switch(model, states, name):
    """Copy the tensors of ``states[name]`` into a model.

    A state has no settings: lora_alpha, for one, stays the model's, and so does the frozen base. A
    file of `helpers.checkpoint.save_trainable` has them checked.

    Parameters
    ----------
    model : nn.Module
        Changed in place, once all is checked.
    states : dict of str to dict of str to Tensor
        Results of `adapter_state`, from models with the same base, adapters and unfrozen parts.
    name : str

    Raises
    ------
    ValueError
        If there is no such state, or its names and shapes are not the model's.
    """
    if name not in states:
        raise ValueError(f"no adapter is called {name!r}: there are {list(states)}")
    held = _split(model)[0]
    _check_same(states[name], held, repr(name), "the model")
    for key, t in states[name].items():
        held[key].copy_(t)


@torch.no_grad()
def delta_weights(model):
    """Return what each adapter adds to the weight of its layer, for LoRA s B A.

    Parameters
    ----------
    model : nn.Module
        With LoRA, PiSSA, DoRA or VeRA.

    Returns
    -------
    dict of str to Tensor
        By the weight's name in the plain model, such as "blocks.0.attention.q_proj.weight".

    Raises
    ------
    ValueError
        If there is no adapter, one does anything else than add to a weight, or the weight is tied
        to another layer's, which would change with it.
    """
    vector, uses = {}, _uses(model)
    for name, a in adapters(model).items():
        if not hasattr(a, "delta_weight"):
            kind = type(a).__name__
            raise ValueError(f"{name!r} is a {kind}, which does not add a matrix to a weight")
        if uses[a.base.weight] > 1:
            raise ValueError(f"{name!r} shares its weight with another layer: untie them")
        # DoRA rescales W + s B A, which changes more than s B A
        delta = a.merged_weight() - matrix(a.base) if isinstance(a, DoRA) else a.delta_weight()
        vector[f"{name}.weight"] = delta.T if is_conv1d(a.base) else delta
    if not vector:
        raise ValueError(f"no adapter in {type(model).__name__}: task_vector takes any model")
    return vector


@torch.no_grad()
def task_vector(model, base):
    """Return trained - base for each parameter that differs.

    Buffers, such as the running statistics of batch norm, have no part in it.

    Parameters
    ----------
    model, base : nn.Module
        Of one architecture, trained in any way; adapters are merged, in a copy.

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    ValueError
        If their parameters differ in names or shapes, or an adapter cannot be merged.

    References
    ----------
    Ilharco et al. (2022), section 2, arXiv:2212.04089.
    """
    trained, before = (dict(_merged(m).named_parameters()) for m in (model, base))
    _check_same(trained, before, "the model", "base")
    return {n: p - before[n] for n, p in trained.items() if not torch.equal(p, before[n])}


@torch.no_grad()
def weighted_sum(vectors, weights):
    """Return w_1 v_1 + ... + w_n v_n, tensor by tensor.

    Parameters
    ----------
    vectors : sequence of dict of str to Tensor
    weights : sequence of float

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    ValueError
        If the vectors differ in names or shapes, or there is not one weight for each.
    """
    _check_vectors(vectors)
    if len(weights) != len(vectors):
        raise ValueError(f"{len(vectors)} vectors need as many weights, not {len(weights)}")
    pairs = list(zip(weights, vectors, strict=True))
    return {name: sum(w * v[name] for w, v in pairs) for name in vectors[0]}


@torch.no_grad()
def ties(vectors, *, density=0.2, scale=1.0):
    """Return scale * TIES: trim each vector, elect signs, average what agrees.

    Trim: of all entries of a vector together, only the largest magnitudes stay. Elect: an entry's
    sign is that of its sum over the vectors. Average: over the vectors that have this sign there,
    0 if none has. In `peft` each tensor is trimmed for itself and a sum of 0 counts as positive.

    Parameters
    ----------
    vectors : sequence of dict of str to Tensor
    density : float, default=0.2
        Share of the entries that stay, above 0 and at most 1; at least one stays, and all of them
        that are as large as the smallest that stays.
    scale : float, default=1.0

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    ValueError
        If `density` is outside (0, 1], or the vectors differ in names or shapes.

    References
    ----------
    Yadav et al. (2023), section 4, arXiv:2306.01708.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density!r} must be above 0, and at most 1")
    _check_vectors(vectors)
    first = vectors[0]
    flat = torch.stack(
        [torch.cat([v[name].flatten() for name in first]) for v in vectors]
    )  # (n, P)
    stay = max(1, round(density * flat.shape[1]))
    smallest = flat.abs().topk(stay).values[:, -1:]  # (n, 1)
    trimmed = torch.where(flat.abs() >= smallest, flat, 0)
    elected = trimmed.sum(0).sign()  # (P,)
    agree = (trimmed.sign() == elected) & (trimmed != 0)  # (n, P)
    mean = scale * (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)  # (P,)
    parts = mean.split([t.numel() for t in first.values()])
    return {n: part.view_as(t) for (n, t), part in zip(first.items(), parts, strict=True)}


@torch.no_grad()
def add(base, vector, scale=1.0):
    """Return a copy of `base` with base + scale * vector as its parameters.

    A scale of -1 negates what the vector's model has learned.

    Parameters
    ----------
    base : nn.Module
    vector : dict of str to Tensor
        For some or all parameters of `base`.
    scale : float, default=1.0

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If a tensor has no parameter of its name and shape in `base`.

    References
    ----------
    Ilharco et al. (2022), section 2, arXiv:2212.04089.
    """
    model = copy.deepcopy(base)
    parameters = {name: p for name, p in model.named_parameters() if name in vector}
    _check_same(vector, parameters, "the vector", "base")
    for name, t in vector.items():
        parameters[name].add_(t, alpha=scale)
    return model


class MixedBatch(nn.Module):
    """y_i = model_k(x_i) for each row i of a batch, k being the row's adapter, in one forward pass.

    The weights of `base` are shared with it. Copied from each model are A and s B, padded with
    zeros to the largest rank, and the modules trained outside adapters, such as a head. It is for
    inference: nothing has a gradient, and dropout is off.

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
            A, B = self.A[self.rows].to(y.dtype), self.B[self.rows].to(y.dtype)
            x = x.reshape(len(x), -1, x.shape[-1]).to(y.dtype)  # (B, T, in)
            h = torch.bmm(A, x.mT)  # (B, r, T): quicker than (B, T, r), as in AddLowRank
            y.view(len(x), -1, y.shape[-1]).baddbmm_(h.mT, B)
        return y


def serving_memory(model, n):
    """Return the bytes of a `MixedBatch` of n models like this one, and of n fine-tuned models.

    The first holds the base once, each model's trained modules, and n + 1 pairs of A and s B for
    each layer, one of which is the plain base's zeros.

    Parameters
    ----------
    model : nn.Module
        With LoRA.
    n : int

    Returns
    -------
    mixed, fine_tuned : int
    """
    loras, trained, frozen = _parts("the model", model)
    pairs = sum(t.nbytes for a in loras.values() for t in _low_rank(a))
    outside = sum(t.nbytes for t in trained.values())
    base = outside + sum(t.nbytes for t in frozen.values())
    return base + (n + 1) * pairs + n * outside, n * base


def _parts(name, model):
    """Return a model's LoRA layers, the tensors trained outside them, and the frozen ones."""
    loras, uses = adapters(model), _uses(model)
    for layer, a in loras.items():
        if type(a) is not LoRA or not a.enabled:
            kind = type(a).__name__ if a.enabled else "disabled"
            raise ValueError(f"{layer!r} of {name!r} is {kind}: only enabled LoRA can be mixed")
    held, frozen = _split(model)
    trained = {key: t for key, t in held.items() if key.rpartition(".")[0] not in loras}
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


def _uses(model):
    return Counter(p for _, p in model.named_parameters(remove_duplicate=False))


def _merged(model):
    if adapters(model):
        model = copy.deepcopy(model)
        merge(model)
    return model


def _check_vectors(vectors):
    if not vectors or not all(vectors):
        raise ValueError("vectors must be a list of one or more, none of them empty")
    for k, vector in enumerate(vectors):
        _check_same(vector, vectors[0], f"vector {k}", "vector 0")


def _check_same(first, second, a, b):
    """Refuse two dicts of tensors that differ in names, dtypes or shapes."""
    for key in first | second:
        one, two = (
            f"{d[key].dtype} of shape {tuple(d[key].shape)}" if key in d else "not there"
            for d in (first, second)
        )
        if one != two:
            raise ValueError(f"{key!r} is {one} in {a}, but {two} in {b}")
