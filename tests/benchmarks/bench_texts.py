"""What a real encoder costs on real texts, ratios measured side by side in one run: `make bench`.

On all-MiniLM-L6-v2 in single precision, on one thread:

1. Time of one fit on 40 headlines, 30 steps of 16, LoRA of rank 8 on the query and value
   projections, the head trained: ours on all blocks, on the top three, there with the frozen
   blocks cached (which is timed), full fine-tuning, and `transformers.Trainer` with `peft` on
   `transformers.BertModel` below the same mean and head, as its users get it: the checkpoint's
   dropout, Trainer's clipping, which ours does without; fused AdamW, batches padded to their
   longest row, nothing logged, scored or saved. "Bare" is Trainer without dropout and clipping.
   Building models is not timed.
2. Time to embed 2,000 headlines, cutting into tokens included, against `sentence_transformers`.
3. Peak memory of ours, LoRA on all blocks against full fine-tuning, above that of the weights.

Exits with 1 if a bar is missed.
"""

import copy
import statistics
import sys
import tempfile
from functools import partial

import torch
from measure import holds, interleaved, peak, printed
from people import trainer
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from transformers.utils import logging

from helpers.data import draw, headlines
from helpers.models import Encoder, TextClassifier, Tokenizer, bundled
from helpers.peft import inject_lora
from helpers.training import cache_prefix, extract_features, fit, freeze, unfreeze

STEPS, EPOCHS, BATCH, LR = 30, 10, 16, 1e-3  # batches of 16, 16 and 8
BLOCKS = {"all": range(6), "top": range(3, 6), "cached": range(3, 6)}
ROUNDS = {"fit": 7, "embed": 5, "memory": 3}


def rows():
    """Return 40 headlines, eight of each topic, and their labels."""
    news = headlines()
    drawn = draw(news.y, 0, train=8)["train"]
    return news.take(drawn), news.y[drawn.flatten()]


def ours(how):
    """Return our classifier with what is to be trained: "full" or LoRA on some blocks."""
    torch.manual_seed(0)
    model = TextClassifier(Encoder.from_pretrained(bundled()), 5)
    if how in BLOCKS:
        freeze(model)
        names = [f"blocks.{b}.attention.{p}_proj" for b in BLOCKS[how] for p in "qv"]
        inject_lora(model, names, r=8, lora_alpha=16)
        unfreeze(model.head)
    return model


def fit_ours(how, model, tokens, y):
    """Train the model; return the mean loss of its steps."""
    X = cache_prefix(model, tokens) if how == "cached" else tokens
    history = fit(model, X, y, lr=LR, epochs=EPOCHS, batch_size=BATCH)
    return statistics.mean(history["loss"])


def theirs(folder, texts, y, *, bare=False):
    """Return transformers' `trainer` with the settings of our fit."""
    return trainer(folder, texts, y.tolist(), steps=STEPS, batch=BATCH, lr=LR, bare=bare)


def fits(folder):
    """Return the times of all ways to fit; print first how far each comes."""
    texts, y = rows()
    tokens, models = Tokenizer(bundled())(texts), {how: ours(how) for how in ("full", *BLOCKS)}

    def _ours(how):
        return partial(fit_ours, how, copy.deepcopy(models[how]), tokens, y)

    losses = ", ".join(f"{how} {_ours(how)():.2f}" for how in models)
    result = theirs(folder, texts, y, bare=True).train()
    losses += f", bare Trainer + peft {result.training_loss:.2f} ({result.global_step} steps)"
    print(f"mean loss of {STEPS} steps: {losses}")
    makers = {how: partial(_ours, how) for how in models}
    makers["Trainer"] = lambda: theirs(folder, texts, y).train
    makers["bare"] = lambda: theirs(folder, texts, y, bare=True).train
    return interleaved(makers, ROUNDS["fit"], prepare=lambda make: make())


def embeddings():
    """Return the times of both ways to embed; print first how far apart the vectors are."""
    texts, tokenizer, model = headlines().texts[:2000], Tokenizer(bundled()), ours("full")
    freeze(model)
    theirs = SentenceTransformer(str(bundled()), device="cpu")

    def _embed():
        return F.normalize(extract_features(model, tokenizer(texts)))

    apart = (_embed() - torch.from_numpy(theirs.encode(texts))).abs().max()
    print(f"embeddings, ours - sentence-transformers: {apart:.0e} at most")
    makers = {"ours": lambda: _embed, "theirs": lambda: partial(theirs.encode, texts)}
    return interleaved(makers, ROUNDS["embed"], prepare=lambda make: make())


def peak_of_fit(how):
    """Return the peak memory of a fit, above that of process, data and weights, in kB."""
    texts, y = rows()
    tokens, model = Tokenizer(bundled())(texts), ours(how)
    with torch.no_grad():
        model(**tokens)  # loads code
    return peak(partial(fit_ours, how, model, tokens, y))


def main():
    """Print all ratios; return whether all bars hold."""
    with tempfile.TemporaryDirectory() as folder:
        t = fits(folder)
    e, hows = embeddings(), ("all", "full")
    peaks = [[printed(__file__, how) for how in hows] for _ in range(ROUNDS["memory"])]
    m = dict(zip(hows, zip(*peaks, strict=True), strict=True))
    return all(
        [
            holds("fit, Trainer + peft / ours", t["Trainer"], t["all"], 1.25),
            holds("fit, bare Trainer + peft / ours", t["bare"], t["all"]),
            holds("fit, ours, full / all blocks", t["full"], t["all"]),
            holds("fit, ours, all blocks / top three", t["all"], t["top"]),
            holds("fit, ours, all blocks / top three, cached", t["all"], t["cached"], 1.8),
            holds("fit, Trainer + peft / ours, cached", t["Trainer"], t["cached"], 2.5),
            holds("embedding, sentence-transformers / ours", e["theirs"], e["ours"], 1.0),
            holds("peak memory, ours, all blocks / full", m["all"], m["full"], 0.6, "at most"),
        ]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if sys.argv[1:]:
        print(peak_of_fit(sys.argv[1]))
    else:
        sys.exit(not main())
