"""A reader's own rows: what is refused, what no method may see, and what is recommended."""

import io
import os
import pickle
import re
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.preprocessing import StandardScaler

from helpers.data import check_arrays, check_budgets, load_rows, split
from helpers.study import decide, reproducible
from helpers.study.decide import METHODS, compare_methods, method_sizes, pretrain, recommend
from helpers.training import evaluate, predict, strategies, train

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(30, 5)), np.repeat([0, 1, 2], 10)
SOURCE = {"X_source": RNG.normal(size=(40, 5)), "y_source": np.repeat([0, 1], 20)}


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def clusters(centres, labels, *, n, seed):
    """Return n rows around each centre, and the label of each."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(len(centres), n, len(centres[0])))
    rows = (np.asarray(centres, float)[:, None] + noise).reshape(-1, len(centres[0]))
    return rows, np.repeat(labels, n)


CORNERS = [(3, 3), (-3, -3), (3, -3), (-3, 3)]


@pytest.fixture
def save(tmp_path):
    def _save(**arrays):
        np.savez(tmp_path / "my.npz", **arrays)
        return tmp_path / "my.npz"

    return _save


@pytest.fixture
def no_training(monkeypatch):
    def _trained(*args, **options):
        raise AssertionError("trained before the rows were refused")

    for name in ("train", "linear_probe", "lp_ft", "LogisticRegression", "_standardized"):
        monkeypatch.setattr(decide, name, _trained)


REFUSED = {
    "X_source alone": ({"X_source": X}, "X_source comes without y_source: give both"),
    "y_source alone": ({"y_source": Y}, "y_source comes without X_source: give both"),
    "one axis": ({"X": X[:, 0]}, r"X has shape \(30,\), expected \(n, d\)"),
    "three axes": ({"X": X[:, None]}, r"X has shape \(30, 1, 5\), expected \(n, d\)"),
    "no columns": ({"X": X[:, :0]}, r"X has shape \(30, 0\).*at least one column"),
    "no rows": ({"X": X[:0], "y": Y[:0]}, r"X has shape \(0, 5\).*a row for each example"),
    "texts": ({"X": X.astype(str)}, "X has dtype <U32: it must hold real numbers"),
    "complex": ({"X": X + 0j}, "X has dtype complex128: it must hold real numbers"),
    "truth values": ({"X": X > 0}, "X has dtype bool: it must hold real numbers"),
    "lengths": ({"y": Y[:-1]}, r"y has shape \(29,\), expected \(30,\): one label for each row"),
    "a column of labels": ({"y": Y[:, None]}, r"y has shape \(30, 1\), expected \(30,\)"),
    "NaN": ({"X": changed(X, (17, 2), np.nan)}, "X holds 1 values that are NaN.* row 17: leave"),
    "infinite": ({"X": changed(X, ([9, 4], 0), -np.inf)}, "X holds 2 values .* first in row 4"),
    "huge": ({"X": changed(X, (3, 0), 1e200)}, r"X holds 1 .*beyond 1e\+100, the first in row 3"),
    "constant": ({"X": np.ones_like(X)}, "all rows of X are the same up to rounding"),
    "constant but for rounding": ({"X": np.where(X > 0, 0.1, np.nextafter(0.1, 1))},
                                  "all rows of X are the same up to rounding"),
    "halves": ({"y": Y + 0.5}, r"y is 0.5 in row 0, which names no class: y = numpy.digitize\(y"),
    "a regression target": ({"y": X[:, 0]}, "in row 0, which names no class: y = numpy.digitize"),
    "whole numbers, all distinct": ({"y": np.arange(30)}, "y holds 30 different labels in 30 rows"),
    "names, all distinct": ({"y": np.arange(30).astype(str)}, "30 rows: merge them into fewer"),
    "no label": ({"y": changed(Y.astype(float), 4, np.nan)}, "y is nan in row 4: leave out rows"),
    "infinite label": ({"y": changed(Y.astype(float), 4, np.inf)}, "y is inf in row 4, which"),
    "empty text": ({"y": changed(Y.astype(str), 4, "")}, "y is '' in row 4: leave out rows"),
    "missing as text": ({"y": changed(Y.astype(str), 9, "nan")}, "y is 'nan' in row 9: leave out"),
    "dates": ({"y": Y.astype("datetime64[D]")}, "in row 0: labels must be all integers or all str"),
    "one class": ({"y": 0 * Y + 7}, "y holds one class only, 7: it takes at least two"),
    "source columns": (SOURCE | {"X_source": SOURCE["X_source"][:, 1:]},
                       "X_source has 4 columns and X has 5: both must come from the same encoder"),
    "source NaN": (SOURCE | {"X_source": SOURCE["X_source"] * np.nan}, "X_source holds 200 values"),
    "source labels": (SOURCE | {"y_source": np.ones(40)}, "y_source holds one class only, 1:"),
    "source lengths": (SOURCE | {"y_source": Y}, r"y_source has shape \(30,\), expected \(40,\)"),
    "source class": (SOURCE | {"y_source": np.ones(40, int)}, "y_source holds one class only, 1"),
    "shared rows": (SOURCE | {"X_source": changed(SOURCE["X_source"], 5, X[2])},
                    "1 rows of X_source are in X too, the first is row 5: leave them out"),
}  # fmt: skip


@pytest.mark.parametrize("arrays, told", REFUSED.values(), ids=REFUSED)
def test_unusable_arrays_are_refused_in_one_sentence(arrays, told, save, no_training):
    with pytest.raises(ValueError, match=f"my.npz: .*{told}") as refusal:
        load_rows(save(**{"X": X, "y": Y} | arrays))
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)


@pytest.mark.parametrize("missing", ["X", "y"])
def test_a_missing_array_is_named_and_those_that_are_there(missing, save):
    there = {"X": X, "y": Y, "labels": Y}
    del there[missing]
    told = rf"my.npz has no array '{missing}': it needs X and y, has {re.escape(str([*there]))}"
    with pytest.raises(ValueError, match=told):
        load_rows(save(**there))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


FILES = {
    "table": b"a,b,label\n1.0,2.0,0\n", "empty": b"", "pickle": b"\x80\x04N.", "npy": npy(X),
    "truncated": npz(X=npy(X), y=npy(Y))[:-40],
}  # fmt: skip
HUGE = npy(X).replace(b"(30, 5), }" + 14 * b" ", b"(" + 16 * b"9" + b", 5), }")
DAMAGED = {
    "cut": npz(X=npy(X)[:-40], y=npy(Y)),
    "no array": npz(X=b"1.0, 2.0", y=npy(Y)),
    "empty": npz(X=b"", y=npy(Y)),
    "flipped": npz(X=npy(X), y=npy(Y)).replace(X[7].tobytes(), X[8].tobytes(), 1),
    "larger than memory": npz(X=HUGE, y=npy(Y)),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_file_that_is_no_npz_is_refused(content, tmp_path):
    (tmp_path / "my.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"my\.npz is no \.npz file.*savez\('my.npz', X=X, y=y\)"):
        load_rows(tmp_path / "my.npz")


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_array_is_refused_by_name(content, tmp_path):
    (tmp_path / "my.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"my\.npz: (array 'X' cannot be read|X has dtype \|S)"):
        load_rows(tmp_path / "my.npz")


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "my.npz", tmp_path):
        with pytest.raises(ValueError, match="there is no such file"):
            load_rows(path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["X", "y", "X_source", "y_source"])
def test_python_objects_are_refused_and_run_no_code(name, save, tmp_path):
    objects = np.array([Bomb(tmp_path / "ran")] * 30, dtype=object)
    path = save(**{"X": X, "y": Y} | SOURCE | {name: objects})
    with pytest.raises(ValueError, match=f"array '{name}' cannot be read.*no Python objects"):
        load_rows(path)
    assert not (tmp_path / "ran").exists()
    with np.load(path, allow_pickle=True) as file:
        file[name]
    assert (tmp_path / "ran").exists()  # the trap works


def test_other_arrays_are_told_of_and_not_read(save, tmp_path):
    rows = load_rows(save(X=X, y=Y, names=np.array([Bomb(tmp_path / "ran")], dtype=object)))
    assert rows.notes == ["arrays ['names'] are not used"] and not (tmp_path / "ran").exists()


def test_rows_arrive_as_they_were_in_float64_and_int64(save):
    rows = load_rows(save(X=X.astype(">f4"), y=Y.astype(np.uint8), **SOURCE))
    assert rows.X.dtype == rows.X_source.dtype == torch.float64
    assert rows.y.dtype == rows.y_source.dtype == torch.int64
    assert np.array_equal(rows.X, X.astype(np.float32)) and np.array_equal(rows.y, Y)
    assert np.array_equal(rows.X_source, SOURCE["X_source"])
    assert rows.classes == [0, 1, 2] and rows.notes == []
    assert check_arrays(X, Y).X_source is None


NAMES = np.array(["dog", "Cat", "éléphant"])


@pytest.mark.parametrize(
    "labels, classes",
    [
        (NAMES[Y], ["Cat", "dog", "éléphant"]),
        (np.char.encode(NAMES, "utf-8")[Y], ["Cat", "dog", "éléphant"]),
        (NAMES[Y].astype(object), ["Cat", "dog", "éléphant"]),
        (NAMES[Y].tolist(), ["Cat", "dog", "éléphant"]),
        (Y > 0, [False, True]),
        (list(Y > 0), [False, True]),
        (Y.astype(np.float16) - 1, [-1, 0, 1]),
        ((Y + 2.0**60).tolist(), [2**60]),
        (torch.tensor(Y, dtype=torch.bfloat16), [0, 1, 2]),
        (Y.astype(np.uint64) + np.uint64(2**63), [2**63, 2**63 + 1, 2**63 + 2]),
        (Y.astype(object), [0, 1, 2]),
    ],
)
def test_labels_of_any_kind_are_numbered_and_keep_their_names(labels, classes):
    if len(classes) == 1:  # 2^60 + 1 is no float64
        with pytest.raises(ValueError, match=f"one class only, {2**60}: it takes"):
            check_arrays(X, labels)
        return
    rows = check_arrays(X, labels)
    notes = [note for note in rows.notes if "mapped" in note]
    assert rows.classes == classes and {type(c) for c in rows.classes} == {type(classes[0])}
    assert rows.y.dtype == torch.int64 and len(notes) == (classes not in ([0, 1, 2], [0, 1]))
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    plain = [c.decode() if isinstance(c, bytes) else c for c in labels]
    assert [rows.classes[i] for i in rows.y] == plain


@pytest.mark.parametrize(
    "labels, told",
    [
        ([None, *NAMES[Y[1:]]], "y is None in row 0: leave out rows without a label"),
        ([*NAMES[Y[1:]], float("nan")], "y is nan in row 29: leave out rows without a label"),
        ([*NAMES[Y[1:]], 7], r"y is 7 in row 29: labels must .*, numpy.array\(y\).astype\(str\)"),
        ([1, *NAMES[Y[1:]]], "y is 'dog' in row 1: labels must be all integers or all strings"),
        (np.ma.masked_equal(Y, 2), "y has masked entries: leave out their rows"),
        (np.array([{1}, {2}] * 15), r"y is \{1\} in row 0: labels must be all integers or all"),
    ],
)
def test_labels_that_are_no_labels_are_refused_with_their_row(labels, told):
    with pytest.raises(ValueError, match=told) as refusal:
        check_arrays(X, labels)
    assert "\n" not in str(refusal.value)


def test_labels_that_look_alike_stay_apart_and_that_is_said():
    notes = check_arrays(X, np.array(["cat", "Cat", "dog"])[Y]).notes
    assert notes[1:] == ["y: 'Cat' and 'cat' are two classes, but look like one"]


def test_cures_of_refusals_work(save):
    mixed = [1, *NAMES[Y[1:]]]
    check_arrays(X, np.array(mixed).astype(str))
    for target in (X[:, 0], np.arange(30)):
        with pytest.raises(ValueError, match=r"numpy\.digitize") as refusal:
            check_arrays(X, target)
        cure = str(refusal.value).split(": y = ")[1].split(" makes")[0]
        assert len(check_arrays(X, eval(cure, {"numpy": np, "y": target})).classes) == 3
    objects = NAMES[Y].astype(object)
    with pytest.raises(ValueError, match=r"of labels, y.astype\(str\), no Python objects"):
        load_rows(save(X=X, y=objects))
    assert load_rows(save(X=X, y=objects.astype(str))).classes == ["Cat", "dog", "éléphant"]
    x = changed(X, (slice(None), 2), np.nan)  # no row is whole: a column has to go
    with pytest.raises(ValueError, match="first in row 0: leave out such rows, or columns"):
        check_arrays(x, Y)
    check_arrays(np.delete(x, 2, axis=1), Y)
    y = np.array(["a"] * 20 + ["b"] * 8 + ["c"] * 2)
    with pytest.raises(ValueError, match=r"class 'c' has 2 rows, .*: none works with it"):
        check_budgets(check_arrays(X, y), [1])
    check_budgets(check_arrays(X[y != "c"], y[y != "c"]), [2])


def test_masked_and_half_precision_rows():
    with pytest.raises(ValueError, match="X has masked entries: leave out their rows"):
        check_arrays(np.ma.masked_greater(X, 1), Y)
    half = torch.tensor(X, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(check_arrays(half, Y).X, half.detach().double())


@pytest.mark.parametrize("most, told", [(14, False), (15, False), (16, True), (27, True)])
def test_class_shares_are_told_where_they_are_unequal(most, told):
    rows = (
        check_arrays(X[:25], np.arange(25) >= 25 - most)
        if most <= 20
        else check_arrays(
            X, np.array(["rare", "frequent"])[(np.arange(30) >= 30 - most).astype(int)]
        )
    )
    assert rows.unequal == told == any("constant answer" in note for note in rows.notes)
    if most == 27:
        assert rows.notes[-1] == (
            "27 of 30 rows are of class 'frequent', 3 of class 'rare': a constant answer gets"
            " 90.0 % right, so read balanced accuracy, the mean over classes, beside accuracy"
        )


def test_labels_that_do_not_count_from_0_are_mapped_and_said():
    rows = check_arrays(X, np.array([-5, 40, 7])[Y])
    assert rows.classes == [-5, 7, 40] and np.array_equal(rows.y, np.array([0, 2, 1])[Y])
    assert rows.notes == ["y: labels [-5, 7, 40] are mapped to 0..2"]
    source = SOURCE | {"y_source": SOURCE["y_source"] + 1}
    assert check_arrays(X, Y, **source).notes == ["y_source: labels [1, 2] are mapped to 0..1"]
    many = check_arrays(np.repeat(X, 2, axis=0) + np.arange(60)[:, None], np.arange(60) // 4)
    assert many.notes == []
    [told] = check_arrays(X, np.arange(30) // 2 * 2).notes
    assert told == "y: labels [0, 2, 4, 6, 8, 10, 12, 14, 16, ...] are mapped to 0..14"


@pytest.mark.parametrize("size", [1.0, 2.0**200, 2.0**-200])
def test_a_row_saved_in_single_precision_or_with_minus_zero_is_the_same_row(size):
    rows = changed(X, (2, 0), 0.0)
    copy = changed(rows[2].astype(np.float32).astype(float), 0, -0.0)
    shared = SOURCE | {"X_source": size * changed(SOURCE["X_source"], 5, copy)}
    with pytest.raises(ValueError, match="1 rows of X_source are in X too, the first is row 5"):
        check_arrays(size * rows, Y, **shared)
    assert check_arrays(size * changed(rows, 9, copy), Y).notes[0].startswith("1 rows of X repeat")
    apart = SOURCE | {"X_source": size * SOURCE["X_source"]}
    assert check_arrays(size * rows, Y, **apart).notes == []


def noisy(value, dtype, n=30):
    """Return numbers of `dtype` that differ from `value` in the last bit."""
    value = np.array(value, dtype)
    return np.where(np.arange(n) % 3 == 0, value, np.nextafter(value, dtype(np.inf)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("stored_as", [None, np.float64])
@pytest.mark.parametrize("value", [0.1, -7.3, 1.0, 300.0])
def test_columns_that_are_constant_up_to_rounding_are_constant(value, dtype, stored_as):
    if dtype == np.float16 and stored_as:
        pytest.skip("integers up to 2,048 are half precision, too: only its dtype tells")
    column = noisy(value, dtype).astype(stored_as or dtype)
    rows = check_arrays(np.c_[X.astype(dtype).astype(column.dtype), column], Y)
    scaled = decide._standardized(rows.X, like=rows.X, rounding=rows.rounding)
    assert (scaled[:, -1] == 0).all() and (scaled[:, :-1].std(0, correction=0) > 0.999).all()


def test_columns_that_vary_little_are_kept_as_scikit_learn_keeps_them():
    for x in (1e6 + X, 1e9 + 1e-3 * X, 1e-12 * X, np.arange(60).reshape(30, 2) + 10**6):
        rows = check_arrays(x, Y)
        scaled = decide._standardized(rows.X, like=rows.X, rounding=rows.rounding)
        assert np.allclose(scaled, StandardScaler().fit_transform(x), atol=1e-3)
        assert (scaled.std(0, correction=0) > 0.99).all()


def test_columns_constant_but_for_rounding_cost_no_accuracy():
    x, y = clusters(CORNERS[:3], [0, 1, 2], n=20, seed=0)
    padding = np.tile(noisy(0.1, np.float64, 60), (40, 1)).T
    found = compare_methods(0, data=check_arrays(np.c_[x, padding], y), budget=5, epochs=20)
    assert found["logistic head"] > 90 and found["fine-tuning"] > 90


def test_repeated_rows_are_told():
    assert check_arrays(changed(X, [4, 9], X[0]), Y).notes[0].startswith("2 rows of X repeat")


@pytest.mark.parametrize("budgets", [[], [0], [2, -1], [2.0], ["2"]])
def test_budgets_that_are_no_counts_are_refused(budgets):
    with pytest.raises(ValueError, match=r"label budgets .* must be integers, 1 or more"):
        check_budgets(check_arrays(X, Y), budgets)


@pytest.mark.parametrize("least, works", [(11, "largest that works is 3"), (2, "none works")])
def test_a_class_with_too_few_rows_is_named_before_any_training(least, works, no_training):
    y = np.array([3] * (30 - least) + [5] * least)
    rows, told = check_arrays(X, y), f"class 5 has {least} rows, .* of 4 labels needs 12, .*{works}"
    for refused in (
        lambda: check_budgets(rows, [1, 4]),
        lambda: compare_methods(0, data=rows, budget=4),
    ):
        with pytest.raises(ValueError, match=told) as refusal:
            refused()
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("n", range(3, 13))
def test_the_largest_budget_is_as_promised(n):
    rows = check_arrays(RNG.normal(size=(30 + n, 2)), np.repeat([0, 1], [30, n]))
    check_budgets(rows, [n // 3])
    parts = split(rows.y, n // 3, seed=0)
    assert all(len(part) for part in parts.values())
    with pytest.raises(ValueError, match=f"largest that works is {n // 3}$"):
        check_budgets(rows, [n // 3 + 1])


def test_a_split_is_stratified_disjoint_nested_and_follows_its_seed():
    y = torch.tensor([0] * 10 + [1] * 31 + [2] * 12)[
        torch.randperm(53, generator=torch.Generator().manual_seed(0))
    ]
    parts, smaller = split(y, 3, seed=1), split(y, 1, seed=1)
    rows = {name: set(part.tolist()) for name, part in parts.items()}
    assert all(len(rows[name]) == len(part) for name, part in parts.items())
    assert not rows["test"] & rows["pool"] and rows["test"] | rows["pool"] == set(range(53))
    assert not rows["few"] & rows["validation"]
    assert rows["few"] | rows["validation"] <= rows["pool"]
    assert [y[part].bincount().tolist() for part in parts.values()] == [
        [4, 11, 4], [3, 3, 3], [3, 3, 3], [6, 20, 8],
    ]  # fmt: skip
    assert torch.equal(smaller["test"], parts["test"])
    assert all(set(smaller[name].tolist()) <= rows[name] for name in ("few", "validation"))
    assert not torch.equal(split(y, 3, seed=2)["test"], parts["test"])


BLOBS = check_arrays(*clusters(CORNERS[:2], [0, 1], n=15, seed=0))
QUICK = {"budget": 2, "epochs": 4}


def seen_by_training(data, monkeypatch):
    """Return all that pre-training and methods are handed; and all scores, with their rows."""
    seen, scores = [], []

    def _recording(function):
        def _record(first, *rows, **options):
            seen.extend(np.asarray(part).copy() for part in rows if part is not None)
            return function(first, *rows, **options)

        return _record

    def _evaluate(model, *rows):
        scores.append((len(rows[0]), evaluate(model, *rows)))
        return scores[-1][1]

    with monkeypatch.context() as patch:
        for module in (decide, strategies):
            patch.setattr(module, "train", _recording(train))
        plain = decide.LogisticRegression
        patch.setattr(plain, "fit", _recording(plain.fit))
        patch.setattr(decide, "evaluate", _evaluate)
        compare_methods(0, data=data, **QUICK)
    return seen, scores


@pytest.mark.parametrize("source", [False, True])
def test_test_rows_reach_no_scaler_no_pretraining_and_no_choice(source, monkeypatch):
    data = BLOBS
    if source:
        data = data._replace(X_source=2 * BLOBS.X + 1, y_source=BLOBS.y)
    test = split(data.y, 2, seed=0)["test"]
    other = data.X.clone()
    other[test] = 100 * other[test] + 7
    seen, scores = seen_by_training(data, monkeypatch)
    also_seen, others = seen_by_training(data._replace(X=other), monkeypatch)
    assert len(seen) == len(also_seen) > 20
    assert all(np.array_equal(a, b) for a, b in zip(seen, also_seen, strict=True))
    chosen = [s for n, s in scores if n == 4]
    assert chosen == [s for n, s in others if n == 4] and len(chosen) == 3 * len(METHODS)
    assert [s for n, s in scores if n == 10] != [s for n, s in others if n == 10]


def test_unlabelled_rows_are_used_without_their_labels(monkeypatch):
    parts = split(BLOBS.y, 2, seed=0)
    labelled = set(torch.cat([parts[name] for name in ("test", "few", "validation")]).tolist())
    rest = [i for i in range(len(BLOBS.y)) if i not in labelled]
    y = BLOBS.y.clone()
    y[rest] = 1 - y[rest]
    monkeypatch.setattr(decide, "split", lambda *args, **options: parts)
    false = compare_methods(0, data=BLOBS._replace(y=y), **QUICK)
    assert rest and false == compare_methods(0, data=BLOBS, **QUICK)


def test_a_comparison_is_a_function_of_its_seed():
    torch.manual_seed(1)
    first = compare_methods(3, data=BLOBS, **QUICK)
    torch.rand(5)
    assert (
        compare_methods(3, data=BLOBS, **QUICK) == first != compare_methods(4, data=BLOBS, **QUICK)
    )
    assert list(first) == [*METHODS, "margin"] and torch.get_default_dtype() == torch.float32
    for_a_process = pickle.dumps(partial(compare_methods, data=BLOBS, **QUICK))
    assert pickle.loads(for_a_process)(3) == first


def test_the_rate_that_gets_most_validation_rows_right_is_scored_the_smallest_of_equals(
    monkeypatch,
):
    right = iter(
        [1, 3, 3, 50] * len(METHODS)
    )  # three rates on validation rows, one of them on test
    models = []

    def _evaluate(model, X, y):
        models.append(model)
        return evaluate(model, X, y)._replace(correct=next(right), n=100, margin=len(models))

    monkeypatch.setattr(decide, "evaluate", _evaluate)
    found = compare_methods(0, data=BLOBS, **QUICK)
    assert found == dict.fromkeys(METHODS, 50.0) | {"margin": 1}
    for *tried, scored in zip(*[iter(models)] * 4, strict=True):
        assert scored is tried[1]


def test_balanced_accuracy_stands_beside_accuracy_where_classes_are_unequal():
    rng = np.random.default_rng(0)
    y = np.array(["rare", "frequent"])[(np.arange(150) >= 15).astype(int)]
    data = check_arrays(rng.normal(size=(150, 3)), y)  # X tells nothing
    assert data.classes == ["frequent", "rare"] and data.unequal
    runs = [compare_methods(seed, data=data, budget=3, epochs=4) for seed in range(3)]
    assert list(runs[0])[-1] == "margin" and len(runs[0]) == 2 * len(METHODS) + 3
    y_test = data.y[split(data.y, 3, seed=0)["test"]]
    assert runs[0]["constant answer"] == pytest.approx(100 * (y_test == 0).double().mean())
    assert runs[0]["constant answer, balanced"] == 50
    results = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    told = str(recommend(results, method_sizes(data)))
    assert "Classes are unequal: against a constant answer" in told
    assert (
        "Balanced accuracy, the mean over classes: " in told and "a constant answer 50.0 %" in told
    )
    balanced = recommend(results, method_sizes(data)).balanced
    assert list(balanced) == [*METHODS, "constant answer"]
    equal = {name: v for name, v in results.items() if "balanced" not in name and "con" not in name}
    assert "constant" not in str(recommend(equal, method_sizes(data)))


def test_balanced_accuracy_is_the_mean_over_classes():
    x, y = torch.eye(2, dtype=torch.float64)[[0, 0, 0, 1, 0]], torch.tensor([0, 0, 0, 1, 1])
    model = torch.nn.Identity()
    model.register_parameter("p", torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    assert decide._balanced(model, x, y) == 75  # 100 % of one class, half of the other


def test_too_few_epochs_are_refused_before_any_training(no_training):
    with pytest.raises(ValueError, match="epochs = 1 must be 2 or more: LP-FT trains in two"):
        compare_methods(0, data=BLOBS, budget=2, epochs=1)


def test_every_method_trains_for_as_many_epochs(monkeypatch):
    epochs = {decide: [], strategies: []}
    for module, noted in epochs.items():
        monkeypatch.setattr(
            module, "train", lambda *rows, noted=noted, **o: noted.append(o["epochs"])
        )
    compare_methods(0, data=BLOBS, budget=2, epochs=5)
    assert epochs[decide][1:] == [5] * 3 * 5  # after pre-training, five methods at three rates
    assert epochs[strategies] == [5] * 3 + [2, 3] * 3  # linear probing; LP-FT in two phases


def test_pretraining_without_labels_restores_masked_entries():
    factor = torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = torch.cat([factor, -factor], 1)
    with reproducible(0):
        restored = predict(pretrain(X), X * torch.tensor([0.0, 1.0]))[:, 0]
    assert ((restored - X[:, 0]) ** 2).mean() < 0.1


def test_sizes_match_closed_forms():
    d, c = 5, 3
    sizes = method_sizes(check_arrays(X, Y))
    head, mlp = 32 * c + c, (d + 1) * 64 + 65 * 64 + 65 * 32
    assert sizes == {
        "logistic head": (d + 1) * c,
        "scratch": mlp + head, "linear probing": head, "fine-tuning": mlp + head,
        "LP-FT": mlp + head, "BitFit": 64 + 64 + 32 + head,
        "LoRA": 4 * (d + 64 + 64 + 64 + 64 + 32) + head,
        "adapters": 2 * (2 * 64 * 8 + 8 + 64) + 2 * 32 * 4 + 4 + 32 + head,
    }  # fmt: skip
    assert list(sizes) == list(METHODS)
    assert method_sizes(BLOBS)["logistic head"] == 2 + 1  # one column for two classes


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_logistic_head_is_scikit_learns(n_classes):
    x, y = torch.from_numpy(X), torch.from_numpy(Y % n_classes)
    with reproducible(0):
        head = decide._logistic_head(x, y, 1.0)
        probability = head(x).softmax(1).detach().numpy()
    plain = decide.LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(X, Y % n_classes)
    assert np.allclose(probability, plain.predict_proba(X), atol=1e-5)


@pytest.mark.parametrize("constant", [0.1, 1e6 + 0.1, 3e99])
def test_one_column_and_constant_columns_will_do(constant):
    column = BLOBS.X[:, :1]
    padded = np.pad(column, ((0, 0), (0, 2)), constant_values=constant)
    for x in (column, padded, 1e-300 * column, 1e98 * column):
        x = torch.as_tensor(x)
        scaled = decide._standardized(x, like=x)
        assert scaled[:, 0].std(correction=0) == pytest.approx(1) or x.max() < 1e-200
        assert (scaled[:, 1:] == 0).all() and scaled.isfinite().all()
    found = compare_methods(0, data=check_arrays(padded, BLOBS.y), **QUICK)
    assert found["logistic head"] == 100
    assert compare_methods(0, data=check_arrays(column, BLOBS.y), **QUICK)["LoRA"] > 0


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_a_file_of_real_rows_runs_from_end_to_end(load, save):
    x, y = load(return_X_y=True)
    rows = load_rows(save(X=x, y=y + 1))
    check_budgets(rows, [2])
    found = compare_methods(0, data=rows, budget=2)
    assert found["margin"] > 0 and min(found[name] for name in METHODS) > 70
    assert ("constant answer" in found) == rows.unequal == (load is load_breast_cancer)


def recommendation(data, monkeypatch, *, without="scratch", **options):
    """Compare four methods on seven seeds, the fewest that can show a difference."""
    four = {"logistic head", "scratch", "linear probing", "LoRA", "fine-tuning"} - {without}
    monkeypatch.setattr(decide, "METHODS", {name: m for name, m in METHODS.items() if name in four})
    runs = [compare_methods(seed, data=data, **options) for seed in range(7)]
    results = {name: np.array([run[name] for run in runs]) for name in four}
    return recommend(results, method_sizes(data)), results


def test_the_head_alone_is_recommended_where_classes_are_linearly_separable(monkeypatch):
    data = check_arrays(*clusters(CORNERS[:2], [0, 1], n=40, seed=1))
    found, results = recommendation(data, monkeypatch, budget=5, epochs=20)
    assert found.name == "logistic head" and results["logistic head"].mean() > 99


def test_fine_tuning_is_recommended_where_nothing_smaller_learns_the_classes(monkeypatch):
    x = np.random.default_rng(1).normal(size=(400, 3))
    data = check_arrays(x, (x > 0).sum(1) % 2)  # parity: each octant borders on the other class
    found, results = recommendation(data, monkeypatch, budget=50)
    assert found.name == found.best == "fine-tuning" and results["fine-tuning"].mean() > 80
    assert {c.sign for c in found.comparisons.values()} == {"▼"}


def test_what_the_source_taught_makes_a_linear_probe_enough(monkeypatch):
    source = clusters(CORNERS, [0, 0, 1, 1], n=60, seed=2)
    data = check_arrays(*clusters(CORNERS, [0, 0, 1, 1], n=60, seed=3), *source)
    found, _ = recommendation(data, monkeypatch, without="LoRA", budget=3, epochs=20)
    assert found.name == "linear probing"
    assert found.comparisons["logistic head"].sign == found.comparisons["scratch"].sign == "▼"


SIZES = {"head": 10, "LoRA": 100, "fine-tuning": 1000, "scratch": 1000}


def planted(n=10, **means):
    """Return results of these means, with a spread over seeds that most of it pairs share."""
    rng = np.random.default_rng(1)
    shared = rng.normal(80, 3, n)
    return {name: shared + means.get(name, 0.0) + rng.normal(0, 0.5, n).round(6) for name in SIZES}


def test_where_only_fine_tuning_is_good_it_is_recommended():
    found = recommend(planted(**{"fine-tuning": 8.0}) | {"margin": np.zeros(10)}, SIZES)
    assert found.name == found.best == "fine-tuning"
    assert {c.sign for c in found.comparisons.values()} == {"▼"} and len(found.comparisons) == 3
    told = str(found)
    assert "all smaller ones are significantly worse" in told and "1,000 parameters" in told
    assert "Significantly worse than the best: head, LoRA, scratch" in told


def test_the_smallest_that_is_not_significantly_worse_is_recommended_with_its_interval():
    found = recommend(planted(**{"head": -8.0, "fine-tuning": 0.4, "LoRA": 0.2}), SIZES)
    assert found.name == "LoRA" and found.best == "fine-tuning"
    first = str(found).splitlines()[0]
    c = found.comparisons["LoRA"]
    assert f"{c.numbers} points against the best, fine-tuning (1,000 parameters)" in first
    assert f"below {c.detectable_among(3):.1f} points is too small" in first
    assert f"p = {c.p:.2f}" in first


def test_without_a_difference_the_smallest_is_recommended_and_that_is_said():
    found = recommend(planted(), SIZES)
    assert found.name == "head" and {c.sign for c in found.comparisons.values()} == {""}
    assert "No method is significantly worse than the best: size alone decides" in str(found)
    same = recommend(dict.fromkeys(SIZES, np.full(10, 90.0)), SIZES)
    assert same.name == same.best == "head" and "no method is smaller" in str(same)


def test_of_one_size_the_better_mean_is_recommended():
    results = planted(head=-9, LoRA=-9, scratch=0.6)
    assert recommend(results, SIZES).name == "scratch"
    assert (
        recommend(results | {"fine-tuning": results["scratch"] + 0.3}, SIZES).name == "fine-tuning"
    )


@pytest.mark.parametrize("methods, needed", [(2, 6), (4, 7), (8, 9)])
def test_too_few_seeds_for_any_significance_are_told(methods, needed):
    sizes = {f"method {i}": i for i in range(1, methods + 1)}
    for n in (needed - 1, needed):
        wave = np.arange(n) % 3
        results = {name: size * 20 + wave * (1 + size / 9) for name, size in sizes.items()}
        found = recommend(results, sizes)
        one_sided = all(c.sign == "▼" for c in found.comparisons.values())
        told = f"take at least {needed} seeds" in str(found)
        assert one_sided == (n == needed) != told
        assert not (told and "points is too small" in str(found))
        assert found.name == (f"method {methods}" if one_sided else "method 1")


def test_results_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"no results for \['scratch'\], only for \['head'"):
        recommend({name: values for name, values in planted().items() if name != "scratch"}, SIZES)
    with pytest.raises(ValueError, match=r"at least two methods, there is \['head'\]"):
        recommend(planted(), {"head": 10})
    with pytest.raises(ValueError, match="at least 2 seeds"):
        recommend(planted(n=1), SIZES)
    with pytest.raises(ValueError, match="the size of 'LoRA' is nan: it counts parameters"):
        recommend(planted(), SIZES | {"LoRA": np.nan})
