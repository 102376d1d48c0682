"""JupyterLab itself: a notebook is opened in a real browser, Run All, and no output is an error.

Here with a small notebook that does what ours do. `make lab-test` opens the three, each with its
first-look parameters (ten minutes and more): it sets LAB_NOTEBOOKS.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

from helpers import stored
from tests.browser import browser, emulate
from tests.test_environment import ROOT

FIRST_LOOK = {
    "01_transfer_learning": {"n_seeds": 3, "n_draws": 10},
    "02_peft_techniques": {"n_seeds": 3, "tuning_seeds": 1},
    "03_peft_in_practice": {"n_seeds": 3},
}
WANTED = os.environ.get("LAB_NOTEBOOKS", "").split()
SMALL = {
    "parameters": "n_seeds = 3  # seeds, 1 to 10",
    "imports": "%matplotlib inline\nimport matplotlib.pyplot as plt\nfrom tqdm import tqdm\n"
    "from helpers import show",
    "bar": "for _ in tqdm(range(n_seeds), leave=False):\n    pass\nprint(n_seeds, 'seeds')",
    "figure": "fig, ax = plt.subplots(figsize=(3, 2))\nax.plot([0, 1])\nplt.show()",
    "table": "show.show_table(['a', 'b'], [[1, 2]])",
    "solution": "n_seeds + 1",
}
OURS = "app.shell.currentWidget"
STATE = f"""
    const app = window.jupyterapp, panel = app && {OURS};
    if (!panel || !panel.context || !panel.sessionContext) return null;
    if (!panel.context.isReady || !panel.sessionContext.isReady) return null;
    const cells = [...panel.content.model.cells].filter(c => c.type === 'code');
    return {{status: panel.sessionContext.kernelDisplayStatus,
            ran: cells.filter(c => c.executionCount !== null).length, of: cells.length,
            errors: cells.flatMap(c => c.outputs.toJSON()).filter(o => o.output_type === 'error'),
            dialogs: [...document.querySelectorAll('.jp-Dialog')].map(d => d.innerText)}};"""


def small():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A small notebook")])
    nb.cells += [nbformat.v4.new_code_cell(text, id=name) for name, text in SMALL.items()]
    nb.cells[1].metadata.tags = ["parameters"]
    nb.cells[-1].metadata.tags = ["solution"]
    return nbformat.reads(stored.canonical(nb), as_version=4)


def with_parameters(nb, values):
    """Set parameters as a reader does: by typing into their cell."""
    (cell,) = (c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    for name, value in values.items():
        cell.source, done = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value}", cell.source)
        assert done == 1, name
    for other in (c for c in nb.cells if c.cell_type == "code"):
        other.outputs, other.execution_count = [], None
    return nb


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Yield JupyterLab's address and its folder of notebooks; no settings of a user reach it."""
    place = tmp_path_factory.mktemp("lab")
    folder, token = place / "notebooks", secrets.token_hex(8)
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [f"--port={port}", "--port-retries=0", f"--IdentityProvider.token={token}"]
    options += [f"--ServerApp.root_dir={folder}", "--no-browser", "--expose-app-in-browser"]
    options += ["--LabApp.news_url=None", "--LabApp.extension_manager=readonly"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    options += ["--allow-root"] if os.name == "posix" and os.geteuid() == 0 else []
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "IPYTHON"))}
    kept |= {"PYTHONPATH": str(ROOT), "HOME": str(place), "IPYTHONDIR": str(place / "ipython")}
    kept |= {f"JUPYTER_{what}_DIR": str(place / what) for what in ("CONFIG", "DATA", "RUNTIME")}
    with open(place / "log", "w+b") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=kept, cwd=folder, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            wait(lambda: answers(f"{address}/api", server, place / "log"), 300)
            yield address, token, folder
        finally:
            server.terminate()
            server.wait(30)


def answers(url, server, log):
    assert server.poll() is None, log.read_text(errors="replace")[-2000:]
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, TimeoutError):
        return False


def wait(condition, seconds, told=str):
    """Return what a condition returns as soon as it holds; else fail with what `told` says."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"still not so after {seconds} s: {told()}"
        time.sleep(0.3)
    return found


def run_all(driver, lab, name, seconds):
    """Open a notebook, Run All, wait until the kernel is idle, save; return what the file holds."""
    address, token, folder = lab
    emulate(driver, 1280)
    driver.get(f"{address}/lab/workspaces/{Path(name).stem}/tree/{name}?token={token}")
    wait(lambda: (driver.execute_script(STATE) or {}).get("status") == "idle", 600)
    driver.execute_script("jupyterapp.commands.execute('notebook:run-all-cells'); return null")

    def finished():
        state = driver.execute_script(STATE)
        assert not state["dialogs"] and not state["errors"], state
        return state["status"] == "idle" and state["ran"] == state["of"]

    wait(finished, seconds, lambda: driver.execute_script(STATE))
    driver.execute_async_script(
        "jupyterapp.commands.execute('docmanager:save').then(arguments[arguments.length - 1])"
    )
    if shots := os.environ.get("LAB_SHOTS"):
        driver.save_screenshot(str(Path(shots, f"lab-{Path(name).stem}.png")))
    return nbformat.read(folder / name, as_version=4)


def in_order(nb):
    counts = [c.execution_count for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    return counts == list(range(1, len(counts) + 1))


def kinds(nb):
    return {c.id: [*o.get("data", {"text": 0})] for c in nb.cells for o in c.get("outputs", [])}


@pytest.fixture(scope="module")
def driver():
    with browser() as chromium:
        yield chromium


def test_run_all_in_jupyterlab_runs_a_notebook_of_our_form(driver, lab):
    nbformat.write(with_parameters(small(), {"n_seeds": 5}), lab[2] / "small.ipynb")
    nb = run_all(driver, lab, "small.ipynb", 600)
    assert in_order(nb)
    found = kinds(nb)
    assert found["bar"] == ["text"] and "image/png" in found["figure"]
    assert "text/markdown" in found["table"]
    assert "5 seeds" in "".join(o.text for o in nb.cells[3].outputs if o.name == "stdout")
    seen = driver.execute_script(
        "const shown = '.jp-OutputArea-output :is(img, td)';"
        "return [...document.querySelectorAll(shown)].filter(e => e.clientWidth > 0).length"
    )
    assert seen >= 3  # the figure and the table's two cells are on the screen


@pytest.mark.skipif(not WANTED, reason="`make lab-test` opens the real notebooks: ten minutes")
@pytest.mark.parametrize("name", WANTED)
def test_run_all_in_jupyterlab_runs_a_notebook(driver, lab, name):
    nb = with_parameters(stored.read(ROOT / "notebooks" / f"{name}.ipynb"), FIRST_LOOK[name])
    nbformat.write(nb, lab[2] / f"{name}.ipynb")
    for picture in (ROOT / "notebooks").glob("*.png"):
        shutil.copy(picture, lab[2])
    nb = run_all(driver, lab, f"{name}.ipynb", 1800)
    assert in_order(nb) and not [o for c in nb.cells for o in c.get("outputs", []) if "ename" in o]
