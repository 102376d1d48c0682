"""Digits that a small transformer is pre-trained on, for Part 3's studies of many tasks."""

import hashlib
import os
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from helpers import data, models, peft, training
from helpers.study.seeds import reproducible, stream

HELPERS = Path(__file__).parent.parent
CACHE = HELPERS.parent / "build" / "pretrained"

TARGETS = {  # what the target images went through, in order: kind and strength of `shift_digits`
    "faint": [("contrast", 0.3), ("noise", 0.1)],
    "turned": [("rotation", 90.0)],
    "inverted": [("inversion", 0.0)],
    "noisy": [("noise", 0.3)],
}


def samples(seed, target, *, per_class=10, most=25):
    """Draw a seed's rows: source images, and images of a target domain to train and score on.

    `target` is one of `TARGETS`. Returns (X, y) of "source" (800 rows), "few" (`per_class`, 1 to
    `most`, labelled target images of each digit), "validation" (200) and "test" (497), no image in
    two of them, and of "source test", the images of "test" as they were. Only "few" depends on
    `per_class`. With a `most` of 26 to 50, 240 more images are set aside for it, and "test" has
    257.
    """
    with reproducible(seed):
        rng = np.random.default_rng(seed)
        aside = 300 if most <= 25 else 540
        source, pool, validation, test = data.digits(rng, (800, aside, 200, 797 - aside))
        order = data.few_per_class(pool[1], most, rng)  # (10, most)
        rows = {"few": pool, "validation": validation, "test": test}
        for kind, strength in TARGETS[target]:
            for name, (X, y) in rows.items():
                rows[name] = data.shift_digits(X, kind, strength=strength, rng=rng), y
        few = order[:, :per_class].flatten()  # fewer are part of more
        rows["few"] = tuple(part[few] for part in rows["few"])
    return {"source": source, "source test": test} | rows


def pretrained(seed, *, folder=CACHE):
    """Train a `TinyTransformer` on a seed's source images, or read it from an earlier run.

    What is kept in `folder`, which may be deleted at any time, goes by the hash of everything that
    it depends on: code, library versions, instruction set, threads, seed. A damaged file is told
    of and made again. Returns the model, in float64.
    """
    sources = [path.read_bytes() for path in sorted(HELPERS.rglob("*.py"))]
    machine = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    machine += map(os.environ.get, ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA"))
    libraries = [version(name) for name in ("torch", "numpy", "scipy", "scikit-learn")]
    key = hashlib.sha256(repr([sources, machine, libraries, seed]).encode()).hexdigest()
    path = Path(folder) / f"{key[:32]}.safetensors"
    with reproducible(seed):
        model = models.TinyTransformer()
        if path.exists():
            try:
                peft.load_trainable(model, path)
                return model
            except ValueError as error:
                warnings.warn(f"pre-training anew: {error}", stacklevel=2)
        source = samples(seed, "faint")["source"]
        order = torch.Generator().manual_seed(stream(seed, "batches"))
        training.fit(model, *source, lr=1e-3, epochs=30, batch_size=64, generator=order)
        path.parent.mkdir(parents=True, exist_ok=True)
        peft.save_trainable(model, path)
    return model
