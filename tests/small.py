"""A small encoder in place of the packaged one, and what becomes of each row in a study on it."""

import json
import shutil
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers import models, training
from helpers.models import checkpoint
from helpers.study import part1, reproducible
from helpers.training import strategies

SIZES = dict(vocab=30522, d=32, n_layers=6, n_heads=2, d_ff=48, positions=32)
START = part1.start


def save_small(folder):
    """Write a random encoder of as many blocks as the packaged one, with its tokenizer."""
    with reproducible(0, dtype=torch.float32):
        encoder = models.Encoder(**SIZES)
        encoder.embed.token.weight.data *= 4  # random blocks leave it a bag of words
    shutil.copy(models.bundled() / "tokenizer.json", folder)
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": SIZES["vocab"],
        "hidden_size": SIZES["d"],
        "num_hidden_layers": SIZES["n_layers"],
        "num_attention_heads": SIZES["n_heads"],
        "intermediate_size": SIZES["d_ff"],
        "max_position_embeddings": SIZES["positions"],
        "type_vocab_size": 2,
    }
    (Path(folder) / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        for theirs, ours in reversed(checkpoint.NAMES.items()):
            if ours and theirs not in ("gamma", "beta"):
                name = name.replace(ours, theirs)
        tensors[name] = tensor
    save_file(tensors, Path(folder) / "model.safetensors")
    return str(folder)


class Traced:
    """Which texts are trained on, scored and retrieved: rows are known by their numbers.

    Each text's second token is made its number; what is computed of a row alone is known for it.
    """

    def __init__(self, monkeypatch):
        self.trained, self.scored, self.retrieved = set(), set(), set()
        self.origin, self.unknown, self.named = {}, 0, 0
        self.patch = monkeypatch.setattr
        self.patch(part1, "start", cache(self.start))
        self.patch(part1, "pairs", cache(part1.pairs.__wrapped__))
        for name in ("cache_prefix", "extract_features"):
            self.patch(training, name, partial(self.derived, getattr(training, name)))
        self.patch(training, "logistic_head", partial(self.head, training.logistic_head))
        self.patch(strategies, "train", partial(self.train, strategies.train))
        self.patch(training, "evaluate", partial(self.evaluate, training.evaluate))
        self.patch(training, "score", partial(self.score, training.score))
        for name, kind in (("zero_labels", self.scored), ("recall", self.retrieved)):
            self.patch(part1, name, partial(self.of_features, getattr(part1, name), kind))

    def start(self, texts, folder=""):
        encoder, tokens, y, names = START(texts, folder)
        tokens = {name: t.clone() for name, t in tokens.items()}
        tokens["ids"][:, 1] = 1000 + torch.arange(len(y))
        return encoder, tokens, y, names

    def rows(self, X):
        if isinstance(X, dict) and "ids" in X:
            return (X["ids"][:, 1] - 1000).tolist()
        X = X["hidden"] if isinstance(X, dict) else X
        return [self.origin.get(row.detach().numpy().tobytes()) for row in X]

    def learn(self, X, rows):
        X = X["hidden"] if isinstance(X, dict) else X
        found = zip(X.detach(), rows, strict=True)
        self.origin |= {x.numpy().tobytes(): row for x, row in found if row is not None}

    def derived(self, function, model, X, **options):
        result = function(model, X, **options)
        self.learn(result, self.rows(X))
        return result

    def head(self, function, X, y, **options):
        self.trained |= set(self.rows(X))
        head = function(X, y, **options)
        head.register_forward_hook(lambda head, x, out: self.learn(out, self.rows(x[0])))
        return head

    def train(self, function, model, X, *args, **options):
        self.trained |= set(self.rows(X))
        return function(model, X, *args, **options)

    def evaluate(self, function, model, X, y):
        self.scored |= set(self.rows(X))
        return function(model, X, y)

    def score(self, function, logits, y):
        rows = set(self.rows(logits))
        self.unknown += rows == {None}
        self.scored |= rows - {None}
        return function(logits, y)

    def of_features(self, function, kind, *args, **options):
        self.named += 1
        for X in args:
            if isinstance(X, torch.Tensor) and X.is_floating_point():
                kind |= set(self.rows(X))
        return function(*args, **options)
