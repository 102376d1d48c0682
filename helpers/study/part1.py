"""Part 1's studies of training on real texts: what is known before, label curves, forgetting."""

import copy
import math
from functools import cache

import torch
from torch.nn import functional as F

from helpers import data, models, training
from helpers.peft.recipes import PROBE_C
from helpers.study.seeds import percent, reproducible
from helpers.study.tuning import best, columns, try_settings

LENGTH = {"headlines": 16, "documentation": 12, "articles": 24}  # tokens that are read of a text

BUDGETS = (1, 4, 16, 50)  # labels of each topic

# of each technique, the lowest block that it trains: the embedding table, half of all parameters,
# stays as it is, but from scratch
FIRST = {
    "top two blocks": 4,
    "LP-FT, top two": 4,
    "L2-SP, top two": 4,
    "gradual unfreezing": 4,
    "full fine-tuning": 0,
    "from scratch": 0,
}

# the budgets of each; a step of all blocks costs three times as much as one of the top two
CURVE = {"top two blocks": BUDGETS, "LP-FT, top two": (4, 16), "full fine-tuning": (4,)}

REMEDIES = ("LP-FT, top two", "L2-SP, top two", "gradual unfreezing")  # against forgetting

RATES = {  # tried on validation rows; the head learns at 1e-3 or more
    "top two blocks": (1e-4, 3e-4, 1e-3),
    "LP-FT, top two": (3e-5, 1e-4, 1e-3),
    "full fine-tuning": (3e-5, 1e-4, 1e-3),
}

PENALTIES = (0.03, 0.1, 0.3, 1.0)  # C of linear probing, tried on the same rows

SCORED = {"validation": 16, "test": 24}  # rows of each topic

TRIED = RATES | {"linear probing": PENALTIES}


@cache
def start(texts, folder=""):
    """Return encoder, tokens, labels and topics: what every seed of a process starts from.

    `texts` is one of `LENGTH`, `folder` a checkpoint's, "" the packaged one's. The encoder is
    frozen and shared: copy before training.
    """
    folder = folder or models.bundled()
    with reproducible(0):  # in float64 whoever calls first; its first seed draws what others do
        encoder = models.Encoder.from_pretrained(folder)
    training.freeze(encoder)
    rows = getattr(data, texts)()
    tokens = models.Tokenizer(folder, max_length=LENGTH[texts])(rows.texts)
    return encoder, tokens, rows.y, rows.classes


def some(tokens, rows):
    """Return some rows of tokens, or of cached blocks; only `rows`, of any shape, are chosen."""
    chosen = {name: t[rows.flatten()] for name, t in tokens.items()}
    return tokens.like(chosen) if hasattr(tokens, "like") else chosen


def cached(model, X, first):
    """Return rows as block `first` reads them, or tokens where that is the lowest."""
    return training.cache_prefix(model, X, first=first) if first else X


def copied(model, first):
    """Return a copy of a model to be trained from block `first` on; what is below is shared."""
    below = [model.encoder.embed, *model.encoder.blocks[:first]] if first else []
    return copy.deepcopy(model, {id(module): module for module in below})


def embed(texts, rows, *, folder=""):
    """Return the encoder's features of some texts, in float64; nothing is trained or drawn."""
    with reproducible(0):
        encoder, tokens, *_ = start(texts, folder)
        model = models.TextClassifier(encoder, 1)
        return training.extract_features(model, some(tokens, rows))


@cache
def name_vectors(texts, folder=""):
    """Return the features of the topics' names, in float64."""
    with reproducible(0):
        encoder, _, _, names = start(texts, folder)
        model = models.TextClassifier(encoder, 1)
        return training.extract_features(model, models.Tokenizer(folder or models.bundled())(names))


def zero_labels(texts, features, y, *, folder=""):
    """Score the answer that each text has the topic whose name has the nearest embedding."""
    names = F.normalize(name_vectors(texts, folder))
    return training.score(F.normalize(features) @ names.T, y)


def recall(queries, keys):
    """Score retrieval: row i of `queries` should be nearest, by cosine, to row i of `keys`."""
    cosines = F.normalize(queries) @ F.normalize(keys).T
    return training.score(cosines, torch.arange(len(queries)))


def tune(model, X, y, *, technique, lr):
    """Train a model's head and the blocks of a technique: about 12 steps of 16 rows.

    Three epochs where one is more than that. The rate of the blocks is given, the head learns at
    1e-3 or more. Gradual unfreezing has one rate for both; its phases share as many epochs.
    """
    first = FIRST[technique]
    training.freeze(model)
    training.unfreeze(*model.encoder.blocks[first:], model.head)
    if technique == "from scratch":
        training.from_scratch(model)
    steps = math.ceil(len(y) / 16)  # of an epoch
    epochs = 3 if steps > 12 else round(12 / steps)
    if technique == "gradual unfreezing":
        stage = first + 1  # below it are the embedding and the other blocks
        training.gradual_unfreezing(model, X, y, lr=lr, epochs=epochs, down_to=stage, batch_size=16)
        return
    loss = {"loss": training.l2_sp(model, alpha=0.1)} if technique.startswith("L2-SP") else {}
    rates = {"encoder": lr, "head": max(lr, 1e-3)}
    training.fit(model, X, y, lr=rates, epochs=epochs, batch_size=16, **loss)


@cache
def pairs(folder=""):
    """Return 60 stories that no label curve of headlines draws: rows, and texts by lowest block.

    These are headlines and articles: from block 0 on tokens, from blocks 3 and 4 on cached rows.
    """
    rows = data.draw(data.headlines().y, 0, pairs=12)["pairs"]
    found = [some(start(texts, folder)[1], rows) for texts in ("headlines", "articles")]
    encoder = start("headlines", folder)[0]
    return rows, {k: [cached(encoder, X, k) for X in found] for k in (0, 3, 4)}


def retrieval(model, folder="", *, first=4):
    """Score which of 60 headlines find their own article; blocks below `first` are untouched."""
    training.freeze(model)
    return recall(*(training.extract_features(model, X) for X in pairs(folder)[1][first]))


def free_labels(texts, y, score_on, folder):
    """Return labels, -1 for rows that may not be drawn: those of `pairs`, and 40 of each topic.

    Rates are chosen on these 40 alone, and nothing else is.
    """
    kept, free = data.draw(y, 1, kept=40)["kept"].flatten(), y.clone()
    if score_on == "validation":
        free[:] = -1
        free[kept] = y[kept]
    else:
        free[kept] = -1
    if texts == "headlines":
        free[pairs(folder)[0].flatten()] = -1
    return free


def untouched(folder=""):
    """Score retrieval by the encoder as it comes, before any training."""
    with reproducible(0):
        return retrieval(models.TextClassifier(start("headlines", folder)[0], 1), folder)


def label_curve(
    seed, *, texts, plan, C, budgets=BUDGETS, score_on="test", train=None, told=4, folder=""
):
    """Train on a few labelled texts of each topic, in each way of `plan`.

    `plan` has for each column its technique, label budget and rate, which are varied, smaller
    samples being parts of larger ones; `texts` and `C`, the penalty or penalties of linear probing
    at all `budgets`, are fixed, as are how to `train`, None being `tune`, and at which budget to
    score retrieval, `told`. Rates are chosen on "validation" rows, `score_on`. Returns in percent
    the accuracies, by column; of headlines at `told` labels, but from scratch, ".../retrieval"
    after that training; and "margin".
    """
    lowest = getattr(train, "first", FIRST.get)  # block of a technique
    with reproducible(seed):
        encoder, tokens, y, names = start(texts, folder)
        sizes = {"train": max(budgets), score_on: SCORED[score_on]}
        rows = data.draw(free_labels(texts, y, score_on, folder), seed, **sizes)
        base, labels = models.TextClassifier(encoder, len(names)), y[rows[score_on].flatten()]
        firsts = sorted({4} | {lowest(name) for name, *_ in plan.values()})
        held, whole = (
            {first: cached(base, some(tokens, rows[of]), first) for first in firsts}
            for of in (score_on, "train")
        )
        seen, frozen = (training.extract_features(base, of[4]) for of in (held, whole))
        scores = {"zero labels/0": zero_labels(texts, seen, labels, folder=folder)}
        order = torch.arange(len(frozen)).view(len(names), -1)
        some_of = {k: (order[:, :k], y[rows["train"][:, :k].flatten()]) for k in budgets}
        for k, (part, t) in some_of.items():
            for c, column in columns(f"linear probing/{k}", C).items():
                head = training.logistic_head(frozen[part.flatten()], t, C=c)
                scores[column] = training.score(head(seen), labels)
        for column, (name, k, rate) in plan.items():
            torch.manual_seed(seed)  # each as if it were alone
            (part, t), first = some_of[k], lowest(name)
            model = copied(base, first)
            if train or name.startswith("LP-FT"):
                model.head = training.logistic_head(frozen[part.flatten()], t, C=PROBE_C)
            (train or tune)(model, some(whole[first], part), t, technique=name, lr=rate)
            scores[column] = training.evaluate(model, held[first], labels)
            if name != "from scratch" and (k, texts, score_on) == (told, "headlines", "test"):
                scores[f"{column}/retrieval"] = retrieval(model, folder, first=first)
    return percent(scores)


def choose_rates(texts, seeds, *, workers=None, folder=""):
    """Choose each technique's rate on validation rows at 4 and, if it has that budget, 16 labels.

    The rate is varied over `RATES` and `PENALTIES`; `texts` is fixed; seeds are others than a
    measurement's. Returns the best of each technique, technique to rate to mean accuracy, and each
    seed's margin.
    """
    at = {name: [k for k in (4, 16) if k in CURVE.get(name, BUDGETS)] for name in TRIED}
    tries = {(n, k): columns(f"{n}/{k}", TRIED[n]) for n, budgets in at.items() for k in budgets}
    plan = {
        column: (name, k, rate)
        for (name, k), of in tries.items()
        for rate, column in of.items()
        if name in RATES
    }
    options = {"texts": texts, "C": PENALTIES, "budgets": (4, 16), "folder": folder}
    options |= {"workers": workers, "apart": {"plan": plan}}
    found, margin = try_settings(label_curve, tries, seeds, **options)
    means = {
        name: {rate: sum(found[name, k][rate] for k in at[name]) / len(at[name]) for rate in of}
        for name, of in TRIED.items()
    }
    return best(means), means, margin


def plan_of(texts, chosen):
    """Return the `plan` of a label curve: `CURVE` at the `chosen` rates; of headlines, remedies.

    These are for 4 labels of each topic: L2-SP, gradual unfreezing and a rate three times as large.
    """
    plan = {f"{n}/{k}": (n, k, chosen[n]) for n, at in CURVE.items() for k in at}
    plan["from scratch/4"] = ("from scratch", 4, chosen["full fine-tuning"])
    if texts == "headlines":
        rate = chosen["top two blocks"]
        plan |= {f"{n}/4": (n, 4, rate) for n in ("L2-SP, top two", "gradual unfreezing")}
        plan["top two blocks, 3 x rate/4"] = ("top two blocks", 4, 3 * rate)
    return plan


def blocks_from(first):
    """Return a technique, a function of a model: it trains the blocks from `first` on."""

    def _unfreeze(model, generator=None):
        training.unfreeze(*model.encoder.blocks[first:])

    _unfreeze.first = first
    return _unfreeze


WAYS = {
    "linear probing": blocks_from(6),
    "top two blocks": blocks_from(4),
    "full fine-tuning": blocks_from(0),
}


def costs(ways=WAYS, *, folder=""):
    """Count a step on 16 headlines by each technique, in float32.

    Each of `ways` is a function of a model and a generator, with the lowest block that it changes
    as its attribute ``first``. Returns rows of name, trained parameters, operations (forward,
    backward) and bytes of `memory`. Of linear probing, the features are there already.
    """
    rows = []
    for name, way in ways.items():
        model, X, y = _step(way, folder)
        work, size = training.operations(model, X, y), sum(_memory(model, X, y).values())
        rows.append((name, training.count_parameters(model).trainable, work, size))
    return rows


def memory(ways, *, folder=""):
    """Return, for each of `ways`, the bytes of weights, gradients, Adam's state and activations."""
    return {name: _memory(*_step(way, folder)) for name, way in ways.items()}


def _step(way, folder):
    """Return a model with a technique, and 16 headlines with labels, as its lowest block reads."""
    encoder = models.Encoder.from_pretrained(folder or models.bundled()).float()
    tokens = models.Tokenizer(folder or models.bundled(), max_length=LENGTH["headlines"])
    X, y = tokens(data.headlines().texts[:16]), torch.zeros(16, dtype=torch.long)
    model = models.TextClassifier(encoder, 5)
    training.freeze(model)
    way(model, torch.Generator().manual_seed(0))
    training.unfreeze(model.head)
    return model, cached(model, X, way.first), y


def _memory(model, X, y):
    kept = training.activation_bytes(model, X, y)
    counts = training.count_parameters(model)
    parts = training.step_memory(*counts, kept, weight=4, gradient=4, state=8)
    return parts | {"weights": parts["weights"] + sum(b.nbytes for b in model.buffers())}
