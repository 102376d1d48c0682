"""The pages of `make html`, in a real browser with the network off."""

import re
import shutil
from itertools import pairwise
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup

from helpers import pages
from tests.browser import browser, emulate, requested
from tests.test_environment import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
NAMES = ["index.html", *(f"{path.stem}.html" for path in NOTEBOOKS)]
WIDTHS = [390, 1280]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pages") / "html"
    pages.build(ROOT / "README.md", NOTEBOOKS, place)
    return place


@pytest.fixture(scope="module")
def driver():
    with browser() as chromium:
        yield chromium


def opened(driver, folder, name, width=1280, **how):
    emulate(driver, width, **how)
    driver.get((folder / name).as_uri())
    return driver


@pytest.fixture(scope="module")
def soups(folder):
    return {
        n: BeautifulSoup((folder / n).read_text(encoding="utf-8"), "html.parser") for n in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_page_asks_for_nothing_but_itself_and_logs_nothing(driver, folder, name):
    requested(driver), driver.get_log("browser")
    opened(driver, folder, name)
    assert requested(driver) == [(folder / name).as_uri()]
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_formula_is_drawn(driver, folder, path):
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    wanted = len(re.findall(r"(\$\$?)[^$]+\1", text))
    opened(driver, folder, f"{path.stem}.html")
    found = driver.execute_script(
        "return [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect())"
        ".filter(box => box.width > 2 && box.height > 2).length"
    )
    prose = driver.execute_script(
        "return [...document.querySelectorAll('.text')].map(t => t.textContent).join(' ')"
    )
    assert found == wanted and not re.search(r"\$|\\[a-z]+\b", prose)


def test_what_cannot_be_drawn_is_refused(tmp_path):
    cells = [nbformat.v4.new_markdown_cell(text) for text in ("# A title", r"Let $\nosuch x$ be.")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01.ipynb")
    shutil.copy(ROOT / "README.md", tmp_path)
    with pytest.raises(pages.NotebookError, match=r"01.ipynb: \\nosuch in \$\\nosuch x\$ cannot"):
        pages.build(tmp_path / "README.md", [tmp_path / "01.ipynb"], tmp_path / "html")
    assert not (tmp_path / "html").exists()


def test_every_link_arrives(soups):
    ids = {name: {tag["id"] for tag in soup.select("[id]")} for name, soup in soups.items()}
    links = [(name, a["href"]) for name, soup in soups.items() for a in soup.select("a[href]")]
    for name, href in links:
        if not href.startswith("https://"):
            page, _, anchor = href.partition("#")
            assert (page or name) in NAMES, f"{name} has a link to {href}"
            held = ids[page or name]
            assert not anchor or {anchor, unquote(anchor)} & held, f"{name} has a link to {href}"
    assert len(links) > 150


def test_pages_are_chained_sections_and_references_linked(soups):
    for before, after in pairwise(NAMES):
        assert soups[before].select_one("a[rel=next]")["href"] == after
        assert soups[after].select_one("a[rel=prev]")["href"] == before
    for name, soup in soups.items():
        listed = [a["href"] for a in soup.select(".contents a")]
        assert listed == [f"#{h['id']}" for h in soup.select("h2")] and listed
        assert [a["href"] for a in soup.select("header a")] == NAMES
        assert name == "index.html" or soup.select(".text a[href^='#reference-']")
    last = soups[NAMES[-1]]
    assert last.select_one("a[href^='02_peft_techniques.html#2.6-']").text == "2.6"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_picture_says_what_it_shows(driver, folder, path):
    opened(driver, folder, f"{path.stem}.html")
    shown = driver.execute_script(
        "return [...document.images].map(i => [i.alt, i.naturalWidth, !!i.closest('details')])"
    )
    cells = nbformat.read(path, as_version=4).cells
    drawn = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(shown) == len(drawn) + 1
    assert all(len(alt) > 12 and width > 100 and not folded for alt, width, folded in shown)


def test_an_alternative_text_comes_from_the_cell_and_a_missing_one_is_told(tmp_path):
    figure = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})
    cells = [nbformat.v4.new_markdown_cell("# A title")]
    cells += [nbformat.v4.new_code_cell("draw()", outputs=[figure], id=name) for name in "ab"]
    cells[1].metadata.alt = 'Two "lines" & a bar'
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01.ipynb")
    (tmp_path / "README.md").write_text("# Title\n\n![](picture.png)", encoding="utf-8")
    told = pages.build(tmp_path / "README.md", [tmp_path / "01.ipynb"], tmp_path / "html")
    page = BeautifulSoup((tmp_path / "html" / "01.html").read_text(encoding="utf-8"), "html.parser")
    assert [i["alt"] for i in page.select("img")] == ['Two "lines" & a bar', "Figure: A title"]
    assert len(told) == 1 and "cell 'b'" in told[0] and "'alt'" in told[0]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_page_never_scrolls_sideways_and_no_number_is_broken(driver, folder, name, width):
    opened(driver, folder, name, width)
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]") in (
        [width, width],
        [width, width - 15],  # a scroll bar's
    )
    broken = driver.execute_script("""
        const found = [], number = /[+\\u2212-]?\\d[\\d.,]*(e-?\\d+)?(\\s?%)?/g;
        const main = document.querySelector('main');
        const texts = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) {
            const node = texts.currentNode, range = document.createRange();
            if (node.parentElement.closest('math, .highlight, code')) continue;
            for (const match of node.data.matchAll(number)) {
                range.setStart(node, match.index);
                range.setEnd(node, match.index + match[0].trimEnd().length);
                const tops = [...range.getClientRects()].map(r => Math.round(r.top));
                if (new Set(tops).size > 1) found.push(match[0] + ' in ' + node.data.slice(0, 60));
            }
        }
        return found;""")
    assert broken == []


def test_code_folds_by_mouse_and_by_keyboard(driver, folder):
    opened(driver, folder, NAMES[1])
    state = "return [...document.querySelectorAll('details.code')].map(d => d.open)"
    at_first = driver.execute_script(state)
    assert True in at_first and False in at_first
    summary = driver.find_element("css selector", "details.code:not([open]) summary")
    summary.click()
    assert driver.execute_script(state).count(True) == at_first.count(True) + 1
    summary.send_keys("\n")
    assert driver.execute_script(state) == at_first
    for folded in (0, len(at_first)):
        driver.find_element("css selector", "header button").click()
        assert driver.execute_script(state).count(True) == folded


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_solutions_and_set_up_are_folded_and_the_rest_is_open(soups, path):
    page = soups[f"{path.stem}.html"]
    for cell in (c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"):
        section = page.find(id=f"cell-{cell.id}")
        hidden = cell.metadata.get("jupyter", {})
        whole = section.find("details", class_="whole", recursive=False)
        assert bool(whole) == ("solution" in cell.metadata.get("tags", [])), cell.id
        if whole:
            assert whole.summary.text.startswith("Solution") and not whole.has_attr("open")
            assert len(whole.select("pre.out, table")) == len(cell.outputs)
        else:
            code = section.find("details", class_="code", recursive=False)
            assert code.has_attr("open") != bool(hidden.get("source_hidden")), cell.id


CONTRAST = """
    const pixel = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const light = colour => {
        pixel.clearRect(0, 0, 1, 1); pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
        const part = [...pixel.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
    };
    const ground = tag => {
        for (; tag; tag = tag.parentElement) {
            const colour = getComputedStyle(tag).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
        return 'Canvas';
    };
    const pairs = new Set();
    for (const tag of document.querySelectorAll('body, body *'))
        if ([...tag.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
            pairs.add(getComputedStyle(tag).color + '|' + ground(tag));
    return [...pairs].map(pair => {
        const [a, b] = pair.split('|').map(light);
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), pair];
    });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(driver, folder, scheme):
    for name in NAMES[1:]:
        opened(driver, folder, name, scheme=scheme)
        found = driver.execute_script(CONTRAST)
        assert len(found) > 8 and min(found)[0] >= 4.5, min(found)
    ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (scheme == "dark")
    paper = driver.execute_script("return getComputedStyle(document.images[0]).backgroundColor")
    assert paper == "rgb(255, 255, 255)"  # figures have black ink in either


def test_print_shows_what_is_folded_on_white(driver, folder):
    opened(driver, folder, NAMES[1], 800, media="print", scheme="dark")
    ground, heights, shown = driver.execute_script("""
        const folded = [...document.querySelectorAll('details:not([open]) .highlight pre')];
        const around = [...document.querySelectorAll('header, nav')];
        return [getComputedStyle(document.body).backgroundColor,
                folded.map(p => p.checkVisibility() ? p.clientHeight : 0),
                around.filter(n => n.clientHeight).length]""")
    assert ground == "rgb(255, 255, 255)" and shown == 0
    assert len(heights) > 5 and min(heights) > 10


def test_a_page_is_made_whole_or_not_at_all(tmp_path, capsys):
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("old")
    (tmp_path / "no.ipynb").write_text("{")
    options = [str(ROOT / "README.md"), str(tmp_path / "no.ipynb"), "--to", str(tmp_path / "html")]
    assert pages.main(options) == 1
    assert "no.ipynb" in capsys.readouterr().err
    assert (tmp_path / "html" / "index.html").read_text() == "old"
