"""Part 2's studies on a small encoder: what a technique trains, from where, at which rates."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from helpers import data, models, peft, training
from helpers.models import Encoder
from helpers.peft import inject
from helpers.study import part1, part2, reproducible, spectrum
from helpers.study.part2 import FIRST_PLACE, HEAD_RATE, LINEAR, PLACES, RATES, TECHNIQUES
from helpers.training import (
    costs,
    count_parameters,
    evaluate,
    freeze,
    operations,
    predict,
    strategies,
    unfreeze,
)
from tests.small import SIZES, TinyTransformer, Traced
from tests.test_training import copied, moved

D, F, HEAD = SIZES["d"], SIZES["d_ff"], 5 * (SIZES["d"] + 1)
BLOCK = 4 * D * (D + 1) + 2 * D * F + F + D + 4 * D
TRAINED = {  # besides the head; of two blocks, or of what the name says
    **dict.fromkeys(("LoRA", "LoRA+", "PiSSA"), 2 * 2 * 8 * (D + D)),
    "DoRA": 2 * 2 * (8 * (D + D) + D),
    "VeRA": 2 * 2 * (64 + D),
    "OFT": 2 * 2 * (D // 16) * (16 * 15 // 2),
    "(IA)3": 2 * (D + D + F),
    "BitFit": 2 * (4 * D + F + D + 2 * D),
    "LayerNorm tuning": 2 * 2 * 2 * D,
    "adapters": 2 * 2 * (2 * D * (D // 16) + D // 16 + D),
    "prefix tuning": 2 * 2 * 4 * D,
    "prompt tuning": 4 * D,
    "top two blocks": 2 * BLOCK,
    "full fine-tuning": 6 * BLOCK,
}
WHERE = {"prompt tuning": ["embed"], "full fine-tuning": [f"blocks.{i}" for i in range(6)]}
DRAWN = ("LoRA", "LoRA+", "DoRA", "VeRA", "adapters", "prefix tuning", "prompt tuning")


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def double():
    with reproducible(0):
        yield


@pytest.fixture(scope="module")
def rows(folder):
    return part2.few(0, folder=folder)


@pytest.fixture
def begin(rows, double):
    """Linear probing's model, and 40 headlines to train on."""
    model, train, _ = rows
    return copy.deepcopy(model), train


@pytest.fixture
def fits(monkeypatch):
    """Note what a study hands to `fit`: a copy of the model, rows, labels, technique, rate."""
    seen = []

    def fit(self, model, X, y, *, technique, lr):
        seen.append((technique, lr, copy.deepcopy(model), X, y))

    monkeypatch.setattr(part2.Train, "fit", fit)
    return seen


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_moves_what_it_says_and_the_head_from_linear_probing_on(name, begin):
    base, (X, y) = begin
    model, train = copy.deepcopy(base), part2.Train()
    train.inject(model, name)
    trained, start = trainable(model), copied(model)
    where = [f"encoder.{part}." for part in WHERE.get(name, ["blocks.4", "blocks.5"])]
    assert {"head.weight", "head.bias"} < trained
    for part in where:
        assert any(n.startswith(part) for n in trained)
    assert all(n.startswith(("head.", *where)) for n in trained)
    blocks = [int(n.split(".")[2]) if ".blocks." in n else 0 for n in trained if n[:5] != "head."]
    assert train.first(name) == min(blocks)
    assert count_parameters(model).trainable == TRAINED[name] + HEAD
    gap = (predict(model, X) - predict(base, X)).abs().max()
    assert (gap < 1e-12) == (name not in ("prompt tuning", "prefix tuning"))
    train.fit(model, X, y, technique=name, lr=1e-2)
    assert set(moved(model, start)) == trained


@pytest.mark.parametrize("name", TECHNIQUES)
def test_heads_learn_at_one_rate_and_lora_plus_has_a_sixteenth_for_a(name, begin, monkeypatch):
    steps, (model, _) = [], begin

    def planted(model, X, y, *, optimizer, epochs, batch_size):
        names = {id(p): n for n, p in model.named_parameters()}
        rate = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        steps.append((rate, epochs, batch_size))

    monkeypatch.setattr(strategies, "train", planted)
    train = part2.Train()
    train.inject(model, name)
    for n in (40, 160):
        train.fit(model, torch.zeros(n, 3), torch.zeros(n), technique=name, lr=0.32)
    rates = {n: 0.32 for n in trainable(model)} | dict.fromkeys(("head.weight", "head.bias"), 1e-3)
    if name == "LoRA+":
        rates |= {n: 0.02 for n in rates if n.endswith("lora_A")}
    assert HEAD_RATE == 1e-3 and steps == [(rates, 4, 16), (rates, 2, 16)]  # 12, then 20 steps


@pytest.mark.parametrize("name", ["LoRA+", "PiSSA", "BitFit", "prefix tuning", "top two blocks"])
def test_cached_rows_train_the_same_weights_as_tokens(name, begin, rows):
    base, (X, y) = begin
    train, found, score = part2.Train(), [], []
    test, labels = rows[2]
    for first in (0, train.first(name)):
        torch.manual_seed(5)
        model = copy.deepcopy(base)
        train(model, part1.cached(base, X, first), y, technique=name, lr=1e-2)
        found.append(model.state_dict())
        score.append(evaluate(model, part1.cached(base, test, first), labels).correct)
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    assert score[0] == score[1] and moved(base.head, copied(model.head))


def test_a_page_starts_all_from_one_head_on_one_set_of_rows(fits, folder):
    found = part2.page(0, texts="headlines", rates=dict.fromkeys(TECHNIQUES, 0.5), folder=folder)
    columns = [column for name in TECHNIQUES for column in (name, f"{name}/retrieval")]
    assert list(found) == ["zero labels", "linear probing", *columns, "margin"]
    assert [(name, lr) for name, lr, *_ in fits] == [(name, 0.5) for name in TECHNIQUES]
    begin, (tokens, labels), _ = part2.few(0, folder=folder)
    with reproducible(0):
        low = part1.cached(begin, tokens, 4)["hidden"]
    for name, _, model, X, y in fits:
        assert not moved(model.head, copied(fits[0][2].head)) and torch.equal(y, labels)
        torch.testing.assert_close(model.head.weight, begin.head.weight, rtol=1e-4, atol=1e-6)
        known, key = (low, "hidden") if part2.Train().first(name) else (tokens["ids"], "ids")
        torch.testing.assert_close(X[key], known, rtol=0, atol=1e-12)
        if name not in ("prompt tuning", "prefix tuning"):  # nothing was trained
            assert found[name] == found["linear probing"]


def test_retrieval_is_scored_of_headlines_at_eight_labels_alone(fits, folder):
    plain = ["zero labels", "linear probing", "LoRA", "margin"]
    for texts, k in (("headlines", 32), ("documentation", 8), ("documentation", 32)):
        found = part2.page(0, texts=texts, k=k, rates={"LoRA": 1e-2}, folder=folder)
        assert list(found) == plain
    assert [len(y) for *_, y in fits] == [160, len(fits[1][-1]), 4 * len(fits[1][-1])]


def test_a_page_is_a_function_of_its_seed_and_not_of_the_order(folder, monkeypatch):
    ends, evaluated = [], training.evaluate

    def evaluate(model, X, y):
        ends.append(copied(model))
        return evaluated(model, X, y)

    monkeypatch.setattr(training, "evaluate", evaluate)
    rates = dict.fromkeys(DRAWN, 1e-2)
    found = part2.page(3, texts="headlines", rates=rates, folder=folder)
    first = dict(zip(rates, ends, strict=True))
    ends.clear()
    torch.manual_seed(1), np.random.seed(1)
    back = dict(reversed(rates.items()))
    assert part2.page(3, texts="headlines", rates=back, folder=folder) == found
    for name, model in zip(back, ends, strict=True):
        assert all(torch.equal(t, first[name][k]) for k, t in model.items())
    assert part2.page(4, texts="headlines", rates=rates, folder=folder) != found
    assert torch.get_default_dtype() == torch.float32


def test_new_parameters_follow_the_seed(fits, folder):
    for seed in (3, 4):
        part2.page(seed, texts="headlines", rates=dict.fromkeys(DRAWN, 1e-2), folder=folder)
    for (name, *_, one, _, _), (_, _, two, _, _) in zip(fits[:7], fits[7:], strict=True):
        one, two = one.encoder.state_dict(), two.encoder.state_dict()
        assert any(not torch.equal(t, two[k]) for k, t in one.items()), name


def test_rates_are_tried_on_validation_rows_alone(folder, monkeypatch):
    of, drawn, draw = Traced(monkeypatch), [], data.draw
    monkeypatch.setattr(data, "draw", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    rates = {"LoRA": (1e-3, 1e-2), "top two blocks": (1e-4,)}
    chosen, means, margin = part2.try_rates(
        "headlines", [5], rates=rates, workers=1, folder=folder
    )  # fmt: skip
    assert {name: tuple(found) for name, found in means.items()} == rates
    assert chosen == {name: max(found, key=found.get) for name, found in means.items()}
    sets = {name: set(r.flatten().tolist()) for d in drawn for name, r in d.items()}
    assert sets.keys() == {"pairs", "kept", "train", "validation"} and margin.shape == (1,)
    assert of.trained == sets["train"] and of.scored == sets["validation"] and not of.retrieved
    assert not sets["train"] & sets["validation"]
    assert sets["train"] | sets["validation"] <= sets["kept"] - sets["pairs"]


def test_the_rates_of_the_table_are_those_that_are_trained_at(fits, folder):
    assert RATES.keys() == TECHNIQUES.keys() and set(part2.AGAIN) < RATES.keys()
    assert all(list(of) == sorted(set(of)) and len(of) >= 3 for of in RATES.values())
    chosen, means, _ = part2.try_rates("headlines", [5], workers=1, folder=folder)
    tried = [(name, lr) for name, of in RATES.items() for lr in of]
    assert [(name, lr) for name, lr, *_ in fits] == tried
    assert {name: tuple(of) for name, of in means.items()} == RATES
    assert all(chosen[name] in of for name, of in RATES.items())
    assert {len(y) for *_, y in fits} == {5 * part2.LABELS}


QV, TOP = ("q_proj", "v_proj"), (4, 5)
PLANS = {  # targets, blocks, rank, alpha / rank
    "attention's four": (tuple(LINEAR[:4]), TOP, 8, 2.0),
    "feed-forward's two": (tuple(LINEAR[4:]), TOP, 8, 2.0),
    "all six matrices": (tuple(LINEAR), TOP, 8, 2.0),
    "top three blocks": (QV, (3, 4, 5), 8, 2.0),
    "all six blocks": (QV, (0, 1, 2, 3, 4, 5), 8, 2.0),
    "bottom three blocks": (QV, (0, 1, 2), 8, 2.0),
    "r = 1; alpha = 2": (QV, TOP, 1, 2.0),
    "r = 32; alpha = 64": (QV, TOP, 32, 2.0),
    "alpha = 4": (QV, TOP, 8, 0.5),
    "alpha = 64": (QV, TOP, 8, 8.0),
}


def plan(model):
    """Return targets, blocks, rank and scale of a model's LoRA, the same in each layer."""
    found = peft.adapters(model)
    names = [name.split(".") for name in found]
    targets, blocks = {n[-1] for n in names}, sorted({int(n[2]) for n in names})
    assert len(found) == len(targets) * len(blocks)  # each in each
    [(r, scale)] = {(len(a.lora_A), a.scaling) for a in found.values()}
    return tuple(t for t in LINEAR if t in targets), tuple(blocks), r, scale


def test_every_place_differs_from_the_first_in_one_thing(begin):
    found, (base, _) = {}, begin
    for name in PLACES:
        model = copy.deepcopy(base)
        part2.Train(PLACES).inject(model, name)
        found[name] = plan(model)
        assert part2.Train(PLACES).first(name) == min(found[name][1])
    first = found.pop(FIRST_PLACE)
    assert first == (QV, TOP, 8, 2.0) and found == PLANS and next(iter(PLACES)) == FIRST_PLACE
    for name, other in found.items():
        assert sum(a != b for a, b in zip(first, other, strict=True)) == 1, name


def test_loras_places_are_trained_as_the_page_trains_its_lora_which_is_the_first(fits, folder):
    rates = dict.fromkeys(PLANS, 0.5)
    found = part2.page(
        0, texts="headlines", rates=rates, train=part2.Train(PLACES), told=0, folder=folder
    )
    assert list(found) == ["zero labels", "linear probing", *PLANS, "margin"]
    assert [(name, lr) for name, lr, *_ in fits] == [(name, 0.5) for name in PLANS]
    part2.page(0, texts="headlines", rates={"LoRA": 0.5}, folder=folder)
    *others, (_, _, lora, _, y) = fits
    assert plan(lora) == (QV, TOP, 8, 2.0)
    for *_, model, _, labels in others:
        assert not moved(model.head, copied(lora.head)) and torch.equal(labels, y)


def test_few_draws_no_row_twice_nor_one_of_the_pairs_or_of_those_for_rates(folder, monkeypatch):
    drawn, draw = [], data.draw
    pairs = set(part1.pairs(folder)[0].flatten().tolist())
    monkeypatch.setattr(data, "draw", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    for seed in (0, 1):
        model, *parts = part2.few(seed, folder=folder)
        kept, sets = (d for d in drawn[-2:])
        assert {name: r.shape for name, r in sets.items()} == {"train": (5, 8), "test": (5, 24)}
        used = torch.cat([r.flatten() for r in sets.values()]).tolist()
        assert len(set(used)) == len(used) == 160
        assert not set(used) & (pairs | set(kept["kept"].flatten().tolist()))
        _, tokens, y, _ = part1.start("headlines", folder)
        for (X, labels), r in zip(parts, sets.values(), strict=True):
            assert torch.equal(X["ids"], tokens["ids"][r.flatten()])
            assert torch.equal(labels, y[r.flatten()])
    with reproducible(1):
        X, y = parts[0]
        head = training.logistic_head(training.extract_features(model, X), y, C=part2.C)
    assert torch.equal(model.head.weight, head.weight) and part2.C == part1.PROBE_C
    assert not torch.equal(model.head.weight, part2.few(0, folder=folder)[0].head.weight)


def test_names_are_those_of_the_blocks_alone_and_of_whole_ends():
    encoder = Encoder(vocab=5, d=4, n_layers=12, n_heads=1, d_ff=4)
    for model, before in ((encoder, ""), (models.TextClassifier(encoder, 2), "encoder.")):
        names = [f"{before}blocks.{i}.attention.q_proj" for i in (1, 11)]
        assert part2.within(model, ["q_proj"], [11, 1]) == names
    assert part2.within(encoder, ["norm1", "orm2"], [2]) == ["blocks.2.norm1"]
    assert part2.within(encoder, ["embed", "proj"], range(12)) == []


def test_costs_count_what_is_trained_and_sum_what_memory_lists(folder):
    ways = part1.WAYS | {n: TECHNIQUES[n] for n in TECHNIQUES if n not in part1.WAYS}
    found = {name: rest for name, *rest in part1.costs(ways, folder=folder)}
    kept = part1.memory(ways, folder=folder)
    counts = {"linear probing": 0} | TRAINED
    assert {name: trained for name, (trained, *_) in found.items()} == {
        name: n + HEAD for name, n in counts.items()
    }
    for name, (trained, _, size) in found.items():
        parts = kept[name]
        assert size == sum(parts.values()) and parts["gradients"] == 4 * trained
        assert parts["optimiser state"] == 8 * trained and parts["activations"] > 0
    work = {name: operations for name, (_, operations, _) in found.items()}
    assert work["linear probing"] < work["LayerNorm tuning"] < work["top two blocks"]
    assert 2 * work["LoRA"] < work["prompt tuning"]  # its gradient passes through all blocks
    plain = kept["linear probing"]["weights"]
    frozen = {"PiSSA": TRAINED["PiSSA"], "VeRA": 2 * 64 * SIZES["d"]}  # its start; the shared pair
    for name in TECHNIQUES:
        new = name not in ("top two blocks", "full fine-tuning")  # BitFit keeps what was there
        added = TRAINED[name] * new + frozen.get(name, 0)
        assert kept[name]["weights"] - plain == 4 * added


MERGED = "merged into plain layers: True, same outputs: True"
KEPT = "stays as it is: no plain layer computes the same"
BEFORE, NEW = "as before", "changed by its new tokens"
ALL = "q_proj, k_proj, v_proj, out_proj, norm1, fc1, fc2, norm2"
FACTS = {  # modules, their names, outputs at the start, after training
    "LoRA+": (4, "q_proj, v_proj", BEFORE, MERGED),
    "PiSSA": (4, "q_proj, v_proj", BEFORE, MERGED),
    "BitFit": (16, ALL, BEFORE, MERGED),
    "adapters": (4, "out_proj, fc2", BEFORE, KEPT),
    "prompt tuning": (1, "embed", NEW, KEPT),
    "prefix tuning": (2, "attention", NEW, KEPT),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_demonstration_says_what_holds(name, folder):
    model, facts = part2.demonstrate(name, 0, lr=1e-2, folder=folder)
    modules, ends, before, after = FACTS[name]
    counted, kept = count_parameters(model), len([*model.parameters(), *model.buffers()])
    begin, (X, y), test = part2.few(0, folder=folder)
    assert counted.trainable == TRAINED[name] + HEAD
    assert facts == [
        f"{name}: modules adapted: {modules} ({ends})",
        f"{counted}, {HEAD} of them in the head",
        f"outputs after injection, before training: {before}",
        f"frozen tensors that moved in training: 0 of {kept - len(trainable(model))}",
        "switched off, the base's outputs return exactly: True",
        f"after training: {after}",
        f"test rows right: {evaluate(model, *test).correct} of 120",
    ]
    with reproducible(0):
        part2.Train()(begin, X, y, technique=name, lr=1e-2)
    assert not moved(model, copied(begin)) and len(peft.adapters(model)) == modules


def frozen_weight(patch):
    fit = part2.Train.fit

    def clumsy(self, model, X, y, **options):
        fit(self, model, X, y, **options)
        model.encoder.blocks[4].attention.q_proj.base.weight.data += 0.1

    patch(part2.Train, "fit", clumsy)


def frozen_buffer(patch):
    injected = part2.Train.inject

    def count(model, *_):
        model.seen += model.training

    def inject(self, model, name):
        injected(self, model, name)
        model.register_buffer("seen", torch.zeros(1))
        model.register_forward_hook(count)

    patch(part2.Train, "inject", inject)


def other_start(patch):
    injected = part2.Train.inject

    def inject(self, model, name):
        injected(self, model, name)
        for adapter in peft.adapters(model).values():
            nn.init.normal_(adapter.lora_B)

    patch(part2.Train, "inject", inject)


def wrong_merge(patch):
    merge = peft.merge
    patch(peft, "merge", lambda model: merge(model) and model.head.bias.data.add_(1e-6))


def no_merge(patch):
    patch(peft, "merge", lambda model: None)


def no_switch(patch):
    patch(peft, "adapters_disabled", nullcontext)


WRONG = {  # what is broken, and the lines that say so
    frozen_weight: {3: "frozen tensors that moved in training: 1 of 101", 4: "exactly: False"},
    frozen_buffer: {3: "frozen tensors that moved in training: 1 of 102"},
    other_start: {2: "outputs after injection, before training: changed by its new tokens"},
    wrong_merge: {5: "after training: merged into plain layers: True, same outputs: False"},
    no_merge: {5: "after training: merged into plain layers: False, same outputs: True"},
    no_switch: {4: "switched off, the base's outputs return exactly: False"},
}


@pytest.mark.parametrize("broken", WRONG)
def test_a_demonstration_says_what_does_not_hold(broken, folder, monkeypatch):
    _, right = part2.demonstrate("LoRA", 0, lr=1e-2, folder=folder)
    broken(monkeypatch.setattr)
    _, facts = part2.demonstrate("LoRA", 0, lr=1e-2, folder=folder)
    for i, (fact, before) in enumerate(zip(facts[:6], right, strict=False)):
        if i in WRONG[broken]:
            assert WRONG[broken][i] in fact
        else:
            assert fact == before


def two_layers():
    with reproducible(0):
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        return model, torch.randn(7, 6), torch.arange(7) % 3


def test_operations_are_the_products_of_forward_and_backward():
    model, X, y = two_layers()
    low, high = 2 * 7 * 6 * 5, 2 * 7 * 5 * 3
    assert operations(model, X, y) == 2 * low + 3 * high  # no gradient of the input
    assert all(p.grad is None for p in model.parameters())
    freeze(model[2])
    assert operations(model, X, y) == 2 * low + 2 * high
    freeze(model)
    unfreeze(model[2])
    assert operations(model, X, y) == low + 2 * high
    freeze(model)
    unfreeze(model[2].bias)
    assert operations(model, X, y) == low + high
    inject.inject_lora(model, ["0"], r=2)
    of_A, of_B = 2 * 7 * 6 * 2, 2 * 7 * 2 * 5
    assert operations(model, X, y) == low + 2 * high + (of_A + of_B) + (of_A + 2 * of_B)


@pytest.mark.parametrize("tokens, layers", [(8, 2), (4, 1), (16, 1)])
def test_operations_count_attention(tokens, layers):
    with reproducible(0):
        model = TinyTransformer(n_tokens=tokens, patch=64 // tokens, n_layers=layers)
        X, y = torch.randn(5, 64), torch.arange(5)
    linear = layers * 2 * 5 * tokens * (4 * 32 * 32 + 2 * 32 * 64)
    embed, head = 2 * 5 * 64 * 32, 2 * 5 * 32 * 10
    product = layers * 2 * 5 * tokens * tokens * 32  # q k', or the weights times v
    whole = 3 * (linear + head) + 2 * embed + (2 + 5) * product
    assert operations(model, X, y) == whole
    freeze(model)
    unfreeze(model.head)
    assert operations(model, X, y) == linear + embed + 2 * head + 2 * product
    few = part2.technique(peft.inject_prefix, "attention", num_virtual_tokens=4)
    few(model, torch.Generator())
    freeze(model.blocks)
    longer = 2 * product * (tokens + 4) // tokens
    assert operations(model, X, y) == linear + embed + 2 * head + longer


def test_activation_bytes_are_exact_on_two_layers_and_none_below_a_probe():
    model, X, y = two_layers()
    hidden, logits = 7 * 5 * 8, 7 * 3 * 8 + 8  # log-softmax and its sum of weights
    assert costs.activation_bytes(model, X, y) == hidden + logits  # not the input
    freeze(model[0])  # the hidden units are the head's input
    assert costs.activation_bytes(model, X, y) == hidden + logits
    freeze(model)
    unfreeze(model[2].bias)
    assert costs.activation_bytes(model, X, y) == logits
    model = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 5).double(), nn.Flatten())
    assert costs.activation_bytes(model, X, y) == 7 * 15 * 8 + 8  # nor a view of it
    with reproducible(0):
        probe = TinyTransformer()
        freeze(probe)
        unfreeze(probe.head)
        rows = torch.randn(9, 64), torch.arange(9)
    assert costs.activation_bytes(probe, *rows) == 9 * 32 * 8 + 9 * 10 * 8 + 8


def test_step_memory_counts_what_is_trained_apart_from_what_is_there():
    names = ["weights", "gradients", "optimiser state", "activations"]
    assert costs.step_memory(3, 100, 50) == dict(zip(names, (800, 24, 48, 50), strict=True))
    found = costs.step_memory(3, 100, 50, weight=2, gradient=1, state=12)
    assert found == dict(zip(names, (200, 3, 36, 50), strict=True))


def test_weights_are_those_of_q_and_v_merged_and_the_model_stays(begin):
    base, _ = begin
    model = copy.deepcopy(base)
    part2.Train().inject(model, "LoRA")
    for adapter in peft.adapters(model).values():
        nn.init.normal_(adapter.lora_B)
    before, trained, found = copied(model), trainable(model), spectrum.weights(model)
    assert (
        not moved(model, before) and trainable(model) == trained and len(peft.adapters(model)) == 4
    )
    names = [f"encoder.blocks.{i}.attention.{name}" for i in (4, 5) for name in QV]
    assert list(found) == names == list(spectrum.weights(base))
    for name, W in found.items():
        adapter = model.get_submodule(name)
        expected = adapter.base.weight + 2 * adapter.lora_B @ adapter.lora_A
        assert torch.allclose(W, expected, atol=1e-12) and not W.requires_grad


def test_intruders_are_the_planted_new_directions_among_the_strongest():
    rng = torch.Generator().manual_seed(0)
    draw = torch.randn(16, 16, generator=rng, dtype=torch.float64)
    U, V = torch.linalg.qr(draw).Q, torch.linalg.qr(draw[:10, :10]).Q
    old, new = U[:, :10], U[:, 10:]
    strengths = torch.arange(10, 0, -1).double()
    W0 = old * strengths @ V.T
    assert spectrum.intruders(W0, W0) == 0
    for n in range(7):
        W = W0 + 50 * new[:, :n] @ V[:, 10 - n :].T
        assert spectrum.intruders(W, W0) == spectrum.intruders(0.01 * W, 7 * W0) == n
    assert spectrum.intruders(W0 + 50 * torch.outer(old[:, 9], V[:, 9]), W0) == 0  # the last one
    weak = (old * strengths)[:, :9] @ V[:, :9].T + 0.5 * new[:, :1] @ V[:, 9:].T  # the tenth
    assert spectrum.intruders(weak, W0) == 0 and spectrum.intruders(weak, W0, k=10) == 1
    for cosine, count in {0.59: 1, -0.59: 1, 0.61: 0, -0.61: 0}.items():
        mixed = cosine * old[:, 0] + (1 - cosine**2) ** 0.5 * new[:, 0]
        W = W0 + 20 * torch.outer(mixed, V[:, 0]) - 10 * torch.outer(old[:, 0], V[:, 0])
        assert spectrum.intruders(W, W0) == count
        assert spectrum.intruders(W, W0, threshold=0.5) == 0


def planted(monkeypatch, change):
    """Let training change nothing but each q and v weight W, to ``change(W)``."""

    def fit(self, model, X, y, **options):
        for i in TOP:
            for name in QV:
                layer = getattr(model.encoder.blocks[i].attention, name)
                layer.weight.data = change(layer.weight.data)

    monkeypatch.setattr(part2.Train, "fit", fit)


def test_the_spectrum_of_a_planted_update_has_its_share_size_and_intruders(folder, monkeypatch):
    study, rates = spectrum.update_spectrum, {"top two blocks": 1e-2}
    found = {}

    def of_rank(k, size):
        U, V = (torch.linalg.qr(torch.randn(D, k, dtype=torch.float64))[0] for _ in range(2))
        return lambda W: W + size * W.norm() * U @ V.T / k**0.5

    for k, size in ((1, 0.5), (8, 0.2), (16, 0.1)):  # all singular values alike
        planted(monkeypatch, of_rank(k, size))
        found[k] = [*study(0, rates=rates, folder=folder).values()]
        assert found[k][:2] == pytest.approx([min(100, 800 / k), 100 * size])
    planted(monkeypatch, lambda W: 1.25 * W)
    begin, *_ = part2.few(0, folder=folder)
    energies = [torch.linalg.svdvals(W) ** 2 for W in spectrum.weights(begin).values()]
    share = np.mean([(100 * e[:8].sum() / e.sum()).item() for e in energies])
    assert [*study(0, rates=rates, folder=folder).values()] == pytest.approx([share, 25, 0])
    change = of_rank(3, 20.0)
    planted(monkeypatch, change)
    several = study(0, rates=rates, folder=folder)
    assert list(several) == [f"top two blocks/{k}" for k in ("share", "size", "intruders")]
    counts = [spectrum.intruders(change(W), W) for W in spectrum.weights(begin).values()]
    assert several["top two blocks/intruders"] == np.mean(counts) > 2


def test_the_spectrum_is_a_function_of_the_seed_and_loras_is_in_eight_directions(folder):
    rates = {"LoRA": 1e-2, "VeRA": 0.3, "top two blocks": 1e-2}
    found = spectrum.update_spectrum(0, rates=rates, folder=folder)
    torch.manual_seed(1)
    back = dict(reversed(rates.items()))
    assert spectrum.update_spectrum(0, rates=back, folder=folder) == found
    assert found != spectrum.update_spectrum(1, rates=rates, folder=folder)
    assert found["LoRA/share"] == pytest.approx(100) and found["LoRA/size"] > 1
    assert 40 < found["top two blocks/share"] < 99


@pytest.mark.parametrize("name", ["BitFit", "LayerNorm tuning"])
def test_a_technique_that_leaves_the_weights_has_no_spectrum(name, folder):
    with pytest.raises(ValueError, match=f"'{name}' leaves 'encoder.blocks.4.attention.q_proj' as"):
        spectrum.update_spectrum(0, rates={name: 1e-2}, folder=folder)
