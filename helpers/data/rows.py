"""Rows and their checks: what training or scoring would swallow in silence is refused."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows to score on, checked when the task is made.

    Attributes
    ----------
    X_train, X_test : Tensor of shape (n, d)
        Finite features.
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
            check_rows(*rows, name=name)
        for name, (_, y) in splits.items():
            present = set(y.tolist())
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


def check_rows(X, y, *, n_classes=None, name="data"):
    """Refuse rows that training or scoring would swallow in silence.

    Parameters
    ----------
    X : Tensor of shape (n, ...)
        Features, floating point, finite, at least one row.
    y : int64 Tensor of shape (n,)
        One label for each row, from 0 to `n_classes` - 1.
    n_classes : int, optional
        If given, the largest label must be below it.
    name : str, default="data"
        What the error message calls these rows.

    Raises
    ------
    ValueError
        In one sentence that names `name`, the offender and what would be right.
    """
    if len(X) == 0:
        raise ValueError(f"{name} has no rows: a mean over none of them is undefined")
    if y.shape != (len(X),):
        raise ValueError(
            f"{name}: y has shape {tuple(y.shape)}, expected ({len(X)},), one label per row of X"
        )
    if y.dtype != torch.int64:
        raise ValueError(f"{name}: y is {y.dtype}, expected torch.int64 class indices")
    if not X.is_floating_point():
        raise ValueError(f"{name}: X is {X.dtype}, expected floating-point features")
    if bad := int((~torch.isfinite(X)).sum()):
        row = int((~torch.isfinite(X)).reshape(len(X), -1).any(1).nonzero()[0])
        raise ValueError(f"{name}: X holds {bad} NaN or infinite values, the first in row {row}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or (n_classes is not None and high >= n_classes):
        wanted = "0 or more" if n_classes is None else f"0..{n_classes - 1}"
        raise ValueError(
            f"{name}: label {low if low < 0 else high} is out of range, expected {wanted}"
            " (one model output per class)"
        )


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
