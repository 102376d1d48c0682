"""Part 3's studies of several adapters on one encoder, and of an encoder in four bits."""

import copy
import math
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from helpers import data, models, peft, training
from helpers.study import part1, part2
from helpers.study.part3 import learn
from helpers.study.seeds import percent, reproducible, stream

FIRST = part2.TOP[0]  # the lowest block that is changed

TASKS = ("headline or opening", "topic of a headline", "library of a sentence")

LORA = part2.TECHNIQUES["LoRA"]

LORA_EACH = "a LoRA each"

WAYS = {  # technique and rate; the last one's updates are combined
    "one set of weights": (part2.TECHNIQUES["top two blocks"], 3e-4),
    "one LoRA": (LORA, 3e-3),
    LORA_EACH: (LORA, 3e-3),
}


def task_rows(seed, *, folder=""):
    """Draw three tasks' rows: what a text is, a headline's topic, a documentation's library.

    No story is in two of them. Returns, for each of `TASKS`, "train" (8 rows of each topic or
    library, half of each kind) and "test" (10 of each topic, 8 of each library), as (tokens,
    labels).
    """
    _, heads, topics, _ = part1.start("headlines", folder)
    _, openings, *_ = part1.start("articles", folder)
    _, sentences, libraries, _ = part1.start("documentation", folder)
    stories = data.draw(topics, seed, train=8, test=10, train_kind=8, test_kind=10)
    documented = data.draw(libraries, seed, train=8, test=8)
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

    A head is linear probing's of the untouched encoder.
    """
    base, heads = models.TextClassifier(part1.start("headlines", folder)[0], 1), {}
    rows = {
        task: {part: (part1.cached(base, X, FIRST), y) for part, (X, y) in of.items()}
        for task, of in task_rows(seed, folder=folder).items()
    }
    for task, of in rows.items():
        X, y = of["train"]
        heads[task] = training.logistic_head(training.extract_features(base, X), y, C=part2.C)
    return base, rows, heads


def adapted(base, way, *, seed):
    """Return a copy of a model in which one of `WAYS` can learn; its LoRA follows the seed.

    What is below the first block that learns is frozen, and shared with the model.
    """
    model = part1.copied(base, FIRST)
    training.freeze(model)
    WAYS[way][0](model, torch.Generator().manual_seed(seed))
    return model


def teach(model, way, rows, head, *, seed, steps=16):
    """Train a model and a copy of a head on one task, at the rate of one of `WAYS`.

    A step has 8 rows. Returns the head that learned, frozen.
    """
    model.head = copy.deepcopy(head)
    training.unfreeze(model.head)
    rates = {"encoder": WAYS[way][1], "head": part2.HEAD_RATE}
    learn(model, *rows["train"], lr=rates, steps=steps, batch=8, seed=seed)
    training.freeze(model.head)
    return model.head


def separate(seed, *, steps=16, folder=""):
    """Teach each of `TASKS` to a LoRA of its own, as `several_tasks` does.

    The task is varied. Returns the encoder's model, untouched, and for each task the model with its
    LoRA and head, and the tokens and labels of its test rows.
    """
    with reproducible(seed):
        base, rows, heads = begin(seed, folder=folder)
        taught = {task: adapted(base, LORA_EACH, seed=stream(seed, task)) for task in TASKS}
        for task, model in taught.items():
            teach(model, LORA_EACH, rows[task], heads[task], seed=seed, steps=steps)
    return base, taught, {t: of["test"] for t, of in task_rows(seed, folder=folder).items()}


def several_tasks(seed, *, steps=16, folder=""):
    """Learn three tasks in the encoder's top two blocks, one after another, and combine them.

    Varied are where they are learned, in one set of weights, in one LoRA or in a LoRA each, which
    is switched on for its task, and how the three LoRAs' updates are combined. Fixed are the order
    of `TASKS`, each one's head at the start, rates and steps. Returns accuracies in percent:
    "linear probing/task"; "way/i/task" after learning i tasks, the task's head being the one that
    learned with it; "combination/task"; "distance", from the update of averaged A and B to the
    averaged update, in percent of the latter's Frobenius norm; and "margin".
    """
    with reproducible(seed):
        base, rows, heads = begin(seed, folder=folder)
        scores = _named("linear probing", _scores(base, rows, heads))
        for way in WAYS:
            model, own, states = adapted(base, way, seed=stream(seed, TASKS[0])), {}, {}
            for i, task in enumerate(TASKS, 1):
                each = adapted(base, way, seed=stream(seed, task)) if way == LORA_EACH else model
                own[task] = teach(each, way, rows[task], heads[task], seed=seed, steps=steps)
                if way == LORA_EACH:
                    states[task] = peft.adapter_state(each)
                for other in own:
                    if states:
                        peft.switch(model, states, other)
                    scores |= _named(f"{way}/{i}", _scores(model, rows, {other: own[other]}))
        made = combinations(model, states)
        for name, vector in made.items():
            scores |= _named(name, _scores(peft.add(base, vector), rows, own))
    off = peft.weighted_sum([made["mean of A, of B"], made["mean"]], [1.0, -1.0])
    return percent(scores) | {"distance": 100 * _size(off) / _size(made["mean"])}


def combinations(model, states):
    """Return what is added to the encoder by combinations of the LoRAs in `states`.

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
        "sum": peft.weighted_sum(several, [1.0] * len(several)),
        "mean": peft.weighted_sum(several, equal),
        "mean of A, of B": peft.delta_weights(model),
        "TIES": peft.ties(several),
        **{
            f"minus {task}": peft.weighted_sum([update], [-1.0]) for task, update in updates.items()
        },
    }


def _scores(model, rows, heads):
    """Score a model on the test rows of each task that has a head."""
    found = {}
    for task, head in heads.items():
        model.head = head
        found[task] = training.evaluate(model, *rows[task]["test"])
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


def rounding_error(name, *, folder="", adapted=False):
    """Return the Frobenius norm of the error of one of `BASES` in percent of the weights'.

    The base is varied; counted are all 36 matrices, or those that LoftQ adapts.
    """
    full, now = (linear_weights(base_of(n, folder)) for n in (BASES[0], name))
    places = peft.adapters(base_of("LoftQ", folder)) if adapted else full
    off = peft.weighted_sum([now, full], [1.0, -1.0])
    return 100 * _size(off, places) / _size(full, places)


def retrieval(name, *, pairs=20, folder=""):
    """Score which headlines find their own article in one of `BASES`, before anything is trained.

    The base is varied; the stories, `pairs` of each topic, are fixed.
    """
    with reproducible(0):
        _, heads, topics, _ = part1.start("headlines", folder)
        stories = data.draw(topics, 0, pairs=pairs)["pairs"]
        model = models.TextClassifier(base_of(name, folder), 1)
        texts = heads, part1.start("articles", folder)[1]
        return part1.recall(
            *(training.extract_features(model, part1.some(X, stories)) for X in texts)
        )


def linear_weights(encoder):
    """Return the weights of an encoder's linear layers by name, adapters merged."""
    kinds = nn.Linear, peft.QuantizedLinear
    found = {n: m.weight for n, m in encoder.named_modules() if type(m) in kinds}
    merged = {n: a.merged_weight() for n, a in peft.adapters(encoder).items()}
    whole = {n: w for n, w in found.items() if not n.endswith(".base")} | merged
    return {name: weight.detach() for name, weight in sorted(whole.items())}


def four_bit(seed, *, lr=WAYS[LORA_EACH][1], folder=""):
    """Train LoRA on 8 headlines of each topic, in the encoder and in its 4-bit copies.

    The base is varied: in full precision, in NF4 (QLoRA), in NF4 with LoftQ's start. Fixed are
    rate, and rows, steps and LoRA of Part 2, from linear probing on the base's own features.
    Returns accuracies in percent, by technique and "linear probing, base"; and "margin".
    """
    scores, train = {}, part2.Train()
    with reproducible(seed):
        _, tokens, topics, names = part1.start("headlines", folder)
        free = part1.free_labels("headlines", topics, "test", folder)
        drawn = data.draw(free, seed, train=part2.LABELS, test=part1.SCORED["test"])
        for way, base in (("LoRA", BASES[0]), ("QLoRA", "NF4"), ("LoftQ", "LoftQ")):
            model = models.TextClassifier(copy.deepcopy(base_of(base, folder)), len(names))
            (X, y), test = (
                (part1.cached(model, part1.some(tokens, rows), FIRST), topics[rows.flatten()])
                for rows in drawn.values()
            )
            model.head = training.logistic_head(training.extract_features(model, X), y, C=part2.C)
            scores[f"linear probing, {base}"] = training.evaluate(model, *test)
            if way != "LoftQ":
                train.inject(model, "LoRA")
            for a in peft.adapters(model).values():
                training.unfreeze(a.lora_A, a.lora_B)
            train.fit(model, X, y, technique="LoRA", lr=lr)
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
