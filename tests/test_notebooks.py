"""The notebooks as users run them: other parameters, bad parameters, prose and its outputs."""

import base64
import csv
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

from helpers.execute import execute

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
PART1 = ROOT / "notebooks" / "01_transfer_learning.ipynb"
PART2 = ROOT / "notebooks" / "02_peft_techniques.ipynb"
PART3 = ROOT / "notebooks" / "03_peft_in_practice.ipynb"
SEED = """
Train: torch.Size([400, 20])  |  Test: torch.Size([100, 20])  |  Classes: 4
Pre-trained base accuracy: 81.00%
Total parameters: 7,716
Trainable: 132 / 7,716  (1.7%)
Feature extraction accuracy: 55.00%
Backbone weights unchanged -- same backbone usable for other tasks.
Trainable: 6,372 / 7,716  (82.6%)
Fine-tuned accuracy: 76.00%
Accuracy BEFORE domain adaptation: 57.00%
Accuracy AFTER  domain adaptation: 58.00%
Improvement: +1.0pp  using only 20 adapted samples
""".strip().splitlines()


def printed(nb):
    """Return the text lines of a notebook's outputs."""
    outputs = (o for c in nb.cells for o in c.get("outputs", []))
    return [line for o in outputs for line in o.get("text", "").splitlines()]


def tables(nb):
    """Return the lines of a notebook's tables."""
    outputs = (o.get("data", {}) for c in nb.cells for o in c.get("outputs", []))
    return [line for data in outputs for line in data.get("text/markdown", "").splitlines()]


def figures(path):
    outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
    return [
        base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})
    ]


@pytest.fixture
def sections(tmp_path):
    """Return a function that runs sections 1.1 to 1.6 with other parameters."""

    def run(**values):
        nb = nbformat.read(PART1, as_version=4)
        last = next(i for i, c in enumerate(nb.cells) if c.id == "summary-table")
        nb.cells = nb.cells[: last + 1]
        path = tmp_path / "notebooks" / PART1.name
        path.parent.mkdir(exist_ok=True)
        nbformat.write(nb, path)
        return printed(nbformat.read(execute(path, values), as_version=4))

    return run


def test_part_1_prints_the_published_lines_in_their_order():
    lines = [line for line in printed(nbformat.read(PART1, as_version=4)) if line in SEED]
    assert lines == SEED


def test_a_clean_kernel_prints_the_clean_numbers(sections):
    lines = sections(earlier_runs=0)
    for line in (
        "Pre-trained base accuracy: 84.00%",
        "Feature extraction accuracy: 61.00%",
        "Fine-tuned accuracy: 81.00%",
        "Accuracy BEFORE domain adaptation: 44.00%",
        "Accuracy AFTER  domain adaptation: 46.00%",
        "Improvement: +2.0pp  using only 20 adapted samples",
    ):
        assert line in lines


@pytest.mark.parametrize(
    "values, expected",
    [
        (
            {"n_classes": 3, "hidden": 16, "n_samples": 300, "seed": 1},
            [
                "Train: torch.Size([240, 20])  |  Test: torch.Size([60, 20])  |  Classes: 3",
                "Total parameters: 1,251",
                "Trainable: 99 / 1,251  (7.9%)",
                "Trainable: 915 / 1,251  (73.1%)",
            ],
        ),
        (
            {"n_classes": 8, "adapt_fraction": 0.5, "threads": 2},
            ["Trainable: 264 / 7,848  (3.4%)"],
        ),
        (
            {"shift_scale": 0.0, "earlier_runs": 2},
            ["Pre-trained base accuracy: 81.00%", "Feature extraction accuracy: 55.00%"],
        ),
    ],
)
def test_counts_heads_and_prints_follow_the_parameters(sections, values, expected):
    lines = sections(**values)
    assert [line for line in expected if line not in lines] == []


def test_a_fall_is_printed_as_a_fall(sections):
    change = re.compile(r"(Improvement|Fall): ([+-]\d+\.\d)pp")
    (found,) = filter(None, map(change.match, sections(adapt_fraction=0.02, shift_scale=0.0)))
    assert found[1] == "Fall" and float(found[2]) < 0


OTHER = {
    PART1: (
        {"n_seeds": 3, "n_draws": 10, "n_classes": 2, "hidden": 8, "seed": 3, "workers": 1},
        ["60 labels, from the trained head", "3 seeds", "logits: 0 of "],
    ),
    PART2: (
        {"n_seeds": 3, "tuning_seeds": 1, "r": 2, "lora_alpha": 1.0, "seed": 3, "workers": 1},
        ["Trainable: 128 of 1,024 in W", "points needed (widest)", "logits: 0 of "],
    ),
    PART3: (
        {"n_seeds": 3, "repeats": 2, "margin": 5.0, "seed": 3, "workers": 1},
        ["accuracy (%), 3 seeds", "5 folds, 2 times", "margin 30: ", "logits: 0 of "],
    ),
}


@pytest.mark.parametrize("part", OTHER, ids=lambda p: p.stem)
def test_the_whole_notebook_runs_with_other_parameters(part, tmp_path, folder):
    path = tmp_path / "notebooks" / part.name
    path.parent.mkdir()
    path.write_bytes(part.read_bytes())
    values, wanted = OTHER[part]
    values = values | {"model_path": folder}  # a small encoder
    nb = nbformat.read(execute(path, values), as_version=4)
    lines = printed(nb) + tables(nb)
    assert [text for text in wanted if not any(text in line for line in lines)] == []


def test_a_readers_texts_leave_a_model_predictions_and_a_page(tmp_path, folder):
    path = tmp_path / "notebooks" / PART3.name
    path.parent.mkdir()
    path.write_bytes(PART3.read_bytes())
    mine = tmp_path / "my texts, {b}.csv"
    words = {"sport": "goal match", "tech": "chip code", "": "goal team"}
    rows = [f"{words[label]} {i},{label}" for i in range(6) for label in words]
    mine.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    values = {"texts_path": str(mine), "model_path": folder, "repeats": 2, "workers": 1}
    nb = nbformat.read(execute(path, values, until="files"), as_version=4)
    assert "6 texts labelled; loaded again, the same labels: True" in printed(nb)
    out = tmp_path / "build" / "texts"
    assert {p.name for p in out.iterdir()} == {"model", "predictions.csv", "report.html"}
    lines = (out / "predictions.csv").read_text("utf-8").split()
    assert lines[0] == "row,label,probability"
    assert [line.split(",")[0] for line in lines[1:]] == ["2", "5", "8", "11", "14", "17"]


BAD = [
    ("n_samples", 39, "n_samples = 39 must be from 40 to 20000"),
    ("n_classes", 9, "n_classes = 9 must be from 2 to 8"),
    ("n_classes", 2.0, "n_classes = 2.0 must be an integer from 2 to 8"),
    ("hidden", 0, "hidden = 0 must be from 1 to 1024"),
    ("adapt_fraction", 0.0, "adapt_fraction = 0.0 must be"),
    ("shift_scale", float("inf"), "shift_scale = inf must be"),
    ("shift_scale", "wide", "shift_scale = 'wide' must be a number"),
    ("earlier_runs", 9, "earlier_runs = 9 must be from 0 to 8"),
    ("n_draws", 9, "n_draws = 9 must be from 10"),
    ("n_seeds", 2, "n_seeds = 2 must be from 3"),
    ("model_path", "nowhere", "nowhere holds no config.json"),
    ("workers", -1, "workers = -1 must be from 0"),
    ("threads", 0, "threads = 0 must be from 1"),
    ("seed", -1, "seed = -1 must be from 0"),
]
BAD2 = [
    ("r", 385, "r = 385 must be from 1 to 384"),
    ("r", 4.0, "r = 4.0 must be an integer from 1 to 384"),
    ("lora_alpha", 0.0, "lora_alpha = 0.0 must be from 0.01"),
    ("n_seeds", 2, "n_seeds = 2 must be from 3"),
    ("tuning_seeds", 0, "tuning_seeds = 0 must be from 1"),
    ("model_path", "nowhere", "nowhere holds no config.json"),
    ("workers", 65, "workers = 65 must be from 0"),
    ("threads", 0, "threads = 0 must be from 1"),
    ("seed", -1, "seed = -1 must be from 0"),
]
BAD3 = [
    ("n_seeds", 2, "n_seeds = 2 must be from 3 to 1000"),
    ("repeats", 0, "repeats = 0 must be from 1 to 100"),
    ("margin", 0.0, "margin = 0.0 must be from 0.1"),
    ("texts_path", "nowhere.csv", "nowhere.csv cannot be read (No such file or directory)"),
    ("texts_path", __file__, "test_notebooks.py"),
    ("model_path", "nowhere", "there is no folder nowhere"),
    ("data_path", "nowhere.npz", "nowhere.npz: there is no such file"),
    ("data_path", __file__, "test_notebooks.py is no .npz file"),
    ("workers", 65, "workers = 65 must be from 0"),
    ("threads", 0, "threads = 0 must be from 1"),
    ("seed", -1, "seed = -1 must be from 0"),
]
BY_PART = {PART1: BAD, PART2: BAD2, PART3: BAD3}
ALL_BAD = [(part, *case) for part, cases in BY_PART.items() for case in cases]


@pytest.mark.parametrize(
    "part, name, value, told",
    ALL_BAD,
    ids=[f"{p.stem[:2]}-{n}={Path(str(v)).name}" for p, n, v, _ in ALL_BAD],
)
def test_a_bad_value_stops_in_the_first_cells_with_one_sentence(part, name, value, told):
    code = [c for c in nbformat.read(part, as_version=4).cells if c.cell_type == "code"][:4]
    kernel, style = {"display": print}, dict(plt.rcParams)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        with pytest.raises((ValueError, TypeError)) as error:
            for cell in code:
                exec(cell.source.replace("%matplotlib inline", ""), kernel)
                if "parameters" in cell.metadata.get("tags", []):
                    kernel[name] = value
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        plt.rcParams.update(style)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_decision_behind_a_printed_number_is_close(path):
    told = [line for line in printed(nbformat.read(path, as_version=4)) if "closer than" in line]
    assert told and all(re.search(r"logits: 0 of \d+$", line) for line in told)


CLAIMS = [  # cell of the prose, cell of the output it rests on, what must stand there
    ("leaks-note", "leaks", r"(the end \| \+22|200 epochs \| \+8)\.\d .* better \|$", 2),
    ("leaks-note", "leaks", r"minus the head trained to the end .* not told apart", 1),
    ("leaks-note", "leaks", r"on other rows \| .* worse \|$", 1),
    ("leaks-note", "leaks", r"not a fresh one \| .* better \|$", 1),
    ("leaks-note", "leaks", r"minus no adaptation .* worse on average", 1),
    ("leaks-note", "leaks", r"scaler .* not told apart", 1),
    ("map-note", "known", r"^headlines: [56]\d.\d%|^documentation: 4\d.\d%", 2),
    ("curve-note", "curve-table", r"^\| zero labels \| \+2\d[^|]* ▲ \|", 1),
    ("curve-note", "curve-table", r"^\| zero labels \| \+\d\.\d [^▲]*$", 1),
    ("curve-note", "curve-table", r"^\| top two blocks( \| \+[^|▲]*){4} \|$", 2),
    ("curve-note", "curve-table", r"^\| LP-FT, top two \| ( \| \+[^|▲]*){2} \|  \|", 2),
    ("curve-note", "curve-table", r"^\| full fine-tuning [^▲▼]*$", 2),
    ("curve-note", "curve-table", r"^\| from scratch .* ▼ \|", 2),
    ("curve-note", "costs", r"^\| top two .* 2.77 \|.*|^\| full .* 8.54 \|", 2),
    ("forgetting-note", "forgetting-table", r"3 x rate \| -[23]\d\..* worse \|$", 1),
    ("forgetting-note", "forgetting-table", r"^\| full .* not told apart", 1),
    ("forgetting-note", "forgetting-table", r"^\| (LP|L2|grad)[^|]*\|[^|]*\[\+.* not told", 3),
    (
        "forgetting-note",
        "forgetting-table",
        r"^\| (LP|L2|grad)[^|]*\| -.* not told",
        3,
    ),
    ("domain-note", "domain", r"^\| (target|CORAL)[^|]*\|[^▲▼|]*\|[^|]*▼ \|$", 2),
    ("domain-note", "domain", r"^\| importance weights \|[^|]*▼", 1),
    ("domain-note", "domain", r"^\| (label weights|self-training|chosen[^|]*) \|[^▲▼]*$", 3),
    ("domain-note", "domain-figure", r"^\| ((16|40) labels|the same .*) \|.* worse \|$", 3),
    ("domain-note", "domain-figure", r"^\| articles \+ 16 labels .* not told apart", 1),
    ("answer-text", "answer", r"^\| 1 \| zero labels", 1),
    ("answer-text", "answer", r"^\| (4|16|50) \| (top|LP-FT).*\| (top|LP-FT)", 3),
]


CLAIMS2 = [
    ("s21", "lora", r"^ +Trainable: .* \(0\.1%\), 1,925 of them in the head$", 1),
    ("memory-look", "memory", r"^this encoder: LoRA takes 45%|^7 billion: LoRA takes 19%", 2),
    (
        "s26",
        "rates-ranked",
        r"^all at 0.000[13]: +top two .* > LoRA [>=] BitFit = a.* = OFT$",
        2,
    ),
    ("s26", "rates-ranked", r"^all at 0\.0(0[13]|[13]): .*> top two blocks$", 4),
    ("s26", "rates-ranked", r"^all at 0\.0[13]: +OFT >", 2),
    ("page-look", "page-verdicts", r"^\| linear probing \| (.*, ){12}.* \| none \| 1 of 14", 1),
    ("page-look", "page-verdicts", r"^\| (LoRA|full fine-tuning) \| none \| none \| 13 of 13", 2),
    ("page-look", "page-table", r"^\| PiSSA [^▲▼]*$", 1),
    ("page-look", "page-table", r"^\| .* \| [+][2-5]\.\d [^|]* ▲ \|", 13),
    ("page-look", "page-table", r"^\| (full fine-tuning|\(IA\)3) .*\| 8[0-4]\.\d \[[^|]*\|$", 2),
    ("page-look", "page-table", r"^\| .*\| 9[0-3]\.\d \[[^|]*\|$", 12),
    ("page-look", "page-table", r"^\| prompt tuning .* 3,461 \| 8\.57 \|", 1),
    ("s27", "both-table", r"^\| (LoRA|BitFit|adapters|top)[^▲]*▲ \|[^▲▼]*$", 4),
    ("s28", "where", r"^\| .* 1\.83 .*\|  \|$|^\| all six blocks .* 5\.73 ", 2),
    ("s28", "where", r"\[[^▲▼]*\] \|$", 10),
    ("answer-text", "page-table", r"^\| LoRA \| 0.003 \| 26,501 \| 1.83 \| 97 \|", 1),
    ("answer-text", "page-table", r"^\| full .* \| 10,648,709 \| 8.54 \| 245 \|", 1),
    ("spectrum-look", "spectrum", r"^\| OFT .* 4\d\.\d .* 0\.0 \[0\.0, 0\.0\] \|$", 1),
    ("spectrum-look", "spectrum", r"^\| top two .* 7[0-3]\.\d .* 0\.9 \[", 1),
    ("spectrum-look", "spectrum", r"^\| (LoRA|DoRA) .* 7\.\d .* 0\.[01] \[", 2),
]
CLAIMS3 = [
    ("decide-note", "decide", r"^The data cannot tell: with 50 labels", 1),
    (
        "decide-note",
        "decide",
        r"^Worse than LoRA, top half: constant answer, from scratch\.$",
        1,
    ),
    ("files-note", "files", r"loaded again, the same labels: True$", 1),
    ("s33", "people-gap", r"^\| headlines, 8.*(half|probing|peft) \| \+.* \| better \|", 3),
    ("s33", "people-gap", r"^\| headlines, 32.*(half|probing) \| \+.* \| better \|", 2),
    ("s33", "people-gap", r"^\| .*SetFit \| \+.* not told apart at 10 .*\| 0\.0[4-6]", 2),
    ("s33", "people-gap", r"^\| documentation, (8|32).*(half|probing) .* \| not told", 4),
    ("s33", "people-gap", r"^\| documentation.*peft \| \+.* \| better", 1),
    ("several-look", "several-verdicts", r"^\| .* -1[89]\.\d .* worse \||\+16\.\d .* better \|", 3),
    ("several-look", "several-verdicts", r"stays as it was learned: True$", 1),
    ("s34", "arithmetic-run", r"^\| (sum|TIES|mean) \| 7[467]\.\d .*", 3),
    ("s34", "arithmetic-run", r"^\| minus .* \| 5[02]\.\d .* \| [46]\d\.\d .* \| [456]\d\.\d", 3),
    ("s34", "arithmetic-run", r"off the mean update by 7\d\.\d", 1),
    ("qlora-look", "quantized", r"^\| NF4 \| 5\.6 \| 9\.4 .* 88 of|^\| int4 .* 11\.5 .* 87 of", 2),
    ("qlora-look", "nf4", r"^(normal.* nf4: .* 9\.2%|normal.* int4: .* 10\.7%)$", 2),
    ("qlora-look", "qlora", r"^\| (QLoRA|LoftQ) [^▲▼]*$", 2),
    ("budgets-look", "budgets-verdicts", r"^(3,072|24,576): told apart from LoRA: none$", 2),
    ("budgets-look", "budgets-verdicts", r"LoRA: adapters worse; v alone, whole worse$", 1),
    ("budgets-look", "budgets-verdicts", r"of 12: prefix tuning, 3,072; LoRA, 294,912$", 1),
    ("paper-look", "paper-counts", r"\| True \|$", 4),
    ("paper-look", "paper", r"^The largest .* 80 GB: Llama-2 70B, by QLoRA", 1),
]
OF_PART = {PART1: CLAIMS, PART2: CLAIMS2, PART3: CLAIMS3}
ALL_CLAIMS = [(part, *claim) for part, claims in OF_PART.items() for claim in claims]


@pytest.mark.parametrize("part, prose, output, line, times", ALL_CLAIMS)
def test_prose_says_what_the_output_says(part, prose, output, line, times):
    cells = {c.id: c for c in nbformat.read(part, as_version=4).cells}
    texts = [
        o.get("text") or o.get("data", {}).get("text/markdown", "") for o in cells[output].outputs
    ]
    lines = "\n".join(texts).splitlines()
    assert cells[prose].cell_type == "markdown"
    assert sum(bool(re.search(line, text)) for text in lines) == times


RESULT = re.compile(r"(?<!Part )\b\d[\d.,]* ?(?:%|points?\b|times\b|of (?:the )?\d[\d,]*)")
SETTINGS = {  # numbers of prose that no output prints: what was set, not what came out
    "luck-look": {"95 %"},  # of each interval
    "appendix": {"95 %", "5 %", "75 %"},
    "s24": {"16 times"},  # LoRA+'s rates
    "s37": {"0.1 %"},  # any small share
}


def test_every_result_in_prose_stands_in_a_cell_that_is_tied_to_an_output():
    tied = {(part, claim[0]) for part, claims in OF_PART.items() for claim in claims}
    loose = []
    for part in OF_PART:
        for cell in nbformat.read(part, as_version=4).cells:
            if cell.cell_type == "markdown" and (part, cell.id) not in tied:
                found = {*RESULT.findall(cell.source)} - SETTINGS.get(cell.id, set())
                loose += [f"{part.stem}, {cell.id}: {text}" for text in found]
    assert loose == ["02_peft_techniques, references: 12 of 14"]  # tied below


def test_the_readme_and_the_references_quote_what_was_found():
    with (ROOT / "tests" / "published_counts.csv").open(encoding="utf-8", newline="") as lines:
        holds = [row["holds"] != "no" for row in csv.DictReader(lines)]
    assert (sum(holds), len(holds)) == (12, 14)
    quoted = RESULT.findall((ROOT / "README.md").read_text("utf-8"))
    printed = [line.removesuffix(".00%") + " %" for line in SEED if line.endswith(".00%")]
    assert quoted == [line.split(": ")[1] for line in printed]


@pytest.mark.parametrize("path", [ROOT / "README.md", *NOTEBOOKS], ids=lambda p: p.stem)
def test_a_first_screen_shows_a_figure_of_its_notebook(path):
    text = path.read_text(encoding="utf-8")
    (name,) = re.findall(r"!\[[^]]{20,}\]\((.*\.png)\)", text)
    shown = (path.parent / name).read_bytes()
    of = NOTEBOOKS[int(name[-5]) - 1]
    assert path in (of, ROOT / "README.md")
    assert shown in figures(of), "run `make picture`"
