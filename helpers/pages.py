"""Pages to read offline: `python -m helpers.pages README.md NOTEBOOKS`, behind `make html`.

nbconvert renders the stored notebooks by the template in ``show/html``. What it leaves to Jupyter
or to a network is done here: mathematics, links between notebooks, contents, what is folded.
"""

import argparse
import os
import re
import sys
from functools import partial
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from helpers import files, stored
from helpers.stored import NotebookError

TEMPLATES = Path(__file__).parent / "show"
LISTING = 15  # lines of a library's source; a longer one is folded
APART = ["a", "code", "h1", "h2", "math"]  # and what has one of these classes is no running text
CODE = ["highlight", "references"]
SECTION = re.compile(r"(?<![\w.+-])[1-9]\.\d{1,2}(?![\w.]*\d|\s?%)")
REFERENCE = re.compile(r"(?:[A-Z]\. )?([^,;(]+ (?:19|20)\d\d)\b")  # begins with names and a year
NUMBER = r"[+−-]?\d[\d.,]*(?:e-?\d+)?(?:–\d[\d.,]*)?"
# a number with its unit and its interval, which stay on one line
WHOLE = re.compile(rf"{NUMBER}(?: (?:%|[kMG]B\b|[mb]illion\b))?(?: ?\[{NUMBER}, {NUMBER}\])?")


def build(readme, notebooks, folder):
    """Render notebooks, and an index of them, as pages that need no network.

    Parameters
    ----------
    readme : Path
        What it says before its first picture opens the index.
    notebooks : list of Path
        Of one folder, in the order of reading.
    folder : Path
        Replaced as a whole, and only if every page could be made.

    Returns
    -------
    list of str
        Sentences on figures that have no alternative text of their own.

    Raises
    ------
    NotebookError
        If a notebook cannot be read or a formula cannot be drawn.
    OSError
        If the folder cannot be written.
    """
    books = {path: _naming(path, stored.read, path) for path in notebooks}
    books = {notebooks[0].with_name("index"): _index(readme, books)} | books
    missing = [told for path, nb in books.items() for told in _prepare(path, nb)]
    titles = [nb.cells[0].source.partition("\n")[0].lstrip("# ") for nb in books.values()]
    links = [
        (f"{p.stem}.html", t, t.rpartition("— ")[2]) for p, t in zip(books, titles, strict=True)
    ]
    links[0] = (*links[0][:2], "Index")
    soups = {}
    for at, (path, nb) in enumerate(books.items()):
        turn = {"before": links[max(at - 1, 0) : at], "after": links[at + 1 : at + 2]}
        around = {"links": links, "at": at, "turn": turn}
        soups[links[at][0]] = _naming(path, _render, path, nb, around)
    files.replace_folder(folder, partial(_write, soups))
    return missing


def _naming(path, function, *args):
    """Call a function; a refusal names the file."""
    try:
        return function(*args)
    except NotebookError as error:
        raise NotebookError(f"{path}: {error}") from None


def _index(readme, books):
    """Return a notebook of what the README says first, and of each notebook's first cell."""
    texts = [readme.read_text(encoding="utf-8").partition("![")[0]]
    for path, nb in books.items():
        title, _, text = nb.cells[0].source.partition("\n")
        text = re.sub(r"^\*\*.*", "", text).replace("](#", f"]({path.name}#")
        texts.append(f"## [{title.lstrip('# ')}]({path.name})\n{text}")
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(t) for t in texts])


def _prepare(path, nb):
    """Set what the template reads; yield a sentence on each figure that has no text of its own."""
    solutions, heads = 0, [path.stem]
    for cell in nb.cells:
        kept, tags = cell.metadata, set(cell.metadata.get("tags", []))
        heads += re.findall(r"^#+ (.*)", cell.source, re.M) if cell.cell_type == "markdown" else []
        solutions += "solution" in tags
        kept.folded = bool(kept.get("jupyter", {}).get("source_hidden"))
        kept.whole = bool(kept.get("jupyter", {}).get("outputs_hidden"))
        kept.label = f"Solution {solutions}" if "solution" in tags else "Parameters"
        if not tags & {"solution", "parameters"}:
            kept.label = "Set-up" if kept.folded else "Code"
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata.setdefault("alt", kept.get("alt", f"Figure: {heads[-1]}"))
                if output.metadata.alt.startswith("Figure: "):
                    yield f"{path}: cell {cell.id!r} draws, and its metadata hold no 'alt'"


class _Renderer(IPythonRenderer):
    """Markdown as HTML that needs neither Jupyter nor a script."""

    def inline_math(self, body, display="inline"):
        found = convert(body, display=display)
        if unknown := re.search(r"\\\w*", found):
            raise NotebookError(f"{unknown[0]} in ${body}$ cannot be drawn: write it otherwise")
        return found.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")

    def block_math(self, body):
        return self.inline_math(body, "block")

    def link(self, text, url, title=None):
        return super().link(text, re.sub(r"^([^/:]+)\.ipynb(?=#|$)", r"\1.html", url), title)


def _render(path, nb, around):
    """Return a page as nbconvert makes it, pictures and style inside."""

    @pass_context
    def markdown(context, source):
        options = {"attachments": context.get("cell", {}).get("attachments", {})}
        renderer = _Renderer(escape=False, embed_images=True, path=str(path.parent), **options)
        return MarkdownWithMath(renderer=renderer).render(source)

    exporter = HTMLExporter(template_name="html", extra_template_basedirs=[str(TEMPLATES)])
    exporter.register_filter("markdown2html", markdown)
    return BeautifulSoup(exporter.from_notebook_node(nb, around)[0], "html.parser")


def _write(soups, folder):
    """Write pages, when all are there: a section may be in another page than its mention."""
    sections = {
        found[0]: f"{href}#{head['id']}"
        for href, soup in soups.items()
        for head in soup.select("h2[id]")
        if (found := SECTION.match(head.text))
    }
    for href, soup in soups.items():
        _finish(soup, {name: link.removeprefix(href) for name, link in sections.items()})
        (folder / href).write_text(str(soup), encoding="utf-8")


def _finish(soup, links):
    """Fill the contents, fold listings, link sections and references, keep numbers whole."""
    for head in soup.select("h2[id]"):
        head.a["aria-label"] = "Link to this section"
        line = soup.select_one(".contents ol").append(soup.new_tag("li"))
        text = head.text.removesuffix("¶")
        line.append(soup.new_tag("a", href=f"#{head['id']}", string=text))
    for box in soup.select("table, math[display=block]"):
        box.wrap(soup.new_tag("div", attrs={"class": "wide", "tabindex": "0"}))
    for code in soup.select(".out > .highlight"):
        first, *more = code.text.strip().splitlines()
        if len(more) >= LISTING:
            code.wrap(soup.new_tag("details", attrs={"class": "code"}))
            code.insert_before(soup.new_tag("summary", string=first.rstrip(":")))
    for cell in soup.find_all("td", string=re.compile(rf"^\s*{NUMBER}")):
        cell["class"] = "n"
    cited = _references(soup)
    names = re.compile("|".join([SECTION.pattern, *map(re.escape, cited)]))
    links = links | cited
    _mark(soup, names, ".text", lambda text: text in links and ("a", {"href": links[text]}))
    _mark(soup, WHOLE, "main", lambda text: {*" –-"} & {*text} and ("span", {"class": "n"}))


def _references(soup):
    """Make a list of the paragraph of references; return its lines' anchors by name and year."""
    found = {}
    for paragraph in soup.select("#References + p"):
        lines = re.split(r"(?<=</a>); ", paragraph.decode_contents())
        paragraph.name, paragraph["class"] = "ul", "references"
        paragraph.clear()
        for number, line in enumerate(lines, 1):
            item = paragraph.append(soup.new_tag("li", id=f"reference-{number}"))
            item.append(BeautifulSoup(line, "html.parser"))
            if name := REFERENCE.match(item.text):
                found[name[1]] = f"#reference-{number}"
    return found


def _mark(soup, pattern, within, tag_of):
    """Put what a pattern finds in running text into the tags that `tag_of` names, or none."""
    for node in [n for part in soup.select(within) for n in part.find_all(string=pattern)]:
        if node.find_parent(APART) or node.find_parent(class_=CODE):
            continue
        pieces, at = [], 0
        for found in pattern.finditer(node):
            if tag := tag_of(found[0]):
                marked = soup.new_tag(tag[0], attrs=tag[1], string=found[0])
                pieces, at = [*pieces, node[at : found.start()], marked], found.end()
        node.replace_with(*pieces, node[at:])


def main(argv=None):
    """Render pages; see ``--help``.

    Parameters
    ----------
    argv : list of str, optional
        Command line; None is the process's own.

    Returns
    -------
    int
        0 if all pages were made, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m helpers.pages", description=__doc__)
    parser.add_argument("readme", type=Path, help="opens the index")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, default=Path("build/html"), help="folder of the pages")
    args = parser.parse_args(argv)
    try:
        for told in build(args.readme, args.notebooks, args.to):
            print(f"note: {told}", file=sys.stderr)
    except (NotebookError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"open {os.path.relpath(args.to / 'index.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
