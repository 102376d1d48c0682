"""Warm processes: a notebook's imports are done once, and each run is a clean copy of the process.

`python -m helpers.warm` serves a `Warm` object: it imports what the notebook imports and forks for
each run. A run meets what was imported and nothing else: no variable, random number, file or
process of another run. Where forking is not safe, a process serves one run and ends.
"""

import ast
import contextlib
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from helpers.execute import PROFILE, clean_environment
from helpers.outputs import last_words, recorded
from helpers.stored import NotebookError

IDLE = 600  # seconds after which a process ends that nobody asks
THREADS = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LOKY_MAX_CPU_COUNT"]
LIVE, MINE = set(), threading.local()  # this process's Warm objects; that of each of its threads


class Warm:
    """A process that runs the same cells again and again, each time as if for the first.

    Parameters
    ----------
    cells : tuple of (str, str, tuple of str)
        Id, source and tags of each code cell.
    fork : bool, default=True
        Whether to fork at all; without, it serves one run.

    Raises
    ------
    RuntimeError
        If the process does not start.
    """

    def __init__(self, cells, *, fork=True):
        self.cells, self.folder = cells, tempfile.TemporaryDirectory(prefix="warm-")
        self.connection, theirs = Pipe()
        self.forks = True  # until the process says otherwise
        clean = clean_environment(self.folder.name) | dict.fromkeys(THREADS, "1")
        with open(Path(self.folder.name, "log"), "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "helpers.warm", str(theirs.fileno())],
                **dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=clean),
                **dict(pass_fds=[theirs.fileno()], start_new_session=True),  # Ctrl-C is ours
            )
        theirs.close()
        LIVE.add(self)
        try:
            self.connection.send((cells, fork))
            self.forks = self.connection.recv()
        except (EOFError, OSError):
            words = self._words()
            self.close()
            raise RuntimeError(f"a process for the runs did not start: {words}") from None

    def run(self, values, folder, timeout):
        """Run the cells once, among files and temporary files of this run's own.

        Parameters
        ----------
        values : dict of str to object
            Parameters to set.
        folder : str
            Where the notebook lives; the run sees what is in it and beside it, but no ``build``.
        timeout : float
            Seconds allowed.

        Returns
        -------
        dict of str to object
            ``status`` ("ok" or "failed"), ``seconds``, ``error`` (one line) and ``recorded``.
        """
        row = left = None
        with tempfile.TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as scratch:
            here = _stage(Path(scratch), Path(folder))
            try:
                os.truncate(Path(self.folder.name, "log"), 0)
                self.connection.send((values, str(here), scratch))
                while left is None:
                    if not self.connection.poll(timeout):
                        row = row or failed(f"took more than {timeout:g} s (see --timeout)")
                        break
                    message = self.connection.recv()
                    row, left = (message, None) if isinstance(message, dict) else (row, message)
            except (EOFError, OSError):  # the process has ended, or was ended
                left = self.process.wait()
            if row is None:
                how = f"died of {signal.Signals(-left).name}" if left < 0 else "ended early"
                row = failed(f"{how}; its last words: {self._words()}")
            if not self.forks or self.process.poll() is not None or left is None:
                self.close()
        return row

    def close(self):
        """End the process and what it runs; whoever waits for it is told."""
        LIVE.discard(self)
        with contextlib.suppress(OSError):
            end = socket.socket(fileno=os.dup(self.connection.fileno()))
            with end:
                end.shutdown(socket.SHUT_RDWR)
            self.connection.close()
        try:
            self.process.wait(10 if self.forks else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what a run without a fork has left
        with contextlib.suppress(OSError):
            self.folder.cleanup()

    def _words(self):
        with contextlib.suppress(OSError):
            return last_words(Path(self.folder.name, "log").read_text(errors="replace").strip())
        return "none"


def failed(error):
    """Return the row of a run that came to nothing.

    Parameters
    ----------
    error : str

    Returns
    -------
    dict of str to object
    """
    line = " ".join(str(error).split())[:300]
    return {"status": "failed", "seconds": None, "error": line, "recorded": {}}


def run_point(cells, folder, timeout, wanted, values):
    """Run cells once in this thread's warm process, whichever machine this is.

    Parameters
    ----------
    cells, folder, timeout
        As of `Warm` and its `run`.
    wanted : str
        The `version` of whoever asks.
    values : dict of str to object
        Parameters to set.

    Returns
    -------
    dict of str to object
        As of `Warm.run`.
    """
    if wanted != version():
        return failed("this machine has other helpers or other versions of what they need")
    warm = getattr(MINE, "warm", None)
    try:
        if warm not in LIVE or warm.cells != cells or warm.process.poll() is not None:
            if warm in LIVE:
                warm.close()
            warm = MINE.warm = Warm(cells)
        return warm.run(values, folder, timeout)
    except (RuntimeError, OSError) as error:
        return failed(f"{type(error).__name__}: {error}")


def stop(cells):
    """End this machine's processes for these cells, at work or not.

    Parameters
    ----------
    cells : tuple
        As of `Warm`.
    """
    for warm in [warm for warm in LIVE if warm.cells == cells]:
        warm.close()


@functools.cache
def version():
    """Return a digest of the helpers' sources and of the versions of what they need.

    Returns
    -------
    str
    """
    needs = importlib.metadata.requires("transfer-peft-notebooks")
    names = sorted(re.match(r"[\w.-]+", line)[0] for line in needs if "extra" not in line)
    versions = [(name, importlib.metadata.version(name)) for name in names]
    told = hashlib.sha256(repr([sys.version_info[:2], *versions]).encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        told.update(path.name.encode() + b"\0" + path.read_bytes())
    return told.hexdigest()


def serve(connection):
    """Import what a notebook imports, then run it as often as asked.

    Parameters
    ----------
    connection : Connection
        To a `Warm` object.
    """
    exec(PROFILE, {})  # what a kernel of `make execute` reads
    cells, fork = connection.recv()
    shell = _shell()
    for name in _imports(source for _, source, _ in cells):
        with contextlib.suppress(Exception, SystemExit):  # a run will tell
            importlib.import_module(name)
    # a copy of a thread's lock may stay locked for ever; macOS forks no process of many libraries
    fork = fork and hasattr(os, "pidfd_open") and threading.active_count() == 1
    connection.send(fork)
    gc.collect()
    gc.freeze()  # else each run would copy what it only counts
    while connection.poll(IDLE):
        order = connection.recv()
        if not fork:
            connection.send(_point(shell, cells, *order))
            connection.send(0)
            return
        if not (child := os.fork()):
            os.setpgid(0, 0)
            connection.send(_point(shell, cells, *order))
            os._exit(0)
        with contextlib.suppress(OSError):  # whoever is first
            os.setpgid(child, child)
        ended = os.pidfd_open(child)
        gone = ended not in wait([ended, connection])  # or whoever asked has hung up
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # and all that it has left behind
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(ended)
        if gone:
            return
        connection.send(status)


def _shell():
    """Return an IPython shell that keeps what is displayed, and nothing of a user's."""
    from IPython.core.displaypub import DisplayPublisher  # slow to import
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Outputs(DisplayPublisher):
        def publish(self, data, metadata=None, **more):
            self.shell.outputs.append({"data": data})

    class Shell(InteractiveShell):
        outputs = []  # noqa: RUF012, one shell a process

        def enable_gui(self, gui=None):
            """Have none."""

        def showtraceback(self, *told, **more):
            """Lose no seconds on colours."""

    quiet = Config({"HistoryManager": {"enabled": False}})  # it would start a thread
    return Shell.instance(config=quiet, display_pub_class=Outputs)


def _imports(sources):
    """Return the names of modules that cells import, in order, with what may be one."""
    from IPython.core.inputtransformer2 import TransformerManager

    found = []
    for source in sources:
        try:
            tree = ast.parse(TransformerManager().transform_cell(source))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return dict.fromkeys(found)


def _point(shell, cells, values, here, scratch):
    """Run the cells in this process, and return what became of them."""
    os.chdir(here)
    sys.path.insert(0, "")
    os.environ["TMPDIR"], tempfile.tempdir = scratch, None
    if "numpy.random" in sys.modules:  # its copies would draw the same where nobody seeds it
        sys.modules["numpy.random"].seed()
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, until the process ends
    start = time.perf_counter()
    for number, (name, source, tags) in enumerate(cells, 1):
        result = shell.run_cell(source, store_history=True)
        error = result.error_before_exec or result.error_in_exec
        if error is not None and "raises-exception" not in tags:
            told = f"{type(error).__name__}: {error}"
            return failed(f"code cell {number} ({name!r}): {told}")
        if "parameters" in tags:
            shell.user_ns.update(values)
    row = {"status": "ok", "seconds": round(time.perf_counter() - start, 3), "error": ""}
    try:
        return row | {"recorded": recorded(shell.outputs)}
    except NotebookError as error:
        return failed(error)


def _stage(scratch, folder):
    """Return a folder named as the notebook's, with links to what is in that and beside it."""
    here = scratch / "root" / (folder.name or "notebooks")
    here.mkdir(parents=True)
    beside = [p for p in folder.parent.glob("*") if p.name not in (folder.name, "build")]
    for path in (*beside, *folder.glob("*")):
        (here if path.parent == folder else here.parent).joinpath(path.name).symlink_to(path)
    return here


if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as asked, contextlib.suppress(EOFError):
        serve(asked)
