"""Part 3's studies: equal budgets and compute, what is forgotten, adapters combined, 4 bits."""

import copy

import numpy as np
import pytest
import torch

from helpers.models import TinyTransformer
from helpers.peft import arithmetic, dequantize, quantize, surgery
from helpers.study import (
    Summary,
    digits,
    part2,
    part3,
    part3_adapters,
    reproducible,
    stream,
    tuning,
)
from helpers.study.digits import samples
from helpers.study.part2 import prepare
from helpers.study.part3_adapters import linear_weights
from helpers.training import (
    count_parameters,
    evaluate,
    freeze,
    linear_probe,
    operations,
    train,
    unfreeze,
)
from tests.test_training import moved


@pytest.fixture(autouse=True)
def base(monkeypatch):
    """Return the model that stands for the pre-trained one: a few epochs on its seed's source."""
    with reproducible(0):
        model = TinyTransformer()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        train(model, *samples(0, "faint")["source"], optimizer=optimizer, epochs=3, batch_size=64)
    monkeypatch.setattr(digits, "pretrained", lambda seed: copy.deepcopy(model))
    return model


def lora(base, rows, *, seed):
    """Return the base with a LoRA of rank 4 after five steps under the frozen head."""
    model = prepare(base, part2.lora(*part2.LINEAR, r=4), seed=seed)
    freeze(model.head)
    list(part3.learn(model, rows, lr=1e-2, marks=[5]))
    return model


def norm(matrices):
    return np.linalg.norm([torch.linalg.norm(M.detach()) for M in matrices])


@pytest.mark.parametrize("budget", part3.BUDGETS)
def test_techniques_of_one_budget_train_about_as_many_parameters(budget, base):
    for name, way in part3.BUDGETS[budget].items():
        n = count_parameters(prepare(base, way)).trainable - 330
        exact = name in ("LoRA", "VeRA", "(IA)3", "BitFit", "LayerNorm tuning")
        assert n == budget if exact else 0.66 * budget <= n <= 1.02 * budget, f"{name}: {n}"


def test_equal_compute_is_what_full_fine_tuning_computes(base):
    ways = ("linear probing", "LoRA, 1,792", "VeRA, 1,792", "full fine-tuning, 17,920")
    found = part3.costs(
        epochs=7, configurations={n: part3.CONFIGURATIONS[n] for n in ways}, per_class=2
    )
    whole = found["full fine-tuning, 17,920"]
    assert whole.steps == 7
    head = found["linear probing"]
    for cost in found.values():
        assert cost.steps * cost.flops <= 7 * whole.flops
        most = (cost.steps + 1) * cost.flops > 7 * whole.flops
        assert most or cost.steps == 1 or cost is head
    assert head.steps == part3.ENOUGH and found["VeRA, 1,792"].steps < 7
    rows = samples(0, "turned", per_class=2)["few"]
    model = prepare(base, part3.CONFIGURATIONS["linear probing"])
    features = operations(model, *rows) - head.flops  # once, for all steps
    assert head.steps * head.flops + features < 40 * whole.flops
    assert found["LoRA, 1,792"].trained == 1_792 + 330
    assert found["linear probing"].memory < found["LoRA, 1,792"].memory < whole.memory


def test_a_batch_has_a_hundred_rows_and_an_epoch_all_of_them():
    way = {n: part3.CONFIGURATIONS[n] for n in ("LoRA, 1,792", "full fine-tuning, 17,920")}
    ten, fifty = (part3.costs(epochs=4, configurations=way, per_class=k) for k in (10, 50))
    assert fifty["full fine-tuning, 17,920"].steps == 5 * 4
    for name, cost in ten.items():
        assert fifty[name].flops == cost.flops and 0 <= fifty[name].steps - 5 * cost.steps < 5


def test_memory_counts_buffers_and_what_l2_sp_remembers(base):
    found = part3.costs(per_class=2)
    full, l2_sp = (found[f"{n}, 17,920"] for n in ("full fine-tuning", "L2-SP"))
    assert l2_sp.memory - full.memory == 2 * 8 * full.trained
    model = prepare(base, part3.CONFIGURATIONS["VeRA, 1,792"])
    buffers = 8 * sum(b.numel() for b in model.buffers())
    assert buffers > 100_000 and found["VeRA, 1,792"].memory > 8 * 18_026 + buffers


def test_linear_probing_on_cached_features_is_training_the_head_in_place(base):
    rows, found = samples(0, "turned", per_class=25)["few"], []
    for name in ("", "linear probing"):
        model = prepare(base, part3.CONFIGURATIONS["linear probing"])
        list(part3.learn(model, rows, lr=1e-2, marks=[9], name=name))
        found.append(model(rows[0]).detach())
    assert torch.allclose(*found, rtol=0, atol=1e-9) and not torch.allclose(found[0], base(rows[0]))


def test_costs_are_those_of_the_model(base):
    way = part3.CONFIGURATIONS["DoRA, 192"]
    [cost] = part3.costs(configurations={"DoRA, 192": way}, per_class=3).values()
    rows = samples(0, "turned", per_class=3)["few"]
    assert cost.flops == operations(prepare(base, way), *rows)


@pytest.mark.parametrize("name", ["", "L2-SP, 17,920", "LP-FT, 17,920"])
def test_a_pause_changes_nothing(name, base):
    rows = samples(0, "turned", per_class=2)["few"]
    found = []
    for marks in ([6], [1, 2, 6]):
        model = prepare(base, part3.CONFIGURATIONS[name or "LoRA, 192"])
        reached = list(part3.learn(model, rows, lr=1e-2, marks=marks, name=name))
        assert reached == marks
        found.append(model)
    assert moved(found[0], found[1].state_dict()) == []


def test_lp_ft_is_fine_tuning_from_a_probed_head(base):
    rows, found = samples(0, "turned", per_class=2)["few"], []
    probed = copy.deepcopy(base)
    linear_probe(probed, *rows, epochs=40, lr=1e-2)
    for start, name in ((base, "LP-FT, 17,920"), (probed, "full fine-tuning, 17,920")):
        model = prepare(start, part3.CONFIGURATIONS[name])
        list(part3.learn(model, rows, lr=1e-3, marks=[3], name=name))
        found.append(model)
    assert moved(found[0], found[1].state_dict()) == []


def test_more_than_a_hundred_rows_are_steps_of_a_hundred(base, monkeypatch):
    steps, kept = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a, **k: steps.append(1) or kept(*a, **k))
    rows = samples(0, "turned", per_class=25)["few"]  # 250 rows: three steps an epoch
    model = prepare(base, part3.CONFIGURATIONS["linear probing"])
    list(part3.learn(model, rows, lr=1e-2, marks=[6, 12]))
    assert len(steps) == 12


def test_l2_sp_stays_nearer_to_its_start(base):
    rows = samples(0, "turned", per_class=2)["few"]
    ways = {}
    for name in ("full fine-tuning, 17,920", "L2-SP, 17,920"):
        model = prepare(base, part3.CONFIGURATIONS[name])
        list(part3.learn(model, rows, lr=3e-3, marks=[20], name=name))
        start = dict(base.named_parameters())
        ways[name] = sum(
            float(((p - start[k]) ** 2).sum().detach()) for k, p in model.named_parameters()
        )
    assert ways["L2-SP, 17,920"] < 0.5 * ways["full fine-tuning, 17,920"]


def test_the_front_is_what_nothing_beats():
    points = {"a": (1, 50), "b": (2, 40), "c": (2, 60), "d": (3, 60), "e": (9, 61), "f": (1, 49)}
    points = {name: (cost, Summary(mean, 0, 0, 99, 9)) for name, (cost, mean) in points.items()}
    assert part3.pareto_front(points) == ["a", "c", "e"]


def test_scores_are_those_of_the_adapted_model_on_both_domains(base):
    settings = {"linear probing": (1e-2, 4), "from scratch, 17,920": (1e-3, 2)}
    found = part3.compare_budgets(0, target="turned", settings=settings, per_class=2)
    again = part3.compare_budgets(0, target="turned", settings=settings, per_class=2)
    assert found == again
    tuning = {"target": "turned", "settings": settings, "score_on": "validation"}
    tried = part3.compare_budgets(0, **tuning, per_class=2)
    assert tried.keys() == settings.keys() | {"margin"}
    rows = samples(0, "turned", per_class=2)
    with reproducible(0):
        fresh = TinyTransformer()
    for (name, (lr, steps)), start in zip(settings.items(), (base, fresh), strict=True):
        model = prepare(start, part3.CONFIGURATIONS[name], seed=0)
        list(part3.learn(model, rows["few"], lr=lr, marks=[steps]))
        splits = ("test", "source test", "validation")
        scores = [100 * evaluate(model, *rows[split]).accuracy for split in splits]
        assert [found[name], found[f"{name}/source"], tried[name]] == scores
    before = evaluate(base, *rows["source test"]).accuracy
    assert found["not adapted/source"] == 100 * before != found["from scratch, 17,920/source"]


def test_settings_are_chosen_on_validation_images_alone(monkeypatch):
    seen = []

    def found(run, seeds, workers):
        seen.append(run.keywords)
        return GOOD

    monkeypatch.setattr(tuning, "run_seeds", found)
    GOOD = {
        f"{name}, {lr:g}, {n}": np.array([50.0, 52.0])
        for name, marks in {"LoRA, 192": (4, 8), "linear probing": (2, 10, 50, 100)}.items()
        for lr in part3.rates_for(name)
        for n in marks
    }
    GOOD["LoRA, 192, 0.01, 4"] = GOOD["LoRA, 192, 0.03, 4"] = np.array([60.0, 62.0])
    GOOD["margin"] = np.array([1.0, 2.0])
    steps = {"LoRA, 192": 8, "linear probing": 100}
    chosen, margins = part3.choose_settings("turned", [1, 2], steps=steps, per_class=2)
    # of equals, the lower rate and the fewer steps
    assert chosen == {"LoRA, 192": (1e-2, 4), "linear probing": (3e-3, 2)}
    grid = {"LoRA, 192": (part3.RATES[3:], [4, 8])}
    grid["linear probing"] = part3.RATES[2:5], [2, 10, 50, 100]
    options = {"target": "turned", "settings": grid, "score_on": "validation", "per_class": 2}
    assert margins.tolist() == [1.0, 2.0] and seen == [options]
    chosen, margins = part3.choose_settings("turned", [], steps={"LoRA, 192": 8})
    assert chosen == {"LoRA, 192": (3e-2, 8)} and margins == [] and len(seen) == 1


def test_several_settings_are_scored_as_one_by_one(base):
    name, tuning = "LoRA, 1,792", {"target": "turned", "score_on": "validation", "per_class": 2}
    many = part3.compare_budgets(0, settings={name: ((1e-2, 1e-3), (2, 5))}, **tuning)
    tried = [(1e-2, 2), (1e-2, 5), (1e-3, 2), (1e-3, 5)]
    assert list(many) == [*(f"{name}, {lr:g}, {n}" for lr, n in tried), "margin"]
    for lr in (1e-2, 1e-3):
        one = part3.compare_budgets(0, settings={name: (lr, 5)}, **tuning)
        assert one[name] == many[f"{name}, {lr:g}, 5"]


def test_rates_are_neighbours_and_the_more_moves_the_lower_they_are():
    every = part3.CONFIGURATIONS | part3.FOUR_BIT
    for name in every:
        rates = part3.rates_for(name)
        start = part3.RATES.index(rates[0])
        assert rates == part3.RATES[start : start + len(rates)] and len(rates) >= 3
    lowest = {name: part3.rates_for(name)[0] for name in every}
    assert lowest["full fine-tuning, 17,920"] < lowest["LoRA, 1,792"] < lowest["LoRA, 192"]
    assert {lowest[name] for name in part3.FOUR_BIT} == {lowest["LoRA, 1,792"]}


def test_an_adapter_each_forgets_nothing_and_one_set_of_weights_is_one_model():
    rates = {"LoRA": 1e-2, "full fine-tuning": 3e-3}
    tasks = ("faint", "turned")
    found = part3_adapters.learn_in_turn(0, rates=rates, tasks=tasks, steps=8, per_class=3)
    for j in range(3):
        column = [found[f"a LoRA each/{i}/{j}"] for i in range(3)]
        assert column[j:] == [column[j]] * (3 - j)  # once learned it stays
        starts = {found[f"{way}/0/{j}"] for way in ("one set of weights", "one LoRA")}
        assert starts == {column[0]}  # all ways start from the pre-trained model
    assert found["a LoRA each/1/1"] == found["one LoRA/1/1"]  # the first task's is the same LoRA
    alone = part3_adapters.learn_in_turn(0, rates=rates, tasks=("turned",), steps=8, per_class=3)
    assert found["a LoRA each/2/2"] == alone["a LoRA each/1/1"]  # it starts anew
    assert found["one LoRA/2/2"] not in (found["one LoRA/0/2"], alone["one LoRA/1/1"])


def test_before_the_first_task_the_pre_trained_model_is_scored_on_test_images(base):
    found = part3_adapters.learn_in_turn(
        0, rates={"LoRA": 1e-2, "full fine-tuning": 3e-3}, tasks=("faint",), steps=1, per_class=1
    )
    rows = samples(0, "faint")
    for j, split in enumerate(("source test", "test")):
        assert found[f"one LoRA/0/{j}"] == 100 * evaluate(base, *rows[split]).accuracy


def test_combinations_are_scored_and_what_averaging_factors_misses_is_measured(base):
    found = part3_adapters.combine_adapters(
        0, lr=1e-2, tasks=("faint", "turned"), steps=5, per_class=2
    )
    rows = {task: samples(0, task, per_class=2) for task in ("faint", "turned")}
    faint, turned = (
        lora(base, part["few"], seed=stream(0, f"adapter {i}"))
        for i, part in enumerate(rows.values())
    )
    deltas = [arithmetic.delta_weights(model) for model in (faint, turned)]
    mean = {k: (deltas[0][k] + deltas[1][k]) / 2 for k in deltas[0]}
    pairs = zip(*(surgery.adapters(model).values() for model in (faint, turned)), strict=True)
    wrong = {  # s = 2, from halves of two sums
        k: 2 / 4 * (a.lora_B + b.lora_B) @ (a.lora_A + b.lora_A)
        for k, (a, b) in zip(mean, pairs, strict=True)
    }
    models = {
        "base": base,
        "adapter of faint": faint,
        "adapter of turned": turned,
        "sum": arithmetic.add(arithmetic.add(base, deltas[0]), deltas[1]),
        "mean": arithmetic.add(base, mean),
        "mean of A, of B": arithmetic.add(base, wrong),
        "TIES": arithmetic.add(base, arithmetic.ties(deltas)),
    }
    tests = {"source": rows["faint"]["source test"]} | {t: rows[t]["test"] for t in rows}
    for name, model in models.items():
        for domain, test in tests.items():
            assert found[f"{name}/{domain}"] == 100 * evaluate(model, *test).accuracy
    off = norm(wrong[k] - mean[k] for k in mean)
    assert found["distance"] == pytest.approx(100 * off / norm(mean.values()))
    assert 10 < found["distance"] < 100  # two random A have little in common


def test_what_is_subtracted_was_learned_from_source_images_of_the_digit(base):
    found = part3_adapters.forget_digit(3, lr=1e-2, scales=(0.5, 1.0), steps=5, per_class=5)
    rows = samples(3, "turned")
    X, y = rows["source"]
    delta = arithmetic.delta_weights(lora(base, (X[y == 3][:5], y[y == 3][:5]), seed=3))
    X, y = rows["source test"]
    for scale in (0, 0.5, 1):
        less = arithmetic.add(base, delta, scale=-scale)
        for part, on in {"digit": y == 3, "others": y != 3}.items():
            assert found[f"{scale:g}/{part}"] == 100 * evaluate(less, X[on], y[on]).accuracy
    assert found["1/digit"] < found["0/digit"]


def test_loftq_starts_nearer_to_the_weights_than_codes_alone():
    found = part3_adapters.quantization_cost(0)
    assert 0 < found["LoftQ, NF4/error"] < 0.9 * found["NF4/error"]


def test_each_code_costs_what_rounding_the_weights_to_it_costs(base):
    found, weights = part3_adapters.quantization_cost(0), linear_weights(base)
    for name in ("NF4", "int4"):
        near = {k: dequantize(quantize(W, code=name.lower())) for k, W in weights.items()}
        error = 100 * norm(near[k] - W for k, W in weights.items()) / norm(weights.values())
        assert found[f"{name}/error"] == pytest.approx(error)
        start = linear_weights(prepare(base, part3.FOUR_BIT[f"QLoRA, {name}"]))
        assert all(torch.allclose(start[k], near[k]) for k in weights)
    test = samples(0, "turned")["source test"]
    assert found["full precision/accuracy"] == 100 * evaluate(base, *test).accuracy


@pytest.mark.parametrize("name", part3.FOUR_BIT)
def test_four_bit_ways_train_as_many_parameters_as_lora(name, base):
    model = prepare(base, part3.FOUR_BIT[name])
    assert count_parameters(model).trainable == 1_792 + 330
    unfreeze(model)
    assert count_parameters(model).trainable < 8_000  # codes are no parameters
