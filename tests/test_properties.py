"""Properties on random module trees, and loaders on mutated files: right, or one sentence."""

import copy
import csv
import io
import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.data import load_rows, read_texts
from helpers.finetuner import FineTuner
from helpers.models import Encoder, Tokenizer
from helpers.peft import (
    adapters,
    inject_dora,
    inject_ia3,
    inject_lora,
    load_peft,
    load_trainable,
    merge,
    save_peft,
    save_trainable,
    unload,
)
from helpers.stored import NotebookError, canonical, read
from helpers.training import count_parameters, freeze, param_groups, unfreeze

D = 3
NAMES = st.sampled_from(["0", "1", "10", "base", "head", "lora_A", "q_proj", "weight_", "ü"])
STABLE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
)


def leaf(kind, bias, number):
    with torch.random.fork_rng():
        torch.manual_seed(number)
        makes = {"linear": lambda: nn.Linear(D, D, bias=bias), "norm": lambda: nn.LayerNorm(D)}
        makes |= {"batch": lambda: nn.BatchNorm1d(D), "tanh": nn.Tanh}
        return makes[kind]().double()


def chain(children):
    """Return modules in a row under their names, the same one perhaps under two."""
    model = nn.Sequential()
    for name, child in children.items():
        model.add_module(name, child)
    return model


LEAVES = st.builds(
    leaf,
    st.sampled_from(["linear", "linear", "norm", "batch", "tanh"]),
    st.booleans(),
    st.integers(0, 99),
)
BRANCHES = st.recursive(
    LEAVES,
    lambda some: st.dictionaries(NAMES, some, min_size=1, max_size=3).map(chain),
    max_leaves=6,
)
TREES = st.dictionaries(NAMES, BRANCHES, min_size=1, max_size=3).map(chain)


def linears(model):
    """Return linear layers, and those of them whose names end no other kind's."""
    of = dict(model.named_modules())
    other = [name for name, m in of.items() if not isinstance(m, nn.Linear)]
    found = [name for name in of if name not in other]
    return found, [n for n in found if not any(o.endswith(f".{n}") for o in other)]


def outputs(model):
    x = torch.linspace(-1, 1, 4 * D, dtype=torch.float64).view(4, D)
    return model.eval()(x)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@STABLE
@given(TREES, st.data())
def test_what_is_trained_is_what_was_asked_for_and_is_counted(model, data):
    names = [name for name, _ in model.named_modules()]
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True))
    freeze(model)
    assert count_parameters(model).trainable == 0
    unfreeze(*map(model.get_submodule, chosen))
    inside = {
        name
        for name, _ in model.named_parameters()
        if any(f"{name}.".startswith(c and f"{c}.") for c in chosen)
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == inside
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert count_parameters(model) == (sum(sizes[n] for n in inside), sum(sizes.values()))


@STABLE
@given(TREES, st.data())
def test_groups_part_what_is_trained_and_the_longest_name_wins(model, data):
    names = [name for name, _ in model.named_modules()]
    keys = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    rates = {key: 0.1 * (i + 1) for i, key in enumerate(keys)}
    wanted = {key: [] for key in keys}
    for name, p in model.named_parameters():
        steps = name.split(".")
        ends = [".".join(steps[:n]) for n in range(len(steps), -1, -1)]  # the longest first
        wanted.setdefault(next((e for e in ends if e in rates), None), []).append(p)
    if wanted.get(None) or not all(wanted.values()):
        with pytest.raises(ValueError, match=r"no learning rate for|cover nothing"):
            param_groups(model, rates)
        return
    for group, (key, params) in zip(param_groups(model, rates), wanted.items(), strict=True):
        assert group["lr"] == rates[key] and list(map(id, group["params"])) == list(map(id, params))


INJECT = {"lora": inject_lora, "dora": inject_dora, "ia3": inject_ia3}


def adapted(model, data):
    """Freeze a model, adapt some of its linear layers, move what was added; None without any."""
    found, clear = linears(model)
    if not clear:
        return None
    chosen = data.draw(st.lists(st.sampled_from(clear), unique=True, min_size=1))
    kind = data.draw(st.sampled_from(list(INJECT)))
    freeze(model)
    options = {} if kind == "ia3" else {"r": 1, "generator": torch.Generator().manual_seed(0)}
    return INJECT[kind](model, chosen, **options), found, chosen


def move(model):
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p += 0.1 * torch.cos(torch.arange(p.numel()) + i).view_as(p)


def ending(found, chosen):
    return [n for n in found if any(n == c or n.endswith(f".{c}") for c in chosen)]


@STABLE
@given(TREES, st.data())
def test_injection_changes_nothing_trains_its_own_and_goes_without_a_trace(model, data):
    before, first = state(model), outputs(model).detach()
    if (result := adapted(model, data)) is None:
        return
    names, found, chosen = result
    assert sorted(names) == sorted(ending(found, chosen)) == sorted(adapters(model))
    torch.testing.assert_close(outputs(model), first, rtol=0, atol=1e-12)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(name.startswith(f"{n}.") for n in names) for name in trained)
    assert all(any(name.startswith(f"{n}.") for name in trained) for n in names)
    assert same({k: state(model)[k] for k in before}, before)
    move(model)
    merged, moved = copy.deepcopy(model), outputs(model).detach()
    assert sorted(merge(merged)) == sorted(names) and merge(merged) == []
    assert list(merged.state_dict()) == list(before)
    torch.testing.assert_close(outputs(merged), moved, rtol=0, atol=1e-9)
    assert sorted(unload(model)) == sorted(names) and same(state(model), before)
    assert torch.equal(outputs(model), first)


@STABLE
@given(TREES, st.data())
def test_a_checkpoint_gives_back_what_was_trained_bit_for_bit(tmp_path_factory, model, data):
    if adapted(model, data) is None:
        return
    more = data.draw(
        st.lists(st.sampled_from([n for n, _ in model.named_parameters()]), unique=True)
    )
    for name in more:
        unfreeze(model.get_parameter(name))
    twin, path = copy.deepcopy(model), tmp_path_factory.getbasetemp() / "property.safetensors"
    move(model)
    save_trainable(model, path)
    load_trainable(twin, path)
    assert same(state(twin), state(model)) and torch.equal(outputs(twin), outputs(model))
    frozen = next((p for p in twin.parameters() if not p.requires_grad), None)
    if frozen is not None:  # of another base
        before = state(twin)
        with torch.no_grad():
            frozen.view(-1)[0] += 1
        changed = state(twin)
        with pytest.raises(ValueError, match="another base"):
            load_trainable(twin, path)
        assert same(state(twin), changed) and not same(changed, before)


# ---- mutated files


@st.composite
def mutations(draw):
    """Return a function that damages bytes as disks, editors and people do, or exchanges words."""
    kind = draw(st.sampled_from(["flip", "cut", "drop", "twice", "insert", "swap", "zero"]))
    at, to = draw(st.integers(0, 999)) / 1000, draw(st.integers(0, 999)) / 1000
    odd = draw(st.binary(max_size=9))
    words = draw(st.tuples(st.integers(0, 99), st.sampled_from(WORDS)))

    def mutate(data):
        a, b = sorted((int(at * len(data)), int(to * len(data))))
        if kind == "flip":
            a = min(a, len(data) - 1)
            return data[:a] + bytes([data[a] ^ (1 << words[0] % 8)]) + data[a + 1 :]
        if kind == "swap":  # a number or word of a text for another one
            found = list(PARTS.finditer(data))
            part = found[words[0] % len(found)] if found else None
            return data[: part.start()] + words[1] + data[part.end() :] if part else data[1:]
        middle = {"cut": b"", "drop": data[b:], "twice": data[a:b] + data[a:], "zero": None}
        if kind == "insert":
            return data[:a] + odd + data[a:]
        return data[:a] + (bytes(b - a) + data[b:] if kind == "zero" else middle[kind])

    return mutate


WORDS = [b"-1", b"1e999", b"null", b"[]", b"{}", b'"x"', b"99999999999999999999", b"\xff", b"0.5"]
PARTS = re.compile(rb'-?\d+(\.\d+)?|"[^"]*"|true|false|null')


def told(error):
    """Whether an error is one sentence of the family that a caller expects."""
    sentence = str(error)
    return isinstance(error, ValueError | OSError) and "\n" not in sentence and len(sentence) > 10


def check(load, path, data, same):
    """Load a mutated file: the result is right, or the refusal is told."""
    path.write_bytes(data)
    try:
        found = load()
    except Exception as error:
        assert told(error), f"{type(error).__name__}: {error}"
        return
    assert same(found)


def small(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, 99), nn.Tanh(), nn.Linear(99, 2))
    freeze(model)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with one file of each kind."""
    place = tmp_path_factory.mktemp("fuzz")
    model = small()
    inject_lora(model, ["0"], r=1)
    move(model)
    save_trainable(model, place / "a.safetensors")
    save_peft(model, place / "peft")
    (place / "a.csv").write_text('text,label\none,1\n"two, ""2""",0\nthree,\nfour,1\nfive,0\n')
    rows = dict(X=np.random.default_rng(0).normal(size=(8, 2)).astype("f4"), y=[0, 1] * 4)
    np.savez(place / "a.npz", **rows)
    np.savez_compressed(place / "b.npz", **rows)
    cells = [
        nbformat.v4.new_code_cell("print(1)", id="a"),
        nbformat.v4.new_markdown_cell("b", id="b"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), place / "a.ipynb")
    return place


@settings(STABLE, max_examples=200)
@given(mutate=mutations())
def test_a_mutated_checkpoint_gives_the_same_or_a_sentence_and_changes_nothing(place, mutate):
    data, path = (place / "a.safetensors").read_bytes(), place / "mutated"
    wanted, model = small(), small()
    for m in (wanted, model):
        inject_lora(m, ["0"], r=1)
    load_trainable(wanted, place / "a.safetensors")
    before = state(model)
    loaded = []

    def load():
        load_trainable(model, path)
        loaded.append(True)

    check(load, path, mutate(data), lambda _: same(state(model), state(wanted)))
    assert loaded or same(state(model), before)


@STABLE
@given(
    mutate=mutations(), name=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"])
)
def test_a_mutated_peft_folder_gives_the_same_or_a_sentence(place, mutate, name):
    folder = shutil.copytree(place / "peft", place / "mutated peft", dirs_exist_ok=True)
    data = (folder / name).read_bytes()
    wanted, model = small(), small()
    load_peft(wanted, place / "peft")
    check(
        lambda: load_peft(model, folder),
        folder / name,
        mutate(data),
        lambda _: torch.equal(outputs(model.double()), outputs(copy.deepcopy(wanted).double())),
    )


@pytest.fixture(scope="module")
def tuned(folder, place):
    X = ["goal match", "chip code", "team goal", "code cloud"]
    model = FineTuner("BitFit", model_path=folder, epochs=1).fit(X, ["sport", "tech"] * 2)
    model.save(place / "tuned")
    return X, model.predict_proba(X)


@settings(STABLE, max_examples=30)
@given(mutate=mutations(), name=st.sampled_from(["finetuner.json", "trained.safetensors"]))
def test_a_mutated_model_folder_predicts_the_same_or_is_told(place, tuned, mutate, name):
    folder = shutil.copytree(place / "tuned", place / "mutated tuned", dirs_exist_ok=True)
    X, proba = tuned
    check(
        lambda: FineTuner.load(folder),
        folder / name,
        mutate((folder / name).read_bytes()),
        lambda found: (found.predict_proba(X) == proba).all(),
    )


@settings(STABLE, max_examples=30)
@given(mutate=mutations(), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_a_mutated_encoder_loads_finite_and_of_its_sizes_or_is_told(folder, place, mutate, name):
    copied = shutil.copytree(folder, place / "mutated encoder", dirs_exist_ok=True)
    data = (copied / name).read_bytes()
    head = data[:4096] if name != "config.json" else data  # of the weights, what describes them
    check(
        lambda: Encoder.from_pretrained(copied),
        copied / name,
        mutate(head) + data[len(head) :],
        lambda found: all(t.isfinite().all() for t in found.state_dict().values()),
    )


@settings(STABLE, max_examples=15)
@given(mutate=mutations())
def test_a_mutated_tokenizer_reads_texts_or_is_told(folder, place, mutate):
    data = json.loads(Path(folder, "tokenizer.json").read_text("utf-8"))
    data["model"]["vocab"] = {k: v for k, v in data["model"]["vocab"].items() if v < 300}
    path = place / "words" / "tokenizer.json"
    path.parent.mkdir(exist_ok=True)
    check(
        lambda: Tokenizer(path.parent),
        path,
        mutate(json.dumps(data).encode()),
        lambda found: {*found(["a b", "c"])} == {"ids", "mask"},
    )


@settings(STABLE, max_examples=200)
@given(mutate=mutations())
def test_a_mutated_csv_is_read_as_it_stands_or_is_told(place, mutate):
    data = mutate((place / "a.csv").read_bytes())

    def right(found):
        fields = {f for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), "")) for f in row}
        counted = [c for c in found.y.tolist() if c >= 0]
        return (
            {*found.texts} <= fields
            and {*map(str, found.classes)} <= {field.strip() for field in fields}
            and {*counted} == {*range(len(found.classes))}
            and len(found.texts) == len(found.y) == len(found.rows)
        )

    check(lambda: read_texts(place / "mutated.csv"), place / "mutated.csv", data, right)


@settings(STABLE, max_examples=200)
@given(mutate=mutations(), name=st.sampled_from(["a.npz", "b.npz"]))
def test_mutated_embeddings_are_the_same_or_are_told(place, mutate, name):
    wanted = load_rows(place / name)
    check(
        lambda: load_rows(place / "mutated.npz"),
        place / "mutated.npz",
        mutate((place / name).read_bytes()),
        lambda found: torch.equal(found.X, wanted.X) and torch.equal(found.y, wanted.y),
    )


@settings(STABLE, max_examples=60)
@given(mutate=mutations())
def test_a_mutated_notebook_is_read_or_is_told(place, mutate):
    path = place / "mutated.ipynb"
    path.write_bytes(mutate((place / "a.ipynb").read_bytes()))
    try:
        nb = read(path)
    except NotebookError as error:
        assert "\n" not in str(error)
        return
    buffer = io.StringIO(canonical(nb))
    assert canonical(nbformat.read(buffer, 4)) == canonical(nb)
