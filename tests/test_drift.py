"""`make drift` must see what depends on a machine, and only that."""

import re
import subprocess

import nbformat
import pytest

from helpers.stored import read
from tests import drift
from tests.test_gate import CELLS, make_notebook

ODD = 'os.environ.get("ATEN_CPU_CAPABILITY", "")'
SAMPLE = {
    "parameters": CELLS["parameters"],
    "imports": "import os\nimport matplotlib.pyplot as plt\nfrom IPython.display import Markdown",
    "stable": "print(n, 'of 9')\nplt.plot([1, 2])\nplt.show()",
    "printed": f"print('vectors:', {ODD})",
    "table": f"Markdown(f'| {{{ODD}}} |')",
    "longer": f"print('one\\n' * (1 + len({ODD})))",
    "figure": f"plt.plot([1, len({ODD})])\nplt.show()",
}
CHOSEN = ["--only", "1 thread", "--only", "torch: no vectors"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(drift.Path(__file__).parents[1]))
    for name in {name for variables, _ in drift.SETTINGS.values() for name in variables}:
        if name != "TMPDIR":
            monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_each_dependence_is_counted_and_named_and_a_failure_too(tmp_path, capsys):
    path = make_notebook(tmp_path / "in" / "a.ipynb", SAMPLE)
    assert drift.main([str(path), *CHOSEN, "-p", "n", "4"]) == 1
    told = capsys.readouterr().out
    assert "| 1 thread | 0 lines, 0 figures |\n" in told
    assert "| torch: no vectors | 10 lines, 1 figures |\n" in told  # 1, 1, and 8 more
    found = re.findall(r"^a, torch: no vectors, cell '(\w+)'", told, re.M)
    assert {*found} == {"printed", "table", "longer", "figure"} and len(found) == 11
    assert all(cell.get("outputs", []) == [] for cell in read(path).cells)  # the reader's file
    cells = SAMPLE | {"stable": "assert n == 3"}
    path = make_notebook(tmp_path / "in" / "b.ipynb", cells)
    assert drift.main([str(path), *CHOSEN[:2], "-p", "n", "4"]) == 1
    told = capsys.readouterr().out
    assert "| 1 thread | failed |\n" in told and "AssertionError" in told


def test_stored_outputs_are_the_baseline_of_a_run_without_parameters(tmp_path, capsys):
    cells = {"parameters": "n = 3", "printed": "print(n)"}
    path = make_notebook(tmp_path / "in" / "a.ipynb", cells)
    nb = nbformat.read(path, 4)
    for text, code, entry in (("3\n", 0, "0 lines"), ("4\n", 1, "1 lines")):
        nb.cells[1].outputs = [nbformat.v4.new_output("stream", text=text)]
        nbformat.write(nb, path)
        assert drift.main([str(path), *CHOSEN[:2]]) == code
        assert f"| 1 thread | {entry}, 0 figures |" in capsys.readouterr().out


def test_settings_reach_the_command(tmp_path, monkeypatch):
    path = make_notebook(tmp_path / "in" / "a.ipynb", {"parameters": "threads = 1\nworkers = 0"})
    ours = {name for variables, _ in drift.SETTINGS.values() for name in variables}
    seen = {}

    def look(command, env, **_):
        given = {name: str(env[name]) for name in ours if name in env}
        assert all(drift.Path(given[name]).is_dir() for name in drift.CACHES if name in given)
        seen[setting] = command[-4:], given
        return subprocess.CompletedProcess(command, 1, "", "seen")

    monkeypatch.setattr(subprocess, "run", look)
    for setting in drift.SETTINGS:
        assert drift.run(path, setting, [("threads", "1")], 60) == "seen"
    assert len({*map(repr, seen.values())}) == len(seen)
    assert seen["2 threads"][0][-2:] == ["threads", "2"]
    assert seen["1 worker"][0] == ["1", "-p", "workers", "1"]
    assert seen["2 threads"][1]["OMP_NUM_THREADS"] == "2"
    assert {*drift.CACHES} <= {*seen["cold caches"][1]}
