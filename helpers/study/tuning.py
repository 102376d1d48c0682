"""Settings chosen on validation rows: each method gets the one that does best over seeds."""

from functools import partial
from itertools import pairwise

import numpy as np

from helpers.study.seeds import run_seeds


def columns(name, settings):
    """Return setting to column: `name` for one, a number; ``name, setting`` for each of several."""
    one = np.isscalar(settings)
    return {settings: name} if one else {setting: f"{name}, {setting:g}" for setting in settings}


def try_settings(experiment, tries, seeds, *, workers=None, apart=None, **options):
    """Score each method at each of its settings on validation rows, over the same seeds.

    The setting is varied: `tries` holds, for each method, setting to column of `experiment`, whose
    `options` and argument `apart`, as of `run_seeds`, are fixed, as are the seeds, others than a
    measurement's. Returns method to setting to mean accuracy, and each seed's margin.
    """
    experiment = partial(experiment, score_on="validation", **options)
    found = run_seeds(experiment, seeds, workers=workers, **(apart or {}))
    means = {
        name: {setting: float(found[column].mean().round(9)) for setting, column in of.items()}
        for name, of in tries.items()
    }
    return means, found["margin"]


def best(means):
    """Return each method's setting with the highest mean; of equals, the one tried first."""
    return {name: max(found, key=found.get) for name, found in means.items()}


def ranked(means):
    """Return names from the highest mean to the lowest, as ``a > b = c``."""
    names = sorted(means, key=lambda name: -means[name])
    signs = (" = " if means[a] == means[b] else " > " for a, b in pairwise(names))
    return names[0] + "".join(map("".join, zip(signs, names[1:], strict=True)))
