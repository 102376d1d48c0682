"""What a step of PEFT costs, as ratios measured side by side in one run: `make bench`.

On a two-block transformer encoder of width d, 2,048 tokens and one thread:

1. Time and peak memory of forward + backward + optimiser step: LoRA of rank 8, ours against full
   fine-tuning and Hugging Face `peft`; DoRA, OFT, VeRA and (IA)3, ours against `peft`.
2. The merged model's forward pass against the base's.
3. Injection into a 12-layer model, ours against `get_peft_model`.

Exits with 1 if a bar is missed.
"""

import copy
import sys
from functools import partial

import peft
import torch
from measure import holds, interleaved, peak, printed
from torch import nn
from torch.optim import AdamW

from helpers.models import EncoderBlock
from helpers.peft import inject_dora, inject_ia3, inject_lora, inject_oft, inject_vera, merge
from helpers.training import freeze

QV, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
R8 = dict(r=8, lora_alpha=16)
TECHNIQUES = {  # how we inject, how peft does
    "LoRA, q,v": (partial(inject_lora, targets=QV, **R8), peft.LoraConfig(target_modules=QV, **R8)),
    "LoRA, all linears": (
        partial(inject_lora, targets=ALL, **R8),
        peft.LoraConfig(target_modules=ALL, **R8),
    ),
    "DoRA, q,v": (
        partial(inject_dora, targets=QV, **R8),
        peft.LoraConfig(target_modules=QV, use_dora=True, **R8),
    ),
    **{
        f"OFT, q,v, blocks of {b}": (
            partial(inject_oft, targets=QV, block_size=b),
            peft.OFTConfig(target_modules=QV, oft_block_size=b, use_cayley_neumann=False),
        )
        for b in (8, 32)  # our default and peft's
    },
    "VeRA, q,v": (
        lambda model: inject_vera(model, QV, generator=torch.Generator().manual_seed(0)),
        peft.VeraConfig(target_modules=QV, projection_prng_key=0),
    ),
    "(IA)3, k,v and fc2": (
        partial(inject_ia3, targets=["k_proj", "v_proj"], feedforward=["fc2"]),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    ),
}
BARS = {  # of ours at d = 768, against full fine-tuning and peft
    "LoRA, q,v": {"full": 0.70, "peft": 1},
    "LoRA, all linears": {"full": 0.72, "peft": 0.85},
    **{name: {"peft": 1} for name in list(TECHNIQUES)[2:]},
}
ROUNDS = 11


def encoder(d, n_layers=2):
    """Return a transformer encoder of width d."""
    return nn.Sequential(*(EncoderBlock(d, 4, 4 * d, 1e-12) for _ in range(n_layers)))


def adapt(model, how, technique):
    """Return `model` prepared for training, by full fine-tuning, by peft or by us."""
    inject, config = TECHNIQUES[technique]
    if how == "peft":
        return peft.get_peft_model(model, copy.deepcopy(config))
    if how == "ours":
        freeze(model)
        inject(model)
    return model


def trained(model):
    """Return the trained parameters in an order that does not depend on how they are called."""
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [p for _, p in named]


@torch.no_grad()
def check_same(ours, theirs, x):
    """Assert that both models compute the same once their parameters are drawn alike."""
    for p, q in zip(trained(ours), trained(theirs), strict=True):
        p += 0.02 * torch.randn_like(p)
        q.copy_(p.view_as(q))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def stepper(model, x):
    """Return a function that does one step of training."""
    model.train()
    optimizer = AdamW(trained(model), lr=1e-4, fused=True)

    def _step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _step


def peak_of_steps(how, technique, d):
    """Return the peak memory of three steps, above that of process, data and weights, in kB."""
    step = stepper(adapt(encoder(d), how, technique), torch.randn(16, 128, d))
    torch.randn(64, 64) @ torch.randn(64, 64)  # loads code
    return peak(lambda: [step() for _ in range(3)])


def steps(technique, base, x):
    """Print the ratios of one technique; return whether its bars hold."""
    d, bars = x.shape[-1], BARS[technique]
    models = {how: adapt(copy.deepcopy(base), how, technique) for how in ("ours", *bars)}
    check_same(models["ours"], models["peft"], x)
    times = interleaved({how: stepper(model, x) for how, model in models.items()}, ROUNDS)
    memory = {how: printed(__file__, how, technique, str(d)) for how in models}
    return all(
        [
            holds(
                f"d={d}, {technique}: step, ours / {how}",
                *(times["ours"], times[how], bar if d == 768 else None),
                "at most",
                beside=f"; peak memory {memory['ours'] / memory[how]:.2f}",
            )
            for how, bar in bars.items()
        ]
    )


def merged_forward(base, x):
    """Print the ratio of the merged model's forward pass to the base's."""
    model = copy.deepcopy(base)
    inject_lora(model, ALL)
    merge(model)
    with torch.no_grad():
        times = interleaved({"merged": partial(model, x), "base": partial(base, x)}, ROUNDS)
    return holds(f"d={x.shape[-1]}: forward, merged / base", times["merged"], times["base"])


def injection():
    """Print the ratio of the time of our injection to that of peft's."""
    fresh = encoder(768, 12)
    ways = {how: partial(adapt, how=how, technique="LoRA, all linears") for how in ("ours", "peft")}
    times = interleaved(ways, 5, prepare=lambda way: partial(way, copy.deepcopy(fresh)))
    return holds("injection into 12 layers, d=768, ours / peft", times["ours"], times["peft"])


def main():
    """Print all ratios; return whether all bars hold."""
    torch.manual_seed(0)
    kept = []
    for d in (256, 768):
        base, x = encoder(d), torch.randn(16, 128, d)
        kept += [steps(t, base, x) for t in TECHNIQUES if d == 768 or "LoRA," in t]
        merged_forward(base, x)
    injection()
    return all(kept)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:]:
        print(peak_of_steps(*sys.argv[1:3], int(sys.argv[3])))
    else:
        sys.exit(not main())
