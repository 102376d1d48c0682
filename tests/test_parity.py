"""Parity: each layer computes, starts, trains and merges as its counterpart in the peft library."""

import copy
from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from helpers.peft import LoRA, adapters, inject, merge
from helpers.study import reproducible
from helpers.training import freeze, param_groups
from tests.small import TinyTransformer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Unsupported layer type.*LayerNorm:UserWarning",  # peft, of what its own tuning wraps
        "`is_gradient_checkpointing` is deprecated:FutureWarning",  # transformers, of peft's calls
        "`past_key_values` is deprecated:FutureWarning",
    )
]
agree = partial(torch.testing.assert_close, atol=1e-10, rtol=0)


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


def tiny(model):
    """Move all parameters, so that no bias is 0 and no layer norm the identity."""
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def encoder():
    model = tiny(TinyTransformer())
    model.blocks[0].attention.v_proj.bias = None  # so that linear layers of both kinds are covered
    return model


def gpt2():
    ids = dict.fromkeys(["bos_token_id", "eos_token_id"])
    off = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    size = dict(vocab_size=10, n_positions=32, n_embd=8, n_layer=2, n_head=2)
    return tiny(GPT2LMHeadModel(GPT2Config(**size, **off, **ids)))


def bert():
    off = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0)
    size = dict(vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    return tiny(BertLMHeadModel(BertConfig(**size, **off, intermediate_size=16)))


class Decoder(nn.Module):
    """GPT-2, whose linear layers are Conv1D, on the inputs that `TinyTransformer` takes."""

    def __init__(self):
        super().__init__()
        self.lm = gpt2()

    def forward(self, x):
        return self.lm(inputs_embeds=x.unflatten(-1, (8, 8))).logits.mean(1)


QV, KV = ["q_proj", "v_proj"], ["k_proj", "v_proj"]
ALL, CONV = [*QV, "k_proj", "out_proj", "fc1", "fc2"], ["c_attn", "c_fc", "c_proj"]
BIASED, R4 = ["q_proj", "out_proj", "fc1"], dict(r=4, lora_alpha=8)
OFT = peft.OFTConfig(oft_block_size=8, target_modules=ALL, use_cayley_neumann=False)
NORM = peft.LNTuningConfig(target_modules=["norm", "norm1", "norm2"])
BIAS = peft.LoraConfig(target_modules=BIASED, bias="lora_only")


def lora(targets, base=encoder, add=inject.inject_lora, *, init="lora", rslora=False, dropout=0.0):
    its = dict(lora_dropout=dropout, use_rslora=rslora, use_dora=add is inject.inject_dora)
    ours = dict(dropout=dropout, rslora=rslora) | ({"init": init} if init != "lora" else {})
    config = peft.LoraConfig(**R4, target_modules=targets, fan_in_fan_out=base is Decoder, **its)
    return base, partial(add, targets=targets, **R4, **ours), config


def vera(targets, base=encoder):
    config = peft.VeraConfig(r=6, target_modules=targets, fan_in_fan_out=base is Decoder)
    return base, partial(inject.inject_vera, targets=targets, r=6), config


def ia3(outputs, inputs, base=encoder):
    its = dict(target_modules=[*outputs, *inputs], feedforward_modules=inputs)
    config = peft.IA3Config(**its, fan_in_fan_out=base is Decoder)
    return base, partial(inject.inject_ia3, targets=outputs, feedforward=inputs), config


CASES = {  # base, how we inject, how peft does; its LoRA is made its PiSSA or BitFit in `build`
    "lora-qv": lora(QV),
    "lora-all": lora(ALL),
    "lora-dropout": lora(ALL, dropout=0.3),
    "rslora": lora(ALL, rslora=True),
    "pissa": lora(ALL, init="pissa"),
    "pissa-dropout": lora(ALL, init="pissa", rslora=True, dropout=0.3),
    "dora": lora(ALL, add=inject.inject_dora),
    "vera": vera(ALL),
    "ia3": ia3(KV, ["fc2"]),
    "oft": (encoder, partial(inject.inject_oft, targets=ALL), OFT),
    "layer-norm": (encoder, inject.inject_layer_norm, NORM),
    "bitfit": (encoder, partial(inject.inject_bitfit, targets=BIASED), BIAS),
    "gpt2-lora": lora(["c_attn"], Decoder),
    "gpt2-pissa": lora(CONV, Decoder, init="pissa"),
    "gpt2-dora": lora(CONV, Decoder, inject.inject_dora, rslora=True),
    "gpt2-vera": vera(CONV, Decoder),
    "gpt2-ia3": ia3(["c_attn"], ["mlp.c_proj"], Decoder),
}
NAMES = {  # of a parameter, in ours and in peft's adapter
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
    "lambda_d": "vera_lambda_d.default",
    "lambda_b": "vera_lambda_b.default",
    "ia3_l": "ia3_l.default",
    "oft_R": "oft_R.default.weight",
    "tuned_weight": "ln_tuning_layers.default.weight",
    "tuned_bias": "ln_tuning_layers.default.bias",
}


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def wrap(model, config):
    """Return peft's model around a copy; it writes into its configuration."""
    parts = copy.deepcopy(model), copy.deepcopy(config)
    return peft.get_peft_model(*parts, autocast_adapter_dtype=False)


@torch.no_grad()
def build(case, *, draw=True):
    """Return our model, peft's, and {name: (parameter, peft's)} with all of them drawn at random.

    No parameter of either is without its counterpart.
    """
    base, add, config = CASES[case]
    ours = base()
    theirs = wrap(ours, config)
    freeze(ours)
    add(ours)
    named, renamed = dict(theirs.named_parameters()), NAMES
    if case == "bitfit":  # peft's LoRA trains the bias itself; A and B are not part of BitFit
        renamed = {"tuned_bias": "base_layer.bias"}
        freeze(*(p for name, p in named.items() if "lora_" in name))
    couples, other = {}, trainable(theirs)
    for name, p in trainable(ours).items():
        path, _, end = name.rpartition(".")
        couples[name] = p, other.pop(f"base_model.model.{path}.{renamed[end]}")
    assert couples and not other
    for name, layer in adapters(ours).items():
        if "pissa" in case:  # the base without its r largest singular values, r = 4
            W = named[f"base_model.model.{name}.base_layer.weight"]
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            W.copy_(U[:, 4:] * S[4:] @ Vh[4:])
        elif "vera" in case:
            theirs.base_model.vera_A["default"].copy_(layer.projection.A)
            theirs.base_model.vera_B["default"].copy_(layer.projection.B)
    for mine, its in couples.values() if draw else ():
        mine += 0.1 * torch.randn_like(mine)
        its.copy_(mine.view_as(its))
    return ours, theirs, couples


def outputs(model, x):
    torch.manual_seed(1)  # of dropout
    return model(x)


def agree_throughout(models, couples, optimizers, steps):
    """Take `steps` steps with either model and compare parameters and outputs after each."""
    x, labels = torch.rand(16, 64), torch.randint(10, (16,))
    start = {name: mine.clone() for name, (mine, _) in couples.items()}
    for _ in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(outputs(model, x), labels).backward()
            optimizer.step()
        for mine, its in couples.values():
            agree(its, mine.view_as(its))
        agree(*(outputs(model, x) for model in models))
    assert all((mine - start[name]).abs().max() > 1e-3 for name, (mine, _) in couples.items())


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(case):
    ours, theirs, couples = build(case)
    x = torch.rand(5, 64, requires_grad=True)
    y, expected = outputs(ours, x), outputs(theirs, x)
    agree(y, expected)
    weights, of_x = torch.randn_like(y), []
    for out in (y, expected):
        (out * weights).sum().backward()
        of_x.append(x.grad)
        x.grad = None
    agree(*of_x)
    for mine, its in couples.values():
        assert mine.grad.abs().max() > 1e-6
        agree(its.grad, mine.grad.view_as(its))


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_peft(case):
    ours, theirs, _ = build(case)
    merge(ours)
    merged, expected = ours.state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        agree(merged[name], weight)


@pytest.mark.parametrize("case", CASES)
def test_five_steps_of_training_end_where_those_of_peft_end(case):
    ours, theirs, couples = build(case)
    optimizers = [AdamW(trainable(model).values(), lr=0.01) for model in (ours, theirs)]
    agree_throughout((ours, theirs), couples, optimizers, steps=5)


@pytest.mark.parametrize("case", CASES)
def test_the_start_is_that_of_peft_but_for_random_draws(case):
    ours, theirs, couples = build(case, draw=False)
    drawn = ("lora_A", "lora_B") if "pissa" in case else ("lora_A",)
    for name, (mine, its) in couples.items():
        if not name.endswith(drawn):
            agree(its, mine.view_as(its))
        elif "pissa" not in case:  # of one stream, peft and we draw the same A
            path = name.rpartition(".")[0]
            torch.manual_seed(2)
            theirs.base_model.model.get_submodule(path).reset_lora_parameters("default", True)
            torch.manual_seed(2)
            agree(LoRA(ours.get_submodule(path).base, **R4).lora_A, its)


def test_vera_shares_the_matrices_of_peft():
    ours, config = encoder(), peft.VeraConfig(r=6, target_modules=ALL, projection_prng_key=3)
    theirs = wrap(ours, config).base_model
    inject.inject_vera(ours, ALL, r=6, generator=torch.Generator().manual_seed(3))
    shared = ours.blocks[0].attention.q_proj.projection
    agree(theirs.vera_A["default"], shared.A)
    agree(theirs.vera_B["default"], shared.B)


def test_pissa_starts_from_the_product_of_peft_in_single_precision():
    ours, close = encoder().float(), partial(agree, atol=1e-5)
    options = dict(target_modules=ALL, init_lora_weights="pissa")
    theirs = wrap(ours, peft.LoraConfig(**R4, **options)).base_model.model
    inject.inject_lora(ours, ALL, init="pissa", **R4)
    for name, layer in adapters(ours).items():
        its = theirs.get_submodule(name)
        start = its.lora_B["default"].weight @ its.lora_A["default"].weight
        close(layer.lora_B @ layer.lora_A, start)
        close(layer.start_B @ layer.start_A, start)
        close(layer.base.weight - layer.scaling * start, its.base_layer.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_doras_dropout_acts_on_the_low_rank_path_alone_unlike_in_peft(bias):
    ours, x = nn.Sequential(nn.Linear(6, 7, bias=bias)), torch.randn(9, 6)
    options = dict(target_modules=["0"], use_dora=True, lora_dropout=0.3)
    theirs = wrap(ours, peft.LoraConfig(**R4, **options))
    W, b = ours[0].weight, ours[0].bias if bias else 0
    inject.inject_dora(ours, ["0"], dropout=0.3, **R4)
    A, B, m = torch.randn(4, 6), torch.randn(7, 4), torch.rand(7)
    for name, value in {"lora_A": A, "lora_B": B, "magnitude": m}.items():
        ours[0].get_parameter(name).data = value
        theirs.base_model.model[0].get_parameter(NAMES[name]).data = value
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.3)
    g = m / torch.linalg.norm(W + 2 * B @ A, dim=1)
    low_rank = 2 * dropped @ A.T @ B.T
    agree(outputs(ours, x), g * (x @ W.T + low_rank) + b)
    agree(outputs(theirs, x), x @ W.T + (g - 1) * (dropped @ W.T) + g * low_rank + b)
    assert (outputs(ours, x) - outputs(theirs, x)).abs().max() > 0.01
    agree(outputs(ours.eval(), x), outputs(theirs.eval(), x))


def test_lora_plus_rates_and_steps_are_those_of_peft():
    ours, theirs, couples = build("lora-all")
    mine = AdamW(param_groups(ours, {"": 1e-3, ".lora_B": 16e-3}), weight_decay=0)
    its = create_loraplus_optimizer(theirs, AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = [
        {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (mine, its)
    ]
    for p, q in couples.values():
        assert rates[0].pop(p) == pytest.approx(rates[1].pop(q), rel=1e-12)
    assert rates == [{}, {}]
    agree_throughout((ours, theirs), couples, (mine, its), steps=3)


class TakesPrefix:
    """Gives an attention module of transformers a prefix, as a cache of what came before."""

    n_heads, d_head = 2, 4

    def forward(self, x, *, prefix, attention_mask=None, cache=None, **kwargs):
        def update(*new, **_):  # what a cache does with keys and values, and a layer's number
            pairs = zip(prefix, new[:2], strict=True)
            return [torch.cat([p.expand(len(t), -1, -1, -1), t], 2) for p, t in pairs]

        if attention_mask is not None:  # (B, 1, T, T), added to the scores
            attention_mask = F.pad(attention_mask, (prefix[0].shape[2], 0))
        earlier = SimpleNamespace(update=update)
        return super().forward(x, attention_mask=attention_mask, cache=earlier, **kwargs)


ATTENTION = (GPT2Attention, BertSelfAttention)
WITH_PREFIX = {kind: type(kind.__name__, (TakesPrefix, kind), {}) for kind in ATTENTION}


@pytest.mark.parametrize("how", ["prompt", "prefix"])
@pytest.mark.parametrize(
    "base, names",
    [(gpt2, ["wte", "attn"]), (bert, ["word_embeddings", "self"])],
    ids=["gpt2", "bert"],
)
def test_virtual_tokens_are_those_of_peft(base, names, how):
    ours, ids = base(), torch.randint(10, (3, 6))
    kind = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[how]
    theirs = wrap(ours, kind(task_type="CAUSAL_LM", num_virtual_tokens=5))
    freeze(ours)
    if how == "prompt":
        inject.inject_prompt(ours, [names[0]], num_virtual_tokens=5)
    else:
        ours.set_attn_implementation("eager")  # hands a mask over, where there is one
        for module in ours.modules():
            module.__class__ = WITH_PREFIX.get(type(module), type(module))
        inject.inject_prefix(ours, [names[1]], num_virtual_tokens=5)

    def split(t):  # peft's (P, layers * 2 * d) holds ours of (2, H, P, d_head), one for each layer
        return t[None] if how == "prompt" else t.view(5, 2, 2, 2, 4).permute(1, 2, 3, 0, 4)

    mine, (its,) = list(trainable(ours).values()), trainable(theirs).values()
    its.data = torch.randn_like(its)
    for p, q in zip(mine, split(its), strict=True):
        p.data.copy_(q)
    if how == "prompt":
        y = ours(ids).logits
        agree(ours(inputs_embeds=ours.get_input_embeddings()(ids)).logits, y)
    else:
        y = ours(ids, position_ids=torch.arange(5, 11)[None]).logits  # the prefix is 0 to 4
    expected = theirs(ids).logits
    agree(y, expected)
    weights = torch.randn_like(y)
    for logits in (y, expected):
        (logits * weights).sum().backward()
    for p, q in zip(mine, split(its.grad), strict=True):
        agree(p.grad, q)
