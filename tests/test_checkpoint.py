"""What was trained comes back bit for bit or is refused, and peft computes the same from it."""

import copy
import json
import os
import warnings
from collections import OrderedDict

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from helpers.peft import (
    IA3,
    LoRA,
    adapter_state,
    dequantize_layers,
    files,
    hub_config,
    inject,
    inject_loftq,
    load_peft,
    load_trainable,
    quantize_layers,
    save_peft,
    save_trainable,
    surgery,
    switch,
)
from helpers.training import freeze, unfreeze
from tests.small import TinyTransformer

QV = ["q_proj", "v_proj"]
KEY = "base_model.model.blocks.0.attention.q_proj.lora_A.weight"
BIAS = "base_model.model.head.bias"
IN_PEFT = {
    "lora": lambda m, t: inject.inject_lora(m, t, r=4, dropout=0.1),
    "rslora": lambda m, t: inject.inject_lora(m, t, r=4, rslora=True),
    "pissa": lambda m, t: inject.inject_lora(m, t, r=4, init="pissa"),
    "pissa rslora": lambda m, t: inject.inject_lora(m, t, r=4, init="pissa", rslora=True),
    "dora": lambda m, t: inject.inject_dora(m, t, r=4),
    "vera": lambda m, t: inject.inject_vera(m, t, r=8),
    "ia3": lambda m, t: inject.inject_ia3(m, t[:1], feedforward=t[1:]),
    "oft": lambda m, t: inject.inject_oft(m, t, block_size=4),
    "layer_norm": lambda m, t: inject.inject_layer_norm(m),
}
METHODS = IN_PEFT | {
    "bitfit": lambda m, t: inject.inject_bitfit(m, t),
    "adapter": lambda m, t: inject.inject_adapter(m, t, reduction_factor=4),
    "prompt": lambda m, t: inject.inject_prompt(m, ["embed"], num_virtual_tokens=3),
    "prefix": lambda m, t: inject.inject_prefix(m, ["attention"], num_virtual_tokens=3),
    "head alone": lambda m, t: None,
}
SPARE = dict(init_lora_weights="gaussian", exclude_modules=r".*\.0\..*")
EXACT = dict(use_cayley_neumann=False)
CONFIGS = {
    "lora": lambda t, **k: peft.LoraConfig(r=4, lora_alpha=6, target_modules=t, **k),
    "rslora": lambda t, **k: peft.LoraConfig(target_modules=t, use_rslora=True, **SPARE, **k),
    "dora": lambda t, **k: peft.LoraConfig(r=4, use_dora=True, target_modules=t, **k),
    "vera": lambda t, **k: peft.VeraConfig(r=8, target_modules=t, **k),
    "ia3": lambda t, **k: peft.IA3Config(target_modules=t, feedforward_modules=t[1:], **k),
    "oft": lambda t, **k: peft.OFTConfig(oft_block_size=4, target_modules=t, **EXACT, **k),
    "layer_norm": lambda t, **k: peft.LNTuningConfig(target_modules=t, **k),
}


def tiny(dtype=torch.float64, seed=0, **sizes):
    torch.manual_seed(seed)
    return frozen(TinyTransformer(d=16, n_heads=2, **sizes).to(dtype))


def gpt2():
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return frozen(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).double())


def bert():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=30, max_position_embeddings=16, **sizes)
    return frozen(BertForSequenceClassification(config).double())


MODELS = [  # base, layers to adapt (of (IA)3: outputs, inputs), layer norms, head
    (tiny, ["q_proj", "fc2"], ["norm1", "norm"], "head"),
    (gpt2, ["c_attn", "mlp.c_proj"], ["ln_1", "transformer.ln_f"], None),
    (bert, ["query", "intermediate.dense"], ["LayerNorm"], "classifier"),
]


def frozen(model):
    freeze(model)
    return model.eval()


def randomised(model, scale=0.2):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, dtype=p.dtype)
    return model


def prepared(method="lora", model=None, targets=QV, head="head", seed=1):
    """A base with fresh adapters and an unfrozen head, another one for another seed."""
    model = tiny() if model is None else model
    torch.manual_seed(seed)
    METHODS[method](model, targets)
    if head:
        unfreeze(model.get_submodule(head))
    return model


def trained(*args, **kwargs):
    return randomised(prepared(*args, **kwargs))


@torch.no_grad()
def outputs(model):
    torch.manual_seed(9)
    model.eval()
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(inner, TinyTransformer):
        return model(torch.randn(5, 64).to(inner.embed.position.dtype))
    return model(input_ids=torch.randint(0, 30, (3, 8))).logits


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()} | {
        f"{k} is trained": p.requires_grad for k, p in model.named_parameters()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(*map(torch.as_tensor, (a[k], b[k]))) for k in a)


def refused(load, model, path, match, error=ValueError):
    """Loading raises the sentence, and leaves the model and torch's random stream as they were."""
    before, stream = state(model), torch.get_rng_state()
    with pytest.raises(error, match=match):
        load(model, path)
    assert same(state(model), before) and torch.equal(torch.get_rng_state(), stream)


def in_peft(make, *args):
    with warnings.catch_warnings():  # about transformers, Conv1D and layer norms
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", "Unsupported layer type .*LayerNorm")
        return make(*args, autocast_adapter_dtype=False).eval()


# ---- our own file


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bit_for_bit(method, dtype, tmp_path):
    if dtype == torch.bfloat16 and method in ("pissa", "pissa rslora", "oft"):
        pytest.skip("torch has no svd and no solve in bfloat16")
    model = trained(method, tiny(dtype))
    save_trainable(model, str(tmp_path / "a.safetensors"))
    other = prepared(method, tiny(dtype), seed=2)
    load_trainable(other, tmp_path / "a.safetensors")
    assert same(state(other), state(model)) and torch.equal(outputs(other), outputs(model))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_file_holds_what_was_trained_and_no_base(tmp_path):
    model = trained("vera")
    save_trainable(model, tmp_path / "a")
    kept = {n for n, p in model.named_parameters() if p.requires_grad}
    own = "blocks.0.attention.q_proj.projection."
    assert load_file(tmp_path / "a").keys() == kept | {f"{own}A", f"{own}B"}


def test_running_statistics_travel_with_a_trained_norm(tmp_path):
    def net():
        return frozen(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)))

    model = net()
    unfreeze(model[1])
    model[1].running_mean += 1
    model[1].num_batches_tracked += 3
    other = copy.deepcopy(model)
    other[1].reset_running_stats()
    save_trainable(model, tmp_path / "a")
    names = load_file(tmp_path / "a")
    assert {"1.running_mean", "2.running_mean"} <= names.keys() and "2.weight" not in names
    load_trainable(other, tmp_path / "a")
    assert same(state(other), state(model))


def test_a_frozen_weight_beside_a_trained_bias_belongs_to_the_base(tmp_path):
    model = tiny()
    unfreeze(model.head.bias)
    save_trainable(model, tmp_path / "a")
    assert list(load_file(tmp_path / "a")) == ["head.bias"]


def test_base_digest_knows_no_adapter_and_no_order():
    def digest(model):
        freeze(model)
        return files._digests(model, files._split(model)[1])

    one, two = tiny(), tiny()
    inject.inject_adapter(one, ["attention"])
    inject.inject_lora(one, ["blocks.0.attention.base.q_proj"])
    inject.inject_lora(two, ["blocks.0.attention.q_proj"])
    inject.inject_adapter(two, ["attention"])
    assert digest(one) == digest(two) == digest(tiny()) != digest(tiny(seed=1))


def test_frozen_adapter_tensors_travel(tmp_path):
    model, other = trained(), prepared(seed=2)
    for m in (model, other):
        freeze(*[p for n, p in m.named_parameters() if n.endswith("lora_A")])
    save_trainable(model, tmp_path / "a")
    load_trainable(other, tmp_path / "a")
    assert torch.equal(outputs(other), outputs(model))


def test_a_tied_tensor_is_kept_once_by_the_name_that_it_has_first():
    model = gpt2()
    unfreeze(model.lm_head)
    assert list(adapter_state(model)) == ["transformer.wte.weight"]


def test_nothing_trainable_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to save: every parameter of TinyTransformer"):
        save_trainable(tiny(), tmp_path / "a")


def unfrozen(name, **kwargs):
    model = prepared(**kwargs)
    unfreeze(dict([*model.named_modules(), *model.named_parameters()])[name])
    return model


def lora(targets=QV, **settings):
    model = tiny()
    inject.inject_lora(model, targets, **settings)
    unfreeze(model.head)
    return model


Q = r"'blocks.0.attention.q_proj' is LoRA\(r=4, lora_alpha=16.0, rslora=False, init=lora\) in "
HEAD = r"'head.bias' is of shape \(10,\) in .*, but not trained "


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: lora(r=2),
            Q + r".*, but LoRA\(r=2, lora_alpha=16.0, .* in the model: inject what",
        ),
        (lambda: lora(r=4, lora_alpha=8), Q + r".* but LoRA\(r=4, lora_alpha=8.0, "),
        (lambda: lora(r=4, rslora=True), Q + r".* rslora=True"),
        (lambda: lora(r=4, init="pissa"), Q + r".* init=pissa"),
        (lambda: prepared("dora"), Q + r".* but DoRA\(r=4"),
        (lambda: prepared("head alone"), Q + ".* but not adapted in the model"),
        (lambda: lora(["q_proj"], r=4), "'blocks.0.attention.v_proj' is LoRA.* but not adapted in"),
        (lambda: lora([*QV, "fc1"], r=4), "feed_forward.fc1' is not adapted in .*, but LoRA"),
        (lambda: prepared(head=None), HEAD + "in the model: unfreeze what was trained"),
        (
            lambda: unfrozen("norm"),
            r"'norm.weight' is not trained in .*, but of shape \(16,\) in the model",
        ),
        (lambda: prepared(model=tiny(n_classes=3)), r"'head.weight' is .* but .* \(3, 16\)"),
        (
            lambda: prepared(model=tiny(torch.float32)),
            "is torch.float64 .* but torch.float32 in the model: load into a model of the file's",
        ),
        (lambda: prepared(model=tiny(seed=5)), "another base: 'embed.position' differs; load into"),
    ],
)
def test_file_of_another_model_is_refused(make, match, tmp_path):
    save_trainable(trained(), tmp_path / "a")
    load_trainable(lora(r=4, dropout=0.5), tmp_path / "a")  # another dropout is the same model
    refused(load_trainable, make(), tmp_path / "a", match)


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    path, model = tmp_path / "a", prepared()
    save_trainable(trained(), path)
    data = path.read_bytes()
    assert data.count(b" " * 8) == 0  # no padding in which a flip would be harmless
    before = state(model)
    for at in [*range(0, 2000, 7), *range(2000, len(data), 401), len(data) - 1]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"damaged|not written by save_trainable"):
            load_trainable(model, path)
    for short in (b"", data[:7], data[:-1], data + b"0"):
        path.write_bytes(short)
        refused(load_trainable, model, path, "damaged")
    assert same(state(model), before)


def test_foreign_files_are_refused(tmp_path):
    save_file({"head.weight": torch.zeros(10, 16)}, tmp_path / "a")
    refused(load_trainable, prepared(), tmp_path / "a", "not written by save_trainable")
    torch.save(trained().state_dict(), tmp_path / "b")
    refused(load_trainable, prepared(), tmp_path / "b", "no safetensors file")
    refused(load_trainable, prepared(), tmp_path / "c", "No such file", FileNotFoundError)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_files(call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    save_trainable(trained(), tmp_path / "a")
    save_peft(trained(), tmp_path / "folder")
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    monkeypatch.setattr(os, call, full)
    for save, name in ((save_trainable, "a"), (save_peft, "folder")):
        with pytest.raises(OSError, match="No space"):
            save(trained(seed=3), tmp_path / name)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_is_no_file_of_ours_is_refused_in_a_sentence(tmp_path):
    save_peft(trained(), tmp_path / "folder")
    refused(load_trainable, prepared(), tmp_path / "folder", "is a folder: load_trainable reads a")
    weights = tmp_path / "folder" / "adapter_model.safetensors"
    refused(
        load_peft, tiny(), weights, "is a file: load_peft reads a folder, load_trainable a file"
    )
    refused(load_trainable, prepared(), weights, "not written by save_trainable")
    (tmp_path / "text").write_text("the rank is four, and so on")
    refused(load_trainable, prepared(), tmp_path / "text", "is damaged, or no safetensors file")
    (tmp_path / "folder" / "adapter_config.json").write_bytes(b'{"r": "\xff"}')
    refused(load_peft, tiny(), tmp_path / "folder", "adapter_config.json: .*utf-8")


def test_a_missing_folder_is_made(tmp_path):
    save_trainable(trained(), tmp_path / "runs" / "1" / "a.safetensors")
    save_peft(trained(), tmp_path / "runs" / "2" / "folder")
    load_trainable(prepared(), tmp_path / "runs" / "1" / "a.safetensors")
    load_peft(tiny(), tmp_path / "runs" / "2" / "folder")


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_of_another_dtype_is_refused_and_the_cure_works(there, tmp_path):
    here = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[there]
    model = trained(model=tiny(torch.float32)).to(there)
    save_trainable(model, tmp_path / "a")
    other = prepared(model=tiny(torch.float32), seed=2)
    match = (
        rf"is {there} in .*, but {here} in the model: load into a model of the file's dtype, and"
    )
    refused(load_trainable, copy.deepcopy(other).to(here), tmp_path / "a", match)
    load_trainable(other.to(there), tmp_path / "a")
    assert same(state(other.to(here)), state(model.to(here)))


def test_float32_adapters_of_a_cast_base_load_where_asked_for(tmp_path):
    save_trainable(trained(model=tiny(torch.float32), head=None), tmp_path / "a")
    model = prepared(model=tiny(torch.bfloat16), head=None)
    match = "belongs to another base: 'embed.position' differs; .* pass check_base=False if this is"
    refused(load_trainable, model, tmp_path / "a", match)
    load_trainable(model, tmp_path / "a", check_base=False)
    found = load_file(tmp_path / "a")
    assert same(adapter_state(model), found) and {t.dtype for t in found.values()} == {
        torch.float32
    }


# ---- what ran is what is saved


@pytest.fixture
def group(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "both": lambda model: compiled(AveragedModel(nn.DataParallel(model))),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_torchs_wrappers_are_seen_through(wrap, group, tmp_path):
    model, other, held = trained(), prepared(seed=2), prepared(seed=3)
    save_trainable(WRAPS[wrap](model), tmp_path / "a")
    load_trainable(other, tmp_path / "a")
    wrapped = WRAPS[wrap](held)
    load_trainable(wrapped, tmp_path / "a")
    inside = surgery.unwrapped(wrapped)
    assert same(state(other), state(model)) and same(state(inside), state(model))
    switch(wrapped, {"new": adapter_state(WRAPS[wrap](trained(seed=4)))}, "new")
    assert same(adapter_state(inside), adapter_state(trained(seed=4)))
    save_peft(WRAPS[wrap](model), tmp_path / "folder")
    base = tiny()
    with pytest.raises(ValueError, match="holds the model: load into the model in it, then wrap"):
        load_peft(WRAPS[wrap](base.requires_grad_()), tmp_path / "folder")
    load_peft(base, tmp_path / "folder")
    assert torch.equal(outputs(base), outputs(model))


class OwnParallel(nn.DataParallel):
    """Someone's own kind of torch's wrapper."""


WITHIN = {"compile": compiled, "DataParallel": OwnParallel, "checkpoint": checkpoint_wrapper}


@pytest.mark.parametrize("wrap", WITHIN)
@pytest.mark.parametrize("name", ["blocks.0", "head", "blocks.1.attention.q_proj"])
@pytest.mark.parametrize("save", [save_trainable, save_peft, lambda m, path: adapter_state(m)])
def test_a_wrapper_within_a_model_is_refused_and_the_cure_works(save, name, wrap, tmp_path):
    model, plain = trained(), trained()
    model.set_submodule(name, WITHIN[wrap](model.get_submodule(name)))
    with pytest.raises(ValueError, match=f"^'{name}' is a .* inside the model: put back") as told:
        save(model, tmp_path / "a")
    assert not [*tmp_path.iterdir()]
    exec(str(told.value).partition("holds, ")[2], {"model": model})
    save(model, tmp_path / "a")
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_module_that_is_called_module_is_no_wrapper(tmp_path):
    torch.manual_seed(0)
    base = nn.ModuleDict({"module": nn.Sequential(nn.ModuleDict({"module": nn.Linear(3, 3)}))})
    model = copy.deepcopy(frozen(base))
    inject.inject_lora(model, ["module.0.module"], r=2)
    save_peft(randomised(model), tmp_path)
    assert load_peft(base, tmp_path) == ["module.0.module"]
    assert same(adapter_state(base), adapter_state(model))


@pytest.mark.parametrize("save", [save_trainable, save_peft])
def test_disabled_adapters_are_not_saved(save, tmp_path):
    model = trained()
    name = "blocks.1.attention.v_proj"
    with surgery.adapters_disabled(model), pytest.raises(ValueError, match="save outside of adap"):
        save(model, tmp_path / "a")
    model.get_submodule(name).enabled = False
    with pytest.raises(ValueError, match=f"'{name}' is disabled, .* set its attribute enabled"):
        save(compiled(model), tmp_path / "a")
    assert not [*tmp_path.iterdir()]
    model.get_submodule(name).enabled = True
    save(model, tmp_path / "a")


NORMS = {
    "batch": lambda: nn.BatchNorm1d(5),
    "instance": lambda: nn.InstanceNorm1d(5, track_running_stats=True),
    "no affine": lambda: nn.BatchNorm1d(5, affine=False),
    "cumulative": lambda: nn.BatchNorm1d(5, momentum=None),
}


@pytest.mark.parametrize("way", ["save_trainable", "save_peft", "peft", "switch"])
@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_that_moved_in_a_loop_of_ones_own_travel(norm, way, tmp_path):
    torch.manual_seed(0)
    layers = nn.Linear(4, 10), nn.Unflatten(1, (5, 2)), NORMS[norm](), nn.Flatten()
    base = frozen(nn.Sequential(*layers, nn.Linear(10, 2)))
    model, other, x = copy.deepcopy(base), copy.deepcopy(base), torch.randn(8, 4) * 3 + 1
    inject.inject_lora(model, ["0", "4"], r=2)
    randomised(model).train()
    for _ in range(3):
        model(x)
    expected = model.eval()(x).detach()
    if way == "save_trainable":
        inject.inject_lora(other, ["0", "4"], r=2)
        save_trainable(model, tmp_path / "a")
        load_trainable(other, tmp_path / "a")
    elif way == "switch":
        inject.inject_lora(other, ["0", "4"], r=2)
        switch(other, {"a": adapter_state(model)}, "a")
    else:
        save_peft(model, tmp_path)
        if way == "peft":
            other = in_peft(peft.PeftModel.from_pretrained, other, tmp_path)
        else:
            load_peft(other, tmp_path)
    torch.testing.assert_close(other.eval()(x).detach(), expected)


def test_pefts_folder_lacks_statistics_unless_it_copies_their_module(tmp_path):
    torch.manual_seed(0)
    base, x = frozen(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))), torch.randn(3, 4)
    base[1].running_mean += 1
    config = peft.LoraConfig(r=2, target_modules=["0"])
    theirs = randomised(in_peft(peft.get_peft_model, copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path / "a")
    model = copy.deepcopy(base)
    load_peft(model, tmp_path / "a")
    torch.testing.assert_close(model(x), theirs(x))
    unfreeze(model[1])
    save_peft(model, tmp_path / "b")
    file = tmp_path / "b" / "adapter_model.safetensors"
    found = load_file(file)
    del found["base_model.model.1.running_mean"]
    save_file(found, file)
    refused(load_peft, base, tmp_path / "b", "running_mean' is not there in .*, but of shape")


class Counting(nn.Module):
    """A base that moves a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.lerp_(x.mean(0), 0.5 * self.training)
        return self.inner(x) - self.mean


def test_another_buffer_that_moved_is_told(tmp_path):
    torch.manual_seed(0)
    base = frozen(Counting())
    model, x = copy.deepcopy(base), torch.randn(3, 4)
    inject.inject_lora(model, ["inner"], r=2)
    model.train()(x)
    save_peft(model.eval(), tmp_path / "folder")
    save_trainable(model, tmp_path / "a")
    refused(load_peft, base, tmp_path / "folder", "belongs to another base: 'mean' differs; load")
    other = copy.deepcopy(base)
    inject.inject_lora(other, ["inner"], r=2)
    refused(load_trainable, other, tmp_path / "a", "belongs to another base: 'mean' differs; load")
    base.mean.copy_(model.mean)  # the cure: the base that it was saved from
    load_peft(base, tmp_path / "folder")
    assert torch.equal(base(x), model(x))


FOUR_BIT = {
    "LoftQ": lambda m: inject_loftq(m, [*QV, "fc1"], r=2),
    "QLoRA": lambda m: (quantize_layers(m, QV), inject.inject_lora(m, QV, r=2)),
}


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_a_folder_of_a_quantised_base_is_refused_on_the_original_weights(kind, tmp_path):
    original = tiny()
    model = copy.deepcopy(original)
    FOUR_BIT[kind](model)
    save_peft(randomised(model), tmp_path)
    match = "belongs to another base: 'blocks.0.attention.q_proj.weight' differs; load into the"
    refused(load_peft, original, tmp_path, match)
    for restore in (lambda m: None, dequantize_layers):  # the cure: the base it was saved from
        base = copy.deepcopy(model)
        surgery.unload(base)
        restore(base)
        load_peft(base, tmp_path)
        torch.testing.assert_close(outputs(base), outputs(model), rtol=1e-10, atol=1e-10)
    load_peft(original, tmp_path, check_base=False)
    assert same(adapter_state(original), adapter_state(model))


def test_a_trained_bias_leaves_the_codes_of_a_quantised_base_with_it(tmp_path):
    model = tiny()
    quantize_layers(model, QV)
    layer = model.blocks[0].attention.q_proj
    unfreeze(layer.bias)
    inject.inject_lora(model, ["k_proj"], r=2)
    assert {n for n in adapter_state(model) if "lora" not in n} == {
        "blocks.0.attention.q_proj.bias"
    }


def test_a_base_without_a_frozen_part_that_was_there_is_another(tmp_path):
    model = trained(head=None)
    model.extra = frozen(nn.Linear(2, 2))
    save_trainable(model, tmp_path / "a")
    save_peft(model, tmp_path / "folder")
    frozen_parts = r"belongs to another base: \d+ tensors were frozen, not \d+; load into the base"
    refused(load_trainable, prepared(head=None, seed=2), tmp_path / "a", frozen_parts)
    refused(load_peft, tiny(), tmp_path / "folder", frozen_parts)


def test_the_base_is_the_same_under_adapters_wrappers_and_flags(tmp_path):
    save_peft(trained("dora"), tmp_path)
    for base in (tiny(), tiny().requires_grad_(), tiny().train()):
        load_peft(base, tmp_path)
    base = tiny()
    with torch.no_grad():
        base.head.bias.zero_()  # goes whole, so it is no part of the base
    load_peft(base, tmp_path)
    for spoil in (
        lambda m: m.norm.bias[0].add_(1e-15),
        lambda m: m.blocks[1].attention.q_proj.weight.mul_(1.5),
        lambda m: m.embed.position.copy_(m.embed.position.flip(0)),
    ):
        base = tiny()
        with torch.no_grad():
            spoil(base)
        refused(load_peft, base, tmp_path, "belongs to another base: '[a-z0-9_.]*' differs; load")


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3", "layer_norm", "adapter"])
def test_a_models_own_checkpoint_gives_the_model_to_a_twin_and_the_base_to_a_plain_one(
    method, tmp_path
):
    model = trained(method, bert(), ["query", "value"], head=None)
    model.save_pretrained(tmp_path)
    base = BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(outputs(base), outputs(bert()))
    twin = prepared(method, bert(), ["query", "value"], head=None, seed=2)
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(outputs(twin), outputs(model))


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_trainers_checkpoint_is_the_model(method, tmp_path):
    model = prepared(method, bert(), ["query", "value"], head=None)
    rows = [{"input_ids": torch.randint(3, 30, (7,)), "labels": i % 2} for i in range(8)]
    options = dict(save_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True)
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=1, learning_rate=0.1, **options)
    Trainer(model, arguments, train_dataset=rows).train()
    twin = prepared(method, bert(), ["query", "value"], head=None, seed=2)
    [checkpoint] = tmp_path.glob("checkpoint-*")
    twin.load_state_dict(load_file(checkpoint / "model.safetensors"))
    assert torch.equal(outputs(twin), outputs(model))
    assert not torch.equal(outputs(twin), outputs(bert()))


# ---- peft's folder


def cases(methods):
    return [
        pytest.param(base, method, norms if method == "layer_norm" else layers, head)
        for base, layers, norms, head in MODELS
        for method in methods
        if (method, base) != ("oft", gpt2)  # peft rotates no Conv1D
    ]


@pytest.mark.parametrize(("base", "method", "targets", "head"), cases(IN_PEFT))
def test_peft_computes_what_was_saved(base, method, targets, head, tmp_path):
    model = trained(method, base(), targets, head)
    save_peft(model, tmp_path / "new" / "folder")
    theirs = in_peft(peft.PeftModel.from_pretrained, base(), tmp_path / "new" / "folder")
    expected = outputs(model)
    assert not torch.allclose(expected, outputs(base()), atol=1e-3)
    torch.testing.assert_close(outputs(theirs), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs(theirs.merge_and_unload()), expected, rtol=1e-10, atol=1e-10)
    again = base()
    assert load_peft(again, tmp_path / "new" / "folder") == list(surgery.adapters(model))
    torch.testing.assert_close(outputs(again), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("base", "method", "targets", "head"), cases(CONFIGS))
def test_what_peft_saved_computes_the_same(base, method, targets, head, tmp_path):
    config = CONFIGS[method](targets, modules_to_save=[head] if head else None)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = base is gpt2
    theirs = in_peft(peft.get_peft_model, base(), config)
    randomised(theirs).save_pretrained(tmp_path)
    model, stream = base(), torch.get_rng_state()
    names = load_peft(model, tmp_path)
    assert names == list(surgery.adapters(model)) != [] and torch.equal(
        torch.get_rng_state(), stream
    )
    assert method != "rslora" or not [n for n in names if ".0." in n]
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-10, atol=1e-10)
    for name, p in model.named_parameters():
        assert p.requires_grad == (p in files._added(model)), name


class Suffixes(nn.Module):
    """Layers whose whole names end other layers' names."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.q2 = nn.ModuleDict({"q": nn.Linear(4, 4), "xq": nn.Linear(4, 4)})
        self.base = nn.Linear(4, 4)

    def forward(self, x):
        return self.base(self.q2["xq"](self.q2["q"](self.q(x))))


@pytest.mark.parametrize("feedforward", [False, True])
def test_only_the_adapted_layer_is_adapted_though_its_name_ends_others(feedforward, tmp_path):
    torch.manual_seed(0)
    base, x = frozen(Suffixes().double()), torch.randn(3, 4).double()
    model = copy.deepcopy(base)
    found = {name: model.get_submodule(name) for name in ("q", "q2.xq")}
    kind = {model.q: feedforward, model.q2["xq"]: not feedforward}
    surgery.replace(model, found, lambda b: IA3(b, feedforward=kind[b]))
    unfreeze(model.base)
    randomised(model)
    save_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == r"q|q2\.xq" and config["modules_to_save"] == ["base"]
    theirs = in_peft(peft.PeftModel.from_pretrained, copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-12, atol=1e-12)
    assert load_peft(base, tmp_path) == ["q", "q2.xq"]
    torch.testing.assert_close(base(x), model(x), rtol=0, atol=0)


def test_pefts_rules_for_ends_copies_and_mixed_kinds_of_layers_hold(tmp_path):
    torch.manual_seed(0)
    base, x = frozen(Suffixes().double()), torch.randn(3, 4).double()
    base.q = frozen(Conv1D(4, 4).double())  # so fan_in_fan_out is true, then false
    config = peft.IA3Config(
        target_modules=["q", "xq", "base"], feedforward_modules=["q"], modules_to_save=["base"]
    )
    theirs = randomised(in_peft(peft.get_peft_model, copy.deepcopy(base), config))
    theirs.save_pretrained(tmp_path / "a")
    model = copy.deepcopy(base)
    assert load_peft(model, tmp_path / "a") == ["q", "q2.q", "q2.xq"]  # xq ends with q
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)
    unfreeze(model.base)
    save_peft(model, tmp_path / "b")
    theirs = in_peft(peft.PeftModel.from_pretrained, base, tmp_path / "b")
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_whole_names_are_listed_and_values_cast_to_the_model(tmp_path):
    save_peft(trained(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"blocks.{i}.attention.{end}" for i in (0, 1) for end in QV]
    assert config["inference_mode"] is True and config["modules_to_save"] == ["head"]
    model, match = tiny(torch.bfloat16), "belongs to another base: .* pass check_base=False if"
    refused(load_peft, model, tmp_path, match)
    load_peft(model, tmp_path, check_base=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(model.blocks[0].attention.q_proj.lora_A, saved[KEY].float())
    assert torch.equal(model.head.weight, saved["base_model.model.head.weight"].bfloat16())


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_of_peft_loads_once_converted_and_not_before(rslora, tmp_path):
    config = peft.LoraConfig(r=2, init_lora_weights="pissa", use_rslora=rslora, target_modules=QV)
    start, before, after = (str(tmp_path / name) for name in ("start", "before", "after"))
    theirs = in_peft(peft.get_peft_model, tiny(torch.float32), config)  # not in float64
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(start)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    randomised(theirs).save_pretrained(before)
    expected = outputs(theirs)
    with pytest.warns(UserWarning, match="PiSSA changes the base weights"):
        theirs.save_pretrained(after, path_initial_model_for_weight_conversion=start)
    match = "init_lora_weights='pissa' may belong to a base that it changed: let peft save it"
    refused(load_peft, tiny(torch.float32), before, match)
    model = tiny(torch.float32)
    load_peft(model, after)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)


def two_methods():
    model = prepared(targets=["q_proj"])
    inject.inject_dora(model, ["v_proj"], r=4, dropout=0.1)
    return model


def two_projections():
    model = prepared("vera", targets=["q_proj"])
    inject.inject_vera(model, ["v_proj"], r=8)
    return model


def tied():
    model = prepared(model=gpt2(), targets=["c_attn"], head=None)
    unfreeze(model.lm_head)
    return model


def rooted():
    model = prepared()
    model.scale = nn.Parameter(torch.ones(1))
    return model


def doubled():
    model = prepared()
    model.blocks[0].head = frozen(nn.Linear(2, 2))
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: prepared("head alone"), "no adapter in TinyTransformer: save_trainable keeps"),
        (lambda: prepared("adapter"), "is a BottleneckAdapter of a Linear: peft has no such layer"),
        (lambda: prepared("bitfit"), "is a Tuned of a Linear: peft has no such layer"),
        (lambda: prepared("prompt"), "'embed' is a PromptTuning .*wrapper for models of transform"),
        (lambda: prepared("prefix"), "is a PrefixTuning .*wrapper for models of transformers"),
        (lambda: prepared("oft", gpt2(), ["c_attn"], None), "OFT of a Conv1D: peft has no such"),
        (two_methods, "v_proj' has use_dora=True, .*: peft's folder has one use_dora, so keep"),
        (two_projections, "v_proj' was injected apart, and peft's VeRA has one projection"),
        (lambda: unfrozen("blocks.1"), "cannot train 'blocks.1.*: an adapter is in or .*blocks.1"),
        (lambda: unfrozen("embed.position", targets=["project"]), "embed.position.* or .*'embed'"),
        (lambda: unfrozen("blocks.0.attention.q_proj.base"), "is in or around .*q_proj.base"),
        (rooted, "cannot train 'scale': an adapter is in or around 'the model itself'"),
        (tied, "'transformer.wte' shares a parameter, which peft's copy would untie"),
        (doubled, r"with \['head'\] peft would copy 'blocks.0.head', too: rename one"),
    ],
)
def test_what_peft_would_not_compute_is_not_saved(make, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        save_peft(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each method, with the metadata of another writer, whose fields may change."""
    root = tmp_path_factory.mktemp("folders")
    for method in IN_PEFT:
        save_peft(trained(method), root / method)
        file = root / method / "adapter_model.safetensors"
        save_file(load_file(file), file, {"format": "pt"})
    return root


def changed(folder, target, tensors=None, **fields):
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (target / "adapter_config.json").write_text(json.dumps(config))
    found = load_file(folder / "adapter_model.safetensors") | (tensors or {})
    found = {key: t for key, t in found.items() if t is not None}
    save_file(found, target / "adapter_model.safetensors", {"format": "pt"})
    return target


ASKED = [
    ("lora", dict(bias="all", new="on")),
    ("vera", dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 2})),
    ("lora", dict(layers_to_transform=0, layer_replication=[[0, 1]], trainable_token_indices=[1])),
    ("lora", dict(alora_invocation_tokens=[1], lora_bias=True, megatron_config={"a": 1})),
    ("lora", dict(layers_to_transform=[0], bias="lora_only", use_dora="y", use_qalora=True)),
    ("lora", dict(lora_alpha=float("inf"), init_lora_weights="olora", peft_type="LOHA")),
    ("lora", dict(lora_alpha=-1, init_lora_weights="eva", peft_type="PREFIX_TUNING")),
    ("lora", dict(target_modules=["nowhere"], init_lora_weights="loftq", peft_type=None)),
    ("lora", dict(target_modules=None, init_lora_weights="corda", fan_in_fan_out=True)),
    ("vera", dict(vera_dropout=0.1, save_projection=False, fan_in_fan_out=True)),
    ("oft", dict(coft=True, block_share=True, use_cayley_neumann=True, module_dropout=0.1, r=4)),
    ("ia3", dict(fan_in_fan_out=True, layers_pattern="a")),
    ("layer_norm", dict(bias="all")),
]


@pytest.mark.parametrize(("method", "fields"), ASKED)
def test_a_setting_that_is_not_computed_is_refused_by_name(folders, method, fields, tmp_path):
    for field, value in fields.items():
        folder = changed(folders / method, tmp_path / field, **{field: value})
        refused(load_peft, tiny(), folder, f"adapter_config.json: .*{field}")


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        *[("lora", {"r": r}) for r in ("4", 0, 4.0, 10**30)],
        *[("lora", {"rank_pattern": p}) for p in (["q_proj"], {"(": 2}, {"q_proj": "2"})],
        *[("lora", {"lora_alpha": alpha}) for alpha in ("16", 10**400)],
        *[("lora", {"target_modules": targets}) for targets in ("(", ["norm"], ["embed"])],
        ("lora", {"lora_dropout": 2.0}),
        ("vera", {"r": -1}),
        ("oft", {"oft_block_size": 5}),
    ],
)
def test_a_setting_without_sense_is_refused(folders, method, fields, tmp_path):
    folder = changed(folders / method, tmp_path / "f", **fields)
    refused(load_peft, tiny(), folder, "adapter_config.json: ")


def test_left_out_fields_have_pefts_defaults(folders, tmp_path):
    def without(method, field):
        folder = changed(folders / method, tmp_path / field)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        del config[field]
        path.write_text(json.dumps(config))
        return folder

    match = r"of shape \(4, 16\) in .* but of shape \(8, 16\)"
    refused(load_peft, tiny(), without("lora", "r"), match)
    match = "use_cayley_neumann=True: it is False here"
    refused(load_peft, tiny(), without("oft", "use_cayley_neumann"), match)
    model = tiny()
    load_peft(model, without("lora", "lora_alpha"))
    assert model.blocks[0].attention.q_proj.scaling == 8 / 4


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({KEY: None}, "lora_A.weight' is not there in .*, but of shape .* in the model"),
        ({KEY + "2": torch.zeros(1)}, "lora_A.weight2' is of shape .* but not there in the model"),
        ({BIAS: None}, "head.bias' is not there in"),
        ({KEY: torch.zeros(4, 15)}, r"is of shape \(4, 15\) in .*, but of shape \(4, 16\)"),
        ({KEY: torch.zeros(4, 16).long()}, "is torch.int64 in .* torch.float64 in the model"),
        ({KEY: torch.full((4, 16), float("nan"))}, "values that are no finite torch.float64"),
        ({BIAS: torch.full((10,), 1e6)}, "values that are no finite torch.float16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folders, tensors, match, tmp_path):
    model = tiny(torch.float16 if "float16" in match else torch.float64)
    refused(load_peft, model, changed(folders / "lora", tmp_path / "f", tensors), match)


def test_a_folder_with_missing_damaged_or_mixed_files_is_refused(tmp_path):
    save_peft(trained(), tmp_path / "a")
    config, weights = sorted((tmp_path / "a").iterdir())
    refused(load_peft, trained(), tmp_path / "a", "q_proj' has an adapter: load into the plain")
    text, data = config.read_text(), weights.read_bytes()
    config.write_text(text.replace('"lora_alpha": 16', '"lora_alpha": 32'))
    refused(load_peft, tiny(), tmp_path / "a", "not the one that adapter_model.safetensors was")
    for broken in ("[]", "{", "null"):
        config.write_text(broken)
        weights.write_bytes(data)
        save_file(load_file(weights), weights)
        refused(load_peft, tiny(), tmp_path / "a", "adapter_config.json: ")
    config.write_text(text)
    for at in [data.index(b'digest"'), *range(0, len(data), 203)]:
        weights.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"damaged|not there"):
            load_peft(tiny(), tmp_path / "a")
    weights.unlink()
    refused(load_peft, tiny(), tmp_path / "a", "adapter_model.safetensors", FileNotFoundError)
    torch.save({}, weights.with_suffix(".bin"))
    refused(load_peft, tiny(), tmp_path / "a", "holds a pickle, which can run code")
    refused(load_peft, tiny(), tmp_path / "b", "adapter_config.json", FileNotFoundError)


def test_a_tied_head_of_pefts_is_refused(tmp_path):
    config = peft.LoraConfig(
        target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True
    )
    with pytest.warns(UserWarning, match="tie"):
        theirs = in_peft(peft.get_peft_model, gpt2(), config)
        theirs.save_pretrained(tmp_path)
    refused(load_peft, gpt2(), tmp_path, "'lm_head' shares a parameter, which peft's copy would")


# ---- ranks, names, Auto classes


def test_ranks_and_alphas_that_differ_by_layer_go_and_come_back(tmp_path):
    model = tiny()
    inject.inject_lora(model, ["q_proj"], r=4, lora_alpha=4)
    inject.inject_lora(model, ["blocks.0.attention.v_proj"], r=2, lora_alpha=4)
    inject.inject_lora(model, ["blocks.1.attention.v_proj"], r=3, lora_alpha=9)
    inject.inject_lora(model, ["fc1"], r=2, lora_alpha=2, init="pissa")  # of rank 4 in the folder
    save_peft(randomised(model), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(config["rank_pattern"]) == {f"blocks.{i}.attention.v_proj" for i in (0, 1)}
    assert config["alpha_pattern"] == {"blocks.1.attention.v_proj": 9.0}
    theirs = in_peft(peft.PeftModel.from_pretrained, tiny(), tmp_path)
    again = tiny()
    load_peft(again, tmp_path)
    for loaded in (theirs, again):
        torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks", [(2, 3, 1), (2, 2, 1), (1, 2, 2), (3, 1, 2)])
def test_a_rank_is_that_of_the_named_layer_though_its_name_ends_others(ranks, tmp_path):
    torch.manual_seed(0)
    a, z, q = (nn.Linear(4, 4) for _ in range(3))
    parts = {"a": a, "z": nn.Sequential(OrderedDict(q=z)), "q": q}
    base, x = frozen(nn.Sequential(OrderedDict(parts)).double()), torch.randn(3, 4).double()
    model = copy.deepcopy(base)
    found = {name: model.get_submodule(name) for name in ("a", "z.q", "q")}
    rank = dict(zip(found.values(), ranks, strict=True))
    surgery.replace(model, found, lambda b: LoRA(b, rank[b], 3.0 * rank[b] ** 2))
    save_peft(randomised(model), tmp_path)
    theirs = in_peft(peft.PeftModel.from_pretrained, copy.deepcopy(base), tmp_path)
    load_peft(base, tmp_path)
    for loaded in (theirs, base):
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-12, atol=1e-12)


PATTERNS = [
    {"v_proj": 2},
    {r"blocks\.1\..*": 1, "q_proj": 3},
    {r"^blocks\.0\.attention\.q_proj": 2, "q_proj|v_proj": 5},
]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_ranks_and_alphas_are_read_by_pefts_rule(pattern, rslora, tmp_path):
    options = dict(rank_pattern=pattern, alpha_pattern={k: 7 * r for k, r in pattern.items()})
    config = peft.LoraConfig(r=4, target_modules=QV, use_rslora=rslora, **options)
    theirs = randomised(in_peft(peft.get_peft_model, tiny(), config))
    theirs.save_pretrained(tmp_path)
    model = tiny()
    load_peft(model, tmp_path)
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-10, atol=1e-10)
    assert hub_config._by_pattern("a+b", {"a+b": 1}, 2) == 1  # fits no expression, but is one key


@pytest.mark.parametrize("dora", [False, True])
def test_a_rank_above_a_layers_size_loads(dora, tmp_path):
    config = peft.LoraConfig(r=20, target_modules=["q_proj", "head"], use_dora=dora)
    theirs = randomised(in_peft(peft.get_peft_model, tiny(), config))
    theirs.save_pretrained(tmp_path / "a")
    model = tiny()
    load_peft(model, tmp_path / "a")
    torch.testing.assert_close(outputs(model), outputs(theirs), rtol=1e-10, atol=1e-10)
    save_peft(model, tmp_path / "b")
    again = tiny()
    load_peft(again, tmp_path / "b")
    assert same(adapter_state(again), adapter_state(model))


@pytest.mark.parametrize("r", [6, 9, 10])
def test_our_pissa_loads_again_where_twice_its_rank_exceeds_a_side(r, tmp_path):
    model = tiny()
    inject.inject_lora(model, ["head"], r=r, init="pissa")  # of shape (10, 16)
    save_peft(randomised(model), tmp_path)
    base = tiny()
    load_peft(base, tmp_path)
    torch.testing.assert_close(outputs(base), outputs(model), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_auto_classes_find_the_base_of_a_folder(method, tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    LlamaForCausalLM(LlamaConfig(vocab_size=30, **sizes)).save_pretrained(tmp_path / "base")
    base = frozen(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model = trained(method, copy.deepcopy(base), ["q_proj", "v_proj"], head=None)
    save_peft(model, tmp_path / "adapter")
    assert not torch.allclose(outputs(model), outputs(base), atol=1e-3)
    kinds = [peft.AutoPeftModel, peft.AutoPeftModelForCausalLM]
    for kind in [AutoModelForCausalLM] * (method == "lora") + kinds:
        read = in_quiet(kind.from_pretrained, tmp_path / "adapter").eval()
        torch.testing.assert_close(outputs(read), outputs(model))
    config = tmp_path / "adapter" / "adapter_config.json"  # written by hand, as people do
    fields = json.loads(config.read_text()) | {"task_type": "CAUSAL_LM", "revision": "main"}
    config.write_text(json.dumps(fields | {"base_model_name_or_path": "elsewhere"}))
    load_peft(base, tmp_path / "adapter")
    assert torch.equal(outputs(base), outputs(model))


def in_quiet(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args)


def test_a_model_of_ones_own_has_no_name_to_load_from(tmp_path):
    save_peft(trained(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert config["auto_mapping"]["base_model_class"] == "TinyTransformer"


def test_veras_projection_is_not_rounded_on_a_half_precision_base(tmp_path):
    save_peft(trained("vera", tiny(torch.float32), head=None), tmp_path)
    model = tiny(torch.bfloat16)
    load_peft(model, tmp_path, check_base=False)
    found = load_file(tmp_path / "adapter_model.safetensors")
    kept = model.blocks[0].attention.q_proj.projection
    assert torch.equal(kept.A, found["base_model.vera_A"])
    assert torch.equal(kept.B, found["base_model.vera_B"])


def test_veras_projection_goes_and_is_read_under_both_keys(tmp_path):
    model = trained("vera")
    save_peft(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    found = load_file(file)
    for end in "AB":
        plain, old = f"base_model.vera_{end}", f"base_model.vera_{end}.default"
        assert torch.equal(found[plain], found[old])
    for leave in (".default", ""):
        ends = tuple(f"vera_{end}{leave}" for end in "AB")
        save_file({k: t for k, t in found.items() if not k.endswith(ends)}, file)
        base = tiny()
        load_peft(base, tmp_path)
        assert torch.equal(outputs(base), outputs(model))
