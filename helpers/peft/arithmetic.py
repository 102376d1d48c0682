"""Adapters by name, and what was learned as vectors: switch, add, subtract, TIES.

A vector is a dict of tensors by parameter name: what is added to a base's parameters.
"""

import copy
from collections import Counter, OrderedDict

import torch

from helpers.peft.base import is_conv1d, matrix
from helpers.peft.files import _compare, _plain, _shown, _split
from helpers.peft.lora import DoRA
from helpers.peft.surgery import adapters, merge, unwrapped


def adapter_state(model):
    """Return copies of what was trained and what adapters add: what `save_trainable` writes.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to Tensor
        Its attribute `settings` has the adapters' settings, which `switch` compares.
    """
    state = {name: t.detach().clone() for name, t in _split(model)[0].items()}
    return _with_settings(state, _shown(model))


@torch.no_grad()
def switch(model, states, name):
    """Copy the tensors of ``states[name]`` into a model.

    The frozen base stays the model's, and is not compared; a file of
    `helpers.peft.save_trainable` has it checked.

    Parameters
    ----------
    model : nn.Module
        Changed in place, once all is checked.
    states : dict of str to dict of str to Tensor
        Results of `adapter_state`, from models with the same base, adapters and unfrozen parts, or
        what `weighted_sum` and `ties` made of them.
    name : str

    Raises
    ------
    ValueError
        If there is no such state, or its adapters' settings, its names, shapes and dtypes are not
        the model's.
    """
    if name not in states:
        raise ValueError(f"no adapter is called {name!r}: there are {list(states)}")
    held, state = _split(model)[0], states[name]
    if (settings := getattr(state, "settings", None)) is not None:
        cure = "inject what the state was taken from"
        _compare(f"the state {name!r}", settings, _shown(model), "not adapted", cure)
    _check_same(state, held, repr(name), "the model")
    for key, t in state.items():
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
    model = _plain(model)
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
        If their parameters differ in names, shapes or dtypes, or an adapter cannot be merged.

    References
    ----------
    Ilharco et al. (2022), section 2, arXiv:2212.04089.
    """
    trained, before = (dict(_merged(_plain(m)).named_parameters()) for m in (model, base))
    _check_same(trained, before, "the model", "base")
    return {n: p - before[n] for n, p in trained.items() if not torch.equal(p, before[n])}


@torch.no_grad()
def weighted_sum(vectors, weights):
    """Return w_1 v_1 + ... + w_n v_n, tensor by tensor, in the dtypes of v_1.

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
        If the vectors differ in names or shapes, or, as states of adapters, in their settings, or
        there is not one weight for each.
    """
    settings = _check_vectors(vectors)
    if len(weights) != len(vectors):
        raise ValueError(f"{len(vectors)} vectors need as many weights, not {len(weights)}")
    pairs = list(zip(weights, vectors, strict=True))
    summed = {n: sum(w * v[n] for w, v in pairs).to(t.dtype) for n, t in vectors[0].items()}
    return _with_settings(summed, settings)


@torch.no_grad()
def ties(vectors, *, density=0.2, scale=1.0):
    """Return scale * TIES in the dtypes of the first: trim vectors, elect signs, average the rest.

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
        If `density` is outside (0, 1], or the vectors differ as in `weighted_sum`.

    References
    ----------
    Yadav et al. (2023), section 4, arXiv:2306.01708.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density!r} must be above 0, and at most 1")
    settings, first = _check_vectors(vectors), vectors[0]
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
    pairs = zip(first.items(), parts, strict=True)
    return _with_settings({n: part.view_as(t).to(t.dtype) for (n, t), part in pairs}, settings)


@torch.no_grad()
def add(base, vector, scale=1.0):
    """Return a copy of `base` with base + scale * vector as its parameters, in their dtypes.

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
    model = copy.deepcopy(unwrapped(base))
    parameters = {name: p for name, p in model.named_parameters() if name in vector}
    _check_same(vector, parameters, "the vector", "base", cast=True)
    for name, t in vector.items():
        parameters[name].add_(t, alpha=scale)
    return model


def _uses(model):
    return Counter(p for _, p in model.named_parameters(remove_duplicate=False))


def _merged(model):
    if adapters(model):
        model = copy.deepcopy(model)
        merge(model)
    return model


def _with_settings(state, settings):
    """Return a state with the settings as its attribute: torch's files and copies keep that."""
    state = OrderedDict(state)
    state.settings = settings
    return state


def _check_vectors(vectors):
    """Refuse vectors that do not fit one another; return the settings of states of adapters."""
    if not vectors or not all(vectors):
        raise ValueError("vectors must be a list of one or more, none of them empty")
    settings = [getattr(vector, "settings", None) for vector in vectors]
    cure = "combine their delta_weights, which count lora_alpha in"
    for k, vector in enumerate(vectors):
        if None not in (settings[k], settings[0]):
            _compare(f"vector {k}", settings[k], settings[0], "not adapted", cure, "vector 0")
        _check_same(vector, vectors[0], f"vector {k}", "vector 0", cast=True)
    return settings[0]


def _check_same(first, second, a, b, *, cast=False):
    """Refuse two dicts of tensors that differ in names, shapes or, unless they are cast, dtypes."""
    sides = first, second
    for key in first | second:
        one, two = (f"of shape {tuple(d[key].shape)}" if key in d else "not there" for d in sides)
        if one != two:
            raise ValueError(f"{key!r} is {one} in {a}, but {two} in {b}")
        one, two = (d[key].dtype for d in sides)
        if one != two and not cast:
            raise ValueError(
                f"{key!r} is {one} in {a}, but {two} in {b}: cast the wider of the two"
            )
