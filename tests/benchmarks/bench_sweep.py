"""What a sweep costs: `make bench`, or with a number of points, 200 by default.

1. Wall time of the points, without the start-up, over the sum of the times of their cells divided
   by the workers. The start-up, which is told, is that of a sweep of one point for each worker.
2. Wall time of one headless run by `helpers.execute`, a fresh kernel, over that of a point's cells.

The notebook imports torch and draws a figure; half a second of each run is work.
Exits with 1 if the bar is missed.
"""

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pandas as pd
from joblib import cpu_count

from helpers import sweep
from helpers.execute import execute

POINTS, BAR = int(sys.argv[1]) if sys.argv[1:] else 200, 1.15
CELLS = [
    "seed = 0  # of the run",
    "%matplotlib inline\nimport time\nimport matplotlib.pyplot as plt\nimport torch\n"
    "from helpers.show import record",
    "start = time.process_time()\ntorch.manual_seed(seed)\nx = torch.rand(100, 100)\n"
    "while time.process_time() - start < 0.5:\n    score = (x @ x).trace().item()",
    "plt.plot(x[0])\nplt.show()",
    "record(score=score)",
]


def make(folder):
    """Return the path of a notebook of these cells."""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    nb.cells[0].metadata["tags"] = ["parameters"]
    path = Path(folder, "notebooks", "a.ipynb")
    path.parent.mkdir()
    nbformat.write(nb, path)
    return path


def timed(path, first, count):
    """Return the wall time of a sweep of so many seeds, and the times of their cells."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert sweep.main([str(path), "--grid", f"seed={first}:{first + count}"]) == 0
    wall = time.perf_counter() - start
    return wall, pd.read_csv(path.parent.parent / "build" / "sweep" / "a.csv").seconds


def main():
    """Print the ratios; return whether the bar holds."""
    workers = cpu_count()
    with tempfile.TemporaryDirectory() as folder:
        path = make(folder)
        wall, cells = timed(path, POINTS, workers)
        start_up = wall - cells.sum() / workers
        wall, cells = timed(path, 0, POINTS)
        start = time.perf_counter()
        execute(path, {"seed": 1})
        plain = time.perf_counter() - start
    ratio = (wall - start_up) / (cells.sum() / workers)
    kept = "holds" if ratio <= BAR else "MISSED"
    print(f"{POINTS} points on {workers} workers: {wall:.1f} s, of them start-up {start_up:.1f} s")
    print(f"without start-up / (cells / workers): {ratio:.3f}; bar: at most {BAR}, {kept}")
    print(f"a fresh kernel / a point's cells: {plain / cells.mean():.2f}")
    return ratio <= BAR


if __name__ == "__main__":
    sys.exit(not main())
