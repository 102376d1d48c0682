"""Four bits: published levels, stated size and error, a layer equal to its restored weight's."""

import copy
import re

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from torch import nn
from torch.autograd import grad
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.models import MLP
from helpers.peft import (
    CODEBOOKS,
    QuantizedLinear,
    adapters,
    adapters_disabled,
    dequantize,
    inject,
    load_peft,
    load_trainable,
    loftq,
    matrix,
    merge,
    qlora,
    quantize,
    quantize_layers,
    save_peft,
    save_trainable,
)
from helpers.study import reproducible
from helpers.training import activation_bytes, freeze, stored_bytes, unfreeze
from tests.small import TinyTransformer

PUBLISHED = [  # QLoRA, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
QV = ["q_proj", "v_proj"]
BOTH = pytest.mark.parametrize("code", CODEBOOKS)


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def blocks(W, block_size):
    """The numbers of W block by block, the last one filled up with zeros; and their scales."""
    x = torch.zeros(-(-W.numel() // block_size) * block_size, dtype=W.dtype)
    x[: W.numel()] = W.flatten()
    x = x.view(-1, block_size)
    return x, x.abs().max(1).values


def unpacked(q):
    """The codes one by one, from a byte's high half first."""
    return torch.tensor([half for byte in q.codes.tolist() for half in divmod(byte, 16)])


def relative(W, restored):
    return ((W - restored).norm() / W.norm()).item()


def stirred(model, scale=0.3):
    with torch.no_grad():
        for p in model.parameters():
            p += p.requires_grad * scale * torch.randn_like(p)
    return model


def tiny(**sizes):
    model = TinyTransformer(4, 4, d=16, n_heads=2, n_classes=3, **sizes)
    freeze(model)
    return model


def restored(model):
    """A copy with a plain layer in the place of each quantised one."""
    model = copy.deepcopy(model)
    qlora.dequantize_layers(model)
    return model


def test_nf4_is_the_published_table_and_that_of_bitsandbytes():
    ours = CODEBOOKS["nf4"]
    close(ours, torch.tensor(PUBLISHED), 2e-7)  # which was computed in float32
    close(ours.float(), bnb.get_4bit_type("nf4", device="cpu").float(), 2e-7)
    assert (ours[0], ours[7], ours[15]) == (-1, 0, 1) and not ours[7].signbit()


def test_the_levels_of_nf4_are_quantiles_and_those_of_int4_evenly_spaced():
    tail = (1 / 32 + 1 / 30) / 2
    largest = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - tail))
    mass = torch.special.ndtr(CODEBOOKS["nf4"] * largest)
    close(mass[:8], tail + torch.arange(8) * (0.5 - tail) / 7)
    close(mass[7:], 0.5 + torch.arange(9) * (0.5 - tail) / 8)
    close(CODEBOOKS["int4"], torch.arange(-8.0, 8.0) / 7)
    q = quantize(torch.randn(64, 64), code="int4")
    assert set(unpacked(q).tolist()) == set(range(1, 16))  # -8/7 is never the nearest


@pytest.mark.parametrize("block_size", [64, 128])
def test_codes_and_values_are_those_of_bitsandbytes(block_size):
    W = torch.randn(96, 128, dtype=torch.float32)
    options = dict(blocksize=block_size, quant_type="nf4", compress_statistics=False)
    theirs, state = bnb.quantize_4bit(W, **options)
    q = quantize(W, block_size=block_size)
    x, absmax = blocks(W, block_size)
    x = (x / absmax[:, None]).flatten()
    middles = (CODEBOOKS["nf4"][1:] + CODEBOOKS["nf4"][:-1]) / 2
    clear = (x[:, None] - middles).abs().min(1).values > 1e-6
    assert clear.float().mean() > 0.999
    their_codes = unpacked(q._replace(codes=theirs.flatten()))
    assert torch.equal(unpacked(q)[clear], their_codes[clear])
    close(absmax, state.absmax, 0)
    levels = CODEBOOKS["nf4"].float()[unpacked(q)]
    ours = levels.view(-1, block_size) * absmax[:, None]  # before the scales are rounded, too
    theirs = bnb.dequantize_4bit(theirs, state).view(-1, block_size)
    close(ours.flatten()[clear], theirs.flatten()[clear], 1e-6)


def test_two_codes_share_a_byte_and_a_block_its_largest_weight():
    W = torch.tensor([[0.0, 7.0, -3.0, 1.4], [-0.5, 0.0, 0.07, 0.28]])
    q = quantize(W, code="int4", block_size=4)
    assert q.codes.tolist() == [0x8F, 0x59, 0x18, 0x9C]  # in sevenths: 0 7 -3 1, -7 0 1 4
    assert q.mean.item() == 3.75  # both scales are 3.25 from it
    expected = [[0, 7, -3, 1], [-0.5, 0, 0.5 / 7, 2 / 7]]
    close(dequantize(q), torch.tensor(expected), 1e-6)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_error_stays_in_its_bound(code, dtype):
    """Half the widest gap of levels times the scale, and what 8 bits lose of the scale."""
    gap = CODEBOOKS[code].diff().max().item()
    for _ in range(40):
        shape = torch.randint(1, 80, (2,)).tolist()
        block_size = 2 * torch.randint(1, 40, ()).item()
        W = (torch.randn(shape) * torch.randn(shape).exp() ** 2).to(dtype)  # heavy tails
        q = quantize(W, code=code, block_size=block_size)
        W_, (x, absmax) = dequantize(q), blocks(W, block_size)
        assert (W_.shape, W_.dtype) == (W.shape, dtype)
        of_scale = (absmax - q.mean).abs()
        of_scale = of_scale / 16 + of_scale.max() * 2**-10 / 448  # of float8_e4m3fn, near 0
        bound = (gap / 2 * absmax + of_scale) * (1 + 1e-5) + 1e-6 * q.mean
        error = (x - blocks(W_, block_size)[0]).abs().max(1).values
        assert (error <= bound).all()


@BOTH
def test_a_weight_is_its_level_times_mean_plus_step_times_scale(code):
    q = quantize(torch.randn(300, 64) * (0.5 + torch.rand(300, 1)), code=code)
    steps = torch.cat([q.steps[0].expand(256), q.steps[1].expand(44)]).double()
    scales = q.mean.double() + steps * q.scales.double()
    close(dequantize(q), CODEBOOKS[code][unpacked(q)].view(300, 64) * scales[:, None], 1e-15)
    assert dequantize(q, torch.bfloat16).dtype == torch.bfloat16


@BOTH
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_double_quantisation_costs_little(draw, code):
    W = draw(512, 512)
    q = quantize(W, code=code)
    once = CODEBOOKS[code][unpacked(q)].view(-1, 64) * blocks(W, 64)[1][:, None]
    ratio = relative(W, dequantize(q)) / relative(W, once.view_as(W))
    assert 0.999 < ratio < 1.005


@BOTH
@pytest.mark.parametrize("shape, block_size", [((256, 512), 64), ((128, 384), 32), ((7, 9), 4)])
def test_what_is_stored_is_what_the_equation_says(shape, block_size, code):
    layer = QuantizedLinear(quantize(torch.randn(shape), code=code, block_size=block_size))
    n = -(-shape[0] * shape[1] // block_size) * block_size  # whole blocks
    steps = -(-n // block_size // 256)
    assert stored_bytes(layer) == n // 2 + n // block_size + 4 * steps + 4
    if n % (256 * block_size) == 0:
        bits = 4 + 8 / block_size + 32 / (256 * block_size) + 32 / n
        assert 8 * stored_bytes(layer) == pytest.approx(bits * n)


def test_stored_bytes_counts_a_storage_once():
    layer = nn.Linear(6, 4)
    assert stored_bytes(layer) == 8 * 28
    layer.register_buffer("view", layer.weight.detach().T)
    assert stored_bytes(nn.ModuleList([layer, layer])) == 8 * 28
    meta = nn.Linear(256, 64, device="meta")
    assert stored_bytes(meta) == 8 * (256 * 64 + 64)
    quantize_layers(meta_model := nn.Sequential(meta), ["0"])
    assert stored_bytes(meta_model) == 256 * 32 + 256 + 4 + 4 + 8 * 64


def test_normal_weights_lose_less_to_nf4_and_uniform_ones_to_int4():
    for draw, better, worse in ((torch.randn, "nf4", "int4"), (torch.rand, "int4", "nf4")):
        W = draw(256, 256) - (draw is torch.rand) / 2
        lost = {code: relative(W, dequantize(quantize(W, code=code))) for code in CODEBOOKS}
        assert lost[better] < 0.9 * lost[worse]


@BOTH
def test_zeros_stay_zeros_and_a_lone_block_keeps_its_scale(code):
    W = torch.randn(4, 64)
    W[1], W[2, ::2] = 0, 0
    restored = dequantize(quantize(W, code=code))
    assert (restored[1] == 0).all() and (restored[2, ::2] == 0).all()
    assert (dequantize(quantize(torch.zeros(3, 5), code=code)) == 0).all()
    W = torch.linspace(-1, 1, 9).float()[None]  # one block: its scale is the mean
    assert dequantize(quantize(W, code=code)).abs().max() == 1


def test_a_scale_far_below_the_mean_does_not_turn_signs():
    W = torch.ones(600, 64) + torch.arange(600)[:, None] % 7
    W[::5] = 1e-3
    assert (dequantize(quantize(W)) >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_equals_a_plain_one_with_the_restored_weight(dtype, bias):
    plain = nn.Linear(30, 20, bias=bias, dtype=dtype)
    model = nn.Sequential(copy.deepcopy(plain))
    assert quantize_layers(model, ["0"], block_size=16) == ["0"]
    assert model[0].weight.dtype == dtype
    with torch.no_grad():
        plain.weight.copy_(model[0].weight)
    x = torch.randn(2, 7, 30, dtype=dtype).requires_grad_()
    direction, results = torch.randn(2, 7, 20, dtype=dtype), []
    for layer in (model, plain):
        y = layer(x)
        inputs = [x, *([p for n, p in layer.named_parameters() if n.endswith("bias")])]
        results += [[y, *grad(y, inputs, direction)]]
    for ours, told in zip(*results, strict=True):
        assert ours.dtype == dtype
        close(ours, told, {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.05))


def test_backward_keeps_no_restored_weight():
    model, x, y = MLP(20, hidden=256), torch.randn(8, 20), torch.zeros(8, dtype=torch.int64)
    freeze(model)
    unfreeze(model.head)
    inject.inject_bitfit(model, ["0"])  # a gradient flows through the layer in the middle
    quantize_layers(model, ["backbone.2"])
    full = 8 * 256 * 256
    assert activation_bytes(model, x, y) < full / 4
    assert stored_bytes(model.backbone[2]) < full / 12
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes), lambda t: t):
        model.backbone[2](torch.randn(8, 256, requires_grad=True))
    assert sum(kept) < full / 12


def test_casts_copies_and_state_dicts_keep_every_bit():
    x, model = torch.randn(5, 20), MLP()
    quantize_layers(model, ["backbone.2", "head"])
    expected, before = model(x), copy.deepcopy(model.backbone[2].quantized)
    stored = ["bias", "nf4_codes", "scales", "steps", "mean"]
    assert [k for k in model.state_dict() if "head" in k] == [f"head.{name}" for name in stored]
    for same in (copy.deepcopy(model), model.float().half().bfloat16().double()):
        for ours, told in zip(same.backbone[2].quantized, before, strict=True):
            same_bits = ours == told
            if isinstance(ours, torch.Tensor):
                same_bits = torch.equal(ours.view(torch.uint8), told.view(torch.uint8))
            assert same_bits
    assert model.float().backbone[2].weight.dtype == torch.float32
    other = MLP()
    quantize_layers(other, ["backbone.2", "head"])
    other.load_state_dict(model.double().state_dict())
    close(other(x), expected, 1e-2)  # the rest went through bfloat16
    assert torch.equal(other(x), model(x))
    quantize_layers(other := MLP(), ["backbone.2", "head"], code="int4")
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone\.2\.int4_codes"):
        other.load_state_dict(model.state_dict())


METHODS = {
    "lora": lambda m: inject.inject_lora(m, LINEAR, r=3),
    "pissa": lambda m: inject.inject_lora(m, LINEAR, r=3, init="pissa"),
    "dora": lambda m: inject.inject_dora(m, LINEAR, r=3),
    "vera": lambda m: inject.inject_vera(m, LINEAR, r=8),
    "ia3": lambda m: inject.inject_ia3(m, QV, feedforward=["fc2"]),
    "oft": lambda m: inject.inject_oft(m, LINEAR, block_size=4),
    "bitfit": lambda m: inject.inject_bitfit(m),
    "adapter": lambda m: inject.inject_adapter(m, ["fc2"], reduction_factor=4),
    "prefix": lambda m: inject.inject_prefix(m, ["attention"], num_virtual_tokens=2),
}


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_every_technique_works_on_a_quantised_base_as_on_the_restored_one(method, code):
    model, x = tiny(), torch.randn(5, 16)
    names = quantize_layers(model, LINEAR, code=code, block_size=16)
    assert len(names) == 12 and all(
        isinstance(model.get_submodule(n), QuantizedLinear) for n in names
    )
    base = model(x)
    METHODS[method](model)
    if method != "prefix":
        close(model(x), base)
    stirred(model)
    plain, results = restored(model), []
    for m in (model, plain):
        y = m(x)
        loss = (y * torch.linspace(-1, 1, 3)).sum()
        results += [[y, *grad(loss, [p for p in m.parameters() if p.requires_grad])]]
    for ours, told in zip(*results, strict=True):
        close(ours, told)
    assert (results[0][0] - base).abs().max() > 1e-3
    with adapters_disabled(model):
        close(model(x), base)
    if method not in ("adapter", "prefix"):
        merge(model)
        close(model(x), results[0][0])
        merge(plain)
        close(plain(x), results[0][0])


def test_merging_on_a_quantised_base_gives_plain_frozen_layers_in_full_precision():
    model, x = tiny().eval(), torch.randn(5, 16)
    keys = list(model.state_dict())
    quantize_layers(model, LINEAR)
    inject.inject_lora(model, LINEAR, r=3)
    stirred(model)
    lora = adapters(model)["blocks.0.feed_forward.fc1"]
    W = lora.base.weight + lora.scaling * lora.lora_B @ lora.lora_A
    expected, stream = model(x), torch.get_rng_state()
    merge(model)
    merged = model.blocks[0].feed_forward.fc1
    assert type(merged) is nn.Linear and not merged.training and not merged.weight.requires_grad
    close(merged.weight, W)
    close(model(x), expected)
    assert list(model.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), stream)


def test_rounding_a_merged_weight_again_loses_more_than_a_small_update():
    W, A, B = torch.randn(64, 64), torch.randn(2, 64), torch.randn(64, 2)
    base = dequantize(quantize(W))
    update = B @ A * 0.01
    again = dequantize(quantize(base + update))
    assert (again - base - update).norm() > update.norm()


def test_autocast_reaches_the_quantised_layer_as_a_plain_one():
    model, x = nn.Sequential(nn.Linear(16, 8)).float(), torch.randn(5, 16).float().requires_grad_()
    quantize_layers(model, ["0"])
    inject.inject_lora(model, ["0"], r=2, lora_alpha=2)
    stirred(model)
    results = []
    for m in (model, restored(model)):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        inputs = [x, *(p for p in m.parameters() if p.requires_grad)]
        results += [[y.float(), *grad(y.float().square().sum(), inputs)]]
    assert y.dtype == torch.bfloat16 and len(results[0]) == 4
    for ours, told in zip(*results, strict=True):
        assert (ours - told).norm() < 0.05 * told.norm()  # bfloat16 has 8 bits


def test_conv1d_of_gpt2_is_quantised_too():
    sizes = dict(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double().eval()
    ids = torch.randint(0, 30, (3, 8))
    W = matrix(model.transformer.h[0].attn.c_attn).detach()
    assert len(quantize_layers(model, ["c_attn", "c_proj"])) == 6
    close(model.transformer.h[0].attn.c_attn.weight, dequantize(quantize(W)))
    close(model(ids).logits, restored(model)(ids).logits)


def residual(W, q, A, B, scaling):
    return (W - dequantize(q) - scaling * B @ A).norm().item()


@BOTH
@pytest.mark.parametrize("shape", [(64, 64), (100, 30), (24, 96)])
def test_loftq_starts_nearer_to_the_weights_than_qlora(shape, code):
    """Each product B A is the best for its W~; that a step gains is usual and not certain."""
    W, scaling, left = torch.randn(shape), 0.5, []
    for steps in range(1, 6):
        q, A, B = loftq(W, 8, scaling=scaling, code=code, steps=steps)
        left.append(residual(W, q, A, B, scaling))
        best = torch.linalg.svdvals(W - dequantize(q))[8:].norm().item()
        assert left[-1] == pytest.approx(best)
        close(A.norm(dim=1) ** 2, B.norm(dim=0) ** 2, 1e-9)  # neither is the larger one
    qlora = (W - dequantize(quantize(W, code=code))).norm().item()
    assert left[0] < qlora and left[4] < 0.97 * left[0]


def test_loftq_is_algorithm_1():
    W, delta = torch.randn(40, 24), 0
    for _ in range(3):
        Q = dequantize(quantize(W - delta, block_size=32))
        U, S, Vh = torch.linalg.svd(W - Q)
        delta = U[:, :5] * S[:5] @ Vh[:5]
    q, A, B = loftq(W, 5, scaling=2.0, block_size=32, steps=3)
    close(dequantize(q), Q)
    close(2 * B @ A, delta, 1e-10)


@pytest.mark.parametrize("rslora", [False, True])
def test_injected_loftq_is_a_lora_that_starts_near_the_original(rslora):
    original, x = tiny(), torch.randn(5, 16)
    bare, model, wide = (copy.deepcopy(original) for _ in range(3))
    options = dict(r=4, lora_alpha=6, rslora=rslora)
    stream = torch.get_rng_state()
    names = qlora.inject_loftq(model, LINEAR, **options)
    assert names == quantize_layers(bare, LINEAR) and torch.equal(torch.get_rng_state(), stream)
    assert {p for n, p in model.named_parameters() if ".lora_" in n} == {
        p for p in model.parameters() if p.requires_grad
    }
    for name in names:
        lora, W = model.get_submodule(name), original.get_submodule(name).weight
        assert type(lora.base) is QuantizedLinear and not lora.base.bias.requires_grad
        q, A, B = loftq(W, 4, scaling=lora.scaling)
        close(lora.merged_weight(), dequantize(q) + lora.scaling * B @ A)
        assert (lora.merged_weight() - W).norm() < (bare.get_submodule(name).weight - W).norm()
    qlora.inject_loftq(wide, LINEAR, r=16)
    close(wide(x), original(x), 1e-9)  # at full rank nothing is lost
    assert (bare(x) - original(x)).abs().max() > 1e-3
    with adapters_disabled(model):
        close(model(x), restored(model)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loftq_keeps_the_dtype_of_its_layer(dtype):
    model = tiny().to(dtype)
    qlora.inject_loftq(model, QV, r=2, steps=1)
    lora = model.blocks[0].attention.q_proj
    assert {lora.lora_A.dtype, lora.lora_B.dtype, lora.base.weight.dtype} == {dtype}
    assert model(torch.randn(2, 16, dtype=dtype)).dtype == dtype


STARTS = {
    "qlora": lambda m: (quantize_layers(m, QV), inject.inject_lora(m, QV, r=3, dropout=0.1)),
    "loftq": lambda m: qlora.inject_loftq(m, QV, r=3, dropout=0.1),
}


@pytest.mark.parametrize("start", STARTS)
def test_what_was_trained_on_a_quantised_base_comes_back_to_this_base_alone(start, tmp_path):
    original, x, path = tiny().eval(), torch.randn(5, 16), tmp_path / "adapter.safetensors"
    model, fresh, other = (copy.deepcopy(original) for _ in range(3))
    STARTS[start](model)
    stirred(model)
    save_trainable(model, path)
    STARTS[start](fresh)
    load_trainable(fresh, path)
    assert torch.equal(fresh(x), model(x))
    quantize_layers(other, QV, code="int4")
    inject.inject_lora(other, QV, r=3)
    with pytest.raises(ValueError, match="belongs to another base"):
        load_trainable(other, path)
    inject.inject_lora(original, QV, r=3)  # in full precision
    with pytest.raises(ValueError, match="belongs to another base"):
        load_trainable(original, path)


@pytest.mark.parametrize("start", STARTS)
def test_peft_computes_the_same_on_the_restored_base(start, tmp_path):
    model, x = tiny().eval(), torch.randn(5, 16)
    STARTS[start](model)
    stirred(model)
    expected, base = model(x).detach(), copy.deepcopy(model)
    for name, adapter in adapters(base).items():
        base.set_submodule(name, adapter.base)  # quantised, without adapters
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(restored(base), tmp_path).eval()
    close(theirs(x).detach(), expected)
    load_peft(base, tmp_path)
    assert torch.equal(base(x), expected) and isinstance(
        base.blocks[0].attention.q_proj.base, QuantizedLinear
    )


def adapted():
    model = tiny()
    inject.inject_lora(model, QV, r=2)
    return model


def quantised():
    model = tiny()
    quantize_layers(model, LINEAR)
    return model


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "lm_head": nn.Linear(4, 7, bias=False)})
    model.lm_head.weight = model.embed.weight
    return model


def shared():
    layer = nn.Linear(4, 4)
    return nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})


def broken():
    model = tiny()
    model.blocks[1].feed_forward.fc1.weight.data[3, 4] = float("nan")
    return model


LAYERS = {
    "quantize": quantize_layers,
    "loftq": lambda m, t, **k: qlora.inject_loftq(m, t, r=2, **k),
}
Q = "'blocks.0.attention.q_proj'"
REFUSED = [
    (tiny, ["fc3"], {}, "no layer is called 'fc3'; among its layers are ['project', 'norm1', 'q_p"),
    (tiny, ["fc1", "norm"], {}, "'norm': a LayerNorm is neither torch's Linear nor"),
    (tiny, ["attention"], {}, "attention': a Attention is neither torch's Linear nor"),
    (adapted, ["fc1", "q_proj"], {}, f"{Q} has an adapter already, LoRA"),
    (adapted, ["q_proj.base"], {}, f"{Q[:-1]}.base' has an adapter already, LoRA"),
    (quantised, ["q_proj"], {}, f"{Q}: it is quantised already, to nf4"),
    (tied, ["lm_head"], {}, "'lm_head': its weight is tied to another layer's"),
    (shared, ["a.0"], {}, "['a.0', 'b.0'] are one layer"),
    (broken, ["fc1"], {}, "'blocks.1.feed_forward.fc1': a weight is NaN, infinite or beyond"),
    (tiny, ["q_proj"], {"code": "fp4"}, f'{Q}: code=\'fp4\' must be "nf4" or "int4"'),
    (tiny, ["q_proj"], {"block_size": 7}, f"{Q}: block_size=7 must be an even integer, 2 or mor"),
    (tiny, ["q_proj"], {"block_size": 0}, f"{Q}: block_size=0 must be an even integer, 2 or mor"),
    (tiny, ["q_proj"], {"block_size": 8.0}, f"{Q}: block_size=8.0 must be an even integer"),
]


@pytest.mark.parametrize("function", LAYERS)
@pytest.mark.parametrize("make, targets, options, told", REFUSED)
def test_a_refusal_names_the_offender_and_changes_nothing(make, targets, options, told, function):
    model = make()
    before = [(n, id(m)) for n, m in model.named_modules()]
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(ValueError, match=re.escape(told)) as refusal:
        LAYERS[function](model, targets, **options)
    assert "\n" not in str(refusal.value)
    assert [(n, id(m)) for n, m in model.named_modules()] == before
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags


@pytest.mark.parametrize(
    "call, told",
    [
        (
            lambda: quantize(torch.tensor([1.0, float("inf")])),
            "a weight is NaN, infinite or beyond",
        ),
        (lambda: quantize(torch.tensor([1.0, 1e300])), "a weight is NaN, infinite or beyond"),
        (lambda: quantize(torch.ones(3, 0)), "of shape (3, 0) has no weights to quantise"),
        (lambda: quantize(torch.arange(8)), "a torch.int64 tensor of shape (8,) has no weights"),
        (lambda: loftq(torch.ones(4, 6), 5), "rank r=5 must be an integer from 1 to 4"),
        (lambda: loftq(torch.ones(4, 6), 1.5), "rank r=1.5 must be an integer from 1 to 4"),
        (lambda: loftq(torch.ones(4, 6), 2, steps=0), "steps=0 must be an integer, 1 or more"),
        (
            lambda: qlora.inject_loftq(tiny(), QV, r=17),
            "rank r=17 must be an integer from 1 to 16",
        ),
        (lambda: inject.inject_lora(quantised(), QV, r=17), "rank r=17 must be an integer from 1"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        call()


def test_a_quantised_layer_without_bias_is_still_listed():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    quantize_layers(model, ["0"])
    with pytest.raises(ValueError, match=re.escape("among its layers are ['0']")):
        inject.inject_lora(model, ["fc"])
    inject.inject_adapter(model, ["0"], reduction_factor=2)  # its dtype is found without one
    assert model[0].up_bias.dtype == torch.float64
