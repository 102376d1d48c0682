"""Kills, interrupts, full disks, foreign places: nothing is lost, and one sentence says why."""

import io
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from helpers import files
from helpers.data import Texts
from helpers.execute import execute, main
from helpers.peft import save_trainable
from helpers.stored import NotebookError, parse_parameters, read, settable
from helpers.study.yours import deliver
from tests.test_gate import ROOT, make_notebook

HERE = os.environ | {"PYTHONPATH": str(ROOT)}
CODE = "__import__('os').mkdir('ran')"


def notebook(tmp_path, *sources, name="notebooks", **names):
    cells = {"parameters": "n = 3\nname = 'a'"} | {f"cell{i}": s for i, s in enumerate(sources)}
    path = tmp_path / name / "a.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_notebook(path, cells)


def tree(folder):
    """Return the files below a folder; the header of safetensors is in any order."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name, data in found.items():
        if name.endswith(".safetensors"):
            found[name] = {k: t.tolist() for k, t in safetensors.torch.load(data).items()}
    return found


# ---- kill -9 and Ctrl-C


class Model:
    """What `deliver` needs of an estimator, in no time."""

    technique, classes_ = "LoRA", np.array(["a", "b"])

    def __init__(self, number):
        self.number = number

    def predict_proba(self, texts):
        return np.tile([0.25, 0.75] if self.number else [0.75, 0.25], (len(texts), 1))

    def save(self, folder):
        files.replace_folder(folder, lambda new: files.write(new / "model", b"%d" % self.number))

    def savefig(self, file, **_):
        file.write(b"%d" % self.number)


def write_file(folder, number):
    files.write(folder / "file", b"%d" % number * 1000)


def write_folder(folder, number):
    files.replace_folder(folder / "model", lambda new: files.write(new / "a", b"%d" % number))


def write_results(folder, number):
    texts, model = (
        Texts(["one", "two", "three"], torch.tensor([0, 1, -1]), ["a", "b"]),
        Model(number),
    )
    deliver(folder / "texts", model, texts, advice=f"Take {number}.", figure=model)


def save_adapter(folder, number):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, number)
    nn.init.zeros_(model.bias)
    save_trainable(model, folder / "adapter.safetensors")


WRITERS = [write_file, write_folder, write_results, save_adapter]
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod"}


def stopped(how, at, writer, folder):
    """Run a writer in a process that is stopped before its file operation `at`; True if it was."""
    child = os.fork()
    if not child:
        seen = 0

        def watch(event, _):
            nonlocal seen
            seen += event in OPERATIONS
            if event in OPERATIONS and seen == at + 1:
                if how == "kill":
                    os._exit(9)
                raise KeyboardInterrupt

        sys.addaudithook(watch)
        try:
            writer(folder, 1)
        except KeyboardInterrupt:
            os._exit(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_stop_before_any_file_operation_leaves_the_old_or_the_new_whole(tmp_path, writer, how):
    wanted = []
    for number in (0, 1):
        (tmp_path / str(number)).mkdir()
        writer(tmp_path / str(number), number)
        wanted.append(tree(tmp_path / str(number)))
    assert wanted[0] != wanted[1] and wanted[0].keys() == wanted[1].keys()
    at, seen = 0, set()
    while True:
        folder = tmp_path / f"at{at}"
        shutil.copytree(tmp_path / "0", folder)
        was = stopped(how, at, writer, folder)
        found = {k: v for k, v in tree(folder).items() if not k.startswith(".") and "/." not in k}
        assert found in wanted, f"stopped before operation {at}: {found}"
        seen.add(wanted.index(found))
        if not was:
            break
        at += 1
    assert at >= 2 and seen == {0, 1}


def test_a_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchanged", lambda new, target: False)  # not on Linux
    write_folder(tmp_path, 0)
    before = tree(tmp_path)
    rename = Path.rename

    def refuse(path, target):
        if path.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, 1)
    assert tree(tmp_path) == before and len([*tmp_path.iterdir()]) == 1
    monkeypatch.undo()
    write_folder(tmp_path, 1)
    assert tree(tmp_path) == {"model/a": b"1"}
    with pytest.raises(NotADirectoryError, match=r"no folder: '.*a'"):
        files.replace_folder(tmp_path / "model" / "a", lambda new: None)


def test_what_else_is_beside_results_stays(tmp_path):
    write_results(tmp_path, 0)
    (tmp_path / "texts" / "more").mkdir()
    (tmp_path / "texts" / "more" / "notes.txt").write_text("mine")
    write_results(tmp_path, 1)
    found = tree(tmp_path / "texts")
    assert found["more/notes.txt"] == b"mine" and found["model/model"] == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]


def wait(condition, seconds=400):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_ends_its_kernels_and_starts_no_other(tmp_path, how):
    source = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    paths = [notebook(tmp_path, source, name=name) for name in ("one", "two")]
    before = [path.read_bytes() for path in paths]
    told = tmp_path / "told"
    command = [sys.executable, "-m", "helpers.execute", *map(str, paths), "--jobs", "1"]
    with told.open("w") as err:
        child = subprocess.Popen(command, cwd=ROOT, stderr=err, start_new_session=True)
        note = paths[0].parent / "pid"
        try:
            wait(lambda: note.exists() and note.read_text())
            time.sleep(random.uniform(0, 0.5))
            child.send_signal(how)
            assert child.wait(300) != 0
        finally:
            child.terminate()
            child.wait()
    wait(lambda: gone(note.read_text()))
    assert [path.read_bytes() for path in paths] == before
    assert not (paths[1].parent / "pid").exists()
    assert [p.name for p in paths[0].parent.iterdir() if p.name != "pid"] == ["a.ipynb"]
    if how != signal.SIGKILL:
        first, last = told.read_text().splitlines()
        assert first.endswith("code cell 2 was interrupted")
        assert last == "interrupted: notebooks that were not finished are as they were"


def test_two_commands_at_once_leave_one_sound_notebook(tmp_path):
    path = notebook(tmp_path, "import time\ntime.sleep(1)\nprint(n)")
    command = [sys.executable, "-m", "helpers.execute", str(path)]
    pair = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(child.communicate()[1], child.returncode) for child in pair] == [(b"", 0)] * 2
    assert main(["--check", str(path)]) == 0 and [*path.parent.iterdir()] == [path]


# ---- full disks and read-only folders


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, writer):
    writer(tmp_path, 0)
    before = tree(tmp_path)
    child = os.fork()
    if not child:  # the limit would hold for all tests
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        try:
            writer(tmp_path, 1)
        except OSError as error:
            os._exit(10 + (error.filename is not None and ".tmp" not in error.filename))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
    assert tree(tmp_path) == before


def test_a_disk_too_small_for_the_outputs_leaves_the_stored_notebook(tmp_path):
    path = notebook(tmp_path, "print('x' * 4_000_000)")
    before = path.read_bytes()
    shell = f'ulimit -f 3000; exec "{sys.executable}" -m helpers.execute "{path}"'
    ran = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert ran.returncode == 1 and "File too large" in ran.stderr and "Trace" not in ran.stderr
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


@pytest.fixture
def nobody():
    """Return a folder of a user without rights, and be that user, if the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    if root := os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        os.setresuid(65534, 65534, 0)
    yield folder
    if root:
        os.setresuid(0, 0, 0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_read_only_folder_is_told_and_left_as_it_was(nobody, writer):
    writer(nobody, 0)
    before = tree(nobody)
    nobody.chmod(0o555)
    with pytest.raises(PermissionError) as error:
        writer(nobody, 1)
    assert str(nobody) in str(error.value) and tree(nobody) == before


def test_a_notebook_in_a_read_only_folder_is_told_before_it_runs(nobody, capsys):
    path = notebook(nobody, CODE)
    before = path.read_bytes()
    path.parent.chmod(0o555)
    nobody.chmod(0o555)
    try:
        for more in ([], ["-p", "n", "4"]):
            assert main([str(path), *more]) == 1
            assert "ermission denied" in (told := capsys.readouterr().err) or "not be" in told
            assert told.count("\n") == 1
        assert tree(nobody) == {"notebooks/a.ipynb": before}
    finally:
        path.parent.chmod(0o755)


# ---- kernels that do not end as they should


@pytest.mark.parametrize(
    "source, told",
    [
        (
            "import resource as r\nr.setrlimit(r.RLIMIT_AS, (2**30, -1))\nx = bytearray(2**31)",
            "code cell 2 failed.*MemoryError",
        ),
        (
            "import os, signal, threading\n"
            "threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
            "x = [bytes(10**6) for _ in iter(int, 1) if not threading.Event().wait(0.1)]",
            "code cell 2: Kernel died; its last words: none \\(out of memory\\?\\)",
        ),
    ],
    ids=["no memory", "killed for memory"],
)
def test_a_kernel_out_of_memory_is_told(tmp_path, source, told):
    path = notebook(tmp_path, source)
    before = path.read_bytes()
    with pytest.raises(NotebookError, match=f"(?s){told}"):
        execute(path)
    assert path.read_bytes() == before


# ---- hostile parameters, foreign places


HOSTILE = f'"; {CODE}; x = "\'\'\'\n{CODE}\n"""\\" \\\n#{{0}} %s $(mkdir ran) `mkdir ran` ü \udcff'
KINDS = "n = 3\nname = 'a'\nrate = 0.5\nflag = True\nmany = [1]\nmapped = {'a': 1}\npair = (1, 2)"


@pytest.mark.parametrize("name", ["n", "rate", "flag", "many", "mapped", "pair", "name", CODE])
@pytest.mark.parametrize("text", [HOSTILE, CODE, f"[{CODE}]", "", " ", "\0", "9" * 5000, "(" * 999])
def test_code_in_a_parameter_is_refused_or_is_text_and_never_runs(
    tmp_path, monkeypatch, name, text
):
    monkeypatch.chdir(tmp_path)
    cell = nbformat.v4.new_code_cell(KINDS, metadata={"tags": ["parameters"]})
    nb = nbformat.v4.new_notebook(cells=[cell])
    try:
        (value,) = parse_parameters(nb, [(name, text)]).values()
        assert (name, value) == ("name", text) or (name, value) == ("rate", float("9" * 5000))
    except NotebookError as error:
        assert str(error).count("\n") == 0 and name != "name"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", list(KINDS.split("\n")))
def test_each_kind_of_parameter_arrives_as_it_is_or_is_refused(tmp_path, name):
    from papermill.parameterize import parameterize_notebook

    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    nb.metadata["papermill"] = {}
    nb.cells = [nbformat.v4.new_code_cell(KINDS, metadata={"tags": ["parameters"]})]
    name = name.split(" ")[0]
    text = {"name": HOSTILE, "rate": "-inf", "flag": "False", "n": "-7", "many": "['\"', None]"}
    text |= {"mapped": "{'\"\\n': [1, {'a': 1e999}]}", "pair": "(3, 'b')"}
    values = parse_parameters(nb, [(name, text[name])])
    assert settable(values[name]) == (name != "pair")
    if name == "pair":  # which would arrive as text
        path = make_notebook(tmp_path / "notebooks" / "a.ipynb", {"parameters": KINDS})
        for odd in (values, {"mapped": {1: 2}}, {"many": [{3}]}, {"n": np.int64(3)}):
            with pytest.raises(NotebookError, match="cannot be set from outside: text, numbers"):
                execute(path, odd)
        return
    cells = parameterize_notebook(nb, values, kernel_name="python3", language="python").cells
    kernel = {}
    exec(cells[1].source, kernel)
    assert kernel[name] == values[name] and type(kernel[name]) is type(values[name])
    assert cells[0].source == KINDS  # the notebook's own cell is as it was


SURROUNDINGS = """
import os, socket, matplotlib
with open("told", "w", encoding="utf-8", errors="surrogatepass") as file: file.write(name)
try: socket.create_connection(("192.0.2.1", 80), 1)
except OSError as error: print("no network:", error.errno == 101)
print(sorted({"HOME", "DISPLAY", "LANG"} & {*os.environ}), os.environ.get("LC_ALL"), "\\u2713", n)
"""


def test_a_run_needs_no_home_no_display_no_network_no_locale_and_no_certain_place(tmp_path):
    path = notebook(tmp_path, SURROUNDINGS.strip(), name="my {n} ü 'notes'/note books, 100 %")
    away = tmp_path / "away"
    away.mkdir()
    bare = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    alone = ["unshare", "-n"] if shutil.which("unshare") else []
    if alone and subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []  # not root: the run is tried with a network
    command = [*alone, sys.executable, "-m", "helpers.execute", str(path)]
    command += ["-p", "name", HOSTILE, "-p", "n", "-4"]
    ran = subprocess.run(command, cwd=away, env=bare, capture_output=True, encoding="utf-8")
    assert (ran.returncode, ran.stderr) == (0, "")
    out = read(path.parent.parent / "build" / "a.ipynb").cells[-1].outputs[0].text.splitlines()
    assert out[-1] == "[] C ✓ -4" and (out[0] == "no network: True" or not alone)
    told = (path.parent / "told").read_text("utf-8", errors="surrogatepass")
    assert told == HOSTILE and [*away.iterdir()] == []
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.ipynb", "told"]


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection(("192.0.2.1", 80), 1),
        lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
        lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 80)),
        lambda: socket.getaddrinfo("example.org", 80),
        lambda: urllib.request.urlopen("http://example.org"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_test_reaches_a_network(no_network, reach):
    with pytest.raises(OSError, match=r"may not reach|urlopen"):
        reach()
    assert no_network and (no_network.clear() is None)
    server = socket.create_server(("127.0.0.1", 0))
    with server, socket.create_connection(server.getsockname()):
        pass


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_data_are_read_from_any_place_under_any_name(tmp_path, monkeypatch, kind):
    from helpers.data import load_rows, read_texts

    folder = tmp_path / "ein {Ordner} für 100 %, 'x'"
    folder.mkdir()
    path = folder / f"ü {{0}} a.{kind}"
    buffer = io.BytesIO()
    np.savez(buffer, X=np.random.default_rng(0).normal(size=(8, 2)), y=[0, 1] * 4)
    path.write_bytes(buffer.getvalue() if kind == "npz" else b"text,label\none,a\ntwo,b\n")
    monkeypatch.chdir(folder)
    load = load_rows if kind == "npz" else read_texts
    assert str(load(path.name)) == str(load(path))
