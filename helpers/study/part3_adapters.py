"""Part 3's studies of several adapters on one base, and of a base in four bits."""

import copy
import math

from torch import nn

from helpers import peft, training
from helpers.study import digits, part2
from helpers.study.part3 import FOUR_BIT, learn
from helpers.study.seeds import percent, reproducible, stream


def linear_weights(model):
    """Return the weights of a transformer's linear layers in its blocks, adapters merged."""
    model = copy.deepcopy(model)
    peft.merge(model)
    layers = {k: m for k, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}
    return {name: layer.weight.detach() for name, layer in layers.items()}


def learn_in_turn(seed, *, rates, tasks=("noisy", "inverted", "turned"), steps=40, per_class=10):
    """Learn tasks one after another: in one set of weights, in one adapter, or in one each.

    The way is varied: "one set of weights", "one LoRA", and "a LoRA each", which is switched to the
    task at hand, or off where it has none. Fixed are `tasks` (keys of `digits.TARGETS`, in the
    order of learning), the rates of "full fine-tuning" and "LoRA", steps and labels. Returns
    "way/i/j", accuracy in percent on task j after learning i tasks, j = 0 being the source's
    images and i = 0 the pre-trained model; and "margin".
    """
    base = digits.pretrained(seed)
    rows = {task: digits.samples(seed, task, per_class=per_class) for task in tasks}
    tests = [rows[tasks[0]]["source test"], *(r["test"] for r in rows.values())]
    scores = {}
    with reproducible(seed):
        for way in ("one set of weights", "one LoRA", "a LoRA each"):
            kind = "LoRA" if "LoRA" in way else "full fine-tuning"
            technique = part2.lora(*part2.LINEAR, r=2) if kind == "LoRA" else part2.everything
            fresh = part2.prepare(base, technique, seed=seed)
            model, states = copy.deepcopy(fresh), {"": peft.adapter_state(fresh)}
            for i, task in enumerate(("", *tasks)):
                if way == "a LoRA each":
                    peft.switch(model, states, "")
                if task:
                    for _ in learn(model, rows[task]["few"], lr=rates[kind], marks=[steps]):
                        states[task] = peft.adapter_state(model)
                for j, (known, test) in enumerate(zip(("", *tasks), tests, strict=True)):
                    if way == "a LoRA each":
                        peft.switch(model, states, known if known in states else "")
                    scores[f"{way}/{i}/{j}"] = training.evaluate(model, *test)
    return percent(scores)


def combine_adapters(seed, *, lr, tasks=("inverted", "turned"), r=4, steps=40, per_class=10):
    """Train a LoRA for each of two tasks, under the pre-trained head, and combine the two.

    The combination is varied; `tasks` (keys of `digits.TARGETS`), rate, rank, steps and labels
    are fixed. Returns "combination/domain", accuracy in percent, the source among the domains;
    "distance", from the update of averaged A and B to the averaged update, in percent of the
    latter's Frobenius norm; and "margin".
    """
    base = digits.pretrained(seed)
    rows = {task: digits.samples(seed, task, per_class=per_class) for task in tasks}
    tests = {"source": rows[tasks[0]]["source test"]} | {t: rows[t]["test"] for t in tasks}
    with reproducible(seed):
        trained = {}
        for i, task in enumerate(tasks):  # a random A of its own for each
            own = stream(seed, f"adapter {i}")
            trained[task] = _adapted(base, rows[task]["few"], lr, r=r, steps=steps, seed=own)
        deltas = [peft.delta_weights(model) for model in trained.values()]
        mean = peft.weighted_sum(deltas, [0.5, 0.5])
        averaged = copy.deepcopy(trained[tasks[0]])  # of A and of B, apart: not what is wanted
        halves = [peft.adapter_state(model) for model in trained.values()]
        peft.switch(averaged, {"": peft.weighted_sum(halves, [0.5, 0.5])}, "")
        wrong = peft.delta_weights(averaged)
        made = {"base": base} | {f"adapter of {task}": m for task, m in trained.items()}
        made["sum"] = peft.add(base, peft.weighted_sum(deltas, [1.0, 1.0]))
        made |= {"mean": peft.add(base, mean), "mean of A, of B": averaged}
        made["TIES"] = peft.add(base, peft.ties(deltas))
        scores = {
            f"{name}/{domain}": training.evaluate(model, *test)
            for name, model in made.items()
            for domain, test in tests.items()
        }
    off = peft.weighted_sum([wrong, mean], [1.0, -1.0])
    return percent(scores) | {"distance": 100 * _size(off) / _size(mean)}


def forget_digit(seed, *, lr, scales=(0.25, 0.5, 1.0), r=4, steps=40, per_class=25):
    """Train a LoRA on the images of one digit, subtract it, and see which digits are forgotten.

    How much of the update is subtracted is varied over `scales`; the digit, the seed's last figure,
    rate, rank, steps and labels are fixed. Returns "scale/digit" and "scale/others", accuracy in
    percent on the source's test images of that digit and of the nine others; and "margin".
    """
    base, digit = digits.pretrained(seed), seed % 10
    rows = digits.samples(seed, "turned", per_class=per_class)
    X, y = rows["source"]
    kept = (y == digit).nonzero()[:per_class, 0]
    X_test, y_test = rows["source test"]
    parts = {"digit": y_test == digit, "others": y_test != digit}
    with reproducible(seed):
        model = _adapted(base, (X[kept], y[kept]), lr, r=r, steps=steps, seed=seed)
        delta = peft.delta_weights(model)
        scores = {}
        for scale in (0.0, *scales):
            less = peft.add(base, delta, scale=-scale)
            for part, on in parts.items():
                scores[f"{scale:g}/{part}"] = training.evaluate(less, X_test[on], y_test[on])
    return percent(scores)


def quantization_cost(seed):
    """Quantise the pre-trained model, and measure what that does before anything is trained.

    The code is varied. Returns "code/error", Frobenius norm of the error of the blocks' linear
    weights in percent of theirs, for "LoftQ, NF4" with s B A included; "code/accuracy", in percent
    on the source's test images, also of "full precision"; and "margin".
    """
    base, test = digits.pretrained(seed), digits.samples(seed, "turned")["source test"]
    weights, scores, errors = linear_weights(base), {}, {}
    with reproducible(seed):
        for way, technique in FOUR_BIT.items():
            name, model = way.removeprefix("QLoRA, "), part2.prepare(base, technique)
            now = linear_weights(model)
            off = {layer: now[layer] - W for layer, W in weights.items()}
            errors[f"{name}/error"] = 100 * _size(off) / _size(weights)
            scores[f"{name}/accuracy"] = training.evaluate(model, *test)
        scores["full precision/accuracy"] = training.evaluate(base, *test)
    return percent(scores) | errors


def _adapted(base, rows, lr, *, r, steps, seed):
    """Return `base` with a LoRA on all linear layers, trained under its own, frozen head."""
    model = part2.prepare(base, part2.lora(*part2.LINEAR, r=r), seed=seed)
    training.freeze(model.head)
    list(learn(model, rows, lr=lr, marks=[steps]))
    return model


def _size(vector):
    """Frobenius norm over all tensors."""
    return math.sqrt(sum(float((t**2).sum()) for t in vector.values()))
