"""What a mixed batch costs, as ratios measured side by side in one run: `make bench`.

Forward passes of a two-block transformer encoder of width d, 64 rows of 32 tokens, with LoRA of
rank 8 on all linear layers:

1. 64 rows through 8 adapters, in a shuffled order, and through 64 adapters, against 64 rows through
   one adapter of the same `MixedBatch`, and through a plain model with LoRA;
2. the same 8 adapters one after the other, each with its own rows.
"""

import copy
from functools import partial

import torch
from bench_lora import ALL, ROUNDS, encoder
from measure import holds, interleaved
from torch import nn

from helpers.peft import MixedBatch, inject_lora
from helpers.training import freeze

ROWS, TOKENS = 64, 32


def adapted(base):
    """Return a model with LoRA away from its start, on the weights of `base`, not on copies."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    for name in inject_lora(model, ALL, r=8, lora_alpha=16):
        nn.init.normal_(model.get_submodule(name).lora_B, std=0.01)
    return model


def one_by_one(models, x, owners):
    """Run each model on its own rows."""
    y = torch.empty_like(x)
    for k, model in enumerate(models):
        y[owners == k] = model(x[owners == k])
    return y


def main():
    """Print all ratios."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for d in (256, 768):
        base, x = encoder(d), torch.randn(ROWS, TOKENS, d)
        freeze(base)
        models = [adapted(base) for _ in range(ROWS)]
        few = MixedBatch(base, {str(k): model for k, model in enumerate(models[:8])})
        many = MixedBatch(base, {str(k): model for k, model in enumerate(models)})
        owners = torch.arange(ROWS)[torch.randperm(ROWS)]
        with torch.no_grad():
            ways = {
                "8 adapters": partial(few, x, [str(k) for k in (owners % 8).tolist()]),
                "64 adapters": partial(many, x, [str(k) for k in owners.tolist()]),
                "one adapter": partial(few, x, ["0"] * ROWS),
                "plain LoRA": partial(models[0], x),
                "8 in turns": partial(one_by_one, models[:8], x, owners % 8),
                "base": partial(base, x),
            }
            assert torch.allclose(ways["8 adapters"](), ways["8 in turns"](), atol=1e-4)
            times = interleaved(ways, ROUNDS)
        for over, under in (
            ("8 adapters", "one adapter"),
            ("8 adapters", "plain LoRA"),
            ("64 adapters", "one adapter"),
            ("64 adapters", "plain LoRA"),
            ("8 in turns", "8 adapters"),
            ("plain LoRA", "base"),
        ):
            holds(f"d={d}: {over} / {under}", times[over], times[under])


if __name__ == "__main__":
    main()
