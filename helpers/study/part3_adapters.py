"""Part 3's studies of several adapters on one encoder, and of an encoder in four bits."""

import copy
import math
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from helpers import data, models, peft, training
from helpers.study import part1, part2
from helpers.study.part3 import STEPS, learn
from helpers.study.seeds import percent, reproducible, stream

FIRST = part2.TOP[0]  # the lowest block that is changed

TASKS = ("headline or opening", "topic of a headline", "library of a sentence")

LORA, BLOCKS = (part2.TECHNIQUES[name] for name in ("LoRA", "top two blocks"))

RATES = {"one set of weights": 1e-4, "LoRA": 3e-3}  # those that Part 2 chose


def task_rows(seed, *, folder=""):
    """Draw three tasks' rows: what a text is, a headline's topic, a documentation's library.

    No story is in two of them. Returns, for each of `TASKS`, "train" (40 rows or 48) and "test" (60
    rows), as (tokens, labels).
    """
    _, heads, topics, _ = part1.start("headlines", folder)
    _, openings, *_ = part1.start("articles", folder)
    _, sentences, libraries, _ = part1.start("documentation", folder)
    stories = data.draw(topics, seed, train=8, test=12, train_kind=8, test_kind=12)
    documented = data.draw(libraries, seed, train=8, test=10)
    found = {task: {} for task in TASKS}
    for part in ("train", "test"):
        rows, docs, both = stories[part], documented[part], stories[f"{part}_kind"]
        kinds = [part1.some(X, r) for X, r in zip((heads, openings), both.chunk(2, 1), strict=True)]
        kind = torch.arange(2).repeat_interleave(both.numel() // 2)
        found[TASKS[0]][part] = _joined(*kinds), kind
        found[TASKS[1]][part] = part1.some(heads, rows), topics[rows.flatten()]
        found[TASKS[2]][part] = part1.some(sentences, docs), libraries[docs.flatten()]
    return found


def begin(seed, *, folder=""):
    """Return an encoder's model, three tasks' rows as its block 4 reads them, and their heads.

    A head is linear probing's of the untouched encoder, and stays: only the body is varied.
    """
    base = models.TextClassifier(part1.start("headlines", folder)[0], 1)
    rows = {
        task: {part: (part1.cached(base, X, FIRST), y) for part, (X, y) in of.items()}
        for task, of in task_rows(seed, folder=folder).items()
    }
    heads = {}
    for task, of in rows.items():
        X, y = of["train"]
        heads[task] = training.logistic_head(training.extract_features(base, X), y, C=part2.C)
    training.freeze(*heads.values())
    return base, rows, heads


def adapted(base, technique=LORA, *, seed):
    """Return a copy of a model with a technique in it; the head stays frozen."""
    model = copy.deepcopy(base)
    training.freeze(model)
    technique(model, torch.Generator().manual_seed(seed))
    return model


def teach(base, rows, heads, task, *, seed, steps=STEPS):
    """Return a copy of a model with a LoRA that has learned one of `TASKS` under its head."""
    model = adapted(base, seed=stream(seed, task))
    model.head = heads[task]
    learn(model, *rows[task]["train"], lr=RATES["LoRA"], steps=steps, seed=seed)
    return model


def several_tasks(seed, *, steps=STEPS, folder=""):
    """Learn three tasks in the encoder's top two blocks, one after another, and combine them.

    Varied are where they are learned, in one set of weights, in one LoRA or in a LoRA each, which
    is switched on for its task, and how the three LoRAs' updates are combined. Fixed are the order
    of `TASKS`, each one's head, rates and steps. Returns accuracies in percent: "way/i/task" after
    learning i tasks; "combination/task"; "distance", from the update of averaged A and B to the
    averaged update, in percent of the latter's Frobenius norm; and "margin".
    """
    with reproducible(seed):
        base, rows, heads = begin(seed, folder=folder)
        untouched = _scores(base, rows, heads)
        scores = {f"linear probing/{task}": score for task, score in untouched.items()}
        for way, technique in (("one set of weights", BLOCKS), ("one LoRA", LORA)):
            model = adapted(base, technique, seed=stream(seed, TASKS[0]))
            for i, task in enumerate(TASKS, 1):
                model.head = heads[task]
                lr = RATES.get(way, RATES["LoRA"])
                learn(model, *rows[task]["train"], lr=lr, steps=steps, seed=seed)
                scores |= _named(f"{way}/{i}", _scores(model, rows, heads))
        model, states = adapted(base, seed=seed), {}
        for i, task in enumerate(TASKS, 1):
            taught = teach(base, rows, heads, task, seed=seed, steps=steps)
            states[task], known = peft.adapter_state(taught), dict(untouched)
            for other in states:
                peft.switch(model, states, other)
                known |= _scores(model, {other: rows[other]}, heads)
            scores |= _named(f"a LoRA each/{i}", known)
        made = combinations(model, states)
        for name, vector in made.items():
            scores |= _named(name, _scores(peft.add(base, vector), rows, heads))
    off = peft.weighted_sum([made["mean of A, of B"], made["mean"]], [1.0, -1.0])
    return percent(scores) | {"distance": 100 * _size(off) / _size(made["mean"])}


def combinations(model, states):
    """Return what is added to the encoder by each LoRA of `states`, and by combinations of them.

    The combination is varied; `model` has the same LoRA, whose values are left changed. Sums have
    weight 1, means the same weight for each, TIES the values that its paper proposes; nothing is
    tuned. "mean of A, of B" is the product of the averaged factors.
    """
    updates = {}
    for task in states:
        peft.switch(model, states, task)
        updates[task] = peft.delta_weights(model)
    several, equal = list(updates.values()), [1 / len(updates)] * len(updates)
    peft.switch(model, {"": peft.weighted_sum(list(states.values()), equal)}, "")
    return {
        **{f"only {task}": update for task, update in updates.items()},
        "sum": peft.weighted_sum(several, [1.0] * len(several)),
        "mean": peft.weighted_sum(several, equal),
        "mean of A, of B": peft.delta_weights(model),
        "TIES": peft.ties(several),
        **{
            f"minus {task}": peft.weighted_sum([update], [-1.0]) for task, update in updates.items()
        },
    }


def _scores(model, rows, heads):
    """Score a model on each task's test rows, under the task's head."""
    found = {}
    for task, of in rows.items():
        model.head = heads[task]
        found[task] = training.evaluate(model, *of["test"])
    return found


def _named(name, scores):
    return {f"{name}/{task}": score for task, score in scores.items()}


BASES = ("full precision", "NF4", "int4", "LoftQ")


@cache
def base_of(name, folder=""):
    """Return the encoder, frozen, as one of `BASES`: its 36 matrices in full or in four bits.

    LoftQ is NF4 with a LoRA where `LORA` puts one, started at what rounding lost there.
    """
    full = part1.start("headlines", folder)[0]
    if name == "full precision":
        return full
    encoder = copy.deepcopy(full)
    if name == "LoftQ":
        places = part2.within(encoder, ["q_proj", "v_proj"], part2.TOP)
        peft.inject_loftq(encoder, places, r=8, lora_alpha=16)
    left = [n for n, m in encoder.named_modules() if type(m) is nn.Linear]
    peft.quantize_layers(encoder, left, code="int4" if name == "int4" else "nf4")
    training.freeze(encoder)
    return encoder


def quantization_cost(name, *, pairs=20, folder=""):
    """Measure what rounding costs before anything is trained, on the same stories.

    The base is varied, one of `BASES`; fixed are the stories, `pairs` of each topic. Returns the
    Frobenius norm of the error in percent of the weights', for all 36 matrices and for those that
    LoftQ adapts, and the `Score` of headlines that find their own article.
    """
    with reproducible(0):
        _, heads, topics, _ = part1.start("headlines", folder)
        stories = data.draw(topics, 0, pairs=pairs)["pairs"]
        model = models.TextClassifier(base_of(name, folder), 1)
        texts = heads, part1.start("articles", folder)[1]
        found = [training.extract_features(model, part1.some(X, stories)) for X in texts]
        full, now = (linear_weights(base_of(n, folder)) for n in (BASES[0], name))
        places = peft.adapters(base_of("LoftQ", folder))
    off = peft.weighted_sum([now, full], [1.0, -1.0])
    errors = [100 * _size(off, which) / _size(full, which) for which in (full, places)]
    return *errors, part1.recall(*found)


def linear_weights(encoder):
    """Return the weights of an encoder's linear layers by name, adapters merged."""
    kinds = nn.Linear, peft.QuantizedLinear
    found = {n: m.weight for n, m in encoder.named_modules() if type(m) in kinds}
    merged = {n: a.merged_weight() for n, a in peft.adapters(encoder).items()}
    whole = {n: w for n, w in found.items() if not n.endswith(".base")} | merged
    return {name: weight.detach() for name, weight in sorted(whole.items())}


def four_bit(seed, *, lr=RATES["LoRA"], steps=STEPS, folder=""):
    """Train LoRA on 8 headlines of each topic, in the encoder and in its 4-bit copies.

    The base is varied: in full precision, in NF4 (QLoRA), in NF4 with LoftQ's start. Fixed are
    rows, rate, steps, and LoRA on q and v of the top two blocks, from linear probing on the base's
    own features. Returns accuracies in percent, by technique and "linear probing, base"; and
    "margin".
    """
    scores = {}
    with reproducible(seed):
        _, heads, topics, names = part1.start("headlines", folder)
        drawn = data.draw(topics, seed, train=part2.LABELS, test=part1.SCORED["test"])
        for base, way in zip((BASES[0], "NF4", "LoftQ"), ("LoRA", "QLoRA", "LoftQ"), strict=True):
            model = models.TextClassifier(copy.deepcopy(base_of(base, folder)), len(names))
            (X, y), test = (
                (part1.cached(model, part1.some(heads, r), FIRST), topics[r.flatten()])
                for r in drawn.values()
            )
            model.head = training.logistic_head(training.extract_features(model, X), y, C=part2.C)
            scores[f"linear probing, {base}"] = training.evaluate(model, *test)
            if base != "LoftQ":
                LORA(model, torch.Generator().manual_seed(stream(seed, "LoRA")))
            for a in peft.adapters(model).values():
                training.unfreeze(a.lora_A, a.lora_B)
            rates = {"encoder": lr, "head": part2.HEAD_RATE}
            learn(model, X, y, lr=rates, steps=steps, seed=seed)
            scores[way] = training.evaluate(model, *test)
    return percent(scores)


def _joined(first, second):
    """Return the rows of two dicts of tokens, one below the other, padded to the longer."""
    longest = max(X["ids"].shape[1] for X in (first, second))
    wide = [{k: F.pad(t, (0, longest - t.shape[1])) for k, t in X.items()} for X in (first, second)]
    return {name: torch.cat([X[name] for X in wide]) for name in first}


def _size(vector, names=None):
    """Frobenius norm over all tensors, or some."""
    return math.sqrt(sum(float((vector[n] ** 2).sum()) for n in names or vector))
