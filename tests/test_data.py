"""Data: what is drawn, and what is refused in one sentence."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_classification
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from helpers.data import Task, published_task, rows, tasks

X = torch.arange(24.0).reshape(8, 3)
Y = torch.tensor([0, 1, 2, 3] * 2)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("scale_on", ["all", "train"])
def test_published_task_is_the_published_draw_rounded_and_scaled_on_the_rows_told(dtype, scale_on):
    options = {"n_classes": 4, "n_clusters_per_class": 1, "random_state": 42}
    table, labels = make_classification(500, 20, n_informative=10, **options)
    train, test, *y = train_test_split(table, labels, test_size=0.2, random_state=42)
    scaler = StandardScaler().fit(table if scale_on == "all" else train)
    expected = [scaler.transform(train).round(10), scaler.transform(test).round(10), *y]
    task = published_task(scale_on=scale_on)
    made = [task.X_train, task.X_test, task.y_train, task.y_test]
    for tensor, wanted in zip(made, expected, strict=True):
        assert torch.equal(tensor, torch.as_tensor(wanted).to(tensor.dtype))
    assert [t.dtype for t in made] == [dtype, dtype, torch.int64, torch.int64]
    assert (task.X_train.shape, task.X_test.shape, task.n_classes) == ((400, 20), (100, 20), 4)


@pytest.mark.parametrize(
    "refused, told",
    [
        (lambda: published_task(n_features=11), "n_features = 11 must be at least .* = 12"),
        (lambda: published_task(n_informative=2, n_classes=5), "n_classes = 5 clusters need more"),
        (lambda: published_task(scale_on="test"), "scale_on = 'test' must be"),
        (lambda: published_task(n_samples=12, n_classes=8), "has no row of class [0-7]"),
        (lambda: tasks.few_per_class(Y[1:], 2, rng()), "class 0 has 1 rows, 2 were asked for"),
    ],
)
def test_what_cannot_be_drawn_is_refused(refused, told):
    with pytest.raises(ValueError, match=told):
        refused()


def put(rows, at, value):
    rows = rows.clone()
    rows[at] = value
    return rows


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"X_train": put(X, (2, 1), torch.nan)}, "train: X holds 1 NaN .* the first in row 2"),
        ({"X_test": put(X, 3, torch.inf)}, "test: X holds 3 NaN .* the first in row 3"),
        ({"X_train": X.long()}, "train: X is torch.int64, expected floating-point"),
        ({"y_train": put(Y, 0, -100)}, "train: label -100 is out of range, expected 0 or more"),
        (dict.fromkeys(["y_train", "y_test"], put(Y, Y == 2, 3)), "train has no row of class 2"),
        ({"y_test": put(Y, Y == 3, 0)}, "test has no row of class 3: labels must be 0..3"),
        ({"y_test": put(Y, 0, 10**6)}, "train has no row of class 4"),
        ({"y_train": Y[:, None]}, r"train: y has shape \(8, 1\), expected \(8,\)"),
        ({"y_train": Y[:5]}, r"train: y has shape \(5,\)"),
        ({"X_test": X[:0], "y_test": Y[:0]}, "test: X has no rows"),
        ({"X_test": X[:, :2]}, r"test: a row of X has shape \(2,\), one of train \(3,\)"),
        ({"y_test": Y * torch.nan}, "test: y is torch.float32, expected integers from 0"),
        ({"X_train": {"a": X}}, "train: X is a dict of dtype object, expected a table of numbers"),
        ({"y_train": np.array(list("abcdabcd"))}, "train: y is a ndarray of dtype <U1, expected"),
    ],
)
def test_unusable_rows_are_refused_in_one_sentence(changed, told):
    sound = {"X_train": X, "y_train": Y, "X_test": X, "y_test": Y}
    assert Task(**sound).n_classes == 4
    with pytest.raises(ValueError, match=rf"^{told}[^\n]{{,150}}$"):
        Task(**sound | changed)


@pytest.mark.parametrize("labels", ["int8", "uint16", "int32", "uint64", "bool", ">i4"])
@pytest.mark.parametrize("kind", ["f2", "f4", ">f8"])
def test_tables_of_numbers_become_tensors_of_the_same_values(kind, labels):
    classes = np.arange(8) % 2
    task = Task(X.numpy().astype(kind), classes.astype(labels), X.double(), classes.tolist())
    for made in (task.X_train, task.X_test):
        assert torch.equal(made.float(), X)
    for made in (task.y_train, task.y_test):
        assert made.tolist() == classes.tolist() and made.dtype == torch.int64
    assert task.X_train.dtype == torch.from_numpy(np.zeros(1, kind[-2:])).dtype


@pytest.mark.parametrize(
    "value, low, high, error",
    [
        (1, 1, 9, None),
        (9, 0.5, 9.0, None),
        (True, 0, 9, TypeError),
        (3.0, 1, 9, TypeError),
        ("3", 0.5, 9.0, TypeError),
        (0, 1, 9, ValueError),
        (10**400, 1, 9, ValueError),
        (float("nan"), 0.0, 1.0, ValueError),
    ],
    ids=lambda value: str(value)[:9],
)
def test_parameters_outside_their_range_are_refused(value, low, high, error):
    if error is None:
        return rows.check_parameters(first=(low, low, high), second=(value, low, high))
    with pytest.raises(error, match=f"^second = .* must be .*from {low} to {high}$"):
        rows.check_parameters(first=(low, low, high), second=(value, low, high))


def test_few_per_class_draws_k_rows_of_each_class_at_random():
    y = torch.tensor([0, 1, 2] * 10)
    rows = tasks.few_per_class(y, 4, rng())
    assert len(rows.unique()) == 12 and y[rows].tolist() == [[c] * 4 for c in range(3)]
    assert torch.equal(rows, tasks.few_per_class(y, 4, rng()))
    assert not torch.equal(rows.sort(1).values, tasks.few_per_class(y, 4, rng(1)).sort(1).values)


@pytest.mark.parametrize("scale", [0, 1.5])
def test_shifted_domain_keeps_labels_and_standardises_columns_again(scale, dtype):
    X, y = published_task().test
    shifted, labels = tasks.shifted_domain(X, y, scale=scale, rng=rng())
    assert torch.equal(labels, y) and shifted.dtype == dtype
    assert shifted.mean(0).abs().max() < 1e-6
    assert (shifted.std(0, correction=0) - 1).abs().max() < 1e-6
    noisy = X + torch.as_tensor(rng().normal(0, scale, X.shape), dtype=dtype)
    wanted = (noisy - noisy.mean(0)) / noisy.std(0, correction=0)
    torch.testing.assert_close(shifted, wanted, atol=1e-5, rtol=0)
