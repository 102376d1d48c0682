"""How large `helpers` is, in lines of code: `python -m tests.size` prints the table.

Docstrings, comments and blank lines are not counted.
"""

import ast
from pathlib import Path

HELPERS = Path(__file__).parent.parent / "helpers"


def code_lines(text):
    """Return the numbers of the lines that hold code, and the parsed module."""
    tree, documented = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            documented |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = enumerate(text.splitlines(), 1)
    held = {i for i, s in lines if s.strip() and not s.strip().startswith("#")} - documented
    return held, tree


def modules(folder=HELPERS):
    """Return, by path, the lines of code, all lines, and the longest function with its lines."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        held, tree = code_lines(text)
        functions = {"": 0} | {
            node.name: len(held & {*range(node.lineno, node.end_lineno + 1)})
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
        }
        longest = max(functions, key=functions.get)
        where = path.relative_to(folder).as_posix()
        found[where] = len(held), len(text.splitlines()), longest, functions[longest]
    return found


def totals(found):
    """Return the lines of code outside study/, and of everything."""
    everything = sum(code for code, *_ in found.values())
    return everything - sum(v[0] for p, v in found.items() if p.startswith("study/")), everything


if __name__ == "__main__":
    print(f"{'code':>5s}{'all':>5s}  module, its longest function")
    for path, (code, lines, name, length) in modules().items():
        print(f"{code:5d}{lines:5d}  {path:28s}{f'{name} {length}' if name else ''}")
    print("library {:,}, with studies {:,}".format(*totals(modules())))
