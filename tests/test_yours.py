"""A reader's texts: what stands in for them, what a decision leaves behind, what was measured."""

import csv
import html
import io
import json
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers.data import headlines, read_texts
from helpers.finetuner import FineTuner
from helpers.study.yours import as_yours, deliver, people


def test_headlines_stand_in_for_a_readers_texts():
    texts, truth = as_yours(3, labelled=4, left=6)
    news = headlines()
    label = dict(zip(news.texts, news.y.tolist(), strict=True))
    assert len(texts.texts) == len({*texts.texts}) == 50 and texts.classes == news.classes
    assert texts.y[:20].bincount().tolist() == [4] * 5 and (texts.y[20:] == -1).all()
    assert [label[t] for t in texts.texts] == texts.y[:20].tolist() + truth
    assert as_yours(3, labelled=4, left=6)[0].texts == texts.texts
    assert as_yours(4, labelled=4, left=6)[0].texts != texts.texts


ROWS = """label,text
sport,goal match team
<b>tech</b>,chip code cloud
,"goal, ""match"" again"
sport,team wins the match
<b>tech</b>,cloud and code
,=chip()
,goal match team
"""


@pytest.mark.parametrize("technique", ["linear probing", "LoRA, contrastive", "LP-FT"])
def test_every_text_without_a_label_gets_a_line_and_a_new_process_says_the_same(
    folder, tmp_path, technique
):
    path = tmp_path / "my texts.csv"
    path.write_text(ROWS, encoding="utf-8")
    texts, out = read_texts(path), tmp_path / "build" / "texts"
    known = [i for i, y in enumerate(texts.y.tolist()) if y >= 0]
    model = FineTuner(technique, model_path=folder, epochs=2)
    model.fit([texts.texts[i] for i in known], [texts.classes[texts.y[i]] for i in known])
    figure, ax = plt.subplots()
    ax.plot([1, 2])
    labels = deliver(out, model, texts, advice="Take <this>.\nWhy not?", figure=figure)
    deliver(out, model, texts, advice="Take <this>.\nWhy not?", figure=figure)  # once more
    plt.close(figure)
    table = (out / "predictions.csv").read_bytes().decode()
    lines = list(csv.DictReader(io.StringIO(table, newline="")))
    assert [*lines[0]] == ["row", "label", "probability"]
    assert [int(line["row"]) for line in lines] == [2, 5, 6]
    assert [line["label"] for line in lines] == labels
    left = ['goal, "match" again', "=chip()", "goal match team"]
    shares = model.predict_proba(left)
    assert [f"{p.max():.4f}" for p in shares] == [line["probability"] for line in lines]
    page = (out / "report.html").read_text("utf-8")
    assert "<p>Take &lt;this&gt;.</p><p>Why not?</p>" in page and "<b>tech" not in page
    assert not any(html.escape(t) in page for t in texts.texts)
    assert f"<td>sport</td><td>2</td><td>{labels.count('sport')}</td>" in page
    program = (
        "import sys; from helpers.finetuner import FineTuner;"
        "print(*FineTuner.load(sys.argv[1]).predict(sys.argv[2:]), sep='|')"
    )
    command = [sys.executable, "-c", program, str(out / "model"), *left]
    told = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    assert told.strip().split("|") == labels


def test_what_was_measured_is_read_by_texts_labels_and_seed(tmp_path):
    path = tmp_path / "people.jsonl"
    keys = ["LoRA, contrastive, documentation, 8, seed 0", "a, headlines, 32, seed 0"]
    keys += ["a, headlines, 8, seed 1", "a, headlines, 8, seed 0"]
    lines = [[k, {"accuracy": 10.0 * i, "seconds": i, "peak": 1}] for i, k in enumerate(keys)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = people(path)
    assert [*found] == [("headlines", 8), ("documentation", 8), ("headlines", 32)]
    assert np.array_equal(found["headlines", 8]["a"]["accuracy"], [30, 20])
    assert [*found["documentation", 8]] == ["LoRA, contrastive"]
