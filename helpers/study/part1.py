"""Part 1's studies of training on real texts: what is known before, label curves, forgetting."""

import copy
from functools import cache

import torch
from torch.nn import functional as F

from helpers import data, models, training
from helpers.study.seeds import percent, reproducible
from helpers.study.tuning import best, columns, try_settings

LENGTH = {"headlines": 16, "documentation": 12, "articles": 24}  # tokens that are read of a text

BUDGETS = (1, 4, 16, 50)  # labels of each topic

# the budgets of techniques that do not have all: a step of all blocks costs three times as much
AT = {"LP-FT, top two": (4, 16), "full fine-tuning": (16,), "from scratch": (16,)}

# of each technique, the lowest block that it trains: the embedding table, half of all parameters,
# stays as it is, but from scratch
FIRST = {"top two blocks": 4, "LP-FT, top two": 4, "full fine-tuning": 0, "from scratch": 0}

GRID = (1e-4, 3e-4, 1e-3)

RATES = {  # tried on validation rows; the head learns at 1e-3 or more. Of linear probing: its C
    "linear probing": (0.03, 0.1, 0.3, 1.0),
    "top two blocks": GRID,
    "LP-FT, top two": GRID,
    "full fine-tuning": GRID,
    "from scratch": (1e-4, 1e-3),
}

PROBE_C = 0.3  # of the logistic head that LP-FT starts from

FORGETTING_RATES = {  # of each way: a rate as chosen above, and one three times as large
    "full fine-tuning": (1e-4, 3e-4),
    "top two blocks": (3e-4,),
    "LP-FT": (3e-4,),
    "L2-SP": (3e-4,),
    "gradual unfreezing": (3e-4,),
}


@cache
def start(texts, folder=""):
    """Return encoder, tokens, labels and topics: what every seed of a process starts from.

    `texts` is one of `LENGTH`, `folder` a checkpoint's, "" the packaged one's. The encoder is
    frozen and shared: copy before training.
    """
    folder = folder or models.bundled()
    encoder = models.Encoder.from_pretrained(folder)
    training.freeze(encoder)
    rows = getattr(data, texts)()
    tokens = models.Tokenizer(folder, max_length=LENGTH[texts])(rows.texts)
    return encoder, tokens, rows.y, rows.classes


def some(tokens, rows):
    """Return some rows of tokens; only `rows`, numbers of any shape, are chosen."""
    return {name: t[rows.flatten()] for name, t in tokens.items()}


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


def tune(model, X, y, *, first, lr, fresh=False, **options):
    """Train the head and the blocks from `first` on for about 12 steps of 8 rows, or one epoch.

    An epoch of more than 160 rows has steps of 16. The rate of the blocks is given, the head learns
    at 1e-3 or more. `fresh` draws the whole model anew and trains all of it.
    """
    training.freeze(model)
    training.unfreeze(*model.encoder.blocks[first:], model.head)
    if fresh:
        from_scratch(model)
    batch_size = min(16 if len(y) > 160 else 8, len(y))
    epochs = max(1, round(12 * batch_size / len(y)))
    rates = {"encoder": lr, "head": max(lr, 1e-3)}
    training.fit(model, X, y, lr=rates, epochs=epochs, batch_size=batch_size, **options)


def from_scratch(model):
    """Draw all weights of a model anew, as torch initialises its layers; all are trainable."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    training.unfreeze(model)


def label_curve(seed, *, texts, rates, budgets=BUDGETS, score_on="test", folder=""):
    """Train by each technique of `rates` on a few labelled texts of each topic.

    Technique and label budget are varied, smaller samples being parts of larger ones; `texts` and
    each technique's rate, or several to try, are fixed. Techniques of `AT` have some of the
    budgets; LP-FT starts from a logistic head at `PROBE_C`. Rates are chosen on "validation" rows,
    `score_on`. Returns accuracies in percent, "technique/budget", or "technique/budget, rate" where
    there are several, and "margin".
    """
    with reproducible(seed):
        encoder, tokens, y, names = start(texts, folder)
        rows = data.draw(y, seed, train=max(BUDGETS), validation=20, test=24)
        held, labels = some(tokens, rows[score_on]), y[rows[score_on].flatten()]
        base = models.TextClassifier(encoder, len(names))
        held_low = training.cache_prefix(base, held, first=4)
        seen = training.extract_features(base, held_low)
        scores = {"zero labels/0": zero_labels(texts, seen, labels, folder=folder)}
        for k in budgets:
            X, t = some(tokens, rows["train"][:, :k]), y[rows["train"][:, :k].flatten()]
            low = training.cache_prefix(base, X, first=4)
            features = training.extract_features(base, low)
            for name in rates:
                if score_on == "test" and k not in AT.get(name, BUDGETS):
                    continue
                on, scored = (low, held_low) if FIRST.get(name) == 4 else (X, held)
                for rate, column in columns(f"{name}/{k}", rates[name]).items():
                    if name == "linear probing":
                        head = training.logistic_head(features, t, C=rate)
                        scores[column] = training.score(head(seen), labels)
                        continue
                    model = copy.deepcopy(base)
                    if name.startswith("LP-FT"):
                        model.head = training.logistic_head(features, t, C=PROBE_C)
                    tune(model, on, t, first=FIRST[name], lr=rate, fresh=name == "from scratch")
                    scores[column] = training.evaluate(model, scored, labels)
    return percent(scores)


def choose_rates(texts, seeds, *, workers=None, folder=""):
    """Choose each technique's rate on validation rows at 16 labels of each topic.

    The rate is varied over `RATES`; `texts` is fixed; seeds are others than a measurement's.
    Returns the best rate of each technique, and technique to rate to mean accuracy.
    """
    tries = {name: columns(f"{name}/16", of) for name, of in RATES.items()}
    options = {"texts": texts, "budgets": (16,), "rates": RATES, "folder": folder}
    means, margin = try_settings(label_curve, tries, seeds, workers=workers, **options)
    return best(means), means, margin


@cache
def pairs(folder=""):
    """Return 60 stories no study trains on, as headlines and as articles, cached below block 4."""
    encoder, headlines, y, _ = start("headlines", folder)
    _, articles, *_ = start("articles", folder)
    rows = data.draw(y, 0, pairs=12)["pairs"]
    both = [some(tokens, rows) for tokens in (headlines, articles)]
    return rows, both, [training.cache_prefix(encoder, X, first=4) for X in both]


def forgetting(seed, *, rates, folder=""):
    """Tune on 16 headlines of each topic in several ways; can the encoder still find articles?

    The way and its rate, of `rates`, are varied; all but full fine-tuning train the top two
    blocks. Returns, in percent, accuracy on held-out headlines ("way, rate/topics") and the
    share of 60 headlines whose own article is the nearest one ("way, rate/retrieval"); "margin".
    """
    with reproducible(seed):
        encoder, tokens, y, names = start("headlines", folder)
        kept, both, both_low = pairs(folder)
        free = y.clone()
        free[kept.flatten()] = -1
        rows = data.draw(free, seed, train=16, test=24)
        (X, t), (held, labels) = ((some(tokens, r), y[r.flatten()]) for r in rows.values())
        base = models.TextClassifier(encoder, len(names))
        low, held_low = (training.cache_prefix(base, r, first=4) for r in (X, held))
        probe = training.logistic_head(training.extract_features(base, low), t, C=PROBE_C)
        found = [training.extract_features(base, r) for r in both_low]
        scores = {
            "linear probing/topics": training.evaluate(_with_head(base, probe), held_low, labels),
            "linear probing/retrieval": recall(*found),
        }
        for name, of in rates.items():
            for lr in of:
                model = _with_head(base, probe) if name == "LP-FT" else copy.deepcopy(base)
                full = name == "full fine-tuning"
                _tuned(model, name, X if full else low, t, lr)
                on = (held, *both) if full else (held_low, *both_low)
                scores[f"{name}, {lr:g}/topics"] = training.evaluate(model, on[0], labels)
                training.freeze(model)
                found = [training.extract_features(model, r) for r in on[1:]]
                scores[f"{name}, {lr:g}/retrieval"] = recall(*found)
    return percent(scores)


def _with_head(base, head):
    """Return a copy of `base` that has a copy of `head`."""
    model = copy.deepcopy(base)
    model.head = copy.deepcopy(head)
    return model


def _tuned(model, name, X, t, lr):
    """Tune a model in one of the ways of `FORGETTING_RATES`."""
    if name == "gradual unfreezing":
        options = dict(batch_size=8, generator=torch.Generator().manual_seed(0))
        first = models.stages(model)
        down_to = list(first).index("encoder.blocks.4")
        training.gradual_unfreezing(model, X, t, lr=lr, epochs=4, down_to=down_to, **options)
        return
    first = 0 if name == "full fine-tuning" else 4
    training.unfreeze(*model.encoder.blocks[first:])
    loss = {"loss": training.l2_sp(model, alpha=0.1)} if name == "L2-SP" else {}
    tune(model, X, t, first=first, lr=lr, **loss)


def costs(*, folder=""):
    """Count a step on 8 headlines by each technique, in float32.

    Returns rows of name, trained parameters, operations (forward, backward) and bytes of weights,
    gradients, Adam's state and activations. Of linear probing, the features are there already.
    """
    encoder = models.Encoder.from_pretrained(folder or models.bundled())
    tokens = models.Tokenizer(folder or models.bundled(), max_length=LENGTH["headlines"])
    X, y = tokens(data.headlines().texts[:8]), torch.zeros(8, dtype=torch.long)
    rows = []
    firsts = {"linear probing": 6, "top two blocks": 4, "full fine-tuning": 0}
    for name, first in firsts.items():
        model = models.TextClassifier(copy.deepcopy(encoder), 5)
        training.freeze(model)
        training.unfreeze(*model.encoder.blocks[first:], model.head)
        on = training.cache_prefix(model, X, first=first)
        count = training.count_parameters(model)
        kept = training.activation_bytes(model, on, y)
        memory = training.step_memory(*count, kept, weight=4, gradient=4, state=8)
        rows.append(
            (name, count.trainable, training.operations(model, on, y), sum(memory.values()))
        )
    return rows
