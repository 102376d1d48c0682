"""The published synthetic task, and rows drawn by class."""

import numpy as np
import torch
from sklearn.datasets import make_classification
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from helpers.data.rows import Task


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
