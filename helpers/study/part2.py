"""Part 2's experiments: one pre-trained transformer, every technique, the same few labels."""

import copy
import hashlib
import inspect
import os
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.optim import Adam

from helpers.data import digits, few_per_class, shift_digits
from helpers.models import TinyTransformer, with_fresh_head
from helpers.peft import (
    Adapter,
    adapters,
    adapters_disabled,
    inject_adapter,
    inject_bitfit,
    inject_dora,
    inject_ia3,
    inject_layer_norm,
    inject_lora,
    inject_oft,
    inject_prefix,
    inject_prompt,
    inject_vera,
    load_trainable,
    merge,
    save_trainable,
)
from helpers.study.seeds import percent, reproducible, run_seeds, stream
from helpers.training import (
    count_parameters,
    evaluate,
    freeze,
    lp_ft,
    param_groups,
    predict,
    train,
    unfreeze,
)

HELPERS = Path(__file__).parent.parent
CACHE = HELPERS.parent / "build" / "pretrained"

LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

DRIFT = 1e-8  # logits of two processors differ by less in these studies: 8e-9 was measured

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # validation rows decide which of these a technique gets

# At the last rate these are so unstable that rounding grows until processors disagree
UNSTABLE = ("from scratch", "full fine-tuning", "LoRA", "PiSSA", "DoRA")

TARGETS = {  # what the target images went through, in order: kind and strength of `shift_digits`
    "faint": [("contrast", 0.3), ("noise", 0.1)],
    "turned": [("rotation", 90.0)],
    "inverted": [("inversion", 0.0)],
    "noisy": [("noise", 0.3)],
}


def _everything(model, generator=None):
    unfreeze(model)


def _nothing(model, generator=None):
    """Only the head, which `prepare` unfreezes, is trained."""


def technique(function, *targets, **options):
    """Return `function` of a model and a generator, everything else given: an entry of a table.

    Parameters
    ----------
    function : callable
        One of `helpers.inject`'s.
    *targets : str
    **options : object

    Returns
    -------
    callable
        ``technique(model, generator)``.
    """
    takes_generator = "generator" in inspect.signature(function).parameters

    def _inject(model, generator=None):
        drawn = {"generator": generator} if takes_generator else {}
        return function(model, *([list(targets)] if targets else []), **options, **drawn)

    return _inject


LORA = {"r": 4, "lora_alpha": 8}

TECHNIQUES = {
    "from scratch": _everything,
    "full fine-tuning": _everything,
    "LP-FT": _everything,
    "linear probing": _nothing,
    "BitFit": technique(inject_bitfit),
    "LayerNorm tuning": technique(inject_layer_norm),
    "LoRA on q, v": technique(inject_lora, "q_proj", "v_proj", **LORA),
    "LoRA": technique(inject_lora, *LINEAR, **LORA),
    "LoRA+": technique(inject_lora, *LINEAR, **LORA),
    "PiSSA": technique(inject_lora, *LINEAR, **LORA, init="pissa"),
    "DoRA": technique(inject_dora, *LINEAR, **LORA),
    "VeRA": technique(inject_vera, *LINEAR, r=16),
    "OFT": technique(inject_oft, *LINEAR, block_size=8),
    "adapters, Houlsby": technique(inject_adapter, "out_proj", "fc2", reduction_factor=8),
    "adapters, Pfeiffer": technique(inject_adapter, "fc2", reduction_factor=4),
    "adapters, parallel": technique(
        inject_adapter, "feed_forward", reduction_factor=4, parallel=True
    ),
    "(IA)3": technique(inject_ia3, "k_proj", "v_proj", feedforward=["fc2"]),
    "prompt tuning": technique(inject_prompt, "embed", num_virtual_tokens=4),
    "prefix tuning": technique(inject_prefix, "attention", num_virtual_tokens=4),
}


def samples(seed, target, *, per_class=10, most=25):
    """Draw a seed's rows: source images, and images of the target domain to train and score on.

    Parameters
    ----------
    seed : int
    target : str
        A key of `TARGETS`.
    per_class : int, default=10
        Labelled target images of each digit, 1 to `most`.
    most : int, default=25
        Up to 50; above 25, 240 more images are set aside for "few", and "test" has 257.

    Returns
    -------
    dict of str to (X, y)
        "source" (800 rows), "few" (10 * per_class), "validation" (200) and "test" (497), no image
        in two of them, and "source test", the images of "test" as they were. Only "few" depends
        on `per_class`.
    """
    with reproducible(seed):
        rng = np.random.default_rng(seed)
        aside = 300 if most <= 25 else 540
        source, pool, validation, test = digits(rng, (800, aside, 200, 797 - aside))
        few = few_per_class(pool[1], most, rng)[:, :per_class].flatten()  # fewer are part of more
        rows = {"few": pool, "validation": validation, "test": test}
        for kind, strength in TARGETS[target]:
            for name, (X, y) in rows.items():
                rows[name] = shift_digits(X, kind, strength=strength, rng=rng), y
        rows["few"] = tuple(part[few] for part in rows["few"])
    return {"source": source, "source test": test} | rows


def pretrained(seed, *, folder=CACHE):
    """Train a `TinyTransformer` on a seed's source images, or read it from an earlier run.

    What is kept in `folder` goes by the hash of everything that it depends on: code, library
    versions, instruction set, threads, seed. A damaged file is told of and made again.

    Parameters
    ----------
    seed : int
    folder : Path, default=CACHE
        Under ``build/``, which may be deleted at any time.

    Returns
    -------
    TinyTransformer
        In float64.
    """
    sources = [path.read_bytes() for path in sorted(HELPERS.rglob("*.py"))]
    pins = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA")
    setting = [os.environ.get(name) for name in pins]
    machine = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), *setting]
    libraries = [version(name) for name in ("torch", "numpy", "scipy", "scikit-learn")]
    key = hashlib.sha256(repr([sources, machine, libraries, seed]).encode()).hexdigest()
    path = Path(folder) / f"{key[:32]}.safetensors"
    with reproducible(seed):
        model = TinyTransformer()
        if path.exists():
            try:
                load_trainable(model, path)
                return model
            except ValueError as error:
                warnings.warn(f"pre-training anew: {error}", stacklevel=2)
        source = samples(seed, "faint")["source"]
        order = torch.Generator().manual_seed(stream(seed, "batches"))
        optimizer = Adam(model.parameters(), lr=1e-3, fused=True)
        train(model, *source, optimizer=optimizer, epochs=30, batch_size=64, generator=order)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_trainable(model, path)
    return model


def start(seed, *, folder=CACHE):
    """Return a seed's pre-trained model with a fresh head: where every technique starts.

    Parameters
    ----------
    seed : int
    folder : Path, default=CACHE
        Of `pretrained`.

    Returns
    -------
    TinyTransformer
    """
    model = pretrained(seed, folder=folder)
    with reproducible(stream(seed, "head")):
        return with_fresh_head(model)


def prepare(model, technique, *, seed=0):
    """Return a copy of `model` in which `technique` and the head are trainable, nothing else.

    Parameters
    ----------
    model : TinyTransformer
    technique : callable
        ``technique(model, generator)``, as in `TECHNIQUES`.
    seed : int, default=0
        Of the technique's new parameters.

    Returns
    -------
    TinyTransformer
    """
    model = copy.deepcopy(model)
    freeze(model)
    technique(model, torch.Generator().manual_seed(stream(seed, "technique")))
    unfreeze(model.head)
    return model


def fit(model, rows, *, lr, epochs=40, name=""):
    """Train what is trainable, full batch, by Adam.

    Two techniques are ways of training: LoRA+, whose A learns at a sixteenth of the rate of B, and
    LP-FT, which trains the head for half of the epochs, at 1e-2, and then everything.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    rows : tuple of (X, y)
    lr : float
        Adam's learning rate.
    epochs : int, default=40
    name : str, default=""
        Of the technique.

    Returns
    -------
    dict of str to list of float
        The history of `train`, of LP-FT's second phase.
    """
    if name == "LP-FT":
        phases = {"probe_epochs": epochs // 2, "epochs": epochs - epochs // 2, "probe_lr": 1e-2}
        return lp_ft(model, *rows, lr=lr, **phases)
    rates = {"": lr / 16, ".lora_B": lr, "head": lr} if name == "LoRA+" else {"": lr}
    optimizer = Adam(param_groups(model, rates), fused=True)
    return train(model, *rows, optimizer=optimizer, epochs=epochs)


def compare_techniques(
    seed, *, target, rates, score_on="test", techniques=TECHNIQUES, per_class=10, epochs=40
):
    """Train techniques on the same rows from the same start, and score them.

    Parameters
    ----------
    seed : int
        Of the pre-training, the rows, the fresh head and the new parameters.
    target : str
        A key of `TARGETS`.
    rates : dict of str to float or tuple of float
        Learning rate of each technique to run, or several to try.
    score_on : {"test", "validation"}
        Validation images are for choosing `rates`.
    techniques : dict of str to callable, default=TECHNIQUES
        As in `prepare`. "from scratch" starts from random weights.
    per_class, epochs : int
        As in `samples` and `fit`.

    Returns
    -------
    dict of str to float
        "technique", or "technique, rate" where there are several: accuracy in percent; "not
        adapted", that of the pre-trained model with its own head; and "margin", that of the closest
        decision.
    """
    rows = samples(seed, target, per_class=per_class)
    transferred = start(seed)
    scores = {"not adapted": evaluate(pretrained(seed), *rows[score_on])}
    with reproducible(seed):
        fresh = TinyTransformer()
        for name, several in rates.items():
            for lr in np.atleast_1d(several):
                begin = fresh if name == "from scratch" else transferred
                model = prepare(begin, techniques[name], seed=seed)
                fit(model, rows["few"], lr=float(lr), epochs=epochs, name=name)
                label = name if np.isscalar(several) else f"{name}, {lr:g}"
                scores[label] = evaluate(model, *rows[score_on])
    return percent(scores)


def try_rates(target, seeds, *, techniques=TECHNIQUES, rates=RATES, workers=None, **options):
    """Score each technique at each learning rate on validation images.

    Parameters
    ----------
    target : str
        A key of `TARGETS`.
    seeds : sequence of int
        Others than those of the measurement.
    techniques : dict of str to callable, default=TECHNIQUES
    rates : sequence of float, default=RATES
    workers : int, optional
        As in `helpers.study.run_seeds`.
    **options : object
        `per_class` and `epochs` of `compare_techniques`.

    Returns
    -------
    dict of str to dict of float to float
        Technique to learning rate to mean accuracy in percent. 0.03 is left out for `UNSTABLE`.
    """
    several = {
        name: tuple(lr for lr in rates if lr < 3e-2 or name not in UNSTABLE) for name in techniques
    }
    experiment = partial(
        compare_techniques,
        target=target,
        rates=several,
        score_on="validation",
        techniques=techniques,
        **options,
    )
    found = run_seeds(experiment, seeds, workers=workers)
    return {
        name: {lr: float(found[f"{name}, {lr:g}"].mean().round(9)) for lr in several[name]}
        for name in techniques
    }


def demonstrate(name, seed, *, target, lr, epochs=40, per_class=10):
    """Inject one technique, train it, and check what it promises.

    Parameters
    ----------
    name : str
        A key of `TECHNIQUES`.
    seed : int
    target : str
        A key of `TARGETS`.
    lr : float
    epochs, per_class : int
        As in `fit` and `samples`.

    Returns
    -------
    model : TinyTransformer
        As trained.
    history : dict of str to list of float
    facts : list of str
        What was adapted, counted, checked and scored, to be printed.
    """
    _check_transferred(name)
    rows, begin = samples(seed, target, per_class=per_class), start(seed)
    X, _ = rows["few"]
    model = prepare(begin, TECHNIQUES[name], seed=seed)
    n = len(adapters(model))
    ends = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in adapters(model)))
    counted = count_parameters(model)
    gap = float((predict(model, X) - predict(begin, X)).abs().max())
    before = copy.deepcopy(model)
    history = fit(model, rows["few"], lr=lr, epochs=epochs, name=name)
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    frozen |= {k for k, _ in model.named_buffers()}
    then, now = before.state_dict(), model.state_dict()
    moved = sum(not torch.equal(now[k], then[k]) for k in frozen)
    logits = predict(model, X)
    with adapters_disabled(model):
        off = torch.equal(predict(model, X), _with_head(begin, model, X))
    merged = copy.deepcopy(model)
    try:
        merge(merged)
        plain = not any(True for m in merged.modules() if isinstance(m, Adapter))
        same = float((predict(merged, X) - logits).abs().max()) < 1e-10
        told = f"merged into plain layers: {plain}, same outputs: {same}"
    except ValueError:
        told = "stays as it is: there is no plain layer that computes the same"
    changed = "as before" if gap < 1e-10 else "changed by its new tokens"
    return (
        model,
        history,
        [
            f"Adapted: {n} module{'s' * (n != 1)} ({ends})",
            f"{counted}, {count_parameters(model.head).trainable:,} of them in the head",
            f"Outputs after injection, before training: {changed}",
            f"Frozen tensors that moved in {epochs} steps: {moved} of {len(frozen)}",
            f"Disabled, the base's outputs return exactly: {off}",
            f"After training: {told}",
            f"Test rows right: {evaluate(model, *rows['test']).correct} of {len(rows['test'][1])}",
        ],
    )


def _check_transferred(name):
    if name == "from scratch":
        raise ValueError("'from scratch' has no pre-trained start: compare_techniques runs it")


def _with_head(base, model, X):
    """Outputs of `base` under the head of `model`."""
    base = copy.deepcopy(base)
    base.head = model.head
    return predict(base, X)
