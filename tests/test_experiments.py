"""Part 1's studies: functions of their seed that never score what they trained on."""

import copy
import json
import os
import subprocess
import sys
from functools import cache, partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib import cpu_count

from helpers import data, models, training
from helpers.study import DRIFT, part1, part1_domain, published, reproducible, run_seeds, tuning
from helpers.study import seeds as study_seeds
from helpers.study.part1 import BUDGETS, FIRST, PENALTIES, RATES, choose_rates, plan_of
from helpers.study.published import PUBLISHED, published_protocol
from helpers.training import strategies
from tests.small import SIZES, Traced

ROOT = Path(__file__).parent.parent
CHOSEN = {name: of[-1] for name, of in RATES.items()} | {"linear probing": 0.3}
PLAN = plan_of("headlines", CHOSEN)
SUPERVISED = {f"{a}{k} labels" for a in ("", "articles + ") for k in (1, 4, 16, 40)}


@cache
def features():
    """Return two views of 800 rows of five topics, the second one shifted, and labels."""
    rng = np.random.default_rng(0)
    y = np.arange(800) % 5
    X = 1.5 * rng.normal(size=(5, 6))[y] + rng.normal(size=(800, 6))
    other = X @ rng.normal(np.eye(6), 0.2) + 0.5 + 0.4 * rng.normal(size=(800, 6))
    return dict(zip(("articles", "headlines", "y"), map(torch.tensor, (X, other, y)), strict=True))


def studies(folder):
    """Return each study as a function of its seed, on the encoder in a folder."""
    names = {"texts": "headlines", "features": features()["articles"][:, [0] * SIZES["d"]]}
    options = {"texts": "headlines", "plan": PLAN, "C": 0.3, "folder": folder}
    return {
        "published": published_protocol,
        "names": partial(part1_domain.names_help, **names, y=features()["y"], folder=folder),
        "label_curve": partial(part1.label_curve, **options),
        "adaptation": partial(part1_domain.adaptation, **features()),
        "label shift": partial(part1_domain.adaptation, **features(), shift="labels"),
        "selection": part1_domain.selection_leak,
    }


NAMES = list(studies(""))


@pytest.fixture
def run(folder):
    return studies(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_is_a_function_of_its_seed(run, name):
    if name in ("names", "label_curve"):
        for kept in (part1.start, part1.pairs, part1.name_vectors):
            kept.cache_clear()  # a process's first seed gives what it gives later
    torch.manual_seed(1)
    np.random.seed(1)
    first = run[name](3)
    torch.rand(5), np.random.rand(5)
    assert run[name](3) == first != run[name](4)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("score_on", ["test", "validation"])
def test_no_row_is_both_trained_on_and_scored_nor_one_of_the_pairs(score_on, run, monkeypatch):
    of, drawn = Traced(monkeypatch), []
    draw = data.draw
    monkeypatch.setattr(data, "draw", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    budgets = BUDGETS if score_on == "test" else (4, 16)
    plan = {column: way for column, way in PLAN.items() if way[1] in budgets}
    run["label_curve"](0, score_on=score_on, plan=plan, budgets=budgets)
    known = {row for row in of.trained | of.scored | of.retrieved if row is not None}
    assert known == of.trained | of.scored | of.retrieved and of.unknown == of.named
    sets = {set_: set(rows.flatten().tolist()) for d in drawn for set_, rows in d.items()}
    kept = sets.pop("kept")  # for choosing rates alone
    used = sets["train"] | sets[score_on]
    assert used <= kept if score_on == "validation" else not used & kept
    assert sets.keys() == {"pairs", "train", score_on}
    assert of.trained == sets["train"] and of.scored == sets[score_on]
    assert of.retrieved == (sets["pairs"] if score_on == "test" else set())
    assert len(set.union(*sets.values())) == sum(map(len, sets.values()))  # disjoint


def test_the_pairs_are_the_same_stories_as_headlines_and_as_articles(folder):
    with reproducible(0):
        rows, by_block = part1.pairs(folder)
        for texts, X, low in zip(("headlines", "articles"), by_block[0], by_block[4], strict=True):
            encoder, tokens, y, _ = part1.start(texts, folder)
            assert torch.equal(X["ids"], tokens["ids"][rows.flatten()]) and low.first == 4
            assert X["ids"].shape[1] <= part1.LENGTH[texts]
            model = models.TextClassifier(encoder, 1)
            found = training.extract_features(model, low)
            torch.testing.assert_close(found, part1.embed(texts, rows, folder=folder))
    assert rows.shape == (5, 12) and (y[rows] == torch.arange(5)[:, None]).all()
    assert len(by_block[0][0]["ids"].unique(dim=0)) == 60 and found.dtype == torch.float64


def test_the_stories_of_the_pairs_are_drawn_by_no_seed(monkeypatch, run):
    class DrawnError(Exception):
        pass

    def planted(y, seed, **sizes):
        if "kept" in sizes:
            aside.update(draw(y, seed, **sizes)["kept"].flatten().tolist())
            return draw(y, seed, **sizes)
        raise DrawnError(draw(y, seed, **sizes), y)

    draw, curve, aside = data.draw, run["label_curve"], set()
    with reproducible(0):
        kept = set(part1.pairs(curve.keywords["folder"])[0].flatten().tolist())
    monkeypatch.setattr(data, "draw", planted)
    for seed in range(20):
        with pytest.raises(DrawnError) as told:
            curve(seed)
        sets, free = told.value.args
        assert not kept & {int(row) for rows in sets.values() for row in rows.flatten()}
        assert set((free == -1).nonzero().flatten().tolist()) == kept | aside


@pytest.fixture
def fitted(monkeypatch):
    """Return what the heads of a study are fitted to, and what its choices are made from."""
    seen = []

    def recorded(function, *args, **options):
        tensors = [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor)]
        seen.extend(t.detach().numpy().tobytes() for t in tensors)
        return function(*args, **options)

    for name in ("logistic_head", "coral", "density_ratio", "label_ratio"):
        monkeypatch.setattr(training, name, partial(recorded, getattr(training, name)))
    choice = partial(recorded, training.information_maximization)
    monkeypatch.setattr(training, "information_maximization", choice)
    return seen


def changed(rows, change):
    """Return the study's options with other features, or other labels, for some rows."""
    options = {name: t.clone() for name, t in features().items()}
    for name in ("articles", "headlines") if change == "features" else ("y",):
        of = options[name]
        of[rows] = of[rows].roll(1, 0) * -2 if change == "features" else (of[rows] + 1) % 5
    return options


@pytest.mark.parametrize("shift", ["none", "labels"])
def test_adaptation_trains_and_chooses_without_test_rows_and_scores_these_alone(fitted, shift):
    rows = data.draw(features()["y"], 0, source=70, target=40, test=40)["test"].flatten()
    plain, heads = part1_domain.adaptation(0, **features(), shift=shift), list(fitted)
    sets = {}

    def relabelled(y, seed, **sizes):
        sets.update(draw(y, seed, **sizes))
        return sets

    draw = data.draw
    assert len(heads) > 20
    with pytest.MonkeyPatch.context() as patch:  # labels would choose other rows
        patch.setattr(data, "draw", lambda y, *a, **k: relabelled(features()["y"], *a, **k))
        for change in ("features", "y"):
            fitted.clear()
            scores = part1_domain.adaptation(0, **changed(rows, change), shift=shift)
            assert fitted == heads
            same = {name for name in plain if scores[name] == plain[name]}
            assert not same - {"margin"}


def test_the_sets_of_adaptation_are_disjoint_and_the_targets_last_topics_rarer(monkeypatch):
    drawn, seen, draw = [], [], data.draw
    monkeypatch.setattr(data, "draw", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    score = training.score
    monkeypatch.setattr(training, "score", lambda X, y: seen.append(y) or score(X, y))
    part1_domain.adaptation(0, **features(), shift="labels")
    rows = [int(row) for of in drawn[0].values() for row in of.flatten()]
    assert len(rows) == len(set(rows)) == 5 * 70 + 2 * (2 * 40 + 3 * 8)
    assert {tuple(y.bincount().tolist()) for y in seen[3:]} == {(40, 40, 8, 8, 8)}


def test_unsupervised_adaptation_and_its_choice_see_no_target_labels():
    rows = data.draw(features()["y"], 0, source=70, target=40, test=40)["target"].flatten()
    true = part1_domain.adaptation(0, **features())
    with pytest.MonkeyPatch.context() as patch:
        drawn = data.draw(features()["y"], 0, source=70, target=40, test=40)
        patch.setattr(data, "draw", lambda *args, **sizes: drawn)
        false = part1_domain.adaptation(0, **changed(rows, "y"))
    other = {name for name in true if true[name] != false[name]}
    assert other - {"margin", "chosen by the oracle"} == SUPERVISED
    chosen = [true[name] for name in part1_domain.UNSUPERVISED]
    assert {true["chosen without labels"], true["chosen by the oracle"]} <= set(chosen)


def test_the_columns_of_adaptation():
    found = {s: list(part1_domain.adaptation(1, **features(), shift=s)) for s in ("none", "labels")}
    assert set(found["none"]) - set(found["labels"]) == SUPERVISED
    chosen = ["chosen without labels", "chosen by the oracle", "the same stories' headlines"]
    assert found["labels"] == [*part1_domain.UNSUPERVISED, *chosen, "margin"]


@pytest.mark.parametrize("texts, score_on", [
    ("headlines", "test"), ("headlines", "validation"), ("documentation", "test"),
])  # fmt: skip
def test_a_label_curve_has_the_columns_of_its_plan(texts, score_on, folder, monkeypatch):
    monkeypatch.setattr(part1, "tune", lambda *args, **options: None)
    options = {"texts": texts, "C": (0.3, 0.1), "score_on": score_on, "folder": folder}
    plan = {f"way {i}": (name, k, 0.1) for i, (name, k, _) in enumerate(PLAN.values())}
    budgets, expected = BUDGETS if score_on == "test" else (4, 16), ["zero labels/0"]
    plan = {column: way for column, way in plan.items() if way[1] in budgets}
    expected += [f"linear probing/{k}, {C:g}" for k in budgets for C in (0.3, 0.1)]
    for column, (name, k, _) in plan.items():
        told = k == 4 and (texts, score_on) == ("headlines", "test") and name != "from scratch"
        expected += [column, f"{column}/retrieval"][: 1 + told]
    found = part1.label_curve(0, plan=plan, budgets=budgets, **options)
    assert list(found) == [*expected, "margin"]


def test_a_plan_has_the_curve_at_the_chosen_rates_and_of_headlines_the_remedies():
    top, both, full = "top two blocks", "LP-FT, top two", "full fine-tuning"
    chosen = {top: 2.0, both: 3.0, full: 5.0, "linear probing": 7.0}
    curve = {f"{top}/{k}": (top, k, 2.0) for k in BUDGETS} | {
        f"{both}/4": (both, 4, 3.0),
        f"{both}/16": (both, 16, 3.0),
        f"{full}/4": (full, 4, 5.0),
        "from scratch/4": ("from scratch", 4, 5.0),
    }
    assert plan_of("documentation", chosen) == curve
    remedies = {f"{name}/4": (name, 4, 2.0) for name in ("L2-SP, top two", "gradual unfreezing")}
    larger = {f"{top}, 3 x rate/4": (top, 4, 6.0)}
    assert plan_of("headlines", chosen) == curve | remedies | larger
    assert {f"{name}/4" for name in part1.REMEDIES} <= PLAN.keys()
    assert {name for name, *_ in PLAN.values()} == FIRST.keys()


def test_retrieval_is_that_of_the_tuned_encoder_and_untouched_that_of_the_base(run, monkeypatch):
    def planted(model, X, y, *, technique, lr):
        if (technique, lr) == ("top two blocks", 3 * CHOSEN["top two blocks"]):
            for p in model.encoder.blocks[5].parameters():
                p.data.zero_()

    monkeypatch.setattr(part1, "tune", planted)
    curve = run["label_curve"]
    folder = curve.keywords["folder"]
    found = curve(0, C=part1.PROBE_C)
    with reproducible(0):
        base = models.TextClassifier(part1.start("headlines", folder)[0], 5)
        of = [part1.retrieval(base, folder, first=first) for first in (0, 4)]
        rows = part1.pairs(folder)[0]
        seen = [part1.embed(texts, rows, folder=folder) for texts in ("headlines", "articles")]
    of.append(part1.untouched(folder))  # in the dtype of any caller
    assert {score.correct for score in of} == {part1.recall(*seen).correct} and of[0].correct > 5
    ruined = found.pop("top two blocks, 3 x rate/4/retrieval")
    assert ruined == pytest.approx(100 / 60)  # all cosines are 0
    kept = {score for column, score in found.items() if column.endswith("/retrieval")}
    assert kept == {100 * of[0].accuracy}
    assert found["LP-FT, top two/4"] == found["linear probing/4"]


def test_retrieval_goes_on_where_the_encoder_is_as_it_was(folder):
    with reproducible(0):
        encoder, tokens, y, _ = part1.start("headlines", folder)
        rows = torch.arange(20)
        for technique, first in (("top two blocks", 4), ("full fine-tuning", 0)):
            model = models.TextClassifier(copy.deepcopy(encoder), 5)
            part1.tune(model, part1.some(tokens, rows), y[rows], technique=technique, lr=1e-2)
            whole = part1.retrieval(model, folder, first=0)
            assert not any(p.requires_grad for p in model.parameters())
            if first == 4:
                assert part1.retrieval(model, folder).correct == whole.correct
            else:
                with pytest.raises(ValueError, match="cache"):
                    part1.retrieval(model, folder)


def test_each_technique_trains_what_it_says(run, monkeypatch):
    seen, trainable, train, tune = [], {}, strategies.train, part1.tune

    def named(parameters):
        return {name.partition(".attention")[0][:16] for name in parameters}

    def record(model, *args, optimizer, **options):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, *args, optimizer=optimizer, **options)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        seen.append((named(moved), {group["lr"] for group in optimizer.param_groups}))

    def tuned(model, *args, technique, **options):
        tune(model, *args, technique=technique, **options)
        trainable[technique] = named(n for n, p in model.named_parameters() if p.requires_grad)

    monkeypatch.setattr(strategies, "train", record)
    monkeypatch.setattr(part1, "tune", tuned)
    run["label_curve"](0, plan={name: (name, 1, 3e-4) for name in FIRST}, budgets=(1,))
    top = {"encoder.blocks.4", "encoder.blocks.5", "head.weight", "head.bias"}
    blocks = top | {f"encoder.blocks.{i}" for i in range(4)}
    embed = {"encoder.embed.to", "encoder.embed.po", "encoder.embed.se", "encoder.embed.no"}
    phases = [top & {"head.weight", "head.bias"}, top - {"encoder.blocks.4"}, top]
    assert [moved for moved, _ in seen] == [top, top, top, *phases, blocks, blocks | embed]
    assert [rates for _, rates in seen[:3] + seen[-2:]] == [{3e-4, 1e-3}] * 5
    assert list(trainable) == list(FIRST)
    assert list(trainable.values()) == [top, top, top, top, blocks, blocks | embed]


def test_every_remedy_ends_elsewhere_than_the_plain_technique(run, monkeypatch):
    ends, evaluate = [], training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda m, *a: ends.append(m) or evaluate(m, *a))
    ways = ("top two blocks", "top two blocks", *part1.REMEDIES)
    for name in ways:
        run["label_curve"](0, plan={name: (name, 4, 1e-3)}, budgets=(4,), score_on="validation")
    weights = [model.encoder.blocks[5].feed_forward.fc2.weight for model in ends]
    assert torch.equal(weights[0], weights[1])  # of one seed all start and draw alike
    for i, j in combinations(range(1, len(ways)), 2):
        assert not torch.equal(weights[i], weights[j]), (ways[i], ways[j])


def test_a_plan_in_parts_gives_the_numbers_of_the_whole(run):
    plan = {name: PLAN[name] for name in PLAN if PLAN[name][1] == 4}
    curve, two = partial(run["label_curve"], budgets=(4,)), min(2, cpu_count())
    del curve.keywords["plan"]
    whole, parts = (run_seeds(curve, [3], workers=workers, plan=plan) for workers in (1, two))
    shares = study_seeds._shares({"plan": plan}, 1, two)
    assert len(shares) == two and list(whole) == list(parts)
    assert all(whole[name] == parts[name] for name in whole) and "from scratch/4" in whole


def test_each_entry_of_a_plan_meets_the_random_stream_as_if_alone(run, monkeypatch):
    met, alone = [], torch.Generator().manual_seed(7).get_state()
    monkeypatch.setattr(part1, "tune", lambda *_, **given: met.append(torch.get_rng_state()))
    run["label_curve"](7)
    heads = [name.startswith("LP-FT") for name, *_ in PLAN.values()]  # of their own, drawn before
    assert [torch.equal(state, alone) for state in met] == [not head for head in heads]


def test_a_ranking_tells_equal_means():
    assert tuning.ranked({"a": 1.0, "b": 3.0, "c": 1.0, "d": 2.0}) == "b > d > a = c"


def test_cached_blocks_give_the_accuracies_of_tokens(run, monkeypatch):
    names = ("top two blocks/4", "LP-FT, top two/4", "L2-SP, top two/4", "gradual unfreezing/4")
    curve = partial(run["label_curve"], plan={name: PLAN[name] for name in names}, budgets=(4,))
    cached = curve(0)
    whole = []
    monkeypatch.setattr(training, "cache_prefix", lambda model, X, **_: whole.append(X) or X)
    monkeypatch.setattr(part1, "pairs", cache(part1.pairs.__wrapped__))
    tokens = curve(0)
    assert abs(cached.pop("margin") - tokens.pop("margin")) < DRIFT
    assert cached == tokens and len(whole) == 2 + 2 * 2  # of the study, and pairs of two blocks


def test_rates_are_chosen_on_validation_rows_alone(monkeypatch):
    tried = {**RATES, "linear probing": PENALTIES}
    best = {name: of[(i + 1) % len(of)] for i, (name, of) in enumerate(tried.items())}

    def planted(seed, *, texts, plan, C, budgets, score_on, folder):
        assert (texts, score_on, folder) == ("documentation", "validation", "f")
        assert budgets == (4, 16)
        tried_at = {name: {k for n, k, _ in plan.values() if n == name} for name in RATES}
        assert tried_at == {n: {4, 16} & {*part1.CURVE[n]} for n in RATES}
        found = dict(plan)
        for k in budgets:
            for c, column in tuning.columns(f"linear probing/{k}", C).items():
                found[column] = ("linear probing", k, c)
        scores = {
            column: seed - abs(np.log(rate / best[name])) * (0.5 if k == 4 else 1.5)
            for column, (name, k, rate) in found.items()
        }
        return scores | {"margin": 1.0 + seed}

    monkeypatch.setattr(part1, "label_curve", planted)
    chosen, means, margin = choose_rates("documentation", range(3), workers=1, folder="f")
    assert chosen == best and margin.tolist() == [1, 2, 3]
    assert {name: tuple(of) for name, of in means.items()} == tried
    assert all(means[name][rate] == 1 for name, rate in best.items())


def test_the_rates_that_are_tried_are_those_that_are_trained_at(folder, monkeypatch):
    trained = []
    monkeypatch.setattr(part1, "tune", lambda *_, technique, lr: trained.append((technique, lr)))
    chosen, means, _ = choose_rates("headlines", [5], workers=1, folder=folder)
    assert sorted(trained) == sorted(
        (name, rate)
        for name, of in RATES.items()
        for rate in of
        for _ in {4, 16} & {*part1.CURVE[name]}
    )
    assert {name: chosen[name] for name in RATES} == {name: of[0] for name, of in RATES.items()}
    assert chosen.keys() == means.keys() == {*RATES, "linear probing"}


def test_of_equal_settings_the_first_is_chosen_and_margins_come_back():
    def planted(seed, *, score_on, name):
        assert score_on == "validation" and name == "fixed"
        return {"a, 1": 1.0 + seed, "a, 2": 1.0 + seed, "b": seed**2, "margin": 0.1 * seed}

    tries = {"a": tuning.columns("a", (1, 2)), "b": tuning.columns("b", 3)}
    means, margins = tuning.try_settings(planted, tries, [1, 2, 6], workers=1, name="fixed")
    assert means == {"a": {1: 4.0, 2: 4.0}, "b": {3: round(41 / 3, 9)}}
    assert tuning.best(means) == {"a": 1, "b": 3}
    assert margins.tolist() == pytest.approx([0.1, 0.2, 0.6])


def test_settings_of_a_step_are_used_and_those_of_an_unknown_step_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'tunning'"):
        published_protocol(0, tunning={"epochs": 3})
    plain = published_protocol(0, leaks=False)
    for step, change in {"tuning": {"epochs": 3}, "base": {"hidden": 8}}.items():
        assert published_protocol(0, leaks=False, **{step: PUBLISHED[step] | change}) != plain
    for change in ({"labels": 5}, {"shift_scale": 0.5}, {"task": {"n_samples": 300}}):
        assert published_protocol(0, leaks=False, **change) != plain


def test_validation_and_test_rows_differ_and_an_unknown_set_is_refused(run):
    curve = partial(run["label_curve"], plan={}, budgets=(4,))
    assert curve(0, score_on="validation") != curve(0)
    with pytest.raises(KeyError, match="tset"):
        curve(0, score_on="tset")


def test_a_smaller_budget_is_part_of_a_larger_one(run, monkeypatch):
    of, trained = Traced(monkeypatch), {}
    for k in (1, 4, 50):
        of.trained = trained[k] = set()
        run["label_curve"](0, plan={}, budgets=(k,))
        trained[k] = of.trained
    assert trained[1] < trained[4] < trained[50] and len(trained[50]) == 250


def test_columns_selected_on_all_rows_seem_to_help_where_all_is_noise():
    found = [part1_domain.selection_leak(seed) for seed in range(5)]
    inside, outside = ([f[f"selected on {of} rows"] for f in found] for of in ("training", "all"))
    assert 40 < np.mean(inside) < 60 and min(outside) > 65


def test_retrieval_and_zero_labels_are_of_the_nearest_by_cosine(folder):
    assert part1.recall(torch.eye(3)[[1, 0, 2]], torch.eye(3)).correct == 1
    long = torch.tensor([[1.0, 0], [10, 10]])  # [3, 1] has the larger product with the second row
    assert part1.recall(torch.tensor([[3.0, 1], [1, 1]]), long).correct == 2
    names = part1.name_vectors("headlines", folder)
    assert part1.zero_labels("headlines", 7 * names, torch.arange(5), folder=folder).correct == 5
    other = torch.tensor([1, 0, 2, 3, 4])
    assert part1.zero_labels("headlines", names, other, folder=folder).correct == 3


def test_costs_are_those_of_what_is_trained(folder):
    rows = part1.costs(folder=folder)
    d, d_ff = SIZES["d"], SIZES["d_ff"]
    head, block = 5 * (d + 1), 4 * d * (d + 1) + 2 * d * d_ff + d_ff + d + 4 * d
    trained = [head, head + 2 * block, head + 6 * block]
    assert [(name, n) for name, n, *_ in rows] == list(
        zip(["linear probing", "top two blocks", "full fine-tuning"], trained, strict=True)
    )
    (_, _, probe, least), (_, _, two, _), (_, _, full, most) = rows
    assert least < most and 3 * probe < two < full


def decisions(folder):
    """Run what is cheap of each study; return what is correct and the margin of every score."""
    names = ("top two blocks/4", "LP-FT, top two/4", "L2-SP, top two/4", "gradual unfreezing/4")
    few = {"plan": {name: PLAN[name] for name in names}, "budgets": (4,)}
    packaged = {"plan": {"top/4": ("top two blocks", 4, 3e-4)}, "C": 0.3, "budgets": (4,)}
    run, found = studies(folder), {}
    cheap = {name: run[name] for name in ("published", "adaptation", "label shift")} | {
        "another seed": lambda seed: run["adaptation"](2),
        "label_curve": partial(run["label_curve"], **few),
        "packaged": partial(part1.label_curve, texts="documentation", **packaged),
    }

    def kept(scores, *others):
        extra = {f"choice {i}": score for i, score in enumerate(others)}
        return {k: (s.correct, s.margin) for k, s in (scores | extra).items()}

    with pytest.MonkeyPatch.context() as patch:
        for module in (part1, part1_domain, published):
            patch.setattr(module, "percent", kept)
        for name, study in cheap.items():
            found |= {f"{name}: {k}": of for k, of in study(0).items()}
    return found


def test_another_instruction_set_changes_no_accuracy_and_drifts_less_than_claimed(folder, tmp_path):
    code = (
        "import json, sys, torch; torch.set_num_threads(1); "
        "from tests import test_experiments as t; "
        "json.dump(t.decisions(sys.argv[1]), open(sys.argv[2], 'w'))"
    )
    pins = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
    command, path = [sys.executable, "-c", code, folder], tmp_path / "there.json"
    with subprocess.Popen(
        [*command, path], cwd=ROOT, env=os.environ | pins, stderr=subprocess.PIPE, text=True
    ) as other:
        here = decisions(folder)
        _, told = other.communicate()
    assert other.returncode == 0, told
    there = json.loads(path.read_text())
    assert list(there) == list(here) and len(here) > 50
    for name, (correct, _) in here.items():
        assert correct == there[name][0], name
    drift = {name: abs(margin - there[name][1]) for name, (_, margin) in here.items()}
    largest = max(drift, key=drift.get)
    told = f"{largest} drifts by {drift[largest]:.1e}"
    print(told)
    assert 0 < drift[largest] < DRIFT, told
