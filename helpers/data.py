"""Tasks: the published synthetic one, digits under controlled shifts; every row is checked."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from sklearn.datasets import load_digits, make_classification
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler


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


def published_task(
    seed=42,
    *,
    n_samples=500,
    n_features=20,
    n_informative=10,
    n_classes=4,
    test_fraction=0.2,
    scale_on="all",
):
    """Draw the published synthetic task: Gaussian clusters, one per class, standardised.

    Think of the rows as embeddings from a pre-trained encoder. Features are rounded to 10
    decimals, since the draw differs by 4e-15 between BLAS kernels, and have torch's default
    dtype.

    Parameters
    ----------
    seed : int, default=42
        Of the draw and of the split.
    n_samples, n_features, n_informative, n_classes : int
        As in `sklearn.datasets.make_classification`; two features are linear combinations of
        the informative ones, the remaining ones are noise.
    test_fraction : float, default=0.2
        Share of the rows that are held out.
    scale_on : {"all", "train"}, default="all"
        Rows from which the scaler learns mean and standard deviation. The published notebook
        used all of them, test rows included, which is a leak; "train" is the honest choice.

    Returns
    -------
    Task

    Raises
    ------
    ValueError
        If the sizes do not fit together, or a class is missing from a split.
    """
    if n_informative + 2 > n_features:
        raise ValueError(
            f"n_features = {n_features} must be at least n_informative + 2 = {n_informative + 2}"
        )
    if n_classes > 2**n_informative:
        raise ValueError(
            f"n_classes = {n_classes} clusters need more than n_informative = {n_informative}"
            f" features: at most {2**n_informative} fit"
        )
    if scale_on not in ("all", "train"):
        raise ValueError(f'scale_on = {scale_on!r} must be "all" or "train"')
    X, y = make_classification(
        n_samples=n_samples,
        n_features=n_features,
        n_informative=n_informative,
        n_classes=n_classes,
        n_clusters_per_class=1,
        random_state=seed,
    )
    rows = np.arange(n_samples)
    train_rows, test_rows = train_test_split(rows, test_size=test_fraction, random_state=seed)
    scaler = StandardScaler().fit(X if scale_on == "all" else X[train_rows])
    X = scaler.transform(X)
    return Task(*_tensors(X[train_rows], y[train_rows]), *_tensors(X[test_rows], y[test_rows]))


def shifted_domain(X, y, *, scale, rng):
    """Return the same rows in a shifted domain: noise is added, then columns are re-standardised.

    Parameters
    ----------
    X : Tensor of shape (n, d)
    y : Tensor of shape (n,)
    scale : float
        Standard deviation of the added normal noise, in units of the features' own.
    rng : numpy.random.Generator or the module numpy.random
        Anything with ``normal(mean, sd, shape)``. The module itself is numpy's hidden global
        stream, which the published notebook drew from.

    Returns
    -------
    X_shifted, y : Tensor
    """
    noisy = X.numpy() + rng.normal(0, scale, X.shape)
    return _tensors(StandardScaler().fit_transform(noisy), y)


def digits(rng, sizes, *, classes=range(10)):
    """Draw disjoint, stratified samples of scikit-learn's 1,797 handwritten digits.

    Parameters
    ----------
    rng : numpy.random.Generator
    sizes : sequence of int
        Rows of each sample.
    classes : sequence of int, default=range(10)
        Digits to keep; they are relabelled 0..C-1 in this order.

    Returns
    -------
    list of (X, y)
        X of shape (n, 64): 8 x 8 pixels from 0 (paper) to 1 (ink), row by row.

    Raises
    ------
    ValueError
        If there are fewer rows than asked for.
    """
    X, y = load_digits(return_X_y=True)
    classes = list(classes)
    kept = np.isin(y, classes)
    X, y = X[kept] / 16, np.array([classes.index(label) for label in y[kept]])
    if sum(sizes) > len(y):
        raise ValueError(f"{sum(sizes)} rows were asked for: classes {classes} have {len(y)}")
    samples, rest = [], rng.permutation(len(y))
    for n in sizes:
        left = len(rest) - n
        if left >= len(classes):
            seed = int(rng.integers(2**31))
            rows, rest = train_test_split(
                rest, train_size=n, test_size=left, stratify=y[rest], random_state=seed
            )
        else:
            rows, rest = rest[:n], rest[n:]
        samples.append(_tensors(X[rows], y[rows]))
    return samples


def shift_digits(X, kind, *, strength, rng):
    """Return digits under a covariate shift: the pixels change, the labels stay true.

    Parameters
    ----------
    X : Tensor of shape (n, 64)
        Pixels from 0 to 1.
    kind : {"none", "rotation", "noise", "contrast", "inversion"}
        Rotation by `strength` degrees counter-clockwise; normal noise of standard deviation
        `strength`; contrast scaled by `strength` around 0.5; ink and paper exchanged.
    strength : float
        Ignored by "none" and "inversion".
    rng : numpy.random.Generator
        Of the noise.

    Returns
    -------
    Tensor of shape (n, 64)
    """
    pixels = X.double().numpy()
    if kind == "rotation":
        images = pixels.reshape(-1, 8, 8)
        pixels = ndimage.rotate(images, strength, axes=(2, 1), reshape=False, order=1)
    elif kind == "noise":
        pixels = pixels + rng.normal(0, strength, pixels.shape)
    elif kind == "contrast":
        pixels = 0.5 + strength * (pixels - 0.5)
    elif kind == "inversion":
        pixels = 1 - pixels
    elif kind != "none":
        raise ValueError(
            f'kind = {kind!r} must be "none", "rotation", "noise", "contrast" or "inversion"'
        )
    return torch.as_tensor(pixels.reshape(X.shape).round(10), dtype=X.dtype)


def few_per_class(y, k, rng):
    """Draw the rows of `k` examples of each class.

    Parameters
    ----------
    y : Tensor of shape (n,)
    k : int
    rng : numpy.random.Generator

    Returns
    -------
    int64 Tensor of shape (C, k)
        Row numbers, one row of them for each class.

    Raises
    ------
    ValueError
        If a class has fewer than `k` rows.
    """
    rows = []
    for c in y.unique().tolist():
        of_class = (y == c).nonzero()[:, 0].numpy()
        if len(of_class) < k:
            raise ValueError(f"class {c} has {len(of_class)} rows, {k} were asked for")
        rows.append(rng.permutation(of_class)[:k])
    return torch.as_tensor(np.stack(rows))


def _tensors(X, y):
    return torch.as_tensor(X.round(10), dtype=torch.get_default_dtype()), torch.as_tensor(y)
