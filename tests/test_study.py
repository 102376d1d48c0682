"""Many seeds: runs that do not depend on who runs them, and verdicts that may be trusted."""

import os
import sys
import threading
import time
import tracemalloc
import types
from concurrent.futures import Future

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
from helpers.study import seeds as study_seeds


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


def parted(seed, plan):
    if seed == 3 and "c" in plan:
        raise ValueError("c of three")
    with reproducible(seed):
        drawn = torch.rand(1).item()
    found = {"drawn": drawn} | {name: drawn * value for name, value in plan.items()}
    return found | {"margin": min(plan.values(), default=1.0)}


def test_entries_that_are_shared_out_give_what_one_process_gives():
    plan = {"c": 0.2, "a": 0.1, "b": 0.3}
    expected = run_seeds(parted, range(3), workers=1, plan=plan)
    assert list(expected) == ["drawn", *plan, "margin"] and expected["margin"].tolist() == [0.1] * 3
    found = run_seeds(parted, range(3), workers=min(2, cpu_count()), plan=plan)
    assert list(found) == list(expected) and same(found, expected)
    with pytest.warns(UserWarning, match="1 of 5 seeds failed: seed 3: ValueError: c of three"):
        found = run_seeds(parted, range(5), workers=min(2, cpu_count()), plan=plan)
    assert same(found, run_seeds(parted, [0, 1, 2, 4], workers=1, plan=plan))
    with pytest.raises(TypeError, match=r"\['a', 'plan'\]: only one"):
        run_seeds(parted, [0], plan=plan, a={})
    assert list(run_seeds(parted, [0], plan={})) == ["drawn", "margin"]


@pytest.mark.parametrize("seeds, at_once, jobs", [
    (10, 1, 1), (10, 2, 1), (3, 2, 2), (1, 2, 2), (10, 4, 2), (10, 8, 4), (1, 8, 7), (10, 7, 4),
])  # fmt: skip
def test_entries_are_shared_out_where_whole_seeds_leave_processes_idle(seeds, at_once, jobs):
    plan = {str(i): i for i in range(14)}
    shares = study_seeds._shares({"plan": plan}, seeds, at_once)
    assert len(shares) == jobs
    assert [entry for share in shares for entry in share["plan"].items()] == list(plan.items())


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
    with reproducible(0):  # holds what workers in this process would wait for
        assert same(run_seeds(experiment, range(8)), expected)


def interleaved(seed):
    """Give other threads the time to draw and to change dtypes between one's own draws."""
    with reproducible(seed):
        values = []
        for _ in range(5):
            values.append(torch.rand(1).double().sum())
            time.sleep(0.002)
        return {"drawn": sum(values), "bits": torch.rand(1).element_size()}


def unseeded(seed):
    drawn = torch.rand(2)
    time.sleep(0.002)
    return {"drawn": drawn.sum() + torch.rand(1).sum(), "bits": drawn.element_size()}


def test_threads_of_a_users_own_take_turns_inside_reproducible():
    expected, found = [interleaved(seed) for seed in range(6)], {}
    threads = [
        threading.Thread(target=lambda s=s: found.update({s: interleaved(s)})) for s in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(6)] == expected
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("function", [interleaved, unseeded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_of_one_process_take_turns_whoever_starts_them(function, dtype, in_dtype):
    in_dtype(dtype)
    expected = run_seeds(function, range(8), workers=1)
    found, restored = {}, torch.get_rng_state()

    def _worker(seeds):  # as a thread of a Dask worker does
        for seed in seeds:
            found[seed] = study_seeds._run(function, dtype, (seed, {}))[0]

    threads = [threading.Thread(target=_worker, args=(range(i, 8, 4),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), restored) and torch.get_default_dtype() == dtype
    assert all(found[i] == {k: v[i] for k, v in expected.items()} for i in range(8))
    assert same(run_seeds(function, range(8)), expected)  # in processes of their own


@pytest.fixture
def in_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


class KilledWorker(Exception):
    """Has the name of what Dask raises."""


class DaskDistributedBackend:
    """Has the name of joblib's; a "worker" is this process, and is said to die of some seeds."""

    def __init__(self, killers=(), beside=()):
        self.client, self.killers, self.beside, self.submitted = self, killers, beside, []

    def submit(self, task, job, *, pure):
        future, (seed, _) = Future(), job
        if seed in self.killers or (seed in self.beside and seed not in self.submitted):
            future.set_exception(KilledWorker(f"4 workers died while they tried seed {seed}"))
        else:
            future.set_result(task(job))
        self.submitted.append(seed)
        return future


@pytest.fixture
def within(monkeypatch):
    def _within(backend):
        monkeypatch.setattr(study_seeds, "get_active_backend", lambda: (backend, 1))
        monkeypatch.setattr(study_seeds, "effective_n_jobs", lambda workers: 3)
        return backend

    return _within


def test_one_worker_stays_in_this_process_whatever_the_backend(within):
    dask = within(DaskDistributedBackend())
    expected = run_seeds(experiment, range(4), workers=1)
    assert dask.submitted == []
    assert same(run_seeds(experiment, range(4)), expected) and dask.submitted == [0, 1, 2, 3]


def test_a_dask_worker_that_dies_loses_its_own_seeds_only(within):
    dask = within(DaskDistributedBackend(killers=(1, 6), beside=(0, 2, 3, 4, 5, 7)))
    lost = "2 of 9 seeds failed: seed 1: lost, its worker process died; seed 6: lost, its worker"
    with pytest.warns(UserWarning, match=lost):
        results = run_seeds(experiment, range(9))
    expected = run_seeds(experiment, [0, 2, 3, 4, 5, 7, 8], workers=1)
    assert same(results, expected) and dask.submitted.count(8) == 1 and len(dask.submitted) < 30


def test_a_backend_that_nobody_tried_is_refused(within):
    within(object())
    with pytest.raises(ValueError, match="on loky, Dask or threads of joblib, not on its object"):
        run_seeds(experiment, range(4))


@pytest.mark.skipif(cpu_count() == 1, reason="one core")
def test_an_enclosing_joblib_backend_of_processes_is_used():
    with parallel_config("multiprocessing"):
        processes = run_seeds(process, range(3), workers=2)["id"]
    assert (processes != os.getpid()).all()


@pytest.mark.parametrize(
    "backend, killers", [("loky", (0, 5)), ("loky", (2,)), ("multiprocessing", (5,))]
)
def test_a_worker_that_dies_loses_its_own_seeds_only(backend, killers):
    def _die(seed):
        if seed in killers:
            time.sleep(0.1)
            os._exit(1)
        return {"seed": seed}

    lost = "; ".join(f"seed {seed}: lost, its worker process died" for seed in killers)
    with (
        parallel_config(backend),
        pytest.warns(UserWarning, match=f"{len(killers)} of 6 seeds failed: {lost}$"),
    ):
        results = run_seeds(_die, range(6), workers=min(2, cpu_count()))
    assert results["seed"].tolist() == [seed for seed in range(6) if seed not in killers]


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
    assert compare(draws(30), draws(30)).verdict == "not told apart at 30 seeds"


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
        (0.9, 0.1, 0.05, "not told apart at 9 seeds"),
        (0.9, -0.1, 0.01, "not told apart at 9 seeds"),
    ],
)
def test_a_verdict_needs_interval_test_and_wins(wins, low, p, verdict):
    assert Comparison(1.0, low, 2.0, p, wins, 1.0, 9).verdict == verdict


def test_holm_on_a_worked_example(monkeypatch):
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    monkeypatch.setattr(
        verdicts, "_compared", lambda a, b: Comparison(0, 0, 0, p["abcd"[int(a[0])]], 0, 0, 9)
    )
    results = {k: np.full(2, i) for i, k in enumerate("abcdx")}
    found = compare_pairs(results, [(k, "x") for k in "abcd"])
    assert list(found) == [(k, "x") for k in "abcd"]
    assert [c.p for c in found.values()] == pytest.approx([0.03, 0.06, 0.06, 0.02])


UNSOUND = {
    "NaN": (lambda x: np.where(np.arange(12) == 5, np.nan, x), "'a' is nan at seed index 5, 1 of"),
    "infinite": (lambda x: np.where(np.arange(12) > 7, -np.inf, x), "'a' is -inf at .* 8, 4 of"),
    "huge": (lambda x: np.where(np.arange(12) == 0, 1e200, x), r"'a' is 1e\+200 at seed index 0"),
    "masked": (lambda x: np.ma.masked_greater(x, 81), "'a' has masked entries: leave their seeds"),
    "None": (lambda x: [*x[:11], None], "'a' has dtype object: results must be real numbers"),
    "texts": (lambda x: x.astype(str), "'a' has dtype <U32: results must be real numbers"),
    "complex": (lambda x: x + 0j, "'a' has dtype complex128: results must be real"),
    "two axes": (lambda x: x[:, None], r"'a' has shape \(12, 1\): one number for each seed"),
    "one number": (lambda x: x[0], r"'a' has shape \(\): one number for each seed"),
    "one seed": (lambda x: x[:1], "'a' has 1 seeds: it takes at least 2 seeds"),
    "tensor": (lambda x: torch.tensor([torch.nan] * 12), "'a' is nan at seed index 0, 12 of its"),
}


@pytest.mark.parametrize("change, told", UNSOUND.values(), ids=UNSOUND)
def test_results_without_a_verdict_are_refused_by_name(change, told):
    b = 80 + np.arange(12) % 3.0
    a = change(b + 5)
    for refused in (
        lambda: compare(a, b),
        lambda: compare_pairs({"x": b, "a": a}, [("x", "a")]),
        lambda: summarize({"x": b, "a": a}),
    ):
        with pytest.raises(ValueError, match=told) as refusal:
            refused()
        assert "\n" not in str(refusal.value)


def test_results_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match=r"do not pair up, seeds of each: \{'a': 3, 'b': 2\}"):
        compare(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="no results for 'c', only for"):
        compare_pairs({"a": np.zeros(3), "b": np.zeros(3)}, [("a", "c")])


def test_leaving_the_seeds_out_that_a_refusal_names_is_a_cure():
    a, b = draws(12), draws(12, seed=1)
    a[[3, 7]] = np.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="seed index") as refusal:
            compare(a, b)
        i = int(str(refusal.value).split("seed index ")[1].split(",")[0])
        a, b = np.delete(a, i), np.delete(b, i)
    assert compare(a, b).n == 10


@pytest.mark.parametrize(
    "kind",
    [np.uint8, np.uint64, np.int16, np.float16, np.float32, np.longdouble, np.bool_, list,
     torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16),
     lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True)],
)  # fmt: skip
def test_comparisons_are_of_the_numbers_whatever_holds_them(kind):
    a, b = np.arange(12) % 2, (np.arange(12) + 1) // 3 % 2
    assert compare(kind(a), kind(b)) == compare(a.astype(float), b.astype(float))
    assert summarize({"a": kind(a)}) == summarize({"a": a.astype(float)})
    assert close_calls(kind(a)).endswith("6 of 12")


def test_single_precision_is_compared_in_double():
    a = np.float32(80.1) + np.zeros(12, np.float32)
    b = a + np.float32(1e-3) * (1 + np.arange(12, dtype=np.float32) % 3)
    assert compare(b, a) == compare(b.astype(float), a.astype(float))


def test_memory_does_not_grow_with_the_seeds(monkeypatch):
    x = draws(1500)
    expected = compare(x[:300], np.zeros(300)), summarize({"a": x[:300]})
    tracemalloc.start()
    compare(x, np.zeros(1500))
    summarize({"a": x})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    monkeypatch.setattr(verdicts, "AT_ONCE", 300 * 10_000)  # all at once: the same draws
    assert (compare(x[:300], np.zeros(300)), summarize({"a": x[:300]})) == expected


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
    with pytest.raises(ValueError, match="'margin' is nan at seed index 1"):
        close_calls([1.0, np.nan])
    with pytest.raises(ValueError, match="'margin' has 0 seeds: it takes at least 1"):
        close_calls([])
    with pytest.raises(ValueError, match="drift = nan must be a positive number"):
        close_calls([1.0], drift=np.nan)
