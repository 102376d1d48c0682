"""Layers: each technique against its equation, written out on the base's weight and bias."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from helpers.models import Attention, FeedForward
from helpers.peft import OFT, DoRA, LoRA, VeRA, add_low_rank, inject_vera, layers, lora, product
from helpers.study import reproducible
from tests.small import PatchEmbedding

D_IN, D_OUT, S = 6, 4, 5 / 3  # with r=3 and lora_alpha=5


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def stirred(layer):
    """Away from the start, where most techniques do nothing."""
    with torch.no_grad():
        for p in layer.parameters():
            p += p.requires_grad * 0.5 * torch.randn_like(p)
    return layer


def trainable(layer):
    return [name for name, p in layer.named_parameters() if p.requires_grad]


def linear(**options):
    return nn.Linear(D_IN, D_OUT, **options)


def conv1d():
    base = Conv1D(D_OUT, D_IN)
    nn.init.normal_(base.bias)
    return base


def projection():
    return lora.Projection(torch.randn(5, D_IN + 2), torch.randn(D_OUT + 3, 5))


def read(base):
    """W of shape (out, in), which GPT-2's Conv1D holds transposed, and b."""
    W = base.weight.T if isinstance(base, Conv1D) else base.weight
    return W, torch.zeros(D_OUT) if base.bias is None else base.bias


def pissa(m, W, b):
    U, sigma, Vh = torch.linalg.svd(W)
    residual = W - U[:, :3] * sigma[:3] @ Vh[:3]  # the paper's frozen weight
    return residual + S * m.lora_B @ m.lora_A, b


def dora(m, W, b):
    V = W + S * m.lora_B @ m.lora_A
    norm = V.square().sum(1, keepdim=True).sqrt().detach()  # section 4.3: a constant
    return m.magnitude[:, None] * V / norm, b


def vera(m, W, b):  # a layer smaller than the shared matrices takes their corner
    A, B = m.projection.A[:, :D_IN], m.projection.B[:D_OUT]
    return W + m.lambda_b.diag() @ B @ m.lambda_d.diag() @ A, b


def oft(m, W, b):
    blocks, eye = [], torch.eye(3)
    for angles in m.oft_R:
        Q = torch.zeros(3, 3)
        for angle, (i, j) in zip(angles, [(0, 1), (0, 2), (1, 2)], strict=True):
            Q = Q + angle * (eye[i].outer(eye[j]) - eye[j].outer(eye[i]))
        blocks.append((eye + Q) @ torch.linalg.inv(eye - Q))  # Cayley
    return W @ torch.block_diag(*blocks), b


# the layer, and the weight and bias that it makes of W and b
EQUATIONS = {
    "PiSSA": (lambda base: LoRA(base, 3, 5, init="pissa"), pissa),
    "DoRA": (lambda base: DoRA(base, 3, 5), dora),
    "VeRA": (lambda base: VeRA(base, projection()), vera),
    "IA3": (layers.IA3, lambda m, W, b: (m.ia3_l.diag() @ W, m.ia3_l * b)),
    "IA3 of inputs": (
        lambda base: layers.IA3(base, feedforward=True),
        lambda m, W, b: (W @ m.ia3_l.diag(), b),
    ),
    "OFT": (lambda base: OFT(base, 3), oft),
}
for r in (1, 2, 4):
    for rslora, s in ((False, 16 / r), (True, 16 / math.sqrt(r))):
        EQUATIONS[f"LoRA, {r=}, {rslora=}"] = (
            lambda base, r=r, rslora=rslora: LoRA(base, r, 16, rslora=rslora),
            lambda m, W, b, s=s: (W + s * m.lora_B @ m.lora_A, b),
        )


@pytest.mark.parametrize("make", [linear, lambda: linear(bias=False), conv1d])
@pytest.mark.parametrize("make_layer, equation", EQUATIONS.values(), ids=EQUATIONS)
def test_outputs_gradients_and_merged_weight_follow_the_equation(make_layer, equation, make):
    base, x = make(), torch.randn(2, 7, D_IN).requires_grad_()
    layer = stirred(make_layer(base))
    before = read(base)[0].clone()
    W, b = equation(layer, *read(base))
    results, direction = [], torch.randn(2, 7, D_OUT)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for y in (layer(x), x @ W.T + b):
        results.append([y, *grad(y, inputs, direction, retain_graph=True)])
    for ours, told in zip(*results, strict=True):
        close(ours, told)
    if hasattr(layer, "delta_weight") and not isinstance(layer, DoRA):
        close(layer.delta_weight(), W - before)
    merged = layer.merged()
    assert merged is base and merged.weight.is_contiguous()
    assert not trainable(merged)
    for ours, told in zip(read(merged), (W, b), strict=True):
        close(ours, told.detach())


def vera_of_one(generator):
    model = nn.Sequential(nn.Linear(400, 300))
    inject_vera(model, ["0"], r=50, generator=generator)
    return model[0].projection


def adapter(parallel):
    make = layers.BottleneckAdapter
    return lambda g: make(nn.Linear(900, 400), 8, parallel=parallel, generator=g).down_weight


@pytest.mark.parametrize(
    "draw, shape, bound",
    [
        (lambda g: LoRA(nn.Linear(400, 300), 50, 1, generator=g).lora_A, (50, 400), 1 / 20),
        (lambda g: DoRA(nn.Linear(400, 300), 50, 1, generator=g).lora_A, (50, 400), 1 / 20),
        (lambda g: vera_of_one(g).A, (50, 400), (6 / 400) ** 0.5),
        (lambda g: vera_of_one(g).B, (300, 50), (6 / 50) ** 0.5),
        (adapter(False), (50, 400), 1 / 20),
        (adapter(True), (112, 900), 1 / 30),
        (lambda g: layers.PromptTuning(nn.Embedding(9, 99), 99, generator=g).prompt, (99, 99), 0),
        (lambda g: layers.PrefixTuning(Attention(99, 3), 50).prefix, (2, 3, 50, 33), 0),
    ],
)
def test_random_starts_have_the_stated_spread(draw, shape, bound):
    start, sd = draw(torch.Generator().manual_seed(0)).detach(), bound / 3**0.5 or 0.02
    assert start.shape == shape and abs(start.mean()) < 4 * sd / start.numel() ** 0.5
    assert start.std().item() == pytest.approx(sd, rel=0.03)
    low, high = (0.999 * bound, bound) if bound else (3 * sd, 6 * sd)  # uniform or normal
    assert low < start.abs().max() <= high


def test_the_rest_starts_where_it_changes_nothing():
    base, shared = linear(), projection()
    lora, vera, bottleneck = DoRA(base, 3, 5), VeRA(base, shared), layers.BottleneckAdapter(base, 2)
    zeros = [lora.lora_B, vera.lambda_b, OFT(base, 3).oft_R]
    zeros += [bottleneck.down_bias, bottleneck.up_weight, bottleneck.up_bias]
    ones = [layers.IA3(base).ia3_l, lora.magnitude / base.weight.norm(dim=1)]
    ones += [vera.lambda_d / 0.1, VeRA(base, shared, d_initial=0.3).lambda_d / 0.3]
    for value, starts in enumerate((zeros, ones)):
        for start in starts:
            close(start.detach(), torch.full(start.shape, float(value)))


def test_dora_is_identity_at_init_on_a_row_of_zeros():
    base, x = linear(), torch.randn(3, D_IN)
    base.weight.data[0] = 0
    close(DoRA(base, 3, 5)(x), base(x))


@pytest.mark.parametrize("b", [2, 4, 8])
def test_oft_rotates_block_by_block_and_keeps_the_norm_of_each_row(b):
    layer = stirred(OFT(nn.Linear(8, D_OUT), b))
    W, R = layer.base.weight.clone(), torch.block_diag(*layer.rotations())
    assert layer.rotations().shape == (8 // b, b, b) and (R - torch.eye(8)).abs().max() > 0.1
    close(R @ R.T, torch.eye(8))
    close(torch.linalg.det(R), torch.tensor(1.0))
    close(layer.merged().weight, (W @ R).detach())
    close((W @ R).norm(dim=1), W.norm(dim=1))


def test_pissa_starts_at_the_best_approximation_of_rank_r_and_its_delta_at_zero():
    base = linear()
    layer, sigma = LoRA(base, 3, 5, init="pissa"), torch.linalg.svdvals(base.weight)
    top = layer.scaling * layer.start_B @ layer.start_A
    close(torch.linalg.svdvals(top), torch.cat([sigma[:3], torch.zeros(1)]))
    close(torch.linalg.svdvals(base.weight - top)[:1], sigma[3:])  # Eckart and Young
    close(layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B)  # each takes the root
    assert not layer.delta_weight().any()
    stirred(layer)
    close(top, layer.scaling * layer.start_B @ layer.start_A)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6), lambda: FeedForward(8, 5)])
def test_bottleneck_follows_the_equation(make, parallel):
    base, x = make(), torch.randn(2, 7, 8)
    layer = stirred(layers.BottleneckAdapter(base, 2.5, parallel=parallel, scale=4.0))
    f, D, U = base(x), layer.down_weight, layer.up_weight
    inner, s = (x, 4) if parallel else (f, 1)
    assert D.shape == (inner.shape[-1] * 2 // 5, inner.shape[-1])
    close(layer(x), f + s * ((inner @ D.T + layer.down_bias).clamp(0) @ U.T + layer.up_bias))


def test_bottleneck_hands_arguments_on_and_refuses_a_base_that_returns_a_tuple():
    base, x, prefix = Attention(8, 2), torch.randn(2, 7, 8), torch.randn(2, 2, 2, 3, 4)
    close(layers.BottleneckAdapter(base, 2)(x, prefix=prefix), base(x, prefix))
    layer = layers.BottleneckAdapter(nn.MultiheadAttention(8, 2), 2)
    with pytest.raises(TypeError, match="MultiheadAttention returns a tuple, not a tensor"):
        layer(x, x, x)


@pytest.mark.parametrize("make", [lambda: nn.Embedding(9, 6), lambda: PatchEmbedding(3, 1, 6)])
def test_prompt_is_put_before_each_sequence(make):
    base, x = make(), torch.tensor([[1, 2, 8], [0, 1, 1]])
    layer, x = layers.PromptTuning(base, 4), x if isinstance(base, nn.Embedding) else x.double()
    assert torch.equal(layer(x), torch.stack([torch.cat([layer.prompt, t]) for t in base(x)]))


def test_prefix_is_attended_to_like_keys_and_values_before_the_others():
    base, x = Attention(6, 2), torch.randn(5, 6)
    layer, heads = layers.PrefixTuning(base, 4, std=1.0), []
    for h in range(2):
        q, k, v = (project(x).view(5, 2, 3)[:, h] for project in list(base.children())[:3])
        K, V = (torch.cat([p[h], own]) for p, own in zip(layer.prefix, (k, v), strict=True))
        heads.append(torch.softmax(q @ K.T / 3**0.5, -1) @ V)
    expected = base.out_proj(torch.cat(heads, -1))
    close(layer(x.expand(2, 5, 6)), expected.expand(2, 5, 6))


@pytest.mark.parametrize(
    "make, names", [(linear, ["bias"]), (lambda: nn.LayerNorm(6), ["weight", "bias"])]
)
def test_tuned_computes_the_base_with_trained_copies(make, names):
    base, other, x = make(), make(), torch.randn(3, 6)
    before = {n: t.clone() for n, t in base.state_dict().items()}
    layer = stirred(layers.Tuned(base, names))
    other.load_state_dict(before | {n: getattr(layer, f"tuned_{n}") for n in names})
    assert trainable(layer) == [f"tuned_{n}" for n in names]
    close(layer(x), other(x))
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items())
    merged = layer.merged()
    assert list(merged.state_dict()) == list(before) and not trainable(merged)
    close(merged(x), other(x).detach())
    stirred(layer)  # no longer shared
    close(merged(x), other(x).detach())


def test_an_adapter_shows_its_base_and_its_settings_and_can_be_switched_off():
    base, x = linear().eval(), torch.randn(3, D_IN)
    layer = stirred(LoRA(base, 3, 5, dropout=0.5))
    assert not layer.training and (layer.in_features, layer.bias) == (D_IN, base.bias)
    assert layer.extra_repr() == "r=3, lora_alpha=5.0, rslora=False, dropout=0.5, init=lora"
    assert (layer(x) - base(x)).abs().max() > 0.1
    layer.enabled = False
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("shape", [(), (7,), (2, 5)])
def test_add_low_rank_passes_gradcheck(shape):
    sizes = ((*shape, 4), (*shape, 6), (3, 6), (4, 3))
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]
    assert gradcheck(lambda y, *rest: product.AddLowRank.apply(y.clone(), *rest, 1.7), inputs)


@pytest.mark.parametrize("needed", ["yxAB", "yAB", "xAB", "AB", "x", "A", "B", "y"])
@pytest.mark.parametrize("step", [1, 2])  # 2: x is not contiguous
@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (0,)])
def test_add_low_rank_equals_the_plain_equation(shape, step, needed):
    x, A, B = torch.randn(*shape, 6 * step)[..., ::step], torch.randn(3, 6), torch.randn(4, 3)
    y, direction = torch.randn(*shape, 4), torch.randn(4, *shape).movedim(0, -1)
    inputs = [dict(y=y, x=x, A=A, B=B)[name].requires_grad_() for name in needed]
    results, start = [], y.clone()
    for out in (add_low_rank(start, x, A, B, 1.7), y + 1.7 * x @ A.T @ B.T):
        results.append([out, *grad(out, inputs, direction)])
    assert results[0][0] is start  # no second tensor of that size
    for ours, told in zip(*results, strict=True):
        close(ours, told)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("layer", [LoRA, DoRA])
@pytest.mark.parametrize("bias", [True, False])
def test_dropout_acts_on_the_input_of_a_alone_in_train_mode(layer, train, bias):
    layer = stirred(layer(linear(bias=bias), 3, 5, dropout=0.4)).train(train)
    x, (W, b) = torch.randn(9, 50, D_IN).transpose(0, 1), read(layer.base)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    V = x @ W.T + S * F.dropout(x, 0.4, train) @ layer.lora_A.T @ layer.lora_B.T
    expected = b + V * (layer.magnitude / layer.row_norms() if type(layer) is DoRA else 1)
    close(y, expected)
    of_y, told = (grad(out.sin().sum(), [layer.lora_A, layer.lora_B]) for out in (y, expected))
    close(of_y, told)


def test_autocast_takes_the_plain_equation_and_its_dtype():
    layer, x = stirred(LoRA(linear(), 3, 5)).float(), torch.randn(7, D_IN).float()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert (expected.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.05)
    y.sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32 and layer.lora_A.grad.any()


def test_mixed_dtypes_take_the_plain_equation():
    y, (x, A, B) = torch.randn(7, 4), (torch.randn(s).float() for s in ((7, 6), (3, 6), (4, 3)))
    close(add_low_rank(y, x, A, B, 1.7), y + 1.7 * F.linear(F.linear(x, A), B))
    with torch.autocast("cpu", torch.bfloat16):
        y = y.float()
        close(add_low_rank(y, x, A, B, 1.7), y + 1.7 * F.linear(F.linear(x, A), B))
