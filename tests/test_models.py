"""Models: sizes, stages from bottom to top, fresh heads, and projections that are really called."""

import pytest
import torch
from torch import nn

from helpers.models import (
    MLP,
    Attention,
    Encoder,
    TextClassifier,
    stages,
    with_fresh_head,
)
from helpers.study import reproducible
from tests.small import TinyTransformer

SMALL = {"d": 4, "n_heads": 2, "n_layers": 1, "d_ff": 5, "n_classes": 2}
BLOCKS = ["embed", "blocks.0", "blocks.1"]
STAGES = {
    "MLP": (MLP, ["backbone.0", "backbone.2", "backbone.4", "head"]),
    "TinyTransformer": (TinyTransformer, [*BLOCKS, "norm", "head"]),
    "Encoder": (lambda: encoder(), BLOCKS),
    "TextClassifier": (
        lambda: TextClassifier(encoder(), 3),
        [*(f"encoder.{name}" for name in BLOCKS), "head"],
    ),
}


def encoder():
    return Encoder(vocab=9, d=4, n_layers=2, n_heads=2, d_ff=5, positions=6)


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


@pytest.mark.parametrize(
    "make, width, total",
    [
        (MLP, 20, 7_716),
        (lambda: MLP(7, hidden=5, n_features=3, n_classes=2), 7, 8 * 5 + 6 * 5 + 6 * 3 + 4 * 2),
        (TinyTransformer, 64, 18_026),
        (lambda: TinyTransformer(3, 2, **SMALL), 6, 12 + 12 + (4 * 20 + 16 + 25 + 24) + 8 + 10),
    ],
)
def test_shapes_and_counts_match_closed_form(make, width, total):
    model = make()
    assert model(torch.ones(5, width)).shape == (5, model.head.out_features)
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("make, names", STAGES.values(), ids=STAGES)
def test_stages_run_bottom_to_top_and_hold_each_parameter_once(make, names):
    model = make()
    parts = stages(model)
    assert list(parts) == names
    assert all(model.get_submodule(name) is part for name, part in parts.items())
    held = [p for part in parts.values() for p in part.parameters()]
    assert list(map(id, held)) == list(map(id, model.parameters()))
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="'scale' belongs to no stage"):
        stages(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_classes, outputs", [(None, 4), (7, 7)])
def test_a_fresh_head_leaves_the_original_alone_and_keeps_its_dtype(n_classes, outputs, dtype):
    model = MLP().to(dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fresh = with_fresh_head(model, n_classes)
    same = [name for name, t in fresh.state_dict().items() if torch.equal(t, before[name])]
    assert same == [name for name in before if name.startswith("backbone")]
    assert fresh.head.weight.shape == (outputs, 32)
    assert {p.dtype for p in fresh.parameters()} == {dtype}
    for p in fresh.parameters():
        p.data.zero_()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("n_prefix", [0, 3])
def test_attention_equals_torchs_own(n_prefix):
    own, reference = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    projections = [own.q_proj, own.k_proj, own.v_proj]
    reference.in_proj_weight.data = torch.cat([p.weight for p in projections])
    reference.in_proj_bias.data = torch.cat([p.bias for p in projections])
    reference.out_proj.load_state_dict(own.out_proj.state_dict())
    x, earlier = torch.randn(4, 5, 12), torch.randn(4, n_prefix, 12)
    prefix = [p(earlier).view(4, n_prefix, 3, 4).transpose(1, 2) for p in projections[1:]]
    seen = torch.cat([earlier, x], 1)
    expected, _ = reference(x, seen, seen, need_weights=False)
    torch.testing.assert_close(own(x, prefix if n_prefix else None), expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="d=12 is not a multiple of n_heads=5"):
        Attention(12, 5)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
def test_a_replaced_projection_is_called(name):
    model, x = TinyTransformer(), torch.rand(3, 64)
    before = model(x)
    for block in model.blocks:
        owner = block.feed_forward if name.startswith("fc") else block.attention
        layer = getattr(owner, name)
        setattr(owner, name, nn.Sequential(layer, nn.Hardtanh(-0.1, 0.1)))
        assert (model(x) - before).abs().max() > 1e-6
        setattr(owner, name, layer)


def test_each_row_of_a_digit_becomes_one_token():
    model, x = TinyTransformer(), torch.rand(1, 64)
    changed = x.clone()
    changed[0, 24:32] = 0
    moved = (model.embed(changed) - model.embed(x)).abs().amax((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [3]
