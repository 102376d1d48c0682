"""A real Dask for tests: a scheduler and workers as users start them, which a test may kill."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


class Cluster:
    """A scheduler's address and its workers' processes, with so many threads each."""

    def __init__(self, folder, *, threads):
        self.folder, self.processes = folder, []
        self.scheduler = self._start("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
        self.workers = [
            self._start("dask_worker", "--no-nanny", "--nthreads", str(n), "--name", str(i))
            for i, n in enumerate(threads)
        ]
        told = folder / "scheduler.json"
        while not (told.exists() and told.stat().st_size) and self.scheduler.poll() is None:
            time.sleep(0.1)
        self.address = json.loads(told.read_text(encoding="utf-8"))["address"]

    def _start(self, command, *options):
        places = ["--scheduler-file", str(self.folder / "scheduler.json"), "--no-dashboard"]
        places += ["--local-directory", str(self.folder)] if command == "dask_worker" else []
        log = open(self.folder / f"log-{len(self.processes)}", "wb")  # noqa: SIM115, closed below
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{command}", *places, *options],
            **dict(cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)}),
        )
        log.close()
        self.processes.append(process)
        return process

    def kill(self, worker):
        """Let a worker die at once, as of no memory."""
        self.workers[worker].send_signal(signal.SIGKILL)
        self.workers[worker].wait()

    def close(self):
        """End all processes that this one has started."""
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def drawn(seed):
    """Draw with pauses, in which another thread of the process could draw."""
    values = []
    for _ in range(5):
        values.append(torch.rand(1).item())
        time.sleep(0.01)
    return {"sum": sum(values), "pid": os.getpid()}


class Dies:
    """Draw, but end the process of one seed, if there is a flag only where that is not there."""

    def __init__(self, seed, flag=None):
        self.seed, self.flag = seed, flag

    def __call__(self, seed):
        """Return what `drawn` does, if at all."""
        if seed == self.seed and not (self.flag and Path(self.flag).exists()):
            if self.flag:
                Path(self.flag).touch()
            os._exit(1)
        return drawn(seed)
