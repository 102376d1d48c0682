"""Part 3's studies on a small encoder: several tasks, four bits, equal budgets."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from helpers import models, peft, training
from helpers.study import part1, part2, part3, part3_adapters, reproducible, run_seeds
from helpers.study.part3 import BUDGETS, CELLS, LORA, RATES
from helpers.study.part3_adapters import LORA_EACH, TASKS
from tests.small import Traced

KIND, TOPIC, LIBRARY = TASKS
FIT = [LORA, "OFT, 24,576", "prefix tuning, 24,576", "v alone, whole, 294,912"]  # at width 32
DOUBLED = {name: rates[0] for name, rates in RATES.items() if name in FIT}


@pytest.fixture
def double():
    with reproducible(0):
        yield


@pytest.fixture(scope="module")
def found(folder):
    return part3_adapters.several_tasks(1, steps=8, folder=folder)


@pytest.fixture(scope="module")
def apart(folder):
    """Return the untouched model and three LoRAs, as the study of several tasks trains them."""
    return part3_adapters.separate(1, steps=8, folder=folder)


def numbers(tokens):
    return set((tokens["ids"][:, 1] - 1000).tolist())  # of Traced


def test_no_story_is_in_two_sets_of_rows(folder, monkeypatch):
    Traced(monkeypatch)
    for seed in range(3):
        rows = part3_adapters.task_rows(seed, folder=folder)
        stories = [numbers(X) for task in (KIND, TOPIC) for X, _ in rows[task].values()]
        sentences = [numbers(X) for X, _ in rows[LIBRARY].values()]
        for sets, n in ((stories, 2 * (40 + 50)), (sentences, 48 + 48)):
            assert len(set.union(*sets)) == sum(map(len, sets)) == n


def test_kinds_are_headlines_and_openings_of_all_topics(folder):
    X, y = part3_adapters.task_rows(0, folder=folder)[KIND]["test"]
    assert y.tolist() == [0] * 25 + [1] * 25
    for kind, texts in enumerate(("headlines", "articles")):
        tokens = part1.start(texts, folder)[1]
        there = {tuple(ids[mask == 1].tolist()) for ids, mask in zip(*tokens.values(), strict=True)}
        cut = [
            ids[m == 1].tolist()
            for ids, m in zip(*(X[k][y == kind] for k in ("ids", "mask")), strict=True)
        ]
        assert all(tuple(row) in there for row in cut)


def test_a_lora_each_forgets_nothing_and_one_lora_starts_as_the_first_of_them(found):
    for j, task in enumerate(TASKS, 1):
        column = [found[f"{LORA_EACH}/{i}/{task}"] for i in range(j, 4)]
        assert column == column[:1] * len(column)
        assert f"one LoRA/{j - 1}/{task}" not in found  # no head has learned yet
    assert found[f"{LORA_EACH}/1/{KIND}"] == found[f"one LoRA/1/{KIND}"]
    ends = [[found[f"{way}/3/{task}"] for task in TASKS] for way in (LORA_EACH, "one LoRA")]
    assert ends[0] != ends[1]  # which has gone on learning


def test_scores_are_those_of_the_models_that_were_taught(found, apart, folder):
    base, taught, tests = apart
    with reproducible(1):
        _, _, heads = part3_adapters.begin(1, folder=folder)
    for task, model in taught.items():
        right = 100 * training.evaluate(model, *tests[task]).accuracy
        assert found[f"{LORA_EACH}/3/{task}"] == right
        model = copy.deepcopy(base)
        model.head = heads[task]
        right = 100 * training.evaluate(model, *tests[task]).accuracy
        assert found[f"linear probing/{task}"] == right


def test_a_seed_gives_the_same_numbers_again(found, folder):
    assert part3_adapters.several_tasks(1, steps=8, folder=folder) == found


def updates(apart):
    """Return the updates of three LoRAs, and what `combinations` makes of them."""
    base, taught, _ = apart
    states = {task: peft.adapter_state(model) for task, model in taught.items()}
    model = part3_adapters.adapted(base, LORA_EACH, seed=0)
    each = [peft.delta_weights(model) for model in taught.values()]
    return each, part3_adapters.combinations(model, states)


def test_the_sum_of_updates_is_one_lora_of_their_ranks_together(apart):
    base, taught, tests = apart
    _, made = updates(apart)
    model = part3_adapters.adapted(base, LORA_EACH, seed=0)
    for name, lora in peft.adapters(model).items():
        parts = [peft.adapters(other)[name] for other in taught.values()]
        lora.lora_A = nn.Parameter(torch.cat([p.lora_A for p in parts]))
        lora.lora_B = nn.Parameter(torch.cat([p.lora_B for p in parts], 1))
    summed = peft.add(base, made["sum"])
    for task, (X, _) in tests.items():
        model.head = summed.head = taught[task].head
        gap = training.predict(model, X) - training.predict(summed, X)
        assert gap.abs().max() < 1e-10
        summed.head, apart_from = taught[task].head, training.predict(taught[task], X)
        assert (training.predict(summed, X) - apart_from).abs().max() > 1e-4


def test_combinations_are_what_they_are_called(apart, found):
    each, made = updates(apart)
    base, taught, tests = apart
    off, whole = 0.0, 0.0
    for name in each[0]:
        parts = [update[name] for update in each]
        assert torch.allclose(made["mean"][name], sum(parts) / 3, atol=1e-12)
        for task, part in zip(TASKS, parts, strict=True):
            assert torch.equal(made[f"minus {task}"][name], -part)
        layers = [peft.adapters(m)[name.removesuffix(".weight")] for m in taught.values()]
        A, B = (sum(getattr(a, factor) for a in layers) / 3 for factor in ("lora_A", "lora_B"))
        wrong = 2 * B @ A
        assert torch.allclose(made["mean of A, of B"][name], wrong, atol=1e-12)
        off += float(((wrong - sum(parts) / 3) ** 2).sum().detach())
        whole += float(((sum(parts) / 3) ** 2).sum())
    assert found["distance"] == pytest.approx(100 * (off / whole) ** 0.5)
    for name, vector in made.items():
        model = peft.add(base, vector)
        for task, (X, y) in tests.items():
            model.head = taught[task].head
            assert found[f"{name}/{task}"] == 100 * training.evaluate(model, X, y).accuracy


def test_a_mixed_batch_on_the_encoder_is_as_row_by_row(apart):
    base, taught, tests = apart
    mixed = peft.MixedBatch(base.encoder, {task: m.encoder for task, m in taught.items()})
    parts = [{k: t[:5] for k, t in tests[task][0].items()} for task in TASKS]
    X = part3_adapters._joined(part3_adapters._joined(*parts[:2]), parts[2])
    owners = [task for task in TASKS for _ in range(5)]
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0)).tolist()
    names = [owners[i] for i in order]
    together = mixed(X["ids"][order], names, mask=X["mask"][order])
    for i, task, row in zip(order, names, together, strict=True):
        there = X["mask"][i] == 1
        alone, other = (
            taught[name].encoder(X["ids"][[i]], X["mask"][[i]])[0, there]
            for name in (task, TASKS[TASKS.index(task) - 1])
        )
        assert (alone - row[there]).abs().max() < 1e-10 < (other - row[there]).abs().max()


def test_what_is_below_the_blocks_that_learn_is_shared_and_stays(apart):
    base, taught, _ = apart
    for model in taught.values():
        assert model.encoder.embed is base.encoder.embed
        assert model.encoder.blocks[3] is base.encoder.blocks[3]
        assert model.encoder.blocks[4] is not base.encoder.blocks[4]
    assert not peft.adapters(base)


def test_each_code_has_the_smaller_error_on_its_own_distribution(folder, double):
    error = {name: part3_adapters.rounding_error(name, folder=folder) for name in ("NF4", "int4")}
    assert error["int4"] < error["NF4"]  # torch draws linear layers uniformly
    assert part3_adapters.rounding_error("full precision", folder=folder) == 0
    real = {name: part3_adapters.rounding_error(name) for name in ("NF4", "int4")}
    assert real == pytest.approx({"NF4": 9.4, "int4": 11.5}, abs=0.05)


def test_errors_are_those_of_rounding_each_matrix(folder, double):
    full = part1.start("headlines", folder)[0]
    weights = {n: m.weight for n, m in full.named_modules() if type(m) is nn.Linear}
    assert len(weights) == 36
    near = {n: peft.dequantize(peft.quantize(W, code="int4")) for n, W in weights.items()}
    off = sum(float(((near[n] - W) ** 2).sum()) for n, W in weights.items())
    whole = sum(float((W**2).sum()) for W in weights.values())
    expected = 100 * (off / whole) ** 0.5
    assert part3_adapters.rounding_error("int4", folder=folder) == pytest.approx(expected)


def test_loftq_starts_nearer_where_it_puts_a_lora_and_is_nf4_elsewhere(folder):
    error = partial(part3_adapters.rounding_error, folder=folder)
    assert 0 < error("LoftQ", adapted=True) < 0.9 * error("NF4", adapted=True)
    loftq, nf4 = (part3_adapters.base_of(name, folder) for name in ("LoftQ", "NF4"))
    found = peft.adapters(loftq)
    assert [*found] == part2.within(nf4, ["q_proj", "v_proj"], part2.TOP)
    for name, there in nf4.named_modules():
        if isinstance(there, peft.QuantizedLinear) and name not in found:
            assert torch.equal(there.weight, loftq.get_submodule(name).weight)


def test_retrieval_is_scored_on_the_base_in_its_own_precision(folder, double):
    rows = {
        name: part3_adapters.retrieval(name, pairs=3, folder=folder) for name in ("NF4", "int4")
    }
    assert {score.n for score in rows.values()} == {15}
    assert rows["NF4"].loss != rows["int4"].loss
    full = part3_adapters.retrieval("full precision", pairs=12, folder=folder)
    assert full.n == len(part1.pairs(folder)[0].flatten())


def test_four_bit_trains_on_the_quantised_base_and_leaves_it(folder, monkeypatch):
    before = copy.deepcopy(part3_adapters.base_of("LoftQ", folder).state_dict())
    seen, kept = [], part2.Train.fit
    monkeypatch.setattr(
        part2.Train, "fit", lambda self, m, *a, **k: seen.append(m) or kept(self, m, *a, **k)
    )
    found = part3_adapters.four_bit(0, lr=0.1, folder=folder)
    assert found.keys() - {"margin"} == {
        *("LoRA", "QLoRA", "LoftQ"),
        *(f"linear probing, {base}" for base in ("full precision", "NF4", "LoftQ")),
    }
    loftq = seen[-1]
    assert [sum(type(m) is peft.QuantizedLinear for m in s.modules()) for s in seen] == [0, 36, 36]
    for model in seen:
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n in trained if ".lora_" in n} | {"head.weight", "head.bias"}
        assert len(trained) == 2 * 4 + 2
    after = part3_adapters.base_of("LoftQ", folder).state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    moved = loftq.encoder.state_dict()
    assert {n for n, t in before.items() if not torch.equal(t, moved[n])} == {
        n for n in before if ".lora_" in n
    }


def test_on_the_full_base_it_is_part_2s_lora(folder):
    found = part3_adapters.four_bit(3, lr=0.5, folder=folder)
    page = part2.page(3, texts="headlines", rates={"LoRA": 0.5}, told=0, folder=folder)
    names = {"LoRA": "LoRA", "linear probing, full precision": "linear probing"}
    assert {ours: found[ours] for ours in names} == {o: page[name] for o, name in names.items()}
    assert found["LoRA"] != found["QLoRA"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_techniques_of_one_budget_train_about_as_many_parameters(budget):
    encoder = models.Encoder(vocab=30, d=384, n_layers=6, n_heads=12, d_ff=1536, positions=8)
    assert len(BUDGETS[budget]) >= 3
    for name, way in BUDGETS[budget].items():
        model = models.TextClassifier(copy.deepcopy(encoder), 5)
        training.freeze(model)
        way(model, torch.Generator().manual_seed(0))
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(n.startswith(("encoder.blocks.4.", "encoder.blocks.5.")) for n in names), name
        n = training.count_parameters(model).trainable
        assert abs(n - budget) <= 0.15 * budget, f"{name}: {n:,}"


def test_every_cell_has_two_rates_and_the_more_it_trains_the_lower_they_are():
    assert RATES.keys() == CELLS.keys() and all(len(rates) == 2 for rates in RATES.values())
    for sizes in ("3,072", "24,576"), ("24,576", "294,912"):
        for name in ("LoRA", "OFT", "adapters", "prefix tuning"):
            pair = [RATES[f"{name}, {size}"] for size in sizes if f"{name}, {size}" in RATES]
            assert len(pair) < 2 or all(a > b for a, b in zip(*pair, strict=True))


def test_all_cells_get_the_operations_of_loras_steps(folder, monkeypatch):
    monkeypatch.setattr(part3, "CELLS", {name: CELLS[name] for name in FIT})
    for steps in (12, 30):
        found = part3.costs(steps=steps, folder=folder)
        assert list(found) == FIT and found[LORA].steps == steps
        most = steps * found[LORA].operations
        for name, cost in found.items():
            assert abs(cost.steps * cost.operations - most) <= 0.1 * most, name
    d = part1.start("headlines", folder)[0].d
    assert found[LORA].trained == 2 * 2 * 8 * 2 * d  # besides the head
    assert found["v alone, whole, 294,912"].trained == 2 * d * (d + 1)


@pytest.mark.parametrize("n, steps, batch", [(40, 12, 16), (48, 3, 8), (5, 2, 16)])
def test_rows_come_equally_often_and_steps_are_counted(n, steps, batch, monkeypatch, double):
    seen, kept = [], training.fit
    monkeypatch.setattr(training, "fit", lambda m, X, y, **k: seen.append(y) or kept(m, X, y, **k))
    counted, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a: counted.append(1) or step(*a))
    X, y = {"x": torch.randn(n, 4)}, torch.arange(n)

    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    part3.learn(Named(4, n), X, y, lr=1e-3, steps=steps, batch=batch)
    often = seen[0].bincount(minlength=n)
    assert len(counted) == steps and len(seen[0]) == steps * batch
    assert often.max() - often.min() <= 1


def equal_budgets(steps, folder):
    """Return what notebook 3 runs for each seed, with as many steps for each technique."""
    train = part3.Train(dict.fromkeys(FIT, steps))
    return partial(part2.page, texts="headlines", train=train, told=0, folder=folder)


def test_equal_budgets_are_scored_as_trained_one_by_one(folder):
    study = equal_budgets(2, folder)
    many = study(0, rates=DOUBLED)
    assert many.keys() == {*FIT, "zero labels", "linear probing", "margin"}
    for name in (LORA, "v alone, whole, 294,912"):
        one = study(0, rates={name: DOUBLED[name]})
        assert one[name] == many[name] and one["linear probing"] == many["linear probing"]
    longer = equal_budgets(9, folder)(0, rates=DOUBLED)
    assert longer["linear probing"] == many["linear probing"]
    assert any(longer[name] != many[name] for name in FIT)


def test_rates_are_chosen_on_rows_that_nothing_else_scores_or_trains_on(folder, monkeypatch):
    traced, rates = Traced(monkeypatch), {LORA: (1e-3, 1e-1)}
    options = {"train": part3.Train({LORA: 1}), "workers": 1, "folder": folder}
    chosen, _, margin = part2.try_rates("headlines", [7, 8], rates=rates, **options)
    assert chosen.keys() == rates.keys() and len(margin) == 2
    tuned = traced.trained | traced.scored
    assert len(tuned) > 100 and traced.unknown == traced.named  # by names, without labels
    for seen in (traced.trained, traced.scored):
        seen.clear()
    for seed in range(3):
        equal_budgets(1, folder)(seed, rates=DOUBLED)
    assert len(traced.scored) > 100 and not tuned & (traced.trained | traced.scored)


@pytest.mark.parametrize("name", ["four bits", "budgets"])
def test_seeds_give_the_same_numbers_in_any_process(name, folder):
    study = {
        "four bits": partial(part3_adapters.four_bit, folder=folder),
        "budgets": partial(equal_budgets(1, folder), rates=DOUBLED),
    }[name]
    here, there = (run_seeds(study, [3, 4], workers=workers) for workers in (1, 2))
    assert here.keys() == there.keys()
    assert all((here[key] == there[key]).all() for key in here)
    assert any(here[key][0] != here[key][1] for key in here if key != "margin")
