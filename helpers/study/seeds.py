"""The same experiment over many seeds, in parallel processes, with the same numbers."""

import math
import os
import sys
import warnings
from asyncio import CancelledError
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from joblib import cpu_count, effective_n_jobs
from joblib.externals.loky import get_reusable_executor, process_executor
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from helpers import files
from helpers.training.seeding import LOCK, reproducible

DEATHS = ("TerminatedWorkerError", "KilledWorker")  # loky's and Dask's, which may not be installed
NOBODY = "not run, Dask's workers or their scheduler are gone"


def run_seeds(experiment, seeds, *, workers=None, **apart):
    """Run an experiment once for each seed, in parallel processes of one thread each.

    `experiment` is a plain function of its seed, ``experiment(seed) -> dict of str to float``, and
    is run as if alone in its process, from torch's stream of that seed and in the caller's default
    dtype. What comes back has for each name an array with one value for each seed, in the order of
    `seeds`; it does not depend on `workers`, of which there are never more than cores: 1 stays in
    this process, None is one for each core or all that the backend of an enclosing
    `joblib.parallel_config` has. Threads share what only a process has, so they take turns, and a
    run inside a run stays in its process. `apart` may name one more argument of the experiment, a
    dict whose entries do not depend on each other, such as the plan of a label curve: where whole
    seeds would leave a process idle, its entries are shared out. A seed that failed, or whose
    worker died, is left out of every array, so that pairs stay pairs, and told in a warning.
    """
    seeds = list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct and at least one: {seeds[:10]}")
    shares = _shares(apart, len(seeds), _at_once(workers))
    jobs = [(seed, share) for seed in seeds for share in shares]
    unit = "seed" if len(shares) == 1 else "part"
    found, rows, failures = dict(in_parallel(experiment, jobs, workers, unit=unit)), [], []
    for i, seed in enumerate(seeds):
        row, failure = _joined([found[i * len(shares) + k] for k in range(len(shares))])
        if failure is None and rows and row.keys() != rows[0].keys():
            failure = f"returned {sorted(row)}, the other seeds {sorted(rows[0])}"
        if failure is None:
            rows.append(row)
        else:
            failures.append(f"seed {seed}: {failure}")
    if not rows:
        raise RuntimeError(f"every seed failed; {failures[0]}")
    if failures:
        told = "; ".join(failures)
        warnings.warn(f"{len(failures)} of {len(seeds)} seeds failed: {told}", stacklevel=2)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _shares(apart, seeds, at_once):
    """Return the arguments of each job of a seed: as many jobs as keep all processes at work."""
    if not apart:
        return [{}]
    if len(apart) > 1:
        raise TypeError(f"{sorted(apart)}: only one argument can be shared out")
    [(name, whole)] = apart.items()
    entries = list(whole.items())
    even, enough = at_once // math.gcd(seeds, at_once), max(4, math.ceil(at_once / seeds))
    size = math.ceil(len(entries) / min(even, enough)) or 1
    return [{name: dict(entries[i : i + size])} for i in range(0, len(entries) or 1, size)]


def _joined(outcomes):
    """Return the outcome of a seed from those of its jobs: its margin is the closest one's."""
    if len(outcomes) == 1:
        return outcomes[0]
    if failures := [failure for _, failure in outcomes if failure is not None]:
        return None, failures[0]
    rows = [row for row, _ in outcomes]
    row = {name: value for row in rows for name, value in row.items() if name != "margin"}
    closest = [row["margin"] for row in rows if "margin" in row]
    return row | ({"margin": min(closest)} if closest else {}), None


def in_parallel(experiment, jobs, workers, *, unit):
    """Yield the place of each job, in any order, and its (results, None) or (None, failure).

    A job is a seed, or one and further arguments. A bar with the time left counts them in units
    where somebody looks on.
    """
    runs = _runs(experiment, jobs, _at_once(workers))
    options = dict(total=len(jobs), unit=unit, leave=False)
    with _watched() as stream:
        yield from tqdm(runs, file=stream, disable=stream is None, **options)


def _at_once(workers):
    """Return how many jobs run at a time, 1 being in this process."""
    if workers is not None and not 1 <= workers <= cpu_count():
        raise ValueError(f"workers = {workers} must be from 1 to the {cpu_count()} cores there are")
    backend, _ = get_active_backend()
    # who is inside a run holds the lock, and would wait for ever for threads of this process
    here = workers == 1 or getattr(backend, "supports_sharedmem", False) or LOCK._is_owned()
    return 1 if here else effective_n_jobs(workers or -1)


def _runs(experiment, jobs, at_once):
    """Yield the place of each job, in any order, and what `_run` returned."""
    backend, _ = get_active_backend()
    task = partial(_run, experiment, torch.get_default_dtype())
    if at_once == 1:
        yield from ((i, task(job)) for i, job in enumerate(jobs))
        return
    left, suspects, futures = dict(enumerate(jobs)), [], {}
    try:
        while left:
            futures = _submitted(task, {i: left[i] for i in suspects[:1] or left}, backend, at_once)
            for future in futures:
                outcome, error = _outcome(future, backend)
                if error is None:
                    del left[futures[future]]
                    yield futures[future], outcome
                elif error == NOBODY:
                    yield from ((i, (None, NOBODY)) for i in left)
                    return
                elif type(error).__name__ not in DEATHS:
                    raise error
            if not suspects:  # the job that killed its worker, if one did, is among the first
                suspects = list(left)[:at_once]
            elif (i := suspects.pop(0)) in left:  # it ran alone
                del left[i]
                yield i, (None, "lost, its worker process died")
    finally:
        for future in futures:
            future.cancel()


def _outcome(future, backend):
    """Return what a future returned and its error: NOBODY where Dask would wait for ever.

    A result that was there may be gone with its worker, so only who has it knows that it is.
    """
    patience, lonely = getattr(backend, "wait_for_workers_timeout", None), 0
    while lonely < 2:
        try:
            return future.result(None if patience is None else max(patience, 1)), None
        except TimeoutError:
            lonely = 0 if backend.client.ncores() else lonely + 1
        except CancelledError:  # its scheduler is gone
            break
        except Exception as error:
            return None, error
    return None, NOBODY


def _submitted(task, jobs, backend, workers):
    """Hand jobs to processes; return futures with the places of those that were still taken."""
    kind, futures = type(backend).__name__, {}
    if kind == "DaskDistributedBackend":
        submit = partial(backend.client.submit, pure=False)
    elif kind in ("LokyBackend", "MultiprocessingBackend"):  # the latter hangs if a worker dies
        submit = get_reusable_executor(workers, timeout=300, initializer=_keep_models).submit
    else:
        raise ValueError(f"seeds run on loky, Dask or threads of joblib, not on its {kind}")
    for i, job in jobs.items():
        try:
            futures[submit(task, job)] = i
        except TerminatedWorkerError:
            break
    return futures


def _keep_models():
    """Let a worker hold pre-trained models: loky takes 300 MB more for a leak, and ends it."""
    process_executor._MAX_MEMORY_LEAK_SIZE = float("inf")


def _run(experiment, dtype, job):
    """Run one job on one thread; return (results, None) or (None, what went wrong)."""
    seed, given = job
    with LOCK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with reproducible(seed, dtype=dtype), threadpool_limits(1):
                row = {name: float(value) for name, value in experiment(seed, **given).items()}
        except (Exception, SystemExit) as error:
            return None, f"{type(error).__name__}: {error}"
        finally:
            torch.set_num_threads(threads)
    bad = [name for name, value in row.items() if not np.isfinite(value)]
    return (None, f"{bad} not finite") if bad else (row, None)


@contextmanager
def _watched():
    """Yield the stream that somebody looks at, or None: a terminal's, or a live front end's.

    A front end names the cell that it runs; `helpers.execute` names the terminal it runs in.
    """
    ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    kernel = getattr(ipython, "kernel", None)
    live = kernel is not None and "cellId" in kernel.get_parent().get("metadata", {})
    if live or sys.stderr.isatty():
        yield sys.stderr
    elif path := os.environ.get(files.TERMINAL):
        with open(path, "w", encoding="utf-8") as terminal:
            yield terminal
    else:
        yield None


def stream(seed, purpose):
    """Return a seed of its own for each purpose: equal streams would make equal numbers."""
    entropy = [seed, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def percent(scores, *others):
    """Return accuracies in percent, with the closest decision as "margin".

    `scores` has a `helpers.training.Score` for each name; the margin is the smallest of these and
    of the `others`, which are behind a choice that was made on the way.
    """
    margin = min(s.margin for s in (*scores.values(), *others))
    return {name: 100 * s.accuracy for name, s in scores.items()} | {"margin": margin}
