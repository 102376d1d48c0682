"""What people use to classify texts from few labels, one process each: `bench_people.py` starts it.

``python people.py WHO FOLDER`` reads tasks from stdin, one JSON object a line: "texts" and "labels"
to learn from, the classes' "names", "seed", and "test", the texts to answer; FOLDER is a
checkpoint's. It writes a line for each: "answers", the "seconds" of processor time from texts to a
fitted classifier, children's and loading the checkpoint included, and "peak", the memory in use at
most so far, in MB. Each function imports its own tools: SetFit's are in another environment.
"""

import json
import math
import os
import re
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

QUIET = {  # of `trainer`
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch_fused",
    "label_names": ["labels"],
    "remove_unused_columns": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def ours(texts, labels, *, technique, names, seed, folder):
    """Fit one of our techniques; labels are the classes' names, as a reader's are."""
    from helpers.finetuner import FineTuner
    from helpers.models.pretrained import _read

    _read.cache_clear()  # every fit loads the encoder, as others do
    model = FineTuner(technique, model_path=folder, random_state=seed)
    model.fit(texts, [names[label] for label in labels])
    return lambda test: [names.index(name) for name in model.predict(test)]


def setfit(texts, labels, *, names, seed, folder):
    """Fit SetFit with 20 pairs of a kind for each text, its defaults otherwise."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    model = SetFitModel.from_pretrained(folder, device="cpu")
    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            out, num_iterations=20, seed=seed, report_to="none", show_progress_bar=False
        )
        rows = Dataset.from_dict({"text": texts, "label": labels})
        Trainer(model=model, args=settings, train_dataset=rows).train()
    return lambda test: model.predict(test).tolist()


def trainer(out, texts, labels, *, steps, batch, lr, seed=0, bare=False):
    """Return transformers' Trainer of the packaged encoder with LoRA by peft, not yet trained.

    LoRA of rank 8 on queries and values and a fresh head on the mean of the tokens; fused AdamW,
    batches padded to their longest row, nothing logged, scored or saved; the checkpoint's dropout
    and Trainer's clipping, unless it is `bare`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional as F
    from transformers import AutoTokenizer, BertModel, PrinterCallback, Trainer, TrainingArguments

    from helpers.models import TextClassifier, bundled

    tokenizer = AutoTokenizer.from_pretrained(bundled())
    torch.manual_seed(seed)
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if bare else {}
    model = TextClassifier(BertModel.from_pretrained(bundled(), **changes), max(labels) + 1)
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"]
    )
    settings = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=lr,
        max_grad_norm=0 if bare else 1,
        seed=seed,
        **QUIET,
    )
    made = Trainer(
        get_peft_model(model, lora),
        settings,
        train_dataset=[tokenizer(t) | {"labels": k} for t, k in zip(texts, labels, strict=True)],
        data_collator=partial(_collate, tokenizer),
        compute_loss_func=lambda logits, labels, **_: F.cross_entropy(logits, labels),
    )
    made.remove_callback(PrinterCallback)
    return made


def _collate(tokenizer, rows):
    """Return a batch by the names that `TextClassifier` has for its inputs."""
    batch = tokenizer.pad(rows, return_tensors="pt")
    names = {"ids": "input_ids", "mask": "attention_mask", "labels": "labels"}
    return {name: batch[theirs] for name, theirs in names.items()}


def trainer_and_peft(texts, labels, *, names, seed, folder):
    """Fit `trainer`'s LoRA for about 30 steps of 16 rows, three epochs or more, at 1e-3."""
    from helpers.models import Tokenizer
    from helpers.training import predict

    steps = max(30, 3 * math.ceil(len(texts) / 16))
    with tempfile.TemporaryDirectory() as out:
        made = trainer(out, texts, labels, steps=steps, batch=16, lr=1e-3, seed=seed)
        made.train()
    tokens = Tokenizer(folder)
    return lambda test: predict(made.model, tokens(test)).argmax(1).tolist()


def tf_idf(texts, labels, *, names, seed, folder):
    """Fit scikit-learn's TF-IDF and logistic regression, their defaults; nothing is pre-trained."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, labels)
    return lambda test: model.predict(test).tolist()


def peak():
    """Return the peak memory of this process, in MB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000


COMPETITORS = {
    **{
        name: partial(ours, technique=name)
        for name in ("LoRA, contrastive", "LoRA, top half", "linear probing")
    },
    "SetFit": setfit,
    "Trainer + peft": trainer_and_peft,
    "TF-IDF": tf_idf,
}


def main(who, folder):
    """Fit and answer each task."""
    for line in sys.stdin:
        task = json.loads(line)
        test, before = task.pop("test"), sum(os.times()[:4])
        with redirect_stdout(sys.stderr):
            answer = COMPETITORS[who](**task, folder=folder)
            found = {"seconds": sum(os.times()[:4]) - before, "peak": peak()}
            found["answers"] = answer(test)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
