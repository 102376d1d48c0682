"""What a model takes, row by row: one tensor, several, token ids with their mask, a dataset."""

from collections.abc import Mapping, Sized

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from helpers.data import as_rows, check_rows

MASKS = ("mask", "attention_mask")  # of a dict of tokens: ones, and zeros for padding

LABELS = ("labels", "label")  # of a dict that comes with its answers


def _call(model, x):
    """Return model(x), model(*x) or model(**x), as a batch is a tensor, a tuple or a dict."""
    if isinstance(x, Mapping):
        return model(**x, **getattr(x, "settings", {}))
    return model(*x) if isinstance(x, tuple) else model(x)


def _inputs(X, *, name="X"):
    """Return rows for a model: one tensor, or a dict or tuple of tensors with as many rows each."""
    if not (isinstance(X, Mapping) or (isinstance(X, tuple) and all(map(torch.is_tensor, X)))):
        return as_rows(X, name=name)
    named = dict(X if isinstance(X, Mapping) else enumerate(X))
    parts = {k: as_rows(x, name=f"{name}[{k!r}]") for k, x in named.items()}
    sizes = {k: len(x) for k, x in parts.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"{name} has parts of {sizes} rows: expected as many in each")
    for key in parts.keys() & MASKS:
        if (empty := (parts[key] != 0).flatten(1).sum(1) == 0).any():
            raise ValueError(f"{name}: row {int(empty.nonzero()[0])} is all padding: leave it out")
    return _like(X, parts)


def _like(X, parts):
    """Return the tensors of `parts` as a dict or tuple of the kind that X is."""
    if hasattr(X, "like"):  # cached rows
        return X.like(parts)
    return parts if isinstance(X, Mapping) else tuple(parts.values())


def _apply(f, X):
    """Return f of each tensor in X, in the shape of X."""
    if torch.is_tensor(X):
        return f(X)
    named = X.items() if isinstance(X, Mapping) else enumerate(X)
    return _like(X, {key: f(x) for key, x in named})


def _tensors(X):
    """Return the tensors in X."""
    return [X] if torch.is_tensor(X) else list(X.values() if isinstance(X, Mapping) else X)


def _n_rows(X):
    return len(_tensors(X)[0])


def _take(X, rows):
    """Return some rows, those with a mask cut to the longest of them."""
    part = _apply(lambda x: x[rows], X)
    lengths, key = _lengths(part)
    if key is None or (longest := int(lengths.max())) == (T := part[key].shape[1]):
        return part
    return _apply(lambda x: x[:, :longest] if x.shape[1:2] == (T,) else x, part)


def _lengths(X):
    """Return where each row's last token ends, and the mask's name; None, None without one."""
    key = next((k for k in MASKS if k in X), None) if isinstance(X, Mapping) else None
    if key is None or X[key].ndim != 2:
        return None, None
    at = torch.arange(1, X[key].shape[1] + 1, device=X[key].device)
    return ((X[key] != 0) * at).amax(1), key


def _by_length(X):
    """Return row numbers, the longest row first; None where rows have no mask."""
    lengths, _ = _lengths(X)
    return None if lengths is None else lengths.argsort(descending=True, stable=True)


def _checked(model, X, y, *, classes=True, name="data"):
    """Return inputs and labels that training or scoring can read; refuse others."""
    if y is None:
        raise ValueError(f"{name}: the labels y are missing")
    X = _inputs(X, name=f"{name}: X")
    if hasattr(X, "check"):
        X.check(model)
    several = not torch.is_tensor(X)
    ids = several or any(isinstance(m, nn.Embedding) for m in model.modules())
    for x in _tensors(X):
        x, y = check_rows(x, y, classes=classes, ids=ids, name=name)
    return (X if several else x), y


def _labelled(X, y, *, name="data"):
    """Return inputs and labels, which a dict or a `Dataset`, read into memory, hold together."""
    if not isinstance(X, Dataset | Mapping) and not hasattr(X, "column_names"):
        return X, y  # the latter of the library datasets
    X, found = _unpacked(X if isinstance(X, Mapping) else _stacked(X))
    if found is not None and y is not None:
        raise ValueError(f"{name}: labels come with X and as y, give one of them")
    return X, y if found is None else found


def _unpacked(batch):
    """Return inputs and labels: a dict's "labels" or "label", or the last of a tuple, or None."""
    if isinstance(batch, Mapping):
        if (key := next((key for key in LABELS if key in batch), None)) is None:
            return batch, None
        return {k: batch[k] for k in batch if k != key}, batch[key]
    if not isinstance(batch, list | tuple):
        return batch, None
    *x, y = batch if len(batch) > 1 else (*batch, None)
    return (x[0] if len(x) == 1 else tuple(x)), y


def _stacked(dataset):
    kind = type(dataset).__name__
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise ValueError(f"the {kind} has no length or no rows: give a DataLoader, or rows")
    try:
        return default_collate([_as_tensors(dataset[i]) for i in range(len(dataset))])
    except (RuntimeError, TypeError, ValueError) as error:
        told = f"the rows of the {kind} do not stack ({str(error).splitlines()[0]})"
        raise ValueError(f"{told}: give a DataLoader with a collate_fn that pads") from None


def _as_tensors(row):
    """Return a row with a tensor for each list, which would be stacked column by column."""
    if isinstance(row, Mapping):
        return {key: torch.as_tensor(x) for key, x in row.items()}
    return tuple(map(torch.as_tensor, row)) if isinstance(row, tuple) else row
