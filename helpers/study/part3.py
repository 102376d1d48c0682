"""Part 3's studies of equal budgets: of trained parameters, and of compute."""

import math
from typing import NamedTuple

import torch
from torch.optim import Adam

from helpers import models, peft, training
from helpers.study import digits, part2
from helpers.study.seeds import percent, reproducible
from helpers.study.tuning import best, columns, try_settings

ENOUGH = 2_000  # steps of linear probing, after which its accuracy hardly changes

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # learning rates; `rates_for` says whose are which

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


# Techniques of (nearly) the same number of trainable parameters, the head's 330 not counted
BUDGETS = {
    192: {
        "LoRA": part2.lora("fc2", r=1),
        "DoRA": part2.lora("v_proj", r=1, function=peft.inject_dora),
        "VeRA": part2.technique(peft.inject_vera, "fc2", r=64),
        "OFT": part2.technique(peft.inject_oft, *ATTENTION, "fc2", block_size=2),
        "BitFit": part2.technique(peft.inject_bitfit, "fc1", "fc2"),
        "LayerNorm tuning": part2.technique(peft.inject_layer_norm, "norm2", "norm"),
        "(IA)3": part2.technique(peft.inject_ia3, "v_proj", feedforward=["fc2"]),
        "adapters": part2.adapter("fc2", reduction_factor=32),
        "prefix tuning": part2.technique(peft.inject_prefix, "attention", num_virtual_tokens=1),
        "prompt tuning": part2.technique(peft.inject_prompt, "embed", num_virtual_tokens=6),
    },
    1_792: {
        "LoRA": part2.lora(*part2.LINEAR, r=2),
        "PiSSA": part2.lora(*part2.LINEAR, r=2, init="pissa"),
        "DoRA": part2.lora(*ATTENTION, r=3, function=peft.inject_dora),
        "VeRA": part2.technique(peft.inject_vera, *part2.LINEAR, r=112),
        "OFT": part2.technique(peft.inject_oft, *part2.LINEAR, block_size=8),
        "adapters": part2.adapter("fc2", reduction_factor=2.45),
        "prefix tuning": part2.technique(peft.inject_prefix, "attention", num_virtual_tokens=14),
    },
    17_920: {
        "LoRA": part2.lora(*part2.LINEAR, r=20),
        "DoRA": part2.lora(*part2.LINEAR, r=19, function=peft.inject_dora),
        "adapters": part2.adapter("fc2", reduction_factor=0.2327),
        **dict.fromkeys(("full fine-tuning", "LP-FT", "L2-SP", "from scratch"), part2.everything),
    },
}

CONFIGURATIONS = {"linear probing": part2.head_only} | {
    f"{name}, {budget:,}": way for budget, ways in BUDGETS.items() for name, way in ways.items()
}

# What is compared from one label of each class to 50
BY_LABELS = [f"{name}, 17,920" for name in ("from scratch", "full fine-tuning", "LP-FT")]
BY_LABELS += ["LoRA, 1,792", "linear probing"]


def on_codes(code, *, r=2):
    """Return QLoRA as an entry of a table: the base is quantised, then LoRA is added to it."""

    def _inject(model, generator=None):
        peft.quantize_layers(model, part2.LINEAR, code=code)
        peft.inject_lora(model, part2.LINEAR, r=r, lora_alpha=2 * r, generator=generator)

    return _inject


FOUR_BIT = {  # of the same rank as "LoRA, 1,792"
    "QLoRA, NF4": on_codes("nf4"),
    "QLoRA, int4": on_codes("int4"),
    "LoftQ, NF4": part2.technique(peft.inject_loftq, *part2.LINEAR, r=2, lora_alpha=4),
}


def rates_for(name):
    """Return the learning rates that one of `CONFIGURATIONS` or `FOUR_BIT` chooses from.

    They are three neighbours of `RATES`, ascending, from a wider search on validation images: none
    outside was better beyond noise.
    """
    way, _, budget = name.partition(", ")
    if way in ("full fine-tuning", "LP-FT", "L2-SP", "from scratch"):
        return RATES[:3]
    if name in ("linear probing", "DoRA, 1,792", "adapters, 17,920"):
        return RATES[2:5]
    low_rank = way in ("LoRA", "PiSSA", "DoRA", "QLoRA", "LoftQ") and budget != "192"
    return RATES[1:4] if low_rank else RATES[3:]


class Cost(NamedTuple):
    """What a configuration costs on one batch.

    `flops` are those of a step, as `helpers.training.operations` counts them; linear probing
    computes the frozen body's features once, before the first. `memory` is that of a step in
    float64: weights and buffers, gradients, Adam's state, activations. `steps` are as many as cost
    what full fine-tuning costs in the epochs asked for, at least 1; linear probing gets `ENOUGH`,
    since it could have far more.
    """

    trained: int
    flops: int
    memory: int
    steps: int


def costs(*, epochs=40, configurations=CONFIGURATIONS, per_class=10):
    """Count what each configuration trains, computes and keeps, and its steps at equal compute.

    The configuration is varied; fixed are the `epochs` of full fine-tuning and the labelled images
    of each digit, of which a batch has at most 10. LP-FT's first phase, which on cached features
    costs less than a step, is left out. Returns a `Cost` for each name.
    """
    (X, y), found = digits.samples(0, "turned", per_class=min(per_class, 10))["few"], {}
    with reproducible(0):
        base = models.TinyTransformer()
        full = training.operations(part2.prepare(base, part2.everything), X, y)
        whole = epochs * math.ceil(per_class / 10) * full
        for name, way in configurations.items():
            model = part2.prepare(base, way)
            counted = training.count_parameters(model)
            probing, rows = name.startswith("linear probing"), (model, X)
            if probing:
                rows = model.head, training.extract_features(model, X)
            flops = training.operations(*rows, y)
            parts = training.step_memory(*counted, training.activation_bytes(model, X, y))
            memory = sum(parts.values()) + sum(b.nbytes for b in model.buffers())
            if name.startswith("L2-SP"):  # w0, and w - w0, whose square is kept for the backward
                memory += 16 * counted.trainable
            steps = ENOUGH if probing else max(whole // flops, 1)
            found[name] = Cost(counted.trainable, flops, memory, steps)
    return found


def pareto_front(points):
    """Return the names that no other beats, none costing as little and scoring higher.

    `points` are cost, the lower the better, and `Summary` of the score by name; what comes back
    goes from cheap to dear.
    """
    front, highest = [], -math.inf
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1].mean)):
        if points[name][1].mean > highest:
            front.append(name)
            highest = points[name][1].mean
    return front


def learn(model, rows, *, lr, marks, name="", seed=0):
    """Train what is trainable by Adam, and pause at each of `marks`, steps in ascending order.

    A step takes 100 rows, or all if there are fewer; their order follows `seed`, and training
    pauses at the end of an epoch. By `name`, linear probing trains on cached features, LP-FT does
    so before the first step, 40 epochs at 1e-2, and L2-SP adds ||w - w0||^2 / 2 to the loss.
    Yields each mark that is reached.
    """
    loss = training.cross_entropy
    if name.startswith("linear probing"):
        model, rows = model.head, (training.extract_features(model, rows[0]), rows[1])
    elif name.startswith("LP-FT"):
        training.linear_probe(model, *rows, epochs=40, lr=1e-2)
        training.unfreeze(model)
    elif name.startswith("L2-SP"):
        loss = training.l2_sp(model, alpha=1.0, fresh="")
    optimizer = Adam(training.param_groups(model, {"": lr}), fused=True)
    order = torch.Generator().manual_seed(seed)
    options = {"optimizer": optimizer, "batch_size": 100, "generator": order, "loss": loss}
    done, steps = 0, math.ceil(len(rows[0]) / 100)  # of an epoch
    for mark in marks:
        epochs = max(round(mark / steps), done + 1)
        training.train(model, *rows, epochs=epochs - done, **options)
        done = epochs
        yield mark


def compare_budgets(
    seed, *, target, settings, score_on="test", per_class=10, most=25, configurations=CONFIGURATIONS
):
    """Adapt the pre-trained model, its own head included, and score it on both domains.

    The configuration is varied, at its (rate, steps) in `settings`, or at several rates, each with
    several steps after which to score; fixed are `target`, `per_class` and `most`. Pre-training,
    rows and new parameters follow the seed. Settings are chosen on "validation" images,
    `score_on`. Returns accuracies in percent on the target, "name", or "name, rate, steps" where
    there are several, and "name/source" on the source's images; "not adapted"; and "margin".
    """
    rows = digits.samples(seed, target, per_class=per_class, most=most)
    base, scores = digits.pretrained(seed), {}
    scored = {"": rows[score_on]} | ({"/source": rows["source test"]} if score_on == "test" else {})

    def _note(column, model):
        scores.update({f"{column}{end}": training.evaluate(model, *r) for end, r in scored.items()})

    with reproducible(seed):
        fresh = models.TinyTransformer()
        for name, (rates, steps) in settings.items():
            for lr, first in columns(name, rates).items():
                begin, marks = fresh if name[:12] == "from scratch" else base, columns(first, steps)
                model = part2.prepare(begin, configurations[name], seed=seed)
                for mark in learn(model, rows["few"], lr=lr, marks=marks, name=name, seed=seed):
                    _note(marks[mark], model)
        if score_on == "test":
            _note("not adapted", base)
    return percent(scores)


def choose_settings(target, seeds, *, steps, workers=None, **options):
    """Choose each configuration's learning rate and number of steps on validation images.

    Rate and steps are varied: all of a configuration's `steps` and half of them; linear probing,
    which has many, also tries a tenth and a fiftieth. Fixed are `target` and the `options` of
    `compare_budgets`. Seeds are others than those of the measurement; without any, the middle rate
    and all steps are taken. Returns (rate, steps) of each, of equals the lower rate and the fewer
    steps; and each seed's margin.
    """
    grid, tries = {}, {}
    for name, n in steps.items():
        parts = (50, 10, 2, 1) if name.startswith("linear probing") else (2, 1)
        rates, marks = grid[name] = rates_for(name), sorted({max(n // part, 1) for part in parts})
        at = columns(name, rates)
        tries[name] = {(lr, m): c for lr in rates for m, c in columns(at[lr], marks).items()}
    if not len(seeds):
        return {n: (rates[len(rates) // 2], marks[-1]) for n, (rates, marks) in grid.items()}, []
    options |= {"target": target, "settings": grid}
    means, margins = try_settings(compare_budgets, tries, seeds, workers=workers, **options)
    return best(means), margins
