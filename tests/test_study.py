"""Many seeds: runs that do not depend on who runs them, and verdicts that may be trusted."""

import os
import sys
import time
import types

import numpy as np
import pytest
import torch
from joblib import cpu_count, parallel_config
from scipy import stats
from threadpoolctl import threadpool_info

from helpers.study import (
    Comparison,
    close_calls,
    compare,
    compare_pairs,
    reproducible,
    run_seeds,
    summarize,
    verdicts,
)


def experiment(seed):
    with reproducible(seed):
        weight = torch.nn.Linear(3, 2).weight.detach()
        return {"sum": weight.sum(), "largest": weight.max()}


def fail_on_3(seed):
    if seed == 3:
        raise ValueError("three is no good")
    return {"seed": seed}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def draws(n, effect=0.0, seed=0):
    return np.random.default_rng(seed).normal(effect, 1, n)


def test_results_do_not_depend_on_workers_or_order():
    one = run_seeds(experiment, range(6), workers=1)
    assert same(one, run_seeds(experiment, range(6), workers=min(2, cpu_count())))
    assert same(one, run_seeds(experiment, range(6)))
    backwards = run_seeds(experiment, range(5, -1, -1), workers=1)
    assert same(one, {name: values[::-1] for name, values in backwards.items()})


def test_reproducible_computes_in_float64_and_restores_everything():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(KeyError), reproducible(7):
        assert torch.rand(1).dtype == torch.float64
        raise KeyError
    assert torch.get_default_dtype() == torch.float32 and torch.equal(torch.rand(3), expected)
    with reproducible(1):
        first = torch.rand(2)
    with reproducible(1):
        assert torch.equal(first, torch.rand(2))


@pytest.mark.parametrize("workers", [1, None])
def test_each_seed_has_one_thread_and_the_caller_keeps_its_own(workers):
    def threads(seed):
        pools = max(pool["num_threads"] for pool in threadpool_info())
        return {"torch": torch.get_num_threads(), "others": pools}

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = run_seeds(threads, range(3), workers=workers)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert (results["torch"] == 1).all() and (results["others"] == 1).all()


def process(seed):
    return {"id": os.getpid()}


def inner_runs(seed):
    return {k: v.sum() for k, v in run_seeds(experiment, range(4)).items()}


def test_threads_and_runs_inside_runs_do_not_share_a_random_stream():
    expected = run_seeds(experiment, range(8), workers=1)
    with parallel_config("threading", n_jobs=2):
        assert same(run_seeds(experiment, range(8)), expected)
    assert torch.get_default_dtype() == torch.float32
    assert same(run_seeds(inner_runs, range(3)), run_seeds(inner_runs, range(3), workers=1))


@pytest.mark.skipif(cpu_count() == 1, reason="one core")
def test_an_enclosing_joblib_backend_of_processes_is_used():
    with parallel_config("multiprocessing"):
        processes = run_seeds(process, range(3), workers=2)["id"]
    assert (processes != os.getpid()).all()


def test_a_worker_that_dies_is_told_and_what_was_done_is_kept():
    def die_on_5(seed):
        if seed == 5:
            time.sleep(1)
            os._exit(1)
        return {"seed": seed}

    with pytest.warns(UserWarning, match="seed 5: lost, a worker process died"):
        results = run_seeds(die_on_5, range(6), workers=min(2, cpu_count()))
    assert results["seed"].tolist()[:3] == [0, 1, 2]


@pytest.mark.parametrize("workers", [1, None])
def test_a_failing_seed_is_told_and_the_others_are_kept(workers):
    with pytest.warns(UserWarning, match="1 of 5 seeds failed: seed 3: ValueError: three is no"):
        results = run_seeds(fail_on_3, range(5), workers=workers)
    assert results["seed"].tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize(
    "returned, told",
    [
        ({"a": float("nan"), "b": 1.0}, r"seed 2: \['a'\] not finite"),
        ({"a": 1.0}, r"seed 2: returned \['a'\], the other seeds \['a', 'b'\]"),
        ({"a": "high", "b": 1.0}, "seed 2: ValueError"),
    ],
)
def test_results_that_do_not_fit_are_failures(returned, told):
    with pytest.warns(UserWarning, match=told):
        results = run_seeds(lambda s: returned if s == 2 else {"a": 0, "b": s}, range(4), workers=1)
    assert results["b"].tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    "seeds, workers, error, told",
    [
        ([], 1, ValueError, "at least one"),
        ([1, 2, 1], 1, ValueError, "distinct"),
        ([1], 0, ValueError, "workers = 0 must be from 1"),
        ([1], cpu_count() + 1, ValueError, f"to the {cpu_count()} cores"),
        ([3], 1, RuntimeError, "every seed failed; seed 3: ValueError: three"),
    ],
)
def test_what_cannot_run_is_refused(seeds, workers, error, told):
    with pytest.raises(error, match=told):
        run_seeds(fail_on_3, seeds, workers=workers)


def test_progress_is_shown_to_a_watcher_only(capsys, monkeypatch):
    run_seeds(fail_on_3, [1, 2], workers=1)
    assert capsys.readouterr() == ("", "")
    for metadata, shown in (({}, False), ({"cellId": "abc"}, True)):
        kernel = types.SimpleNamespace(get_parent=lambda m=metadata: {"metadata": m})
        shell = types.SimpleNamespace(get_ipython=lambda k=kernel: types.SimpleNamespace(kernel=k))
        monkeypatch.setitem(sys.modules, "IPython", shell)
        run_seeds(fail_on_3, [1, 2], workers=1)
        assert ("/2 [" in capsys.readouterr().err) == shown


def test_summary_is_mean_spread_and_interval():
    values = draws(40) + 80
    summary = summarize({"a": values, "b": np.full(5, 3.0)})
    assert summary["a"][:2] == pytest.approx((values.mean(), values.std(ddof=1)), abs=1e-9)
    assert summary["a"].n == 40
    t = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert summary["a"][2:4] == pytest.approx(t, abs=0.03)  # normal data: close to Student's
    assert summary["b"] == (3.0, 0.0, 3.0, 3.0, 5)
    assert str(summary["b"]) == "3.0 [3.0, 3.0]"


@pytest.mark.parametrize("n", [6, 10, 20])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_intervals_cover_and_verdicts_err_as_often_as_they_claim(n, distribution, monkeypatch):
    monkeypatch.setattr(verdicts, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    centred = {"normal": rng.standard_normal, "uniform": lambda n: rng.random(n) - 0.5}
    studies = [compare(centred[distribution](n), np.zeros(n)) for _ in range(2000)]
    assert 0.93 <= np.mean([c.low <= 0 <= c.high for c in studies]) <= 0.97
    assert 0.025 <= np.mean([bool(c.sign) for c in studies]) <= 0.07  # 5 % claimed


def test_with_several_comparisons_false_verdicts_in_a_table_stay_rare(monkeypatch):
    monkeypatch.setattr(verdicts, "RESAMPLES", 1000)
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(150):
        table = {name: rng.normal(size=15) for name in "abcdef"}
        found = compare_pairs(table, [(name, "a") for name in "bcdef"])
        wrong += any(c.sign for c in found.values())
    assert wrong / 150 <= 0.08


def test_a_planted_effect_is_found_at_the_power_that_is_claimed(monkeypatch):
    monkeypatch.setattr(verdicts, "RESAMPLES", 1000)
    effect = compare(draws(30), np.zeros(30)).detectable / draws(30).std(ddof=1)
    found = [compare(draws(30, effect, seed), np.zeros(30)).sign == "▲" for seed in range(200)]
    assert 0.7 <= np.mean(found) <= 0.9
    assert compare(draws(30, 2.0), np.zeros(30)).verdict == "better"
    assert compare(np.zeros(30), draws(30, 2.0)).verdict == "worse"
    assert compare(draws(30), draws(30)).verdict == "no significant difference at 30 seeds"


def test_among_several_comparisons_less_can_be_seen_and_too_few_seeds_see_nothing(monkeypatch):
    monkeypatch.setattr(verdicts, "RESAMPLES", 1000)
    one = compare(draws(30), np.zeros(30))
    assert one.detectable_among(1) == pytest.approx(one.detectable)
    effect, found = one.detectable_among(7) / draws(30).std(ddof=1), []
    for seed in range(100):  # one true difference among seven
        table = {str(i): draws(30, effect * (i == 0), 1000 + 9 * seed + i) for i in range(7)}
        pairs = verdicts.compare_pairs(table | {"none": np.zeros(30)}, [(k, "none") for k in table])
        found.append(pairs["0", "none"].sign == "▲")
    assert 0.68 <= np.mean(found) <= 0.92
    for several in (1, 7, 21):
        n = verdicts.seeds_needed(several)
        signs = [
            verdicts.compare_pairs({"a": np.arange(k) + 1.0, "b": np.zeros(k)}, [("a", "b")])
            for k in (n - 1, n)
        ]
        p = [found["a", "b"].p * several for found in signs]
        assert p[0] >= 0.05 > p[1]


def test_comparison_is_paired():
    common = 50 * draws(20)
    c = compare(common + 1 + 0.1 * draws(20, seed=1), common)
    assert c.sign == "▲" and c.wins == 1 and c.high - c.low < 0.2


def test_sign_flip_test_is_exact_for_few_seeds():
    assert compare(np.array([1.0, 2, 4, 8, 16]), np.zeros(5)).p == 2 / 2**5
    assert compare(np.array([1.0, 2, 4, 8, -16]), np.zeros(5)).p == 1.0
    assert compare(np.zeros(5), np.zeros(5)).p == 1.0


def test_wins_count_ties_half():
    assert compare(np.array([1.0, 0, 0, 0]), np.array([0.0, 0, 0, 1])).wins == 0.5
    assert compare(np.array([1.0, 1, 0, 0]), np.zeros(4)).wins == 0.75


@pytest.mark.parametrize(
    "wins, low, p, verdict",
    [
        (0.75, 0.1, 0.01, "better"),
        (0.74, 0.1, 0.01, "better on average, P = 0.74"),
        (0.9, 0.1, 0.05, "no significant difference at 9 seeds"),
        (0.9, -0.1, 0.01, "no significant difference at 9 seeds"),
    ],
)
def test_a_verdict_needs_interval_test_and_wins(wins, low, p, verdict):
    assert Comparison(1.0, low, 2.0, p, wins, 1.0, 9).verdict == verdict


def test_holm_on_a_worked_example(monkeypatch):
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    monkeypatch.setattr(verdicts, "compare", lambda a, b: Comparison(0, 0, 0, p[a], 0, 0, 9))
    found = compare_pairs({k: k for k in "abcdx"}, [(k, "x") for k in "abcd"])
    assert list(found) == [(k, "x") for k in "abcd"]
    assert [c.p for c in found.values()] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_arrays_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match=r"a has shape \(3,\), b \(2,\)"):
        compare(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="at least 2 seeds, there is 1"):
        summarize({"a": np.zeros(1)})


def test_the_last_bit_does_not_decide_a_printed_digit():
    below, above = np.nextafter(81.25, 0), np.nextafter(81.25, 99)
    printed = {str(verdicts.Summary(x, 0.0, x, x, 2)) for x in (below, 81.25, above)}
    assert len(printed) == 1
    assert len({Comparison(x, x, x, 0, 1, 0, 2).numbers for x in (below, above)}) == 1


def test_close_calls_are_counted():
    assert (
        close_calls([1e-9, 1e-3, 2.0]) == "Seeds with a decision closer than 1e-07 logits: 1 of 3"
    )
    told = "Seeds with a decision closer than 1e-02 logits: 2 of 3"
    assert close_calls([1e-9, 1e-3, 2.0], drift=1e-4) == told
