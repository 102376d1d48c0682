"""Part 3's studies: equal budgets and compute, what is forgotten, adapters combined, 4 bits."""

import copy

import numpy as np
import pytest
import torch

from helpers import practice
from helpers.freezing import count_parameters, unfreeze
from helpers.models import TinyTransformer
from helpers.study import reproducible
from helpers.techniques import operations, prepare, samples
from helpers.training import evaluate, train
from tests.test_training import moved


@pytest.fixture(autouse=True)
def base(monkeypatch):
    """Return the model that stands for the pre-trained one: a few epochs on its seed's source."""
    with reproducible(0):
        model = TinyTransformer()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        train(model, *samples(0, "faint")["source"], optimizer=optimizer, epochs=3, batch_size=64)
    monkeypatch.setattr(practice, "pretrained", lambda seed: copy.deepcopy(model))
    return model


@pytest.mark.parametrize("budget", practice.BUDGETS)
def test_techniques_of_one_budget_train_about_as_many_parameters(budget, base):
    for name, way in practice.BUDGETS[budget].items():
        n = count_parameters(prepare(base, way)).trainable - 330
        exact = name in ("LoRA", "VeRA", "(IA)3", "BitFit", "LayerNorm tuning")
        assert n == budget if exact else 0.66 * budget <= n <= 1.02 * budget, f"{name}: {n}"


def test_equal_compute_is_what_full_fine_tuning_computes():
    ways = ("linear probing", "LoRA, 1,792", "VeRA, 1,792", "full fine-tuning, 17,920")
    found = practice.costs(
        epochs=7, configurations={n: practice.CONFIGURATIONS[n] for n in ways}, per_class=2
    )
    whole = found["full fine-tuning, 17,920"]
    assert whole.steps == 7
    for cost in found.values():
        assert cost.steps * cost.flops <= 7 * whole.flops
        assert cost.steps == 1 or (cost.steps + 1) * cost.flops > 7 * whole.flops
    assert found["linear probing"].steps > 7 > found["VeRA, 1,792"].steps
    assert found["LoRA, 1,792"].trained == 1_792 + 330
    assert found["linear probing"].memory < found["LoRA, 1,792"].memory < whole.memory


def test_costs_are_those_of_the_model(base):
    way = practice.CONFIGURATIONS["DoRA, 192"]
    [cost] = practice.costs(configurations={"DoRA, 192": way}, per_class=3).values()
    rows = samples(0, "turned", per_class=3)["few"]
    assert cost.flops == operations(prepare(base, way), *rows)


@pytest.mark.parametrize("name", ["", "L2-SP, 17,920", "LP-FT, 17,920"])
def test_a_pause_changes_nothing(name, base):
    rows = samples(0, "turned", per_class=2)["few"]
    found = []
    for marks in ([6], [1, 2, 6]):
        model = prepare(base, practice.CONFIGURATIONS[name or "LoRA, 192"])
        reached = list(practice.learn(model, rows, lr=1e-2, marks=marks, name=name))
        assert reached == marks
        found.append(model)
    assert moved(*found[:1], {k: p.clone() for k, p in found[1].named_parameters()}) == []


def test_more_than_a_hundred_rows_are_steps_of_a_hundred(base, monkeypatch):
    steps, kept = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: steps.append(1) or kept(*a, **k))
    rows = samples(0, "turned", per_class=25)["few"]  # 250 rows: three steps an epoch
    model = prepare(base, practice.CONFIGURATIONS["linear probing"])
    list(practice.learn(model, rows, lr=1e-2, marks=[6, 12]))
    assert len(steps) == 12


def test_l2_sp_stays_nearer_to_its_start(base):
    rows = samples(0, "turned", per_class=2)["few"]
    ways = {}
    for name in ("full fine-tuning, 17,920", "L2-SP, 17,920"):
        model = prepare(base, practice.CONFIGURATIONS[name])
        list(practice.learn(model, rows, lr=3e-3, marks=[20], name=name))
        start = dict(base.named_parameters())
        ways[name] = sum(
            float(((p - start[k]) ** 2).sum().detach()) for k, p in model.named_parameters()
        )
    assert ways["L2-SP, 17,920"] < 0.5 * ways["full fine-tuning, 17,920"]


def test_the_front_is_what_nothing_beats():
    points = {"a": (1, 50), "b": (2, 40), "c": (2, 60), "d": (3, 60), "e": (9, 61), "f": (1, 49)}
    assert practice.pareto_front(points) == ["a", "c", "e"]


def test_scores_are_those_of_the_adapted_model_on_both_domains(base):
    settings = {"linear probing": [(1e-2, [4])], "from scratch, 17,920": [(1e-3, [2])]}
    found = practice.compare_budgets(0, target="turned", settings=settings, per_class=2)
    again = practice.compare_budgets(0, target="turned", settings=settings, per_class=2)
    assert found == again
    rows = samples(0, "turned", per_class=2)
    model = prepare(base, practice.CONFIGURATIONS["linear probing"], seed=0)
    list(practice.learn(model, rows["few"], lr=1e-2, marks=[4]))
    assert found["linear probing"] == 100 * evaluate(model, *rows["test"]).accuracy
    kept = evaluate(model, *rows["source test"]).accuracy
    assert found["linear probing/source"] == 100 * kept
    before = evaluate(base, *rows["source test"]).accuracy
    assert found["not adapted/source"] == 100 * before != found["from scratch, 17,920/source"]


def test_settings_are_chosen_on_validation_images_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(practice, "run_seeds", lambda run, seeds, workers: seen.append(run) or GOOD)
    GOOD = {
        f"LoRA, 192, {lr:g}, {n}": np.array([50.0, 52.0]) for lr in practice.HIGH for n in (4, 8)
    }
    GOOD["LoRA, 192, 0.01, 4"] = GOOD["LoRA, 192, 0.03, 4"] = np.array([60.0, 62.0])
    GOOD["margin"] = np.array([1.0, 2.0])
    chosen, margins = practice.choose_settings("turned", [1, 2], steps={"LoRA, 192": 8})
    assert chosen == {"LoRA, 192": [(1e-2, [4])]}  # of equals, the lower rate
    assert margins.tolist() == [1.0, 2.0]
    assert seen[0].keywords["score_on"] == "validation"
    chosen, margins = practice.choose_settings("turned", [], steps={"LoRA, 192": 8})
    assert chosen == {"LoRA, 192": [(1e-2, [8])]} and margins == [] and len(seen) == 1


def test_an_adapter_each_forgets_nothing_and_one_set_of_weights_is_one_model():
    rates = {"LoRA": 1e-2, "full fine-tuning": 3e-3}
    tasks = ("faint", "turned")
    found = practice.learn_in_turn(0, rates=rates, tasks=tasks, steps=8, per_class=3)
    for j in range(3):
        column = [found[f"a LoRA each/{i}/{j}"] for i in range(3)]
        assert column[j:] == [column[j]] * (3 - j)  # once learned it stays
        starts = {found[f"{way}/0/{j}"] for way in ("one set of weights", "one LoRA")}
        assert starts == {column[0]}  # all ways start from the pre-trained model
    assert found["a LoRA each/1/1"] == found["one LoRA/1/1"]  # the first task's is the same LoRA
    assert found["one LoRA/2/2"] != found["one LoRA/0/2"]


def test_combinations_are_scored_and_the_cross_term_is_measured(base):
    found = practice.combine_adapters(0, lr=1e-2, tasks=("faint", "turned"), steps=5, per_class=2)
    rows = samples(0, "faint", per_class=2)
    assert found["base/source"] == 100 * evaluate(base, *rows["source test"]).accuracy
    kinds = {key.split("/")[0] for key in found if "/" in key}
    assert kinds >= {"sum", "mean", "mean of A, of B", "TIES", "adapter of faint"}
    assert 10 < found["cross term"] < 100  # two random A have little in common


def test_nothing_subtracted_is_the_base(base):
    found = practice.forget_digit(3, lr=1e-2, scales=(1.0,), steps=5, per_class=5)
    X, y = samples(3, "turned")["source test"]
    of_three = y == 3
    assert found["0/digit"] == 100 * evaluate(base, X[of_three], y[of_three]).accuracy
    assert found["0/others"] == 100 * evaluate(base, X[~of_three], y[~of_three]).accuracy
    assert found["1/digit"] < found["0/digit"]


def test_loftq_starts_nearer_to_the_weights_than_codes_alone():
    found = practice.quantization_cost(0)
    assert 0 < found["LoftQ, NF4/error"] < 0.9 * found["NF4/error"]
    assert found["int4/error"] > 1 and "full precision/accuracy" in found


@pytest.mark.parametrize("name", practice.FOUR_BIT)
def test_four_bit_ways_train_as_many_parameters_as_lora(name, base):
    model = prepare(base, practice.FOUR_BIT[name])
    assert count_parameters(model).trainable == 1_792 + 330
    unfreeze(model)
    assert count_parameters(model).trainable < 8_000  # codes are no parameters
