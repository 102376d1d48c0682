"""The house: one environment in two files, nothing stray at the top, imports that run one way."""

import ast
import importlib.metadata
import platform
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests import size

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
PIP = CONDA["dependencies"][-1]["pip"]
PINS = {canonicalize_name(r.name): r for r in map(Requirement, PIP[:-1])}
EXTRAS = PROJECT["optional-dependencies"].values()
WANTED = sorted({*PROJECT["dependencies"], *(line for extra in EXTRAS for line in extra)})
# a room imports from rooms before its own only, and a module of a room from modules before it, so
# there is no cycle; of execute only other commands take something
ROOMS = [
    "files",
    "outputs",
    "stored",
    "data",
    "models",
    "training",
    "peft",
    "finetuner",
    "study",
    "show",
    "pages",
    "execute",
    "warm",
    "sweep",
]
ORDER = {
    "data": "rows tasks embeddings texts",
    "models": "checkpoint encoder pretrained mlp stages",
    "training": "seeding freezing batches scoring prefix checks loop costs strategies domain",
    "peft": "four_bits base product lora layers surgery inject qlora files hub_config hub"
    " arithmetic mixed large recipes",
    "study": "seeds verdicts decide tuning published part1 part1_domain part2 spectrum"
    " yours part3 part3_adapters",
    "show": "records tables drawings figures costs",
}


# lines of code outside study/, and of everything: this round's last issue ends at 2,800 and 4,200.
# The encoder and its texts are in; the toys that they replace, digits, TinyTransformer and the
# decision on embeddings, go with Parts 2 and 3. Lines of a module, all told, and of a function
LIBRARY, EVERYTHING, MODULE, FUNCTION = 5_260, 6_690, 350, 40


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8")


def imported(source):
    """Return the dotted names that `source` imports of `helpers`, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the room that they come from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("helpers.")}


def test_conda_brings_python_and_pip_and_pip_brings_all_else():
    assert [d.split("=")[0] for d in CONDA["dependencies"][:-1]] == ["python", "pip"]
    assert CONDA["channels"] == ["conda-forge"] and PIP[-1] == "-e ."
    python = CONDA["dependencies"][0].split("=")[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert len(PINS) == len(PIP) - 1
    for pin in PINS.values():
        assert re.fullmatch(r"==[\w.+!]+", str(pin.specifier)) and not (pin.url or pin.marker), pin


@pytest.mark.parametrize("line", WANTED)
def test_each_dependency_is_pinned_above_its_lower_bound(line):
    wanted = Requirement(line)
    assert [s.operator for s in wanted.specifier] == [">="]
    pin = PINS[canonicalize_name(wanted.name)].specifier
    assert wanted.specifier.contains(str(pin).removeprefix("=="))


def test_what_is_installed_is_what_is_pinned():
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in PINS}
    assert {n: v for n, v in installed.items() if f"=={v}" != str(PINS[n].specifier)} == {}
    assert SpecifierSet(PROJECT["requires-python"]).contains(platform.python_version())


def test_nothing_else_is_at_the_top():
    top = {path.split("/")[0] for path in git("ls-files").stdout.splitlines()}
    wanted = {"notebooks", "helpers", "tests"}
    wanted |= {"environment.yml", "README.md", "Makefile", "pyproject.toml"}
    assert {"helpers"} <= {name for name in top if not name.startswith(".")} <= wanted


def test_imports_run_one_way():
    for path in (ROOT / "helpers").rglob("*.py"):
        parts = path.relative_to(ROOT / "helpers").with_suffix("").parts
        if parts == ("__init__",):
            continue
        room = parts[0]
        for name in imported(path.read_text(encoding="utf-8")):
            _, other, *module = name.split(".")
            if other != room:
                assert ROOMS.index(other) < ROOMS.index(room), f"{path} imports {name}"
            elif parts[1] != "__init__":
                order = ORDER[room].split()
                assert module[0] in order[: order.index(parts[1])], f"{path} imports {name}"


def test_every_room_says_what_it_is_for_and_a_newcomer_is_shown_each_module():
    folder = ROOT / "helpers"
    rooms = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert {*ORDER} == rooms and {*ROOMS} - rooms == {p.stem for p in folder.glob("[!_]*.py")}
    for room, order in ORDER.items():
        assert sorted(order.split()) == sorted(p.stem for p in (folder / room).glob("[!_]*.py"))
        tree = ast.parse((folder / room / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree)
        assert all(isinstance(node, ast.Expr | ast.ImportFrom) for node in tree.body)


def test_the_package_stays_small():
    found = size.modules()
    library, everything = size.totals(found)
    assert library <= LIBRARY and everything <= EVERYTHING
    for path, (_, lines, name, longest) in found.items():
        assert lines <= MODULE, f"{path} has {lines} lines: it holds two ideas"
        assert longest <= FUNCTION, f"{name} of {path} has {longest} lines of code: split it"


def test_what_is_no_code_is_not_counted():
    text = '"""Two\nlines."""\n\n# a comment\ndef f():\n    """Say."""\n    return """a\nb"""\n'
    assert sorted(size.code_lines(text)[0]) == [5, 7, 8]


def test_no_notebook_imports_the_executor_and_the_package_itself_is_a_docstring():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert not re.search(r"helpers\.execute|helpers import[^\n]* execute\b", code)
    [docstring] = ast.parse((ROOT / "helpers" / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(docstring.value.value, str)


def test_no_tracked_file_names_a_machine_or_a_package_index():
    found = git("grep", "-InE", r"index[-_]url|/(home|Users|root|work)/[a-z]")
    assert (found.returncode, found.stdout) == (1, "")
