"""Part 2's studies: every technique in the real encoder, on the same few labelled texts."""

import copy
import inspect
import math
from functools import partial

import torch

from helpers import data, models, peft, training
from helpers.peft.recipes import HEAD_RATE
from helpers.study import part1
from helpers.study.seeds import reproducible
from helpers.study.tuning import best, columns, try_settings

LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

TOP = (4, 5)  # the blocks that a technique changes; what is below them is computed once

LABELS = 8  # of each topic

C = part1.PROBE_C  # of linear probing, which every technique starts from


def technique(function, *targets, blocks=None, **options):
    """Return `function` of a model and a generator, everything else given: an entry of a table.

    `function` is one of `helpers.peft`'s ``inject_*``; it gets the generator if it takes one, and
    of `targets` those in `blocks` of an encoder, or all.
    """
    takes_generator = "generator" in inspect.signature(function).parameters

    def _inject(model, generator=None):
        drawn = {"generator": generator} if takes_generator else {}
        names, given = list(targets), dict(options)
        if blocks is not None:
            names = within(model, targets, blocks)
            if "feedforward" in given:
                given["feedforward"] = within(model, given["feedforward"], blocks)
        return function(model, *([names] if names else []), **given, **drawn)

    _inject.first = 0 if blocks is None else min(blocks)
    return _inject


def within(model, targets, blocks):
    """Return the names of the modules in some blocks whose names end like one of `targets`."""
    inside, ends = tuple(f"blocks.{b}." for b in blocks), tuple(f".{t}" for t in targets)
    names = [name for name, _ in model.named_modules() if name.endswith(ends)]
    return [name for name in names if any(block in name for block in inside)]


def lora(*targets, r=8, function=peft.inject_lora, **options):
    """Return LoRA of rank `r` on `targets` as an entry of a table, with alpha = 2 r."""
    return technique(function, *targets, r=r, lora_alpha=2 * r, **options)


in_top = partial(technique, blocks=TOP)

TECHNIQUES = {
    "LoRA": lora("q_proj", "v_proj", blocks=TOP),
    "LoRA+": lora("q_proj", "v_proj", blocks=TOP),
    "PiSSA": lora("q_proj", "v_proj", init="pissa", blocks=TOP),
    "DoRA": lora("q_proj", "v_proj", function=peft.inject_dora, blocks=TOP),
    "VeRA": in_top(peft.inject_vera, "q_proj", "v_proj", r=64),
    "OFT": in_top(peft.inject_oft, "q_proj", "v_proj", block_size=16),
    "(IA)3": in_top(peft.inject_ia3, "k_proj", "v_proj", feedforward=["fc2"]),
    "BitFit": in_top(peft.inject_bitfit, *LINEAR, "norm1", "norm2"),
    "LayerNorm tuning": in_top(peft.inject_layer_norm, "norm1", "norm2"),
    "adapters": in_top(peft.inject_adapter, "out_proj", "fc2", reduction_factor=16),
    "prefix tuning": in_top(peft.inject_prefix, "attention", num_virtual_tokens=4),
    "prompt tuning": technique(peft.inject_prompt, "embed", num_virtual_tokens=4),
    "top two blocks": part1.blocks_from(TOP[0]),
    "full fine-tuning": part1.blocks_from(0),
}

WIDE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # tried for all that 2.5 shows

RATES = {
    **{name: WIDE for name in ("LoRA", "BitFit", "adapters", "OFT", "top two blocks")},
    "PiSSA": (3e-4, 1e-3, 3e-3),
    **dict.fromkeys(("DoRA", "LoRA+", "LayerNorm tuning"), (1e-3, 3e-3, 1e-2)),
    **dict.fromkeys(("VeRA", "(IA)3", "prefix tuning", "prompt tuning"), (3e-2, 1e-1, 3e-1)),
    "full fine-tuning": (3e-5, 1e-4, 3e-4),
}

AGAIN = dict.fromkeys(("LoRA", "BitFit", "adapters"), (1e-3, 3e-3, 1e-2))  # on other texts
AGAIN["top two blocks"] = (1e-4, 3e-4, 1e-3)


FIRST_PLACE = "q, v; top two; r = 8; alpha = 16"  # LoRA of 2.6; the others change one thing

PLACES = {
    FIRST_PLACE: TECHNIQUES["LoRA"],
    "attention's four": lora(*LINEAR[:4], blocks=TOP),
    "feed-forward's two": lora(*LINEAR[4:], blocks=TOP),
    "all six matrices": lora(*LINEAR, blocks=TOP),
    "top three blocks": lora("q_proj", "v_proj", blocks=range(3, 6)),
    "all six blocks": lora("q_proj", "v_proj", blocks=range(6)),
    "bottom three blocks": lora("q_proj", "v_proj", blocks=range(3)),
    "r = 1; alpha = 2": lora("q_proj", "v_proj", r=1, blocks=TOP),
    "r = 32; alpha = 64": lora("q_proj", "v_proj", r=32, blocks=TOP),
    "alpha = 4": in_top(peft.inject_lora, "q_proj", "v_proj", r=8, lora_alpha=4),
    "alpha = 64": in_top(peft.inject_lora, "q_proj", "v_proj", r=8, lora_alpha=64),
}


class Train:
    """Train a model by a technique of a table: 12 steps of 16 rows, or two epochs.

    The head, which starts as linear probing's, learns at 1e-3, all else at the rate that is given;
    LoRA+ has it for B, and a sixteenth of it for A.
    """

    def __init__(self, techniques=TECHNIQUES):
        self.techniques = techniques

    def first(self, name):
        """Return the lowest block that a technique changes."""
        return self.techniques[name].first

    def inject(self, model, name):
        """Put a technique into a model; it and the head are trainable, nothing else."""
        training.freeze(model)
        self.techniques[name](model, torch.Generator().manual_seed(torch.initial_seed()))
        training.unfreeze(model.head)

    def fit(self, model, X, y, *, technique, lr):
        """Train what is trainable."""
        rates = {"encoder": lr, "head": HEAD_RATE}
        if technique == "LoRA+":
            rates |= {"encoder": lr / 16, ".lora_B": lr}
        epochs = max(2, round(12 / math.ceil(len(y) / 16)))
        return training.fit(model, X, y, lr=rates, epochs=epochs, batch_size=16)

    def __call__(self, model, X, y, *, technique, lr):
        self.inject(model, technique)
        return self.fit(model, X, y, technique=technique, lr=lr)


def page(seed, *, texts, rates, k=LABELS, train=None, told=LABELS, folder=""):
    """Train techniques on `k` labels of each topic, each from linear probing and at its rate.

    The technique is varied; texts, labels, `C` of linear probing, `rates` and how to `train`, None
    being `Train` of this page, are fixed. Returns what `part1.label_curve` does, columns called by
    the technique alone.
    """
    plan = {name: (name, k, rate) for name, rate in rates.items()}
    options = {"texts": texts, "plan": plan, "C": C, "budgets": (k,), "told": told}
    found = part1.label_curve(seed, train=train or Train(), folder=folder, **options)
    return {name.removesuffix("/0").removesuffix(f"/{k}"): found[name] for name in found}


def try_rates(texts, seeds, *, rates=RATES, train=None, workers=None, folder=""):
    """Score each technique at each of its rates on validation rows, at 8 labels of each topic.

    The rate is varied; how to `train` is fixed, None being `Train` of this page; seeds are others
    than a measurement's. Returns the best of each technique,
    technique to rate to mean accuracy, and each seed's margin.
    """
    tries = {name: columns(name, several) for name, several in rates.items()}
    plan = {c: (name, LABELS, lr) for name, of in tries.items() for lr, c in of.items()}
    options = {"texts": texts, "C": C, "budgets": (LABELS,), "folder": folder}
    options |= {"train": train or Train(), "workers": workers, "apart": {"plan": plan}}
    means, margin = try_settings(part1.label_curve, tries, seeds, **options)
    return best(means), means, margin


def few(seed, *, folder=""):
    """Draw 8 headlines of each topic and 24 to score on; return linear probing's model and them.

    The model, (tokens, labels) to train on, and (tokens, labels) to score.
    """
    encoder, tokens, y, names = part1.start("headlines", folder)
    free = part1.free_labels("headlines", y, "test", folder)
    rows = data.draw(free, seed, train=LABELS, test=part1.SCORED["test"])
    train, test = ((part1.some(tokens, r), y[r.flatten()]) for r in rows.values())
    model = models.TextClassifier(copy.deepcopy(encoder), len(names))
    model.head = training.logistic_head(training.extract_features(model, train[0]), train[1], C=C)
    return model, train, test


def demonstrate(name, seed, *, lr, folder=""):
    """Put one of `TECHNIQUES` into the encoder, train it, and check what it promises.

    Nothing is varied. Returns the trained model, and facts to print: what was adapted, counted,
    checked and scored.
    """
    with reproducible(seed):
        begin, (X, y), test = few(seed, folder=folder)
        model, train = copy.deepcopy(begin), Train()
        train.inject(model, name)
        ends = [module.rpartition(".")[2] for module in peft.adapters(model)]
        if not ends:
            raise ValueError(f"{name} adds nothing to switch off or to merge: `page` scores it")
        counted, in_head = (training.count_parameters(part) for part in (model, model.head))
        gap = (training.predict(model, X) - training.predict(begin, X)).abs().max()
        frozen = {k: p for k, p in model.named_parameters() if not p.requires_grad}
        frozen |= dict(model.named_buffers())
        then = copy.deepcopy(frozen)
        train.fit(model, X, y, technique=name, lr=lr)
        moved = sum(not torch.equal(tensor, then[k]) for k, tensor in frozen.items())
        logits, score = training.predict(model, X), training.evaluate(model, *test)
        begin.head = model.head
        with peft.adapters_disabled(model):
            off = torch.equal(training.predict(model, X), training.predict(begin, X))
    try:
        merged = copy.deepcopy(model)
        peft.merge(merged)
        plain = not any(isinstance(m, peft.Adapter) for m in merged.modules())
        same = bool((training.predict(merged, X) - logits).abs().max() < 1e-10)
        told = f"merged into plain layers: {plain}, same outputs: {same}"
    except ValueError:
        told = "stays as it is: no plain layer computes the same"
    changed = "as before" if gap < 1e-10 else "changed by its new tokens"
    return model, [
        f"{name}: modules adapted: {len(ends)} ({', '.join(dict.fromkeys(ends))})",
        f"{counted}, {in_head.trainable:,} of them in the head",
        f"outputs after injection, before training: {changed}",
        f"frozen tensors that moved in training: {moved} of {len(frozen)}",
        f"switched off, the base's outputs return exactly: {off}",
        f"after training: {told}",
        f"test rows right: {score.correct} of {score.n}",
    ]
