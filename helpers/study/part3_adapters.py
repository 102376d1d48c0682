"""Part 3's studies of several adapters on one base, and of a base in four bits."""

import copy
import math

from helpers.peft import adapter_state, add, delta_weights, switch, ties, weighted_sum
from helpers.study.part2 import LINEAR, prepare, pretrained, samples
from helpers.study.part3 import FOUR_BIT, _everything, _lora, _on_codes, learn
from helpers.study.seeds import percent, reproducible, stream
from helpers.study.spectrum import linear_weights
from helpers.training import evaluate, freeze


def learn_in_turn(seed, *, rates, tasks=("noisy", "inverted", "turned"), steps=40, per_class=10):
    """Learn tasks one after another: in one set of weights, in one adapter, or in one each.

    Parameters
    ----------
    seed : int
    rates : dict of str to float
        Learning rates of "full fine-tuning" and of "LoRA".
    tasks : sequence of str
        Keys of `helpers.study.part2.TARGETS`, in the order of learning.
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
            model, states = copy.deepcopy(fresh), {"": adapter_state(fresh)}
            for i, task in enumerate(("", *tasks)):
                if way == "a LoRA each":
                    switch(model, states, "")
                if task:
                    for _ in learn(model, rows[task]["few"], lr=rates[kind], marks=[steps]):
                        states[task] = adapter_state(model)
                for j, (known, test) in enumerate(zip(("", *tasks), tests, strict=True)):
                    if way == "a LoRA each":
                        switch(model, states, known if known in states else "")
                    scores[f"{way}/{i}/{j}"] = evaluate(model, *test)
    return percent(scores)


def combine_adapters(seed, *, lr, tasks=("inverted", "turned"), r=4, steps=40, per_class=10):
    """Train a LoRA for each of two tasks, under the pre-trained head, and combine the two.

    Parameters
    ----------
    seed : int
    lr : float
    tasks : (str, str)
        Keys of `helpers.study.part2.TARGETS`.
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
        deltas = [delta_weights(model) for model in trained.values()]
        mean = weighted_sum(deltas, [0.5, 0.5])
        averaged = copy.deepcopy(trained[tasks[0]])  # of A and of B, apart: not what is wanted
        halves = [adapter_state(model) for model in trained.values()]
        switch(averaged, {"": weighted_sum(halves, [0.5, 0.5])}, "")
        wrong = delta_weights(averaged)
        models = {"base": base}
        models |= {f"adapter of {task}": model for task, model in trained.items()}
        models |= {
            "sum": add(base, weighted_sum(deltas, [1.0, 1.0])),
            "mean": add(base, mean),
            "mean of A, of B": averaged,
            "TIES": add(base, ties(deltas)),
        }
        scores = {
            f"{name}/{domain}": evaluate(model, *test)
            for name, model in models.items()
            for domain, test in tests.items()
        }
    off = weighted_sum([wrong, mean], [1.0, -1.0])
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
            delta = delta_weights(model)
        scores = {}
        for scale in (0.0, *scales):
            less = add(base, delta, scale=-scale)
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
