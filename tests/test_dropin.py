"""An adapter is a drop-in for the layer that it wraps: whoever reads, hooks or casts or derives."""

import copy
import pickle
import re

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from helpers.models import MLP, with_fresh_head
from helpers.peft import (
    Adapter,
    Tuned,
    adapters,
    inject,
    lora,
    merge,
    quantize_layers,
    replace,
    unload,
)
from helpers.study import reproducible
from helpers.training import freeze
from tests.test_inject import METHODS, NOT_MERGEABLE, adapted, each, rows, seeded, stirred, tiny

MERGEABLE = [method for method in METHODS if method not in NOT_MERGEABLE]
LOW_RANK = ["LoRA", "PiSSA", "DoRA", "VeRA"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
SMALL |= {"intermediate_size": 16}


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


def frozen(model):
    freeze(model)
    return model.eval()


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def unreached(model):
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("method", MERGEABLE)
def test_a_weight_that_is_read_is_the_techniques_own(method):
    model = stirred(adapted(method)).eval()
    for a in adapters(model).values():
        if isinstance(a.base, nn.Linear):
            x = torch.randn(3, 5, a.in_features)
            close(F.linear(x, a.weight, a.bias), a(x))
            a.enabled = False
            assert a.weight is a.base.weight and a.bias is a.base.bias


WAVLM = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)} | SMALL
WAVLM |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 9}
WHISPER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 20, "decoder_start_token_id": 1, "pad_token_id": 0}
WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 4}
BEIT = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
READERS = {  # models that read attributes of a layer, or compute with its weight themselves
    "WavLM": (hf.WavLMModel, WAVLM, ["q_proj", "v_proj"], lambda: {"input_values": floats(2, 400)}),
    "Mamba": (hf.MambaModel, MAMBA | {"vocab_size": 40}, ["dt_proj"], lambda: {"input_ids": ids()}),
    "BEiT": (hf.BeitModel, BEIT, ["q_proj"], lambda: {"pixel_values": floats(2, 3, 8, 8)}),
    "Whisper": (
        hf.WhisperModel,
        WHISPER,
        None,
        lambda: {"input_features": floats(2, 8, 40), "decoder_input_ids": ids()},
    ),
}


def floats(*shape):
    return torch.randn(shape)


def ids():
    return torch.randint(3, 40, (2, 7))


@pytest.mark.parametrize("name", READERS)
def test_gradients_reach_adapters_in_models_that_read_their_layers(name):
    kind, settings, targets, inputs = READERS[name]
    model = frozen(kind(kind.config_class(**settings)))
    if targets:
        inject.inject_lora(model, targets, r=2)
    else:
        inject.inject_bitfit(model)
    stirred(model)
    model(**inputs())[0].square().sum().backward()
    assert unreached(model) == []


def test_attributes_are_the_bases_and_what_neither_has_is_named():
    model = frozen(nn.Sequential(nn.Conv1d(2, 3, 5, stride=2), nn.Embedding(4, 6)))
    model[0].note = "kept"
    inject.inject_bitfit(model)
    conv = model[0]
    assert isinstance(conv, Adapter) and (conv.stride, conv.note) == ((2,), "kept")
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert twin.stride == (2,) and twin.base is not conv.base
    with pytest.raises(AttributeError, match="strides"):
        _ = conv.strides
    inject.inject_prompt(model, ["1"], num_virtual_tokens=2)
    assert (model[1].embedding_dim, model[1].weight) == (6, model[1].base.weight)


def test_a_weight_that_is_set_is_the_bases_and_one_of_another_shape_is_refused():
    model = adapted("LoRA")
    layer, new = model.blocks[0].attention.q_proj, nn.Parameter(torch.randn(8, 8))
    names = [name for name, _ in model.named_parameters()]
    layer.weight = new
    assert layer.base.weight is new and [name for name, _ in model.named_parameters()] == names
    with pytest.raises(ValueError, match=r"shape \(9, 8\) under an adapter for \(8, 8\): unload"):
        layer.weight = nn.Parameter(torch.randn(9, 8))
    head = with_fresh_head(frozen_head(), 4)
    assert head.head.weight.shape == (4, 32)


def frozen_head():
    model = frozen(MLP(6, n_classes=3))
    inject.inject_lora(model, ["head"], r=2)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_and_resized_under_adapters(tied):
    hf.logging.set_verbosity_error()
    config = hf.LlamaConfig(**SMALL, tie_word_embeddings=tied)
    model, tokens = frozen(hf.LlamaForCausalLM(config)), ids()
    inject.inject_lora(model, ["q_proj", "down_proj"], r=2)
    before = stirred(model)(tokens).logits
    model.tie_weights()
    model.resize_token_embeddings(44)
    close(model(tokens).logits[..., :40], before)
    inject.inject_lora(model, ["lm_head"], r=2)
    model.tie_weights()
    close(model(tokens).logits[..., :40], before)
    with pytest.raises((ValueError, TypeError), match=r"unload|not an instance"):
        model.resize_token_embeddings(48)


@each
def test_a_state_dict_has_the_bases_tensors_by_their_names(method):
    plain, (x, _) = tiny(), rows()
    model = copy.deepcopy(plain)
    METHODS[method](model, seeded())
    base = plain.state_dict()
    state = stirred(model).eval().state_dict()
    assert base.keys() < state.keys()
    assert all(torch.equal(state[name], t) for name, t in base.items())
    twin = tiny()
    METHODS[method](twin, seeded(1))
    twin.eval().load_state_dict(state)
    assert torch.equal(twin(x), model(x))
    other = tiny()  # reads the base, and leaves what it has no place for
    assert other.load_state_dict(state, strict=False).missing_keys == []
    assert torch.equal(other.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("pair", [("prefix", "LoRA"), ("LoRA", "parallel"), ("VeRA", "prefix")])
def test_adapters_around_adapters_keep_the_names_too(pair):
    model, (x, _) = stirred(adapted(*pair)).eval(), rows()
    assert tiny().state_dict().keys() < model.state_dict().keys()
    twin = adapted(*pair).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("method", LOW_RANK)
@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_the_base_see_what_they_saw_and_keep_it(method, hook):
    model, x, seen = adapted(method), torch.randn(2, 4, 16), []
    layer = stirred(model).eval().blocks[0].attention.q_proj
    x = torch.randn(2, 3, 8, requires_grad=True)
    expected = layer(x).detach()

    def look(module, *given):
        seen.extend(t[0] if isinstance(t, tuple) else t for t in given)

    handle = getattr(layer.base, f"register_{hook}_hook")(look)
    y = layer(x)
    y.sum().backward()
    handle.remove()
    assert seen and all(t.shape == (2, 3, 8) for t in seen) and torch.equal(y, expected)
    if hook == "forward":
        assert torch.equal(seen[1], layer.base(x))


def test_an_adapter_is_seen_by_hooks_of_all_modules():
    layer, x, shapes = adapted("LoRA").blocks[0].attention.q_proj, torch.randn(2, 3, 8), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: shapes.append(tuple(y.shape))
    )
    layer(x)
    handle.remove()
    assert set(shapes) == {(2, 3, 8)}


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_half_precision_base_adapters_are_float32_and_outputs_the_bases(method, dtype):
    plain, (x, _) = tiny().to(dtype).eval(), rows(4)
    model = copy.deepcopy(plain)
    METHODS[method](model, seeded())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    x = x.to(dtype)
    assert model(x).dtype == dtype
    if method in MERGEABLE:
        close(model(x), plain(x), atol=0.05)
        names = plain.state_dict().keys()
        merge(model)
        assert {n: t.dtype for n, t in model.state_dict().items()} == dict.fromkeys(names, dtype)


@each
def test_under_autocast_a_technique_returns_what_the_plain_model_returns(method):
    plain = tiny().float().eval()
    model, seen = copy.deepcopy(plain), {}
    METHODS[method](model, seeded())
    model.float().eval()
    for name, m in (("plain", plain), ("adapted", model)):
        for end in ("blocks.0.attention.q_proj", "blocks.0.feed_forward.fc2", "blocks.0.norm2"):
            m.get_submodule(end).register_forward_hook(
                lambda module, args, y, key=(name, end): seen.update({key: y.dtype})
            )
        with torch.autocast("cpu", torch.bfloat16):
            seen[name, "whole"] = m(rows(4)[0].float()).dtype
    found = [{end: d for (n, end), d in seen.items() if n == name} for name in ("plain", "adapted")]
    assert found[0] == found[1] and len(found[0]) == 4


def test_small_steps_move_an_adapter_on_a_bfloat16_base_as_on_a_float32_one():
    share = []
    for dtype in (torch.float32, torch.bfloat16):
        model = frozen(nn.Sequential(nn.Linear(32, 32, dtype=dtype)))
        inject.inject_lora(model, ["0"], r=4, generator=seeded())
        layer, x = model[0], torch.randn(64, 32).to(dtype)
        layer.lora_B.data.normal_(0, 0.1)
        before = layer.lora_A.detach().clone()
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], 2e-5)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - x).float().square().mean().backward()
            optimizer.step()
        share.append((layer.lora_A != before).double().mean().item())
    assert share == [1.0, 1.0]


def plain_product(y, x, A, B, scaling):
    return y + scaling * F.linear(F.linear(x, A), B)


SECOND = {
    "LoRA": lambda m: inject.inject_lora(m, ["0", "2"], r=2, generator=seeded()),
    "PiSSA": lambda m: inject.inject_lora(m, ["0", "2"], r=2, init="pissa"),
    "DoRA": lambda m: inject.inject_dora(m, ["0", "2"], r=2, generator=seeded()),
    "VeRA": lambda m: inject.inject_vera(m, ["0", "2"], r=4, generator=seeded()),
    "QLoRA": lambda m: (quantize_layers(m, ["0", "2"]), SECOND["LoRA"](m)),
    "OFT": lambda m: inject.inject_oft(m, ["0", "2"], block_size=4),
    "(IA)3": lambda m: inject.inject_ia3(m, ["0", "2"]),
}


def curved(method, shape):
    """A small adapted network away from its start, its rows and loss, and what it trains."""
    torch.manual_seed(1)
    model = frozen(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
    SECOND[method](model)
    stirred(model)
    x = torch.randn(*shape, 8)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return model, x, lambda y: (y.softmax(-1) ** 2).sum(), own


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize("method", SECOND)
def test_second_derivatives_are_those_of_the_plain_equation(method, shape, monkeypatch):
    def derivatives():
        model, x, loss, own = curved(method, shape)
        x.requires_grad_(True)
        first = grad(loss(model(x)), [x, *own.values()], create_graph=True)
        second = grad(sum((g**2).sum() for g in first), [x, *own.values()])
        name, p = next(iter(own.items()))
        hessian = torch.autograd.functional.hessian(
            lambda v: loss(functional_call(model, {name: v}, (x.detach(),))), p.detach().clone()
        )
        return [*first, *second, hessian]

    fast = derivatives()
    monkeypatch.setattr(lora, "add_low_rank", plain_product)
    for one, other in zip(fast, derivatives(), strict=True):
        close(one, other)
    assert fast[-1].abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA", "OFT"])
def test_transforms_and_tracing_take_the_plain_form(method):
    model, x, loss, own = curved(method, (5,))
    name, p = next(iter(own.items()))

    def of_row(row, v=None):
        return loss(functional_call(model, {name: p if v is None else v}, (row[None],)))

    each_row = torch.func.vmap(torch.func.grad(lambda v, row: of_row(row, v)), (None, 0))(p, x)
    for row, found in zip(x, each_row, strict=True):
        close(found, grad(of_row(row), p)[0])
    one = torch.func.hessian(lambda v: of_row(x[0], v))(p.detach())
    close(one, torch.autograd.functional.hessian(lambda v: of_row(x[0], v), p.detach()))
    traced = torch.jit.trace(model, x)
    longer = torch.randn(9, 8)
    close(traced(longer), model(longer))


def test_a_compiled_model_computes_the_same_and_trains():
    model, x, loss, own = curved("LoRA", (2, 3))
    compiled = torch.compile(model, backend="eager")
    close(compiled(x), model(x))
    expected = grad(loss(model(x)), [*own.values()])
    for found, wanted in zip(grad(loss(compiled(x)), [*own.values()]), expected, strict=True):
        close(found, wanted)


@pytest.mark.parametrize("value, dtype", [(float("nan"), None), (6e4, torch.float16)], ids=str)
def test_merging_what_is_not_finite_is_refused_and_changes_nothing(value, dtype):
    model = frozen(nn.Sequential(nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 6, dtype=dtype)))
    inject.inject_lora(model, ["0", "1"], r=2)
    model[1].lora_B.data.fill_(value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'1' merged has values of weight that are no finite"):
        merge(model)
    torch.testing.assert_close(model.state_dict(), before, equal_nan=True)


@each
def test_unload_gives_the_base_back_bit_for_bit(method):
    plain, (x, _) = tiny(), rows()
    model = copy.deepcopy(plain)
    METHODS[method](model, seeded())
    names = [*adapters(model)]
    stirred(model)
    assert unload(model) == names and not adapters(model)
    for one, other in ((model.named_parameters(), plain.named_parameters()),):
        for (a, p), (b, q) in zip(one, other, strict=True):  # in the same order, too
            assert a == b and torch.equal(p, q) and not p.requires_grad
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    assert [*dict(model.named_buffers())] == [] and torch.equal(model(x), plain(x))
    METHODS[method](model, seeded())  # and can be adapted anew


def test_a_tuned_weight_alone_comes_back_before_its_bias():
    model = frozen(nn.Sequential(nn.LayerNorm(4)))
    replace(model, {"0": model[0]}, lambda base: Tuned(base, ["weight"]))
    assert unload(model) == ["0"]
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]


MIXTRAL = SMALL | {"num_key_value_heads": 2, "num_local_experts": 2, "num_hidden_layers": 1}


def mixtral():
    return frozen(hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTRAL)).float())


def test_experts_held_as_one_parameter_are_adapted():
    model, tokens = mixtral(), ids()
    base = model(tokens).logits
    names = inject.inject_lora(model, ["q_proj", "down_proj", "gate_up_proj"], r=2)
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"]
    assert torch.equal(model(tokens).logits, base)
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(own) == 2 + 4 and all("lora_" in n for n in own)
    experts = stirred(model).model.layers[0].mlp.experts
    W, A, B = experts.base.down_proj, experts.down_proj_lora_A, experts.down_proj_lora_B
    close(experts.down_proj, W + 8 * torch.einsum("enr,erm->enm", B, A), atol=1e-5)
    y = model(tokens).logits
    y.sum().backward()
    assert unreached(model) == [] and not torch.allclose(y, base)
    twin = copy.deepcopy(model)
    merge(twin)
    close(twin(tokens).logits, y, atol=1e-4)
    unload(model)
    assert torch.equal(model(tokens).logits, base)


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda m: inject.inject_dora(m, ["down_proj"]), "inject_lora alone adapts parameters"),
        (lambda m: inject.inject_lora(m, ["down_proj"], dropout=0.1), "no dropout=0.1"),
        (lambda m: inject.inject_lora(m, ["input_layernorm.weight"]), "not a layer"),
    ],
)
def test_what_experts_cannot_do_is_refused_by_name(call, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        call(mixtral())


class Same(nn.Linear):
    """As Falcon's: the same product, written out."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(x.shape[:-1])[..., None]


class Gated(nn.Linear):
    """The same at its start alone."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gate * super().forward(x)


def test_subclasses_of_linear_that_compute_the_same_are_adapted():
    sizes = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    falcon = frozen(hf.FalconForCausalLM(hf.FalconConfig(**sizes, multi_query=False)))
    assert len(inject.inject_lora(falcon, ["query_key_value"], r=2)) == 2
    model = frozen(nn.Sequential(Same(6, 4)))
    inject.inject_dora(model, ["0"], r=2)
    x = torch.randn(3, 6)
    y = stirred(model)(x)
    merge(model)
    assert type(model[0]) is Same
    close(model(x), y)


@pytest.mark.parametrize("kind", [Scaled, Noisy, Gated])
def test_subclasses_of_linear_that_compute_something_else_are_refused(kind):
    stream = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"a {kind.__name__} is a Linear that does not compute"):
        inject.inject_lora(frozen(nn.Sequential(kind(6, 4))), ["0"], r=2)
    model = frozen(nn.Sequential(kind(6, 4)))
    stream = torch.get_rng_state()
    with pytest.raises(ValueError):
        inject.inject_oft(model, ["0"], block_size=2)
    assert torch.equal(torch.get_rng_state(), stream)


NORM_FAMILIES = ["Llama", "Qwen2", "Gemma", "Gemma2", "Mistral", "Phi3", "Olmo2"]


@pytest.mark.parametrize("family", NORM_FAMILIES)
def test_norms_of_the_llama_family_are_found_without_their_names(family):
    kind = getattr(hf, f"{family}Model")
    model = kind(kind.config_class(**SMALL, num_key_value_heads=2, pad_token_id=0, head_dim=8))
    freeze(model)
    names = inject.inject_layer_norm(model)
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if not n.endswith(".base")}
    assert names == [*adapters(model)] and not any("Norm" in kind for kind in kinds.values())
    assert names[-1] == "norm" and len(names) >= 5


def causal_llama():
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0, initializer_range=0.2)
    return frozen(hf.LlamaForCausalLM(config))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("how", ["keywords", "positions", "padded"])
def test_a_prompt_before_masked_tokens_gives_pefts_logits(how):
    base, tokens = causal_llama(), ids()
    mask = torch.ones_like(tokens)
    if how == "padded":
        mask[1, :3] = 0
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    inject.inject_prompt(base, ["embed_tokens"], num_virtual_tokens=4)
    base.model.embed_tokens.prompt.data.copy_(theirs.prompt_encoder["default"].embedding.weight)
    for model in (base, copy.deepcopy(base)):
        if how == "positions":
            mine = model(tokens, mask).logits
        else:
            mine = model(input_ids=tokens, attention_mask=mask).logits
        wanted = theirs(input_ids=tokens, attention_mask=mask).logits
        kept = mask.bool() if how == "padded" else torch.ones_like(mask).bool()
        close(mine[:, 4:][kept], wanted[:, 4:][kept])


def test_generation_repeats_no_prompt():
    model, tokens = causal_llama(), ids()
    plain = copy.deepcopy(model)
    inject.inject_prompt(model, ["embed_tokens"], num_virtual_tokens=4)
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="goes before whole sequences: call the model without"):
            model.generate(tokens, use_cache=use_cache, **options)
    assert model(tokens).logits.shape == (2, 11, 40)
    unload(model)
    assert torch.equal(model.generate(tokens, **options), plain.generate(tokens, **options))


def test_a_layer_that_its_parent_does_not_call_is_refused():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = frozen(hf.T5ForConditionalGeneration(hf.T5Config(**sizes, vocab_size=40)))
    with pytest.raises(ValueError, match="does not call 'shared': name one of its twins"):
        inject.inject_prompt(model, ["shared"], num_virtual_tokens=2)
    assert inject.inject_prompt(model, ["encoder.embed_tokens"], num_virtual_tokens=2)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, AveragedModel, lambda m: torch.compile(m, backend="eager")]
)
def test_a_model_that_is_wrapped_already_is_refused(wrap):
    model = wrap(tiny())
    for name in ("LoRA", "prompt", "BitFit"):
        with pytest.raises(ValueError, match="holds the model: adapt the model in it"):
            METHODS[name](model, seeded())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_bitfit_refuses_to_leave_out_biases_of_recurrent_layers(kind):
    model = frozen(nn.Sequential(kind(4, 4), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"'0.bias_ih_l0' would be left out: name the modules"):
        inject.inject_bitfit(model)
    assert inject.inject_bitfit(model, ["1"]) == ["1"]
