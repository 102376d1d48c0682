"""Your own embeddings from a .npz file: read without running code, checked, split by seed."""

import math
import zipfile
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ARRAYS = ("X", "y", "X_source", "y_source")

LARGEST = 1e100  # beyond it the variance of a column would overflow


class Rows(NamedTuple):
    """Rows that passed every check.

    Attributes
    ----------
    X : Tensor of shape (n, d)
        In float64.
    y : int64 Tensor of shape (n,)
        Labels 0..C-1.
    X_source, y_source : Tensor of shape (m, d), int64 Tensor of shape (m,); or None
        Rows of another task for the same encoder, with labels 0..S-1.
    classes : list of int
        What the labels 0..C-1 were called.
    notes : list of str
        What a reader of the results should know of the rows, in sentences.
    """

    X: torch.Tensor
    y: torch.Tensor
    X_source: torch.Tensor | None
    y_source: torch.Tensor | None
    classes: list
    notes: list


def load_rows(path):
    """Read a ``.npz`` file with arrays X and y, perhaps X_source and y_source, and check them.

    No code in the file can run: Python objects (pickles) are not read. Other arrays are told of.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    Rows

    Raises
    ------
    ValueError
        If there is no such file, it is no ``.npz``, an array is missing, damaged or made of
        objects, or `check_arrays` refuses what is in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as file:
            inside = [name.removesuffix(".npy") for name in file.namelist()]
    except Exception as error:  # there is no telling in which way a damaged file fails
        raise ValueError(
            f"{path.name} is no .npz file, or a damaged one ({_first_line(error)}):"
            " numpy.savez(path, X=X, y=y) writes one"
        ) from error
    if missing := [name for name in ARRAYS[:2] if name not in inside]:
        raise ValueError(f"{path.name} has no array {missing[0]!r}: it needs X and y, has {inside}")
    arrays = {}
    for name in [name for name in ARRAYS if name in inside]:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays[name] = file[name]
        except Exception as error:
            raise ValueError(
                f"{path.name}: array {name!r} cannot be read, it must be whole and hold plain"
                f" numbers, no Python objects ({_first_line(error)})"
            ) from error
    try:
        rows = check_arrays(**arrays)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if unused := [name for name in inside if name not in ARRAYS]:
        rows.notes.append(f"arrays {unused} are not used")
    return rows


def check_arrays(X, y, X_source=None, y_source=None):
    """Refuse arrays that methods cannot be compared on, and number their classes from 0.

    Parameters
    ----------
    X : array of shape (n, d)
        Embeddings: real numbers.
    y : array of shape (n,)
        Labels, of an integer dtype.
    X_source, y_source : array of shape (m, d), array of shape (m,), optional
        Rows of another task, to pre-train on. Their classes need not be those of `y`.

    Returns
    -------
    Rows

    Raises
    ------
    ValueError
        In one sentence that names the array, the offender and what would be right.
    """
    if (X_source is None) != (y_source is None):
        given, absent = ARRAYS[2:] if y_source is None else ARRAYS[:1:-1]
        raise ValueError(f"{given} comes without {absent}: give both, or neither")
    X, y, classes, notes = _checked(X, y, "X", "y")
    unit = 2.0 ** math.frexp(float(X.abs().max()))[1]  # a power of two: dividing rounds nothing
    distinct = {_bytes(row / unit) for row in X.numpy()}
    if copies := len(X) - len(distinct):
        notes.append(f"{copies} rows of X repeat others: some may be trained on and scored as well")
    if X_source is not None:
        X_source, y_source, _, more = _checked(X_source, y_source, "X_source", "y_source")
        notes += more
        if X_source.shape[1] != X.shape[1]:
            raise ValueError(
                f"X_source has {X_source.shape[1]} columns and X has {X.shape[1]}: both must come"
                " from the same encoder"
            )
        rows = enumerate(X_source.numpy())
        if shared := [i for i, row in rows if _bytes(row / unit) in distinct]:
            raise ValueError(
                f"{len(shared)} rows of X_source are in X too, the first is row {shared[0]}: leave"
                " them out, no method may pre-train on the labels that it is scored on"
            )
    return Rows(X, y, X_source, y_source, classes, notes)


def _bytes(row):
    """Return what two rows share that are equal in single precision; -0.0 equals 0.0."""
    with np.errstate(over="ignore"):
        return (row.astype(np.float32) + 0.0).tobytes()


def _first_line(error):
    return next(iter(str(error).splitlines()), type(error).__name__)


def _checked(X, y, x_name, y_name):
    """Return float64 X, labels from 0, what they were called, and notes."""
    X, y, notes = np.asarray(X), np.asarray(y), []
    if X.dtype.kind not in "fiu":
        raise ValueError(f"{x_name} has dtype {X.dtype}: it must hold real numbers")
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(
            f"{x_name} has shape {X.shape}, expected (n, d): a row for each example, and at least"
            " one column"
        )
    if y.dtype.kind not in "iu":
        raise ValueError(f"{y_name} has dtype {y.dtype}: labels must be integers, y.astype(int)")
    if y.shape != (len(X),):
        raise ValueError(
            f"{y_name} has shape {y.shape}, expected ({len(X)},): one label for each row of"
            f" {x_name}"
        )
    with np.errstate(over="ignore"):
        X = X.astype(np.float64)
    usable = np.abs(X) < LARGEST  # NaN is not
    if not usable.all():
        raise ValueError(
            f"{x_name} holds {(~usable).sum()} values that are NaN, infinite or beyond {LARGEST:g},"
            f" the first in row {np.argmin(usable.all(1))}: leave such rows out"
        )
    if (X[0] == X).all():
        raise ValueError(f"all rows of {x_name} are the same: nothing tells their classes apart")
    classes, y = np.unique(y, return_inverse=True)
    classes = classes.tolist()
    if len(classes) < 2:
        raise ValueError(f"{y_name} holds one class only, {classes[0]}: it takes at least two")
    if classes != list(range(len(classes))):
        shown = str(classes) if len(classes) <= 10 else f"{str(classes[:9])[:-1]}, ...]"
        notes.append(f"{y_name}: labels {shown} are mapped to 0..{len(classes) - 1}")
    return torch.from_numpy(X), torch.from_numpy(y), classes, notes


def check_budgets(data, budgets):
    """Refuse a label budget for which a class has too few rows: it needs three for each label.

    Parameters
    ----------
    data : Rows
    budgets : sequence of int
        Labelled rows of each class.

    Raises
    ------
    ValueError
        If there are no budgets, one is no integer of 1 or more, or a class has too few rows.
    """
    if not len(budgets) or not all(isinstance(k, Integral) and k >= 1 for k in budgets):
        raise ValueError(f"label budgets {budgets} must be integers, 1 or more, at least one")
    counts = data.y.bincount()
    least, k = int(counts.min()), max(budgets)
    if least < 3 * k:
        works = f"the largest that works is {least // 3}" if least >= 3 else "none works"
        raise ValueError(
            f"class {data.classes[int(counts.argmin())]} has {least} rows, and a budget of {k}"
            f" labels needs {3 * k}, to train on, to choose the learning rate on and to test on:"
            f" {works}"
        )


def split(y, budget, *, seed):
    """Draw a seed's row numbers; those of a smaller budget are part of a larger one's.

    Parameters
    ----------
    y : int64 Tensor of shape (n,)
        Each class has at least ``3 * budget`` rows.
    budget : int
        Labelled rows of each class.
    seed : int

    Returns
    -------
    dict of str to int64 Tensor
        "test", a third of each class, rounded up; "few" and "validation", `budget` rows of each
        class; and "pool", all rows but the test rows, to be used without labels.
    """
    rng = np.random.default_rng(seed)
    rows = {"test": [], "few": [], "validation": [], "pool": []}
    for c in range(int(y.max()) + 1):
        of_class = torch.from_numpy(rng.permutation((y == c).nonzero()[:, 0].numpy()))
        n_test = math.ceil(len(of_class) / 3)
        test, pool = of_class[:n_test], of_class[n_test:]
        few, validation = pool[: 2 * budget].view(budget, 2).T  # in turn, so that budgets nest
        for part, drawn in zip(rows.values(), (test, few, validation, pool), strict=True):
            part.append(drawn)
    return {name: torch.cat(part) for name, part in rows.items()}
