"""Headless runs: `python -m helpers.execute NOTEBOOKS`, the command behind `make execute`."""

import argparse
import ast
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

from helpers import files

TAGS = {"parameters", "raises-exception", "solution"}
TRACES = re.compile(r"/(?:home|root|tmp|Users)/\S+|\b0x[0-9a-f]{6,}\b")  # of one machine
DRAWS = re.compile(r"\bplt\.show\(")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(Exception):
    """A notebook, or a request about one, that cannot be accepted; the message says why."""


def parameters(nb):
    """List what can be set from outside: the assignments of the cell tagged ``parameters``.

    Parameters
    ----------
    nb : NotebookNode

    Returns
    -------
    dict of str to tuple of (default, str)
        Name to default value and meaning, the comment behind the assignment.

    Raises
    ------
    NotebookError
        If several cells carry the tag, or an assignment is not ``name = literal``.
    """
    tagged = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) > 1:
        raise NotebookError(f"{len(tagged)} cells are tagged 'parameters', expected one")
    source = tagged[0].source if tagged else ""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body:
        try:
            (target,) = node.targets
            found[target.id] = ast.literal_eval(node.value), comments.get(node.end_lineno, "")
        except (AttributeError, ValueError) as error:
            line = source.splitlines()[node.lineno - 1]
            raise NotebookError(f"parameter line {line!r} is not 'name = literal'") from error
    return found


def parse_parameters(nb, pairs):
    """Turn the texts of ``-p name value`` into values of their defaults' types.

    Parameters
    ----------
    nb : NotebookNode
    pairs : list of (name, text)

    Returns
    -------
    dict of str to object

    Raises
    ------
    NotebookError
        If a name is unknown (papermill would run code hidden in it) or a text has another type.
    """
    known, values = parameters(nb), {}
    for name, text in pairs:
        if name not in known:
            raise NotebookError(f"unknown parameter {name!r}; known are {', '.join(known)}")
        kind = type(known[name][0])
        try:
            value = text if kind is str else ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            value = None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise NotebookError(
                f"parameter {name} = {text!r} is not of type {kind.__name__}, as its default"
                f" {known[name][0]!r} is"
            )
        values[name] = value
    return values


def canonical(nb):
    """Return the text of a notebook with nothing in it that differs from run to run.

    Execution counts are 1..n, cells keep their ids, sources, outputs and tags, and the only
    metadata is the kernel's name.

    Parameters
    ----------
    nb : NotebookNode

    Returns
    -------
    str
    """
    cells, count = [], 0
    for cell in nb.cells:
        kept = {k: cell[k] for k in ("cell_type", "id", "source")}
        tags = cell.metadata.get("tags")
        kept["metadata"] = {"tags": tags} if tags else {}
        if tags and "solution" in tags:  # folded by JupyterLab, Notebook and VS Code
            kept["metadata"]["jupyter"] = {"outputs_hidden": True, "source_hidden": True}
        if cell.cell_type == "code":
            count += 1
            kept |= {"execution_count": count, "outputs": []}
            for output in cell.outputs:
                output = nbformat.from_dict(output)
                if "execution_count" in output:
                    output.execution_count = count
                if "metadata" in output:
                    output.metadata = {}
                kept["outputs"].append(output)
        cells.append(kept)
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernelspec, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return nbformat.writes(nbformat.from_dict(whole)) + "\n"


def faults(nb):
    """List what is wrong with a notebook's stored outputs, as sentences; none if it is sound.

    Each code cell has run, in order, without error or stderr; what prints or draws has its
    output, and no figure is blank; tags are known, and nothing tells of one machine.

    Parameters
    ----------
    nb : NotebookNode

    Returns
    -------
    list of str
    """
    found = []
    code = [c for c in nb.cells if c.cell_type == "code"]
    for cell in nb.cells:
        for tag in set(cell.metadata.get("tags", [])) - TAGS:
            found.append(f"cell {cell.id!r}: unknown tag {tag!r}, known are {sorted(TAGS)}")
    for number, cell in enumerate(code, 1):
        where = f"code cell {number} ({cell.id!r})"
        if cell.execution_count != number:
            found.append(f"{where}: execution count {cell.execution_count}, expected {number}")
        if "NBVAL_" in cell.source:
            found.append(f"{where}: an NBVAL marker switches its check off")
        kinds = {o.get("name", o.output_type) for o in cell.outputs}
        if "error" in kinds and "raises-exception" not in cell.metadata.get("tags", []):
            found.append(f"{where}: stored output is an error")
        if "stderr" in kinds:
            text = "".join(o.text for o in cell.outputs if o.get("name") == "stderr").strip()
            found.append(f"{where}: wrote to stderr: {text.splitlines()[-1] if text else ''}")
        if _prints(cell.source) and not cell.outputs:
            found.append(f"{where}: prints, but no output is stored")
        data = [o.data for o in cell.outputs if "data" in o]
        pictures = [d["image/png"] for d in data if "image/png" in d]
        if len(pictures) < len(DRAWS.findall(cell.source)):
            found.append(f"{where}: draws, but no figure is stored")
        if any(_blank(p) for p in pictures):
            found.append(f"{where}: a stored figure is blank")
        texts = [o.get("text", "") for o in cell.outputs]
        texts += [text for d in data for kind, text in d.items() if kind.startswith("text/")]
        if trace := TRACES.search("\n".join(texts)):
            found.append(f"{where}: output holds {trace[0]!r}, a path or address of one machine")
    return found


def execute(path, values=None, *, timeout=600):
    """Run a notebook from top to bottom on a clean kernel and store it in canonical form.

    The file is replaced in one step after the whole run was found sound, so that a crash at any
    moment leaves it as it was. A run with `values` is stored under ``build/`` beside the
    notebook's folder instead.

    Parameters
    ----------
    path : Path
    values : dict of str to object, optional
        Parameters to set.
    timeout : int, default=600
        Seconds allowed to each cell.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    NotebookError
        If a cell fails or the outputs have faults; nothing is written then.
    """
    import papermill  # slow to import, and only runs need it
    from jupyter_client import AsyncKernelManager

    nb = nbformat.read(path, as_version=4)
    if any("injected-parameters" in c.metadata.get("tags", []) for c in nb.cells):
        raise NotebookError("holds a cell of injected parameters from an earlier run: delete it")
    folder = path.resolve().parent
    target = (folder.parent / "build" / path.name) if values else path
    with tempfile.TemporaryDirectory(prefix="nb-") as sockets:

        class Kernel(AsyncKernelManager):  # over TCP it hangs where there is no network at all
            transport = "ipc" if os.name == "posix" else "tcp"
            ip = f"{sockets}/kernel" if os.name == "posix" else "127.0.0.1"

        try:
            nb = papermill.execute_notebook(
                nb,
                None,
                values or {},
                kernel_name="python3",
                language="python",
                cwd=folder,
                progress_bar=False,
                request_save_on_cell_execute=False,
                execution_timeout=timeout,
                kernel_manager_class=Kernel,
                coalesce_streams=True,
                record_timing=False,
                store_widget_state=False,
            )
        except papermill.PapermillExecutionError as error:
            trace = COLOUR.sub("", "\n".join(error.traceback)) or "no traceback: an unknown magic?"
            raise NotebookError(
                f"code cell {error.exec_count} failed\n{error.source}\n\n{trace}"
            ) from None
        except Exception as error:  # a dead kernel, a timeout
            raise NotebookError(f"{type(error).__name__}: {error}") from error
    for cell in nb.cells:
        tags = set(cell.metadata.get("tags", [])) - {"injected-parameters"}
        cell.metadata["tags"] = sorted(tags)
    if found := faults(nb):
        raise NotebookError("\n".join(found))
    target.parent.mkdir(exist_ok=True)
    files.write(target, canonical(nb).encode())
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
    parser = argparse.ArgumentParser(prog="python -m helpers.execute", description=__doc__)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="notebooks at a time")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for each cell")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="stored form only, nothing is run")
    mode.add_argument("--parameters", action="store_true", help="list what -p can set")
    args = parser.parse_args(argv)

    values = {}
    for path in args.notebooks:
        try:
            nb = nbformat.read(path, as_version=4)
            values[path] = parse_parameters(nb, args.p)
            if args.parameters:
                for name, (default, meaning) in parameters(nb).items():
                    print(f"{name:20s} {type(default).__name__:6s} {default!r:12} {meaning}")
        except (OSError, NotebookError, nbformat.reader.NotJSONError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
    if args.parameters:
        return 0
    if len(args.notebooks) > 1 and not args.check:
        shared = [a for pair in args.p for a in ("-p", *pair)] + ["--timeout", str(args.timeout)]
        command = [sys.executable, "-m", "helpers.execute", *shared]
        with ThreadPoolExecutor(max(args.jobs, 1)) as pool:
            runs = [pool.submit(subprocess.run, [*command, str(p)]) for p in args.notebooks]
        return max(run.result().returncode for run in runs)
    failed = 0
    for path, parsed in values.items():
        try:
            if args.check:
                nb = nbformat.read(path, as_version=4)
                if found := faults(nb):
                    raise NotebookError("\n".join(found))
                if path.read_text(encoding="utf-8") != canonical(nb):
                    raise NotebookError("is not in canonical form: run `make execute`")
                print(f"{path}: sound")
            else:
                target = execute(path, parsed, timeout=args.timeout)
                print(f"{path}: ran, stored as {os.path.relpath(target)}")
        except NotebookError as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = 1
    return failed


def _prints(source):
    """Whether a cell's top level prints, displays, or ends in an expression that is shown."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    body = ast.parse("\n".join(lines)).body
    for node in body:
        for call in ast.walk(node) if not isinstance(node, ast.FunctionDef | ast.ClassDef) else ():
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in (
                "print",
                "display",
                "show_source",
                "show_table",
            ):
                return True
    shown = body and isinstance(body[-1], ast.Expr) and not isinstance(body[-1].value, ast.Call)
    return bool(shown) and not source.rstrip().endswith(";")


def _blank(png):
    from matplotlib.image import imread

    pixels = imread(io.BytesIO(base64.b64decode(png)))
    return bool((pixels == pixels[0, 0]).all())


if __name__ == "__main__":
    sys.exit(main())
