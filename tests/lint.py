"""What a notebook of the series is, and what may stand in it: `python -m tests.lint NOTEBOOKS`.

The stored form (`helpers.stored.faults`) holds for any notebook; these are the house's own rules.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

from helpers import data, stored

CELLS, WORDS, LISTED, LINES, LISTING, WIDTH = 60, 2_500, 150, 15, 15, 110
# Cells from before a limit was set (15 lines, 110 characters); a new one is no addition to them.
LONGER = {"luck", "curve", "domain", "mistake1", "mistake2", "memory", "three", "mistake4"}
LONGER |= {"imports", "mixed", "refusals-run", "budgets", "guide-table"}
WIDER = {"mistake2", "mistake3", "mistake4", "solution4"}
WIDER |= {"prefix", "decide", "heads"}
LINK = re.compile(r"\]\(((?:[^()\s]|\([^()\s]*\))+)")
PATHS = re.compile(
    r"(?<![\w.:/])(?:/(?:home|root|tmp|Users|mnt|opt|usr|var|work)/|[A-Z]:\\)[^\s)'\"]*"
)
DRAWS = re.compile(
    r"\bax\w*(?:\[[^]]*\])?\.(?:plot|scatter|barh?|errorbar|step|hist|fill_between)\("
)
RANGE = re.compile(r"\d.* to (\d|the number of cores)")  # in a parameter's comment
SENTENCE = 5  # words from which on a text is known again


def problems(path):
    """List what is wrong with a notebook, as sentences; none if it is one of the series.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    list of str
    """
    nb = stored.read(path)
    found = [*_of_parameters(nb), *_of_size(nb), *_of_links(Path(path), nb)]
    for cell in nb.cells:
        found += [f"cell {cell.id!r}: {told}" for told in _of_cell(cell)]
    shown = _words("\n".join(text for cell in nb.cells for text in texts(cell)))
    found += [
        f"an output holds the text {text!r} of a data set" for text in known() if text in shown
    ]
    return found


def texts(cell):
    """Return what a cell's outputs say, each as one text."""
    outputs = cell.get("outputs", [])
    said = [o.get("text", "") for o in outputs]
    return said + [t for o in outputs for k, t in o.get("data", {}).items() if k[:5] == "text/"]


@cache
def known():
    """Return the sentences of the data sets, of five words and more, as `_words` has them."""
    found = set()
    for source in (data.headlines, data.articles, data.documentation):
        for text in source().texts:
            found |= {_words(sentence) for sentence in re.split(r"(?<=[.!?])\s+", text)}
    return sorted(text for text in found if text.count(" ") >= SENTENCE + 1)  # one at either end


def _words(text):
    found = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(found)} "


def _of_parameters(nb):
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    if len(code) < 3 or "parameters" not in code[1].metadata.get("tags", []):
        yield "the second code cell is not the one tagged 'parameters'"
    elif "get_num_threads() ==" not in code[2].source:
        yield f"cell {code[2].id!r}: threads are not asserted behind the parameters"
    for name, (value, meaning) in stored.parameters(nb).items():
        if not meaning or not (isinstance(value, str) or RANGE.search(meaning)):
            yield f"parameter {name}: its comment {meaning!r} names no range, such as '1 to 9'"


def _of_size(nb):
    words = sum(len(c.source.split()) for c in nb.cells if c.cell_type == "markdown")
    listed = sum(len(lines) for c in nb.cells for lines, _ in listings(c))
    for n, most, what in (
        (len(nb.cells), CELLS, "cells"),
        (words, WORDS, "words"),
        (listed, LISTED, "listed lines"),
    ):
        if n > most:
            yield f"{n:,} {what}, {most:,} at most"
    defining = 0
    for cell in nb.cells:
        if cell.cell_type == "code" and not cell.metadata.get("tags"):
            body = ast.parse(re.sub(r"(?m)^%.*", "", cell.source)).body
            defining += any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in body)
    if defining > 3:
        yield f"{defining} cells define functions or classes, 3 at most: helpers hold the rest"


def listings(cell):
    """Yield (lines that are not blank, whether it is folded) of each listing in the outputs."""
    for text in texts(cell):
        hidden = cell.metadata.get("jupyter", {}).get("outputs_hidden", False)
        for listing in re.findall(r"```python\n(.*?)\n```", text, re.S):
            lines = [line for line in listing.splitlines() if line.strip()]
            yield lines, hidden or "<details" in text


def _of_cell(cell):
    if trace := PATHS.search("\n".join([cell.source, *texts(cell)])):
        yield f"{trace[0]!r} is a path of one machine"
    if cell.cell_type != "code":
        return
    lines, tags = [x for x in cell.source.splitlines() if x.strip()], cell.metadata.get("tags", [])
    if len(lines) > (18 if cell.id in LONGER else LINES) and not tags:
        yield f"{len(lines)} lines, {LINES} at most"
    if "solution" in tags and not cell.metadata.get("jupyter", {}).get("source_hidden"):
        yield "a solution that is not folded"
    printed = [line for o in cell.outputs for line in o.get("text", "").splitlines()]
    wide = max(map(len, printed), default=0)
    if wide > WIDTH and cell.id not in WIDER:
        yield f"prints a line of {wide} characters, {WIDTH} at most"
    for lines, folded in listings(cell):
        if len(lines) > LISTING and not folded:
            yield f"a listing of {len(lines)} lines is not folded"
    if DRAWS.search(cell.source) and not re.search(
        r"xlabel.*ylabel|ylabel.*xlabel", cell.source, re.S
    ):
        yield "draws on axes that it gives no xlabel and ylabel"


def anchors(nb):
    """Return what can stand behind # in a link to a notebook: JupyterLab's names of headings."""
    found = set()
    for cell in (c for c in nb.cells if c.cell_type == "markdown"):
        prose = re.sub(r"(?ms)^```.*?^```", "", cell.source)
        found |= {t.strip().replace(" ", "-") for t in re.findall(r"(?m)^#+ (.*)$", prose)}
        found |= set(re.findall(r'\b(?:id|name)="([^"]+)"', prose))
    return found


def _of_links(path, nb):
    for cell in (c for c in nb.cells if c.cell_type == "markdown"):
        for link in LINK.findall(cell.source):
            name, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):  # elsewhere: nobody asks a network
                continue
            other = path.parent / name if name else path
            if not other.exists():
                yield f"cell {cell.id!r}: the link {link!r} leads to no file"
            elif anchor and other.suffix == ".ipynb":
                there = anchors(nb if other == path else stored.read(other))
                if anchor not in there:
                    yield f"cell {cell.id!r}: the link {link!r} leads to no heading"


def main(paths):
    """Print what is wrong with notebooks; return 1 if anything is."""
    found = [f"{path}: {told}" for path in paths for told in problems(path)]
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
