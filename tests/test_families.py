"""Every technique on models that readers bring: one suite of properties, and refusals by name."""

import copy
from functools import cache, partial
from types import SimpleNamespace as Family

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.models import Encoder, TextClassifier, bundled
from helpers.peft import (
    adapters,
    inject,
    load_peft,
    load_trainable,
    merge,
    save_peft,
    save_trainable,
    unload,
)
from helpers.study import reproducible
from helpers.training import freeze
from tests.test_checkpoint import in_peft
from tests.test_inject import close, held, moved, seeded, trainable

D, FF, VOCAB, P = 16, 24, 30, 3
TEXT = {"vocab_size": VOCAB, "use_cache": False}
SIZE = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": FF}
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": D, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
GPT2 |= dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
T5 = {"d_model": D, "d_kv": 8, "d_ff": FF, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
LLAMA = SIZE | TEXT | {"num_key_value_heads": 1, "pad_token_id": 0}
ENCODER = {"vocab": VOCAB, "d": D, "n_layers": 2, "n_heads": 2, "d_ff": FF}


def of(kind, **settings):
    return lambda: kind(kind.config_class(**settings))


def on_a_mean(encoder):
    return lambda: TextClassifier(encoder(), 3)


MINE = {
    "linear": ["q_proj", "v_proj"],
    "behind": ["fc2"],
    "outputs": ["out_proj", "fc2"],
    "embed": "embed",
    "attention": "attention",
}
# how each is made, its linear layers, those behind an activation, those that end a sub-layer, what
# embeds and what attends, and how far numbers drift: the norms of Llama and T5 are in float32
FAMILIES = {
    "small": Family(make=on_a_mean(lambda: Encoder(**ENCODER)), **MINE, atol=1e-10),
    "packaged": Family(
        make=on_a_mean(lambda: Encoder.from_pretrained(bundled())), **MINE, atol=1e-10
    ),
    "BERT": Family(
        make=of(hf.BertForSequenceClassification, **SIZE, **TEXT, **OFF),
        linear=["query", "value"],
        behind=["layer.0.output.dense", "layer.1.output.dense"],
        outputs=["output.dense"],
        embed="word_embeddings",
        attention="self",
        atol=1e-10,
    ),
    "GPT-2": Family(
        make=of(hf.GPT2LMHeadModel, **GPT2, **TEXT),
        linear=["c_attn", "c_fc"],
        behind=["mlp.c_proj"],
        outputs=["c_proj"],
        embed="wte",
        attention="attn",
        atol=1e-10,
    ),
    "Llama": Family(
        make=of(hf.LlamaForCausalLM, **LLAMA),
        linear=["q_proj", "v_proj"],
        behind=["down_proj"],
        outputs=["o_proj", "down_proj"],
        embed="embed_tokens",
        attention="self_attn",
        atol=1e-4,
    ),
    "T5": Family(
        make=of(hf.T5ForConditionalGeneration, **T5, **TEXT),
        linear=["q", "v"],
        behind=["wo"],
        outputs=["o", "wo"],
        embed="encoder.embed_tokens",
        attention="SelfAttention",
        atol=1e-4,
    ),
    "ViT": Family(
        make=of(hf.ViTForImageClassification, **SIZE, **OFF, image_size=8, patch_size=4),
        linear=["q_proj", "v_proj"],
        behind=["fc2"],
        outputs=["o_proj", "fc2"],
        embed="embeddings",
        attention="attention",
        atol=1e-10,
    ),
}
TECHNIQUES = {
    "LoRA": lambda m, f, g: inject.inject_lora(m, f.linear + f.behind, r=2, generator=g),
    "rsLoRA": lambda m, f, g: inject.inject_lora(m, f.linear, r=2, rslora=True, generator=g),
    "PiSSA": lambda m, f, g: inject.inject_lora(m, f.linear, r=2, init="pissa"),
    "DoRA": lambda m, f, g: inject.inject_dora(m, f.linear + f.behind, r=2, generator=g),
    "VeRA": lambda m, f, g: inject.inject_vera(m, f.linear + f.behind, r=20, generator=g),
    "OFT": lambda m, f, g: inject.inject_oft(m, f.linear + f.behind, block_size=4),
    "(IA)3": lambda m, f, g: inject.inject_ia3(m, f.linear, feedforward=f.behind),
    "adapter": lambda m, f, g: inject.inject_adapter(m, f.outputs, reduction_factor=2, generator=g),
    "BitFit": lambda m, f, g: inject.inject_bitfit(m),
    "LayerNorm": lambda m, f, g: inject.inject_layer_norm(m),
    "prompt": lambda m, f, g: inject.inject_prompt(m, [f.embed], num_virtual_tokens=P, generator=g),
    "prefix": lambda m, f, g: inject.inject_prefix(
        m, [f.attention], num_virtual_tokens=P, generator=g
    ),
}
NO_PREFIX = r" does not offer what prefix tuning needs: n_heads, d_head, and forward\(x, prefix\)"
REFUSED = {
    ("Llama", "BitFit"): "LlamaForCausalLM has no layer of that kind to train",
    ("T5", "BitFit"): "T5ForConditionalGeneration has no layer of that kind to train",
    ("ViT", "prompt"): "'vit.embeddings': ViTEmbeddings has no linear layer that tells its widths",
    ("BERT", "prefix"): r"'bert.encoder.layer.0.attention.self': BertSelfAttention" + NO_PREFIX,
    ("GPT-2", "prefix"): r"'transformer.h.0.attn': GPT2Attention" + NO_PREFIX,
    ("Llama", "prefix"): r"'model.layers.0.self_attn': LlamaAttention" + NO_PREFIX,
    ("T5", "prefix"): r"'encoder.block.0.layer.0.SelfAttention': T5Attention" + NO_PREFIX,
    ("ViT", "prefix"): r"'vit.layers.0.attention': ViTAttention" + NO_PREFIX,
}
NOT_MERGEABLE = ["adapter", "prompt", "prefix"]
NOT_IN_PEFT = [*NOT_MERGEABLE, "BitFit"]
PAIRS = [(f, t) for f in FAMILIES for t in TECHNIQUES if (f, t) not in REFUSED]
each = pytest.mark.parametrize("family, technique", PAIRS)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Unsupported layer type:UserWarning",  # peft, of norms
        "`gradient_checkpointing_enable` is deprecated:FutureWarning",  # transformers, of its name
        "The .grad attribute of a Tensor:UserWarning",  # torch, of what its own compiler looks at
        "(?s).*Dynamo does not know how to trace:UserWarning",  # and of tokens picked by a mask
    )
]


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


@torch.no_grad()
def stirred(model):
    """Away from the start, where most techniques do nothing."""
    for p in model.parameters():
        if p.requires_grad:
            p += 0.1 * torch.randn_like(p)
    return model


@cache
def made(family):
    """Read only: shared by all tests."""
    with reproducible(0):
        model = FAMILIES[family].make().eval()
        if family != "packaged":  # no bias at 0, no norm at the identity
            stirred(model)
    freeze(model)
    return model


def fresh(family, technique=None, seed=0):
    """A copy with its own modules; of the packaged encoder, frozen numbers are the shared ones."""
    base, memo = made(family), {}
    if family == "packaged":
        memo = {id(t): t for t in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, memo)
    if technique:
        TECHNIQUES[technique](model, FAMILIES[family], seeded(seed))
    return model


def shaken(family, technique):
    return stirred(fresh(family, technique))


def output(model):
    """What a model answers to two rows, one of them padded."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 5), generator=draw)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    plain = getattr(model, "_orig_mod", model)
    plain = plain.get_base_model() if isinstance(model, peft.PeftModel) else plain
    if isinstance(plain, TextClassifier):
        return model(ids, mask)
    if isinstance(plain, hf.ViTForImageClassification):
        dtype = next(plain.parameters()).dtype
        return model(torch.randn(2, 3, 8, 8, generator=draw).to(dtype)).logits
    if isinstance(plain, hf.T5ForConditionalGeneration):
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    return model(input_ids=ids, attention_mask=mask).logits


def parts(model):
    """Names of all that a model has, in its order."""
    named = (model.named_parameters(), model.named_buffers(), model.state_dict().items())
    return [[n for n, _ in found] for found in named], [type(m) for m in model.modules()]


def gradients(model):
    model.zero_grad()
    output(model).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family, technique", REFUSED)
def test_what_a_family_cannot_do_is_refused_by_name_and_changes_nothing(family, technique):
    model = fresh(family)
    with pytest.raises(ValueError, match=REFUSED[family, technique]):
        TECHNIQUES[technique](model, FAMILIES[family], seeded())
    assert moved(model, held(made(family))) == set() and not adapters(model)
    assert torch.equal(output(model), output(made(family)))


@each
def test_injection_is_identity_at_init(family, technique):
    before, after = output(made(family)), output(fresh(family, technique))
    if technique in ("prompt", "prefix"):
        after = after[..., -before.shape[-2] :, :]  # a language model answers at the prompt, too
        assert after.shape == before.shape and (after - before).abs().max() > 1e-6
    else:
        close(after, before, atol=FAMILIES[family].atol if technique == "PiSSA" else 0)


@each
def test_only_trainables_move_in_three_steps_and_each_gets_a_gradient(family, technique, capfd):
    model = fresh(family, technique).train()
    before = held(model)
    own = {f"{name}.{end}" for name, a in adapters(model).items() for end in a._parameters}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        assert gradients(model).keys() == own
        optimizer.step()
    assert moved(model, before) == trainable(model) == own != set()
    assert capfd.readouterr() == ("", "")


@each
def test_merge_preserves_outputs_and_names_or_is_refused(family, technique):
    model, plain = shaken(family, technique), made(family)
    names, expected = [*adapters(model)], output(model)
    if technique in NOT_MERGEABLE:
        with pytest.raises(ValueError, match=f"^'{names[0]}' is a .*: it has no equal plain layer"):
            merge(model)
        assert [*adapters(model)] == names and torch.equal(output(model), expected)
        return
    assert (expected - output(plain)).abs().max() > 1e-3
    assert merge(model) == names
    close(output(model), expected, FAMILIES[family].atol)
    assert parts(model) == parts(plain)


@each
def test_unload_gives_the_base_back(family, technique):
    model, plain = shaken(family, technique), made(family)
    names = [*adapters(model)]
    assert unload(model) == names and not trainable(model)
    assert moved(model, held(plain)) == set() and parts(model) == parts(plain)
    assert torch.equal(output(model), output(plain))


@each
def test_a_file_of_what_was_trained_gives_the_same_outputs(family, technique, tmp_path):
    model, twin = shaken(family, technique), fresh(family, technique, seed=1)
    save_trainable(model, tmp_path / "file")
    load_trainable(twin, tmp_path / "file")
    assert torch.equal(output(twin), output(model))


@each
def test_peft_computes_the_same_from_a_folder_or_it_is_refused(family, technique, tmp_path):
    model = shaken(family, technique)
    names = [*adapters(model)]
    if technique in NOT_IN_PEFT or (family, technique) == ("GPT-2", "OFT"):
        with pytest.raises(ValueError, match=f"^'{names[0]}' is a .*: peft has"):
            save_peft(model, tmp_path)
        return
    save_peft(model, tmp_path)
    theirs = in_peft(peft.PeftModel.from_pretrained, fresh(family), tmp_path)
    again = fresh(family)
    assert load_peft(again, tmp_path) == names
    for other in (theirs, again):
        close(output(other), output(model), FAMILIES[family].atol)


@each
def test_gradient_checkpointing_gives_the_same_gradients(family, technique):
    model, calls = shaken(family, technique).train(), []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda m, x: calls.append(m))
    try:
        expected, once = gradients(model), len(calls)
        if isinstance(model, TextClassifier):
            for block in model.encoder.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found = gradients(model)
    finally:
        handle.remove()
    assert len(calls) > 2 * once  # blocks are run again
    assert found.keys() == expected.keys()
    for name, g in found.items():
        close(g, expected[name])


@each
def test_autocast_runs_and_is_close(family, technique):
    model = copy.deepcopy(shaken(family, technique)).float()
    expected = output(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = output(model)
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


@each
def test_a_deep_copy_is_equal_and_independent(family, technique):
    model = shaken(family, technique)
    twin, expected = copy.deepcopy(model), output(model)
    assert torch.equal(output(twin), expected)
    tensors = [{t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (model, twin)]
    assert not set.intersection(*tensors)
    stirred(twin)
    assert torch.equal(output(model), expected) and not torch.equal(output(twin), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # of peft's calls
@pytest.mark.parametrize(
    "kind", [hf.GPT2ForSequenceClassification, hf.LlamaForSequenceClassification]
)
def test_a_row_under_a_prompt_is_classified_by_the_token_that_peft_reads(kind):
    settings = GPT2 if kind is hf.GPT2ForSequenceClassification else LLAMA
    model = of(kind, **settings | {"vocab_size": VOCAB, "pad_token_id": 0})().eval()
    freeze(model)
    config = peft.PromptTuningConfig(num_virtual_tokens=P, task_type="SEQ_CLS")
    theirs = in_peft(peft.get_peft_model, copy.deepcopy(model), config)
    inject.inject_prompt(
        model, ["wte" if settings is GPT2 else "embed_tokens"], num_virtual_tokens=P
    )
    embedding = theirs.prompt_encoder["default"].embedding.weight
    embedding.data.copy_(model.get_input_embeddings().prompt)
    close(output(model), output(theirs), atol=1e-6)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_prompt_in_either_half_of_t5_leaves_padding_out(part):
    model, ids = fresh("T5"), torch.randint(3, VOCAB, (1, 5))
    inject.inject_prompt(model, [f"{part}.embed_tokens"], num_virtual_tokens=P)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    padded = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
    cut = model(input_ids=ids[:, :3], attention_mask=mask[:, :3], decoder_input_ids=ids).logits
    close(padded, cut, FAMILIES["T5"].atol)


COMPILED = [("small", "prefix"), ("small", "prompt"), ("BERT", "DoRA"), ("GPT-2", "VeRA")]
COMPILED += [("Llama", "OFT"), ("T5", "adapter"), ("ViT", "BitFit")]


@pytest.mark.parametrize("family, technique", COMPILED)
def test_a_compiled_model_has_the_same_outputs_and_gradients(family, technique):
    model = shaken(family, technique)
    compiled = torch.compile(model, backend="eager")
    close(output(compiled), output(model), FAMILIES[family].atol)
    expected = gradients(model)
    for name, g in gradients(compiled).items():
        close(g, expected[name.removeprefix("_orig_mod.")], FAMILIES[family].atol)
