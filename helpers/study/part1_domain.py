"""Part 1's studies on cached features: from labelled articles to headlines; names as labels."""

from functools import partial

import numpy as np
import torch
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from helpers import data, training
from helpers.study.part1 import name_vectors
from helpers.study.seeds import percent, reproducible

UNSUPERVISED = (
    "source only", "target statistics", "CORAL", "importance weights", "label weights",
    "self-training",
)  # fmt: skip


def adaptation(seed, *, articles, headlines, y, shift="none"):
    """Adapt a head from labelled articles to headlines without labels; also with a few.

    The method is varied. Fixed are the features of the same stories as `articles` and as
    `headlines`, their labels `y`, and the `shift`: with "labels" the target's last topics are five
    times rarer than its first two. Source, target and test are other stories. Unsupervised methods
    see target rows, never their labels nor test rows. Returns accuracy in percent on headlines, of
    "k labels" with that many target labels of each topic alone and "articles + k labels"; "margin".
    """
    with reproducible(seed):
        rows = data.draw(y, seed, source=70, target=40, test=40)
        if shift == "labels":
            rows |= {name: _rarer(rows[name]) for name in ("target", "test")}
        S, T, test = (
            X[r] for X, r in zip((articles, headlines, headlines), _flat(rows), strict=True)
        )
        mean, sd = S.mean(0), S.std(0)  # of source rows: all that is known before adaptation
        S, T, test, S_short = ((X - mean) / sd for X in (S, T, test, headlines[_flat(rows)[0]]))
        t, t_target, t_test = (y[r] for r in _flat(rows))
        fit = partial(training.logistic_head, C=_penalty(S, t))
        found = _adapted(fit, S, t, T, test)
        scores = {name: training.score(on_test, t_test) for name, (on_test, _) in found.items()}
        sure = {n: training.information_maximization(on_T) for n, (_, on_T) in found.items()}
        peeked = {n: training.score(on_T, t_target) for n, (_, on_T) in found.items()}
        scores["chosen without labels"] = scores[max(sure, key=sure.get)]
        scores["chosen by the oracle"] = scores[max(peeked, key=lambda n: peeked[n].correct)]
        head = fit(S_short, t)
        scores["the same stories' headlines"] = training.score(head(test), t_test)
        if shift == "none":
            for k in (1, 4, 16, 40):
                few = torch.arange(len(T)).view(rows["target"].shape)[:, :k].flatten()
                for name, X, labels in (
                    (f"{k} labels", T[few], t_target[few]),
                    (
                        f"articles + {k} labels",
                        torch.cat([S, T[few]]),
                        torch.cat([t, t_target[few]]),
                    ),
                ):
                    head = fit(X, labels)
                    scores[name] = training.score(head(test), t_test)
    return percent(scores, *peeked.values())


def _flat(rows):
    return [r.flatten() for r in (rows["source"], rows["target"], rows["test"])]


def _rarer(rows):
    """Return rows of the first two topics, and every fifth of the others'."""
    return torch.cat([rows[:2].flatten(), rows[2:, ::5].flatten()])


def _penalty(S, t):
    """Return the C that does best on the other half of the source rows."""
    half = torch.arange(len(t)) % 2 == 0  # rows are sorted by topic: halves of each
    heads = {C: training.logistic_head(S[half], t[half], C=C) for C in (1e-3, 1e-2, 1e-1)}
    return max(heads, key=lambda C: training.score(heads[C](S[~half]), t[~half]).correct)


def _adapted(fit, S, t, T, test):
    """Return for each unsupervised method its logits of test rows and of target rows."""
    n_classes = int(t.max()) + 1
    head = fit(S, t)
    found = {"source only": (head(test), head(T))}
    moved = [training.match_statistics(X, T, S) for X in (test, T)]
    found["target statistics"] = tuple(map(head, moved))
    heads = {"CORAL": fit(training.coral(S, T, ridge=1.0), t)}
    heads["importance weights"] = fit(S, t, weights=training.density_ratio(S, T))
    half = torch.arange(len(t)) % 2 == 0
    guess = fit(S[half], t[half])
    ratio = training.label_ratio(
        guess(S[~half]).argmax(1), t[~half], guess(T).argmax(1), n_classes=n_classes
    )
    heads["label weights"] = fit(S, t, weights=ratio.clamp_min(0.01)[t])
    student = head
    for _ in range(3):
        p, label = student(T).softmax(1).max(1)
        sure = p >= p.median()  # the surer half of the target rows
        student = fit(torch.cat([S, T[sure]]), torch.cat([t, label[sure]]))
    heads["self-training"] = student
    return found | {name: (h(test), h(T)) for name, h in heads.items()}


def selection_leak(seed):
    """Select columns by their labels inside or outside of cross-validation, all of them noise."""
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(100, 500)), rng.permutation(np.arange(100) % 2)
    head = make_pipeline(SelectKBest(k=10), LogisticRegression())
    inside = cross_val_score(head, X, y, cv=5).mean()
    outside = cross_val_score(head, SelectKBest(k=10).fit_transform(X, y), y, cv=5).mean()
    return {"selected on training rows": 100 * inside, "selected on all rows": 100 * outside}


def names_help(seed, *, texts, features, y, folder=""):
    """Fit logistic heads with and without the topics' names as labelled texts, per label budget."""
    names = name_vectors(texts, folder)
    rows = data.draw(y, seed, train=16, test=40)
    test, labels = features[rows["test"].flatten()], y[rows["test"].flatten()]
    scores = {}
    for k in (1, 4, 16):
        few = rows["train"][:, :k].flatten()
        X, t = features[few], y[few]
        both = torch.cat([X, names]), torch.cat([t, torch.arange(len(names))])
        for name, given in (("without", (X, t)), ("with names", both)):
            scores[f"{name}/{k}"] = training.score(training.logistic_head(*given)(test), labels)
    return percent(scores)
