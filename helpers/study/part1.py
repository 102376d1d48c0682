"""Part 1's studies on real texts: label curves, forgetting, a labelled neighbour domain."""

import copy
from functools import cache

import torch
from torch.nn import functional as F

from helpers import data, models, training
from helpers.study.seeds import percent, reproducible
from helpers.study.tuning import best, columns, try_settings

LENGTH = {"headlines": 16, "documentation": 20, "articles": 32}  # tokens that are read of a text

BUDGETS = (1, 4, 16, 50)  # labels of each topic

# of each technique, the lowest block that it trains: the embedding table, half of all parameters,
# stays as it is, but from scratch
FIRST = {"top two blocks": 4, "LP-FT, top two": 4, "full fine-tuning": 0, "from scratch": 0}

RATES = {  # tried on validation rows; the head learns at 1e-3 or more
    "top two blocks": (1e-4, 3e-4, 1e-3),
    "LP-FT, top two": (1e-4, 3e-4, 1e-3),
    "full fine-tuning": (1e-4, 3e-4, 1e-3),
    "from scratch": (1e-4, 1e-3),
}

REMEDIES = ("top three blocks", "LP-FT", "L2-SP", "gradual unfreezing", "full fine-tuning")


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
        training.freeze(model)
        return training.extract_features(model, some(tokens, rows))


def name_head(texts, *, folder=""):
    """Return the head whose rows are the topics' names, embedded: zero labels."""
    with reproducible(0):
        encoder, _, _, names = start(texts, folder)
        model = models.TextClassifier(encoder, len(names))
        training.freeze(model)
        tokens = models.Tokenizer(folder or models.bundled())(names)
        vectors = F.normalize(training.extract_features(model, tokens))
        model.head.weight.copy_(vectors), model.head.bias.zero_()
        return model.head


def recall(queries, keys):
    """Score retrieval: row i of `queries` should be nearest, by cosine, to row i of `keys`."""
    cosines = F.normalize(queries) @ F.normalize(keys).T
    return training.score(cosines, torch.arange(len(queries)))


def tune(model, X, y, *, first, lr, steps=16, batch_size=8, fresh=False, seed=0, **options):
    """Train the head and the blocks from `first` on, for at least `steps` steps and one epoch.

    The rate of the blocks is given, the head learns at 1e-3 or more. `fresh` draws the whole model
    anew and trains all of it.
    """
    training.freeze(model)
    training.unfreeze(*model.encoder.blocks[first:], model.head)
    if fresh:
        from_scratch(model)
    batch_size = min(batch_size, len(y))
    epochs = -(-steps // -(-len(y) // batch_size))
    generator = torch.Generator().manual_seed(seed)
    rates = {"encoder": lr, "head": max(lr, 1e-3)}
    more = dict(batch_size=batch_size, generator=generator) | options
    training.fit(model, X, y, lr=rates, epochs=epochs, **more)


def from_scratch(model):
    """Draw all weights of a model anew, as torch initialises its layers; all are trainable."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    training.unfreeze(model)


def label_curve(seed, *, texts, rates, budgets=BUDGETS, score_on="test", folder=""):
    """Train by each technique of `rates` on a few labelled texts of each topic.

    Technique and label budget are varied, smaller samples being parts of larger ones; `texts` and
    each technique's rate, or several to try, are fixed; "from scratch" has the largest budget
    alone. Rates are chosen on "validation" rows, `score_on`. Returns accuracies in percent,
    "technique/budget", or "technique/budget, rate" where there are several, and "margin".
    """
    with reproducible(seed):
        encoder, tokens, y, names = start(texts, folder)
        rows = data.draw(y, seed, train=max(BUDGETS), validation=20, test=30)
        held, labels = some(tokens, rows[score_on]), y[rows[score_on].flatten()]
        base = models.TextClassifier(encoder, len(names))
        held_low = training.cache_prefix(base, held, first=4)
        seen = training.extract_features(base, held_low)
        zero = name_head(texts, folder=folder)(F.normalize(seen))
        scores = {"zero labels/0": training.score(zero, labels)}
        for k in budgets:
            X, t = some(tokens, rows["train"][:, :k]), y[rows["train"][:, :k].flatten()]
            low = training.cache_prefix(base, X, first=4)
            probe = training.logistic_head(training.extract_features(base, low), t)
            scores[f"linear probing/{k}"] = training.score(probe(seen), labels)
            for name in rates if k == max(budgets) else [n for n in rates if n != "from scratch"]:
                on, score_rows = (low, held_low) if FIRST[name] == 4 else (X, held)
                for lr, column in columns(f"{name}/{k}", rates[name]).items():
                    model = copy.deepcopy(base)
                    if name.startswith("LP-FT"):
                        model.head = copy.deepcopy(probe)
                    tune(model, on, t, first=FIRST[name], lr=lr, fresh=name == "from scratch")
                    scores[column] = training.evaluate(model, score_rows, labels)
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
    """Return 150 stories no study trains on, as headlines and as articles, cached below block 3."""
    encoder, headlines, y, _ = start("headlines", folder)
    _, articles, *_ = start("articles", folder)
    rows = data.draw(y, 0, pairs=30)["pairs"]
    both = [some(tokens, rows) for tokens in (headlines, articles)]
    return rows, both, [training.cache_prefix(encoder, X, first=3) for X in both]


def forgetting(seed, *, rates, folder=""):
    """Tune on 16 headlines of each topic in several ways; can the encoder still find articles?

    The way, one of `REMEDIES`, and its `rates` are varied; all but full fine-tuning train the top
    three blocks. Returns, in percent, accuracy on held-out headlines ("way, rate/topics") and the
    share of 150 headlines whose own article is the nearest one ("way, rate/retrieval"); "margin".
    """
    with reproducible(seed):
        encoder, tokens, y, names = start("headlines", folder)
        kept, both, both_low = pairs(folder)
        free = y.clone()
        free[kept.flatten()] = -1
        rows = data.draw(free, seed, train=16, test=30)
        (X, t), (held, labels) = ((some(tokens, r), y[r.flatten()]) for r in rows.values())
        base = models.TextClassifier(encoder, len(names))
        low, held_low = (training.cache_prefix(base, r, first=3) for r in (X, held))
        probe = training.logistic_head(training.extract_features(base, low), t)
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
    """Tune a model in one of the ways of `REMEDIES`."""
    if name == "gradual unfreezing":
        options = dict(batch_size=8, generator=torch.Generator().manual_seed(0))
        first = models.stages(model)
        down_to = list(first).index("encoder.blocks.3")
        training.gradual_unfreezing(model, X, t, lr=lr, epochs=4, down_to=down_to, **options)
        return
    first = 0 if name == "full fine-tuning" else 3
    training.unfreeze(*model.encoder.blocks[first:])
    loss = {"loss": training.l2_sp(model, alpha=0.1)} if name == "L2-SP" else {}
    tune(model, X, t, first=first, lr=lr, **loss)


UNSUPERVISED = (
    "source only", "target statistics", "CORAL", "importance weights", "label weights",
    "self-training",
)  # fmt: skip


def adaptation(seed, *, articles, headlines, y, shift="none"):
    """Adapt a head from labelled articles to headlines without labels; also with a few.

    The method is varied. Fixed are the features of the same stories as `articles` and as
    `headlines`, their labels `y`, and the `shift`: with "labels" the target's last topics are five
    times rarer than its first two. Source, target and test are other stories. Unsupervised methods
    see target rows, never their labels nor test rows. Returns accuracy in percent on headlines, of
    "k labels" with that many target labels of each topic alone and "articles + k labels"; "margin".
    """
    with reproducible(seed):
        rows = data.draw(y, seed, source=70, target=40, test=40)
        if shift == "labels":
            rows |= {name: _rarer(rows[name]) for name in ("target", "test")}
        S, T, test = (
            X[r] for X, r in zip((articles, headlines, headlines), _flat(rows), strict=True)
        )
        mean, sd = S.mean(0), S.std(0)  # of source rows: all that is known before adaptation
        S, T, test, S_short = ((X - mean) / sd for X in (S, T, test, headlines[_flat(rows)[0]]))
        t, t_target, t_test = (y[r] for r in _flat(rows))
        found = _adapted(S, t, T, test)
        scores = {name: training.score(on_test, t_test) for name, (on_test, _) in found.items()}
        sure = {n: training.information_maximization(on_T) for n, (_, on_T) in found.items()}
        peeked = {n: training.score(on_T, t_target) for n, (_, on_T) in found.items()}
        scores["chosen without labels"] = scores[max(sure, key=sure.get)]
        scores["chosen by the oracle"] = scores[max(peeked, key=lambda n: peeked[n].correct)]
        head = training.logistic_head(S_short, t, C=PROBE_C)
        scores["the same stories' headlines"] = training.score(head(test), t_test)
        if shift == "none":
            for k in (1, 4, 16, 40):
                few = torch.arange(len(T)).view(rows["target"].shape)[:, :k].flatten()
                for name, X, labels in (
                    (f"{k} labels", T[few], t_target[few]),
                    (
                        f"articles + {k} labels",
                        torch.cat([S, T[few]]),
                        torch.cat([t, t_target[few]]),
                    ),
                ):
                    head = training.logistic_head(X, labels, C=PROBE_C)
                    scores[name] = training.score(head(test), t_test)
    return percent(scores, *peeked.values())


PROBE_C = 0.01  # of standardised features


def _flat(rows):
    return [r.flatten() for r in (rows["source"], rows["target"], rows["test"])]


def _rarer(rows):
    """Return rows of the first two topics, and every fifth of the others'."""
    return torch.cat([rows[:2].flatten(), rows[2:, ::5].flatten()])


def _adapted(S, t, T, test):
    """Return for each unsupervised method its logits of test rows and of target rows."""
    n_classes = int(t.max()) + 1
    fit = lambda X, labels, **how: training.logistic_head(X, labels, C=PROBE_C, **how)  # noqa: E731
    head = fit(S, t)
    found = {"source only": (head(test), head(T))}
    moved = [training.match_statistics(X, T, S) for X in (test, T)]
    found["target statistics"] = tuple(map(head, moved))
    heads = {"CORAL": fit(training.coral(S, T, ridge=1.0), t)}
    heads["importance weights"] = fit(S, t, weights=training.density_ratio(S, T))
    half = torch.arange(len(t)) % 2 == 0  # rows are sorted by topic: halves of each
    guess = fit(S[half], t[half])
    ratio = training.label_ratio(
        guess(S[~half]).argmax(1), t[~half], guess(T).argmax(1), n_classes=n_classes
    )
    heads["label weights"] = fit(S, t, weights=ratio[t])
    student = head
    for _ in range(3):
        p, label = student(T).softmax(1).max(1)
        sure = p >= p.median()  # the surer half of the target rows
        student = fit(torch.cat([S, T[sure]]), torch.cat([t, label[sure]]))
    heads["self-training"] = student
    return found | {name: (h(test), h(T)) for name, h in heads.items()}
