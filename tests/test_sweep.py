"""Sweeps: each point as if it were alone, nothing lost, and nothing run that cannot work."""

import base64
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from asyncio import CancelledError
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from helpers import sweep, warm
from helpers.execute import execute
from helpers.outputs import RECORD, recorded
from helpers.show import record, records
from helpers.stored import NotebookError, _blank, canonical, faults, read
from tests.test_gate import ROOT, make_notebook, mutate, nbval

PARAMETERS = "seed = 0  # of the run\nrate = 0.1  # step\nflag = False\nname = ''  # a file"
# the real `record` comes with torch, which these processes need not import
RECORDING = "from IPython.display import display\ndef record(**values):\n"
RECORDING += f"    display({{'{RECORD}': values}}, raw=True)"


def notebook(tmp_path, *sources, name="sample"):
    cells = {"parameters": PARAMETERS, "record": RECORDING}
    cells |= {f"cell{i}": source for i, source in enumerate(sources)}
    return make_notebook(tmp_path / "notebooks" / f"{name}.ipynb", cells)


def cells_of(path):
    return tuple((c.id, c.source, tuple(c.metadata.get("tags", ()))) for c in read(path).cells)


def table(tmp_path, name="sample"):
    return pd.read_csv(tmp_path / "build" / "sweep" / f"{name}.csv", keep_default_na=False)


def points(tmp_path):
    return sorted((tmp_path / "build" / "sweep" / "points").glob("*.json"))


def running(path):
    """Return how many processes have an argument or a variable that names this path."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        found += str(path).encode() in told
    return found


@pytest.mark.parametrize(
    "texts, wanted",
    [
        (["seed=0:3"], {"seed": [0, 1, 2]}),
        (["seed=-4:5:4", "rate=1,-1e-3"], {"seed": [-4, 0, 4], "rate": [1.0, -0.001]}),
        (["seed=3:0:-1"], {"seed": [3, 2, 1]}),
        (["rate=0:2"], {"rate": [0.0, 1.0]}),
        (["name=0:2,b=c, d", "flag=True,False"], {"name": ["0:2", "b=c", " d"], "flag": [1, 0]}),
    ],
)
def test_values_of_a_grid_take_the_type_of_their_default(tmp_path, texts, wanted):
    found = sweep.parse_grid(read(notebook(tmp_path)), texts)
    assert found == wanted and list(found) == list(wanted)
    assert {type(v) for v in found.get("rate", [1.0])} == {float}


@pytest.mark.parametrize(
    "options, told",
    [
        (["--grid", "sed=0:3"], "unknown parameter 'sed'; known are seed, rate, flag, name"),
        (["--grid", "seed"], "--grid seed has no values: write seed=0:10 or seed=1,2,5"),
        (["--grid", "seed="], "has no values"),
        (["--grid", "seed=5:5"], "has no values"),
        (["--grid", "seed=0:5:0"], "has no values"),
        (["--grid", "seed=0,1.5"], "'1.5' is not of type int"),
        (["--grid", "seed=0,,1"], "'' is not of type int"),
        (["--grid", "flag=0:2"], "'0:2' is not of type bool"),
        (["--grid", "rate=1,1.0"], "--grid rate=1,1.0 has a value twice"),
        (["--grid", "seed=0:2", "--grid", "seed=4,5"], "'seed' is set twice"),
        (["--grid", "seed=0:2", "-p", "seed", "1"], "'seed' is set twice"),
        (["--grid", "seed=0:2", "-p", "rate", "fast"], "'fast' is not of type float"),
        (["--grid", "seed=0:99999999999999999999999"], "100,001 points or more, 100,000 at most"),
        (["--grid", "seed=0:1000", "--grid", "rate=0:1000"], "1,000,000 points or more"),
        (["--grid", "seed=0:2", "--workers", "0"], "--workers 0 must be positive"),
        (["--grid", "seed=0:2", "--timeout", "-1"], "--timeout -1.0 must be positive"),
        (["--grid", "seed=0:2", "--out", "a.txt"], "a.txt must end in .csv or .parquet"),
        (["--grid", "seed=0:2", "--out", "a.parquet"], "needs pyarrow: pip install pyarrow"),
        (["--grid", "seed=0:2", "--scheduler", "tcp://a:1"], "pip install -e '.[sweep]'"),
    ],
)
def test_what_cannot_be_swept_is_told_before_anything_runs(
    tmp_path, capsys, monkeypatch, options, told
):
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sweep, "_done", None)  # nothing runs
    path = notebook(tmp_path, "record(a=1)")
    assert sweep.main([str(path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{path}: ") and error.count("\n") == 1 and told in error


def test_a_notebook_that_records_nothing_or_was_left_half_done_is_refused(tmp_path, capsys):
    path = make_notebook(tmp_path / "notebooks" / "a.ipynb", {"parameters": "seed = 0"})
    assert sweep.main([str(path), "--grid", "seed=0:2"]) == 2
    assert "call helpers.show.record(name=value)" in capsys.readouterr().err
    injected = make_notebook(tmp_path / "notebooks" / "a.ipynb", {"a": "n = 1", "b": "record(n=n)"})
    nb = read(injected)
    nb.cells[1].metadata["tags"] = ["injected-parameters"]
    injected.write_text(canonical(nb), encoding="utf-8")
    assert sweep.main([str(injected), "--grid", "n=0:2"]) == 2
    assert "injected parameters from an earlier run" in capsys.readouterr().err


MAGICS = [
    "%matplotlib inline\nimport os, sys, matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
    "%%bash\necho one > one.txt",
    "words = !cat one.txt\nimport near\nfolder = %pwd",
    "from joblib import Parallel, delayed\nf = lambda i: i + seed\n"
    "total = sum(Parallel(2)(delayed(f)(i) for i in range(3)))",
    "1 / 0",
    "import numpy as np\nx = np.random.default_rng(seed).normal() * rate",
    "record(x=x, word=words[0], near=near.value, folder=os.path.basename(folder), total=total,"
    " backend=plt.get_backend(), clean=__debug__ and 'pytest' not in sys.modules,"
    " read=open(name).read(), main=__name__)",
]


def test_a_point_records_what_a_run_of_make_execute_records(tmp_path):
    path = notebook(tmp_path, *MAGICS)
    nb = read(path)
    nb.cells[-3].metadata["tags"] = ["raises-exception"]
    path.write_text(canonical(nb), encoding="utf-8")
    path.with_name("near.py").write_text("value = 7", encoding="utf-8")
    (tmp_path / "mine.csv").write_text("text", encoding="utf-8")
    fixed = ["-p", "rate", "-1e-3", "-p", "name", "../mine.csv"]
    assert sweep.main([str(path), "--grid", "seed=5,6", *fixed, "--workers", "1"]) == 0
    built = read(execute(path, {"seed": 5, "rate": -1e-3, "name": "../mine.csv"}))
    plain = recorded(o for c in built.cells for o in c.get("outputs", []))
    rows = [json.loads(p.read_text(encoding="utf-8").split("\n", 1)[1]) for p in points(tmp_path)]
    [row] = [r["row"] for r in rows if r["point"]["seed"] == "5"]
    assert row["recorded"] == plain and len(plain) == 9 and plain["folder"] == "notebooks"
    assert sorted(p.name for p in path.parent.iterdir()) == ["near.py", "one.txt", "sample.ipynb"]
    path.with_name("one.txt").unlink()  # of the plain run; a point has a folder of its own
    cold = warm.Warm(cells_of(path), fork=False)
    values = {"seed": 5, "rate": -1e-3, "name": "../mine.csv"}
    assert cold.run(values, str(path.parent), 60)["recorded"] == plain
    assert cold.process.poll() is not None and not path.with_name("one.txt").exists()


LEAKS = [
    "import os, tempfile, subprocess, sys, time, warnings\n"
    "import numpy as np, numpy.random, torch_like",
    "met = [k for k in ('left', 'NEW') if k in globals() or k in os.environ]\n"
    "met += [p for p in ('file.txt', '../build/file.txt', tempfile.gettempdir() + '/file.txt')"
    " if os.path.exists(p)]\n"
    "met += ['module'] if torch_like.state else []\n"
    "met += ['filters'] if warnings.filters[0][3:] == ('left', 9) else []",
    "left = os.environ['NEW'] = torch_like.state = 'b'\nwarnings.filters.insert(0, ('left', 9))\n"
    "os.makedirs('../build', exist_ok=True)\n"
    "for p in ('file.txt', '../build/file.txt', tempfile.gettempdir() + '/file.txt'):\n"
    "    open(p, 'w').close()\n"
    "sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', name])",
    "record(met=' '.join(met), drawn=np.random.rand(), threads=os.environ['OMP_NUM_THREADS'])",
]


def test_points_share_nothing_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    (tmp_path / "torch_like.py").write_text("state = None", encoding="utf-8")  # imported once
    path = notebook(tmp_path, *LEAKS)
    options = ["--grid", "seed=0:3", "-p", "name", str(tmp_path / "sleeper"), "--workers", "1"]
    assert sweep.main([str(path), *options]) == 0
    found = table(tmp_path)
    assert found.met.tolist() == ["", "", ""] and set(found.threads) == {1}
    assert found.drawn.nunique() == 3  # nobody seeded it, so each run draws its own
    assert running(tmp_path / "sleeper") == 0 and not warm.LIVE
    assert not (tmp_path / "build" / "file.txt").exists()


FATES = """import os, sys, time
open(name + ".log", "a").write(f"{seed} ")
if seed == 1: 1 / 0
if seed == 2: sys.exit(0)
if seed == 3: os.abort()
if seed == 4: os.kill(os.getpid(), 9)
if seed == 5: time.sleep(60)
if seed == 6: record(score=1)
if seed != 7: record(score=seed / 4, word="a,b")
if seed == 8: os.kill(os.getppid(), 9)"""
TOLD = {
    1: r"code cell 3 \('cell0'\): ZeroDivisionError: division by zero",
    2: r"code cell 3 \('cell0'\): SystemExit: 0",
    3: "died of SIGABRT; its last words: Fatal Python error: Aborted",
    4: "died of SIGKILL; its last words: none",
    5: r"took more than 20 s \(see --timeout\)",
    6: "recorded 'score' twice: one run has one value of a name",
    7: r"recorded nothing: call helpers.show.record\(name=value\) in one cell",
}


def test_a_sweep_may_stop_after_a_cell(tmp_path, capsys):
    path = notebook(tmp_path, "record(twice=2 * seed)", "raise ValueError('not reached')")
    command = [str(path), "--grid", "seed=1:3", "--workers", "1"]
    assert sweep.main([*command, "--until", "cell0"]) == 0
    assert table(tmp_path).twice.tolist() == [2, 4]
    assert sweep.main([*command, "--until", "parameters"]) == 2
    assert sweep.main([*command, "--until", "cell7"]) == 2
    told = capsys.readouterr().err
    assert "records nothing" in told and "has no cell 'cell7' to stop after" in told


def test_a_failed_point_is_in_the_table_and_only_what_is_not_finished_runs_again(tmp_path, capsys):
    path, ran = notebook(tmp_path, FATES), tmp_path / "ran.log"
    command = [str(path), "--grid", "seed=0:10", "-p", "name", str(tmp_path / "ran")]
    command += ["--timeout", "20"]
    assert sweep.main([*command, "--workers", "2"]) == 1
    told = capsys.readouterr()
    assert "10 points, 0 of an earlier run; 3 ok, 7 failed" in told.out and "10/10" in told.err
    found = table(tmp_path)
    assert found.seed.tolist() == [*range(10)] and not set(TOLD) - set(found.index)
    for seed, error in found.error.items():
        assert re.match(TOLD.get(seed, "$"), error) and "\n" not in error and len(error) <= 300
    assert found.status.tolist() == ["ok"] + ["failed"] * 7 + ["ok"] * 2
    assert found.score[9] == "2.25" and found.word[9] == "a,b"
    assert not _blank(base64.b64encode((tmp_path / "build/sweep/sample.png").read_bytes()))
    assert sorted(map(int, ran.read_text().split())) == [*range(10)]


def test_a_finished_point_is_run_again_only_if_something_that_it_depends_on_changed(tmp_path):
    path, mine = notebook(tmp_path, "record(a=seed)"), tmp_path / "mine.csv"
    mine.write_text("a", encoding="utf-8")

    def _paths(*more):
        pairs, rest = [["name", "../mine.csv"]], [str(path), "--grid", "seed=0:2", *more]
        return sweep._plan(sweep._parser().parse_args(rest), pairs).paths

    first = _paths()
    assert (
        len(set(first)) == 2 and _paths("--timeout", "9", "--out", str(tmp_path / "b.csv")) == first
    )
    execute(path)
    assert _paths() == first  # outputs are not what it depends on
    assert not set(_paths("--grid", "rate=1")) & set(first)
    mine.write_text("ab", encoding="utf-8")
    second = _paths()
    path.with_name("near.py").write_text("", encoding="utf-8")
    third = _paths()
    notebook(tmp_path, "record(a=seed + 1)")
    assert not set(first) & set(second) and not set(second) & set(third)
    assert not set(third) & set(_paths())


def test_a_damaged_result_is_told_and_not_read(tmp_path, capsys):
    path = tmp_path / "a.json"
    row = {"status": "ok", "seconds": 0.1, "error": "", "recorded": {"a": 0.1 + 0.2, "b": "\n"}}
    sweep._write(path, {"seed": 5000}, row)
    assert sweep._read(path) == row and sweep._read(tmp_path / "b.json") is None
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-1], whole.replace(b"000", b"001"), b"\xff", b"a\n{}"):
        path.write_bytes(damaged)
        assert not capsys.readouterr().err and sweep._read(path) is None
        assert capsys.readouterr().err == f"{path} is damaged: its point runs again\n"
    sweep._write(path, {"seed": 5000}, row | {"status": "failed"})
    assert sweep._read(path) is None  # runs again


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_killed_loses_what_runs_and_goes_on(tmp_path, how):
    work = "import time\nopen(name + '.log', 'a').write(f'{seed} ')\ntime.sleep(.2)\nrecord(a=seed)"
    path, ran = notebook(tmp_path, work), tmp_path / "ran.log"
    command = [sys.executable, "-m", "helpers.sweep", str(path), "--workers", "2"]
    command += ["--grid", "seed=0:12", "-p", "name", str(tmp_path / "ran")]
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while len(points(tmp_path)) < 3 and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(how)
    told, kept = first.communicate()[1].decode(), len(points(tmp_path))
    started = len(ran.read_text().split())
    assert 3 <= kept <= started <= kept + 2 < 12
    if how == signal.SIGINT:
        assert first.returncode == 1 and "interrupted; the same command goes on from here" in told
        assert table(tmp_path).status.value_counts().to_dict() == {"ok": kept, "not run": 12 - kept}
        return
    while running(tmp_path / "ran"):  # they see that nobody asks any more
        time.sleep(0.02)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0 and f"12 points, {kept} of an earlier run; 12 ok" in second.stdout
    assert len(ran.read_text().split()) == started + 12 - kept
    assert table(tmp_path).a.tolist() == [*range(12)]


@pytest.mark.parametrize(
    "values, told",
    [
        ({}, "nothing to record"),
        ({"a": [1]}, "a is of type list: record one number or text"),
        ({"a": np.ones(1)}, "a is of type ndarray"),
        ({"a": None}, "a is of type NoneType"),
        ({"a": 1j}, "a is of type complex"),
        ({"a": float("nan")}, "a = nan is not finite"),
        ({"a": np.float32("inf")}, "a = inf is not finite"),
    ],
)
def test_only_finite_numbers_and_texts_are_recorded(monkeypatch, values, told):
    monkeypatch.setattr(records, "display", None)
    with pytest.raises(ValueError, match=told):
        record(**values)


def test_what_is_recorded_is_stored_in_six_digits_and_read_again(monkeypatch):
    outputs = []
    monkeypatch.setattr(records, "display", lambda data, raw: outputs.append({"data": data}))
    record(a=np.float64(1) / 3, b=2**40 + 1, c=np.True_, d="x", e=torch.tensor(2.5), f=-1e-9 / 3)
    wanted = {"a": 0.333333, "b": 2**40 + 1, "c": True, "d": "x", "e": 2.5, "f": -3.33333e-10}
    assert recorded(outputs) == wanted and json.loads(json.dumps(wanted)) == wanted
    line = outputs[0]["data"]["text/plain"]
    assert line.startswith("Recorded: a = 0.333333, b = 1099511627777, c = True, d = x, e = 2.5, ")
    with pytest.raises(NotebookError, match="recorded 'a' twice"):
        recorded(outputs * 2)
    with pytest.raises(NotebookError, match="recorded nothing"):
        recorded([{"output_type": "stream", "text": "a"}])


def test_a_stored_record_passes_both_gates_and_a_changed_one_does_not(tmp_path):
    display = "from IPython.display import display\n"
    display += f"display({{'{RECORD}': dict(score=81.2), 'text/plain': 'Recorded'}}, raw=True)"
    cells = {"parameters": "n = 1", "same": display, "changed": display}
    execute(path := make_notebook(tmp_path / "notebooks" / "a.ipynb", cells))
    assert not faults(nb := read(path)) and nb.cells[1].outputs[0].data[RECORD] == {"score": 81.2}

    def _change(nb):
        nb.cells[2].outputs[0].data[RECORD]["score"] = 81.3

    ran = nbval(mutate(path, _change, tmp_path))
    assert ran.returncode == 1 and "1 failed, 2 passed" in ran.stdout and "81.3" in ran.stdout


def test_a_record_without_its_output_is_a_fault(tmp_path):
    nb = read(make_notebook(tmp_path / "notebooks" / "a.ipynb", {"a": "record(score=1)"}))
    nb.cells[0].execution_count = 1
    assert "prints, but no output is stored" in faults(nb)[0]


def test_another_machine_with_other_sources_is_refused(tmp_path):
    found = warm.run_point(cells_of(notebook(tmp_path)), str(tmp_path), 9, "another", {})
    assert found["status"] == "failed" and "this machine has other helpers" in found["error"]


class Promise(Future):
    """What Dask promises: done, but the result is fetched, and may be gone with its worker."""

    def __init__(self, *fates):
        super().__init__()
        self.fates = list(fates)
        self.set_result(None)

    def result(self, timeout):
        fate = self.fates.pop(0)
        if isinstance(fate, dict):
            return fate
        raise fate


@pytest.mark.parametrize(
    "fates, left, told",
    [
        ([TimeoutError(), {"status": "ok"}], [], None),
        ([TimeoutError()] * 3, [], "no worker is left for 1 points"),
        ([TimeoutError()] * 4 + [{"status": "ok"}], [0, 1, 0, 1], None),
        ([CancelledError()], [], "the scheduler is gone, and 1 points with it"),
        ([RuntimeError("4 workers died")], [], "lost: RuntimeError: 4 workers died"),
    ],
)
def test_a_result_that_went_with_its_worker_is_waited_for_as_long_as_a_worker_is_left(
    monkeypatch, fates, left, told
):
    monkeypatch.setattr(sweep, "PATIENCE", 0.01)
    plan, alive = SimpleNamespace(points=[{}], task=()), iter(left)
    found = sweep._done(plan, [0], lambda values: Promise(*fates), lambda: next(alive, 0))
    if told and not told.startswith("lost"):
        with pytest.raises(NotebookError, match=told):
            list(found)
    else:
        [(i, row)] = found
        assert i == 0 and row["status"] == ("failed" if told else "ok")
        assert row.get("error") == told


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_whole_numbers_stay_whole_where_some_points_failed(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, which is not installed")
    rows = [{"status": "ok", "seconds": 1.5, "error": "", "recorded": {"n": 2, "word": "a,\n"}}]
    plan = SimpleNamespace(
        **dict(out=tmp_path / f"a{suffix}", axes={"seed": [1, 2]}),
        points=[{"seed": 1, "name": "b"}, {"seed": 2, "name": "b"}],
    )
    told = sweep._report(plan, [*rows, sweep.NOT_RUN])
    assert told.startswith("1 ok, 0 failed, in ") and told.endswith("and a.png")
    frame = (pd.read_csv if suffix == ".csv" else pd.read_parquet)(plan.out)
    assert frame.columns.tolist() == ["seed", "name", "status", "seconds", "error", "n", "word"]
    assert frame.word[0] == "a,\n" and frame.status.tolist() == ["ok", "not run"]
    assert suffix == ".parquet" or plan.out.read_text().endswith("\n2,b,not run,,,,\n")
    assert frame.n[0] == 2 and plan.out.read_bytes().count(b"2.0") == 0


WAYS = {"k": [4, 16], "way": ["a", "b"], "seed": range(9)}


@pytest.mark.parametrize(
    "axes, x, lines",
    [
        ({"seed": range(9)}, "seed", ["mean"]),
        ({"seed": range(9), "k": [4, 16]}, "k", ["mean"]),
        (WAYS, "k", ["way = a, mean", "way = b, mean"]),
    ],
)
def test_a_picture_has_a_line_for_each_value_of_the_second_axis(monkeypatch, axes, x, lines):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, format: figures.append(self))
    frame = pd.DataFrame(itertools.product(*axes.values()), columns=list(axes), dtype=object)
    frame["score"] = np.arange(len(frame)) / 2
    sweep.draw(frame, {name: list(values) for name, values in axes.items()}, "score")
    [ax] = figures[0].axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == (x, "score")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == lines
    dots = [line for line in ax.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in dots) == len(frame)
    means = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "-"]
    first = frame[frame[x] == next(iter(axes[x]))]
    wanted = first.groupby("way").score.mean() if "way" in axes else [first.score.mean()]
    assert means == pytest.approx(list(wanted))
