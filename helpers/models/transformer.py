"""A transformer encoder whose every projection is a layer that is called."""

import torch
from torch import nn

from helpers.models.encoder import Attention, FeedForward


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
