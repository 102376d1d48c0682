"""Part 1's measured experiments: each is a plain function of its seed."""

import copy
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from torch.optim import Adam

from helpers.data import digits, few_per_class, published_task, shift_digits, shifted_domain
from helpers.models import stages, with_fresh_head
from helpers.models.mlp import MLP
from helpers.study.seeds import percent, reproducible, run_seeds
from helpers.training import (
    adapt,
    coral,
    cross_entropy,
    density_ratio,
    evaluate,
    extract_features,
    feature_extraction,
    fine_tune,
    gradual_unfreezing,
    information_maximization,
    l2_sp,
    label_ratio,
    linear_probe,
    lp_ft,
    match_statistics,
    mmd_loss,
    param_groups,
    predict,
    pretrain,
    score,
    train,
    weighted_cross_entropy,
)


def published_protocol(seed, *, labels=20, shift_scale=1.5, **settings):
    """Run sections 1.2 to 1.5 once, data draw, split and initialisation all following the seed.

    Parameters
    ----------
    seed : int
    labels : int, default=20
        Labelled rows of the new domain.
    shift_scale : float, default=1.5
        Of `shifted_domain`.
    **settings : dict of str to object
        Keyword arguments of one step: `data` of `published_task`, `base` of `pretrain`, `features`
        of `feature_extraction`, `tuning` of `fine_tune`, `adaptation` of `adapt`.

    Returns
    -------
    dict of str to float
        Accuracies in percent, the published ones and then their corrected versions; and "margin",
        that of the closest decision behind them.

    Raises
    ------
    ValueError
        If `settings` name another step.
    """
    of = {step: {} for step in ("data", "base", "features", "tuning", "adaptation")}
    if unknown := settings.keys() - of.keys():
        raise ValueError(f"unknown step {sorted(unknown)}: settings are for {list(of)}")
    of |= settings

    def _drawn(function, *args, **options):  # pairs: all start from the same random weights
        with reproducible(seed):
            return function(*args, **options)

    with reproducible(seed):
        task = published_task(seed, **of["data"])
        base, _ = _drawn(pretrain, task, **of["base"])
        features, _ = _drawn(feature_extraction, base, task, **of["features"])
        tuned, _ = _drawn(fine_tune, base, task, **of["tuning"])
        longer, _ = _drawn(fine_tune, base, task, **(of["tuning"] | {"epochs": 200}))
        X, y = shifted_domain(*task.test, scale=shift_scale, rng=np.random.default_rng(seed))
        few = base, X[:labels], y[:labels]
        adapted, _ = _drawn(adapt, *few, **of["adaptation"])
        kept, _ = _drawn(adapt, *few, fresh_head=False, **of["adaptation"])
        converged = _drawn(with_fresh_head, base)
        linear_probe(converged, *task.train, epochs=300, lr=0.1)
        honest = published_task(seed, scale_on="train", **of["data"])
        rescaled, _ = _drawn(pretrain, honest, **of["base"])
        rest = X[labels:], y[labels:]
        scores = {
            "pre-trained": evaluate(base, *task.test),
            "feature extraction": evaluate(features, *task.test),
            "fine-tuning": evaluate(tuned, *task.test),
            "before adaptation": evaluate(base, X, y),
            "after adaptation": evaluate(adapted, X, y),
            "before, other rows": evaluate(base, *rest),
            "after, other rows": evaluate(adapted, *rest),
            "after from the trained head, other rows": evaluate(kept, *rest),
            "feature extraction, longer": evaluate(converged, *task.test),
            "fine-tuning, longer": evaluate(longer, *task.test),
            "pre-trained, scaler on training rows": evaluate(rescaled, *honest.test),
        }
        seen, unseen = (extract_features(converged, X) for X in (task.X_train, task.X_test))
        for name, head in {
            "logistic head": LogisticRegression(solver="newton-cholesky", tol=1e-8),
            "closed-form head": RidgeClassifier(),
        }.items():
            logits = torch.as_tensor(head.fit(seen, task.y_train).decision_function(unseen))
            if logits.ndim == 1:  # scikit-learn's two classes share one column
                logits = torch.stack([-logits, logits], 1)
            scores[name] = score(logits, task.y_test)
    return percent(scores)


def source_model(start, X, y, *, weights=None):
    """Return a copy of `start`, all of it trained on digits for 100 full-batch steps.

    Parameters
    ----------
    start : MLP
    X : Tensor of shape (n, 64)
    y : int64 Tensor of shape (n,)
    weights : Tensor of shape (n,), optional
        How much each row counts; None counts them alike.

    Returns
    -------
    MLP
    """
    model = copy.deepcopy(start)
    loss = cross_entropy if weights is None else weighted_cross_entropy(weights)
    optimizer = Adam(model.parameters(), lr=1e-2, fused=True)
    train(model, X, y, optimizer=optimizer, epochs=100, loss=loss)
    return model


# Validation rows decide which of these a method gets. At 0.1 training is so unstable that rounding
# grows until processors disagree on accuracies.
RATES = (1e-3, 3e-3, 1e-2, 3e-2)

TARGETS = {  # what the target images went through: kind and strength of `shift_digits`
    "noisy": ("noise", 0.3),
    "inverted": ("inversion", 0.0),
    "turned 90°": ("rotation", 90.0),
}


def full_fine_tuning(model, X, y, *, lr, below=1.0, alpha=0.0):
    """Train everything for 100 full-batch steps, in place.

    Parameters
    ----------
    model : nn.Module
    X : Tensor of shape (n, d)
    y : int64 Tensor of shape (n,)
    lr : float
        Adam's learning rate for the top stage.
    below : float, default=1.0
        Rate of each stage as a share of the rate of the stage above it.
    alpha : float, default=0.0
        Strength of `l2_sp`, the pull to where the weights start.
    """
    names = list(stages(model))
    rates = {name: lr * below ** (len(names) - 1 - i) for i, name in enumerate(names)}
    loss = l2_sp(model, alpha=alpha) if alpha else cross_entropy
    optimizer = Adam(param_groups(model, rates), fused=True)
    train(model, X, y, optimizer=optimizer, epochs=100, loss=loss)


FORGETTING = {  # each a function of model, X, y and lr, of 100 epochs in all
    "full fine-tuning": full_fine_tuning,
    "discriminative rates": partial(full_fine_tuning, below=1 / 2.6),  # Howard & Ruder's factor
    "gradual unfreezing": partial(gradual_unfreezing, epochs=100),
    "LP-FT": partial(lp_ft, epochs=50, probe_epochs=50, probe_lr=3e-2),
    "L2-SP": partial(full_fine_tuning, alpha=0.1),
    "linear probing": partial(linear_probe, epochs=100),
}


def forgetting(seed, *, per_class=20):
    """Adapt a digit model to images turned by 90 degrees in six ways; score it on both domains.

    Each domain has a head of its own, as for two tasks: the new head starts fresh, the source
    accuracy is that of the old head on the adapted backbone.

    Parameters
    ----------
    seed : int
    per_class : int, default=20
        Labelled target images of each digit; as many others choose the learning rate.

    Returns
    -------
    dict of str to float
        Accuracies in percent on held-out images, for each method at each rate ("method,
        rate/source" and "/target") and at the rate that did best on the validation images
        ("method/source" and "/target"), with that rate ("method/rate"); and "margin".
    """
    with reproducible(seed):
        rng = np.random.default_rng(seed)
        source, source_test, pool, target_test = digits(rng, (650, 300, 500, 347))
        pool, target_test = (_shifted(rows, "turned 90°", rng) for rows in (pool, target_test))
        rows = few_per_class(pool[1], 2 * per_class, rng).split(per_class, dim=1)
        (X, y), validation = ((pool[0][r.flatten()], pool[1][r.flatten()]) for r in rows)
        base = source_model(MLP(64, n_classes=10), *source)
        start = with_fresh_head(base)
        scores, chosen, validated = {}, {}, []
        for name, method in FORGETTING.items():
            best = -1
            for lr in RATES:
                model = copy.deepcopy(start)
                method(model, X, y, lr=lr)
                validated.append(evaluate(model, *validation))
                on_target = evaluate(model, *target_test)
                model.head = base.head
                on_source = evaluate(model, *source_test)
                names = [f"{name}, {lr:g}"]
                if validated[-1].correct > best:
                    names, best = [*names, name], validated[-1].correct
                    chosen[f"{name}/rate"] = lr
                for n in names:
                    scores |= {f"{n}/target": on_target, f"{n}/source": on_source}
        scores["pre-trained/source"] = evaluate(base, *source_test)
    return percent(scores, *validated) | chosen


BUDGETS = (1, 3, 10, 30, 50)  # labelled target images of each digit

METHODS = {"from scratch": full_fine_tuning, "fine-tuning": full_fine_tuning} | {
    name: FORGETTING[name] for name in ("linear probing", "LP-FT")
}


def label_budget(seed, *, target, rates, budgets=BUDGETS, score_on="test"):
    """Train four ways on a few labelled target images, for each label budget.

    Parameters
    ----------
    seed : int
    target : str
        A key of `TARGETS`.
    rates : dict of str to float or tuple of float
        Learning rate of each of `METHODS`, or several to try.
    budgets : sequence of int
        Labelled images of each digit; smaller samples are parts of larger ones.
    score_on : {"test", "validation"}
        Validation images are for choosing `rates`; no image is in both.

    Returns
    -------
    dict of str to float
        "method/budget", or "method, rate/budget" where there are several: accuracy in percent; and
        "margin".
    """
    with reproducible(seed):
        rng = np.random.default_rng(seed)
        source, pool, validation, test = digits(rng, (650, 540, 200, 407))
        pool, validation, test = (_shifted(rows, target, rng) for rows in (pool, validation, test))
        held_out = {"test": test, "validation": validation}[score_on]
        fresh = MLP(64, n_classes=10)
        transferred = with_fresh_head(source_model(fresh, *source))
        order = few_per_class(pool[1], max(budgets), rng)
        scores = {}
        for k in budgets:
            X, y = (part[order[:, :k].flatten()] for part in pool)
            for name, method in METHODS.items():
                for lr in np.atleast_1d(rates[name]):
                    model = copy.deepcopy(fresh if name == "from scratch" else transferred)
                    method(model, X, y, lr=float(lr))
                    label = name if np.isscalar(rates[name]) else f"{name}, {lr:g}"
                    scores[f"{label}/{k}"] = evaluate(model, *held_out)
    return percent(scores)


def choose_rates(target, seeds, *, workers=None):
    """Choose each method's learning rate on validation images: best mean accuracy over seeds.

    Parameters
    ----------
    target : str
        A key of `TARGETS`.
    seeds : sequence of int
        Others than those of the measurement.
    workers : int, optional
        As in `helpers.study.run_seeds`.

    Returns
    -------
    dict of str to float
        One of `RATES` for each of `METHODS`.
    """
    settings = {"target": target, "budgets": (10,), "score_on": "validation"}
    experiment = partial(label_budget, rates=dict.fromkeys(METHODS, RATES), **settings)
    tried = {k: v.mean().round(9) for k, v in run_seeds(experiment, seeds, workers=workers).items()}
    return {name: max(RATES, key=lambda lr: tried[f"{name}, {lr:g}/10"]) for name in METHODS}


SHIFTS = ("none", "noisy", "turned 30°", "low contrast", "label shift", "concept shift")


def adaptation(seed, *, shift):
    """Adapt a digit model to a shifted domain in the classic ways, and choose between them.

    Unsupervised methods see the target pool's images, never its labels nor the test images.

    Parameters
    ----------
    seed : int
    shift : str
        One of `SHIFTS`.

    Returns
    -------
    dict of str to float
        Accuracy in percent of each method on target test images; and "margin".
    """
    with reproducible(seed):
        rng = np.random.default_rng(seed)
        source, held_out, pool, test = digits(rng, (400, 200, 600, 597))
        pool, test = (_shifted(rows, shift, rng) for rows in (pool, test))
        fresh = MLP(64, n_classes=10)
        base = source_model(fresh, *source)
        guess = [predict(base, X).argmax(-1) for X in (held_out[0], pool[0])]
        of_class = label_ratio(guess[0], held_out[1], guess[1], n_classes=10)
        like_source = partial(match_statistics, X_target=pool[0], X_source=source[0])
        as_is = torch.Tensor.clone
        recoloured = coral(source[0], pool[0], ridge=0.1), source[1]
        of_row = density_ratio(source[0], pool[0])
        candidates = {  # a model, and what happens to target images before it reads them
            "source only": (base, as_is),
            "target statistics": (base, like_source),
            "CORAL": (source_model(fresh, *recoloured), as_is),
            "importance weights": (source_model(fresh, *source, weights=of_row), as_is),
            "label weights": (source_model(fresh, *source, weights=of_class[source[1]]), as_is),
        }
        for weight in (0.3, 3.0):
            model = copy.deepcopy(base)
            loss = mmd_loss(pool[0][:128], weight=weight)
            optimizer = Adam(model.parameters(), lr=1e-3, fused=True)
            train(model, *source, optimizer=optimizer, epochs=15, batch_size=128, loss=loss)
            candidates[f"MMD, weight {weight:g}"] = model, as_is
        scores = {
            name: evaluate(model, view(test[0]), test[1])
            for name, (model, view) in candidates.items()
        }
        logits = {name: predict(model, view(pool[0])) for name, (model, view) in candidates.items()}
        unseen = max(logits, key=lambda name: information_maximization(logits[name]))
        peeked = {name: score(logits[name], pool[1]) for name in logits}
        seen = max(peeked, key=lambda name: peeked[name].correct)
        scores |= {"chosen without labels": scores[unseen], "chosen by the oracle": scores[seen]}
        few = few_per_class(pool[1], 3, rng).flatten()
        for name, rows in {"3 labels per class": few, "all labels (oracle)": slice(None)}.items():
            model = copy.deepcopy(base)
            full_fine_tuning(model, pool[0][rows], pool[1][rows], lr=1e-3)
            scores[name] = evaluate(model, *test)
    return percent(scores, *peeked.values())


def _shifted(rows, name, rng):
    """Return images and labels as the domain `name` has them."""
    X, y = rows
    if name == "label shift":  # the upper five digits become five times rarer
        of_class = [(y == c).nonzero()[:, 0] for c in range(10)]
        kept = torch.cat([r[: len(r) // (1 if c < 5 else 5)] for c, r in enumerate(of_class)])
        kept = kept.sort().values  # in the order they came, not class by class
        return X[kept], y[kept]
    if name == "concept shift":  # 1 and 7, 3 and 8 exchange their names
        names = torch.tensor([0, 7, 2, 8, 4, 5, 6, 1, 3, 9])
        return X, names[y]
    others = {
        "none": ("none", 0.0),
        "turned 30°": ("rotation", 30.0),
        "low contrast": ("contrast", 0.3),
    }
    kind, strength = (TARGETS | others)[name]
    return shift_digits(X, kind, strength=strength, rng=rng), y
