"""Part 3's own texts: headlines in place of a reader's; what a decision leaves behind."""

import base64
import csv
import html
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from helpers import data, files

MEASURED = Path(__file__).parents[2] / "tests/benchmarks/people.jsonl"  # by `make people`

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What to train on {n} labelled texts</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left }}
img {{ max-width: 100% }} pre {{ overflow-x: auto }}
</style></head><body>
<h1>What to train on {n} labelled texts</h1>
{advice}
<img alt="Score of each technique with its interval" src="data:image/png;base64,{figure}">
<h2>Classes</h2>
<table><tr><th>class</th><th>labelled</th><th>predicted</th></tr>{classes}</table>
{notes}
<h2>The model</h2>
<p>{technique}, trained on all {n} labelled texts, is in <code>model/</code>; labels for the
{left} texts that had none are in <code>predictions.csv</code>. To label more:</p>
<pre>from helpers.finetuner import FineTuner
print(FineTuner.load("model").predict(["a new text"]))</pre>
</body></html>
"""


def as_yours(seed, *, labelled=10, left=60):
    """Return headlines as if a reader had brought them, and what they are about.

    Of each topic `labelled` have a label, and `left` none; which ones follows `seed`. Returns
    `Texts`, and the labels of those that have none there.
    """
    texts = data.headlines()
    drawn = data.draw(texts.y, seed, labelled=labelled, left=left)
    known, rest = (drawn[name].flatten() for name in ("labelled", "left"))
    rows = [*known.tolist(), *rest.tolist()]
    y = texts.y[rows].clone()
    y[len(known) :] = -1
    return texts._replace(texts=[texts.texts[i] for i in rows], y=y), texts.y[rest].tolist()


def deliver(folder, model, texts, *, advice, figure):
    """Write ``model/``, ``predictions.csv`` and ``report.html`` into a folder.

    `model` is a fitted `FineTuner`, `texts` what `read_texts` returned. Each text without a label
    gets a line: its row in the file, its label, the probability of that label. The page holds the
    `advice`, the `figure` and counts, and no text. All three are there together or as before, and
    what else is in the folder stays. Returns the labels, one for each such text.
    """
    left = (texts.y == -1).nonzero()[:, 0].tolist()
    shares = model.predict_proba([texts.texts[i] for i in left]) if left else []
    labels = [model.classes_[p.argmax()] for p in shares]
    table = io.StringIO(newline="")
    lines = csv.writer(table)
    lines.writerow(["row", "label", "probability"])
    for i, label, share in zip(left, labels, shares, strict=True):
        lines.writerow([texts.rows[i] if texts.rows else i, label, f"{share.max():.4f}"])
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    known, found = Counter(texts.y.tolist()), Counter(labels)
    rows = ((name, known[i], found[name]) for i, name in enumerate(texts.classes))
    page = PAGE.format(
        n=len(texts.texts) - len(left),
        left=len(left),
        technique=html.escape(model.technique),
        advice="".join(f"<p>{html.escape(line)}</p>" for line in str(advice).splitlines()),
        figure=base64.b64encode(image.getvalue()).decode(),
        classes="".join(
            f"<tr><td>{html.escape(str(c))}</td><td>{k}</td><td>{p}</td></tr>" for c, k, p in rows
        ),
        notes="".join(f"<p>{html.escape(note)}</p>" for note in texts.notes),
    )

    def _fill(new):
        ours = {"model", "predictions.csv", "report.html"}
        for path in (p for p in Path(folder).glob("*") if p.name not in ours):
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, new / path.name)
        model.save(new / "model")
        files.write(new / "predictions.csv", table.getvalue().encode())
        files.write(new / "report.html", page.encode())

    files.replace_folder(folder, _fill)
    return labels


def people(path=MEASURED):
    """Read what `make people` has measured: each fit's accuracy, processor seconds, peak memory.

    Returns (texts, labels of each class) to who to arrays by these names, one entry for each seed.
    """
    found = {}
    for key, fit in map(json.loads, Path(path).read_text("utf-8").splitlines()):
        who, texts, k, seed = key.rsplit(", ", 3)
        of = found.setdefault((texts, int(k)), {}).setdefault(who, {})
        of[int(seed.removeprefix("seed "))] = fit
    return {
        at: {
            who: {name: np.array([fits[s][name] for s in sorted(fits)]) for name in fits[0]}
            for who, fits in of.items()
        }
        for at, of in sorted(
            found.items(), key=lambda item: (item[0][1], item[0][0] != "headlines")
        )
    }
