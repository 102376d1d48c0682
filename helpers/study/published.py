"""The published notebook: its cells, the kernel that had run them, and many seeds of them."""

import copy
from functools import partial

import numpy as np
import torch

from helpers import data, models, training
from helpers.study.seeds import percent, reproducible

PUBLISHED = {  # what the published notebook sets; from "features" on, for `fine_tune`
    "labels": 20,
    "shift_scale": 1.5,
    "base": {"hidden": 64, "epochs": 50, "lr": 1e-3},
    "features": {"from_stage": -1, "epochs": 40, "lr": 1e-3},
    "tuning": {"from_stage": 1, "epochs": 50, "lr": 2e-4, "head_lr": 1e-3},
    "adaptation": {"from_stage": 2, "epochs": 60, "lr": 5e-4},
}


def fast_forward(task, n, cell, *, hidden=64):
    """Draw what the first `n` of eight earlier cell runs drew before `cell`, and drop it.

    The published kernel had run pre-training twice before "pre-training", and fine-tuning and
    adaptation three times each between feature extraction and "fine-tuning". An initial model and
    a fresh head come from torch's global stream, a domain's noise from numpy's. Nothing comes back;
    both streams stand where they stood then.
    """
    if cell == "pre-training":
        for _ in range(min(n, 2)):
            models.MLP(task.X_train.shape[1], hidden=hidden, n_classes=task.n_classes)
    if cell == "fine-tuning":
        for _ in range(n - 2):
            torch.nn.Linear(32, task.n_classes)
        for _ in range(n - 5):
            np.random.normal(size=task.X_test.shape)


def published_cells(task, *, before, rng, labels, shift_scale, base, features, tuning, adaptation):
    """Run the cells of sections 1.2 to 1.5 on a task.

    All is fixed: the settings are those of `PUBLISHED`, or others; `before(cell)`, called before
    each, may move torch's stream, and the noise comes from `rng`. Returns model, rows and labels
    to score for each published number, in the order of the notebook.
    """
    before("pre-training")
    model = pretrain(task, **base)
    before("feature extraction")
    probed, _ = training.fine_tune(model, *task.train, **features)
    before("fine-tuning")
    tuned, _ = training.fine_tune(model, *task.train, **tuning)
    X, y = data.shifted_domain(*task.test, scale=shift_scale, rng=rng)
    before("adaptation")
    adapted, _ = training.fine_tune(model, X[:labels], y[:labels], **adaptation)
    found = {"pre-trained": model, "feature extraction": probed, "fine-tuning": tuned}
    return {name: (model, *task.test) for name, model in found.items()} | {
        "before adaptation": (model, X, y),
        "after adaptation": (adapted, X, y),
    }


def replay(task, n, *, seed=42, **settings):
    """Run the published cells on a clean kernel, with the first `n` of its earlier runs between.

    The number of runs is varied, `seed`, from which both global streams start, and the settings of
    `PUBLISHED`, or others, are fixed. Returns what `published_cells` does.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)
    of = PUBLISHED | settings
    before = partial(fast_forward, task, n, hidden=of["base"]["hidden"])
    return published_cells(task, before=before, rng=np.random, **of)


def published_protocol(seed, *, task=None, leaks=True, **settings):
    """Run sections 1.2 to 1.5 once, data draw, split and initialisation all following the seed.

    The seed is varied; options of the `task` and the settings of `PUBLISHED`, or others, are fixed.
    Returns accuracies in percent, the published ones and, with `leaks`, their corrected versions;
    and "margin", that of the closest decision behind them.
    """
    of = PUBLISHED | settings

    def _again(cell=None):  # pairs: all start from the same random weights
        torch.manual_seed(seed)

    with reproducible(seed):
        drawn = data.published_task(seed, **task or {})
        runs = published_cells(drawn, before=_again, rng=np.random.default_rng(seed), **of)
        (base, X, y), (adapted, *_), n = *list(runs.values())[-2:], of["labels"]
        if leaks:
            kept, _ = training.fine_tune(base, X[:n], y[:n], fresh_head=False, **of["adaptation"])
            _again()
            longer, _ = training.fine_tune(base, *drawn.train, **of["tuning"] | {"epochs": 200})
            _again()
            honest = data.published_task(seed, scale_on="train", **task or {})
            training.freeze(base.backbone)
            fitted = copy.deepcopy(base)
            features = training.extract_features(base, drawn.X_train)
            fitted.head = training.logistic_head(features, drawn.y_train)
            runs |= {
                "before, other rows": (base, X[n:], y[n:]),
                "after, other rows": (adapted, X[n:], y[n:]),
                "after from the trained head, other rows": (kept, X[n:], y[n:]),
                "logistic head": (fitted, *drawn.test),
                "fine-tuning, longer": (longer, *drawn.test),
                "pre-trained, scaler on training rows": (
                    pretrain(honest, **of["base"]),
                    *honest.test,
                ),
            }
        return percent({name: training.evaluate(*run) for name, run in runs.items()})


def pretrain(task, *, hidden=64, epochs=50, lr=1e-3):
    """Train all of a new MLP on a task; only its width and the steps vary. Returns the model."""
    model = models.MLP(task.X_train.shape[1], hidden=hidden, n_classes=task.n_classes)
    training.fit(model, *task.train, lr=lr, epochs=epochs)
    return model
