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

from helpers.study import DRIFT, part1
from helpers.study.part1 import (
    METHODS,
    RATES,
    SHIFTS,
    adaptation,
    choose_rates,
    forgetting,
    label_budget,
    published_protocol,
)
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
        for module in (part1, strategies):
            if function := getattr(module, kind, None):
                monkeypatch.setattr(module, kind, recording(function, kind))
    STUDIES[name](0)
    assert len(rows["train"]) > 200 and len(rows["evaluate"]) > 100
    assert not rows["train"] & rows["evaluate"]


def test_unsupervised_adaptation_and_its_choice_see_no_target_labels(monkeypatch):
    def other_labels(*args):
        source, held_out, (X, y), test = digits(*args)
        return source, held_out, (X, y.roll(1)), test

    digits, true = part1.digits, adaptation(0, shift="noisy")
    monkeypatch.setattr(part1, "digits", other_labels)
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
        return {f"{m}, {lr:g}/10": -abs(np.log(lr / best[m])) for m in METHODS for lr in RATES}

    monkeypatch.setattr(part1, "label_budget", planted)
    assert choose_rates("noisy", range(3), workers=1) == dict(zip(METHODS, RATES, strict=False))


def test_settings_of_an_unknown_step_are_refused():
    with pytest.raises(ValueError, match=r"unknown step \['tunning'\]: settings are for \['data'"):
        published_protocol(0, tunning={"epochs": 3})
    assert published_protocol(0, tuning={"epochs": 3}) != published_protocol(0)


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
