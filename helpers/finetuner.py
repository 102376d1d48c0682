"""Texts and labels in, a classifier out: each technique as one scikit-learn estimator."""

import copy
import hashlib
import json
import math
import os
from functools import lru_cache
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F

from helpers import files, models, peft, training
from helpers.data import are_words, check_texts, check_whole, encode_labels
from helpers.peft.recipes import HEAD_RATE, TECHNIQUES, epochs_for

NOTE, TRAINED = "finetuner.json", "trained.safetensors"  # what a saved estimator consists of


class FineTuner(ClassifierMixin, BaseEstimator):
    """Classify texts by a pre-trained encoder, adapted to labelled texts by one technique.

    A scikit-learn classifier of lists of texts: it runs in `Pipeline`, `cross_validate` and
    `GridSearchCV`. Encoders of one folder are read once for a process.

    Parameters
    ----------
    technique : str, default="LoRA, top half"
        One of `TECHNIQUES`. "zero labels" takes the class whose name has the nearest embedding;
        "full fine-tuning" and "LP-FT" train all blocks, not the table of tokens.
    model_path : str or Path, default=""
        Folder of a text encoder with tokenizer.json and weights as safetensors; "" is the packaged
        one.
    lr : float, optional
        Adam's rate of what is below the head; None is the technique's.
    epochs : int, optional
        Passes over the rows; None is `epochs_for`.
    batch_size : int, default=16
        Rows of a step.
    max_length : int, default=64
        Tokens that are read of a text, at most as many as the encoder has positions for.
    random_state : int or None, default=0
        Of random weights and the order of rows; None is another one each time.
    dtype : str, default="float32"
        Or "float64", of weights and outputs: slower, and equal to 1e-10 on all processors.

    Attributes
    ----------
    classes_ : array of shape (C,)
        The labels, sorted.
    model_ : nn.Module
        A `helpers.models.TextClassifier`; what it shares with other estimators is frozen.
    fitted_ : dict of str to object
        The parameters that it was fitted with.
    base_ : str
        Digest of the encoder that it started from.
    """

    def __init__(
        self,
        technique="LoRA, top half",
        *,
        model_path="",
        lr=None,
        epochs=None,
        batch_size=16,
        max_length=64,
        random_state=0,
        dtype="float32",
    ):
        self.technique = technique
        self.model_path = model_path
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.max_length = max_length
        self.random_state = random_state
        self.dtype = dtype

    def fit(self, X, y):
        """Train on labelled texts.

        Parameters
        ----------
        X : sequence of str
        y : sequence of str, int or bool
            One label for each text, of two or more classes.

        Returns
        -------
        FineTuner
            Itself.

        Raises
        ------
        ValueError
            If a parameter, a text, a label or the encoder's folder cannot be used; it is named.
        """
        recipe, texts = self._checked(), check_texts(X)
        classes, target = encode_labels(y, len(texts))
        seed = int(check_random_state(self.random_state).randint(2**31))
        with self._alone(seed):
            model, tokenize, base, blocks = self._start(classes)
            if recipe.contrastive and are_words(names := classes.tolist()):
                texts, target = [*texts, *names], [*target, *range(len(names))]
            rows, target = tokenize(texts), torch.as_tensor(target)
            if recipe.top < 1 and isinstance(model.encoder, models.Encoder):
                first = len(model.encoder.blocks) - len(blocks)
                rows = training.cache_prefix(model, rows, first=first)
            if recipe.head_first:
                features = training.extract_features(model, rows)
                model.head = training.logistic_head(features, target, C=recipe.C)
            if recipe.change:
                recipe.change(model, blocks, torch.default_generator)
                self._train(model, rows, target)
            if recipe.contrastive:  # the head was not trained, it is fitted to what came of it
                trained = [p for p in model.parameters() if p.requires_grad]
                training.freeze(model)
                features = training.extract_features(model, rows)
                model.head = training.logistic_head(features, target, C=recipe.C)
                training.unfreeze(*trained)
        self.fitted_ = self.get_params()
        if self.model_path:
            self.fitted_["model_path"] = os.path.abspath(self.model_path)
        self.classes_, self.base_, self.model_, self._tokenize = classes, base, model, tokenize
        return self

    def predict(self, X):
        """Return the most probable class of each text.

        Parameters
        ----------
        X : sequence of str

        Returns
        -------
        array of shape (n,)

        Raises
        ------
        ValueError
            If there is no text, or one is empty or no str.
        """
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def predict_proba(self, X):
        """Return the probability of each class of `classes_`: the softmax of the logits.

        Parameters
        ----------
        X : sequence of str

        Returns
        -------
        array of shape (n, C)

        Raises
        ------
        ValueError
            As in `predict`.
        """
        check_is_fitted(self)
        logits = training.predict(self.model_, self._tokenize(check_texts(X)))
        return logits.double().softmax(1).numpy()

    def save(self, folder):
        """Write what another process needs to predict the same: what was trained, and a note.

        The encoder itself is not copied; the note has its folder and digest. A crash leaves the
        folder that was there before.

        Parameters
        ----------
        folder : str or Path
            New, or one that was saved before.

        Raises
        ------
        ValueError
            If there is something else in the folder.
        """
        check_is_fitted(self)
        other = {p.name for p in Path(folder).glob("*")} - {NOTE, TRAINED}
        if Path(folder).is_file() or other:
            raise ValueError(f"{folder} holds something else: name a new folder")
        classes = self.classes_.tolist()
        note = {"parameters": self.fitted_, "base": self.base_, "classes": classes}
        note = json.loads(json.dumps(note, default=lambda number: number.item()))

        def _fill(new):
            if any(p.requires_grad for p in self.model_.parameters()):
                peft.save_trainable(self.model_, new / TRAINED)
            text = json.dumps(note | {"digest": _digest(note, new)}, indent=1)
            files.write(new / NOTE, text.encode())

        files.replace_folder(folder, _fill)

    @classmethod
    def load(cls, folder, *, model_path=None):
        """Return the estimator that `save` wrote; nothing in its files can run code.

        Parameters
        ----------
        folder : str or Path
        model_path : str or Path, optional
            Where the encoder is now; None is where it was.

        Returns
        -------
        FineTuner

        Raises
        ------
        ValueError
            If the folder was not written by `save`, or was changed since, or the encoder is another
            one.
        """
        folder = Path(folder)
        if not (folder / NOTE).is_file():
            raise ValueError(f"{folder} holds no {NOTE}: name a folder that FineTuner.save wrote")
        try:
            note = json.loads((folder / NOTE).read_text("utf-8"))
            same = note.pop("digest") == _digest(note, folder)
        except (ValueError, TypeError, AttributeError, KeyError):
            same = False
        if not same:
            raise ValueError(f"{folder} is damaged, or was changed: save the estimator again")
        if model_path is not None:
            note["parameters"]["model_path"] = os.path.abspath(model_path) if model_path else ""
        tuner = cls(**note["parameters"])
        tuner.fitted_, tuner.base_ = note["parameters"], note["base"]
        tuner.classes_ = np.array(note["classes"])
        tuner._rebuild(lambda model: peft.load_trainable(model, folder / TRAINED))
        return tuner

    def __getstate__(self):
        state = {**super().__getstate__()}
        if state.pop("_tokenize", None):
            state["model_"] = peft.adapter_state(self.model_)  # the encoder stays in its folder
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if "model_" in state:
            self._rebuild(lambda model: peft.switch(model, {"": state["model_"]}, ""))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags

    def _checked(self):
        """Return the technique's recipe; refuse parameters that cannot work."""
        if self.technique not in TECHNIQUES:
            raise ValueError(f"technique={self.technique!r} is none of {list(TECHNIQUES)}")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype={self.dtype!r} must be 'float32' or 'float64'")
        number = isinstance(self.lr, Real) and not isinstance(self.lr, bool)
        if self.lr is not None and not (number and 0 < self.lr < math.inf):
            raise ValueError(f"lr={self.lr!r} must be a number above 0, or None")
        if None in (self.batch_size, self.max_length):
            raise ValueError("batch_size and max_length must be integers, not None")
        check_whole(1, epochs=self.epochs, batch_size=self.batch_size)
        check_whole(0, random_state=self.random_state)
        check_whole(3, max_length=self.max_length)  # two of them mark beginning and end
        return TECHNIQUES[self.technique]

    def _alone(self, seed):
        return training.reproducible(seed, dtype=getattr(torch, self.dtype))

    def _start(self, classes):
        """Return a frozen model under a random head, its tokenizer, digest and upper blocks."""
        shared, base = models.pretrained(self.model_path)
        length = min(self.max_length, models.positions(shared))
        tokenize = _tokenizer(self.model_path or models.bundled(), base, length)
        encoder = copy.deepcopy(shared, {id(p): p for p in shared.parameters()})
        model = models.TextClassifier(encoder, len(classes))
        training.freeze(model)
        if self.technique == "zero labels":
            if not are_words(names := classes.tolist()):
                told = f"zero labels reads class names, and {names[:3]} are no words"
                raise ValueError(f"{told}: take another technique")
            model.head = _Nearest(model.features(**tokenize(names)))
        lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
        name = max(lists, key=lambda name: len(lists[name]))
        first = len(lists[name]) - math.ceil(TECHNIQUES[self.technique].top * len(lists[name]))
        blocks = {f"{name}.{i}": block for i, block in enumerate(lists[name]) if i >= first}
        return model, tokenize, base, blocks

    def _train(self, model, rows, target):
        recipe, batch_size = TECHNIQUES[self.technique], self.batch_size
        rates, options = {"encoder": recipe.lr if self.lr is None else self.lr}, {}
        if recipe.contrastive:
            batch_size, options = 4 * batch_size, {"loss": training.contrastive()}
        else:
            training.unfreeze(model.head)
            rates["head"] = HEAD_RATE
        epochs = self.epochs or epochs_for(len(target), self.batch_size, recipe.contrastive)
        options |= {"batch_size": batch_size, "generator": torch.default_generator}
        training.fit(model, rows, target, lr=rates, epochs=epochs, **options)

    def _rebuild(self, fill):
        """Build the fitted model from its encoder, and let `fill` copy in what was trained."""
        then = type(self)(**self.fitted_)  # parameters may have been set since
        recipe = then._checked()
        with then._alone(0):
            model, self._tokenize, base, blocks = then._start(self.classes_)
            if base != self.base_:
                told = f"{then.model_path or 'the packaged encoder'} is not the encoder it was"
                raise ValueError(f"{told} trained from: load(folder, model_path=...) names another")
            if recipe.change:
                recipe.change(model, blocks, torch.default_generator)
            training.unfreeze(model.head)
            if any(p.requires_grad for p in model.parameters()):
                fill(model)
        self.model_ = model.eval()


class _Nearest(nn.Module):
    """Logits are 20 times the cosines to the classes' names, as sentence-transformers has it."""

    def __init__(self, names):
        super().__init__()
        self.register_buffer("names", F.normalize(names))

    def forward(self, x):
        return 20 * F.normalize(x) @ self.names.T  # (B, d) -> (B, C)


@lru_cache(maxsize=8)
def _tokenizer(folder, base, length):
    return models.Tokenizer(folder, max_length=length)


def _digest(note, folder):
    """Return a digest of a note, and of what was trained if there is such a file."""
    sha = hashlib.sha256(json.dumps(note, sort_keys=True).encode())
    if (folder / TRAINED).is_file():
        sha.update((folder / TRAINED).read_bytes())
    return sha.hexdigest()
