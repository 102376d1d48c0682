"""Headless runs: what they keep and refuse, and that they leave the stored notebook whole."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from helpers.execute import NotebookError, canonical, execute, faults, main, parse_parameters
from helpers.stored import read
from tests.test_gate import CELLS, ROOT, hostile, make_notebook, run

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


def test_a_run_keeps_all_that_an_author_wrote_and_a_second_run_changes_nothing(tmp_path):
    sources = ["print('x' * 9_000_000)", "print('1 of 2\\r2 of 2')", "y = %pwd", "len?", " "]
    path = notebook(tmp_path, *sources, "x = !echo hi\nx")
    nb = nbformat.read(path, as_version=4)
    picture = nbformat.v4.new_markdown_cell("![](attachment:a.png)", id="picture")
    picture |= {"attachments": {"a.png": {"image/png": "iVBORw0KGgo="}}}
    raw = nbformat.v4.new_raw_cell("raw", id="raw", metadata={"format": "text/latex"})
    nb.cells += [picture, raw]
    nb.cells[1].metadata = {"scrolled": True, "jupyter": {"source_hidden": True}, "mine": [1]}
    nb.cells[1].of_mine = {"a": 1}
    nb.metadata = {"title": "A title", "kernelspec": {"name": "gone", "display_name": "Gone"}}
    path.write_text(json.dumps(nb), encoding="utf-8")
    execute(path)
    stored, first = read(path), path.read_bytes()
    assert stored.cells[-2:] == nb.cells[-2:] and stored.metadata.title == "A title"
    assert {k: stored.cells[1][k] for k in ("metadata", "of_mine", "id", "source")} == {
        k: nb.cells[1][k] for k in ("metadata", "of_mine", "id", "source")
    }
    counts = [c.execution_count for c in stored.cells if c.cell_type == "code"]
    assert counts == [1, 2, 3, 4, 5, None, 6]
    assert len(stored.cells[1].outputs[0].text) == 9_000_001
    assert stored.cells[2].outputs[0].text == "2 of 2\n"
    assert main(["--check", str(path)]) == 0
    execute(path)
    assert path.read_bytes() == first


@pytest.mark.parametrize("noise", ["execution", "papermill", "ExecuteTime"])
def test_the_stored_form_drops_what_runs_write_and_a_widgets_random_name(noise):
    data = {"text/plain": "bar", "application/vnd.jupyter.widget-view+json": {"model_id": "9f"}}
    output = nbformat.v4.new_output("display_data", data, metadata={"image/png": {"width": 3}})
    cell = nbformat.v4.new_code_cell("bar", id="a", execution_count=7, outputs=[output])
    cell.metadata = {noise: {"start": "1"}, "tags": []}
    stale = nbformat.v4.new_code_cell(" ", execution_count=3, outputs=[output])
    noted = {"widgets": {}, "papermill": {}, "a": 1}
    kept = json.loads(canonical(nbformat.v4.new_notebook(cells=[cell, stale], metadata=noted)))
    cell, stale = kept["cells"]
    assert (stale["execution_count"], stale["outputs"]) == (None, [])
    assert (cell["metadata"], cell["execution_count"]) == ({}, 1)
    assert cell["outputs"][0]["data"] == {"text/plain": ["bar"]}
    assert cell["outputs"][0]["metadata"] == {"image/png": {"width": 3}}
    assert set(kept["metadata"]) == {"a", "kernelspec", "language_info"}


@pytest.mark.parametrize(
    "source, wanted",
    [
        ("%%bash\nfor i in 1 2; do echo $i; done", None),
        ("%%html\n<b>print(1)</b>", None),
        ("%%time\nprint(1)", None),
        ("x = !echo hi", None),
        ("y = %pwd", None),
        ("len?", None),
        ("??print", None),
        ("!ls *.py", None),
        ("def f(: what no Python can be", None),
        ("a\0b", None),
        ("-" * 100_000 + "1", None),
        ("if n > 3:\n    print('many')", None),
        ("# print(1); plt.show()", None),
        ("r = '\\d'; x = 1;  # shown? no", None),
        ("x;", None),
        ("None", None),
        ("print(1)", "prints"),
        ("!true\nprint(1)", "prints"),
        ("for i in range(3):\n    print(i)", "prints"),
        ("x = %pwd\nx", "prints"),
        ("'\\d'", "prints"),
        ("with a:\n    plt.show()", "draws"),
    ],
)
def test_what_must_have_an_output_is_told_from_what_need_not(source, wanted):
    cell = nbformat.v4.new_code_cell(source, id="a", execution_count=1)
    found = faults(nbformat.v4.new_notebook(cells=[cell]))
    assert [f.split(": ")[1].split(",")[0] for f in found] == ([wanted] if wanted else [])


SOUND = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}
CELL = nbformat.v4.new_code_cell("print(1)")
UNREADABLE = {
    "empty": b"",
    "object": b"{}",
    "list": b"[]",
    "latin-1": '{"cells": "\u00e9"}'.encode("latin-1"),
    "cut": json.dumps(SOUND)[:30].encode(),
    "deep": b"[" * 100_000,
    "format 3": json.dumps(SOUND | {"nbformat": 3}).encode(),
    "format 5": json.dumps(SOUND | {"nbformat": 5}).encode(),
    "no minor": json.dumps(SOUND | {"nbformat_minor": None}).encode(),
    "no cells": json.dumps({k: v for k, v in SOUND.items() if k != "cells"}).encode(),
    "a number for a cell": json.dumps(SOUND | {"cells": [1]}).encode(),
    **{
        f"no {key}": json.dumps(
            SOUND | {"cells": [{k: v for k, v in CELL.items() if k != key}]}
        ).encode()
        for key in ("cell_type", "source", "metadata", "outputs", "execution_count")
    },
    "folder": None,
    "missing": None,
}


@pytest.mark.parametrize("mode", [[], ["--check"], ["--parameters"], ["-p", "a", "1"]])
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_notebook_is_told_in_one_sentence(tmp_path, capsys, name, mode):
    path = tmp_path / "a.ipynb"
    if name == "folder":
        path.mkdir()
    elif name != "missing":
        path.write_bytes(UNREADABLE[name])
    assert main([str(path), *mode]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"{path}: ") and told.count("\n") == 1 and len(told) < 500


def test_cells_of_an_older_format_get_ids_that_stay(tmp_path):
    cells = [{"cell_type": "markdown", "metadata": {}, "source": ["a\n", "b"]}] * 2
    (tmp_path / "a.ipynb").write_text(json.dumps(SOUND | {"nbformat_minor": 2, "cells": cells}))
    nb = read(tmp_path / "a.ipynb")
    assert [c.id for c in nb.cells] == ["cell-0", "cell-1"] and nb.cells[0].source == "a\nb"
    assert json.loads(canonical(nb))["nbformat_minor"] == 5


def test_an_output_that_no_reader_would_scroll_through_is_refused_by_name():
    output = nbformat.v4.new_output("stream", text="/" * 10_000_001)
    cell = nbformat.v4.new_code_cell("print(x)", id="wordy", execution_count=1, outputs=[output])
    (told,) = faults(nbformat.v4.new_notebook(cells=[cell]))
    assert "wordy" in told and "10,000,000 at most" in told


def test_bytes_that_are_no_picture_are_a_fault_not_a_crash():
    for png in ("no base 64", "aGVsbG8="):
        output = nbformat.v4.new_output("display_data", {"image/png": png})
        cell = nbformat.v4.new_code_cell("a = 1", execution_count=1, outputs=[output])
        assert "no picture" in faults(nbformat.v4.new_notebook(cells=[cell]))[0]


HOSTILE = [
    "import os\nprint('foreign' in globals(), __debug__, os.getcwd().split(os.sep)[-1])",
    "from ipykernel.connect import get_connection_info\n'ipc' in get_connection_info()",
    "import matplotlib.pyplot as plt\nplt.plot([1, 2], [1, 3])\nplt.show()",
    "with plt.style.context('ggplot'):\n    plt.plot([1, 2], [1, 3])\n    plt.show()",
    "import talks",
]


def test_no_configuration_of_a_machine_reaches_a_run_and_it_prints_one_line(tmp_path):
    stored = []
    for environment in ({}, hostile(tmp_path / "hostile")):
        path = notebook(tmp_path, *HOSTILE)
        path.with_name("talks.py").write_text(
            "import logging, warnings\nlogging.getLogger('a').warning('b')\nwarnings.warn('c')\n"
        )
        path.with_name("matplotlibrc").write_text("lines.linewidth: 9\n" if environment else "")
        ran = run("helpers.execute", str(path), **environment)
        assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.count("\n") == 1
        stored.append(path.read_bytes())
    assert stored[0] == stored[1] and stored[0].count(b"True") == 2
    assert [p.name for p in (tmp_path / "hostile" / ("long" * 30)).iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "modules, heavy",
    [
        ("helpers.execute", ["torch", "matplotlib", "IPython", "nbclient"]),
        ("helpers.show, helpers.study.yours", ["nbformat", "jsonschema", "transformers"]),
    ],
    ids=["command", "notebook"],
)
def test_what_only_later_steps_need_is_not_imported_at_the_start(modules, heavy):
    code = f"import sys, {modules}; print(sorted(set({heavy}) & set(sys.modules)))"
    told = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, encoding="utf-8")
    assert told == "[]\n"


@pytest.mark.parametrize(
    "source, told",
    [
        ("1 / 0", "code cell 2 failed\n1 / 0\n\n.*ZeroDivisionError"),
        ("import sys; sys.exit(0)", "code cell 2"),
        ("import sys; print('careful', file=sys.stderr)", "wrote to stderr: careful"),
        ("%matplotlb inline", "code cell 2 failed\n%matplotlb inline\n\nUsageError: .* not found"),
        ("import os; os.kill(os.getpid(), 9)", "code cell 2: Kernel died; its last words: none"),
        ("import os; os.abort()", "code cell 2: .* last words: Fatal Python error: Aborted"),
        ("print(object())", "address of one machine"),
        ("print('x' * 50_000_000)", "holds 50,000,0.. characters of output, 10,000,000 at most"),
        ("import time; time.sleep(60)", "code cell 2 took more than 6 s"),
    ],
)
def test_a_run_that_went_wrong_is_refused_and_changes_nothing(tmp_path, source, told):
    path = notebook(tmp_path, source, "print('after')")
    before = path.read_bytes()
    with pytest.raises(NotebookError, match=f"(?s){told}"):
        execute(path, timeout=6)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["sample.ipynb"]


def test_an_unknown_tag_is_refused_before_anything_runs(tmp_path):
    path = notebook(tmp_path, "open('ran', 'w').close()")
    nb = nbformat.read(path, as_version=4)
    nb.cells[1].metadata["tags"] = ["hide"]
    nbformat.write(nb, path)
    with pytest.raises(NotebookError, match="'cell0': unknown tag 'hide'"):
        execute(path)
    assert not path.with_name("ran").exists()


@pytest.mark.parametrize("pairs", [[], ["-p", "n", "4"]], ids=["in place", "a user's own"])
def test_a_result_without_a_place_is_told_before_anything_runs(
    tmp_path, monkeypatch, capsys, pairs
):
    path = notebook(tmp_path, "open('ran', 'w').close()")
    if pairs:
        (tmp_path / "build").write_bytes(b"a file")
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    assert main([str(path), *pairs]) == 1
    assert re.search("build'|may not be written", capsys.readouterr().err)
    assert not path.with_name("ran").exists()


def test_what_a_stored_notebook_may_not_hold_is_only_told_of_a_users_own_run(tmp_path, capsys):
    path = notebook(tmp_path, "import sys; print('/' 'tmp/a', n); print('b', file=sys.stderr)")
    assert main([str(path), "-p", "n", "-5"]) == 0
    told = capsys.readouterr()
    assert told.err.count("note: ") == 2 and "a path or address" in told.err
    built = read(tmp_path / "build" / "sample.ipynb")
    out, err = (o.text for o in built.cells[-1].outputs)
    assert out.endswith("tmp/a -5\n") and err == "b\n"


def test_a_users_run_that_fails_is_stored_as_far_as_it_came(tmp_path, capsys):
    path = notebook(tmp_path, "print('shown')", "1 / n", "print('stale')")
    stored = nbformat.read(path, as_version=4)
    stored.cells[-1] |= {"execution_count": 9, "outputs": stored.cells[-1].outputs}
    stored.cells[-1].outputs = [nbformat.v4.new_output("stream", text="of another run")]
    nbformat.write(stored, path)
    assert main([str(path), "-p", "n", "0"]) == 1
    assert "ZeroDivisionError" in (told := capsys.readouterr().err) and "What ran is stored" in told
    built = read(tmp_path / "build" / "sample.ipynb").cells
    assert [c.execution_count for c in built] == [1, 2, 3, 4, None]
    assert built[2].outputs[0].text == "shown\n" and built[3].outputs[0].ename.startswith("Zero")
    assert built[4].outputs == []


def test_changed_parameters_reach_the_cells_and_are_stored_under_build_only(tmp_path):
    path = notebook(tmp_path, "print(n)")
    before = path.read_bytes()
    assert main([str(path), "-p", "n", "5"]) == 0
    assert path.read_bytes() == before
    built = nbformat.read(tmp_path / "build" / "sample.ipynb", as_version=4)
    assert built.cells[-1].outputs[0].text == "5\n"


@pytest.mark.parametrize("values", [[], ["-p", "n", "5"]])
def test_a_run_may_stop_after_a_cell_and_is_stored_under_build_only(tmp_path, capsys, values):
    path = notebook(tmp_path, "print('first')", "raise SystemExit('never run')")
    before = path.read_bytes()
    assert main([str(path), "--until", "cell0", *values]) == 0
    assert path.read_bytes() == before
    built = nbformat.read(tmp_path / "build" / "sample.ipynb", as_version=4)
    assert built.cells[-1].id == "cell0" and built.cells[-1].outputs[0].text == "first\n"
    assert main([str(path), "--until", "cell9"]) == 1
    assert "has no cell 'cell9' to stop after; there are parameters, " in capsys.readouterr().err


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


def test_values_that_look_like_options_reach_the_cells(tmp_path):
    path = notebook(tmp_path, "print(n, rate, name)", parameters=TYPED["parameters"])
    pairs = ["-p", "n", "-5", "-p", "rate", "-1e-3", "-p", "name", "-p"]
    assert main([*pairs, str(path)]) == 0
    assert main([str(path), "-p", "rate", "-inf", "-p", "name", "--check"]) == 0
    built = read(tmp_path / "build" / "sample.ipynb")
    assert built.cells[-1].outputs[0].text == "3 -inf --check\n"
    with pytest.raises(SystemExit):
        main([str(path), "-p", "rate"])


@pytest.mark.parametrize("source", ["n = (3", "%load_ext x\nn = 3", "n = len('a')", "a, b = 1, 2"])
def test_a_parameters_cell_that_cannot_be_read_is_told_when_parameters_are_asked_for(
    tmp_path, capsys, source
):
    path = notebook(tmp_path, parameters=source)
    assert main([str(path), "--parameters"]) == 2
    assert re.search("no plain Python|is not 'name = literal'", capsys.readouterr().err)


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


def test_a_terminal_shows_how_far_a_study_is_and_the_notebook_does_not_store_it(tmp_path):
    pty = pytest.importorskip("pty")  # not on Windows
    count = "from helpers import study\nprint(study.run_seeds(float_of, range(3), workers=1))"
    path = notebook(tmp_path, f"def float_of(seed):\n    return dict(x=1.0)\n\n\n{count}")
    here, there = pty.openpty()
    command = [sys.executable, "-m", "helpers.execute", str(path)]
    subprocess.run(command, cwd=ROOT, stderr=there, check=True, timeout=300)
    os.close(there)
    assert b"seed" in os.read(here, 10_000)  # the bar's unit
    os.close(here)
    assert [o.name for o in read(path).cells[1].outputs] == ["stdout"]
