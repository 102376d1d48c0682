"""Part 3's study of equal budgets: of trained parameters, and of compute."""

import math
from typing import NamedTuple

import torch

from helpers import peft, training
from helpers.study import part1, part2
from helpers.study.seeds import stream

STEPS = 12  # of LoRA on q and v; every other technique gets as many as cost the same

BATCH = 16  # rows of a step

LORA = "LoRA, 24,576"  # Part 2's, whose operations are everyone's budget of compute


def whole(*targets):
    """Return a technique that trains some matrices of the top two blocks, biases included."""

    def _unfreeze(model, generator=None):
        names = part2.within(model, targets, part2.TOP)
        training.unfreeze(*map(model.get_submodule, names))

    _unfreeze.first = part2.TOP[0]
    return _unfreeze


def sized(function, *targets, **options):
    """Return a technique of the top two blocks whose `options` are functions of the width d."""

    def _inject(model, generator=None):
        given = {name: choose(model.encoder.d) for name, choose in options.items()}
        part2.in_top(function, *targets, **given)(model, generator)

    _inject.first = part2.TOP[0]
    return _inject


def oft(*targets, block_size):
    """Return OFT in blocks of the size nearest to this that divides d."""

    def _nearest(d):
        return min((b for b in range(2, d + 1) if d % b == 0), key=lambda b: abs(b - block_size))

    return sized(peft.inject_oft, *targets, block_size=_nearest)


def adapters(units):
    """Return adapters with about this many units in the middle."""
    factor = {"reduction_factor": lambda d: max(1, d // units)}
    return sized(peft.inject_adapter, "out_proj", "fc2", **factor)


def lora(r):
    """Return LoRA on q and v of this rank, or of rank d where that is smaller; alpha = 2 r."""
    ranks = {"r": lambda d: min(r, d), "lora_alpha": lambda d: 2 * min(r, d)}
    return sized(peft.inject_lora, "q_proj", "v_proj", **ranks)


# Of each budget, besides the head, the techniques that have a setting of about this size in the
# encoder's top two blocks
BUDGETS = {
    3_072: {
        "LoRA": part2.PLACES["r = 1; alpha = 2"],
        "OFT": oft(*part2.LINEAR[:4], block_size=3),
        "VeRA": part2.in_top(peft.inject_vera, "q_proj", "v_proj", r=384),
        "BitFit": part2.in_top(peft.inject_bitfit, "q_proj", "v_proj", "out_proj", "fc2"),
        "prefix tuning": part2.in_top(peft.inject_prefix, "attention", num_virtual_tokens=2),
    },
    24_576: {
        "LoRA": part2.TECHNIQUES["LoRA"],
        "OFT": oft("q_proj", "v_proj", block_size=32),
        "adapters": adapters(8),
        "prefix tuning": part2.in_top(peft.inject_prefix, "attention", num_virtual_tokens=16),
    },
    294_912: {
        "LoRA": lora(96),
        "adapters": adapters(96),
        "v alone, whole": whole("v_proj"),
    },
}

CELLS = {f"{name}, {size:,}": way for size, ways in BUDGETS.items() for name, way in ways.items()}

RATES = {  # of each, two to choose from: the more is trained, the lower
    "LoRA, 3,072": (3e-3, 1e-2),
    "OFT, 3,072": (1e-2, 3e-2),
    "VeRA, 3,072": (3e-2, 1e-1),
    "BitFit, 3,072": (3e-3, 1e-2),
    "prefix tuning, 3,072": (1e-1, 3e-1),
    LORA: (1e-3, 3e-3),
    "OFT, 24,576": (3e-3, 1e-2),
    "adapters, 24,576": (1e-3, 3e-3),
    "prefix tuning, 24,576": (3e-2, 1e-1),
    "LoRA, 294,912": (3e-4, 1e-3),
    "adapters, 294,912": (3e-4, 1e-3),
    "v alone, whole, 294,912": (1e-4, 3e-4),
}


class Cost(NamedTuple):
    """What a technique trains besides the head, the operations of a step, and its steps."""

    trained: int
    operations: int
    steps: int


def costs(*, steps=STEPS, folder=""):
    """Count what each technique trains, and the steps that cost what `steps` of LoRA do.

    The technique is varied over `CELLS`; a step is on 16 headlines. Returns a `Cost` for each.
    """
    rows = part1.costs({"": part1.WAYS["linear probing"]} | CELLS, folder=folder)
    found = {name: (trained, work) for name, trained, work, _ in rows}
    head, most = found[""][0], steps * found[LORA][1]
    return {
        name: Cost(found[name][0] - head, found[name][1], max(1, round(most / found[name][1])))
        for name in CELLS
    }


def learn(model, X, y, *, lr, steps=STEPS, batch=BATCH, seed=0):
    """Train what is trainable for some steps of `batch` rows; their order follows `seed`.

    Each row comes as often as any other, or once more where they do not share out.
    """
    order = torch.Generator().manual_seed(stream(seed, "batches"))
    passes = math.ceil(steps * batch / len(y))
    rows = torch.cat([torch.randperm(len(y), generator=order) for _ in range(passes)])
    rows = rows[: steps * batch]
    options = {"epochs": 1, "batch_size": batch, "generator": order}
    return training.fit(model, part1.some(X, rows), y[rows], lr=lr, **options)


class Train(part2.Train):
    """Train a model by one of `CELLS`, for its number of steps; `steps` are by name."""

    def __init__(self, steps):
        super().__init__(CELLS)
        self.steps = steps

    def fit(self, model, X, y, *, technique, lr):
        """Train what is trainable."""
        rates = {"encoder": lr, "head": part2.HEAD_RATE}
        return learn(model, X, y, lr=rates, steps=self.steps[technique])
