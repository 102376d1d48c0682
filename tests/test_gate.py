"""The gate must turn red: each mutation of a sound notebook is caught by `check` or by nbval."""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest

from helpers.execute import execute, faults, main

ROOT = Path(__file__).parent.parent
REAL = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
CELLS = {
    "parameters": "n = 3  # points, 1 to 9",
    "imports": "%matplotlib inline\nimport matplotlib.pyplot as plt",
    "figure": "fig, ax = plt.subplots()\nax.plot(range(n))\nplt.show()",
    "print": "print(f'{n} points, 41 of 50 right')",
    "empty": "",
    "shell": "%%bash\nfor i in 1 2; do echo $i; done",
    "second": "print('done')",
}


def run(*command, **environment):
    command = [sys.executable, "-m", *command]
    kept = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, **kept)


def check(path):
    return main(["--check", str(path)])


def nbval(path, **environment):
    options = ["-p", "tests.gate", "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "60"]
    return run("pytest", *options, "-n", "0", str(path), **environment)


def hostile(folder):
    """Return variables that point to a user's own kernels, start-up files and settings."""
    startup, kernel = folder / "profile_default" / "startup", folder / "kernels" / "python3"
    texts = {
        startup / "00.py": "print('startup'); foreign = 1",
        startup.parent / "ipython_config.py": "c.InlineBackend.figure_formats = {'svg'}",
        startup.parent / "ipython_kernel_config.py": "c.IPKernelApp.exec_lines = ['foreign = 1']",
        folder / "matplotlibrc": "lines.linewidth: 9\naxes.facecolor: black\nno.such.key: 1\n",
        folder / "stylelib" / "ggplot.mplstyle": "lines.linewidth: 9\n",
        folder / "start.py": "print('startup'); foreign = 1",
        kernel / "kernel.json": '{"argv": ["false"], "display_name": "of somebody else"}',
        folder / ("long" * 30) / "kept": "",
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    ours = dict.fromkeys(
        ["JUPYTER_PATH", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR"], folder
    )
    ours |= {"PYTHONSTARTUP": folder / "start.py", "TMPDIR": folder / ("long" * 30)}
    ours |= {"MPLBACKEND": "pdf", "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "1"}
    return {name: str(value) for name, value in ours.items()}


def make_notebook(path, cells=CELLS):
    nb = nbformat.v4.new_notebook()
    for name, source in cells.items():
        nb.cells.append(nbformat.v4.new_code_cell(source, id=name))
    nb.cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = make_notebook(tmp_path_factory.mktemp("gate") / "notebooks" / "sample.ipynb")
    execute(path)
    return path


def picture(nb):
    return next(
        o for c in nb.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    )


def png(pixels):
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, format="png")
    return base64.b64encode(buffer.getvalue()).decode() + "\n"


def change_a_digit(nb):
    outputs = (
        o for c in nb.cells for o in c.get("outputs", []) if re.search(r"\d", o.get("text", ""))
    )
    output = next(outputs)
    output.text = re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), output.text, count=1)


def strip_outputs(nb):
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None


def strip_outputs_but_keep_counts(nb):
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = []


def misspell_a_magic(nb):
    cell = next(c for c in nb.cells if "%matplotlib inline" in c.source)
    cell.source = cell.source.replace("%matplotlib inline", "%matplotlib inlin")


def renumber_a_cell(nb):
    next(c for c in nb.cells if c.cell_type == "code").execution_count = 7


def blank_a_figure(nb):
    output = picture(nb)
    size = matplotlib.image.imread(io.BytesIO(base64.b64decode(output.data["image/png"]))).shape
    output.data["image/png"] = png(np.ones(size))


def exchange_a_figure(nb):
    output = picture(nb)
    pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(output.data["image/png"])))
    output.data["image/png"] = png(pixels[::-1].copy())


def drop_a_figure(nb):
    output = picture(nb)
    for cell in nb.cells:
        if output in cell.get("outputs", []):
            cell.outputs.remove(output)


def misspell_a_tag(nb):
    nb.cells[0].metadata["tags"] = ["paramters"]


def switch_a_check_off(nb):
    nb.cells[-1].source = "# NBVAL_IGNORE_OUTPUT\n" + nb.cells[-1].source


def leave_a_path(nb):
    nb.cells[-1].outputs[0].text += "/" + "home/someone/data.npz\n"


SEEN_WITHOUT_RUNNING = [
    strip_outputs,
    strip_outputs_but_keep_counts,
    renumber_a_cell,
    blank_a_figure,
    drop_a_figure,
    misspell_a_tag,
]
SEEN_BY_RUNNING = [change_a_digit, misspell_a_magic, blank_a_figure, exchange_a_figure]


def mutate(path, mutation, folder):
    nb = nbformat.read(path, as_version=4)
    mutation(nb)
    copy = folder / path.name
    nbformat.write(nb, copy)
    return copy


def test_a_sound_notebook_passes_both_gates_on_whatever_machine(sound, tmp_path):
    assert check(sound) == 0
    ran = nbval(sound, **hostile(tmp_path))
    assert ran.returncode == 0 and f"{len(CELLS)} passed" in ran.stdout


@pytest.mark.parametrize("mutation", [*SEEN_WITHOUT_RUNNING, switch_a_check_off, leave_a_path])
def test_check_turns_red(sound, mutation, tmp_path):
    copy = mutate(sound, mutation, tmp_path)
    assert faults(nbformat.read(copy, as_version=4))
    assert check(copy) == 1


@pytest.mark.parametrize("mutation", SEEN_BY_RUNNING)
def test_nbval_turns_red(sound, mutation, tmp_path):
    ran = nbval(mutate(sound, mutation, tmp_path))
    assert ran.returncode == 1 and re.search(r"[12] failed", ran.stdout)


@pytest.mark.parametrize("mutation", SEEN_WITHOUT_RUNNING)
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_check_turns_red_on_the_real_notebooks(path, mutation, tmp_path):
    assert not faults(nbformat.read(path, as_version=4))
    assert faults(nbformat.read(mutate(path, mutation, tmp_path), as_version=4))


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_check_turns_red_on_bytes_that_are_not_canonical(path, tmp_path):
    copy, text = tmp_path / path.name, path.read_text(encoding="utf-8")
    copy.write_text(text.replace('"metadata": {}', '"metadata": {"execution": {}}', 1), "utf-8")
    assert check(copy) == 1


def test_makefile_runs_these_gates():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-p tests.gate --nbval --nbval-current-env" in makefile
    assert "--nbval-lax" not in makefile and "sanitize" not in makefile
    assert re.search(r"^test: style unit check nbval", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
