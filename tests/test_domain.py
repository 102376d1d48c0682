"""Domain adaptation: each method against its reference, a planted shift, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from helpers.training import (
    coral,
    density_ratio,
    information_maximization,
    label_ratio,
    match_statistics,
)


def matched(X_target, X_source, **floor):
    return match_statistics(X_target, X_target, X_source, **floor)


TWO_SAMPLES = [matched, coral, density_ratio]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(n, d, seed):
    return normal(n, d, seed=seed) @ normal(d, d, seed=seed + 100) + normal(d, seed=seed + 200)


def standardised(X):
    return (X - X.mean(0)) / X.std(0, correction=0)


def close(actual, expected, tol=1e-12):
    np.testing.assert_allclose(actual.detach(), expected, rtol=tol, atol=tol)


def skada_fit_transform(adapter, X_source, X_target):
    domain = np.r_[np.full(len(X_source), 1), np.full(len(X_target), -2)]
    return adapter.fit_transform(torch.cat([X_source, X_target]).numpy(), sample_domain=domain)


def test_matched_columns_are_what_two_standard_scalers_give():
    target, source = correlated(40, 4, seed=0), correlated(70, 4, seed=1)
    scaled = StandardScaler().fit_transform(target.numpy())
    expected = StandardScaler().fit(source.numpy()).inverse_transform(scaled)
    close(matched(target, source), expected)
    for one, row in zip(target, expected, strict=True):
        close(match_statistics(one[None], target, source)[0], row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3])
def test_a_constant_target_column_becomes_the_source_mean(dtype, value):
    target, source = normal(50, 3, dtype=dtype), normal(60, 3, seed=1, dtype=dtype) * 5 + 2
    target[:, 1] = value
    moved = matched(target, source)
    assert torch.isfinite(moved).all()
    assert (moved[:, 1] == source[:, 1].mean()).all()


def test_a_deviation_below_the_floor_is_not_blown_up():
    target, source = 1e-9 * normal(50, 2), normal(60, 2, seed=1)
    assert (matched(target, source) - source.mean(0)).abs().max() < 0.01
    assert matched(target, source, floor=1e-12).std() > 0.5


@pytest.mark.parametrize("ridge, reg", [(0.0, None), (0.25, 0.2), (1.0, 0.5)])
def test_coral_is_skadas_up_to_the_target_mean(ridge, reg):
    # skada shrinks to (1 - reg) C + reg tr(C) / d I: the same map for columns of variance 1 with
    # reg = ridge / (1 + ridge); it centres both domains where ours moves the source to the target
    from skada import CORALAdapter

    source, target = standardised(correlated(90, 6, 0)) + 3, standardised(correlated(70, 6, 1)) - 2
    theirs = skada_fit_transform(CORALAdapter(reg=reg), source, target)[: len(source)]
    close(coral(source, target, ridge=ridge) - target.mean(0), theirs, tol=1e-8)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 10.0])
def test_coral_is_algorithm_1_on_centred_samples(ridge):
    source, target = correlated(90, 6, seed=0), correlated(70, 6, seed=1)
    source, target = source - source.mean(0), target - target.mean(0)
    root_s, root_t = (
        sqrtm(np.cov(X.numpy().T, bias=True) + ridge * np.eye(6)) for X in (source, target)
    )
    close(coral(source, target, ridge=ridge), source.numpy() @ np.linalg.inv(root_s) @ root_t, 1e-8)


@pytest.mark.parametrize("d", [1, 6])
def test_coral_without_ridge_gives_the_targets_mean_and_covariance(d):
    source, target = correlated(90, d, seed=0), correlated(70, d, seed=1)
    moved = coral(source, target, ridge=0.0)
    close(moved.mean(0), target.mean(0), 1e-10)
    close(torch.cov(moved.T, correction=0), torch.cov(target.T, correction=0), 1e-10)


def test_coral_takes_constant_columns_with_a_ridge_and_refuses_them_without():
    source, target = correlated(90, 4, seed=0), correlated(70, 4, seed=1)
    source[:, 2], target[:, 3] = 0.1, 0.1
    assert torch.isfinite(coral(source, target)).all()
    with pytest.raises(ValueError, match=r"ridge=0.0 leaves the covariance of X_source singular"):
        coral(source, target, ridge=0.0)


def test_density_ratio_is_the_reciprocal_of_skadas_same_discriminator():
    # skada 0.6 returns (1 - p) / p for p = P(target | x), which is p_s / p_t: its weights move the
    # source away from the target, as the second assertion shows
    from skada import DiscriminatorReweightAdapter

    source, target = normal(300, 3), normal(200, 3, seed=1) + 0.5
    adapter = DiscriminatorReweightAdapter(LogisticRegression(solver="newton-cholesky", tol=1e-8))
    theirs = torch.as_tensor(skada_fit_transform(adapter, source, target)[1]["sample_weight"][:300])
    close(density_ratio(source, target), 1 / theirs / (1 / theirs).mean(), tol=1e-8)
    assert (theirs @ source / 300 < source.mean(0)).all()


@pytest.mark.parametrize("n, m", [(4000, 4000), (4000, 1000), (1000, 4000)])
def test_density_weights_carry_the_source_mean_to_the_target(n, m):
    source, target = normal(n, 1), normal(m, 1, seed=1) + 1
    weights = density_ratio(source, target)
    assert abs(source.mean()) < 0.1
    assert abs(weights @ source / weights.sum() - 1) < 0.15
    truth = torch.exp(source[:, 0] - 0.5)  # N(1, 1) over N(0, 1)
    assert torch.corrcoef(torch.stack([weights, truth]))[0, 1] > 0.99
    close(weights.mean(), 1.0)
    assert (weights > 0).all()


def test_density_weights_stay_finite_where_the_domains_do_not_overlap():
    weights = density_ratio(normal(50, 2), normal(50, 2, seed=1) + 1e4)
    assert torch.isfinite(weights).all()
    close(weights.mean(), 1.0)


CONFUSION = torch.tensor([[7, 2, 1], [1, 6, 2], [2, 2, 7]])  # P(predicted | y) in tenths


def predictions(per_class):
    """Draw `per_class` tens of rows, predicted exactly as often as `CONFUSION` says."""
    counts = CONFUSION * torch.tensor(per_class)  # (predicted, y)
    return (
        torch.cartesian_prod(torch.arange(3), torch.arange(3))
        .repeat_interleave(counts.flatten(), dim=0)
        .T
    )


def test_label_ratio_recovers_a_planted_shift_exactly():
    predicted, y = predictions([2, 3, 5])
    shifted, _ = predictions([6, 1, 3])
    close(label_ratio(predicted, y, shifted, n_classes=3), [3.0, 1 / 3, 3 / 5])


def test_label_ratio_recovers_a_planted_shift_from_a_noisy_sample():
    rng = np.random.default_rng(0)
    p_s, p_t = np.array([0.2, 0.3, 0.5]), np.array([0.6, 0.1, 0.3])
    y_s, y_t = (torch.as_tensor(rng.choice(3, 20_000, p=p)) for p in (p_s, p_t))
    below = (CONFUSION.cumsum(0) / 10).T  # (y, predicted)
    f_s, f_t = (
        (torch.as_tensor(rng.random(20_000))[:, None] > below[y]).sum(1) for y in (y_s, y_t)
    )
    assert (f_t != y_t).float().mean() > 0.3
    assert (label_ratio(f_s, y_s, f_t, n_classes=3) - torch.as_tensor(p_t / p_s)).abs().max() < 0.15


def test_label_ratio_is_never_negative():
    predicted, y = predictions([2, 3, 5])
    weights = label_ratio(predicted, y, torch.tensor([2]), n_classes=3)
    assert weights.min() == 0 and weights[2] > 1


def test_label_ratio_keeps_1_where_a_singular_confusion_matrix_says_nothing():
    y = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3] * 4)
    constant = torch.zeros(40, dtype=torch.int64)
    close(label_ratio(constant, y, constant, n_classes=4), np.ones(4))
    blind = y.clamp_max(2)  # takes class 3 for class 2, and absent class 4 never comes
    twice_as_often = torch.tensor([0] * 6 + [1] * 1 + [2] * 3)
    weights = label_ratio(blind, y, twice_as_often, n_classes=5)
    close(weights[[0, 1, 4]], [2, 1, 1])
    close(2 * weights[2] + 4 * weights[3], 3.0)
    close((1 - weights[3]) / (1 - weights[2]), 4 / 2)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"predicted_source": [0, 1]}, "2 source predictions, 3 labels"),
        ({"y_source": [0, 1, 3]}, r"y_source must be class indices 0\.\.2, at least one"),
        ({"predicted_source": [0, -1, 1]}, "predicted_source must be class indices"),
        ({"predicted_target": []}, "predicted_target must be class indices"),
        ({"predicted_target": [0.0]}, "predicted_target must be class indices"),
    ],
)
def test_label_ratio_refuses_what_are_no_class_indices(changed, told):
    given = {"predicted_source": [0, 1, 2], "y_source": [0, 1, 2], "predicted_target": [0, 1]}
    with pytest.raises(ValueError, match=told):
        label_ratio(*(torch.tensor(v) for v in (given | changed).values()), n_classes=3)


@pytest.mark.parametrize("C", [2, 3, 10])
def test_information_maximization_runs_from_0_to_log_c(C):
    sure = 1e4 * torch.eye(C).double()
    close(information_maximization(sure), math.log(C))
    close(information_maximization(0 * sure), 0.0)
    close(information_maximization(sure[:1].expand(5, C)), 0.0)
    for seed in range(20):
        assert 0 <= information_maximization(5 * normal(30, C, seed=seed)) <= math.log(C)


def test_information_maximization_is_the_entropy_of_the_mean_less_the_mean_entropy():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    h = [-a * math.log(a) - (1 - a) * math.log(1 - a) for a in (0.9, 0.3, 0.6)]
    close(information_maximization(p.log()), h[2] - (h[0] + h[1]) / 2)


@pytest.mark.parametrize("function", TWO_SAMPLES)
@pytest.mark.parametrize(
    "first, second, told",
    [
        ((5, 3), (5, 2), "{1} has 2 columns, {0} has 3: make them equal"),
        ((0, 3), (5, 3), r"{0} has shape \(0, 3\), expected \(n, d\)"),
        ((5, 3), (0, 3), r"{1} has shape \(0, 3\), expected \(n, d\)"),
        ((5, 3), (5,), r"{1} has shape \(5,\), expected \(n, d\)"),
    ],
)
def test_samples_that_do_not_fit_are_refused_by_name(function, first, second, told):
    names = function.__code__.co_varnames[:2]
    with pytest.raises(ValueError, match=told.format(*names)):
        function(torch.zeros(first), torch.zeros(second))


def test_no_logits_are_refused():
    with pytest.raises(ValueError, match=r"logits has shape \(0, 4\)"):
        information_maximization(torch.zeros(0, 4))


@pytest.mark.parametrize("function", TWO_SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_repeat_keep_the_dtype_and_touch_neither_inputs_nor_streams(function, dtype):
    A, B = normal(40, 3, dtype=dtype), normal(30, 3, seed=1, dtype=dtype) + 1
    before = A.clone(), B.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = function(A, B), function(A, B)
    assert torch.equal(first, second) and first.dtype == dtype
    after = A, B, torch.get_rng_state(), np.random.get_state()[1]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
