"""A small encoder in place of the packaged one, what becomes of its rows, and a toy transformer."""

import json
import shutil
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from helpers import models, training
from helpers.models import Attention, FeedForward, checkpoint
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


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) (pre-norm).

    Parameters
    ----------
    d, n_heads, d_ff : int
        As in `Attention` and `FeedForward`.
    """

    def __init__(self, d, n_heads, d_ff):
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.attention = Attention(d, n_heads)
        self.norm2 = nn.LayerNorm(d)
        self.feed_forward = FeedForward(d, d_ff)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class PatchEmbedding(nn.Module):
    """project(patch) + position, for each of the patches that a row of numbers is cut into.

    Parameters
    ----------
    n_tokens, patch, d : int
        Patches of a row, numbers in a patch, width of the model.
    """

    def __init__(self, n_tokens, patch, d):
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(patch, d)
        self.position = nn.Parameter(torch.empty(n_tokens, d).normal_(std=0.02))

    def forward(self, x):
        return self.project(x.unflatten(-1, (-1, self.patch))) + self.position  # (B, n_tokens, d)


class TinyTransformer(nn.Module):
    """A transformer encoder that reads a row of numbers as a sequence of patches.

    ``x`` of shape (B, n_tokens * patch) is cut into `n_tokens` patches; an 8 x 8 digit of 64
    pixels becomes 8 tokens, one for each image row. Each patch is embedded linearly, a learned
    position is added, the blocks follow, and the mean over these tokens goes to the head. Tokens
    that a prompt puts before them are attended to, and have no part in the mean.

    Parameters
    ----------
    n_tokens, patch : int, default=8
    d : int, default=32
    n_heads : int, default=4
    n_layers : int, default=2
    d_ff : int or None, default=None
        Width of the feed-forward layers; None is ``2 * d``.
    n_classes : int, default=10
    """

    def __init__(
        self, n_tokens=8, patch=8, *, d=32, n_heads=4, n_layers=2, d_ff=None, n_classes=10
    ):
        super().__init__()
        self.n_tokens = n_tokens
        self.embed = PatchEmbedding(n_tokens, patch, d)
        self.blocks = nn.ModuleList(Block(d, n_heads, d_ff or 2 * d) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, n_classes)

    def forward(self, x):
        h = self.embed(x)  # (B, n_tokens, d), more tokens with a prompt
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, -self.n_tokens :].mean(1))  # (B, d) -> (B, n_classes)
