"""Headless runs: what they refuse, and that they leave the stored notebook whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from helpers.execute import NotebookError, execute, main, parse_parameters
from tests.test_gate import CELLS, ROOT, make_notebook

TYPED = {"parameters": "n = 3  # points, 1 to 9\nrate = 0.1  # step\nflag = True\nname = 'a'"}


def notebook(tmp_path, *sources, parameters=CELLS["parameters"]):
    cells = {"parameters": parameters} | {f"cell{i}": s for i, s in enumerate(sources)}
    return make_notebook(tmp_path / "notebooks" / "sample.ipynb", cells)


def test_repeated_runs_are_byte_identical(tmp_path):
    path = make_notebook(tmp_path / "notebooks" / "sample.ipynb")
    execute(path)
    first = path.read_bytes()
    execute(path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["sample.ipynb"]


@pytest.mark.parametrize(
    "source, told",
    [
        ("1 / 0", "code cell 2 failed"),
        ("import sys; sys.exit(0)", "code cell 2"),
        ("import sys; print('careful', file=sys.stderr)", "wrote to stderr: careful"),
        (
            "%matplotlb inline",
            "code cell 2 failed\n%matplotlb inline\n\nno traceback: an unknown magic",
        ),
        ("import os; os.kill(os.getpid(), 9)", "DeadKernelError"),
        ("print(object())", "address of one machine"),
        ("import time; time.sleep(60)", "CellTimeoutError"),
    ],
)
def test_a_run_that_went_wrong_is_refused_and_changes_nothing(tmp_path, source, told):
    path = notebook(tmp_path, source, "print('after')")
    before = path.read_bytes()
    with pytest.raises(NotebookError, match=told):
        execute(path, timeout=6)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["sample.ipynb"]


def test_changed_parameters_reach_the_cells_and_are_stored_under_build_only(tmp_path):
    path = notebook(tmp_path, "print(n)")
    before = path.read_bytes()
    assert main([str(path), "-p", "n", "5"]) == 0
    assert path.read_bytes() == before
    built = nbformat.read(tmp_path / "build" / "sample.ipynb", as_version=4)
    assert built.cells[-1].outputs[0].text == "5\n"


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("m", "3", "unknown parameter 'm'; known are n, rate, flag, name"),
        ("n = print(1)  #", "3", "unknown parameter"),
        ("n", "3.5", "not of type int"),
        ("n", "True", "not of type int"),
        ("n", "three", "not of type int"),
        ("flag", "1", "not of type bool"),
        ("rate", "'fast'", "not of type float"),
    ],
)
def test_an_unknown_or_mistyped_parameter_is_refused(tmp_path, name, text, told):
    path = notebook(tmp_path, parameters=TYPED["parameters"])
    with pytest.raises(NotebookError, match=told.replace("(", r"\(").replace(")", r"\)")):
        parse_parameters(nbformat.read(path, as_version=4), [(name, text)])
    assert main([str(path), "-p", name, text]) == 2
    assert not (tmp_path / "build").exists()


def test_values_take_the_type_of_their_default(tmp_path):
    nb = nbformat.read(notebook(tmp_path, parameters=TYPED["parameters"]), as_version=4)
    parsed = parse_parameters(nb, [("n", "7"), ("rate", "2"), ("flag", "False"), ("name", "7")])
    assert parsed == {"n": 7, "rate": 2.0, "flag": False, "name": "7"}
    assert type(parsed["rate"]) is float


def test_parameters_are_listed_with_type_default_and_meaning(tmp_path, capsys):
    assert main(["--parameters", str(notebook(tmp_path, "1 / 0"))]) == 0
    assert capsys.readouterr().out.split() == ["n", "int", "3", "points,", "1", "to", "9"]


def test_a_leftover_injected_cell_is_refused(tmp_path):
    path = notebook(tmp_path, "print(n)")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].metadata["tags"] = ["injected-parameters"]
    nbformat.write(nb, path)
    with pytest.raises(NotebookError, match="injected parameters"):
        execute(path)


def test_several_notebooks_run_at_once_and_one_failure_keeps_the_others(tmp_path):
    good = make_notebook(tmp_path / "notebooks" / "good.ipynb")
    bad = make_notebook(tmp_path / "notebooks" / "bad.ipynb", CELLS | {"print": "print(x)"})
    command = [sys.executable, "-m", "helpers.execute", str(bad), str(good), "--jobs", "2"]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", env=os.environ | {"LC_ALL": "C"}
    )
    assert ran.returncode == 1
    assert "code cell 4 failed" in ran.stderr and "NameError" in ran.stderr
    assert nbformat.read(good, as_version=4).cells[-1].outputs


def test_a_kill_at_any_moment_leaves_the_notebook_whole(tmp_path):
    path = make_notebook(tmp_path / "notebooks" / "sample.ipynb")
    execute(path)
    whole = path.read_bytes()
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-m", "helpers.execute", str(path)], cwd=ROOT)
        time.sleep(random.uniform(0.5, 4))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert path.read_bytes() == whole
    assert execute(path) == Path(path) and path.read_bytes() == whole
