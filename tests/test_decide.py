"""A reader's own rows: what is refused, what no candidate may see, and what is recommended."""

import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from helpers.data import are_words, check_arrays, load_rows
from helpers.finetuner import TECHNIQUES, FineTuner
from helpers.study import decide
from helpers.study.decide import CONSTANT, Scores, recommend
from helpers.study.verdicts import compare_folds, summarize_folds

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


FLOOR = {CONSTANT: DummyClassifier(strategy="most_frequent")}


def heads(rows):
    return decide.head_candidates(rows)


def standardized(X, rounding):
    return decide._Standardized(rounding).fit_transform(np.asarray(X))


@pytest.fixture
def save(tmp_path):
    def _save(**arrays):
        np.savez(tmp_path / "my.npz", **arrays)
        return tmp_path / "my.npz"

    return _save


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
def test_unusable_arrays_are_refused_in_one_sentence(arrays, told, save):
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
    assert rows.classes == [0, 1, 2] and rows.source_classes == [0, 1]
    assert rows.notes == ["the source rows are not used: their classes are not those of y"]
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
    y[0] = "d"
    with pytest.raises(ValueError, match=r"class 'd' has one row, .*label a second one, or leave"):
        decide.cross_validate(FLOOR, X, y)
    assert decide.cross_validate(FLOOR, X[1:], y[1:], workers=1).folds == 2
    y[1] = "d"
    assert decide.cross_validate(FLOOR, X, y, workers=1).folds == 2


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
            " 90.0 % right, so balanced accuracy, the mean over classes, is compared"
        )


def test_labels_that_do_not_count_from_0_are_mapped_and_said():
    rows = check_arrays(X, np.array([-5, 40, 7])[Y])
    assert rows.classes == [-5, 7, 40] and np.array_equal(rows.y, np.array([0, 2, 1])[Y])
    assert rows.notes == ["y: labels [-5, 7, 40] are mapped to 0..2"]
    source = SOURCE | {"y_source": SOURCE["y_source"] + 1}
    notes = check_arrays(X, Y, **source).notes
    assert notes[0] == "y_source: labels [1, 2] are mapped to 0..1" and len(notes) == 2
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
    [told] = check_arrays(size * rows, Y, **apart).notes
    assert told.startswith("the source rows are not used")


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
    scaled = standardized(rows.X, rows.rounding)
    assert (scaled[:, -1] == 0).all() and (scaled[:, :-1].std(0) > 0.999).all()


def test_columns_that_vary_little_are_kept_as_scikit_learn_keeps_them():
    for x in (1e6 + X, 1e9 + 1e-3 * X, 1e-12 * X, np.arange(60).reshape(30, 2) + 10**6):
        rows = check_arrays(x, Y)
        scaled = standardized(rows.X, rows.rounding)
        assert np.allclose(scaled, StandardScaler().fit_transform(x), atol=1e-3)
        assert (scaled.std(0) > 0.99).all()


def test_columns_constant_but_for_rounding_cost_no_accuracy():
    x, y = clusters(CORNERS[:3], [0, 1, 2], n=20, seed=0)
    padding = np.tile(noisy(0.1, np.float64, 60), (40, 1)).T
    rows = check_arrays(np.c_[x, padding], y)
    found = decide.cross_validate(heads(rows), rows.X.numpy(), y, repeats=1, workers=1)
    assert all(found.scores[name].mean() > 90 for name in found.scores if name != CONSTANT)


def test_repeated_rows_are_told():
    assert check_arrays(changed(X, [4, 9], X[0]), Y).notes[0].startswith("2 rows of X repeat")


SEEN = []  # (candidate, "fit" or "predict", numbers of the rows), in the order of calls


class Recorder(ClassifierMixin, BaseEstimator):
    """Notes which rows it is handed; a row's number is its only feature, as text or number."""

    def __init__(self, name, answer=0):
        self.name, self.answer = name, answer

    def fit(self, X, y):
        SEEN.append((self.name, "fit", [int(np.ravel(x)[0]) for x in X], y.tolist()))
        self.classes_ = np.unique(y)
        return self

    def predict(self, X):
        SEEN.append((self.name, "predict", [int(np.ravel(x)[0]) for x in X]))
        return np.full(len(X), self.classes_[self.answer])


@pytest.mark.parametrize("texts", [False, True])
def test_candidates_see_the_same_folds_and_are_never_scored_on_what_they_learnt_from(texts):
    SEEN.clear()
    y = np.repeat([0, 1, 2], [20, 15, 14])
    X = [str(i) for i in range(49)] if texts else np.arange(49.0)[:, None]
    candidates = {name: Recorder(name) for name in "ab"}
    found = decide.cross_validate(candidates, X, y, repeats=3, workers=1)
    calls = {name: [call[1:] for call in SEEN if call[0] == name] for name in "ab"}
    assert calls["a"] == calls["b"] and len(calls["a"]) == 2 * 15
    scored = []
    for (kind, learnt, labels), (then, rows) in zip(*[iter(calls["a"])] * 2, strict=True):
        assert (kind, then) == ("fit", "predict") and labels == y[learnt].tolist()
        assert sorted(learnt + rows) == list(range(49))
        assert set(np.bincount(y[rows]) - [4, 3, 2]) <= {0, 1}  # stratified
        scored += rows
    assert sorted(scored) == sorted([*range(49)] * 3) and not hasattr(candidates["a"], "classes_")
    assert list(found.scores) == ["a", "b"] and {len(v) for v in found.scores.values()} == {15}
    assert found[1:5] == ("accuracy", 5, 49, 100 / 49)
    assert found.notes == ["5 folds, 3 times: 15 fits of each candidate; accuracy"]
    [once] = decide.cross_validate(candidates, X, y, repeats=1, workers=1).notes
    assert once == "5 folds, once: 5 fits of each candidate; accuracy"


def test_scores_do_not_depend_on_workers_and_follow_the_seed():
    candidates = {"1": KNeighborsClassifier(1), "logistic": LogisticRegression()} | FLOOR
    one, two, other = (
        decide.cross_validate(candidates, X, Y, seed=seed, workers=workers).scores
        for seed, workers in ((0, 1), (0, 2), (1, 1))
    )
    assert all(np.array_equal(one[name], two[name]) for name in candidates)
    assert not np.array_equal(one["1"], other["1"])


@pytest.mark.parametrize("n, fits", [(50, 10), (500, 10), (501, 5), (2000, 5)])
def test_the_number_of_fits_follows_the_number_of_labels(n, fits):
    found = decide.cross_validate(FLOOR, np.zeros((n, 1)), np.arange(n) % 2, workers=1)
    assert len(found.scores[CONSTANT]) == fits and found.folds == 5


def test_a_candidate_that_fails_is_named():
    class _Fails(Recorder):
        def fit(self, X, y):
            raise OSError("no weights in this folder")

    with pytest.raises(ValueError, match=r"'LoRA' failed .*: OSError: no weights in this folder"):
        decide.cross_validate(FLOOR | {"LoRA": _Fails("x")}, X, Y, workers=1)
    with pytest.raises(ValueError, match=r"workers = 0 must be from 1 to the"):
        decide.cross_validate(FLOOR, X, Y, workers=0)
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[30, 29\]"):
        decide.cross_validate(FLOOR, X, Y[1:])


def test_labels_that_cannot_be_split_are_refused_with_their_class():
    with pytest.raises(ValueError, match=r"class 7 has one row, .*: label a second one") as refusal:
        decide.cross_validate(FLOOR, X, changed(Y, 3, 7))
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)
    with pytest.raises(ValueError, match="all labels are 'tech': it takes at least two classes"):
        decide.cross_validate(FLOOR, X, np.full(30, "tech"))


@pytest.mark.parametrize("least, folds, fits", [(2, 2, 10), (3, 3, 9), (4, 4, 8), (5, 5, 10)])
def test_a_small_class_makes_fewer_folds_and_each_has_a_row_of_it(least, folds, fits):
    SEEN.clear()
    y = np.array(["rare"] * least + ["frequent"] * 20)
    found = decide.cross_validate({"a": Recorder("a")}, np.arange(len(y)), y, workers=1)
    assert (found.folds, len(found.scores["a"])) == (folds, fits)
    told = [f"{folds} folds, not 5: class 'rare' has {least} rows only"]
    assert found.notes[:-1] == (told if folds < 5 else [])
    assert all(set(rows[0]) & {*range(least)} for _, kind, *rows in SEEN if kind == "predict")


def test_balanced_accuracy_is_compared_where_classes_are_unequal():
    y = np.array(["rare", "frequent"])[(np.arange(60) >= 10).astype(int)]
    x = np.c_[np.arange(60) >= 5, np.zeros(60)].astype(float)  # half of the rare look frequent
    found = decide.cross_validate(FLOOR | {"1": KNeighborsClassifier(1)}, x, y, workers=1)
    assert found.metric == "balanced accuracy" and found.row == 100 / 2 / 10
    assert (found.scores[CONSTANT] == 50).all()
    splits = RepeatedStratifiedKFold(n_splits=5, n_repeats=2, random_state=0).split(x, y)
    plain = [
        balanced_accuracy_score(y[b], KNeighborsClassifier(1).fit(x[a], y[a]).predict(x[b]))
        for a, b in splits
    ]
    assert found.scores["1"] == pytest.approx(100 * np.array(plain))
    equal = decide.cross_validate(FLOOR, x[:25], np.arange(25) >= 10, workers=1)
    assert equal.metric == "accuracy"  # 15 rows are 1.5 times 10, not more


@pytest.mark.parametrize("classes", [2, 40])
def test_two_classes_and_forty(classes):
    rng, y = np.random.default_rng(0), np.repeat(np.arange(classes), 240 // classes)
    rows = check_arrays(4 * np.eye(classes)[y] + rng.normal(size=(240, classes)), y)
    few = {n: h for n, h in heads(rows).items() if n in (CONSTANT, "nearest neighbour")}
    told = str(recommend(decide.cross_validate(few, rows.X.numpy(), rows.labels, workers=1)))
    assert "Recommended: nearest neighbour" in told and "Worse than nea" in told


def test_folds_are_compared_by_the_corrected_resampled_t_test():
    a, b = np.array([80.0, 82, 85, 79, 90]), np.array([78.0, 81, 80, 80, 82])
    c, d = compare_folds(a, b, folds=5), a - b
    error = np.sqrt((1 / 5 + 20 / 80) * d.var(ddof=1))
    low, high = stats.t.interval(0.95, 4, d.mean(), error)
    assert (c.difference, c.low, c.high) == pytest.approx((d.mean(), low, high))
    assert c.p == pytest.approx(2 * stats.t.sf(d.mean() / error, 4)) and c.n == 5
    assert c.wins == 0.8 and c.verdict == "not told apart at 5 folds"
    wide = compare_folds(a, b, folds=5, tail=0.005)
    assert wide.high == pytest.approx(d.mean() + stats.t.ppf(0.995, 4) * error)
    assert (c.p < 0.05) == (c.low > 0) and wide.p == pytest.approx(min(1, 5 * c.p))
    [summary] = summarize_folds({"a": a}, folds=5).values()
    reach = stats.t.ppf(0.975, 4) * np.sqrt((1 / 5 + 1 / 4) * a.var(ddof=1))
    assert (summary.low, summary.high) == pytest.approx((a.mean() - reach, a.mean() + reach))
    assert summarize_folds({"a": a + 10}, folds=5)["a"].high == 100


def test_folds_without_a_difference_are_no_proof_of_equality():
    same = np.full(10, 90.0)
    for labels, sure in ((50, False), (1000, True)):
        scores = {"head": same, "LoRA": same}
        found = recommend(Scores(scores, "accuracy", 5, labels, 100 / labels, []))
        assert found.sure == sure and found.name == "head"
    assert compare_folds(same, same, folds=5, least=2).low == pytest.approx(-2 * 2.262, abs=0.01)
    assert compare_folds(same + 1, same, folds=5).sign == "▲"


def nearest_mean(X, y, other):
    """Return the class of each other row, 0 or 1: whose mean is nearer."""
    low, high = X[y == 0].mean(0), X[y == 1].mean(0)
    return (other - (low + high) / 2) @ (high - low) > 0


@pytest.mark.parametrize("folds, repeats, least", [(5, 2, 0.12), (2, 5, 0.3)])
def test_the_corrected_test_keeps_its_error_rate_and_the_naive_one_does_not(folds, repeats, least):
    n, y, wrong = 400, np.arange(60) % 2, np.zeros(2)
    drawn = [
        [*RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=i).split(y, y)]
        for i in range(20)
    ]
    for seed in range(n):
        views = np.random.default_rng(seed).normal(size=(2, 60, 4)) + 0.5 * y[:, None]
        a, b = 100 * np.array([  # two views of a row that say equally much of its class
            [np.mean(nearest_mean(X[fit], y[fit], X[test]) == y[test]) for X in views]
            for fit, test in drawn[seed % 20]
        ]).T  # fmt: skip
        wrong += compare_folds(a, b, folds=folds).p < 0.05, stats.ttest_rel(a, b).pvalue < 0.05
    print(f"{folds} folds, {repeats} times, {n} studies: called different in "
          "{:.1f} % (corrected), {:.1f} % (naive)".format(*100 * wrong / n))  # fmt: skip
    assert wrong[0] / n < 0.07 and wrong[1] / n > least


def simulated(seed, means, spread, *, labels=10**6, folds=5, fits=10):
    """Return scores whose errors in two folds correlate as the corrected test supposes."""
    rng, shared = np.random.default_rng(seed), 1 / folds
    of_rows, of_folds = rng.normal(size=len(means)), rng.normal(size=(fits, len(means)))
    table = 80 + np.array([*means.values()])
    table = table + spread * (shared**0.5 * of_rows + (1 - shared) ** 0.5 * of_folds)
    scores = dict(zip(means, table.T, strict=True))
    return Scores(scores, "accuracy", folds, labels, 100 / labels, [])


WORST = dict.fromkeys("abcdefg", -2.01) | {"dearest": 0.0}  # all others just beyond the margin
USUAL = {"zero labels": -9.0, "head": -3.0, "BitFit": -0.5, "LoRA": 0.0, "full": -1.0}


@pytest.mark.parametrize("spread", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("means", [WORST, USUAL], ids=["worst case", "usual"])
def test_sure_recommendations_lose_more_than_the_margin_in_at_most_five_of_a_hundred(means, spread):
    n, sure, wrong, unsure = 300, 0, 0, 0
    for seed in range(n):
        found = recommend(simulated(seed, means, spread))
        bad = means[found.name] < -2
        sure, wrong, unsure = (
            sure + found.sure,
            wrong + (found.sure and bad),
            unsure + (not found.sure and bad),
        )
        assert found.sure == (not found.unsettled) == ("cannot tell" not in str(found))
    print(f"spread {spread}, {n} studies: sure in {100 * sure / n:.0f} %, of one that loses more "
          f"than the margin in {100 * wrong / n:.1f} %; unsure of such a one in "
          f"{100 * unsure / n:.0f} %")  # fmt: skip
    assert wrong / n <= 0.05 + 2 * (0.05 * 0.95 / n) ** 0.5
    assert sure / n > 0.95 if spread == 0.5 else sure / n < 0.9


PLANTED = {
    "the head suffices": ({"head": 0.0, "LoRA": 0.3, "full": -0.5}, "head"),
    "only adapting the body does": ({"head": -6.0, "LoRA": 0.0, "full": 0.4}, "LoRA"),
    "only the dearest does": ({"head": -9.0, "LoRA": -6.0, "full": 0.0}, "full"),
    "nothing to choose between": ({"head": 0.0, "LoRA": 0.0, "full": 0.0}, "head"),
}


@pytest.mark.parametrize("means, wanted", PLANTED.values(), ids=PLANTED)
def test_planted_cases(means, wanted):
    n = 100
    found = [recommend(simulated(seed, means, 0.4)) for seed in range(n)]
    right = sum(f.sure and f.name == wanted for f in found)
    print(f"{right} of {n} studies are sure of {wanted}")
    assert right >= 95
    worse = {name for name, c in found[0].comparisons.items() if c.sign == "▼"}
    assert {name for name, mean in means.items() if mean < -5} <= worse


def test_too_few_labels_to_tell_are_said_and_how_many_would():
    means, told = {"head": -1.5, "LoRA": 0.0, "full": -8.0}, []
    for seed in range(100):
        found = recommend(simulated(seed, means, 4.0, labels=200))
        if found.sure or found.name != "LoRA" or [*found.unsettled] != ["head"]:
            continue
        told.append(seed)
        c, needed = found.comparisons["head"], found.unsettled["head"]
        for labels, settled in ((needed, True), (0.9 * needed, False)):
            reach = (c.difference - c.low) * (200 / labels) ** 0.5  # as the sentence supposes
            assert settled == (c.difference - reach > -2 or c.difference + reach < 0)
        text = str(found)
        assert text.startswith("Recommended: LoRA, accuracy ") and "somewhat too high" in text
        assert "cannot tell: with 200 labels" in text and f"For head, {c.numbers}, it" in text
        assert (f"about {needed:,} labels" if needed <= 2000 else "more than 2,000 labels") in text
    assert len(told) > 30


def test_where_the_data_cannot_tell_the_default_is_taken_unless_it_is_worse():
    wave, names = np.tile([-6.0, 6.0], 5), ("a", "b", "c")
    unsure = dict(zip(names, (80 + 0 * wave, 79 + wave, 60 + 0 * wave), strict=True))
    found = Scores(unsure, "accuracy", 5, 80, 1, [])
    named = {default: recommend(found, default=default) for default in (None, *names, "d")}
    assert {default: told.name for default, told in named.items()} == {
        None: "a", "a": "a", "b": "b", "c": "a", "d": "a"
    }  # fmt: skip
    assert not any(told.sure for told in named.values())
    assert "The highest mean is that of a, but where the data cannot tell" in str(named["b"])
    assert "somewhat too high" in str(named["c"])
    clear = Scores(unsure | {"b": 70 + 0 * wave}, "accuracy", 5, 10**6, 1e-4, [])
    assert recommend(clear, default="b").name == "a" and recommend(clear, default="b").sure


def test_a_dearer_one_that_may_be_much_better_is_no_reason_to_be_sure():
    wave = np.tile([-6.0, 6.0], 5)
    found = recommend(
        Scores({"head": 80 + 0 * wave, "full": 79.5 + wave}, "accuracy", 5, 80, 1, [])
    )
    assert found.name == found.best == "head" and not found.sure and [*found.unsettled] == ["full"]
    assert str(found).count("full") == 2


def test_what_a_constant_answer_gets_is_said():
    scores = {CONSTANT: np.full(10, 50.0), "head": 90 + np.arange(10) % 2.0}
    found = recommend(Scores(scores, "balanced accuracy", 5, 500, 0.2, []))
    told = str(found).splitlines()
    assert told[0].startswith("Recommended: head, balanced accuracy 90.5 [")
    assert told[-2:] == [
        "Worse than head: constant answer.",
        f"Against a constant answer: {found.constant.numbers}, better.",
    ]
    nothing = {CONSTANT: np.full(10, 50.0), "head": 50 + np.arange(10) % 2.0 - 0.6}
    told = str(recommend(Scores(nothing, "balanced accuracy", 5, 5000, 0.02, [])))
    assert "Recommended: constant answer" in told and "Against" not in told


def test_scores_that_cannot_be_compared_are_refused():
    def _of(**scores):
        return Scores(scores, "accuracy", 5, 50, 2.0, [])

    ten = np.arange(10.0)
    with pytest.raises(ValueError, match="'LoRA' is nan at fold index 3"):
        recommend(_of(head=ten, LoRA=changed(ten, 3, np.nan)))
    with pytest.raises(ValueError, match=r"at least two candidates, there is \['head'\]"):
        recommend(_of(head=ten))
    with pytest.raises(ValueError, match="results do not pair up, folds of each"):
        recommend(_of(head=ten, LoRA=ten[1:]))
    for margin in (0, -1, 100, np.nan):
        with pytest.raises(ValueError, match=f"margin = {margin} must be above 0"):
            recommend(_of(head=ten, LoRA=ten), margin)


def test_the_head_alone_is_recommended_where_classes_are_linearly_separable():
    rows = check_arrays(*clusters(CORNERS[:2], ["a", "b"], n=150, seed=1))
    found = decide.cross_validate(heads(rows), rows.X.numpy(), rows.labels, repeats=1, workers=1)
    found = recommend(found)
    assert found.name == "nearest neighbour" and found.sure
    assert found.summaries["logistic regression"].mean > 99


def test_a_richer_head_is_recommended_where_nothing_simpler_learns_the_classes():
    x = np.random.default_rng(1).normal(size=(300, 3))
    rows = check_arrays(np.c_[x, 0.1 * x], ((x[:, 0] > 0) ^ (x[:, 1] > 0)).astype(int))
    found = decide.cross_validate(heads(rows), rows.X.numpy(), rows.labels, repeats=1, workers=1)
    found = recommend(found)
    assert found.name in ("SVM with RBF kernel", "MLP")
    assert found.comparisons["logistic regression"].sign == "▼"


def test_source_rows_of_the_same_classes_are_learnt_from_and_others_are_not():
    centres = 3 * np.eye(40)[:4]
    x, y = clusters(centres, [*"abab"], n=4, seed=0)
    source = clusters(centres, [*"abab"], n=60, seed=1)
    rows = check_arrays(x, y, *source)
    assert rows.notes == ["y: labels ['a', 'b'] are mapped to 0..1",
                          "y_source: labels ['a', 'b'] are mapped to 0..1"]  # fmt: skip
    two = {n: h for n, h in heads(rows).items() if n.startswith("logistic")}
    assert [*two] == ["logistic regression", "logistic regression, source rows too"]
    found = decide.cross_validate(two, rows.X.numpy(), rows.labels, repeats=1, workers=1)
    alone, more = found.scores.values()
    assert more.mean() > alone.mean() + 5
    other = check_arrays(x, y, source[0], np.where(source[1] == "a", "a", "c"))
    assert other.notes[-1] == "the source rows are not used: their classes are not those of y"
    assert [*heads(other)] == [n for n in heads(rows) if "source" not in n]


@pytest.mark.parametrize("least", [2, 3, 4])
def test_heads_learn_from_the_smallest_classes(least):
    x, y = clusters(CORNERS, [*"abcd"], n=least, seed=0)
    rows, name = check_arrays(x, y), "logistic regression"
    head = {name: heads(rows)[name]}
    found = decide.cross_validate(head, rows.X.numpy(), rows.labels, workers=1)
    assert found.scores[name].mean() > 80


@pytest.mark.parametrize("constant", [0.1, 1e6 + 0.1, 3e99])
def test_one_column_and_constant_columns_will_do(constant):
    x, y = clusters(CORNERS[:2], [0, 1], n=15, seed=0)
    column = x[:, :1]
    padded = np.pad(column, ((0, 0), (0, 2)), constant_values=constant)
    for x in (column, padded, 1e-300 * column, 1e98 * column):
        scaled = standardized(x, 2.0**-52)
        assert scaled[:, 0].std() == pytest.approx(1) or x.max() < 1e-200
        assert (scaled[:, 1:] == 0).all() and np.isfinite(scaled).all()
    for x in (padded, column):
        rows = check_arrays(x, y)
        found = decide.cross_validate(heads(rows), rows.X.numpy(), y, repeats=1, workers=1)
        assert found.scores["logistic regression"].mean() > 95


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_a_file_of_real_rows_runs_from_end_to_end(load, save):
    x, y = load(return_X_y=True)
    rows = load_rows(save(X=x[:120], y=y[:120] + 1))
    found = decide.cross_validate(
        heads(rows), rows.X.numpy(), rows.labels, folds=3, repeats=1, workers=1
    )
    means = {name: scores.mean() for name, scores in found.scores.items()}
    assert min(means[name] for name in means if name != CONSTANT) > 80
    assert recommend(found).name != CONSTANT
    pickle.loads(pickle.dumps(found))


@pytest.mark.parametrize(
    "classes, words",
    [
        (["business", "tech"], True), (["Business & Tech", "no"], True), (["élan", "健康"], True),
        (["A12", "B7"], False), (["LABEL_0", "LABEL_1"], False), ([0, 1], False),
        ([False, True], False), (["business", "3"], False), (["a", "b"], False),
        (["--", "?"], False),
    ],
)  # fmt: skip
def test_class_names_are_words_only_if_all_of_them_are(classes, words):
    assert are_words(classes) == words


def test_techniques_on_texts_are_scored_like_any_estimator(folder):
    techniques = decide.text_candidates(["sport", "tech"], folder, seed=3)
    assert [*techniques] == [CONSTANT, *TECHNIQUES]
    for name in [*techniques][1:]:
        assert isinstance(techniques[name], FineTuner)
        assert techniques[name].get_params()["technique"] == name
    assert [*techniques] == [CONSTANT, "zero labels", *[*decide.text_candidates([0, 1])][1:]]
    texts = [f"{'goal match' if i % 2 else 'chip code'} {i}" for i in range(12)]
    labels = np.array(["tech", "sport"])[np.arange(12) % 2]
    few = {name: techniques[name] for name in (CONSTANT, "linear probing", "LoRA, top half")}
    found = decide.cross_validate(few, texts, labels, folds=2, repeats=1, workers=1)
    assert {len(v) for v in found.scores.values()} == {2}
    assert found.scores["linear probing"].mean() > 50 == found.scores[CONSTANT].mean()
