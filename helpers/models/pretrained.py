"""A text encoder from any folder: BERT's family as an `Encoder`, others by transformers."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from helpers.models.checkpoint import _file, bundled
from helpers.models.encoder import Encoder


def pretrained(folder=""):
    """Return the text encoder in a folder, frozen, and a digest of what makes its outputs.

    Two are kept for the process, so that whoever fits many times reads the folder once: an encoder
    is shared, copy it before changing it.

    Parameters
    ----------
    folder : str or Path, default=""
        Holds config.json, tokenizer.json and weights as safetensors; "" is the packaged encoder.

    Returns
    -------
    encoder : nn.Module
        An `Encoder`, or a model of transformers; in eval mode, of torch's default dtype.
    digest : str
        SHA-256 of the configuration, the tokenizer and the weights.

    Raises
    ------
    ValueError
        If there is no such folder, a file is missing, damaged or a pickle, or the model is no text
        encoder.
    """
    folder = Path(folder) if folder else bundled()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: name the folder of a text encoder")
    for name in ("config.json", "tokenizer.json"):
        cure = "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes one"
        if not (folder / name).is_file():
            cure = cure if name != "config.json" else "name the folder of a text encoder"
            raise ValueError(f"{folder} holds no {name}: {cure}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        cure = "save_pretrained(folder) of transformers writes them"
        if pickles:
            cure = f"{pickles[0].name} is a pickle, which can run any code, and is not read; {cure}"
        raise ValueError(f"{folder} holds no weights as safetensors: {cure}")
    files = (folder / "config.json", folder / "tokenizer.json", *weights)
    stamp = tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return _read(folder, stamp, torch.get_default_dtype())


def positions(encoder):
    """Return how many tokens of a text an encoder can read.

    Parameters
    ----------
    encoder : nn.Module
        As `pretrained` returns it.

    Returns
    -------
    int
    """
    if isinstance(encoder, Encoder):
        return encoder.embed.position.num_embeddings
    most = getattr(encoder.config, "max_position_embeddings", None) or 512
    tables = [m for m in encoder.modules() if isinstance(m, nn.Embedding)]
    skipped = [m.padding_idx for m in tables if m.num_embeddings == most]
    return most - max((i + 1 for i in skipped if i is not None), default=0)  # RoBERTa's begin late


@lru_cache(maxsize=2)
def _read(folder, stamp, dtype):
    config, sha = _config(folder), hashlib.sha256()
    for file, *_ in stamp:
        sha.update(file.read_bytes())
    known = config.get("model_type") == "bert"
    with torch.random.fork_rng(devices=[]):  # whoever comes first draws what others do
        encoder = Encoder.from_pretrained(folder) if known else _foreign(folder, config)
    return encoder.eval().requires_grad_(False), sha.hexdigest()


def _config(folder):
    try:
        return dict(json.loads(_file(folder, "config.json").read_text("utf-8")))
    except ValueError as error:
        raise ValueError(f"{folder}: config.json is damaged: {error}") from None


def _foreign(folder, config):
    """Return a model of transformers: what fills in masked tokens is an encoder."""
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as known
    from transformers.utils import logging

    kind = config.get("model_type")
    if kind not in known or config.get("is_encoder_decoder") or config.get("is_decoder"):
        cure = "name the folder of one, such as a BERT, RoBERTa or DistilBERT"
        raise ValueError(f"{folder} holds a model of type {kind!r}, no text encoder: {cure}")
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = dict(local_files_only=True, trust_remote_code=False, use_safetensors=True)
    try:
        encoder, told = AutoModel.from_pretrained(
            folder, dtype=torch.get_default_dtype(), output_loading_info=True, **options
        )
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # the mean over tokens is read, which needs none
        ids = torch.zeros(1, 2, dtype=torch.int64)
        output = encoder(input_ids=ids, attention_mask=ids + 1)
    except Exception as error:  # there is no telling in which way a damaged folder fails
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"transformers cannot read {folder} as an encoder: {first}") from None
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    missing = [name for name in told["missing_keys"] if "pooler" not in name]
    if missing:
        raise ValueError(f"{folder} lacks the weights {missing[0]!r}: it holds another model's")
    if getattr(output, "last_hidden_state", None) is None:
        raise ValueError(f"{folder}: a {type(encoder).__name__} has no last_hidden_state to read")
    return encoder
