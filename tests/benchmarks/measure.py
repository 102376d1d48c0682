"""How the benchmarks measure: processor time in turns, peak memory, ratios and their bars."""

import ctypes
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path


def cpu_seconds(function):
    """Return the processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def interleaved(functions, rounds, prepare=lambda function: function):
    """Return the times of each function, prepared untimed, in turns after a warm-up."""
    times = {name: [] for name in functions}
    for k in range(rounds + 1):
        for name, function in functions.items():
            seconds = cpu_seconds(prepare(function))
            times[name].extend([seconds] if k else [])
    return times


def holds(what, over, under, bar=None, kind="at least", beside=""):
    """Print the median ratio with its quartiles, and its bar; return whether that holds."""
    low, mid, high = statistics.quantiles([x / y for x, y in zip(over, under, strict=True)])
    kept = bar is None or (mid >= bar if kind == "at least" else mid <= bar)
    told = "" if bar is None else f"; bar: {kind} {bar}, {'holds' if kept else 'MISSED'}"
    print(f"{what}: {mid:.3f} ({low:.3f} to {high:.3f}){told}{beside}", flush=True)
    return kept


def _resident(field):
    """Return VmRSS, memory in use, or VmHWM, its peak, in kB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def peak(function):
    """Return the peak memory of one call, above that of the process before, in kB."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again unseen
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts from here
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def printed(script, *args):
    """Return the number that a benchmark prints in a process of its own."""
    run = subprocess.run([sys.executable, script, *args], capture_output=True, check=True)
    return float(run.stdout)
