"""Part 1's speed, as ratios measured side by side in one run: `make bench`.

1. Seeds per second of `run_seeds`, a process for each core with one thread, against the loop that
   one would write, in one process with torch's default number of threads.
2. Steps per second of a head trained on cached features, against training it through the frozen
   backbone.
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from joblib import cpu_count
from torch.optim import Adam

from helpers.data import published_task
from helpers.models import MLP
from helpers.study import run_seeds
from helpers.study.published import published_protocol
from helpers.training import extract_features, fit, freeze, train, unfreeze

SEEDS, ROUNDS = 8, 5
LOOP = f"""
import time
from helpers.study.published import published_protocol
published_protocol(0)
start = time.perf_counter()
for seed in range({SEEDS}):
    published_protocol(seed)
print(time.perf_counter() - start)
"""


def seconds(function, *args):
    """Return how long one call takes."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def sequential():
    """Time the plain loop in a fresh process that nobody told how many threads to use."""
    free = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    ran = subprocess.run([sys.executable, "-c", LOOP], env=free, capture_output=True, check=True)
    return float(ran.stdout)


def through_backbone(model, X, y, epochs):
    """Train the head of a model whose backbone is frozen and runs at every step."""
    freeze(model)
    unfreeze(model.head)
    train(model, X, y, optimizer=Adam(model.head.parameters(), lr=1e-2, fused=True), epochs=epochs)


def on_features(model, X, y, epochs):
    """Train the head of a model on its backbone's outputs, computed once."""
    fit(model.head, extract_features(model, X), y, lr=1e-2, epochs=epochs)


def report(what, slow, fast):
    """Print the ratio of paired times, its median and its range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    low, high = min(ratios), max(ratios)
    print(f"{what}: {statistics.median(ratios):.1f} x ({low:.1f} to {high:.1f}, {ROUNDS} pairs)")


def main():
    """Run both comparisons, pairs interleaved."""
    torch.set_num_threads(1)
    run_seeds(published_protocol, range(cpu_count()))  # start the workers
    loop, parallel = [], []
    for _ in range(ROUNDS):
        loop.append(sequential())
        parallel.append(seconds(run_seeds, published_protocol, range(SEEDS)))
    report(f"run_seeds on {cpu_count()} cores, against a loop with default threads", loop, parallel)

    task = published_task()
    for rows in (400, 20_000):
        X, y = (part.repeat(rows // 400, *[1] * (part.ndim - 1)) for part in task.train)
        whole, cached, model = [], [], MLP()
        through_backbone(model, X, y, 1)  # the first step of a process loads code
        for _ in range(ROUNDS):
            whole.append(seconds(through_backbone, model, X, y, 50))
            cached.append(seconds(on_features, model, X, y, 50))
        report(f"head on cached features, against through the backbone, {rows} rows", whole, cached)


if __name__ == "__main__":
    main()
