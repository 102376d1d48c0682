"""What training did to a weight: the update's spectrum, intruder dimensions, length, direction."""

import copy

import numpy as np
import torch

from helpers import peft, training
from helpers.study import part2


def linear_weights(model):
    """Return the weights of a transformer's linear layers in its blocks, adapters merged."""
    model = copy.deepcopy(model)
    peft.merge(model)
    return {
        name: module.weight.detach()
        for name, module in model.blocks.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def intruders(W, W0, *, k=8, threshold=0.6):
    """Count intruder dimensions: new directions among the strongest of a trained weight.

    Of the `k` leading left singular vectors of W, those are counted whose cosine with every one of
    W0's, the pre-trained weight's, is below `threshold` in absolute value (Shuttleworth et al.
    2024, section 3, arXiv:2410.21228).
    """
    U, U0 = (torch.linalg.svd(M, full_matrices=False).U for M in (W, W0))
    return int(((U[:, :k].T @ U0).abs().amax(1) < threshold).sum())


def magnitude_and_direction(W, W0):
    """Return how far the rows of W are from W0's in length and in direction, as means over rows.

    They are the means of | ||w|| - ||w0|| | and of 1 - cos(w, w0) (Liu et al. 2024, section 3.2,
    arXiv:2402.09353).
    """
    magnitude = (W.norm(dim=1) - W0.norm(dim=1)).abs().mean()
    direction = (1 - torch.cosine_similarity(W, W0, dim=1)).mean()
    return float(magnitude), float(direction)


def update_spectrum(seed, *, target, rates, per_class=10, epochs=40):
    """Train techniques and look at what they did to the weights of the blocks.

    The technique is varied, each mergeable and at its learning rate in `rates`; fixed are `target`,
    `per_class` and `epochs`. Returns means over the weight matrices: "technique/share", the
    percentage of the update's squared singular values that the four largest hold;
    "technique/size", its Frobenius norm in percent of the weight's; "technique/intruders" among
    the eight leading directions.
    """
    rows, transferred = part2.samples(seed, target, per_class=per_class), part2.start(seed)
    before, found = linear_weights(transferred), {}
    for name, lr in rates.items():
        part2.check_transferred(name)
        model = part2.prepare(transferred, part2.TECHNIQUES[name], seed=seed)
        part2.WAYS.get(name, training.fit)(model, *rows["few"], lr=lr, epochs=epochs)
        after, looks = linear_weights(model), []
        for layer, W0 in before.items():
            energy = torch.linalg.svdvals(after[layer] - W0) ** 2
            if not energy.sum() > 0:
                raise ValueError(f"{name!r} leaves {layer!r} as it is: it has no update to look at")
            size = (energy.sum() / (W0**2).sum()).sqrt()
            looks.append((energy[:4].sum() / energy.sum(), size, intruders(after[layer], W0)))
        share, size, count = np.mean(looks, axis=0)
        found |= {f"{name}/share": 100 * share, f"{name}/size": 100 * size}
        found[f"{name}/intruders"] = count
    return found
