"""Models to train: a pre-trained text encoder, the published MLP; their stages, fresh heads."""

# fmt: off
from helpers.models.checkpoint import Tokenizer, bundled, save_bert
from helpers.models.encoder import (
    Attention, Encoder, EncoderBlock, FeedForward, TextClassifier, TokenEmbedding
)
from helpers.models.mlp import MLP
from helpers.models.pretrained import positions, pretrained
from helpers.models.stages import stages, with_fresh_head
