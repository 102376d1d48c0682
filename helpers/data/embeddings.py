"""Your own embeddings from a .npz file: read without running code, and checked."""

import math
import zipfile
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ARRAYS = ("X", "y", "X_source", "y_source")

LARGEST = 1e100  # beyond it the variance of a column would overflow

EPS = float(np.finfo(np.float64).eps)

BINS = "y = numpy.digitize(y, numpy.quantile(y, [1/3, 2/3])) makes classes of a regression target"

MISSING = ("", "nan", "None", "<NA>", "NaT")  # what a missing label becomes as text


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
    classes : list of int, bool or str
        What the labels 0..C-1 were called.
    notes : list of str
        What a reader of the results should know of the rows, in sentences.
    rounding : float
        Relative rounding error of the dtype that X or X_source came in.
    source_classes : list of int, bool or str; or None
        What the labels 0..S-1 of the source rows were called.
    """

    X: torch.Tensor
    y: torch.Tensor
    X_source: torch.Tensor | None
    y_source: torch.Tensor | None
    classes: list
    notes: list
    rounding: float = EPS
    source_classes: list | None = None

    @property
    def labels(self):
        """Return what the class of each row was called, as an array of shape (n,)."""
        return np.array(self.classes)[self.y]

    @property
    def unequal(self):
        """Return whether classes are so unequal that accuracy misleads."""
        return unequal(self.y.bincount())


def unequal(counts):
    """Tell whether the largest class has more than 1.5 times the rows of the smallest.

    Parameters
    ----------
    counts : array or Tensor of shape (C,)
        Rows of each class.

    Returns
    -------
    bool
    """
    return bool(counts.max() > 1.5 * counts.min())


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
            f" numpy.savez({path.stem + '.npz'!r}, X=X, y=y) writes one"
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
                f" numbers or, of labels, y.astype(str), no Python objects ({_first_line(error)})"
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
        Labels: integers, also as whole floats, strings, or truth values.
    X_source, y_source : array of shape (m, d), array of shape (m,), optional
        Rows of another task for the same encoder. They are trained on where their classes are
        those of `y`.

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
    (X, y, classes, notes, rounding), named = _checked(X, y, "X", "y"), None
    unit = 2.0 ** math.frexp(float(X.abs().max()))[1]  # a power of two: dividing rounds nothing
    distinct = {_bytes(row / unit) for row in X.numpy()}
    if copies := len(X) - len(distinct):
        notes.append(f"{copies} rows of X repeat others: some may be trained on and scored as well")
    if X_source is not None:
        X_source, y_source, named, more, coarse = _checked(X_source, y_source, *ARRAYS[2:])
        notes, rounding = notes + more, max(rounding, coarse)
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
        if named != classes:
            notes.append("the source rows are not used: their classes are not those of y")
    rows = Rows(X, y, X_source, y_source, classes, notes, rounding, named)
    if rows.unequal:
        counts = y.bincount()
        most, least = int(counts.argmax()), int(counts.argmin())
        notes.append(
            f"{counts[most]} of {len(y)} rows are of class {classes[most]!r}, {counts[least]} of"
            f" class {classes[least]!r}: a constant answer gets {100 * counts[most] / len(y):.1f} %"
            " right, so balanced accuracy, the mean over classes, is compared"
        )
    return rows


def constant_columns(X, rounding=EPS):
    """Find columns that do not vary but for rounding, of the data or of their mean.

    Parameters
    ----------
    X : float64 Tensor of shape (n, d)
    rounding : float, default=EPS
        Relative rounding error of the numbers in X.

    Returns
    -------
    bool Tensor of shape (d,)
        As scikit-learn's StandardScaler has it where `rounding` is float64's.
    """
    return X.std(0, correction=0) <= max(rounding, len(X) * EPS) * X.mean(0).abs()


def _bytes(row):
    """Return what two rows share that are equal in single precision; -0.0 equals 0.0."""
    with np.errstate(over="ignore"):
        return (row.astype(np.float32) + 0.0).tobytes()


def _first_line(error):
    return next(iter(str(error).splitlines()), type(error).__name__)


def _checked(X, y, x_name, y_name):
    """Return float64 X, labels from 0, what they were called, notes, and the rounding of X."""
    X, rounding = _plain(X, x_name)
    if X.dtype.kind not in "fiu":
        raise ValueError(f"{x_name} has dtype {X.dtype}: it must hold real numbers")
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(
            f"{x_name} has shape {X.shape}, expected (n, d): a row for each example, and at least"
            " one column"
        )
    with np.errstate(over="ignore"):
        X = X.astype(np.float64)
    usable = np.abs(X) < LARGEST  # NaN is not
    if not usable.all():
        raise ValueError(
            f"{x_name} holds {(~usable).sum()} values that are NaN, infinite or beyond {LARGEST:g},"
            f" the first in row {np.argmin(usable.all(1))}: leave out such rows, or columns"
        )
    if bool(constant_columns(torch.from_numpy(X), rounding).all()):
        raise ValueError(
            f"all rows of {x_name} are the same up to rounding: nothing tells their classes apart"
        )
    y, classes, notes = _numbered(y, len(X), x_name, y_name)
    return torch.from_numpy(X), torch.from_numpy(y), classes, notes, rounding


def _plain(values, name):
    """Return an array, list or tensor as an array, and the relative rounding of its numbers."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        if values.dtype == torch.bfloat16:  # which NumPy does not have
            return values.float().numpy(), torch.finfo(torch.bfloat16).eps
        values = values.numpy()
    if np.ma.is_masked(values):
        raise ValueError(f"{name} has masked entries: leave out their rows")
    array = np.asarray(values)
    if array.dtype.kind != "f":
        return array, EPS
    with np.errstate(over="ignore", invalid="ignore"):
        single = (array.astype(np.float32) == array).all()  # whatever dtype holds them by now
    rounding = np.finfo(np.float32).eps if single else EPS
    return array, max(float(rounding), float(np.finfo(array.dtype).eps))


def _numbered(y, n, x_name, y_name):
    """Return labels numbered from 0, what they were called, and notes."""
    if isinstance(y, list | tuple):  # NumPy would make one text each of "a" and None
        y = np.array(y, dtype=object)
    y, _ = _plain(y, y_name)
    if y.shape != (n,):
        raise ValueError(
            f"{y_name} has shape {y.shape}, expected ({n},): one label for each row of {x_name}"
        )
    labels, notes = _named(y, y_name), []
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"{y_name} holds one class only, {classes[0]!r}: it takes at least two")
    if len(classes) > max(2, n / 2):
        cure = "merge them into fewer" if isinstance(classes[0], str) else BINS
        raise ValueError(f"{y_name} holds {len(classes)} different labels in {n} rows: {cure}")
    if classes != list(range(len(classes))):
        shown = str(classes) if len(classes) <= 10 else f"{str(classes[:9])[:-1]}, ...]"
        notes.append(f"{y_name}: labels {shown} are mapped to 0..{len(classes) - 1}")
    alike = {str(c).strip().casefold(): c for c in reversed(classes)}
    if twins := [c for c in classes if alike[str(c).strip().casefold()] != c]:
        first = alike[twins[0].strip().casefold()]
        notes.append(f"{y_name}: {first!r} and {twins[0]!r} are two classes, but look like one")
    number = {c: i for i, c in enumerate(classes)}
    return np.array([number[c] for c in labels]), classes, notes


def _named(y, name):
    """Return labels as ints, bools or strings, all of one kind; refuse what names no class."""
    if y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8", "backslashreplace")
    labels = [v.item() if isinstance(v, np.generic) else v for v in y.tolist()]
    kind = next((k for k in (str, bool, Real) if isinstance(labels[0], k)), None)
    for i, label in enumerate(labels):
        if label is None or str(label).strip() in MISSING:
            raise ValueError(f"{name} is {label!r} in row {i}: leave out rows without a label")
        if kind is None or not isinstance(label, kind):
            raise ValueError(
                f"{name} is {label!r} in row {i}: labels must be all integers or all strings,"
                " numpy.array(y).astype(str) makes them strings"
            )
    for i, label in enumerate(labels if kind is Real else ()):
        if label in (math.inf, -math.inf) or label != int(label):
            raise ValueError(f"{name} is {label} in row {i}, which names no class: {BINS}")
    return [int(label) for label in labels] if kind is Real else [kind(label) for label in labels]
