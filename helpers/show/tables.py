"""Source code and tables as notebook outputs."""

import ast
import inspect
from pathlib import Path

import nbformat
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


def show_stored(name, cell, *, folder=NOTEBOOKS):
    """Display the tables that a cell of another notebook has stored.

    Parameters
    ----------
    name : str
        Of the notebook's file.
    cell : str
        Id of the cell.
    folder : Path, default=NOTEBOOKS
        This project's ``notebooks/``.

    Raises
    ------
    ValueError
        If the notebook or the table is missing.
    """
    path = folder / name
    cells = nbformat.read(path, as_version=4).cells if path.exists() else []
    outputs = [o for c in cells if c.id == cell for o in c.get("outputs", [])]
    tables = [o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
    if not tables:
        raise ValueError(f"{name} has no table in a cell {cell!r}: store it with `make execute`")
    display(Markdown("\n\n".join(tables)))
