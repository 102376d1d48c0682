"""Which technique for your own labels: cross-validate candidates, recommend one with a margin.

A candidate is any estimator of scikit-learn's interface: techniques on texts, heads on embeddings.
"""

import math
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from sklearn import model_selection
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils import check_consistent_length

from helpers.data import are_words
from helpers.data.embeddings import EPS, constant_columns, unequal
from helpers.finetuner import TECHNIQUES, FineTuner
from helpers.study.seeds import in_parallel
from helpers.study.verdicts import Comparison, compare_folds, summarize_folds

CONSTANT = "constant answer"  # the largest class, whatever the row: the floor of every comparison

FEW, FITS, FEWER_FITS = 500, 10, 5  # up to `FEW` labels ten fits of each candidate, then five

STRENGTHS = [0.01, 0.1, 1.0, 10.0]  # C of the logistic regression


class Scores(NamedTuple):
    """Scores in percent of each candidate, cheapest first; entry i of each is of the same fold.

    `metric` names them, `labels` is the number of labelled rows, `row` what one right answer more
    is worth in points, and `notes` are sentences on how it was done.
    """

    scores: dict
    metric: str
    folds: int
    labels: int
    row: float
    notes: list


def cross_validate(candidates, X, y, *, seed=0, folds=5, repeats=None, workers=None):
    """Score every candidate on the same folds, by repeated stratified cross-validation.

    `candidates` maps names to estimators, the cheapest first; rows of X are texts or numbers.
    Varied are the candidate and the fold: a fresh clone learns from all folds but one and is scored
    on that one. By default there are `FITS` fits of each candidate up to `FEW` labels, and
    `FEWER_FITS` above; a class with fewer rows than folds makes folds fewer. `Scores` come back, of
    accuracy or, where classes are `unequal`, of balanced accuracy, for any number of workers.
    """
    check_consistent_length(X, y)
    y = np.asarray(y)
    names, counts = np.unique(y, return_counts=True)
    folds, notes = _possible(folds, names, counts)
    fits = FITS if len(y) <= FEW else FEWER_FITS
    repeats = repeats or max(1, round(fits / folds))
    splitter = model_selection.RepeatedStratifiedKFold(
        n_splits=folds, n_repeats=repeats, random_state=seed
    )
    splits = [*splitter.split(y, y)]
    metric, row = "accuracy", 100 / len(y)
    if unequal(counts):
        metric, row = "balanced accuracy", 100 / len(counts) / int(counts.min())
    fit = partial(_score, [*candidates.values()], X, y, splits, metric.replace(" ", "_"))
    table = np.empty((len(splits), len(candidates)))
    jobs = [(i, {}) for i in range(table.size)]
    with closing(in_parallel(fit, jobs, workers, unit="fit")) as done:
        for i, (found, failure) in done:
            if failure is not None:
                name = [*candidates][i % len(candidates)]
                raise ValueError(f"{name!r} failed in cross-validation: {failure}")
            table.flat[i] = found["score"]
    often = "once" if repeats == 1 else f"{repeats} times"
    notes.append(f"{folds} folds, {often}: {len(splits)} fits of each candidate; {metric}")
    return Scores(dict(zip(candidates, table.T, strict=True)), metric, folds, len(y), row, notes)


def _possible(folds, names, counts):
    """Return how many folds the smallest class allows, and a note where they are fewer."""
    name, least = names[counts.argmin()].item(), int(counts.min())
    if len(names) < 2:
        raise ValueError(f"all labels are {name!r}: it takes at least two classes")
    if least < 2:
        raise ValueError(
            f"class {name!r} has one row, and each class needs one to learn from and one to be"
            " scored on: label a second one, or leave this row out"
        )
    if least >= folds:
        return folds, []
    return least, [f"{least} folds, not {folds}: class {name!r} has {least} rows only"]


def _score(estimators, X, y, splits, scoring, i):
    """Return the score of fit i in percent; neighbours in i share the fold."""
    fold, candidate = divmod(i, len(estimators))
    found = model_selection.cross_validate(
        estimators[candidate], X, y, cv=[splits[fold]], scoring=scoring, error_score="raise"
    )
    return {"score": 100 * found["test_score"][0]}


class Recommendation(NamedTuple):
    """What to use, and how sure that is; prints as sentences.

    `best` has the highest mean. `sure` says that `name` is the cheapest candidate that loses less
    than `margin` points to every other one, with its whole interval; else `name` is the best, or
    the default that was given.
    `summaries` holds the mean of each candidate with its interval, `comparisons` each other one
    minus the best, and `constant` the recommended one minus the constant answer. `unsettled` has
    those that the data cannot tell from the best, and for each the number of labels that would: at
    these the interval would lie inside the margin, or leave out 0.
    """

    name: str
    best: str
    sure: bool
    summaries: dict
    comparisons: dict
    constant: Comparison | None
    unsettled: dict
    margin: float
    found: Scores

    def __str__(self):
        margin, labels = f"{self.margin:g} points", self.found.labels
        told = f"Recommended: {self.name}, {self.found.metric} {self.summaries[self.name]} %. "
        if self.sure:
            told += f"It is the cheapest that loses less than {margin} to every other candidate"
            if self.name == self.best:
                told += "; its mean is the highest."
            else:
                told += (
                    f"; to the highest mean, {self.best}: {self.comparisons[self.name].numbers}."
                )
        else:
            rival, needed = next(iter(self.unsettled.items()))
            about = f"about {needed:,}" if needed <= 10 * labels else f"more than {10 * labels:,}"
            if self.name == self.best:
                told += "Its mean is the highest, and, being picked for that, somewhat too high."
            else:
                told += (
                    f"The highest mean is that of {self.best}, but where the data cannot tell, take"
                    " what did best on average in section 3.2 of notebook 3."
                )
            told += (
                f"\nThe data cannot tell: with {labels:,} labels {self.best} may differ by {margin}"
                f" or more, or not, from {'; '.join(self.unsettled)}.\n"
                f"For {rival}, {self.comparisons[rival].numbers}, it would take {about} labels, if"
                " the difference stays and its error falls with the root of their number."
            )
        if worse := [name for name, c in self.comparisons.items() if c.sign == "▼"]:
            told += f"\nWorse than {self.best}: {', '.join(worse)}."
        if self.constant is not None:
            told += (
                f"\nAgainst a constant answer: {self.constant.numbers}, {self.constant.verdict}."
            )
        return told


def recommend(found, margin=2.0, default=None):
    """Recommend the cheapest candidate that loses less than `margin` points to every other one.

    `found` is what `cross_validate` returns. Differences have the interval of `compare_folds`,
    95 %, or more where more than two candidates are cheaper than the best (Bonferroni). It is not
    enough to lose little to the highest mean, which is picked from noise: with few labels it is
    often not the best. Where no candidate qualifies, the data cannot tell, and recommended is
    `default`, unless it is worse than the highest mean, or else that one. In 100 simulated studies
    at most 5 are sure of a candidate that is truly worse than
    the best by more than the margin, tests/test_decide.py.
    """
    names = [*found.scores]
    if len(names) < 2:
        raise ValueError(f"a recommendation takes at least two candidates, there is {names}")
    if not 0 < margin < 100:
        raise ValueError(f"margin = {margin} must be above 0 and below 100 points")
    summaries = summarize_folds(found.scores, folds=found.folds, least=found.row)
    best = max(names, key=lambda name: summaries[name].mean)  # the cheapest of equals
    cheaper = names[: names.index(best)]
    options = {"folds": found.folds, "least": found.row, "tail": 0.05 / max(2, len(cheaper))}

    def _minus(a, b):
        return compare_folds(found.scores[a], found.scores[b], **options)

    others = {name: _minus(name, best) for name in names if name != best}
    close = [a for a in names if all(_minus(a, b).low > -margin for b in names if b != a)]
    kept = default in names and (default == best or not others[default].sign)
    name = (close or [default if kept else best])[0]
    left = {} if close else {
        other: _settling(c, found.labels, margin, cheaper=other in cheaper)
        for other, c in others.items()
        if (other in cheaper and c.low <= -margin and c.high >= 0) or c.high >= margin
    }  # fmt: skip
    constant = _minus(name, CONSTANT) if CONSTANT in names and name != CONSTANT else None
    return Recommendation(name, best, bool(close), summaries, others, constant, left, margin, found)


def _settling(c, labels, margin, *, cheaper):
    """Return the labels at which the interval would be as narrow as a decision needs."""
    narrow = max(margin + c.difference, -c.difference) if cheaper else margin - c.difference
    needed = labels * ((c.difference - c.low) / narrow) ** 2
    unit = 10 ** max(math.floor(math.log10(needed)) - 1, 0)
    return math.ceil(needed / unit) * unit


def text_candidates(classes, model_path="", seed=0, **options):
    """Return the techniques to compare on texts, cheapest first; zero labels where names are words.

    All else is fixed: the encoder, the seed, and what `FineTuner` does by default.
    """
    options = {"model_path": model_path, "random_state": seed, **options}
    tuners = {name: FineTuner(name, **options) for name in TECHNIQUES}
    if not are_words(classes):
        del tuners["zero labels"]
    return {CONSTANT: DummyClassifier(strategy="most_frequent")} | tuners


def head_candidates(rows, seed=0):
    """Return heads to compare on the frozen embeddings of `rows`, cheapest first.

    All read standardised columns. The logistic regression picks its C on training rows; it is
    there twice where source rows have the classes of y: without them, and with them.
    """
    scaled = partial(make_pipeline, _Standardized(rows.rounding))
    left = int(rows.y.bincount().min()) * 4 // 5  # of the smallest class, to learn from
    logistic = LogisticRegression(max_iter=2000)
    if left >= 2:
        inner = model_selection.StratifiedKFold(min(3, left), shuffle=True, random_state=seed)
        logistic = model_selection.GridSearchCV(logistic, {"C": STRENGTHS}, cv=inner)
    heads = {
        CONSTANT: DummyClassifier(strategy="most_frequent"),
        "nearest neighbour": scaled(KNeighborsClassifier(1)),
        "logistic regression": scaled(logistic),
    }
    if rows.source_classes == rows.classes:
        source = rows.X_source.numpy(), np.array(rows.classes)[rows.y_source]
        heads["logistic regression, source rows too"] = _WithSource(scaled(logistic), *source)
    heads["SVM with RBF kernel"] = scaled(SVC())
    heads["MLP"] = scaled(MLPClassifier((64,), max_iter=1000, tol=1e-3, random_state=seed))
    return heads


class _Standardized(StandardScaler):
    """A StandardScaler in which columns that vary by rounding only become 0."""

    def __init__(self, rounding=EPS):
        super().__init__()
        self.rounding = rounding

    def fit(self, X, y=None):
        super().fit(X)
        self.scale_[constant_columns(torch.as_tensor(X), self.rounding).numpy()] = math.inf
        return self


class _WithSource(ClassifierMixin, BaseEstimator):
    """An estimator that learns from the source rows, too."""

    def __init__(self, estimator, X, y):
        self.estimator, self.X, self.y = estimator, X, y

    def fit(self, X, y):
        self.fitted_ = clone(self.estimator).fit(np.r_[X, self.X], np.r_[y, self.y])
        self.classes_ = self.fitted_.classes_
        return self

    def predict(self, X):
        return self.fitted_.predict(X)
