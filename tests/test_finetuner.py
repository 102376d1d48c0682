"""One estimator for all techniques: scikit-learn's contract, its files, what it refuses."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

from helpers import finetuner, models, peft
from helpers.finetuner import TECHNIQUES, FineTuner
from helpers.models.pretrained import _read
from helpers.peft.recipes import epochs_for

WORDS = {"money": ["bank", "profit", "shares", "price"]}
WORDS["sport"] = ["goal", "match", "team", "coach"]
FILES = ["finetuner.json", "trained.safetensors"]


def planted(n, seed, words=WORDS):
    """Return n texts of each class: four of the class's words in any order, and its name twice."""
    rng, X, y = np.random.default_rng(seed), [], []
    for _ in range(n):
        for name, own in words.items():
            X.append(" ".join([*rng.choice(own, 4), str(name), str(name)]))
            y.append(name)
    return X, y


X, Y = planted(10, 0)
NEW, ANSWERS = planted(15, 1)


def tuner(folder, technique="LoRA, top half", **options):
    return FineTuner(technique, model_path=folder, **{"epochs": 2} | options)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_technique_learns_planted_texts(folder, technique):
    epochs = {"from scratch": 40, "full fine-tuning": 40}.get(technique)
    model = tuner(folder, technique, epochs=epochs).fit(X, Y)
    proba = model.predict_proba(NEW)
    assert model.classes_.tolist() == ["money", "sport"] and model.score(NEW, ANSWERS) > 0.9
    assert proba.shape == (30, 2) and np.allclose(proba.sum(1), 1)
    assert (model.predict(NEW) == model.classes_[proba.argmax(1)]).all()


def test_what_each_technique_trains_and_what_it_shares(folder):
    shared = {p.data_ptr() for p in models.pretrained(folder)[0].parameters()}
    before = copy.deepcopy(models.pretrained(folder)[0].state_dict())
    kinds, own = {}, {}
    for technique in TECHNIQUES:
        model = tuner(folder, technique).fit(X, Y).model_
        adapters = peft.adapters(model)
        kinds[technique] = Counter((type(a).__name__, n.split(".")[2]) for n, a in adapters.items())
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert ("head.weight" in trained) == (technique != "zero labels")
        own[technique] = {
            n for n, p in model.named_parameters() if not {p.data_ptr()} & shared
        } - trained
        blocks = {n.split(".")[2] for n in trained if n.startswith("encoder.blocks.")}
        top = set("345") if "top half" in technique or "contrast" in technique else set("012345")
        assert blocks == (set() if technique in ("zero labels", "linear probing") else top)
        assert any("embed" in n for n in trained) == (technique == "from scratch")
    assert not any(own.values())  # of 90 MB, a fit owns what it trained
    assert kinds["LoRA, top half"] == {("LoRA", b): 2 for b in "345"}
    assert kinds["LoRA, contrastive"] == kinds["LoRA, top half"]
    assert kinds["LoRA"] == {("LoRA", b): 2 for b in "012345"}
    assert kinds["BitFit"] == {("Tuned", b): 8 for b in "012345"}
    after = models.pretrained(folder)[0]
    assert all(torch.equal(t, before[n]) for n, t in after.state_dict().items())
    assert not any(p.requires_grad for p in after.parameters())


def test_the_head_comes_first_and_the_rates_are_the_recipes(folder, monkeypatch):
    seen = {}
    fit = FineTuner._train

    def _train(self, model, rows, target):
        seen[self.technique] = model.head.weight.detach().clone(), type(rows).__name__
        fit(self, model, rows, target)

    monkeypatch.setattr(FineTuner, "_train", _train)
    probe = tuner(folder, "linear probing").fit(X, Y).model_.head.weight
    for technique in TECHNIQUES:
        tuner(folder, technique, epochs=1).fit(X, Y)
    first = {name: torch.allclose(head, probe, atol=1e-5) for name, (head, _) in seen.items()}
    assert first == {name: TECHNIQUES[name].head_first for name in list(TECHNIQUES)[2:]}
    cached = [name for name, (_, kind) in seen.items() if kind == "CachedRows"]
    assert cached == ["LoRA, top half", "LoRA, contrastive"]
    weights = [tuner(folder, lr=lr).fit(X, Y).predict_proba(NEW) for lr in (None, 3e-3, 1e-3)]
    assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()


@pytest.mark.parametrize(
    "n, epochs, contrastive", [(16, 20, 15), (40, 7, 15), (250, 3, 5), (2000, 3, 5)]
)
def test_a_fit_has_twenty_steps_or_three_passes(n, epochs, contrastive):
    assert (epochs_for(n, 16), epochs_for(n, 16, contrastive=True)) == (epochs, contrastive)


def test_the_contrastive_head_is_fitted_to_what_was_trained_names_of_classes_included(
    folder, monkeypatch
):
    seen = []
    fit = finetuner.training.logistic_head

    def _fit(features, y, **options):
        seen.append((features, list(y), options["C"]))
        return fit(features, y, **options)

    monkeypatch.setattr(finetuner.training, "logistic_head", _fit)
    for classes in (Y, [{"sport": 7, "money": 9}[y] for y in Y]):
        model = tuner(folder, "LoRA, contrastive", epochs=1).fit(X, classes)
        features, y, C = seen.pop()
        assert C == TECHNIQUES["LoRA, contrastive"].C < TECHNIQUES["linear probing"].C
        words = ["money", "sport"] if classes is Y else []
        assert len(features) == len(y) == len(X) + len(words) and not seen
        now = model.model_.features(**model._tokenize([*X, *words]))
        assert torch.allclose(features, now, atol=1e-5)  # after training, not before
        untouched = models.TextClassifier(models.pretrained(folder)[0], 1)
        before = untouched.features(**model._tokenize([*X, *words]))
        assert not torch.allclose(features, before.float(), atol=1e-3)


@pytest.mark.parametrize("technique", ["LoRA, top half", "LP-FT", "from scratch"])
def test_the_same_seed_predicts_the_same_and_the_process_is_left_alone(folder, technique):
    texts, labels = np.array(X), np.array(Y)
    _read.cache_clear()  # the first fit of a process is as any other
    torch.manual_seed(5)
    dtype, stream = torch.get_default_dtype(), torch.get_rng_state()
    found = [tuner(folder, technique, random_state=s).fit(texts, labels) for s in (0, 0, 1)]
    assert torch.get_default_dtype() == dtype and torch.equal(torch.get_rng_state(), stream)
    a, b, c = (model.predict_proba(NEW) for model in found)
    assert (a == b).all() and (a != c).any()
    assert (texts == X).all() and (labels == Y).all()
    wide = tuner(folder, technique, dtype="float64").fit(texts, labels)
    assert wide.model_.head.weight.dtype == torch.float64
    anew = FineTuner(
        **found[0].get_params(),
    )
    torch.manual_seed(6)
    assert (anew.fit(list(texts), list(labels)).predict_proba(NEW) == a).all()


@pytest.mark.parametrize(
    "names, kind",
    [
        ([False, True], "b"),
        ([3, 7], "i"),
        ([2.0, 5.0], "f"),
        (["b", "a"], "U"),
        ([f"class {i:02d}" for i in range(40)], "U"),
    ],
)
def test_labels_of_any_kind_and_number(folder, names, kind, tmp_path):
    words = {name: [f"{i} w{i} {i * 7}"] for i, name in enumerate(names)}
    texts, labels = planted(2, 0, words)
    for given in (labels, np.array(labels), pd.Series(labels), np.array(labels, dtype=object)):
        model = tuner(folder, "linear probing").fit(pd.Series(texts), given)
        assert model.classes_.tolist() == sorted(names) and model.classes_.dtype.kind == kind
        assert model.predict(texts).tolist() == labels
    model.save(tmp_path / "saved")
    again = FineTuner.load(tmp_path / "saved")
    assert again.predict(texts).tolist() == labels and again.classes_.dtype == model.classes_.dtype


def test_unequal_classes_and_a_class_with_one_row(folder):
    model = tuner(folder).fit([*X, "a lone word"], [*Y, "rare"])
    assert model.classes_.tolist() == ["money", "rare", "sport"]
    assert set(model.predict(NEW)) <= {"money", "rare", "sport"}


ODD = [
    "Das Wetter in München ist schön",
    "天気がいいですね",
    "Погода хорошая 🎉",
    "\x00\x01 \x02",
    "\u200b",
]


def test_texts_of_any_language_and_length(folder):
    model = tuner(folder).fit([*X, *ODD], [*Y, *["odd"] * len(ODD)])
    assert np.isfinite(model.predict_proba(ODD)).all()
    long = ["word " * 20_000, "x" * 100_000]
    assert np.isfinite(model.predict_proba(long)).all()  # 32 tokens have a position
    cut = " ".join(long[0].split()[:40])
    assert np.allclose(model.predict_proba([long[0]]), model.predict_proba([cut]))
    short = tuner(folder, max_length=3).fit(X, Y)
    first = [text.split()[0] for text in NEW]
    assert np.allclose(short.predict_proba(NEW), short.predict_proba(first), atol=1e-6)


GOOD = dict(X=X, y=Y)


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(X=[*X[:-1], 3]), "the text of row 19 is 3, no str"),
        (dict(X=[*X[:-1], None]), "the text of row 19 is None, no str"),
        (dict(X=["", *X[1:]]), "the text of row 0 is empty"),
        (dict(X=[*X[:4], " \n\t", *X[5:]]), "the text of row 4 is empty"),
        (dict(X=[*X[:4], "a\ud800", *X[5:]]), "the text of row 4 was read in a wrong encoding"),
        (dict(X="one text"), "texts are a str"),
        (dict(X=np.array([X])), "texts are a ndarray"),
        (dict(X=pd.DataFrame({"text": X})), "texts are a DataFrame"),
        (dict(X=[], y=[]), "there are no texts"),
        (dict(y=Y[:-1]), r"labels have shape \(19,\): y should be a 1d array of 20"),
        (dict(y=["a"] * 20), "all labels are one class, 'a': add rows"),
        (dict(y=[*Y[:-1], None]), "the label of row 19 is"),
        (dict(y=[*Y[:-1], float("nan")]), "the label of row 19 is"),
        (dict(y=pd.Series([*Y[:-1], None], dtype="string")), "the label of row 19 is"),
        (dict(y=[*range(19), -np.inf]), "the label of row 19 is -inf"),
        (dict(y=[*Y[:-1], 1]), "labels mix int and str"),
        (dict(y=[True, 2] * 10), "labels mix bool and int"),
        (dict(y=np.arange(20) / 7), "Unknown label type: continuous"),
        (dict(technique="Lora"), r"technique='Lora' is none of \['zero labels', 'linear probing'"),
        (dict(technique=None), "technique=None is none of"),
        (dict(lr=0), "lr=0 must be a number above 0"),
        (dict(lr=float("nan")), "lr=nan must be a number above 0"),
        (dict(lr="1e-3"), "lr='1e-3' must be a number"),
        (dict(epochs=0), "epochs=0 must be an integer, 1 or more"),
        (dict(epochs=1.5), "epochs=1.5 must be an integer"),
        (dict(batch_size=None), "batch_size and max_length must be integers"),
        (dict(max_length=2), "max_length=2 must be an integer, 3 or more"),
        (dict(random_state=-1), "random_state=-1 must be an integer"),
        (dict(dtype="float16"), "dtype='float16' must be 'float32' or 'float64'"),
        (dict(model_path="nowhere"), "there is no folder nowhere"),
        (dict(technique="zero labels", y=[1, 2] * 10), "1, 2] are no words"),
        (dict(technique="zero labels", y=["12", "a"] * 10), "'12', 'a'] are no words"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused_in_a_sentence(folder, change, told, monkeypatch):
    monkeypatch.setattr(FineTuner, "_train", None)  # before any work is lost
    options = {k: v for k, v in change.items() if k not in GOOD}
    model = FineTuner(**{"model_path": folder} | options)
    data = GOOD | {k: v for k, v in change.items() if k in GOOD}
    with pytest.raises(ValueError, match=told) as error:
        model.fit(**data)
    assert "\n" not in str(error.value)
    assert not hasattr(model, "classes_")


def test_a_refused_fit_leaves_the_one_before_and_predict_refuses_too(folder):
    model = tuner(folder).fit(X, Y)
    before = model.predict_proba(NEW)
    with pytest.raises(ValueError, match="the label of row 19 is"):
        model.fit(X, [*Y[:-1], None])
    assert (model.predict_proba(NEW) == before).all()
    for bad, told in (["ok", ""], "row 1 is empty"), ([], "no texts"), ("text", "are a str"):
        with pytest.raises(ValueError, match=told):
            model.predict(bad)
    for method in ("predict", "predict_proba"):
        with pytest.raises(NotFittedError):
            getattr(tuner(folder), method)(NEW)
    with pytest.raises(NotFittedError):
        tuner(folder).save("anywhere")


def test_divergence_is_told(folder):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        tuner(folder, "LP-FT", lr=1e30).fit(X, Y)


def test_a_pickle_holds_what_was_trained_and_not_the_encoder(folder):
    whole = os.path.getsize(Path(folder) / "model.safetensors")
    for technique in TECHNIQUES:
        model = tuner(folder, technique).fit(X, Y)
        proba = model.predict_proba(NEW)
        data = pickle.dumps(model)
        if technique != "from scratch":
            assert len(data) < whole / 10
        model.set_params(technique="BitFit", max_length=4)  # what was fitted stays what it was
        for again in (pickle.loads(data), copy.deepcopy(model)):
            assert (again.predict_proba(NEW) == proba).all()
            assert again.classes_.tolist() == model.classes_.tolist()
        fresh = clone(model)
        assert not hasattr(fresh, "model_") and fresh.get_params() == model.get_params()
    assert pickle.loads(pickle.dumps(fresh)).get_params() == fresh.get_params()


def test_it_runs_in_what_scikit_learn_has(folder):
    model = tuner(folder, "linear probing")
    lower = make_pipeline(FunctionTransformer(lambda texts: [t.lower() for t in texts]), model)
    assert lower.fit(X, Y).score([t.upper() for t in NEW], ANSWERS) > 0.9
    found = cross_validate(
        model, X, Y, cv=4, scoring=("accuracy", "roc_auc"), return_estimator=True
    )
    assert (found["test_accuracy"] > 0.9).all() and (found["test_roc_auc"] > 0.9).all()
    assert found["estimator"][0].classes_.tolist() == ["money", "sport"]
    proba = cross_val_predict(model, np.array(X), Y, cv=4, method="predict_proba")
    assert proba.shape == (20, 2)
    grid = {"technique": ["from scratch", "linear probing"]}
    search = GridSearchCV(tuner(folder, epochs=1), grid, cv=2).fit(X, Y)
    assert search.best_params_ == {"technique": "linear probing"}
    assert search.best_estimator_.score(NEW, ANSWERS) > 0.9


class OfNumbers(FineTuner):
    """What scikit-learn's checks can feed: a row's numbers are its words."""

    def fit(self, X, y):
        return super().fit(self.words(X), y)

    def predict_proba(self, X):
        return super().predict_proba(self.words(X))

    @staticmethod
    def words(X):
        return [" ".join(f"{number:.2f}" for number in row) for row in np.asarray(X)]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.one_d_array = True, False
        return tags


# Left out are scikit-learn's checks of what FineTuner does not take: weights of rows and classes,
# several labels a row, sparse, complex, 1-D and memory-mapped arrays, infinite numbers, data of no
# columns and n_features_in_ (texts have no columns), column names of data frames; and
# check_classifiers_train, which asks for an accuracy that numbers read as words do not give.
CHECKS = """
no_attributes_set_in_init parameters_default_constructible
do_not_raise_errors_in_init_or_set_params
get_params_invariance set_params estimator_cloneable estimator_repr mixin_order valid_tag_types
estimator_tags_renamed estimators_unfitted requires_y_none dict_unchanged dont_overwrite_parameters
estimators_overwrite_params estimators_fit_returns_self estimators_pickle fit_check_is_fitted
fit_idempotent fit_score_takes_y methods_sample_order_invariance methods_subset_invariance
pipeline_consistency classifiers_one_label classifiers_regression_target classifiers_classes
supervised_y_no_nan readonly_memmap_input dtype_object fit2d_1feature fit2d_1sample
f_contiguous_array_estimator
"""


@pytest.mark.parametrize("check", CHECKS.split())
def test_scikit_learns_checks(folder, check):
    technique = "LoRA, top half" if check.startswith("fit_idem") else "linear probing"
    model = OfNumbers(technique, model_path=folder, epochs=1, dtype="float64")
    getattr(estimator_checks, f"check_{check}")("FineTuner", model)


def test_its_tags_say_that_it_reads_texts():
    tags = FineTuner().__sklearn_tags__()
    assert tags.input_tags.string and tags.input_tags.one_d_array
    assert not tags.input_tags.two_d_array and tags.estimator_type == "classifier"


SAVED = ["zero labels", "linear probing", "LoRA, top half", "BitFit", "full fine-tuning"]

PROCESS = """
import json, sys
import numpy as np
from helpers.finetuner import FineTuner
texts = json.load(open("texts.json"))
found = [FineTuner.load(folder).predict_proba(texts) for folder in sys.argv[1:]]
np.save("found.npy", found)
"""


def test_a_new_process_predicts_the_same(folder, tmp_path):
    found = []
    for technique in SAVED:
        model = tuner(folder, technique).fit(X, Y)
        model.save(tmp_path / technique)
        found.append(model.predict_proba(NEW))
        names = [] if technique == "zero labels" else FILES[1:]
        assert sorted(p.name for p in (tmp_path / technique).iterdir()) == [FILES[0], *names]
    (tmp_path / "texts.json").write_text(json.dumps(NEW))
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "error", "-c", PROCESS, *SAVED]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert (np.load(tmp_path / "found.npy") == found).all()


def saved(folder, tmp_path):
    base = shutil.copytree(folder, tmp_path / "base")
    model = tuner(base).fit(X, Y)
    model.save(tmp_path / "saved")
    return base, tmp_path / "saved", model.predict_proba(NEW)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_saved_folder_that_is_not_what_it_was_is_refused(folder, tmp_path):
    base, there, proba = saved(folder, tmp_path)
    note, tensors = (there / name for name in FILES)

    def _refused(told, **options):
        with pytest.raises(ValueError, match=told) as error:
            FineTuner.load(there, **options)
        assert "\n" not in str(error.value)

    text, data = note.read_text(), tensors.read_bytes()
    for damaged in (text[:-9], "[]", "{}", '{"digest": 1}', text.replace("money", "honey")):
        note.write_text(damaged)
        _refused("is damaged, or was changed")
    note.write_bytes(b"\xff\xfe")
    _refused("is damaged, or was changed")
    note.write_text(text)
    for damaged in (data[:-9], pickle.dumps(data)):
        tensors.write_bytes(damaged)
        _refused("is damaged, or was changed")
    tensors.unlink()
    _refused("is damaged, or was changed")
    tensors.write_bytes(data)
    assert (FineTuner.load(there).predict_proba(NEW) == proba).all()
    moved = base.rename(tmp_path / "moved")
    _refused("there is no folder .*base")
    assert (FineTuner.load(there, model_path=moved).predict_proba(NEW) == proba).all()
    weights = load_file(moved / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, moved / "model.safetensors")
    _refused("moved is not the encoder it was trained from", model_path=moved)
    note.unlink()
    _refused("holds no finetuner.json")
    with pytest.raises(ValueError, match=r"holds no finetuner\.json"):
        FineTuner.load(tmp_path / "nowhere")


def test_saving_replaces_a_saved_folder_whole_and_no_other(folder, tmp_path, monkeypatch):
    _, there, proba = saved(folder, tmp_path)
    other = tuner(folder, "zero labels").fit(X, Y)
    with monkeypatch.context() as patch:
        patch.setattr("helpers.finetuner._digest", None)  # it fails half-way
        with pytest.raises(TypeError):
            other.save(there)
    assert (FineTuner.load(there).predict_proba(NEW) == proba).all()
    other.save(there)
    assert [p.name for p in there.iterdir()] == FILES[:1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "saved"]
    for taken in (Path(folder), Path(folder) / "config.json"):
        with pytest.raises(ValueError, match="holds something else: name a new folder"):
            other.save(taken)


@pytest.fixture(scope="session")
def foreign(folder, tmp_path_factory):
    """Return the folders of small random models of transformers, by their kinds."""
    import transformers as hf

    sizes = dict(vocab_size=30522, max_position_embeddings=40)
    bert = sizes | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    bert |= dict(intermediate_size=48)
    distil = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48)
    gpt2 = dict(n_embd=32, n_layer=1, n_head=2, bos_token_id=101, eos_token_id=102)
    bart = dict(d_model=32, encoder_layers=1, decoder_layers=1)
    kinds = {
        "distilbert": hf.DistilBertForMaskedLM(hf.DistilBertConfig(**sizes, **distil)),
        "roberta": hf.RobertaForMaskedLM(hf.RobertaConfig(**bert, pad_token_id=0)),
        "gpt2": hf.GPT2Model(hf.GPT2Config(**sizes, **gpt2)),
        "bart": hf.BartModel(hf.BartConfig(**sizes, **bart)),
    }
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in kinds}
    for kind, model in kinds.items():
        model.save_pretrained(folders[kind])
        shutil.copy(Path(folder) / "tokenizer.json", folders[kind])
    return folders


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
def test_other_encoders_of_transformers(foreign, kind, tmp_path, capfd):
    import transformers as hf

    there, level = foreign[kind], hf.utils.logging.get_verbosity()
    adapted = {"LoRA, top half": 2, "LoRA, contrastive": 2, "LoRA": 4, "BitFit": 16}
    for technique in TECHNIQUES:
        model = tuner(there, technique).fit(X, Y)
        assert len(peft.adapters(model.model_)) == adapted.get(technique, 0)
        proba = model.predict_proba([*NEW, "word " * 100])
        model.save(tmp_path / technique)
        again = FineTuner.load(tmp_path / technique)
        assert (again.predict_proba([*NEW, "word " * 100]) == proba).all()
        if TECHNIQUES[technique].head_first:
            assert model.score(NEW, ANSWERS) > 0.9
    assert "Loading" not in capfd.readouterr().err and hf.utils.logging.get_verbosity() == level
    model = tuner(there, "linear probing").fit(X, Y).model_
    theirs = hf.AutoModel.from_pretrained(there).eval()
    tokens = hf.PreTrainedTokenizerFast(tokenizer_file=str(there / "tokenizer.json"))
    tokens.pad_token = "[PAD]"
    batch = tokens(NEW, padding=True, return_tensors="pt")
    with torch.no_grad():
        h = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        weight = batch["attention_mask"][..., None].float()
        features = (h * weight).sum(1) / weight.sum(1)
        found = model.features(*(batch[name] for name in ("input_ids", "attention_mask")))
    assert torch.allclose(found, features, atol=1e-6)


def test_padding_is_known_by_either_name(folder, tmp_path):
    plain = json.loads((Path(folder) / "tokenizer.json").read_text("utf-8"))
    plain["padding"] = None
    for name in ("[PAD]", "<pad>"):
        text = json.dumps(plain).replace('"[PAD]"', json.dumps(name))
        (tmp_path / "tokenizer.json").write_text(text)
        ids = models.Tokenizer(tmp_path)(["one", "one and two"])["ids"]
        assert ids[0, -2:].tolist() == [plain["model"]["vocab"]["[PAD]"]] * 2


def test_roberta_counts_positions_from_behind_its_padding(foreign, folder):
    found = [models.positions(models.pretrained(there)[0]) for there in (*foreign.values(),)[:2]]
    assert found == [40, 39] and models.positions(models.pretrained(folder)[0]) == 32


def lacking(*names):
    return lambda there: [(there / name).unlink() for name in names]


def only_a_pickle(there):
    (there / "model.safetensors").rename(there / "pytorch_model.bin")


def without_a_tensor(there):
    tensors = load_file(there / "model.safetensors")
    del tensors[max(name for name in tensors if "attention" in name)]
    save_file(tensors, there / "model.safetensors", {"format": "pt"})


def cut_short(name):
    return lambda there: (there / name).write_bytes((there / name).read_bytes()[:-100])


REFUSED = [
    ("bert", lacking("config.json"), "holds no config.json: name the folder of a text encoder"),
    ("bert", lacking("tokenizer.json"), r"holds no tokenizer.json: AutoTokenizer.* writes one"),
    ("bert", lacking("model.safetensors"), "holds no weights as safetensors"),
    ("bert", only_a_pickle, "pytorch_model.bin is a pickle, which can run any code"),
    ("bert", cut_short("config.json"), "config.json is damaged"),
    ("bert", cut_short("model.safetensors"), "is no checkpoint, or a damaged one"),
    ("bert", cut_short("tokenizer.json"), "is no tokenizer of the tokenizers library"),
    ("bert", without_a_tensor, "lacks 'blocks.5.attention.v_proj.weight'"),
    ("distilbert", cut_short("model.safetensors"), "transformers cannot read .* as an encoder"),
    ("distilbert", without_a_tensor, "lacks the weights '.*attention.v_lin.weight'"),
    ("gpt2", lambda there: None, "holds a model of type 'gpt2', no text encoder"),
    ("bart", lambda there: None, "holds a model of type 'bart', no text encoder"),
    ("distilbert", lambda there: change_json(there / "config.json", model_type="mine"), "'mine'"),
]


@pytest.mark.parametrize("kind, spoil, told", REFUSED)
def test_a_folder_that_holds_no_text_encoder_is_refused(
    folder, foreign, tmp_path, kind, spoil, told
):
    there = shutil.copytree(folder if kind == "bert" else foreign[kind], tmp_path / "model")
    spoil(there)
    with pytest.raises(ValueError, match=told) as error:
        tuner(there).fit(X, Y)
    assert str(there) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_was_written_anew_is_read_anew(folder, tmp_path):
    there = shutil.copytree(folder, tmp_path / "model")
    first = models.pretrained(there)
    assert models.pretrained(there)[0] is first[0]
    weights = load_file(there / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, there / "model.safetensors")
    assert models.pretrained(there)[1] != first[1]
