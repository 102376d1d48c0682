"""Arithmetic on deltas is arithmetic on weights; a row of a mixed batch is what its model gives."""

import copy

import peft
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.models import MLP, Encoder, TextClassifier
from helpers.peft import (
    MixedBatch,
    adapter_state,
    adapters,
    add,
    delta_weights,
    inject,
    inject_lora,
    merge,
    quantize_layers,
    save_peft,
    save_trainable,
    serving_memory,
    switch,
    task_vector,
    ties,
    unload,
    weighted_sum,
)
from helpers.study import reproducible
from helpers.training import freeze, unfreeze
from tests.small import TinyTransformer

QV = ["q_proj", "v_proj"]
LINEARS = [*QV, "k_proj", "out_proj", "fc1", "fc2", "project"]
NAMES = ["a", None, "b", "c", "a", "e", "c", None, "d", "d", "f"]


@pytest.fixture(autouse=True)
def double():
    with reproducible(0):
        yield


def plain():
    return TinyTransformer(4, 4, d=8, n_heads=2, d_ff=12, n_classes=3)


def stirred(model):
    with torch.no_grad():
        for p in model.parameters():
            p += p.requires_grad * 0.3 * torch.randn_like(p)
    return model


def lora(base, targets=QV, *, head=True, **options):
    model = copy.deepcopy(base)
    freeze(model)
    inject_lora(model, targets, **{"r": 3} | options)
    if head:
        unfreeze(model.head)
    return stirred(model)


def several(base, targets=QV, more=LINEARS):
    """Adapted copies of one base that differ in all that may differ."""
    probed = copy.deepcopy(base)
    freeze(probed)
    unfreeze(probed.head)
    return {
        "a": lora(base, targets),
        "b": lora(base, more, r=2, lora_alpha=5, dropout=0.5),
        "c": lora(base, targets[:1], r=4, rslora=True, head=False),
        "d": lora(base, more, r=2, init="pissa"),
        "e": lora(base, ["head"], r=2, head=False),
        "f": stirred(probed),
    }


def row_by_row(base, models, x, names):
    every = {None: base} | models
    with torch.no_grad():
        return torch.cat([every[n].eval()(x[i : i + 1]) for i, n in enumerate(names)])


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=tol)


def same(a, b, tol=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        close(a[name], b[name], tol)


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def gpt2():
    sizes = dict(vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    off = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0)).double()


def merged(model):
    model = copy.deepcopy(model)
    merge(model)
    return weights(model)


# --- switching


def test_a_state_is_what_save_trainable_writes_and_switching_is_a_round_trip(tmp_path):
    model, x = lora(plain()), torch.randn(5, 16)
    first, y = adapter_state(model), model(x)
    save_trainable(model, tmp_path / "first")
    stirred(model)
    states = {"first": first, "second": adapter_state(model)}
    z = model(x)
    assert (y - z).abs().max() > 1e-3
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    kept = list(model.parameters())
    switch(model, states, "first")
    assert torch.equal(model(x), y)
    switch(model, states, "second")
    assert torch.equal(model(x), z)
    assert all(a is b for a, b in zip(kept, model.parameters(), strict=True))
    assert all(torch.equal(weights(model)[n], p) for n, p in frozen.items())
    same(load_file(tmp_path / "first"), first, 0)
    assert {n for n in first if n.startswith("head")} == {"head.weight", "head.bias"}


def test_a_state_is_a_copy():
    model = lora(plain())
    state = adapter_state(model)
    before = {n: t.clone() for n, t in state.items()}
    stirred(model)
    same(state, before, 0)


def test_switching_refuses_before_it_changes_anything():
    model, other, fewer = lora(plain()), lora(plain(), r=2), lora(plain(), head=False)
    states = {"here": adapter_state(model), "r2": adapter_state(other), "few": adapter_state(fewer)}
    states["plain r2"] = dict(states["r2"])
    states["32"] = {n: t.float() for n, t in states["here"].items()}
    states["alpha"] = adapter_state(lora(plain(), lora_alpha=8))
    states["half alpha"] = ties([weighted_sum([states["alpha"]], [0.5])], density=1)
    states["bare"] = adapter_state(stirred(plain()))
    stirred(model)
    before = adapter_state(model)
    for name, why in {
        "there": r"no adapter is called 'there': there are \['here', 'r2', ",
        "r2": r"'blocks.0.attention.q_proj' is LoRA\(r=2, .* in the state 'r2', but LoRA\(r=3, ",
        "plain r2": r"lora_A' is of shape \(2, 8\) in 'plain r2', but of shape \(3, 8\) in the",
        "alpha": r"LoRA\(r=3, lora_alpha=8.0, .* but LoRA\(r=3, lora_alpha=16.0, .*: inject what",
        "half alpha": r"lora_alpha=8.0, .* but .*lora_alpha=16.0, ",
        "bare": "'blocks.0.attention.q_proj' is not adapted in the state 'bare'",
        "few": "'head.weight' is not there in 'few', but",
        "32": "is torch.float32 in '32', but torch.float64 in the model: cast the wider",
    }.items():
        with pytest.raises(ValueError, match=why):
            switch(model, states, name)
    same(adapter_state(model), before, 0)


@pytest.mark.parametrize("through", [copy.deepcopy, copy.copy, "torch.save", "sum", "ties"])
def test_settings_stay_with_a_state(through, tmp_path):
    model, other = lora(plain(), lora_alpha=8), lora(plain())
    state = adapter_state(model)
    if through == "torch.save":
        torch.save(state, tmp_path / "a")
        state = torch.load(tmp_path / "a", weights_only=True)
    elif through in ("sum", "ties"):
        state = weighted_sum([state], [1.0]) if through == "sum" else ties([state], density=1)
    else:
        state = through(state)
    with pytest.raises(ValueError, match=r"lora_alpha=8.0, .* but .*16.0, .* in the model: inject"):
        switch(other, {"": state}, "")
    stirred(model)
    switch(model, {"": state}, "")
    same(adapter_state(model), dict(state), 0)
    switch(other, {"": dict(state)}, "")  # a plain dict has no settings to compare


def test_a_state_of_another_dtype_is_refused_and_the_cure_works():
    narrow, wide = lora(plain()).float(), lora(plain())
    states = {"wide": adapter_state(wide), "narrow": adapter_state(narrow)}
    for model, name in ((narrow, "wide"), (wide, "narrow")):
        with pytest.raises(ValueError, match=r"but torch.float\d\d in .*: cast the wider"):
            switch(model, states, name)
    switch(wide.float(), states, "narrow")
    states["wide"] = {key: t.float() for key, t in states["wide"].items()}
    switch(narrow, states, "wide")


# --- arithmetic


def test_a_vector_is_cast_to_its_base():
    for dtype in (torch.bfloat16, torch.float32):
        base = plain().to(dtype)
        model = lora(base, LINEARS, head=False).double() if dtype == torch.float32 else lora(base)
        vector = delta_weights(model)
        assert {t.dtype for t in vector.values()} != {dtype}
        there = weights(add(base, vector, 2.0))
        for name, t in vector.items():
            assert there[name].dtype == dtype
            assert torch.equal(there[name], (weights(base)[name] + 2 * t).to(dtype))


def test_vectors_of_several_dtypes_are_combined_in_that_of_the_first():
    narrow = {name: t.float() for name, t in B.items()}
    for combine in (lambda v: weighted_sum(v, [0.5, 0.25]), lambda v: ties(v, density=0.5)):
        same(combine([A, narrow]), combine([A, B]), 1e-6)
        close(combine([narrow, A])["w"], combine([B, A])["w"].float(), 1e-6)


DELTAS = {
    "LoRA": lambda m: inject_lora(m, LINEARS, r=3),
    "PiSSA": lambda m: inject_lora(m, LINEARS, r=3, init="pissa", rslora=True),
    "DoRA": lambda m: inject.inject_dora(m, LINEARS, r=3),
    "VeRA": lambda m: inject.inject_vera(m, LINEARS, r=4),
}


@pytest.mark.parametrize("method", DELTAS)
def test_task_vector_of_an_adapted_model_is_its_delta_weights(method):
    base = plain()
    model = copy.deepcopy(base)
    freeze(model)
    names = DELTAS[method](model)
    stirred(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    vector = task_vector(model, base)
    assert set(vector) == {f"{n}.weight" for n in names}
    same(delta_weights(model), vector)
    assert all(t.abs().max() > 0.01 and not t.requires_grad for t in vector.values())
    same(model.state_dict(), state, 0)


def test_task_vector_takes_full_fine_tuning_and_a_head_and_leaves_out_what_stayed():
    base = plain()
    tuned = stirred(copy.deepcopy(base))
    same(task_vector(tuned, base), {n: p - weights(base)[n] for n, p in weights(tuned).items()}, 0)
    vector = task_vector(lora(base, ["q_proj"]), base)
    blocks = {f"blocks.{k}.attention.q_proj.weight" for k in range(2)}
    assert set(vector) == blocks | {"head.weight", "head.bias"}


def test_deltas_of_gpt2_have_the_shape_of_its_weights():
    base = gpt2()
    model = lora(base, ["c_attn", "c_proj"], head=False)
    same(delta_weights(model), task_vector(model, base))
    same(weights(add(base, delta_weights(model))), merged(model))


def test_adding_a_weighted_sum_of_vectors_is_the_weighted_sum_of_merged_weights():
    base, shares = plain(), [0.5, 0.3, -0.4]
    models = [lora(base, QV, r=r, lora_alpha=alpha) for r, alpha in ((2, 3), (4, 16), (3, 6))]
    summed = add(base, weighted_sum([task_vector(m, base) for m in models], shares))
    of_base = 1 - sum(shares)  # the shares of the models and of the base make 1
    wanted = weighted_sum([weights(base), *map(merged, models)], [of_base, *shares])
    same(weights(summed), wanted)


def test_negation_takes_back_what_was_added_and_the_base_is_not_touched():
    base = plain()
    before = {n: p.clone() for n, p in weights(base).items()}
    model = lora(base)
    vector = task_vector(model, base)
    there = add(base, vector)
    same(weights(there), merged(model))
    same(weights(add(there, vector, scale=-1)), before)
    same(weights(add(base, vector, -0.5)), weighted_sum([before, merged(model)], [1.5, -0.5]))
    same(weights(base), before, 0)


def test_averaging_a_and_b_misses_the_average_delta_by_the_cross_terms():
    base = plain()
    first, second, mean = (lora(base, ["q_proj"], r=3, lora_alpha=6, head=False) for _ in range(3))
    states = [adapter_state(first), adapter_state(second)]
    switch(mean, {"mean": weighted_sum(states, [0.5, 0.5])}, "mean")
    deltas = weighted_sum([delta_weights(first), delta_weights(second)], [0.5, 0.5])
    for name, t in delta_weights(mean).items():
        one, two = (adapters(m)[name.removesuffix(".weight")] for m in (first, second))
        # (B1 + B2)(A1 + A2) / 4 - (B1 A1 + B2 A2) / 2 = -(B1 - B2)(A1 - A2) / 4
        cross = -(one.lora_B - two.lora_B) @ (one.lora_A - two.lora_A) / 4
        close(t - deltas[name], 2 * cross.detach())  # s = 2
        assert cross.abs().max() > 0.01


def test_peft_concatenates_to_our_sum_and_its_linear_has_cross_terms(tmp_path):
    base, shares = plain(), [0.7, 0.2]
    models = [lora(base, QV, r=3, lora_alpha=alpha, head=False) for alpha in (3, 12)]
    for k, model in enumerate(models):
        save_peft(model, tmp_path / str(k))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "0", "0")
    theirs.load_adapter(tmp_path / "1", "1")
    for how in ("cat", "linear"):
        theirs.add_weighted_adapter(["0", "1"], shares, how, combination_type=how)
    ours = weighted_sum([delta_weights(m) for m in models], shares)
    for name, t in ours.items():
        layer = name.removesuffix(".weight")
        there = theirs.get_submodule(f"base_model.model.{layer}")
        close(there.get_delta_weight("cat").detach(), t)
        one, two = (adapters(m)[layer] for m in models)
        root = (shares[0] * one.scaling * shares[1] * two.scaling) ** 0.5
        cross = root * (one.lora_B @ two.lora_A + two.lora_B @ one.lora_A)
        close((there.get_delta_weight("linear") - t).detach(), cross.detach())
        assert cross.abs().max() > 0.01


A = {"w": [[5.0, -4.0], [0.1, 3.0]], "b": [0.5, -2.0]}
B = {"w": [[3.0, 6.0], [0.2, -3.0]], "b": [4.0, 0.3]}
C = {"w": [[-1.0, 0.4], [-7.0, 2.0]], "b": [2.5, 0.1]}
A, B, C = ({n: torch.tensor(t, dtype=torch.float64) for n, t in v.items()} for v in (A, B, C))


def test_ties_by_hand():
    # half of 6 entries stay   A  5 -4  .  3  .  .   B  .  6  . -3  4  . (3 and -3 are as large,
    # so that four of B stay)  B  3  6  . -3  4  .   C  .  .  -7  2  2.5  .
    # sums                        8  2  -7  2  6.5  0
    # of the elected sign         5,3  6  -7  3,2  4,2.5  none
    wanted = {"w": [[4.0, 6.0], [-7.0, 2.5]], "b": [3.25, 0.0]}
    for scale in (1.0, 0.4):
        found = ties([A, B, C], density=0.5, scale=scale)
        same(found, {n: scale * torch.tensor(t) for n, t in wanted.items()})
    same(ties([C, A, B], density=0.5), ties([A, B, C], density=0.5))


def test_ties_trims_a_vector_as_a_whole():
    vector = {"large": torch.tensor([5.0, -6.0]), "small": torch.tensor([1.0, 2.0])}
    wanted = {"large": torch.tensor([5.0, -6.0]), "small": torch.zeros(2)}
    same(ties([vector], density=0.5), wanted, 0)


def test_ties_keeps_everything_at_density_one_and_one_entry_at_the_least():
    same(ties([A], density=1), A, 0)
    [kept] = ties([A], density=1e-9)["w"].flatten().nonzero()
    assert kept == 0 and not ties([A], density=1e-9)["b"].any()


def test_a_sum_of_zero_elects_no_sign_and_in_peft_the_positive_one():
    up, down = torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 1.0])
    assert ties([{"w": up}, {"w": down}], density=1)["w"].tolist() == [0.0, 1.0]
    with pytest.warns(UserWarning, match="no pruning"):
        assert peft_ties([up, down], torch.ones(2), 1.0).tolist() == [2.0, 1.0]


def test_ties_of_a_single_tensor_is_that_of_peft():
    tensors = [torch.randn(8, 5) for _ in range(4)]
    for density in (0.1, 0.2, 0.55):  # 4, 8 and 22 of 40 entries
        ours = ties([{"w": t} for t in tensors], density=density)["w"]
        close(ours, peft_ties(tensors, torch.ones(4), density))


def test_arithmetic_refuses_what_does_not_fit():
    base = plain()
    bottleneck, disabled, names = copy.deepcopy(base), lora(base), {"w": torch.ones(2)}
    inject.inject_adapter(bottleneck, ["fc2"], reduction_factor=4)
    next(iter(adapters(disabled).values())).enabled = False
    tied, alphas = gpt2(), [lora(base), lora(base, lora_alpha=8)]
    inject_lora(tied, ["lm_head"])
    for call, why in {
        lambda: delta_weights(bottleneck): "'blocks.0.feed_forward.fc2' is a BottleneckAdapter, wh",
        lambda: delta_weights(base): "no adapter in TinyTransformer: task_vector takes",
        lambda: delta_weights(tied): "'lm_head' shares its weight with another layer",
        lambda: task_vector(bottleneck, base): "is a BottleneckAdapter: it has no equal plain",
        lambda: task_vector(disabled, base): "is disabled",
        lambda: task_vector(MLP(), base): "'backbone.0.weight' is .* the model, but not there in b",
        lambda: weighted_sum([], []): "one or more, none of them empty",
        lambda: weighted_sum([A, {}], [1, 1]): "one or more, none of them empty",
        lambda: weighted_sum([A, B], [1.0]): "2 vectors need as many weights, not 1",
        lambda: weighted_sum([A, names], [1, 1]): r"\(2,\) in vector 1, but .*\(2, 2\) in vector 0",
        lambda: weighted_sum(
            [*map(adapter_state, alphas)], [1, 1]
        ): "alpha=8.0.* combine their delta",
        lambda: task_vector(
            plain().float(), base
        ): "'embed.position' is torch.float32 in the model,",
        lambda: ties([A, {"w": A["w"]}]): "'b' is not there in vector 1, but",
        lambda: ties([A], density=0): "density=0 must be above 0, and at most 1",
        lambda: ties([A], density=1.1): "density=1.1 must be",
        lambda: ties([A], density=float("nan")): "density=nan must be",
        lambda: add(base, names): r"'w' is .* in the vector, but not there in base",
        lambda: add(base, {"head.bias": torch.ones(4)}): r"\(4,\) in the vector, but .*\(3,\) in b",
    }.items():
        with pytest.raises(ValueError, match=why):
            call()


# --- mixed batches


@pytest.mark.parametrize("shape", ["transformer", "mlp"])
def test_each_row_of_a_mixed_batch_is_what_its_own_model_computes(shape):
    if shape == "mlp":
        base, width = MLP(6, hidden=7, n_features=8), 6
        models = several(base, ["backbone.0", "backbone.2"], ["backbone.2", "backbone.4"])
    else:
        base, width = plain(), 16
        models = several(base)
    mixed = MixedBatch(base, models)
    shuffled = [NAMES[i] for i in torch.randperm(len(NAMES))]
    for names in (NAMES, shuffled, ["b"] * 4, [None] * 3, *([n] for n in {*NAMES})):
        x = torch.randn(len(names), width)
        close(mixed(x, names), row_by_row(base, models, x, names))
    x = torch.randn(9, width)
    assert torch.equal(mixed(x, [None] * 9), base(x))
    every = torch.cat([mixed(x[:1], [name]) for name in mixed.numbers])
    assert torch.pdist(every).min() > 1e-3  # no two adapters do the same


def test_all_that_is_trained_outside_adapters_goes_by_row():
    base = plain()
    norms, position, both = (lora(base, ["q_proj"]) for _ in range(3))
    unfreeze(norms.norm, norms.blocks[1].norm2)
    unfreeze(position.embed.position)
    unfreeze(both.embed, both.blocks[0].attention.k_proj)
    models = {"norms": norms, "position": position, "both": both}
    models = {name: stirred(model) for name, model in models.items()}
    models["lora"] = lora(base, ["k_proj"])  # a layer that another model has trained whole
    models["bias"] = lora(base, ["q_proj"])  # of an adapted layer
    unfreeze(models["bias"].blocks[0].attention.q_proj.base.bias)
    stirred(models["bias"])
    names, x = [*models, None, *models], torch.randn(11, 16)
    close(MixedBatch(base, models)(x, names), row_by_row(base, models, x, names))


def test_a_mixed_batch_through_transformers_gpt2():
    base = gpt2()
    models = {"a": lora(base, ["c_attn"], head=False)}
    models["b"] = lora(base, ["c_fc", "lm_head"], head=False, r=2, init="pissa")
    x, names = torch.randint(30, (5, 6)), ["b", "a", None, "a", "b"]
    with torch.no_grad():
        rows = {None: base.eval()} | {n: m.eval() for n, m in models.items()}
        wanted = torch.cat([rows[n](x[i : i + 1]).logits for i, n in enumerate(names)])
    close(MixedBatch(base, models)(x, names, use_cache=False).logits, wanted)


def test_a_mixed_batch_of_padded_texts():
    encoder = Encoder(vocab=30, d=8, n_layers=2, n_heads=2, d_ff=12)
    base = TextClassifier(encoder, 3)
    models = {"a": lora(base), "b": lora(base, ["fc1", "q_proj"])}
    mask = (torch.arange(6) < torch.tensor([6, 2, 4])[:, None]).long()
    ids, names = torch.randint(30, (3, 6)), ["b", None, "a"]
    rows = {None: base} | models
    wanted = [rows[n](ids[i : i + 1], mask[i : i + 1]) for i, n in enumerate(names)]
    close(MixedBatch(base, models)(ids, names, mask=mask), torch.cat(wanted).detach())
    assert base.encoder.skips_padding


def test_a_mixed_batch_shares_the_base_and_leaves_it_and_the_models_as_they_were():
    base, x = plain().train(), torch.randn(2, 16)
    models = several(base)
    everything = [base, *models.values()]
    before = [copy.deepcopy(m) for m in everything]
    mixed = MixedBatch(base, models)
    y = mixed(x, ["a", "b"])
    assert not y.requires_grad and not any(p.requires_grad for p in mixed.parameters())
    for now, then in zip(everything, before, strict=True):
        assert str(now) == str(then)
        assert [m.training for m in now.modules()] == [m.training for m in then.modules()]
        flags = ([p.requires_grad for p in m.parameters()] for m in (now, then))
        assert next(flags) == next(flags)
        same(now.state_dict(), then.state_dict(), 0)
    there = {t.untyped_storage().data_ptr() for t in mixed.state_dict().values()}
    assert {p.untyped_storage().data_ptr() for p in base.parameters()} <= there
    stirred(models["a"])  # a copy was taken
    assert torch.equal(mixed(x, ["a", "b"]), y)


def test_a_mixed_batch_runs_in_half_precision_under_autocast():
    base, x = plain().float(), torch.randn(7, 16, dtype=torch.float32)
    models = {"a": lora(base), "b": lora(base, LINEARS)}
    names = ["a", "b", None, "b", "a", "b", None]
    mixed = MixedBatch(base, models)
    exact = mixed(x, names)
    with torch.autocast("cpu", torch.bfloat16):
        half = mixed(x, names)
    assert half.dtype == torch.bfloat16
    close(half.float(), exact, 0.05 * exact.abs().max().item())


def test_a_mixed_batch_refuses_names_that_do_not_fit():
    base = plain()
    mixed, x = MixedBatch(base, {"a": lora(base)}), torch.randn(2, 16)
    for names, why in {
        ("a", "z"): r"no adapter is called 'z': there are \[None, 'a'\]",
        ("a",): "must be a list of 2 names, one for each row",
        "aa": "names='aa' must be a list of 2 names",
    }.items():
        with pytest.raises(ValueError, match=why):
            mixed(x, names)
    with pytest.raises(ValueError, match="a layer got 2 rows, but there are 0 names"):
        mixed.model(x)
    mixed.model.embed.register_forward_pre_hook(lambda m, args: args[0].repeat(2, 1))
    with pytest.raises(ValueError, match="a layer got 4 rows, but there are 2 names"):
        mixed(x, ["a", "a"])


def spoilt(model, change):
    with torch.no_grad():
        change(model)
    return model


def test_a_mixed_batch_refuses_models_that_are_no_lora_of_this_base():
    base, others = plain(), {}
    for name, put in {
        "DoRA": lambda m: inject.inject_dora(m, QV, r=2),
        "IA3": lambda m: inject.inject_ia3(m, QV),
        "VeRA": lambda m: inject.inject_vera(m, QV, r=2),
        "BottleneckAdapter": lambda m: inject.inject_adapter(m, ["fc2"], reduction_factor=2),
    }.items():
        others[name] = copy.deepcopy(base)
        put(others[name])
    wide = TinyTransformer(4, 4, d=8, n_heads=2, d_ff=12, n_classes=5)
    wide.load_state_dict({n: t for n, t in base.state_dict().items() if "head" not in n}, False)
    deeper = TinyTransformer(4, 4, d=8, n_heads=2, n_layers=3, d_ff=12, n_classes=3)
    nested, around, off = (lora(base) for _ in range(3))
    inject_lora(nested, ["project"], r=2)
    unfreeze(nested.embed.position)
    inject.inject_adapter(around, ["attention"], reduction_factor=2)
    off.blocks[1].attention.v_proj.enabled = False
    frozen = lora(base)
    freeze(frozen.head)
    bits = spoilt(lora(base), lambda m: m.norm.bias[0].add_(1e-15))
    deep = spoilt(lora(base), lambda m: m.blocks[1].attention.q_proj.base.weight[0, 0].mul_(1.5))
    for model, why in [
        *((m, f"of 'x' is {name}: only enabled LoRA can be mixed") for name, m in others.items()),
        (off, "'blocks.1.attention.v_proj' of 'x' is disabled: only enabled LoRA"),
        (around, "'blocks.0.attention' of 'x' is BottleneckAdapter"),
        (nested, "'embed' contains 'embed.project': adapt one of them"),
        (lora(plain()), "'embed.position' of 'x' is frozen and differs from base's"),
        (bits, "'norm.bias' of 'x' is frozen and differs"),
        (deep, "'blocks.1.attention.q_proj.weight' of 'x' is frozen and differs"),
        (frozen, "'head.weight' of 'x' is frozen and differs .* unfreeze it if it was trained"),
        (lora(wide), r"'head.weight' is .*\(5, 8\) in 'x', but .*\(3, 8\) in base"),
        (lora(deeper), r"'blocks.2.norm1.weight' is .* in 'x', but not there in base"),
        (lora(base).float(), "torch.float32 in 'x', but torch.float64 in base: cast the wider"),
    ]:
        with pytest.raises(ValueError, match=why):
            MixedBatch(base, {"a": lora(base), "x": model})
    for arguments, why in [
        ((base, {}), "one model or more by name"),
        ((base, {None: lora(base)}), "None is the plain base"),
        ((lora(base), {"a": lora(base)}), "of base has an adapter: pass the plain model"),
    ]:
        with pytest.raises(ValueError, match=why):
            MixedBatch(*arguments)


def test_a_mixed_batch_refuses_a_trained_tensor_that_cannot_go_by_row():
    base = gpt2()
    tied = lora(base, ["c_attn"], head=False)
    unfreeze(tied.lm_head)
    with pytest.raises(ValueError, match="'x' was trained and is tied to another"):
        MixedBatch(base, {"x": tied})
    base = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="'weight' of 'x' was trained and belongs to no module"):
        MixedBatch(base, {"x": copy.deepcopy(base)})


def test_running_statistics_go_by_row():
    base = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    models, x = {}, torch.randn(8, 4)
    for k, name in enumerate("ab"):
        models[name] = lora(base, ["0", "3"], head=False).train()
        models[name](x * (k + 1) + k)
    models["plain"] = copy.deepcopy(models["a"])
    unload(models["plain"])  # its statistics moved, and nothing else
    names = ["a", "b", None, "plain", "b", "a", None, "plain"]
    close(MixedBatch(base.eval(), models)(x, names), row_by_row(base, models, x, names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_mixed_in_the_adapters_float32(dtype):
    base = plain().to(dtype)
    models = {"a": lora(base, LINEARS, head=False), "b": lora(base, ["q_proj", "fc1"], r=2)}
    assert models["a"].blocks[0].attention.q_proj.lora_A.dtype == torch.float32
    x, names = torch.randn(6, 16).to(dtype), ["a", None, "b", "b", "a", "a"]
    mixed = MixedBatch(base, models)(x, names)
    wanted = row_by_row(base, models, x, names)
    assert mixed.dtype == dtype
    close(mixed.float(), wanted.float(), 8 * torch.finfo(dtype).eps * wanted.abs().max().item())


def test_arithmetic_and_batches_see_through_torchs_wrappers():
    base, x, names = plain(), torch.randn(3, 16), ["a", None, "a"]
    model = lora(base)
    for wrap in (nn.DataParallel, AveragedModel):
        held, around = wrap(copy.deepcopy(model)), wrap(copy.deepcopy(base))
        same(delta_weights(held), delta_weights(model), 0)
        same(task_vector(held, around), task_vector(model, base), 0)
        vector = task_vector(model, base)
        same(weights(add(around, vector)), weights(add(base, vector)), 0)
        assert serving_memory(held, 3) == serving_memory(model, 3)
        mixed = MixedBatch(around, {"a": held})(x, names)
        assert torch.equal(mixed, MixedBatch(base, {"a": model})(x, names))


# --- memory


def measured(*models):
    tensors = [t for m in models for t in (*m.parameters(), *m.buffers())]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("init", ["lora", "pissa"])
def test_serving_memory_is_what_is_measured(n, init):
    base = plain().float()
    models = [lora(base, LINEARS, init=init) for _ in range(n)]
    mixed = MixedBatch(base, {str(k): model for k, model in enumerate(models)})
    tuned = [copy.deepcopy(base) for _ in range(n)]
    assert serving_memory(models[0], n) == (measured(mixed), measured(*tuned))


@pytest.mark.parametrize("kind", ["quantised", "bfloat16", "hidden buffer"])
def test_serving_memory_counts_what_a_base_holds(kind):
    base = plain().float()
    if kind == "bfloat16":
        base = base.bfloat16()
    if kind == "hidden buffer":
        base.register_buffer("table", torch.zeros(1000), persistent=False)
    restored = copy.deepcopy(base)
    if kind == "quantised":
        quantize_layers(base, ["q_proj", "fc1", "fc2"], block_size=8)
        assert measured(base) < measured(restored)
    models = [lora(base, ["q_proj", "v_proj"]) for _ in range(3)]
    mixed = MixedBatch(base, {str(k): model for k, model in enumerate(models)})
    tuned = [copy.deepcopy(restored) for _ in range(3)]  # in full precision: codes have no gradient
    assert serving_memory(models[0], 3) == (measured(mixed), measured(*tuned))
