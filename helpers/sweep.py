"""A notebook at each point of a grid: `python -m helpers.sweep NOTEBOOK --grid seed=0:100`."""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import sys
from asyncio import CancelledError
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from joblib import cpu_count
from tqdm import tqdm

from helpers import files, stored, warm
from helpers.execute import take_pairs
from helpers.stored import NotebookError, parameters, parse_parameters

RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(-?\d+))?")
MOST = 100_000  # points
PATIENCE = 15  # seconds without news after which one looks whether a worker is left
NOT_RUN = warm.failed("") | {"status": "not run"}


def main(argv=None):
    """Run a notebook at each point of a grid; see ``--help``.

    Parameters
    ----------
    argv : list of str, optional
        Command line; None is the process's own.

    Returns
    -------
    int
        0 if all points are finished, 1 if some are not, 2 if the request is wrong.
    """
    pairs, rest = take_pairs(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(rest)
    try:
        plan = _plan(args, pairs)
        rows = [_read(path) for path in plan.paths]
        if args.scheduler and not importlib.util.find_spec("distributed"):
            raise ImportError("--scheduler needs distributed")
    except (NotebookError, OSError, ImportError) as error:
        cure = ": pip install -e '.[sweep]'" * isinstance(error, ImportError)
        print(f"{args.notebook}: {error}{cure}", file=sys.stderr)
        return 2
    todo = [i for i, row in enumerate(rows) if row is None]
    earlier, workers = len(rows) - len(todo), min(args.workers or cpu_count(), len(todo) or 1)
    try:
        how = _dask(plan, args.scheduler) if args.scheduler else _here(plan, workers)
        with how as (submit, left):
            for i, row in _done(plan, todo, submit, left):
                rows[i] = row
                _write(plan.paths[i], plan.points[i], row)
    except (NotebookError, OSError, KeyboardInterrupt) as error:
        told = f"{str(error) or 'interrupted'}; the same command goes on from here"
        print(f"{args.notebook}: {told}", file=sys.stderr)
    rows = [row or NOT_RUN for row in rows]
    told = _report(plan, rows)
    print(f"{args.notebook}: {len(rows)} points, {earlier} of an earlier run; {told}")
    return int(any(row["status"] != "ok" for row in rows))


def parse_grid(nb, texts, fixed=()):
    """Turn the texts of ``--grid name=values`` into values of the parameters' types.

    Parameters
    ----------
    nb : NotebookNode
    texts : list of str
        Values are ``0:100``, whole numbers from 0 to 99, or ``4,16,64``.
    fixed : collection of str, optional
        Names of parameters that have one value already.

    Returns
    -------
    dict of str to list

    Raises
    ------
    NotebookError
        If a name is unknown or set twice, or a value is of another type, missing or repeated.
    """
    known, axes = parameters(nb), {}
    for text in texts:
        name, _, listed = text.partition("=")
        if name in axes or name in fixed:
            raise NotebookError(f"parameter {name!r} is set twice")
        kind = type(known.get(name, ("",))[0])
        if (found := RANGE.fullmatch(listed)) and kind in (int, float):
            start, stop, step = (int(number or 1) for number in found.groups())
            values = range(start, stop, step) if step else ()
            values = [kind(i) for i in itertools.islice(values, MOST + 1)]
        else:
            values = [parse_parameters(nb, [(name, v)])[name] for v in listed.split(",") if listed]
        if not values:
            raise NotebookError(f"--grid {text} has no values: write {name}=0:10 or {name}=1,2,5")
        if len({repr(v) for v in values}) < len(values):
            raise NotebookError(f"--grid {text} has a value twice")
        axes[name] = values
    if (count := math.prod(map(len, axes.values()))) > MOST:
        raise NotebookError(f"the grid has {count:,} points or more, {MOST:,} at most")
    return axes


def _parser():
    parser = argparse.ArgumentParser(prog="python -m helpers.sweep", description=__doc__)
    parser.add_argument("notebook", type=Path)
    grid = "values of a parameter: 0:100, or 4,16; several axes make all combinations"
    parser.add_argument("--grid", action="append", required=True, metavar="NAME=VALUES", help=grid)
    parser.add_argument("-p", nargs=2, metavar=("NAME", "VALUE"), help="a parameter of all points")
    parser.add_argument("--out", type=Path, help="table, .csv or .parquet")
    parser.add_argument("--until", metavar="CELL", help="id of the last cell to run")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each point")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, help="processes here; default: one for each core")
    where.add_argument("--scheduler", metavar="TCP://HOST:PORT", help="Dask's, for its workers")
    return parser


def _plan(args, pairs):
    """Check all that can be checked before a run; return what to run, and where results go."""
    nb, folder = stored.read(args.notebook), args.notebook.resolve().parent
    stored.stop_after(nb, args.until)
    cells = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    cells = tuple((c.id, c.source, tuple(c.metadata.get("tags", ()))) for c in cells)
    fixed = parse_parameters(nb, pairs)
    axes = parse_grid(nb, args.grid, fixed)
    if not any(re.search(r"\brecord\(", source) for _, source, _ in cells):
        raise NotebookError("records nothing: call helpers.show.record(name=value) in one cell")
    for name, value in (("workers", args.workers), ("timeout", args.timeout)):
        if value is not None and not value > 0:
            raise NotebookError(f"--{name} {value} must be positive")
    built = folder.parent / "build" / "sweep"
    out = args.out or built / f"{args.notebook.stem}.csv"
    if out.suffix not in (".csv", ".parquet"):
        raise NotebookError(f"--out {out} must end in .csv or .parquet")
    if out.suffix == ".parquet" and not importlib.util.find_spec("pyarrow"):
        raise NotebookError(f"--out {out} needs pyarrow: pip install pyarrow, or name a .csv")
    for place in (out.parent, built / "points"):
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise NotebookError(f"is not run, since {place} may not be written")
    points = [fixed | dict(zip(axes, p, strict=True)) for p in itertools.product(*axes.values())]
    beside = [(p.name, p.read_bytes()) for p in sorted(folder.glob("*.py"))]
    base = hashlib.sha256(repr([warm.version(), cells, beside]).encode())
    paths = [built / "points" / f"{_key(base, point, folder)}.json" for point in points]
    task = (warm.run_point, cells, str(folder), args.timeout, warm.version())
    return SimpleNamespace(cells=cells, task=task, axes=axes, points=points, paths=paths, out=out)


def _key(base, point, folder):
    """Return what a point is known by: notebook, helpers, versions, values, files they name."""
    told = base.copy()
    told.update(repr(sorted(point.items())).encode())
    for path in (folder / v for v in point.values() if isinstance(v, str) and v):
        named = sorted(p for p in (path, *path.rglob("*")) if p.is_file())
        told.update(
            repr([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in named]).encode()
        )
    return told.hexdigest()


def _read(path):
    """Return the row of a point that an earlier run has finished, or None."""
    try:
        digest, text = path.read_text(encoding="utf-8").split("\n", 1)
    except FileNotFoundError:
        return None
    except ValueError:
        digest, text = "", ""
    if digest != hashlib.sha256(text.encode()).hexdigest():
        print(f"{path} is damaged: its point runs again", file=sys.stderr)
        return None
    row = json.loads(text)["row"]
    return row if row["status"] == "ok" else None


def _write(path, point, row):
    """Keep the row of a point, with a digest: a file that was damaged is not read for another."""
    text = json.dumps({"point": {k: repr(v) for k, v in point.items()}, "row": row}, indent=1)
    files.write(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode())


@contextlib.contextmanager
def _here(plan, workers):
    """Yield how to run points in processes of this machine, and whether one can be."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool.submit, lambda: True
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        warm.stop(plan.cells)
        pool.shutdown()
        warm.stop(plan.cells)  # of a thread that was about to start one


@contextlib.contextmanager
def _dask(plan, address):
    """Yield how to run points on Dask's workers, and which there are."""
    from distributed import Client  # an extra

    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we tell what is lost
    with Client(address, timeout=30) as client:
        client.wait_for_workers(1, timeout=30)
        theirs = client.run(warm.version, on_error="return")
        for worker in (name for name, version in theirs.items() if version != warm.version()):
            raise NotebookError(f"worker {worker} has other helpers, or other versions of packages")
        try:
            yield partial(client.submit, pure=False), client.ncores
        finally:
            client.run(warm.stop, plan.cells, on_error="ignore")


def _done(plan, todo, submit, left):
    """Yield places of points and their rows as they come."""
    done, lonely = queue.SimpleQueue(), 0
    bar = tqdm(total=len(plan.points), initial=len(plan.points) - len(todo), unit="point")
    with bar:
        futures = {}
        for i in todo:
            futures[i] = submit(*plan.task, plan.points[i])
            futures[i].add_done_callback(lambda future, i=i: done.put((i, future)))
        while futures:
            try:
                i, future = done.get(timeout=PATIENCE)
                try:
                    row = future.result(PATIENCE)
                except TimeoutError:  # the result was there, and went with its worker
                    done.put((i, future))
                    raise queue.Empty from None
                except CancelledError:
                    lost = f"the scheduler is gone, and {len(futures)} points with it"
                    raise NotebookError(lost) from None
                except Exception as error:  # workers died of it, or before they started
                    row = warm.failed(f"lost: {type(error).__name__}: {error}")
            except queue.Empty:
                lonely = 0 if left() else lonely + 1
                if lonely > 1:
                    raise NotebookError(f"no worker is left for {len(futures)} points") from None
                continue
            del futures[i]
            bar.update()
            yield i, row


def _report(plan, rows):
    """Write the table and the plot; return what became of them."""
    import pandas as pd  # slow to import

    names = dict.fromkeys(name for row in rows for name in row["recorded"])
    table = [
        point | {k: row[k] for k in ("status", "seconds", "error")} | row["recorded"]
        for point, row in zip(plan.points, rows, strict=True)
    ]
    frame, buffer = pd.DataFrame(table, dtype=object), io.BytesIO()  # whole numbers stay whole
    if plan.out.suffix == ".csv":
        frame.to_csv(buffer, index=False)
    else:
        frame.to_parquet(buffer, index=False)
    files.write(plan.out, buffer.getvalue())
    failed = frame[frame.status == "failed"]
    for error, count in failed.error.value_counts()[:5].items():
        print(f"{count} points failed: {error}", file=sys.stderr)
    shown = frame[frame.status == "ok"]
    numbers = [n for n in names if all(isinstance(v, int | float) for v in shown[n].dropna())]
    told = f"{len(shown)} ok, {len(failed)} failed, in {os.path.relpath(plan.out)}"
    if not numbers:
        return f"{told}; no number is recorded, so nothing is drawn"
    picture = plan.out.with_suffix(".png")
    files.write(picture, draw(shown, plan.axes, numbers[0]))
    return f"{told} and {picture.name}"


def draw(frame, axes, name):
    """Return a picture of a recorded value over the grid, as PNG.

    Of several axes the longest is what repeats, mostly seeds; the first of the others is the x
    axis, the second one has colours.

    Parameters
    ----------
    frame : DataFrame
        One row a point.
    axes : dict of str to list
    name : str
        A recorded number's.

    Returns
    -------
    bytes
    """
    from matplotlib.figure import Figure  # slow to import

    repeated = max(axes, key=lambda axis: len(axes[axis]))
    x, *more = [axis for axis in axes if axis != repeated] or [repeated]
    counted = len(axes[x]) > 12 and not isinstance(axes[x][0], str | bool)  # else side by side
    place = {repr(v): v if counted else i for i, v in enumerate(axes[x])}
    fig = Figure(figsize=(6.4, 4), layout="constrained")
    ax = fig.subplots()
    for value in axes[more[0]] if more else [None]:
        part = frame[frame[more[0]] == value] if more else frame
        at = part[x].map(lambda v: place[repr(v)])
        [dots] = ax.plot(at, part[name], "o", alpha=0.35, markersize=4)
        means = part[name].astype(float).groupby(at).mean()
        label = f"{more[0]} = {value}, mean" if more else "mean"
        ax.plot(means.index, means, "_-", color=dots.get_color(), markersize=14, label=label)
    if not counted:
        ax.set_xticks(range(len(place)), [str(v) for v in axes[x]])
    ax.set(xlabel=x, ylabel=name, title=f"{name} of {len(frame)} runs")
    ax.legend()
    fig.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
