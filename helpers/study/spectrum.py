"""What training did to a weight: the update's spectrum, intruder dimensions, length, direction."""

import copy

import numpy as np
import torch

from helpers import peft
from helpers.study import part1, part2
from helpers.study.seeds import reproducible


def weights(model):
    """Return the query and value weights that the techniques of Part 2 change, adapters merged."""
    model = copy.deepcopy(model)
    peft.merge(model)
    names = part2.within(model, ["q_proj", "v_proj"], part2.TOP)
    return {name: model.get_submodule(name).weight.detach() for name in names}


def intruders(W, W0, *, k=8, threshold=0.6):
    """Count intruder dimensions: new directions among the strongest of a trained weight.

    Of the `k` leading left singular vectors of W, those are counted whose cosine with every one of
    W0's, the pre-trained weight's, is below `threshold` in absolute value (Shuttleworth et al.
    2024, section 3, arXiv:2410.21228).
    """
    U, U0 = (torch.linalg.svd(M, full_matrices=False).U for M in (W, W0))
    return int(((U[:, :k].T @ U0).abs().amax(1) < threshold).sum())


def update_spectrum(seed, *, rates, folder=""):
    """Train techniques on 8 headlines of each topic and look at what they did to q and v.

    The technique is varied, each mergeable and at its learning rate in `rates`. Returns means over
    the weight matrices: "technique/share", the percentage of the update's squared singular values
    that the eight largest hold; "technique/size", its Frobenius norm in percent of the weight's;
    "technique/intruders" among the eight leading directions.
    """
    found, train = {}, part2.Train()
    with reproducible(seed):
        begin, (X, y), _ = part2.few(seed, folder=folder)
        X, before = part1.cached(begin, X, part2.TOP[0]), weights(begin)
        for name, lr in rates.items():
            model, looks = copy.deepcopy(begin), []
            train(model, X, y, technique=name, lr=lr)
            for layer, W in weights(model).items():
                energy = torch.linalg.svdvals(W - before[layer]) ** 2
                if not energy.sum() > 0:
                    raise ValueError(f"{name!r} leaves {layer!r} as it is: no update to look at")
                size = (energy.sum() / (before[layer] ** 2).sum()).sqrt()
                looks.append((energy[:8].sum() / energy.sum(), size, intruders(W, before[layer])))
            share, size, count = np.mean(looks, axis=0)
            found |= {f"{name}/share": 100 * share, f"{name}/size": 100 * size}
            found[f"{name}/intruders"] = count
    return found
