"""`make drift`: what the notebooks print and draw under other processors, threads and machines.

    python -m tests.drift NOTEBOOKS [-p NAME VALUE] [--only SETTING] [--jobs N]

Each run goes to ``build/drift/``. Without parameters the stored outputs are the baseline, with
some (a first look) the outputs of the first setting that is run.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path

from helpers import stored

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CACHES = ("TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "JOBLIB_TEMP_FOLDER")
SETTINGS = {  # name: variables of the environment, parameters of notebooks that have them
    "1 thread": (dict.fromkeys(THREADS, "1"), {}),
    "2 threads": (dict.fromkeys(THREADS, "2"), {"threads": 2}),
    "1 worker": ({}, {"workers": 1}),
    "2 workers": ({}, {"workers": 2}),
    "torch: no vectors": ({"ATEN_CPU_CAPABILITY": "default"}, {}),
    "torch: AVX2": ({"ATEN_CPU_CAPABILITY": "avx2"}, {}),
    "MKL: any processor": ({"MKL_CBWR": "COMPATIBLE"}, {}),
    "oneDNN: SSE4.1": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, {}),
    "another hash seed": ({"PYTHONHASHSEED": "12345"}, {}),
    "cold caches": (dict.fromkeys(CACHES), {}),  # a folder of its own each
}


def shown(nb):
    """Return cell id to (printed lines, figures' PNG): what a reader of a notebook sees."""
    found = {}
    for cell in nb.cells:
        lines, figures = [], []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            figures += [data["image/png"]] if "image/png" in data else []
            texts = [output.get("text", ""), output.get("evalue", "")]
            texts += [text for kind, text in data.items() if kind.startswith("text/")]
            lines += "\n".join(filter(None, texts)).splitlines()
        found[cell.id] = lines, figures
    return found


def differences(here, there):
    """Return (cell, line of `here`, line of `there`) that differ, and cells of other figures."""
    lines, figures, nothing = [], [], ([], [])
    for cell in here | there:
        mine, theirs = here.get(cell, nothing), there.get(cell, nothing)
        lines += [(cell, a, b) for a, b in zip_longest(mine[0], theirs[0]) if a != b]
        figures += [cell for a, b in zip_longest(mine[1], theirs[1]) if a != b]
    return lines, figures


def run(path, setting, pairs, timeout):
    """Run a notebook under a setting; return what it shows, or why it failed, as text."""
    variables, wanted = SETTINGS[setting]
    name = f"{path.stem}-{hashlib.sha256(setting.encode()).hexdigest()[:8]}"
    place = Path("build", "drift", name)
    shutil.rmtree(place, ignore_errors=True)
    (place / "notebooks").mkdir(parents=True)
    copy = Path(shutil.copy(path, place / "notebooks"))
    known = stored.parameters(stored.read(path))
    values = dict(pairs) | {k: str(v) for k, v in wanted.items() if k in known}
    command = [sys.executable, "-m", "helpers.execute", str(copy), "--timeout", str(timeout)]
    command += [part for pair in values.items() for part in ("-p", *pair)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as fresh:
        fresh = {k: Path(fresh, k) for k, v in variables.items() if v is None}
        for folder in fresh.values():
            folder.mkdir()
        given = os.environ | {k: v for k, v in variables.items() if v} | fresh
        ran = subprocess.run(command, env=given, capture_output=True, encoding="utf-8")
    if ran.returncode:
        return ran.stderr.strip()
    return shown(stored.read(place / "build" / path.name if values else copy))


def main(argv=None):
    """Print a table of what differs; return 1 if anything does."""
    parser = argparse.ArgumentParser(prog="python -m tests.drift", description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--only", action="append", choices=SETTINGS, help="a setting to run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="notebooks at a time")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for each cell")
    args = parser.parse_args(argv)
    baseline = None if args.p else [shown(stored.read(path)) for path in args.notebooks]
    print("| setting |", *(f"{path.stem} |" for path in args.notebooks))
    print("|---|" + "---|" * len(args.notebooks))
    told, bad = [], 0
    for setting in args.only or SETTINGS:
        todo = partial(run, setting=setting, pairs=args.p, timeout=args.timeout)
        with ThreadPoolExecutor(max(args.jobs, 1)) as pool:
            found = list(pool.map(todo, args.notebooks))
        baseline, entries = baseline or found, []
        for path, here, there in zip(args.notebooks, found, baseline, strict=True):
            if failed := [text for text in (here, there) if isinstance(text, str)]:
                told.append(f"{path.stem}, {setting}: {failed[0]}")
                entries.append("failed")
                bad += 1
                continue
            lines, figures = differences(here, there)
            entries.append(f"{len(lines)} lines, {len(figures)} figures")
            bad += bool(lines or figures)
            where = f"{path.stem}, {setting}, cell"
            told += [f"{where} {c!r}: {a!r}, in the baseline {b!r}" for c, a, b in lines]
            told += [f"{where} {cell!r}: another figure, byte for byte" for cell in figures]
        print(f"| {setting} |", *(f"{entry} |" for entry in entries), flush=True)
    print("", *told, sep="\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
