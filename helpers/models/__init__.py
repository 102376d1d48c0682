"""Models to train: the published MLP, a transformer encoder; their stages and fresh heads."""

# fmt: off
from helpers.models.mlp import MLP
from helpers.models.stages import stages, with_fresh_head
from helpers.models.transformer import (
    Attention, Block, FeedForward, PatchEmbedding, TinyTransformer
)
