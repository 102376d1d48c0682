"""Notebooks as files: what may be set in one, its canonical form, and what is wrong with it."""

import ast
import base64
import copy
import io
import json
import re
import tokenize
import warnings
from pathlib import Path

import nbformat
from nbformat.validator import iter_validate

from helpers.outputs import NotebookError

TAGS = {"parameters", "raises-exception", "solution"}
OF_A_RUN = {"execution", "papermill", "ExecuteTime"}  # metadata of cells that runs write
LARGEST = 10_000_000  # characters of one cell's outputs
TRACES = re.compile(r"/(?:home|root|tmp|Users)/\S+|\b0x[0-9a-f]{6,}\b")  # of one machine
WIDGET = "application/vnd.jupyter.widget-view+json"  # names a model by a random number
PRINTING = {"print", "display", "record", "show_source", "show_table"}
PERHAPS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda  # may not run
PERHAPS |= ast.If | ast.IfExp | ast.While | ast.ExceptHandler | ast.BoolOp


def read(path):
    """Read a notebook of format 4; cells of before format 4.5 get ids.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    NotebookNode

    Raises
    ------
    NotebookError
        If the file cannot be read, is no notebook or is one of another format.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise NotebookError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise NotebookError(f"is no notebook, which is JSON in UTF-8: {error}") from None
    version = raw.get("nbformat") if isinstance(raw, dict) else None
    if version != 4 or type(raw.get("nbformat_minor")) is not int:
        raise NotebookError(
            f"is no notebook of format 4 ('nbformat' is {version}), to which JupyterLab converts"
            " an older one when it saves it"
        )
    cells = raw.get("cells")
    for number, cell in enumerate(cells if isinstance(cells, list) else []):
        if isinstance(cell, dict):
            cell.setdefault("id", f"cell-{number}")
    for error in iter_validate(raw, relax_add_props=True):
        place = "".join(f"[{step!r}]" for step in error.relative_path)
        raise NotebookError(f"is no sound notebook: at {place or 'the top'}, {error.message[:200]}")
    nb = nbformat.v4.to_notebook(raw)
    nb.nbformat_minor = max(nb.nbformat_minor, 5)
    return nb


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
        If several cells carry the tag, an assignment is not ``name = literal``, or a run has left
        a cell of its own.
    """
    tags = [tag for cell in nb.cells for tag in cell.metadata.get("tags", [])]
    if "injected-parameters" in tags:
        raise NotebookError("holds a cell of injected parameters from an earlier run: delete it")
    tagged = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) > 1:
        raise NotebookError(f"{len(tagged)} cells are tagged 'parameters', expected one")
    source = tagged[0].source if tagged else ""
    try:
        body = _parsed(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError) as error:
        raise NotebookError(f"the cell tagged 'parameters' is no plain Python: {error}") from None
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in body:
        try:
            (target,) = node.targets
            found[target.id] = ast.literal_eval(node.value), comments.get(node.end_lineno, "")
        except (AttributeError, ValueError, TypeError) as error:
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
        If a name is unknown (code could be hidden in it) or a text has another type.
    """
    known, values = parameters(nb) if pairs else {}, {}
    for name, text in pairs:
        if name not in known:
            told = f"known are {', '.join(known)}" if known else "no cell is tagged 'parameters'"
            raise NotebookError(f"unknown parameter {name!r}; {told}")
        kind = type(known[name][0])
        try:
            value = kind(text) if kind in (str, float) else ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = None
        if type(value) is not kind:
            raise NotebookError(
                f"parameter {name} = {text!r} is not of type {kind.__name__}, as its default"
                f" {known[name][0]!r} is"
            )
        values[name] = value
    return values


def settable(value):
    """Tell whether papermill writes a value into a notebook as it is: it makes text of others.

    Parameters
    ----------
    value : object

    Returns
    -------
    bool
        Of text, numbers, truth values, None, lists of them, and dicts with texts for keys.
    """
    if isinstance(value, dict):
        return all(isinstance(k, str) and settable(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(settable, value))
    return value is None or isinstance(value, str | int | float)


def stop_after(nb, until):
    """Leave out the cells after one.

    Parameters
    ----------
    nb : NotebookNode
        Changed in place.
    until : str or None
        Id of the last cell; None is the notebook's.

    Raises
    ------
    NotebookError
        If there is no such cell.
    """
    if until is None:
        return
    ids = [cell.id for cell in nb.cells]
    if until not in ids:
        raise NotebookError(f"has no cell {until!r} to stop after; there are {', '.join(ids)}")
    nb.cells = nb.cells[: ids.index(until) + 1]


def canonical(nb):
    """Return the text of a notebook with nothing in it that differs from run to run.

    Cells that ran are counted 1..n. All else is kept, but for what a run writes and no author:
    times, papermill's notes, widgets, the kernel's name and version.

    Parameters
    ----------
    nb : NotebookNode

    Returns
    -------
    str
    """
    nb, count = copy.deepcopy(nb), 0
    for cell in nb.cells:
        for name in OF_A_RUN & set(cell.metadata):
            del cell.metadata[name]
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if "solution" in cell.metadata.get("tags", []):  # folded by JupyterLab, Notebook, VS Code
            folded = {"outputs_hidden": True, "source_hidden": True}
            cell.metadata["jupyter"] = cell.metadata.get("jupyter", {}) | folded
        if cell.cell_type == "code":
            ran = bool(cell.source.strip()) and cell.execution_count is not None
            count += ran
            cell.execution_count = count if ran else None
            cell.outputs = cell.outputs if cell.source.strip() else []
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)
                if "execution_count" in output:
                    output.execution_count = count
    for name in {"papermill", "widgets"} & set(nb.metadata):
        del nb.metadata[name]
    nb.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata.language_info = {"name": "python"}
    return nbformat.v4.writes(nb) + "\n"


def faults(nb):
    """List what is wrong with a notebook's stored outputs, as sentences; none if it is sound.

    Each code cell that is not empty has run, in order, without error or stderr; what prints or
    draws has its output, and no figure is blank; tags are known, and nothing tells of one machine.

    Parameters
    ----------
    nb : NotebookNode

    Returns
    -------
    list of str
    """
    found, number = markers(nb), 0
    for cell in nb.cells:
        if cell.cell_type == "code" and cell.source.strip():
            number += 1
            where = f"code cell {number} ({cell.id!r})"
            if cell.execution_count != number:
                found.append(f"{where}: execution count {cell.execution_count}, expected {number}")
            found += [f"{where}: {fault}" for fault in _of_outputs(cell)]
    return found


def markers(nb):
    """List what is wrong with a notebook before it runs: unknown tags, checks switched off.

    Parameters
    ----------
    nb : NotebookNode

    Returns
    -------
    list of str
    """
    found = []
    for cell in nb.cells:
        for tag in sorted(set(cell.metadata.get("tags", [])) - TAGS):
            found.append(f"cell {cell.id!r}: unknown tag {tag!r}, known are {sorted(TAGS)}")
        if cell.cell_type == "code" and "NBVAL_" in cell.source:
            found.append(f"cell {cell.id!r}: an NBVAL marker switches its check off")
    return found


def _of_outputs(cell):
    """Yield what is wrong with the outputs of a code cell that is not empty."""
    size = len(json.dumps(cell.outputs, ensure_ascii=False))
    if size > LARGEST:
        yield f"holds {size:,} characters of output, {LARGEST:,} at most: print less"
        return
    kinds = {o.get("name", o.output_type) for o in cell.outputs}
    if "error" in kinds and "raises-exception" not in cell.metadata.get("tags", []):
        yield "stored output is an error"
    if "stderr" in kinds:
        text = "".join(o.text for o in cell.outputs if o.get("name") == "stderr").strip()
        yield f"wrote to stderr: {text.splitlines()[-1][:300] if text else ''}"
    prints, draws = _expected(cell.source)
    if prints and not cell.outputs:
        yield "prints, but no output is stored"
    data = [o.data for o in cell.outputs if "data" in o]
    pictures = [d["image/png"] for d in data if "image/png" in d]
    if len(pictures) < draws:
        yield "draws, but no figure is stored"
    if any(_blank(p) for p in pictures):
        yield "a stored figure is blank, or no picture"
    texts = [o.get("text", "") for o in cell.outputs]
    texts += [text for d in data for kind, text in d.items() if kind.startswith("text/")]
    if trace := TRACES.search("\n".join(texts)):
        yield f"output holds {trace[0][:200]!r}, a path or address of one machine"


def _parsed(source):
    """Return the statements of a source; what Python says about its style is not told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source).body


def _expected(source):
    """Whether a cell prints or shows its last line, and how often it draws, on every way through.

    Magics and ``!`` and ``?`` lines are read as IPython reads them; of a cell that is no Python
    even then, nothing is expected.
    """
    from IPython.core.displayhook import DisplayHook  # slow to import
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        source = TransformerManager().transform_cell(source)
        body = _parsed(source)
        silent = DisplayHook.semicolon_at_end_of_expression(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return False, 0
    last = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    shown = last and not silent and not isinstance(last, ast.Call | ast.Await)
    calls, todo = [], list(body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Call):
            calls.append(ast.unparse(node.func))
        todo += [] if isinstance(node, PERHAPS) else ast.iter_child_nodes(node)
    prints = bool(PRINTING & set(calls)) or bool(shown and getattr(last, "value", 0) is not None)
    return prints, calls.count("plt.show")


def _blank(png):
    from PIL import Image  # not matplotlib's reader, which would read a user's matplotlibrc

    try:
        with Image.open(io.BytesIO(base64.b64decode(png))) as image:
            bands = image.getextrema() if len(image.getbands()) > 1 else [image.getextrema()]
    except Exception:  # whatever Pillow says of bytes that are no picture
        return True
    return all(low == high for low, high in bands)
