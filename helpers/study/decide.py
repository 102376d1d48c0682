"""Part 3's decision on the reader's own rows: check them, compare methods, recommend the smallest.

The rows are embeddings from any encoder; what is compared is what to train on top of them.
"""

import copy
import math
from functools import partial
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam

from helpers.data import check_budgets, split
from helpers.data.embeddings import EPS, constant_columns
from helpers.models import with_fresh_head
from helpers.models.mlp import MLP
from helpers.peft import inject_adapter, inject_bitfit, inject_lora
from helpers.study.seeds import reproducible
from helpers.study.verdicts import Comparison, compare, compare_pairs, seeds_needed, summarize
from helpers.training import (
    count_parameters,
    cross_entropy,
    evaluate,
    freeze,
    linear_probe,
    lp_ft,
    predict,
    train,
    unfreeze,
)

RATES = (1e-3, 3e-3, 1e-2)  # validation rows decide which of these a method gets,

FEW_PARAMETERS = ("linear probing", "BitFit")  # or of three times these: few parameters learn

STRENGTHS = (0.1, 1.0, 10.0)  # slower; and which C the logistic head gets

BODY = ["backbone.0", "backbone.2", "backbone.4"]  # the linear layers below the head


def _lora(model):
    inject_lora(model, BODY, r=min(4, model.backbone[0].in_features), lora_alpha=8)


METHODS = {  # what each does to a frozen model before the head, too, is set free to be trained
    "logistic head": None,  # reads the standardised embeddings: there is no model below it
    "scratch": unfreeze,  # from random weights
    "linear probing": freeze,
    "fine-tuning": unfreeze,
    "LP-FT": unfreeze,
    "BitFit": partial(inject_bitfit, targets=BODY),
    "LoRA": _lora,
    "adapters": partial(inject_adapter, targets=BODY, reduction_factor=8),
}


def pretrain(X, y=None, *, steps=300, batch_size=128, lr=3e-3, masked=0.3):
    """Train an `MLP` on the labels y; without any, to restore entries of X that are masked.

    Without labels it is a denoising autoencoder (Vincent et al. 2008, section 2.3,
    doi:10.1145/1390156.1390294): its loss is the mean of (model(x * mask) - x)^2, and a new mask
    sets a share `masked` of the standardised entries to 0, their mean, at each step. The backbone
    encodes; the head, which a fresh one will replace, decodes. Weights, masks and the order of
    batches come from torch's global stream; the epoch of the last of `steps` is completed. The
    `MLP` comes back.
    """

    def _restore(model, x, y):
        mask = torch.rand(x.shape) >= masked
        return F.mse_loss(model(x * mask), x)

    n, d = X.shape
    model = MLP(d, n_classes=d if y is None else int(y.max()) + 1)
    settings = {
        "optimizer": Adam(model.parameters(), lr=lr, fused=True),
        "epochs": math.ceil(steps / math.ceil(n / batch_size)),
        "batch_size": batch_size,
        "generator": torch.default_generator,
        "loss": _restore if y is None else cross_entropy,
    }
    train(model, X, torch.zeros(n, dtype=torch.int64) if y is None else y, **settings)
    return model


def compare_methods(seed, *, data, budget, epochs=60):
    """Train by each of `METHODS` on a few labelled rows, score them on rows that none has seen.

    A seed decides the split, the `budget` labelled rows of each class, as many others that choose
    the learning rate, and the random weights; the rows stay the same, so an interval over seeds
    says nothing of other collections of rows. Where there are source rows the model is pre-trained
    on them, else on the pool without labels; "scratch" and "logistic head" do without. Columns are
    standardised by the pool, those of the source by their own; training takes `epochs` full-batch
    steps, at the rate that gets the most validation rows right, the smallest of equals. Accuracy
    on the test rows in percent comes back for each method, and "margin", that of the closest
    decision behind these and the choices of rates; where classes are `unequal` also
    "method, balanced", the mean over classes, and the same of a "constant answer", the largest
    class.
    """
    if epochs < 2:
        raise ValueError(f"epochs = {epochs} must be 2 or more: LP-FT trains in two phases")
    check_budgets(data, [budget])
    n_classes, rows = len(data.classes), split(data.y, budget, seed=seed)
    X = _standardized(data.X, like=data.X[rows["pool"]], rounding=data.rounding)
    of = {name: (X[numbers], data.y[numbers]) for name, numbers in rows.items()}
    found, margins = {}, []
    with reproducible(seed):
        if data.X_source is None:
            base = pretrain(X[rows["pool"]])
        else:
            source = _standardized(data.X_source, like=data.X_source, rounding=data.rounding)
            base = pretrain(source, data.y_source)
        fresh, start = MLP(X.shape[1], n_classes=n_classes), with_fresh_head(base, n_classes)
        for name in METHODS:
            models = _trained(name, fresh if name == "scratch" else start, *of["few"], epochs)
            scores = [evaluate(model, *of["validation"]) for model in models]
            best = max(range(len(scores)), key=lambda i: scores[i].correct)  # the first of equals
            scores.append(evaluate(models[best], *of["test"]))
            found[name] = 100 * scores[-1].accuracy
            margins += [score.margin for score in scores]
            if data.unequal:
                found[f"{name}, balanced"] = _balanced(models[best], *of["test"])
    if data.unequal:
        share = of["test"][1].bincount() / len(rows["test"])
        found |= {"constant answer": 100 * float(share.max())}
        found["constant answer, balanced"] = 100 / n_classes
    return found | {"margin": min(margins)}


def _balanced(model, X, y):
    return 100 * balanced_accuracy_score(y, predict(model, X).argmax(-1))


def _standardized(X, *, like, rounding=EPS):
    sd = like.std(0, correction=0)
    sd[constant_columns(like, rounding)] = math.inf  # what does not vary in `like` becomes 0
    return ((X - like.mean(0)) / sd).round(decimals=10)


def _prepared(name, start):
    """Return a copy of `start` in which what the method trains, and the head, are trainable."""
    model = copy.deepcopy(start)
    freeze(model)
    METHODS[name](model)
    unfreeze(model.head)
    return model


def _trained(name, start, X, y, epochs):
    """Return one trained model for each learning rate; they start from the same parameters."""
    if name == "logistic head":
        return [_logistic_head(X, y, C) for C in STRENGTHS]
    prepared, models = _prepared(name, start), []
    for lr in RATES:
        model = copy.deepcopy(prepared)
        lr *= 3 if name in FEW_PARAMETERS else 1
        if name == "linear probing":
            linear_probe(model, X, y, epochs=epochs, lr=lr)
        elif name == "LP-FT":
            half = epochs // 2
            lp_ft(model, X, y, probe_epochs=half, epochs=epochs - half, lr=lr)
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            train(model, X, y, optimizer=Adam(trained, lr=lr, fused=True), epochs=epochs)
        models.append(model)
    return models


def _logistic_head(X, y, C):
    """Return scikit-learn's logistic regression as a linear layer."""
    d, n_classes = X.shape[1], int(y.max()) + 1
    # Newton's steps end at the same digits on every processor and L-BFGS's do not, but they cost
    # the third power of the number of parameters
    solver = "newton-cholesky" if d * n_classes <= 1000 else "lbfgs"
    fitted = LogisticRegression(C=C, solver=solver, tol=1e-8, max_iter=1000).fit(X, y)
    weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
    if n_classes == 2:  # scikit-learn has one column for two classes: the other logit is 0
        weight, bias = F.pad(weight, (0, 0, 1, 0)), F.pad(bias, (1, 0))
    head = nn.Linear(d, n_classes)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def method_sizes(data):
    """Count the parameters that each of `METHODS` trains on the labelled rows.

    Of the logistic head it is what scikit-learn fits: one column for two classes.
    """
    d, n_classes = data.X.shape[1], len(data.classes)
    sizes = {"logistic head": (d + 1) * (1 if n_classes == 2 else n_classes)}
    with reproducible(0):
        start = MLP(d, n_classes=n_classes)
        for name in [name for name in METHODS if name != "logistic head"]:
            sizes[name] = count_parameters(_prepared(name, start)).trainable
    return sizes


class Recommendation(NamedTuple):
    """The smallest method that is not significantly worse than the best; prints as sentences.

    `name` is recommended and `best` has the highest mean; `comparisons` holds each other method
    minus the best, adjusted by Holm; `scores` the mean and interval of each method and `sizes` its
    trained parameters. Where classes are unequal, `balanced` holds each method's balanced accuracy
    and the constant answer's, and `constant` the recommended method minus the constant answer.
    """

    name: str
    best: str
    comparisons: dict
    scores: dict
    sizes: dict
    balanced: dict
    constant: Comparison | None

    def __str__(self):
        n, m = self.scores[self.best].n, len(self.comparisons)
        needed = seeds_needed(m)
        size = {name: f"{name} ({size:,} parameters)" for name, size in self.sizes.items()}
        worse = [name for name, c in self.comparisons.items() if c.sign == "▼"]
        lines = [f"Recommended: {size[self.name]}, accuracy {self.scores[self.name]} %"]
        if self.name != self.best:
            c = self.comparisons[self.name]
            lines[0] += (
                f"; {c.numbers} points against the best, {size[self.best]}: {c.verdict}"
                f" (p = {c.p:.2f}, adjusted for {m} comparisons)"
            )
            if n >= needed:
                few = c.detectable_among(m)
                lines[0] += (
                    f", and a difference below {few:.1f} points is too small for them to show"
                )
        elif self.sizes[self.best] == min(self.sizes.values()):
            lines[0] += "; it is the best on average, and no method is smaller"
        else:
            lines[0] += "; it is the best on average, and all smaller ones are significantly worse"
        if worse:
            lines.append(f"Significantly worse than the best: {', '.join(worse)}")
        else:
            lines.append(
                "No method is significantly worse than the best: size alone decides, and that no"
                " difference was seen does not prove that there is none"
            )
        if n < needed:
            lines.append(
                f"With {n} seeds and {m} comparisons no difference, however large, can be"
                f" significant: take at least {needed} seeds"
            )
        return "\n".join(lines + self._shares())

    def _shares(self):
        """Return what accuracy alone hides where classes are unequal."""
        if self.constant is None:
            return []
        top = max(self.sizes, key=lambda name: self.balanced[name].mean)
        return [
            f"Classes are unequal: against a constant answer {self.name} gets"
            f" {self.constant.numbers} points of accuracy, {self.constant.verdict}",
            f"Balanced accuracy, the mean over classes: {self.name} {self.balanced[self.name]} %,"
            f" a constant answer {self.balanced['constant answer'].mean:.1f} %; the highest is"
            f" {self.balanced[top]} % by {top}",
        ]


def recommend(results, sizes):
    """Recommend the smallest method that is not significantly worse than the best.

    `results` are as `helpers.study.run_seeds` returns them, and `sizes` the trained parameters of
    each method, as `method_sizes` counts them; results that have no size are left out. The best
    has the highest mean. Each other method is compared with it, paired by seed, and the p-values
    are adjusted for being several. Of two methods of one size, the better mean wins. The best is
    picked on the scores that it is then compared by, so its own mean is somewhat too high. Where 8
    methods are equally good, at 10 seeds, some are called worse in about 10 of 100 simulated runs,
    not in 5, and the smallest in 2.
    """
    if missing := [name for name in sizes if name not in results]:
        raise ValueError(f"there are no results for {missing}, only for {list(results)}")
    if len(sizes) < 2:
        raise ValueError(f"a recommendation takes at least two methods, there is {list(sizes)}")
    if bad := [name for name, size in sizes.items() if not 0 <= size < math.inf]:
        raise ValueError(f"the size of {bad[0]!r} is {sizes[bad[0]]}: it counts parameters")
    scores = summarize({name: results[name] for name in sizes})
    best = min(sizes, key=lambda name: (-scores[name].mean, sizes[name]))
    pairs = compare_pairs(results, [(name, best) for name in sizes if name != best])
    comparisons = {name: c for (name, _), c in pairs.items()}
    kept = [name for name in sizes if name == best or comparisons[name].sign != "▼"]
    name = min(kept, key=lambda name: (sizes[name], -scores[name].mean))
    told, balanced, constant = "constant answer", {}, None
    if told in results:
        balanced = summarize({m: results[f"{m}, balanced"] for m in (*sizes, told)})
        constant = compare(results[name], results[told])
    return Recommendation(name, best, comparisons, scores, dict(sizes), balanced, constant)
