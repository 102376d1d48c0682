"""The same experiment over many seeds, in parallel processes, with the same numbers."""

import sys
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from joblib import Parallel, cpu_count, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError
from joblib.parallel import get_active_backend
from threadpoolctl import threadpool_limits
from tqdm import tqdm


@contextmanager
def reproducible(seed):
    """Compute in float64 from torch's global stream seeded with `seed`; restore both afterwards.

    float64 from the first draw keeps the drift between processors far below what is printed.

    Parameters
    ----------
    seed : int
    """
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def run_seeds(experiment, seeds, *, workers=None):
    """Run an experiment once for each seed, in parallel processes of one thread each.

    Parameters
    ----------
    experiment : callable
        ``experiment(seed) -> dict of str to float``, a plain function of its seed.
    seeds : sequence of int
    workers : int, optional
        Processes, never more than cores; 1 stays in this one. None is one for each core, or all
        that the backend of an enclosing `joblib.parallel_config` has. Results do not depend on it:
        where workers would share torch's dtype and random stream (threads, or a run inside a
        run), there is one.

    Returns
    -------
    dict of str to array of shape (n,)
        One value for each seed, in the order of `seeds`. A seed that failed, or was lost when a
        worker died, is left out of every array, so that pairs stay pairs, and told in a warning.

    Raises
    ------
    ValueError
        If there are no seeds, a seed occurs twice, or `workers` is not from 1 to the cores.
    RuntimeError
        If every seed failed.
    """
    seeds = list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be distinct and at least one: {seeds[:10]}")
    if workers is not None and not 1 <= workers <= cpu_count():
        raise ValueError(f"workers = {workers} must be from 1 to the {cpu_count()} cores there are")
    backend, _ = get_active_backend()
    n_jobs = 1 if getattr(backend, "supports_sharedmem", False) else workers or -1
    streams = n_jobs == 1 or getattr(backend, "supports_return_generator", False)
    parallel = Parallel(n_jobs=n_jobs, return_as="generator" if streams else "list")
    runs = parallel(delayed(_run)(experiment, seed) for seed in seeds)
    bar = tqdm(runs, total=len(seeds), unit="seed", leave=False, disable=not _watched())
    done, rows, failures = [], [], []
    try:
        for run in bar:
            done.append(run)
    except TerminatedWorkerError:
        done += [(None, "lost, a worker process died")] * (len(seeds) - len(done))
    for seed, (row, failure) in zip(seeds, done, strict=True):
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


def _run(experiment, seed):
    """Run one seed on one thread; return (results, None) or (None, what went wrong)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            row = {name: float(value) for name, value in experiment(seed).items()}
    except (Exception, SystemExit) as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)
    bad = [name for name, value in row.items() if not np.isfinite(value)]
    return (None, f"{bad} not finite") if bad else (row, None)


def _watched():
    """Whether somebody looks on: a terminal, or a front end, which names the cell that it runs."""
    if sys.stderr.isatty():
        return True
    kernel = getattr(
        getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)(), "kernel", None
    )
    return kernel is not None and "cellId" in kernel.get_parent().get("metadata", {})


def stream(seed, purpose):
    """Return a seed of its own for each purpose: equal streams would make equal numbers.

    Parameters
    ----------
    seed : int
    purpose : str

    Returns
    -------
    int
    """
    entropy = [seed, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def percent(scores, *others):
    """Return accuracies in percent, and the closest decision behind these and other scores.

    Parameters
    ----------
    scores : dict of str to helpers.training.Score
    *others : helpers.training.Score
        Behind a choice that was made on the way.

    Returns
    -------
    dict of str to float
        With the smallest margin as "margin".
    """
    margin = min(s.margin for s in (*scores.values(), *others))
    return {name: 100 * s.accuracy for name, s in scores.items()} | {"margin": margin}
