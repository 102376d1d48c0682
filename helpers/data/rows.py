"""Rows and their checks: what training or scoring would swallow in silence is refused."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.utils.multiclass import check_classification_targets

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no text has

NO_LABELS = ("None", "nan", "NaT", "<NA>", "inf", "-inf")


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows to score on, checked when the task is made.

    Attributes
    ----------
    X_train, X_test : Tensor of shape (n, d)
        Finite features, of any floating dtype: training and scoring cast them to the model's.
        Numpy arrays and other tables of numbers are copied into tensors.
    y_train, y_test : int64 Tensor of shape (n,)
        Labels 0..C-1; each class is present in both splits.

    Raises
    ------
    ValueError
        If the rows are not as described; the message names the split and the offender.
    """

    X_train: torch.Tensor
    y_train: torch.Tensor
    X_test: torch.Tensor
    y_test: torch.Tensor

    def __post_init__(self):
        splits = {"train": self.train, "test": self.test}
        for name, rows in splits.items():
            for field, checked in zip("Xy", check_rows(*rows, name=name), strict=True):
                object.__setattr__(self, f"{field}_{name}", checked)
        wide, wanted = (tuple(X.shape[1:]) for X in (self.X_test, self.X_train))
        if wide != wanted:
            raise ValueError(f"test: a row of X has shape {wide}, one of train {wanted}")
        for name in splits:
            present = set(getattr(self, f"y_{name}").tolist())
            for c in range(self.n_classes):
                if c not in present:
                    raise ValueError(
                        f"{name} has no row of class {c}: labels must be 0..{self.n_classes - 1}"
                        " and each class present in every split (more rows, or a stratified split)"
                    )

    @property
    def train(self):
        """Return (X_train, y_train)."""
        return self.X_train, self.y_train

    @property
    def test(self):
        """Return (X_test, y_test)."""
        return self.X_test, self.y_test

    @property
    def n_classes(self):
        """Return C: one more than the largest label of either split."""
        return 1 + int(max(self.y_train.max(), self.y_test.max()))


def as_rows(values, *, name="X"):
    """Return a table of numbers as a Tensor without a graph, a copy if it is no Tensor yet.

    Parameters
    ----------
    values : Tensor, or anything that `numpy.asarray` reads
    name : str, default="X"
        What the error message calls it.

    Returns
    -------
    Tensor

    Raises
    ------
    ValueError
        If it does not hold numbers, or no row.
    """
    if isinstance(values, torch.Tensor):  # one made in inference mode could not be trained on
        rows = values.clone() if values.is_inference() else values.detach()
    else:
        array = np.asarray(values)
        try:  # a copy: torch takes no array that is read-only, reversed or of another byte order
            rows = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        except TypeError:
            kind = f"{type(values).__name__} of dtype {array.dtype}"
            raise ValueError(f"{name} is a {kind}, expected a table of numbers") from None
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError(f"{name} has no rows: expected one or more")
    return rows


def check_rows(X, y, *, classes=True, ids=False, name="data"):
    """Return rows as tensors; refuse what training or scoring would swallow in silence.

    Parameters
    ----------
    X : array of shape (n, ...)
        Finite features, at least one row.
    y : array of shape (n, ...)
        What a model should answer for each row. Integers become int64.
    classes : bool, default=True
        Whether y is one class index for each row, and X floating point. If not, a loss of one's
        own knows what they are.
    ids : bool, default=False
        Whether X may hold integers all the same: token ids, a mask.
    name : str, default="data"
        What the error message calls these rows.

    Returns
    -------
    X, y : Tensor

    Raises
    ------
    ValueError
        In one sentence that names `name`, the offender and what would be right.
    """
    X = as_rows(X, name=f"{name}: X")
    if classes:
        y = check_classes(y, len(X), name=name)
        if not (X.is_floating_point() or ids):
            raise ValueError(f"{name}: X is {X.dtype}, expected floating-point features")
    else:
        y = as_rows(y, name=f"{name}: y")
        if len(y) != len(X):
            raise ValueError(f"{name}: y has {len(y)} rows and X {len(X)}, expected as many")
        if not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
            y = y.long()
    for field, values in (("X", X), ("y", y)):
        if bad := int((~torch.isfinite(values)).sum()):
            row = int((~torch.isfinite(values)).reshape(len(values), -1).any(1).nonzero()[0])
            told = f"{name}: {field} holds {bad} NaN or infinite values, the first in row {row}"
            raise ValueError(told)
    return X, y


def check_classes(y, n, *, n_classes=None, name="data"):
    """Return class indices as int64; refuse what cannot be one for each of `n` rows.

    Parameters
    ----------
    y : array of shape (n,)
        Of any integer dtype.
    n : int
    n_classes : int, optional
        If given, the largest class index must be below it.
    name : str, default="data"
        As in `check_rows`.

    Returns
    -------
    int64 Tensor of shape (n,)

    Raises
    ------
    ValueError
        In one sentence that names `name`, the offender and what would be right.
    """
    y = as_rows(y, name=f"{name}: y")
    if y.shape != (n,):
        raise ValueError(
            f"{name}: y has shape {tuple(y.shape)}, expected ({n},), one label per row of X"
        )
    if y.is_floating_point() or y.is_complex():
        raise ValueError(f"{name}: y is {y.dtype}, expected integers from 0, class indices")
    y = y.long()
    low, high = int(y.min()), int(y.max())
    if low < 0 or (n_classes is not None and high >= n_classes):
        wanted = "0 or more" if n_classes is None else f"0..{n_classes - 1}"
        raise ValueError(
            f"{name}: label {low if low < 0 else high} is out of range, expected {wanted}"
            " (one model output per class)"
        )
    return y


def check_whole(least, **values):
    """Refuse a setting that is no integer of at least `least`.

    Parameters
    ----------
    least : int
    **values : int
        Name to value; None stands for a setting that is not used.

    Raises
    ------
    ValueError
        Naming the setting and its value.
    """
    for name, value in values.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and value >= least):
            raise ValueError(f"{name}={value!r} must be an integer, {least} or more")


def check_parameters(**ranges):
    """Refuse a notebook parameter outside its range, before anything is computed.

    Parameters
    ----------
    **ranges : tuple of (value, low, high)
        Parameter name to its value and its inclusive bounds. Integer bounds ask for an integer.

    Raises
    ------
    TypeError
        If a value is no number, or no integer where the bounds are integers.
    ValueError
        If a value is outside its bounds.
    """
    for name, (value, low, high) in ranges.items():
        whole = isinstance(low, int) and isinstance(high, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            kind = "an integer" if whole else "a number"
            raise TypeError(f"{name} = {value!r} must be {kind} from {low} to {high}")
        if not low <= value <= high:  # NaN is neither
            raise ValueError(f"{name} = {value} must be from {low} to {high}")


def check_texts(X):
    """Return texts as a list; refuse what is none, and name the row.

    Parameters
    ----------
    X : sequence of str

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If there are none, or one is empty, no str, or holds what is no Unicode.
    """
    if isinstance(X, str | bytes) or not isinstance(X, Iterable) or getattr(X, "ndim", 1) != 1:
        kind = type(X).__name__
        raise ValueError(f"texts are a {kind}: expected a list of str, or an array of shape (n,)")
    texts = list(X)
    if not texts:
        raise ValueError("there are no texts: give one or more")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"the text of row {row} is {text!r}, no str: leave the row out")
        if not text.strip():
            raise ValueError(f"the text of row {row} is empty: leave the row out")
        if SURROGATE.search(text):
            raise ValueError(f"the text of row {row} was read in a wrong encoding: read it anew")
    return texts


def encode_labels(y, n):
    """Return the sorted classes of n labels, and the number of the class of each row.

    Parameters
    ----------
    y : sequence of str, int or bool
    n : int

    Returns
    -------
    classes : array of shape (C,)
    target : int64 array of shape (n,)

    Raises
    ------
    ValueError
        If labels are not n, of several types, missing, fractions, or all the same.
    """
    y = np.asarray(y, dtype=object)
    if y.shape != (n,):
        raise ValueError(f"labels have shape {y.shape}: y should be a 1d array of {n}, one a text")
    for row, label in enumerate(y):
        if not isinstance(label, str) and str(label) in NO_LABELS:
            raise ValueError(f"the label of row {row} is {label}: leave the row out")
    kinds = sorted({_kind(label) for label in y})
    if len(kinds) > 1:
        raise ValueError(f"labels mix {' and '.join(kinds)}: make all of them str")
    y = np.array(y.tolist())
    check_classification_targets(y)
    classes, target = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all labels are one class, {classes.tolist()[0]!r}: add rows of another")
    return classes, target


def _kind(label):
    kinds = {"str": str, "bool": bool | np.bool_, "int": Integral, "float": Real}
    return next((k for k, of in kinds.items() if isinstance(label, of)), type(label).__name__)
