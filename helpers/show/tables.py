"""Source code and tables as notebook outputs."""

import ast
import inspect
import json
import re
from pathlib import Path

from IPython.display import Markdown, display

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def show_source(*functions):
    """Display the source of functions as a notebook output, without their docstrings.

    Parameters
    ----------
    *functions : callable or class
    """
    for function in functions:
        source = inspect.getsource(function)
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                doc = node.body[0]
                lines[doc.lineno - 1 : doc.end_lineno] = [None] * (doc.end_lineno - doc.lineno + 1)
        code = "\n".join(line for line in lines if line is not None)
        display(Markdown(f"```python\n{code}\n```"))


def show_table(header, rows):
    """Display a table as a notebook output.

    Parameters
    ----------
    header : sequence of str
    rows : sequence of sequence
        One cell for each column.
    """
    lines = [header, ["---"] * len(header), *rows]
    display(Markdown("\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)))


def show_verdicts(header, found):
    """Display comparisons: in each row a name, the difference with its interval, the verdict.

    Parameters
    ----------
    header : str
        What is compared with what.
    found : dict of str to helpers.study.Comparison
    """
    rows = [[name, c.numbers, c.verdict] for name, c in found.items()]
    show_table([header, "points", "verdict"], rows)


def read_table(name, cell, *, folder=NOTEBOOKS):
    """Return the tables that a cell of a stored notebook shows: the series' guide is made of them.

    Parameters
    ----------
    name : str
        Of the notebook's file.
    cell : str
        Id of the cell.
    folder : Path, default=NOTEBOOKS
        This project's ``notebooks/``.

    Returns
    -------
    list of dict of (str, str) to str
        For each table, what stands in a row, by its first cell, and a column, by its head.

    Raises
    ------
    ValueError
        If the notebook or the table is missing.
    """
    path, tables = folder / name, []
    cells = json.loads(path.read_text("utf-8"))["cells"] if path.exists() else []
    for output in (o for c in cells if c["id"] == cell for o in c.get("outputs", [])):
        text = "".join(output.get("data", {}).get("text/markdown", ""))
        lines = [line[1:-1].split("|") for line in text.splitlines() if line[:1] == "|"]
        if lines:
            head, _, *rows = [[cell.strip() for cell in line] for line in lines]
            tables.append({(row[0], h): v for row in rows for h, v in zip(head, row, strict=True)})
    if not tables:
        raise ValueError(f"{name} has no table in a cell {cell!r}: store it with `make execute`")
    return tables


def read_gain(text):
    """Return the difference and the ends of its interval that a table's cell tells.

    Parameters
    ----------
    text : str
        Such as ``+2.8 [+0.7, +5.1] ▲``.

    Returns
    -------
    tuple of (float, float, float)

    Raises
    ------
    ValueError
        If it tells none.
    """
    if not (found := re.match(r"([+-]\S+) \[([+-]\S+), ([+-]\S+)\]", text)):
        raise ValueError(f"{text!r} is no difference with its interval, as +2.8 [+0.7, +5.1]")
    return tuple(map(float, found.groups()))
