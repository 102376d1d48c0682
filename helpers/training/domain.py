"""Unsupervised domain adaptation: align, reweight, and choose without target labels."""

import torch
from sklearn.linear_model import LogisticRegression


def match_statistics(X, X_target, X_source, *, floor=1e-6):
    """Return (X - m_t) / s_t * s_s + m_s: from target columns' mean and sd to the source's.

    Parameters
    ----------
    X : Tensor of shape (k, d)
        Rows to move: the target's, or others of its domain that the statistics have not seen.
    X_target, X_source : Tensor of shape (n, d) and (m, d)
        Rows that give the statistics: inputs, or features of a frozen backbone.
    floor : float, default=1e-6
        Smaller target deviations count as this one: a constant column becomes the source mean.

    Returns
    -------
    Tensor of shape (k, d)

    Raises
    ------
    ValueError
        If a sample is empty, no matrix, or of another width than the others; it is named.

    References
    ----------
    AdaBN on any layer: Li et al. (2016), Algorithm 1, arXiv:1603.04779.
    """
    _check_columns(X_target=X_target, X_source=X_source, X=X)
    first = X_target[0]  # a constant column less its first entry has mean and sd exactly 0
    mean = (X_target - first).mean(0)
    sd = (X_target - first - mean).square().mean(0).sqrt().clamp_min(floor)  # (d,)
    return (X - first - mean) / sd * X_source.std(0, correction=0) + X_source.mean(0)


def coral(X_source, X_target, *, ridge=1.0):
    """Return (X_source - m_s) (C_s + ridge I)^(-1/2) (C_t + ridge I)^(1/2) + m_t.

    The means, 0 in the paper, move too: a model trained on the result reads target rows as they
    are. C divides by n.

    Parameters
    ----------
    X_source, X_target : Tensor of shape (n, d) and (m, d)
    ridge : float, default=1.0
        Suits columns of variance 1; beside much smaller variances only the means move.

    Returns
    -------
    Tensor of shape (n, d)

    Raises
    ------
    ValueError
        If C_s + ridge I is singular, so that its inverse root does not exist; or if a sample is
        empty, no matrix, or of another width than the other.

    References
    ----------
    CORAL: Sun, Feng & Saenko (2016), Algorithm 1, arXiv:1511.05547.
    """
    _check_columns(X_source=X_source, X_target=X_target)
    (m_s, v_s, U_s), (m_t, v_t, U_t) = (
        (m, *torch.linalg.eigh((X - m).T @ (X - m) / len(X)))
        for X, m in ((X_source, X_source.mean(0)), (X_target, X_target.mean(0)))
    )
    v_s, v_t = v_s + ridge, (v_t + ridge).clamp_min(0)
    if v_s.min() <= torch.finfo(v_s.dtype).eps * len(v_s) * v_s.max():
        raise ValueError(f"ridge={ridge} leaves the covariance of X_source singular: raise it")
    return (X_source - m_s) @ (U_s * v_s.rsqrt()) @ U_s.T @ (U_t * v_t.sqrt()) @ U_t.T + m_t


def density_ratio(X_source, X_target):
    """Return p_t(x) / p_s(x) of each source row, scaled to mean 1: weights for covariate shift.

    They are the odds of a logistic discriminator, whose L2 penalty (C = 1) expects columns of like
    scale.

    Parameters
    ----------
    X_source, X_target : Tensor of shape (n, d) and (m, d)

    Returns
    -------
    Tensor of shape (n,)

    Raises
    ------
    ValueError
        If a sample is empty, no matrix, or of another width than the others; it is named.

    References
    ----------
    Shimodaira (2000), doi:10.1016/S0378-3758(00)00115-4; Bickel et al. (2009), JMLR 10:2137-2155;
    Sugiyama et al. (2012), chapter 4, doi:10.1017/CBO9781139035613.
    """
    _check_columns(X_source=X_source, X_target=X_target)
    X = torch.cat([X_source, X_target]).detach().cpu().numpy()
    is_target = [0] * len(X_source) + [1] * len(X_target)
    discriminator = LogisticRegression(solver="newton-cholesky", tol=1e-8).fit(X, is_target)
    log_odds = torch.as_tensor(discriminator.decision_function(X[: len(X_source)]))  # (n,)
    return (len(X_source) * log_odds.softmax(0)).to(X_source)


def label_ratio(predicted_source, y_source, predicted_target, *, n_classes):
    """Solve C w = mu for w = p_t(y) / p_s(y), and clip it at 0: rows labelled y then weigh w[y].

    C[i, j] is the share of source rows predicted i and labelled j, mu[i] that of target rows
    predicted i. If C is singular, w is the least-squares solution nearest to 1: no correction
    without evidence.

    Parameters
    ----------
    predicted_source, y_source : int64 Tensor of shape (n,)
        Classes of source rows that the classifier was not trained on.
    predicted_target : int64 Tensor of shape (m,)
    n_classes : int

    Returns
    -------
    float64 Tensor of shape (n_classes,)

    Raises
    ------
    ValueError
        If classes and labels do not pair up, or something given is no class index.

    References
    ----------
    BBSE: Lipton, Wang & Smola (2018), Algorithm 1, arXiv:1802.03916; w - 1 as in Azizzadenesheli
    et al. (2019), section 2, arXiv:1903.09734.
    """
    if len(predicted_source) != len(y_source):
        raise ValueError(f"{len(predicted_source)} source predictions, {len(y_source)} labels")
    given = {"predicted_source": predicted_source, "y_source": y_source}
    for name, y in (given | {"predicted_target": predicted_target}).items():
        if len(y) == 0 or y.is_floating_point() or y.min() < 0 or y.max() >= n_classes:
            raise ValueError(f"{name} must be class indices 0..{n_classes - 1}, at least one")
    pairs = torch.bincount(predicted_source * n_classes + y_source, minlength=n_classes**2)
    C = pairs.double().reshape(n_classes, n_classes) / len(y_source)
    mu = torch.bincount(predicted_target, minlength=n_classes).double() / len(predicted_target)
    return (1 + torch.linalg.pinv(C) @ (mu - C.sum(1))).clamp_min(0)


def information_maximization(logits):
    """Return H(mean_i p_i) - mean_i H(p_i) in nats, 0 to log C: sure of rows, classes balanced.

    Larger is better, yet a sure, balanced and wrong model scores high.

    Parameters
    ----------
    logits : Tensor of shape (n, C)

    Returns
    -------
    Tensor
        A scalar.

    Raises
    ------
    ValueError
        If there are no logits, or they are no matrix.

    References
    ----------
    Shi & Sha (2012), arXiv:1206.6438; to select models: Musgrave et al. (2022), arXiv:2208.07360.
    """
    _check_columns(logits=logits)
    p = logits.softmax(-1)
    return torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(-1).mean()


def _check_columns(**samples):
    first = next(iter(samples))
    for name, X in samples.items():
        if X.ndim != 2 or 0 in X.shape:
            raise ValueError(f"{name} has shape {tuple(X.shape)}, expected (n, d), both above 0")
        if (d := X.shape[1]) != (wanted := samples[first].shape[1]):
            raise ValueError(f"{name} has {d} columns, {first} has {wanted}: make them equal")
