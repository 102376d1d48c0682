"""Part 1's studies on digits: forgetting, label budgets, domain adaptation."""

import copy
from functools import partial

import numpy as np
import torch

from helpers import data, models, training
from helpers.study.seeds import percent, reproducible
from helpers.study.tuning import best, columns, try_settings

# Validation rows decide which of these a method gets. At 0.1 training is so unstable that rounding
# grows until processors disagree on accuracies.
RATES = (1e-3, 3e-3, 1e-2, 3e-2)

IMAGES = {  # what the images of a domain went through: kind and strength of `shift_digits`
    "none": ("none", 0.0),
    "noisy": ("noise", 0.3),
    "inverted": ("inversion", 0.0),
    "turned 30°": ("rotation", 30.0),
    "turned 90°": ("rotation", 90.0),
    "low contrast": ("contrast", 0.3),
}

TARGETS = ("noisy", "inverted", "turned 90°")

SHIFTS = ("none", "noisy", "turned 30°", "low contrast", "label shift", "concept shift")


def source_model(start, X, y, **options):
    """Return a copy of `start`, all of it trained on digits for 100 full-batch steps at 0.01."""
    model = copy.deepcopy(start)
    training.fit(model, X, y, lr=1e-2, epochs=100, **options)
    return model


def discriminative_rates(model, X, y, *, lr):
    """Train everything for 100 steps, each stage 2.6 times as slowly as the one above it.

    The factor is that of Howard & Ruder (2018), section 3.2, arXiv:1801.06146.
    """
    from_top = reversed(models.stages(model))
    rates = {stage: lr * (1 / 2.6) ** i for i, stage in enumerate(from_top)}
    training.fit(model, X, y, lr=rates, epochs=100)


def pulled_to_start(model, X, y, *, lr):
    """Train everything for 100 steps with the penalty of `l2_sp`, of strength 0.1."""
    training.fit(model, X, y, lr=lr, epochs=100, loss=training.l2_sp(model, alpha=0.1))


FORGETTING = {  # each a function of model, X, y and lr, of 100 epochs in all
    "full fine-tuning": partial(training.fit, epochs=100),
    "discriminative rates": discriminative_rates,
    "gradual unfreezing": partial(training.gradual_unfreezing, epochs=100),
    "LP-FT": partial(training.lp_ft, epochs=50, probe_epochs=50, probe_lr=3e-2),
    "L2-SP": pulled_to_start,
    "linear probing": partial(training.linear_probe, epochs=100),
}


def forgetting(seed, *, per_class=20):
    """Adapt a digit model to images turned by 90 degrees in six ways; score it on both domains.

    The method and its rate are varied, `per_class` labelled images and as many to choose the rate
    are fixed. Each domain has a head of its own, as for two tasks: the new one starts fresh, the
    source accuracy is that of the old head on the adapted backbone. Returns accuracies in percent
    on held-out images, at each rate ("method, rate/source" and "/target") and at the rate that did
    best on validation images ("method/source" and "/target"), that rate ("method/rate"), "margin".
    """
    with reproducible(seed):
        rng = np.random.default_rng(seed)
        source, source_test, pool, target_test = data.digits(rng, (650, 300, 500, 347))
        pool, target_test = (_shifted(rows, "turned 90°", rng) for rows in (pool, target_test))
        rows = data.few_per_class(pool[1], 2 * per_class, rng).split(per_class, dim=1)
        (X, y), validation = ((pool[0][r.flatten()], pool[1][r.flatten()]) for r in rows)
        base = source_model(models.MLP(64, n_classes=10), *source)
        start = models.with_fresh_head(base)
        scores = {"pre-trained/source": training.evaluate(base, *source_test)}
        validated, chosen = {}, {}
        for name, method in FORGETTING.items():
            tries = columns(name, RATES)
            for lr, column in tries.items():
                model = copy.deepcopy(start)
                method(model, X, y, lr=lr)
                validated[column] = training.evaluate(model, *validation)
                scores[f"{column}/target"] = training.evaluate(model, *target_test)
                model.head = base.head
                scores[f"{column}/source"] = training.evaluate(model, *source_test)
            lr = chosen[f"{name}/rate"] = max(RATES, key=lambda lr: validated[tries[lr]].correct)
            for side in ("target", "source"):
                scores[f"{name}/{side}"] = scores[f"{tries[lr]}/{side}"]
    return percent(scores, *validated.values()) | chosen


BUDGETS = (1, 3, 10, 30, 50)  # labelled target images of each digit

METHODS = {"from scratch": "full fine-tuning", "fine-tuning": "full fine-tuning"}
METHODS |= {"linear probing": "linear probing", "LP-FT": "LP-FT"}  # which of `FORGETTING` they are


def label_budget(seed, *, target, rates, budgets=BUDGETS, score_on="test"):
    """Train by each of `METHODS` on a few labelled images of a target, for each label budget.

    Method and budget are varied, smaller samples being parts of larger ones; "from scratch" starts
    from random weights. Fixed are `target`, one of `TARGETS`, and each method's learning rate, or
    several to try. Rates are chosen on "validation" images, `score_on`, none of which is a "test"
    image. Returns accuracies in percent, "method/budget", or "method/budget, rate" where there are
    several; and "margin".
    """
    with reproducible(seed):
        rng = np.random.default_rng(seed)
        source, pool, validation, test = data.digits(rng, (650, 540, 200, 407))
        pool, validation, test = (_shifted(rows, target, rng) for rows in (pool, validation, test))
        held_out = {"test": test, "validation": validation}[score_on]
        fresh = models.MLP(64, n_classes=10)
        transferred = models.with_fresh_head(source_model(fresh, *source))
        order, scores = data.few_per_class(pool[1], max(budgets), rng), {}
        for k in budgets:
            X, y = (part[order[:, :k].flatten()] for part in pool)
            for name, method in METHODS.items():
                for lr, column in columns(f"{name}/{k}", rates[name]).items():
                    model = copy.deepcopy(fresh if name == "from scratch" else transferred)
                    FORGETTING[method](model, X, y, lr=lr)
                    scores[column] = training.evaluate(model, *held_out)
    return percent(scores)


def choose_rates(target, seeds, *, workers=None):
    """Choose each method's learning rate for a target, on validation images at 10 labels a class.

    The rate is varied over `RATES`; seeds are others than those of the measurement. Returns the
    rate with the best mean accuracy for each of `METHODS`.
    """
    tries = {name: columns(f"{name}/10", RATES) for name in METHODS}
    options = {"target": target, "budgets": (10,), "rates": dict.fromkeys(METHODS, RATES)}
    return best(try_settings(label_budget, tries, seeds, workers=workers, **options)[0])


def adaptation(seed, *, shift):
    """Adapt a digit model to a shifted domain in the classic ways, and choose between them.

    The method is varied, `shift`, one of `SHIFTS`, is fixed. Unsupervised methods see the target
    pool's images, never its labels nor the test images. Returns accuracy in percent of each method
    on target test images; and "margin".
    """
    with reproducible(seed):
        rng = np.random.default_rng(seed)
        source, held_out, pool, test = data.digits(rng, (400, 200, 600, 597))
        (X, y), test = (_shifted(rows, shift, rng) for rows in (pool, test))
        candidates, scores, logits = _adapted(source, held_out, X), {}, {}
        for name, (model, view) in candidates.items():
            scores[name] = training.evaluate(model, view(test[0]), test[1])
            logits[name] = training.predict(model, view(X))
        unseen = max(logits, key=lambda name: training.information_maximization(logits[name]))
        peeked = {name: training.score(logits[name], y) for name in logits}
        seen = max(peeked, key=lambda name: peeked[name].correct)
        scores |= {"chosen without labels": scores[unseen], "chosen by the oracle": scores[seen]}
        few = data.few_per_class(y, 3, rng).flatten()
        for name, rows in {"3 labels per class": few, "all labels (oracle)": slice(None)}.items():
            model = copy.deepcopy(candidates["source only"][0])
            training.fit(model, X[rows], y[rows], lr=1e-3, epochs=100)
            scores[name] = training.evaluate(model, *test)
    return percent(scores, *peeked.values())


def _adapted(source, held_out, X):
    """Return each unsupervised method's model, and what target images go through before it."""
    fresh, as_is = models.MLP(64, n_classes=10), torch.Tensor.clone
    base = source_model(fresh, *source)
    guess = [training.predict(base, images).argmax(-1) for images in (held_out[0], X)]
    of_class = training.label_ratio(guess[0], held_out[1], guess[1], n_classes=10)
    like_source = partial(training.match_statistics, X_target=X, X_source=source[0])
    recoloured = training.coral(source[0], X, ridge=0.1), source[1]
    found = {"source only": (base, as_is), "target statistics": (base, like_source)}
    found["CORAL"] = source_model(fresh, *recoloured), as_is
    of_row = {"importance": training.density_ratio(source[0], X), "label": of_class[source[1]]}
    for kind, weights in of_row.items():
        loss = training.weighted_cross_entropy(weights)
        found[f"{kind} weights"] = source_model(fresh, *source, loss=loss), as_is
    for weight in (0.3, 3.0):
        model, loss = copy.deepcopy(base), training.mmd_loss(X[:128], weight=weight)
        training.fit(model, *source, lr=1e-3, epochs=15, batch_size=128, loss=loss)
        found[f"MMD, weight {weight:g}"] = model, as_is
    return found


def _shifted(rows, name, rng):
    """Return images and labels as the domain `name` has them."""
    X, y = rows
    if name == "label shift":  # the upper five digits become five times rarer
        of_class = [(y == c).nonzero()[:, 0] for c in range(10)]
        kept = torch.cat([r[: len(r) // (1 if c < 5 else 5)] for c, r in enumerate(of_class)])
        kept = kept.sort().values  # in the order they came, not class by class
        return X[kept], y[kept]
    if name == "concept shift":  # 1 and 7, 3 and 8 exchange their names
        return X, torch.tensor([0, 7, 2, 8, 4, 5, 6, 1, 3, 9])[y]
    kind, strength = IMAGES[name]
    return data.shift_digits(X, kind, strength=strength, rng=rng), y
