"""Part 3's studies: equal budgets, what is forgotten, adapters that are combined, a 4-bit base."""

import copy
import math
from functools import partial
from typing import NamedTuple

import torch
from torch.optim import Adam

from helpers import combine, inject
from helpers.experiments import percent
from helpers.freezing import count_parameters, freeze, param_groups, unfreeze
from helpers.models import TinyTransformer
from helpers.strategies import l2_sp, linear_probe
from helpers.study import reproducible, run_seeds
from helpers.techniques import (
    LINEAR,
    activation_bytes,
    linear_weights,
    operations,
    prepare,
    pretrained,
    samples,
    step_memory,
    stream,
    technique,
)
from helpers.training import cross_entropy, evaluate, extract_features, train

ENOUGH = 2_000  # steps of linear probing, after which its accuracy hardly changes
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # learning rates; `rates_for` says whose are which
ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]


def _lora(*targets, r, **options):
    return technique(inject.inject_lora, *targets, r=r, lora_alpha=2 * r, **options)


def _dora(*targets, r):
    return technique(inject.inject_dora, *targets, r=r, lora_alpha=2 * r)


def _everything(model, generator=None):
    unfreeze(model)


def _nothing(model, generator=None):
    """Train the head alone, which `prepare` unfreezes."""


# Techniques of (nearly) the same number of trainable parameters, the head's 330 not counted
BUDGETS = {
    192: {
        "LoRA": _lora("fc2", r=1),
        "DoRA": _dora("v_proj", r=1),
        "VeRA": technique(inject.inject_vera, "fc2", r=64),
        "OFT": technique(inject.inject_oft, *ATTENTION, "fc2", block_size=2),
        "BitFit": technique(inject.inject_bitfit, "fc1", "fc2"),
        "LayerNorm tuning": technique(inject.inject_layer_norm, "norm2", "norm"),
        "(IA)3": technique(inject.inject_ia3, "v_proj", feedforward=["fc2"]),
        "adapters": technique(inject.inject_adapter, "fc2", reduction_factor=32),
        "prefix tuning": technique(inject.inject_prefix, "attention", num_virtual_tokens=1),
        "prompt tuning": technique(inject.inject_prompt, "embed", num_virtual_tokens=6),
    },
    1_792: {
        "LoRA": _lora(*LINEAR, r=2),
        "PiSSA": _lora(*LINEAR, r=2, init="pissa"),
        "DoRA": _dora(*ATTENTION, r=3),
        "VeRA": technique(inject.inject_vera, *LINEAR, r=112),
        "OFT": technique(inject.inject_oft, *LINEAR, block_size=8),
        "adapters": technique(inject.inject_adapter, "fc2", reduction_factor=2.45),
        "prefix tuning": technique(inject.inject_prefix, "attention", num_virtual_tokens=14),
    },
    17_920: {
        "LoRA": _lora(*LINEAR, r=20),
        "DoRA": _dora(*LINEAR, r=19),
        "adapters": technique(inject.inject_adapter, "fc2", reduction_factor=0.2327),
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
        inject.quantize_layers(model, LINEAR, code=code)
        inject.inject_lora(model, LINEAR, r=r, lora_alpha=2 * r, generator=generator)

    return _inject


FOUR_BIT = {  # of the same rank as "LoRA, 1,792"
    "QLoRA, NF4": _on_codes("nf4"),
    "QLoRA, int4": _on_codes("int4"),
    "LoftQ, NF4": technique(inject.inject_loftq, *LINEAR, r=2, lora_alpha=4),
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
        Operations of one step, as `helpers.techniques.operations` counts them. Linear probing
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
        A key of `helpers.techniques.TARGETS`.
    settings : dict of str to list of (float, sequence of int)
        Of each configuration its learning rates, each with the steps after which to score.
    score_on : {"test", "validation"}
        Validation images are for choosing `settings`.
    per_class, most : int
        As in `helpers.techniques.samples`.
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
        A key of `helpers.techniques.TARGETS`.
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


def learn_in_turn(seed, *, rates, tasks=("noisy", "inverted", "turned"), steps=40, per_class=10):
    """Learn tasks one after another: in one set of weights, in one adapter, or in one each.

    Parameters
    ----------
    seed : int
    rates : dict of str to float
        Learning rates of "full fine-tuning" and of "LoRA".
    tasks : sequence of str
        Keys of `helpers.techniques.TARGETS`, in the order of learning.
    steps, per_class : int

    Returns
    -------
    dict of str to float
        "way/i/j": accuracy in percent on task j after learning i tasks, j = 0 being the source's
        images and i = 0 the pre-trained model; ways are "one set of weights", "one LoRA" and "a
        LoRA each", which is switched to the task at hand, or off where it has none; and "margin".
    """
    base = pretrained(seed)
    rows = {task: samples(seed, task, per_class=per_class) for task in tasks}
    tests = [rows[tasks[0]]["source test"], *(r["test"] for r in rows.values())]
    scores = {}
    with reproducible(seed):
        for way in ("one set of weights", "one LoRA", "a LoRA each"):
            kind = "LoRA" if "LoRA" in way else "full fine-tuning"
            fresh = prepare(base, _lora(*LINEAR, r=2) if kind == "LoRA" else _everything, seed=seed)
            model, states = copy.deepcopy(fresh), {"": combine.adapter_state(fresh)}
            for i, task in enumerate(("", *tasks)):
                if way == "a LoRA each":
                    combine.switch(model, states, "")
                if task:
                    for _ in learn(model, rows[task]["few"], lr=rates[kind], marks=[steps]):
                        states[task] = combine.adapter_state(model)
                for j, (known, test) in enumerate(zip(("", *tasks), tests, strict=True)):
                    if way == "a LoRA each":
                        combine.switch(model, states, known if known in states else "")
                    scores[f"{way}/{i}/{j}"] = evaluate(model, *test)
    return percent(scores)


def combine_adapters(seed, *, lr, tasks=("inverted", "turned"), r=4, steps=40, per_class=10):
    """Train a LoRA for each of two tasks, under the pre-trained head, and combine the two.

    Parameters
    ----------
    seed : int
    lr : float
    tasks : (str, str)
        Keys of `helpers.techniques.TARGETS`.
    r : int, default=4
    steps, per_class : int

    Returns
    -------
    dict of str to float
        "combination/domain": accuracy in percent, the source among the domains; "distance", from
        the update of averaged A and B to the averaged update, in percent of the latter's Frobenius
        norm; and "margin".
    """
    base = pretrained(seed)
    rows = {task: samples(seed, task, per_class=per_class) for task in tasks}
    tests = {"source": rows[tasks[0]]["source test"]} | {t: rows[t]["test"] for t in tasks}
    with reproducible(seed):
        trained = {}
        for i, task in enumerate(tasks):  # a random A of its own for each
            model = prepare(base, _lora(*LINEAR, r=r), seed=stream(seed, f"adapter {i}"))
            freeze(model.head)
            for _ in learn(model, rows[task]["few"], lr=lr, marks=[steps]):
                trained[task] = model
        deltas = [combine.delta_weights(model) for model in trained.values()]
        mean = combine.weighted_sum(deltas, [0.5, 0.5])
        averaged = copy.deepcopy(trained[tasks[0]])  # of A and of B, apart: not what is wanted
        halves = [combine.adapter_state(model) for model in trained.values()]
        combine.switch(averaged, {"": combine.weighted_sum(halves, [0.5, 0.5])}, "")
        wrong = combine.delta_weights(averaged)
        models = {"base": base}
        models |= {f"adapter of {task}": model for task, model in trained.items()}
        models |= {
            "sum": combine.add(base, combine.weighted_sum(deltas, [1.0, 1.0])),
            "mean": combine.add(base, mean),
            "mean of A, of B": averaged,
            "TIES": combine.add(base, combine.ties(deltas)),
        }
        scores = {
            f"{name}/{domain}": evaluate(model, *test)
            for name, model in models.items()
            for domain, test in tests.items()
        }
    off = combine.weighted_sum([wrong, mean], [1.0, -1.0])
    return percent(scores) | {"distance": 100 * _size(off) / _size(mean)}


def forget_digit(seed, *, lr, scales=(0.25, 0.5, 1.0), r=4, steps=40, per_class=25):
    """Train a LoRA on the images of one digit, subtract it, and see which digits are forgotten.

    Parameters
    ----------
    seed : int
        Its last figure is the digit.
    lr : float
    scales : sequence of float
        How much of the update to subtract.
    r : int, default=4
    steps, per_class : int

    Returns
    -------
    dict of str to float
        "scale/digit" and "scale/others": accuracy in percent on the source's test images of that
        digit and of the nine others; and "margin".
    """
    base, digit = pretrained(seed), seed % 10
    rows = samples(seed, "turned", per_class=per_class)
    X, y = rows["source"]
    kept = (y == digit).nonzero()[:per_class, 0]
    X_test, y_test = rows["source test"]
    of_digit = y_test == digit
    parts = {"digit": of_digit, "others": ~of_digit}
    with reproducible(seed):
        model = prepare(base, _lora(*LINEAR, r=r), seed=seed)
        freeze(model.head)
        for _ in learn(model, (X[kept], y[kept]), lr=lr, marks=[steps]):
            delta = combine.delta_weights(model)
        scores = {}
        for scale in (0.0, *scales):
            less = combine.add(base, delta, scale=-scale)
            for part, on in parts.items():
                scores[f"{scale:g}/{part}"] = evaluate(less, X_test[on], y_test[on])
    return percent(scores)


def quantization_cost(seed):
    """Quantise the pre-trained model, and measure what that does before anything is trained.

    Parameters
    ----------
    seed : int

    Returns
    -------
    dict of str to float
        "code/error": Frobenius norm of the error of the blocks' linear weights in percent of
        theirs, also for "LoftQ, NF4", s B A included; "code/accuracy": in percent on the source's
        test images, "full precision" among the codes; and "margin".
    """
    base, test = pretrained(seed), samples(seed, "turned")["source test"]
    weights, scores, errors = linear_weights(base), {}, {}
    ways = {"NF4": "nf4", "int4": "int4"}
    with reproducible(seed):
        models = {name: prepare(base, _on_codes(code)) for name, code in ways.items()}
        models["LoftQ, NF4"] = prepare(base, FOUR_BIT["LoftQ, NF4"])
        for name, model in models.items():
            now = linear_weights(model)
            off = {layer: now[layer] - W for layer, W in weights.items()}
            errors[f"{name}/error"] = 100 * _size(off) / _size(weights)
            scores[f"{name}/accuracy"] = evaluate(model, *test)
        scores["full precision/accuracy"] = evaluate(base, *test)
    return percent(scores) | errors


def _size(vector):
    """Frobenius norm over all tensors."""
    return math.sqrt(sum(float((t**2).sum()) for t in vector.values()))
