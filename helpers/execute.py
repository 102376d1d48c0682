"""Headless runs: `python -m helpers.execute NOTEBOOKS`, the command behind `make execute`."""

import argparse
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers import files, outputs, stored
from helpers.stored import NotebookError, canonical, faults, parameters, parse_parameters

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# what a user's environment says to Python, IPython, Jupyter and matplotlib about their behaviour
FOREIGN = re.compile(
    r"PYTHON(STARTUP|WARNINGS|OPTIMIZE|INSPECT|VERBOSE|DEBUG|DEVMODE|BREAKPOINT)|IPYTHON|JUPYTER|JPY_"
    r"|MPLBACKEND$|MATPLOTLIBRC$|COLUMNS$|LINES$|NO_COLOR$|FORCE_COLOR$"
)
# read by the kernel before any cell: a crash is told to its log; what libraries log or warn of when
# they are imported is no output; matplotlib's settings come from the empty file in our folder,
# while the user's cache of fonts stays in use
PROFILE = """
import faulthandler, logging, os, traceback, warnings
faulthandler.enable(open(os.dup(2), "w"), all_threads=False)
def importing():
    return any(f.f_code.co_name == "_find_and_load" for f, _ in traceback.walk_stack(None))
show = warnings.showwarning
warnings.showwarning = lambda *told, **more: importing() or show(*told, **more)
logging.lastResort.addFilter(lambda record: not importing())
here, theirs, ours = os.getcwd(), os.environ.get("MPLCONFIGDIR"), os.environ["IPYTHONDIR"]
os.environ["MPLCONFIGDIR"] = ours
os.chdir(ours)
import matplotlib
matplotlib.get_configdir()  # remembered
os.chdir(here)
del os.environ["MPLCONFIGDIR"]
os.environ.update({"MPLCONFIGDIR": theirs} if theirs else {})
"""


def clean_environment(folder):
    """Return an environment for a kernel that no configuration of a user or machine reaches.

    Parameters
    ----------
    folder : str or Path
        An empty folder; IPython's configuration is written there, and must outlive the kernel.

    Returns
    -------
    dict of str to str
    """
    profile = Path(folder, "profile_default")
    profile.mkdir()
    (profile / "ipython_kernel_config.py").write_text(PROFILE, encoding="utf-8")
    Path(folder, "matplotlibrc").touch()
    kept = {name: text for name, text in os.environ.items() if not FOREIGN.match(name)}
    inline = "module://matplotlib_inline.backend_inline"
    ours = {"IPYTHONDIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder), "MPLBACKEND": inline}
    terminal = {files.TERMINAL: os.ttyname(2)} if os.name == "posix" and os.isatty(2) else {}
    return terminal | kept | ours


def execute(path, values=None, *, until=None, timeout=1800):
    """Run a notebook from top to bottom on a clean kernel and store it in canonical form.

    The file is replaced in one step after the whole run was found sound, so that a crash at any
    moment leaves it as it was. A run with `values`, or of the first cells only, is stored under
    ``build/`` beside the notebook's folder instead, as far as it came; what a stored notebook may
    not hold is told there, not refused.

    Parameters
    ----------
    path : Path
    values : dict of str to object, optional
        Parameters to set.
    until : str, optional
        Id of the last cell to run; the others are left out.
    timeout : int, default=1800
        Seconds allowed to each cell.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    NotebookError
        If a cell fails, or there is no such cell, or the outputs of a whole run have faults.
    OSError
        If the result has no place to be stored, before anything runs.
    """
    nb = stored.read(path)
    folder = path.resolve().parent
    aside = bool(values or until)  # a reader's own run
    target = (folder.parent / "build" / path.name) if aside else path
    if unknown := sorted(set(values or ()) - set(parameters(nb))):
        raise NotebookError(f"unknown parameters {unknown}")
    for name, value in (values or {}).items():
        if not stored.settable(value):
            told = "text, numbers, truth values, lists and dicts of them can be"
            raise NotebookError(f"parameter {name} = {value!r} cannot be set from outside: {told}")
    stored.stop_after(nb, until)
    if not aside and (found := stored.markers(nb)):  # before any work is lost
        raise NotebookError("\n".join(found))
    place = target.resolve()
    place.parent.mkdir(exist_ok=True)
    if not all(os.access(p, os.W_OK) for p in (place, place.parent) if p.exists()):
        raise NotebookError(f"is not run, since {os.path.relpath(place)} may not be written")
    nb, problem = _run(nb, values, folder, timeout)
    if problem and aside:
        files.write(target, canonical(nb).encode(errors="replace"))
        problem += f"\nWhat ran is stored as {os.path.relpath(target)}"
    if problem:
        raise NotebookError(problem)
    found = faults(nb)
    if found and not aside:
        raise NotebookError("\n".join(found))
    files.write(target, canonical(nb).encode(errors="replace"))
    for fault in found:
        print(f"{path}: note: {fault}", file=sys.stderr)
    return target


def main(argv=None):
    """Run, check or describe notebooks; see ``--help``.

    Parameters
    ----------
    argv : list of str, optional
        Command line; None is the process's own.

    Returns
    -------
    int
        0 if all is well, 1 if a notebook failed, 2 if the request is wrong.
    """
    pairs, rest = take_pairs(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(rest)

    values = {}
    for path in args.notebooks:
        try:
            nb = stored.read(path)
            values[path] = parse_parameters(nb, pairs)
            for name, (default, meaning) in parameters(nb).items() if args.parameters else ():
                print(f"{name:20s} {type(default).__name__:6s} {default!r:12} {meaning}")
        except NotebookError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
    if args.parameters:
        return 0
    if len(args.notebooks) > 1 and not args.check:
        shared = [a for pair in pairs for a in ("-p", *pair)] + ["--timeout", str(args.timeout)]
        shared += ["--until", args.until] if args.until else []
        shared += ["--parent", str(os.getpid())] if os.name == "posix" else []  # no launchers
        command = [sys.executable, "-m", "helpers.execute", *shared]
        return _together([[*command, str(path)] for path in args.notebooks], args.jobs)
    if args.parent:
        threading.Thread(target=_follow, args=[args.parent], daemon=True).start()
    failed = 0
    for path, parsed in values.items():
        try:
            if args.check:
                _check(path)
                print(f"{path}: sound")
            else:
                target = execute(path, parsed, until=args.until, timeout=args.timeout)
                print(f"{path}: ran, stored as {os.path.relpath(target)}")
        except (NotebookError, OSError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = 1
    return failed


def _parser():
    parser = argparse.ArgumentParser(prog="python -m helpers.execute", description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="notebooks at a time")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for each cell")
    parser.add_argument("--until", metavar="CELL", help="id of the last cell to run")
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="stored form only, nothing is run")
    mode.add_argument("--parameters", action="store_true", help="list what -p can set")
    return parser


def take_pairs(argv):
    """Take ``-p name value`` out of a command line: argparse would take ``-1e-3`` for an option.

    Parameters
    ----------
    argv : list of str

    Returns
    -------
    tuple of (list, list)
        Names with values, and what is left.
    """
    rest, pairs = list(argv), []
    while "-p" in rest and len(rest) > (at := rest.index("-p")) + 2:
        pairs.append(rest[at + 1 : at + 3])
        del rest[at : at + 3]
    return pairs, rest


def _together(commands, jobs):
    """Run commands, some at a time; an interrupt reaches each once, and no other one starts.

    A terminal's Ctrl-C would reach them as well as this process: they are in groups of their own.
    """
    children, stopped = [], threading.Event()

    def _one(command):
        if not stopped.is_set():
            env = os.environ | {files.TERMINAL: ""}  # their bars would overwrite each other
            children.append(subprocess.Popen(command, start_new_session=True, env=env))
            return children[-1].wait()

    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        runs = [pool.submit(_one, command) for command in commands]
        try:
            return int(any([run.result() for run in runs]))
        except KeyboardInterrupt:
            stopped.set()
            for child in children:
                child.send_signal(signal.SIGINT)
            raise


def _follow(parent):
    """End this process as Ctrl-C does once its parent is gone, killed perhaps."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _check(path):
    nb = stored.read(path)
    if found := faults(nb):
        raise NotebookError("\n".join(found))
    if path.read_text(encoding="utf-8") != canonical(nb):
        raise NotebookError("is not in canonical form: run `make execute`")


def _run(nb, values, folder, timeout):
    """Return the notebook as far as papermill ran it on a clean kernel, and what stopped it."""
    import papermill  # slow to import, and only runs need it
    from nbclient.exceptions import CellTimeoutError
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, manager, kernel_name, **options):
            ran.append(manager.nb)  # kept, however the run ends
            super().execute_managed_notebook(manager, kernel_name, **options)

    papermill_engines.register("kept", Engine)
    ran, problem, base = [], None, tempfile.gettempdir()  # a socket's path has at most 107 bytes
    base = "/tmp" if len(os.fsencode(base)) > 60 and os.access("/tmp", os.W_OK) else base
    options = dict(kernel_name="python3", language="python", cwd=folder, engine_name="kept")
    options |= dict(progress_bar=False, record_timing=False, store_widget_state=False)
    with (
        tempfile.TemporaryDirectory(prefix="nb-", dir=base, ignore_cleanup_errors=True) as ours,
        open(Path(ours, "log"), "w+b") as log,
    ):
        options |= dict(kernel_manager_class=_kernel(ours, log), execution_timeout=timeout)
        try:
            papermill.execute_notebook(nb, None, values or {}, iopub_timeout=60, **options)
        except papermill.PapermillExecutionError:
            pass  # it is in the outputs
        except CellTimeoutError:
            problem = f" took more than {timeout} s (see --timeout)"
        except KeyboardInterrupt:
            problem = " was interrupted"
        except Exception as error:  # a dead kernel
            log.seek(0)
            words = outputs.last_words(log.read().decode(errors="replace").strip())
            problem = f": {error}; its last words: {words}"
    return _as_it_ran(ran[-1] if ran else nb, problem)


def _as_it_ran(nb, problem):
    """Take papermill's own marks out of a notebook, and say where it stopped, and why."""
    nb.cells = [c for c in nb.cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    started = 0
    for cell in nb.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata["tags"] = [tag for tag in tags if tag != "injected-parameters"]
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        notes = cell.metadata.get("papermill", {})
        started += notes.get("start_time") is not None
        cell.outputs = outputs.joined(cell.outputs)
        failed = notes.get("exception") or any(o.output_type == "error" for o in cell.outputs)
        if failed and "raises-exception" not in tags and not problem:
            problem = f" failed\n{cell.source}\n\n{_told(cell)}"
            return nb, f"code cell {started}{problem}"
    where = f"code cell {started}" if started else "the kernel's start"
    return nb, problem and where + problem


def _kernel(ours, log):
    """Return a class of kernels that are this interpreter, with their files in the folder `ours`.

    What they say outside of cells goes to `log`.
    """
    from jupyter_client import AsyncKernelManager  # slow to import, too
    from jupyter_client.kernelspec import KernelSpec

    class Kernel(AsyncKernelManager):  # over TCP it hangs where there is no network at all
        connection_file = f"{ours}/kernel.json"
        transport = "ipc" if os.name == "posix" and len(os.fsencode(ours)) < 90 else "tcp"
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        )

        async def start_kernel(self, **options):
            options |= dict(env=clean_environment(ours), stdout=log, stderr=log)
            await super().start_kernel(**options)

    return Kernel


def _told(cell):
    """Return why a cell failed, as far as its outputs tell."""
    lines = [line for o in cell.outputs for line in o.get("traceback", [])]
    lines = lines or [o.text for o in cell.outputs if o.get("name") == "stderr"]
    return COLOUR.sub("", "\n".join(lines))[-5000:] or "no traceback"


if __name__ == "__main__":
    for one in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(one) is signal.SIG_DFL:  # nohup ignores the second
            signal.signal(one, signal.default_int_handler)  # kernels are ended as by Ctrl-C
    for name in ("papermill", "traitlets", "asyncio"):  # what goes wrong is told once, and by us
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: notebooks that were not finished are as they were")
