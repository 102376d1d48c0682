"""The linter: the series has no problem, and each planted fault is named."""

import nbformat
import pytest

from helpers.data import articles, documentation, headlines
from tests import lint
from tests.test_gate import REAL

LISTED = "```python\n" + "x = 1\n" * 16 + "```"
LABELS = "plt.show()  # no xlabel"


@pytest.fixture
def sample():
    """Return a small notebook without a fault, its cells by id."""
    nb = nbformat.v4.new_notebook()
    for name, source in {
        "imports": "%matplotlib inline\nimport torch",
        "parameters": "n = 3  # points, 1 to 9\npath = ''  # a file of yours",
        "check": "assert torch.get_num_threads() == 1",
        "print": "print(n)",
    }.items():
        nb.cells.append(nbformat.v4.new_code_cell(source, id=name))
    nb.cells[1].metadata["tags"] = ["parameters"]
    links = "[a](#1.1-One-(or-two)) [b](other.ipynb#Two) [c](picture.png) [d](https://a.org/#b)"
    nb.cells.append(nbformat.v4.new_markdown_cell(f"# 1.1 One (or two)\n{links}", id="text"))
    return nb


@pytest.fixture
def found(sample, tmp_path):
    def look(nb=sample):
        other = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("## Two")])
        nbformat.write(other, tmp_path / "other.ipynb")
        (tmp_path / "picture.png").touch()
        nbformat.write(nb, tmp_path / "sample.ipynb")
        return lint.problems(tmp_path / "sample.ipynb")

    return look


def prints(text):
    def plant(nb):
        nb.cells[3].outputs = [nbformat.v4.new_output("stream", text=text)]

    return plant


def shows(text, kind="text/markdown", **metadata):
    def plant(nb):
        nb.cells[3].outputs = [nbformat.v4.new_output("display_data", {kind: text})]
        nb.cells[3].metadata |= metadata

    return plant


def writes(at, source):
    def plant(nb):
        nb.cells[at].source = source

    return plant


def adds(source, times=1, **metadata):
    def plant(nb):
        for _ in range(times):
            nb.cells.append(nbformat.v4.new_code_cell(source, metadata=metadata))

    return plant


def text_of(source, at=-1):
    return lambda nb: prints(f"1 | {source().texts[at].upper()}\n")(nb)


PLANTED = {
    "no parameters": (lambda nb: nb.cells.pop(1), "is not the one tagged 'parameters'"),
    "parameters first": (lambda nb: nb.cells.insert(0, nb.cells.pop(1)), "not the one tagged"),
    "threads": (writes(2, "pass"), "'check': threads are not asserted"),
    "no range": (writes(1, "n = 3  # points"), "parameter n: its comment 'points' names no range"),
    "no comment": (writes(1, "path = ''"), "parameter path: its comment '' names no range"),
    "path in a source": (writes(3, "open('/" + "home/me/a')"), "/me/a' is a path of one machine"),
    "path in a text": (writes(4, "see C:\\Users\\me"), "'C:\\\\Users\\\\me' is a path"),
    "path in an output": (prints("in /" + "opt/data/a.npz\n"), "/data/a.npz' is a path"),
    "path in a table": (shows("| /" + "var/x |"), "/x' is a path"),
    "long cell": (writes(3, "x = 1\n" * 16), "'print': 16 lines, 15 at most"),
    "wide line": (prints("x" * 111), "'print': prints a line of 111 characters, 110 at most"),
    "open listing": (shows(LISTED), "'print': a listing of 16 lines is not folded"),
    "listed": (shows(LISTED * 10, jupyter={"outputs_hidden": True}), "160 listed lines, 150 at"),
    "open solution": (adds("x = 1", tags=["solution"]), "a solution that is not folded"),
    "cells": (adds("x = 1", 60), "65 cells, 60 at most"),
    "words": (writes(4, "word " * 2501), "2,501 words, 2,500 at most"),
    "helpers": (adds("def f():\n    pass", 4), "4 cells define functions or classes, 3 at most"),
    "labels": (writes(3, f"ax.plot([1, 2])\nax.set_xlabel('a')\n{LABELS}"), "no xlabel and ylabel"),
    "lost file": (writes(4, "[a](nowhere.ipynb)"), "the link 'nowhere.ipynb' leads to no file"),
    "lost heading": (writes(4, "[a](#Three)"), "the link '#Three' leads to no heading"),
    "lost there": (writes(4, "[a](other.ipynb#Three)"), "'other.ipynb#Three' leads to no heading"),
    "headline": (text_of(headlines), "of a data set"),
    "documentation": (text_of(documentation, 0), "of a data set"),
    "article": (
        lambda nb: prints(articles().texts[0][: articles().texts[0].index(". ")])(nb),
        "of a data set",
    ),
}


def test_a_notebook_without_a_fault_has_none(found):
    assert found() == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_named(sample, found, name, capsys):
    plant, told = PLANTED[name]
    plant(sample)
    assert any(told in sentence for sentence in found())


def test_folded_and_labelled_ones_pass(sample, found):
    shows(f"<details>\n\n{LISTED}\n\n</details>")(sample)
    adds("x = 1\n" * 17, tags=["solution"], jupyter={"source_hidden": True})(sample)
    adds("ax.plot([1])\nax.set(xlabel='a', ylabel='b')\nplt.show()")(sample)
    assert found() == []


def test_the_command_names_the_file_and_fails(sample, found, tmp_path, capsys):
    path = tmp_path / "sample.ipynb"
    found()
    assert (lint.main([path]), capsys.readouterr().err) == (0, "")
    writes(3, "x = 1\n" * 16)(sample)
    found()
    told = f"{path}: cell 'print': 16 lines, 15 at most\n"
    assert (lint.main([path]), capsys.readouterr().err) == (1, told)


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_the_series_keeps_its_own_rules(path):
    assert lint.problems(path) == []
