"""Injection: one suite of properties for every technique, and refusals that change nothing."""

import copy
import re

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.utils import prune
from torch.optim import AdamW

from helpers.peft import adapters, adapters_disabled, inject, merge, surgery
from helpers.study import reproducible
from helpers.training import count_parameters, freeze, predict, train, unfreeze
from tests.small import TinyTransformer

PATCH, D, FF, LAYERS = 4, 8, 12, 2
QV, KV, NORMS = ["q_proj", "v_proj"], ["k_proj", "v_proj"], ["norm1", "norm2", "norm"]
LINEARS = ["project", "q_proj", *KV, "out_proj", "fc1", "fc2"]
NARROW = {"reduction_factor": 4}
PARALLEL = NARROW | {"parallel": True, "scale": 4.0}


def drawn(function, targets, **options):
    return lambda model, generator: function(model, targets, generator=generator, **options)


def fixed(function, targets, **options):
    return lambda model, generator: function(model, targets, **options)


METHODS = {
    "LoRA": drawn(inject.inject_lora, QV, r=3),
    "LoRA on all linears": drawn(inject.inject_lora, LINEARS, r=3),
    "rsLoRA": drawn(inject.inject_lora, QV, r=3, rslora=True),
    "LoRA with dropout": drawn(inject.inject_lora, QV, r=3, dropout=0.5),
    "PiSSA": drawn(inject.inject_lora, QV, r=3, init="pissa"),
    "DoRA": drawn(inject.inject_dora, ["q_proj", "fc2"], r=3, dropout=0.5),
    "VeRA": drawn(inject.inject_vera, ["q_proj", "fc1"], r=16),
    "(IA)3": fixed(inject.inject_ia3, KV, feedforward=["fc2"]),
    "OFT": fixed(inject.inject_oft, ["q_proj", "fc2"], block_size=4),
    "Houlsby": drawn(inject.inject_adapter, ["out_proj", "fc2"], **NARROW),
    "Pfeiffer": drawn(inject.inject_adapter, ["fc2"], **NARROW),
    "parallel": drawn(inject.inject_adapter, ["feed_forward"], **PARALLEL),
    "prompt": drawn(inject.inject_prompt, ["embed"], num_virtual_tokens=3),
    "prefix": drawn(inject.inject_prefix, ["attention"], num_virtual_tokens=3),
    "BitFit": fixed(inject.inject_bitfit, LINEARS + NORMS),
    "LayerNorm": fixed(inject.inject_layer_norm, None),
}
LORA, BOTTLENECK = LAYERS * 2 * 3 * (D + D), D * (D // 4) * 2 + D // 4 + D
# the ends of the adapted layers' names, and how many numbers are trained
EXPECTED = {
    "LoRA": (QV, LORA),
    "LoRA on all linears": (LINEARS, 3 * (PATCH + D + LAYERS * (4 * (D + D) + 2 * (D + FF)))),
    "rsLoRA": (QV, LORA),
    "LoRA with dropout": (QV, LORA),
    "PiSSA": (QV, LORA),
    "DoRA": (["q_proj", "fc2"], LAYERS * (3 * (D + D) + D + 3 * (FF + D) + D)),
    "VeRA": (["q_proj", "fc1"], LAYERS * ((16 + D) + (16 + FF))),
    "(IA)3": ([*KV, "fc2"], LAYERS * (D + D + FF)),
    "OFT": (["q_proj", "fc2"], LAYERS * (D // 4 + FF // 4) * (4 * 3 // 2)),
    "Houlsby": (["out_proj", "fc2"], LAYERS * 2 * BOTTLENECK),
    "Pfeiffer": (["fc2"], LAYERS * BOTTLENECK),
    "parallel": (["feed_forward"], LAYERS * BOTTLENECK),
    "prompt": (["embed"], 3 * D),
    "prefix": (["attention"], LAYERS * 2 * 3 * D),
    "BitFit": (LINEARS + NORMS, D + LAYERS * (5 * D + FF + 2 * D) + D),
    "LayerNorm": (NORMS, (LAYERS * 2 + 1) * 2 * D),
}
NOT_MERGEABLE = ["Houlsby", "Pfeiffer", "parallel", "prompt", "prefix"]
WITHOUT_DRAWS = ["PiSSA", "(IA)3", "OFT", "BitFit", "LayerNorm"]
each = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


def tiny():
    model = TinyTransformer(4, PATCH, d=D, n_heads=2, n_layers=LAYERS, d_ff=FF, n_classes=3)
    freeze(model)
    return model


def rows(n=20):
    return torch.randn(n, 4 * PATCH), torch.arange(n) % 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stirred(model):
    """Away from the start, where most techniques do nothing."""
    with torch.no_grad():
        for p in model.parameters():
            p += p.requires_grad * 0.3 * torch.randn_like(p)
    return model


def adapted(*methods):
    model = tiny()
    for method in methods:
        METHODS[method](model, seeded())
    return model


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def held(model):
    """Return copies of parameters and buffers by name."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: t.detach().clone() for name, t in named}


def moved(model, before):
    return {name for name, t in held(model).items() if not torch.equal(t, before[name])}


def contents(model):
    """All that a refusal leaves alone."""
    state = model.state_dict(keep_vars=True).items()
    tensors = [(n, t.tolist(), t.requires_grad, t.grad is None) for n, t in state]
    return tensors, [(n, type(m), getattr(m, "enabled", 0)) for n, m in model.named_modules()]


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@each
def test_injection_is_identity_at_init(method):
    model, (x, _) = tiny(), rows()
    before = model(x)
    METHODS[method](model, seeded())
    after = model(x)
    close(after, before, atol={"prompt": 1, "prefix": 1, "PiSSA": 1e-12}.get(method, 0))
    assert method not in ("prompt", "prefix") or (after - before).abs().max() > 1e-6


@each
def test_only_trainable_parameters_move(method):
    model = adapted(method)
    unfreeze(model.head)
    before = held(model)
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, *rows(), optimizer=optimizer, epochs=5)
    assert moved(model, before) == trainable(model) > {"head.weight", "head.bias"}


@each
def test_frozen_parameters_get_no_gradient_and_cost_no_optimizer_state(method):
    model, (x, _) = stirred(adapted(method)), rows()
    optimizer = AdamW(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    for p in model.parameters():
        assert (p.grad is not None) == (p in optimizer.state) == p.requires_grad


@each
def test_count_matches_closed_form(method):
    trained, total = EXPECTED[method][1], count_parameters(tiny()).total
    added = 0 if method in ("BitFit", "LayerNorm") else trained  # they train what is there
    assert count_parameters(adapted(method)) == (trained, total + added)


@each
def test_adapted_layers_are_returned_in_the_order_of_the_model_and_keep_its_mode(method):
    model = tiny().eval()
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in EXPECTED[method][0]]
    assert METHODS[method](model, seeded()) == list(adapters(model)) == names
    assert not any(module.training for module in adapters(model).values())


@each
def test_merge_preserves_outputs_and_state_dict_keys(method):
    plain, model, (x, _) = tiny(), stirred(adapted(method)), rows()
    names, before, expected = list(adapters(model)), contents(model), predict(model, x)
    if method in NOT_MERGEABLE:
        with pytest.raises(ValueError, match=f"^'{names[0]}' is a .*: it has no equal plain layer"):
            merge(model)
        assert contents(model) == before
        return
    drops = method in ("LoRA with dropout", "DoRA")
    assert torch.allclose(model(x), expected) != drops
    assert merge(model) == names and model.training  # dropout has no part in it, in train mode too
    close(model(x), expected)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert count_parameters(model) == (0, count_parameters(plain).total)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in NOT_MERGEABLE])
def test_merge_twice_is_a_noop(method):
    model = stirred(adapted(method))
    merge(model)
    before = contents(model)
    assert merge(model) == [] and contents(model) == before


@each
def test_disable_restores_the_base_exactly_and_reenables_the_previous_state(method):
    model, (x, _) = tiny(), rows()
    base = predict(model, x)
    METHODS[method](model, seeded())
    first, *others = adapters(stirred(model)).values()
    for enabled in (True, False):
        first.enabled = enabled
        changed = predict(model, x)
        assert torch.equal(changed, base) == (not enabled and not others)
        with pytest.raises(ZeroDivisionError), adapters_disabled(model):
            with adapters_disabled(model):
                assert torch.equal(predict(model, x), base)
            assert torch.equal(predict(model, x), base)
            raise ZeroDivisionError
        assert first.enabled == enabled and all(other.enabled for other in others)
        assert torch.equal(predict(model, x), changed)


PLACES = [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")]
PLACES += [(torch.float32, "cpu"), *[(torch.float32, "cuda")] * torch.cuda.is_available()]


@each
@pytest.mark.parametrize("dtype, device", PLACES, ids=str)
def test_new_parameters_have_the_dtype_and_device_of_the_base(method, dtype, device):
    model, (x, _) = tiny().to(dtype).to(device), rows()
    METHODS[method](model, generator := seeded())
    tensors = [*model.parameters(), *model.buffers()]
    own = trainable(model)
    if dtype == torch.bfloat16:  # whose steps an optimiser would lose: float32 on it
        assert {p.dtype for n, p in model.named_parameters() if n in own} == {torch.float32}
        tensors = [t for n, t in model.state_dict().items() if n in dict(tiny().state_dict())]
    if device == "meta":
        assert torch.equal(generator.get_state(), seeded().get_state())  # nothing to draw
    else:
        tensors.append(model(x.to(dtype).to(device)))
    assert {(t.dtype, t.device.type) for t in tensors} == {(dtype, device)}


@each
def test_a_seed_repeats_and_a_generator_leaves_the_global_stream_alone(method):
    start, made = tiny(), []
    for generator in (seeded(5), seeded(5), None, seeded(6)):
        torch.manual_seed(5)
        model, stream = copy.deepcopy(start), torch.get_rng_state()
        METHODS[method](model, generator)
        untouched = torch.equal(torch.get_rng_state(), stream)
        assert untouched == (generator is not None or method in WITHOUT_DRAWS)
        made.append(contents(model))
    assert made[0] == made[1] == made[2]
    assert (made[0] == made[3]) == (method in WITHOUT_DRAWS)


@each
def test_a_deep_copy_is_equal_and_independent(method):
    model, (x, _) = stirred(adapted(method)), rows()
    twin, before = copy.deepcopy(model), contents(model)
    assert contents(twin) == before and torch.equal(predict(twin, x), predict(model, x))
    stirred(twin)
    assert contents(model) == before != contents(twin)
    if method == "VeRA":  # one projection for all layers, in the copy as well
        kept = {id(a.projection) for a in adapters(model).values()}
        assert len(kept) == 1 == len({id(a.projection) for a in adapters(twin).values()} - kept)


def test_no_graph_is_built_below_the_lowest_trainable_parameter():
    model, graph = tiny(), set()
    inject.inject_lora(model, ["blocks.1.attention.q_proj"], r=2)
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, i, out, n=name: graph.update([n] if out.grad_fn else [])
        )
    model(rows()[0])
    above = ["attention.q_proj", "attention.out_proj", "attention", "norm2"]
    above += ["feed_forward.fc1", "feed_forward.fc2", "feed_forward"]
    assert graph == {f"blocks.1.{n}" for n in above} | {"blocks.1", "norm", "head", ""}


@pytest.mark.parametrize(
    "targets, names",
    [
        (["attention.q_proj"], ["blocks.0.attention.q_proj", "blocks.1.attention.q_proj"]),
        (["blocks.1.attention.q_proj"], ["blocks.1.attention.q_proj"]),
        (["fc2", "0.feed_forward.fc2"], ["blocks.0.feed_forward.fc2", "blocks.1.feed_forward.fc2"]),
        (["head", "project"], ["embed.project", "head"]),
    ],
)
def test_targets_match_at_dots_only(targets, names):
    assert inject.inject_lora(tiny(), targets, r=1) == names


@pytest.mark.parametrize(
    "function, target, options",
    [
        ("lora", "fc1", {"r": 2, "lora_alpha": 5, "rslora": True, "dropout": 0.5, "init": "pissa"}),
        ("dora", "fc1", {"r": 2, "lora_alpha": 5, "rslora": True, "dropout": 0.5}),
        ("vera", "fc1", {"r": 5, "d_initial": 0.3}),
        ("oft", "fc1", {"block_size": 2}),
        ("adapter", "fc1", {"reduction_factor": 4, "parallel": True, "scale": 3.0}),
        ("prompt", "embed", {"num_virtual_tokens": 2, "std": 9.0}),
        ("prefix", "attention", {"num_virtual_tokens": 2, "std": 9.0}),
    ],
)
def test_options_reach_the_layer(function, target, options):
    model = tiny()
    name, *_ = by(function, target, **options)(model)
    layer = adapters(model)[name]
    assert layer.settings.items() >= {n: v for n, v in options.items() if n != "std"}.items()
    assert "std" not in options or next(layer.parameters()).abs().max() > 1


def test_bitfit_takes_all_biases_and_layer_norm_all_norms_that_are_not_adapted():
    model = tiny()
    biases = [name[:-5] for name in model.state_dict() if name.endswith(".bias")]
    taken = inject.inject_lora(model, QV, r=2)
    assert inject.inject_bitfit(model) == [name for name in biases if name not in taken]
    norms = nn.Sequential(nn.RMSNorm(4), nn.LayerNorm(4, bias=False), nn.BatchNorm1d(4))
    assert inject.inject_layer_norm(norms) == ["0", "1"]


@pytest.mark.parametrize(
    "pair",
    [
        ("prefix", "parallel"),
        ("VeRA", "LayerNorm"),
        ("prefix", "LoRA"),
        ("LoRA", "prefix"),
    ],
    ids=", then ".join,
)
def test_two_techniques_work_together(pair):
    model, (x, _) = adapted(*pair), rows()
    assert count_parameters(model).trainable == sum(EXPECTED[method][1] for method in pair)
    before = held(model)
    train(model, *rows(), optimizer=AdamW(model.parameters(), lr=0.01), epochs=5)
    assert moved(model, before) == trainable(model)
    expected = predict(model, x)
    if not set(pair) & set(NOT_MERGEABLE):
        assert len(merge(model)) == 9
        close(predict(model, x), expected)


def shared(*names):
    model, layer = nn.Sequential(nn.Sequential(), nn.Sequential()), nn.Linear(4, 4)
    for name in names:
        model[int(name[0])].add_module(name[2:], layer)
    return model


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "lm_head": nn.Linear(4, 7, bias=False)})
    model.lm_head.weight = model.embed.weight
    inject.inject_lora(model, ["lm_head"], r=2)
    return model


def disabled():
    model = adapted("LoRA")
    adapters(model)["blocks.1.attention.q_proj"].enabled = False
    return model


def headed():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].n_heads = model[0].d_head = 2
    return model


def of_torch():
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12), nn.MultiheadAttention(8, 2))


def lora(*targets, **options):
    return lambda model: inject.inject_lora(model, list(targets), **{"r": 2} | options)


def by(function, *targets, **options):
    return lambda model: getattr(inject, f"inject_{function}")(model, list(targets), **options)


Q, HAS = "'blocks.0.attention.q_proj'", "has an adapter already"
NORM1 = "'blocks.0.norm1': a LayerNorm is neither torch's Linear nor transformers' Conv1D"
BYPASSED = "would be bypassed: torch's {} reads its weight instead of calling it"
NO_LIST = "targets={} must be a list of one or more names"
REFUSED = [
    (tiny, lora("proj"), "no layer is called 'proj'; among its layers are ['project', 'norm1', "),
    (tiny, lora("q_proj", "q_prj"), "no layer is called 'q_prj'"),
    (tiny, lora(""), "no layer is called ''"),
    (tiny, lambda m: inject.inject_lora(m, "q_proj"), NO_LIST.format("'q_proj'")),
    (tiny, lora(), NO_LIST.format([])),
    (tiny, by("bitfit"), NO_LIST.format([])),
    (tiny, by("layer_norm"), NO_LIST.format([])),
    (tiny, lora("q_proj", r=9), f"{Q}: rank r=9 must be an integer from 1 to 8, the smaller side"),
    (tiny, lora("fc1", "head", r=4), "'head': rank r=4 must be an integer from 1 to 3"),
    (tiny, lora("q_proj", r=0), f"{Q}: rank r=0 must be an integer"),
    (tiny, lora("q_proj", r=2.5), f"{Q}: rank r=2.5 must be an integer"),
    (tiny, lora("q_proj", lora_alpha=0), f"{Q}: lora_alpha=0 must be above 0"),
    (tiny, lora("q_proj", init="zero"), f'{Q}: init=\'zero\' must be "lora" or "pissa"'),
    (tiny, lora("q_proj", dropout=1.5), f"{Q}: dropout probability has to be between 0 and 1"),
    (lambda: adapted("LoRA"), lora("fc1", "q_proj"), f"{Q} {HAS}, LoRA"),
    (lambda: adapted("LoRA"), by("oft", "q_proj.base"), f"{Q[:-1]}.base' {HAS}, LoRA"),
    (lambda: adapted("prefix"), by("prefix", "attention"), f"attention' {HAS}, PrefixTuning"),
    (lambda: adapted("LayerNorm"), by("layer_norm", "norm"), f"'norm' {HAS}, Tuned"),
    *((tiny, by(f, "norm1", "fc1"), NORM1) for f in ("lora", "dora", "vera", "ia3", "oft")),
    (tiny, by("ia3", "fc1", feedforward=["norm1"]), NORM1),
    (tiny, by("ia3", "v_proj", "fc2", feedforward=["fc2"]), "fc2' is in targets and in feedforw"),
    (tiny, by("vera", "q_proj", r=0), "rank r=0 must be an integer, 1 or more"),
    (tiny, by("oft", "q_proj", block_size=3), f"{Q}: block_size=3 must divide in_features=8"),
    (tiny, by("oft", "q_proj", block_size=1), f"{Q}: block_size=1 must divide in_features=8: one"),
    (
        tiny,
        by("adapter", "fc1", "fc2", reduction_factor=9),
        "fc2': reduction_factor=9 must be abov",
    ),
    (tiny, by("adapter", "fc1", reduction_factor=-1), "fc1': reduction_factor=-1 must be above 0"),
    (tiny, by("adapter", "fc1", reduction_factor=0), "fc1': reduction_factor=0 must be above 0"),
    (tiny, by("adapter", "norm"), "'norm': LayerNorm has no linear layer that tells its widths"),
    (
        tiny,
        by("prompt", "embed", num_virtual_tokens=0),
        "'embed': num_virtual_tokens=0 must be an int",
    ),
    (tiny, by("prefix", "attention", num_virtual_tokens=0), "attention': num_virtual_tokens=0 mus"),
    (
        tiny,
        by("prefix", "attention", "fc2"),
        "fc2': Linear does not offer what prefix tuning needs",
    ),
    (headed, by("prefix", "0"), "'0': Linear does not offer what prefix tuning needs: n_heads"),
    (tiny, by("bitfit", "norm1", "attention"), "attention': Attention has no parameter bias to"),
    (tiny, by("layer_norm", "attention"), "attention': Attention has no parameter weight to train"),
    (
        lambda: nn.Sequential(nn.ReLU()),
        inject.inject_bitfit,
        "Sequential has no layer of that kind",
    ),
    (of_torch, lora("1.out_proj"), "'1.out_proj' " + BYPASSED.format("MultiheadAttention")),
    (of_torch, lora("linear1"), "'0.linear1' " + BYPASSED.format("TransformerEncoderLayer")),
    (of_torch, inject.inject_layer_norm, BYPASSED.format("TransformerEncoderLayer")),
    (lambda: shared("0.a", "1.b"), lora("a"), "['0.a', '1.b'] are one layer"),
    (lambda: shared("0.a", "0.b"), lora("a"), "['0.a', '0.b'] are one layer"),
    (tied, merge, "['embed.weight', 'lm_head.base.weight'] are tied, so merging 'lm_head'"),
    (disabled, merge, "'blocks.1.attention.q_proj' is disabled: enable it"),
]


@pytest.mark.parametrize("make, call, told", REFUSED, ids=[told for _, _, told in REFUSED])
def test_a_refusal_names_the_offender_and_changes_nothing(make, call, told):
    model = make()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(True)
        p.grad = torch.zeros_like(p)
    before = contents(model)
    with pytest.raises(ValueError, match=re.escape(told)) as refusal:
        call(model)
    assert "\n" not in str(refusal.value)
    assert contents(model) == before


SIZE = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
SIZE |= {"intermediate_size": FF, "max_position_embeddings": 16, "initializer_range": 0.3}


def masked_bert():
    model = hf.BertForMaskedLM(hf.BertConfig(**SIZE)).eval()
    freeze(model)
    return model


@pytest.mark.parametrize(
    "make, x, call",
    [
        (tiny, torch.ones(1, 16), by("adapter", "feed_forward", "fc2", **NARROW)),
        (masked_bert, torch.arange(5)[None], inject.inject_bitfit),
    ],
    ids=["module and layer", "bias around biases"],
)
def test_layers_inside_each_other_are_adapted_or_refused(make, x, call):
    model = make()
    before = contents(model)
    try:
        call(model)
    except ValueError:
        assert contents(model) == before
        return
    model(x.double() if x.is_floating_point() else x)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Around(nn.Module):
    """A module with a bias of its own around a linear layer, as graph convolutions have."""

    def __init__(self):
        super().__init__()
        self.lin, self.bias = nn.Linear(4, 4, bias=False), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.lin(x) + self.bias


def test_an_adapter_around_another_is_merged_with_it():
    model, x = nn.Sequential(Around()), torch.randn(3, 4)
    keys = list(model.state_dict())
    inject.inject_lora(model, ["lin"], r=2)
    inject.inject_bitfit(model)
    for p in model.parameters():
        p.data += 0.1 * p.requires_grad
    expected = model(x)
    assert len(surgery.merge(model)) == 2
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=0)
    assert sorted(model.state_dict()) == sorted(keys)


class Squashed(nn.Linear):
    """A linear layer that is none."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


def tied_biases():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias = model[0].bias
    return model


@pytest.mark.parametrize(
    "make, adapt, told",
    [
        (lambda: nn.Sequential(Squashed(4, 4)), inject.inject_lora, "a Squashed is a Linear that"),
        (
            lambda: nn.Sequential(prune.identity(nn.Linear(4, 4), "weight")),
            inject.inject_lora,
            "'0': this Linear computes its weight from others",
        ),
        (lambda: nn.Sequential(nn.BatchNorm1d(4)), inject.inject_layer_norm, "running statistics"),
        (tied_biases, inject.inject_bitfit, "'0': its bias is tied to another layer's"),
        (Around, lambda m, _, **k: inject.inject_bitfit(m), "sits on the Around itself"),
    ],
)
def test_a_layer_that_is_not_what_it_seems_is_refused(make, adapt, told):
    model = make()
    keys = list(model.state_dict())
    options = {"r": 2} if adapt is inject.inject_lora else {}
    with pytest.raises(ValueError, match=told):
        adapt(model, ["0"], **options)
    assert list(model.state_dict()) == keys and not surgery.adapters(model)


@pytest.mark.parametrize("options", [{"r": 2.5}, {"r": 2, "lora_alpha": float("inf")}])
def test_numbers_of_any_kind_are_kept_as_plain_ones(options):
    model = nn.Sequential(nn.Linear(4, 4))
    inject.inject_lora(model, ["0"], r=np.int64(2), lora_alpha=np.float32(8))
    settings = model[0].settings
    assert (type(settings["r"]), type(settings["lora_alpha"])) == (int, float)
    with pytest.raises(ValueError, match=r"'0': (rank r=2.5|lora_alpha=inf) must be"):
        inject.inject_lora(nn.Sequential(nn.Linear(4, 4)), ["0"], **options)
