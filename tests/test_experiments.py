"""Part 1's studies: functions of their seed that never score what they trained on."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import training
from helpers.study import DRIFT, part1, tuning
from helpers.study.part1 import (
    METHODS,
    RATES,
    SHIFTS,
    adaptation,
    choose_rates,
    forgetting,
    label_budget,
)
from helpers.study.published import PUBLISHED, published_protocol
from helpers.training import strategies

ROOT = Path(__file__).parent.parent
BUDGET = partial(label_budget, target="noisy", rates=dict.fromkeys(METHODS, 1e-2), budgets=(1, 10))
STUDIES = {
    "published": published_protocol,
    "forgetting": forgetting,
    "budget": BUDGET,
    "noisy": partial(adaptation, shift="noisy"),
    "label shift": partial(adaptation, shift="label shift"),
}


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_is_a_function_of_its_seed(study):
    torch.manual_seed(1)
    np.random.seed(1)
    first = study(3)
    torch.rand(5), np.random.rand(5)
    assert study(3) == first != study(4)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["forgetting", "budget", "noisy", "label shift"])
def test_no_row_is_both_trained_on_and_scored(name, monkeypatch):
    rows = {"train": set(), "evaluate": set()}

    def recording(function, kind):
        def record(model, X, *args, **options):
            rows[kind] |= {row.numpy().tobytes() for row in X if len(row) == 64}
            return function(model, X, *args, **options)

        return record

    for kind in rows:
        module = {"train": strategies, "evaluate": training}[kind]
        monkeypatch.setattr(module, kind, recording(getattr(module, kind), kind))
    STUDIES[name](0)
    assert len(rows["train"]) > 200 and len(rows["evaluate"]) > 100
    assert not rows["train"] & rows["evaluate"]


def test_unsupervised_adaptation_and_its_choice_see_no_target_labels(monkeypatch):
    def other_labels(*args):
        source, held_out, (X, y), test = digits(*args)
        return source, held_out, (X, y.roll(1)), test

    digits, true = part1.data.digits, adaptation(0, shift="noisy")
    monkeypatch.setattr(part1.data, "digits", other_labels)
    false = adaptation(0, shift="noisy")
    supervised = {name for name in true if true[name] != false[name]}
    assert supervised - {"margin", "chosen by the oracle"} == {
        "3 labels per class",
        "all labels (oracle)",
    }


def test_every_shift_and_method_has_its_column():
    keys = {shift: list(adaptation(1, shift=shift)) for shift in SHIFTS}
    assert len({tuple(k) for k in keys.values()}) == 1
    assert list(BUDGET(1)) == [f"{m}/{k}" for k in (1, 10) for m in METHODS] + ["margin"]


def test_rates_are_chosen_on_validation_images_alone(monkeypatch):
    def planted(seed, *, score_on, rates, budgets, target):
        assert score_on == "validation" and target == "noisy"
        best = dict(zip(METHODS, RATES, strict=False))
        scores = {f"{m}/10, {lr:g}": -abs(np.log(lr / best[m])) for m in METHODS for lr in RATES}
        return scores | {"margin": 1.0}

    monkeypatch.setattr(part1, "label_budget", planted)
    assert choose_rates("noisy", range(3), workers=1) == dict(zip(METHODS, RATES, strict=False))


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
    plain = published_protocol(0)
    for step, change in {"tuning": {"epochs": 3}, "base": {"hidden": 8}}.items():
        assert published_protocol(0, **{step: PUBLISHED[step] | change}) != plain
    for change in ({"labels": 5}, {"shift_scale": 0.5}, {"task": {"n_samples": 300}}):
        assert published_protocol(0, **change) != plain


def test_validation_and_test_images_differ():
    assert BUDGET(0, score_on="validation") != BUDGET(0)
    with pytest.raises(KeyError):
        BUDGET(0, score_on="tset")


def test_the_chosen_rate_is_one_of_the_rates_and_gives_the_accuracies():
    scores = forgetting(2)
    for name in part1.FORGETTING:
        lr = scores[f"{name}/rate"]
        assert lr in RATES
        for side in ("source", "target"):
            assert scores[f"{name}/{side}"] == scores[f"{name}, {lr:g}/{side}"]


def test_another_instruction_set_changes_no_accuracy_and_drifts_less_than_claimed():
    code = (
        "import json, torch; torch.set_num_threads(1); from tests.test_experiments import STUDIES;"
        "print(json.dumps({name: study(0) for name, study in STUDIES.items()}))"
    )
    pins = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | pins,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    for name, scores in json.loads(ran.stdout).items():
        here = STUDIES[name](0)
        assert abs(here.pop("margin") - scores.pop("margin")) < DRIFT
        assert scores == here
