"""Part 3's studies of equal budgets: of trained parameters, and of compute."""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch.optim import Adam

from helpers.models import TinyTransformer
from helpers.peft import (
    inject_adapter,
    inject_bitfit,
    inject_dora,
    inject_ia3,
    inject_layer_norm,
    inject_loftq,
    inject_lora,
    inject_oft,
    inject_prefix,
    inject_prompt,
    inject_vera,
    quantize_layers,
)
from helpers.study.part2 import LINEAR, prepare, pretrained, samples, technique
from helpers.study.seeds import percent, reproducible, run_seeds
from helpers.training import (
    activation_bytes,
    count_parameters,
    cross_entropy,
    evaluate,
    extract_features,
    l2_sp,
    linear_probe,
    operations,
    param_groups,
    step_memory,
    train,
    unfreeze,
)

ENOUGH = 2_000  # steps of linear probing, after which its accuracy hardly changes

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # learning rates; `rates_for` says whose are which

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


def _lora(*targets, r, **options):
    return technique(inject_lora, *targets, r=r, lora_alpha=2 * r, **options)


def _dora(*targets, r):
    return technique(inject_dora, *targets, r=r, lora_alpha=2 * r)


def _everything(model, generator=None):
    unfreeze(model)


def _nothing(model, generator=None):
    """Train the head alone, which `prepare` unfreezes."""


# Techniques of (nearly) the same number of trainable parameters, the head's 330 not counted
BUDGETS = {
    192: {
        "LoRA": _lora("fc2", r=1),
        "DoRA": _dora("v_proj", r=1),
        "VeRA": technique(inject_vera, "fc2", r=64),
        "OFT": technique(inject_oft, *ATTENTION, "fc2", block_size=2),
        "BitFit": technique(inject_bitfit, "fc1", "fc2"),
        "LayerNorm tuning": technique(inject_layer_norm, "norm2", "norm"),
        "(IA)3": technique(inject_ia3, "v_proj", feedforward=["fc2"]),
        "adapters": technique(inject_adapter, "fc2", reduction_factor=32),
        "prefix tuning": technique(inject_prefix, "attention", num_virtual_tokens=1),
        "prompt tuning": technique(inject_prompt, "embed", num_virtual_tokens=6),
    },
    1_792: {
        "LoRA": _lora(*LINEAR, r=2),
        "PiSSA": _lora(*LINEAR, r=2, init="pissa"),
        "DoRA": _dora(*ATTENTION, r=3),
        "VeRA": technique(inject_vera, *LINEAR, r=112),
        "OFT": technique(inject_oft, *LINEAR, block_size=8),
        "adapters": technique(inject_adapter, "fc2", reduction_factor=2.45),
        "prefix tuning": technique(inject_prefix, "attention", num_virtual_tokens=14),
    },
    17_920: {
        "LoRA": _lora(*LINEAR, r=20),
        "DoRA": _dora(*LINEAR, r=19),
        "adapters": technique(inject_adapter, "fc2", reduction_factor=0.2327),
        "full fine-tuning": _everything,
        "LP-FT": _everything,
        "L2-SP": _everything,
        "from scratch": _everything,
    },
}

CONFIGURATIONS = {"linear probing": _nothing} | {
    f"{name}, {budget:,}": way for budget, ways in BUDGETS.items() for name, way in ways.items()
}

BY_LABELS = (  # what is compared from one label of each class to 50
    *("from scratch, 17,920", "full fine-tuning, 17,920", "LP-FT, 17,920"),
    *("LoRA, 1,792", "linear probing"),
)


def _on_codes(code, *, r=2):
    """Quantise the base, then add LoRA to it (QLoRA)."""

    def _inject(model, generator=None):
        quantize_layers(model, LINEAR, code=code)
        inject_lora(model, LINEAR, r=r, lora_alpha=2 * r, generator=generator)

    return _inject


FOUR_BIT = {  # of the same rank as "LoRA, 1,792"
    "QLoRA, NF4": _on_codes("nf4"),
    "QLoRA, int4": _on_codes("int4"),
    "LoftQ, NF4": technique(inject_loftq, *LINEAR, r=2, lora_alpha=4),
}


def rates_for(name):
    """Return the learning rates that a configuration chooses from.

    Three neighbours of `RATES`. They come from a wider search, on validation images: none outside
    was better beyond noise.

    Parameters
    ----------
    name : str
        A key of `CONFIGURATIONS` or `FOUR_BIT`.

    Returns
    -------
    tuple of float
        Ascending.
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

    Attributes
    ----------
    trained : int
        Parameters.
    flops : int
        Operations of one step, as `helpers.training.operations` counts them. Linear probing
        computes the frozen body's features once, before the first step.
    memory : int
        Bytes of one step in float64: weights and buffers, gradients, Adam's state, activations.
    steps : int
        As many as cost what full fine-tuning costs in the epochs asked for; at least 1. Linear
        probing gets `ENOUGH`, since it could have far more.
    """

    trained: int
    flops: int
    memory: int
    steps: int


def costs(*, epochs=40, configurations=CONFIGURATIONS, per_class=10):
    """Count what each configuration trains, computes and keeps, and its steps at equal compute.

    Left out: LP-FT's first phase, which on cached features costs less than a step.

    Parameters
    ----------
    epochs : int, default=40
        Of full fine-tuning.
    configurations : dict of str to callable, default=CONFIGURATIONS
    per_class : int, default=10
        Labelled images of each digit; a batch has at most 10 of each.

    Returns
    -------
    dict of str to Cost
    """
    (X, y), found = samples(0, "turned", per_class=min(per_class, 10))["few"], {}
    with reproducible(0):
        base = TinyTransformer()
        full = operations(prepare(base, _everything), X, y)
        whole = epochs * math.ceil(per_class / 10) * full
        for name, way in configurations.items():
            model = prepare(base, way)
            head_only = name.startswith("linear probing")
            trained, rows = (model.head, extract_features(model, X)) if head_only else (model, X)
            flops, counted = operations(trained, rows, y), count_parameters(model)
            memory = sum(step_memory(*counted, activation_bytes(model, X, y)).values())
            memory += sum(b.nbytes for b in model.buffers())
            if name.startswith("L2-SP"):  # w0, and w - w0, whose square is kept for the backward
                memory += 16 * counted.trainable
            steps = ENOUGH if head_only else max(whole // flops, 1)
            found[name] = Cost(counted.trainable, flops, memory, steps)
    return found


def pareto_front(points):
    """Return the names that no other beats: none costs as little or less and scores higher.

    Parameters
    ----------
    points : dict of str to tuple of (float, float)
        Cost, the lower the better, and score, the higher the better.

    Returns
    -------
    list of str
        From cheap to dear.
    """
    front, best = [], -math.inf
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if points[name][1] > best:
            front.append(name)
            best = points[name][1]
    return front


def learn(model, rows, *, lr, marks, name="", alpha=1.0, seed=0):
    """Train what is trainable by Adam, and pause at each of `marks`.

    A step takes 100 rows, or all if there are fewer. Linear probing trains on cached features.
    LP-FT does so before the first step, 40 epochs at 1e-2; L2-SP adds alpha / 2 ||w - w0||^2 to
    the loss.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    rows : tuple of (X, y)
    lr : float
    marks : sequence of int
        Steps after which to pause, ascending, at the end of the epoch; training ends with the last.
    name : str, default=""
        Of the configuration.
    alpha : float, default=1.0
    seed : int, default=0
        Of the order of rows.

    Yields
    ------
    int
        The mark that is reached.
    """
    if name.startswith("linear probing"):
        model, rows = model.head, (extract_features(model, rows[0]), rows[1])
    elif name.startswith("LP-FT"):
        linear_probe(model, *rows, epochs=40, lr=1e-2)
        unfreeze(model)
    loss = l2_sp(model, alpha=alpha, fresh="") if name.startswith("L2-SP") else cross_entropy
    optimizer = Adam(param_groups(model, {"": lr}), fused=True)
    options = {"batch_size": 100, "generator": torch.Generator().manual_seed(seed)}
    done, steps = 0, math.ceil(len(rows[0]) / 100)  # of an epoch
    for mark in marks:
        epochs = max(round(mark / steps), done + 1)
        train(model, *rows, optimizer=optimizer, epochs=epochs - done, loss=loss, **options)
        done = epochs
        yield mark


def compare_budgets(
    seed, *, target, settings, score_on="test", per_class=10, most=25, configurations=CONFIGURATIONS
):
    """Adapt the pre-trained model, its own head included, and score it on both domains.

    Parameters
    ----------
    seed : int
        Of the pre-training, the rows and the new parameters.
    target : str
        A key of `helpers.study.part2.TARGETS`.
    settings : dict of str to list of (float, sequence of int)
        Of each configuration its learning rates, each with the steps after which to score.
    score_on : {"test", "validation"}
        Validation images are for choosing `settings`.
    per_class, most : int
        As in `helpers.study.part2.samples`.
    configurations : dict of str to callable, default=CONFIGURATIONS

    Returns
    -------
    dict of str to float
        Accuracies in percent on the target, "name, rate, steps" where there are several and "name"
        where there is one, and "name/source" on the source's images; "not adapted"; and "margin".
    """
    rows = samples(seed, target, per_class=per_class, most=most)
    base, scores = pretrained(seed), {}
    with reproducible(seed):
        fresh = TinyTransformer()
        for name, several in settings.items():
            one = len(several) == 1 and len(several[0][1]) == 1
            for lr, marks in several:
                begin = fresh if name.startswith("from scratch") else base
                model = prepare(begin, configurations[name], seed=seed)
                for mark in learn(model, rows["few"], lr=lr, marks=marks, name=name, seed=seed):
                    label = name if one else f"{name}, {lr:g}, {mark}"
                    scores[label] = evaluate(model, *rows[score_on])
                    if score_on == "test":
                        scores[f"{label}/source"] = evaluate(model, *rows["source test"])
        if score_on == "test":
            scores["not adapted"] = evaluate(base, *rows["test"])
            scores["not adapted/source"] = evaluate(base, *rows["source test"])
    return percent(scores)


def choose_settings(
    target, seeds, *, steps, configurations=CONFIGURATIONS, workers=None, **options
):
    """Choose each configuration's learning rate and number of steps on validation images.

    Parameters
    ----------
    target : str
        A key of `helpers.study.part2.TARGETS`.
    seeds : sequence of int
        Others than those of the measurement. None of them: the middle rate, and all steps.
    steps : dict of str to int
        Most steps of each configuration; half of them are tried, too. Linear probing, which has
        many, also tries a tenth and a fiftieth.
    configurations : dict of str to callable, default=CONFIGURATIONS
    workers : int, optional
        As in `helpers.study.run_seeds`.
    **options : object
        `per_class` and `most` of `compare_budgets`.

    Returns
    -------
    chosen : dict of str to list of (float, list of int)
        What `compare_budgets` takes as settings: one rate, one number of steps. Of equals, the
        lower rate and the fewer steps.
    margins : sequence of float
        Of each seed, the closest decision.
    """
    tries = {}
    for name, n in steps.items():
        parts = (50, 10, 2, 1) if name.startswith("linear probing") else (2, 1)
        marks = sorted({max(n // part, 1) for part in parts})
        tries[name] = [(lr, marks) for lr in rates_for(name)]
    if not len(seeds):
        middle = {name: several[len(several) // 2] for name, several in tries.items()}
        return {name: [(lr, marks[-1:])] for name, (lr, marks) in middle.items()}, []
    experiment = partial(
        compare_budgets,
        target=target,
        settings=tries,
        score_on="validation",
        configurations=configurations,
        **options,
    )
    found, chosen = run_seeds(experiment, seeds, workers=workers), {}
    for name, several in tries.items():
        mean = {
            (lr, mark): found[f"{name}, {lr:g}, {mark}"].mean().round(9)
            for lr, marks in several
            for mark in marks
        }
        lr, mark = max(mean, key=mean.get)
        chosen[name] = [(lr, [mark])]
    return chosen, found["margin"]
