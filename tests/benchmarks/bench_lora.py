"""What a LoRA step costs, as ratios measured side by side in one run: `make bench`.

1. Time and peak memory of forward + backward + optimiser step, on a two-block transformer encoder
   of width d and 2,048 tokens: full fine-tuning, Hugging Face `peft` and ours, LoRA of rank 8.
2. The merged model's forward pass against the base's.
3. Injection into a 12-layer model, ours against `get_peft_model`.
"""

import copy
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW

from helpers.models import EncoderBlock
from helpers.peft import inject_lora, merge
from helpers.training import freeze

ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TARGETS = {"q,v": ["q_proj", "v_proj"], "all linears": ALL}
ROUNDS = 9


def encoder(d, n_layers=2):
    """Return a transformer encoder of width d."""
    return nn.Sequential(*(EncoderBlock(d, 4, 4 * d, 1e-12) for _ in range(n_layers)))


def adapt(model, how, targets):
    """Return `model` prepared for training in one of three ways."""
    if how == "peft":
        return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    if how == "ours":
        freeze(model)
        inject_lora(model, targets, r=8, lora_alpha=16)
    return model


def stepper(model, x):
    """Return a function that does one step of training."""
    model.train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def _step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _step


def cpu_seconds(function):
    """Return the processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def interleaved(functions, rounds=ROUNDS):
    """Return the times of each function, taken in turns after a warm-up."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(cpu_seconds(function))
    return times


def ratio(times, a, b):
    """Return the median ratio of paired times, with its quartiles, as text."""
    low, mid, high = statistics.quantiles([x / y for x, y in zip(times[a], times[b], strict=True)])
    return f"{mid:.2f} ({low:.2f} to {high:.2f})"


def resident(field):
    """Return VmRSS, memory in use, or VmHWM, its peak, in kB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def peak(how, d, targets):
    """Return the peak memory of three steps, above that of process, data and weights, in kB."""
    x, model = torch.randn(16, 128, d), encoder(d)
    step = stepper(adapt(model, how, targets), x)
    torch.randn(64, 64) @ torch.randn(64, 64)  # loads code
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts from here
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def peak_elsewhere(how, d, targets):
    """Return `peak` as measured in a process of its own."""
    call = f"from tests.benchmarks.bench_lora import *; print(peak({how!r}, {d}, {targets!r}))"
    run = [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + call]
    return float(subprocess.run(run, capture_output=True, check=True).stdout)


def main():
    """Print all ratios."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for d in (256, 768):
        base, x = encoder(d), torch.randn(16, 128, d)
        for label, targets in TARGETS.items():
            models = {how: adapt(copy.deepcopy(base), how, targets) for how in WAYS}
            times = interleaved({how: stepper(model, x) for how, model in models.items()})
            memory = {how: peak_elsewhere(how, d, targets) for how in WAYS}
            print(
                f"d={d}, {label}: step, ours / peft {ratio(times, 'ours', 'peft')},"
                f" ours / full {ratio(times, 'ours', 'full')},"
                f" peft / full {ratio(times, 'peft', 'full')};"
                f" peak memory, ours / peft {memory['ours'] / memory['peft']:.2f},"
                f" ours / full {memory['ours'] / memory['full']:.2f}"
            )
        merged = copy.deepcopy(base)
        inject_lora(merged, ALL)
        merge(merged)
        with torch.no_grad():
            forward = {"merged": partial(merged, x), "base": partial(base, x)}
            times = interleaved(forward)
        print(f"d={d}: forward, merged / base {ratio(times, 'merged', 'base')}")
    fresh = encoder(768, 12)
    copies = {how: iter([copy.deepcopy(fresh) for _ in range(6)]) for how in ("ours", "peft")}
    times = interleaved(
        {how: lambda how=how: adapt(next(copies[how]), how, ALL) for how in copies}, 5
    )
    print(f"injection into 12 layers, d=768, ours / peft: {ratio(times, 'ours', 'peft')}")


WAYS = ("full", "peft", "ours")

if __name__ == "__main__":
    main()
