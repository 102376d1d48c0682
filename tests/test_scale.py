"""Bytes counted on meta are those that a real step holds, and published figures come out of it."""

import math

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from helpers.peft import large, quantize_layers
from helpers.peft.large import adapt, build, count_activations, training_memory
from helpers.training import count_parameters, saved_bytes, stored_bytes

BLOCK = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}
SMALL = {
    "RoBERTa": lambda n=2: RobertaModel(RobertaConfig(num_hidden_layers=n, **BLOCK)),
    "GPT-2": lambda n=2: GPT2LMHeadModel(
        GPT2Config(n_layer=n, n_embd=64, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0)
    ),
    "Llama": lambda n=2: LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=n, num_key_value_heads=2, **BLOCK)
    ),
}
ROWS = {"batch": 2, "tokens": 24}


def tokens():
    return torch.randint(3, 100, tuple(ROWS.values()))


def real(name, technique, dtype=torch.float32, n=2):
    """A model with numbers, on the CPU, its tokens, and the tensors that are no activations."""
    model = adapt(SMALL[name](n).eval(), technique).to(dtype)
    x = tokens()
    return model, x, [*model.parameters(), *model.buffers(), x]


def checkpoint_lower(model):
    """Let all blocks but the last keep their inputs alone."""
    name, blocks = large._blocks(model)
    lower = [large._Checkpointed(block) for block in blocks[:-1]]
    model.set_submodule(name, nn.ModuleList([*lower, blocks[-1]]))


def test_nothing_is_allocated_drawn_or_printed(capfd):
    state = torch.get_rng_state()
    for name in large.MODELS:
        model = adapt(build(name), "LoRA on all linears, r=16")
        held = [*model.parameters(), *model.buffers()]
        before = dict(model.named_modules())
        assert count_activations(model) > count_activations(model, checkpointing=True)
        assert all(t.is_meta for t in held)
        assert list(map(id, model.modules())) == list(map(id, before.values()))
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "name, exact, published, unit",
    [
        ("RoBERTa-base", 124_645_632, 125, 1e6),  # Liu et al. 2019's release: roberta.base, 125M
        ("GPT-2", 124_439_808, 124, 1e6),  # the paper says 117M; its repository corrects that
        ("Llama-2 7B", 6_738_415_616, 6.7, 1e9),  # Touvron et al. 2023, arXiv:2302.13971, Table 2
        ("Llama-2 70B", 68_976_648_192, 69, 1e9),  # "70B", Touvron et al. 2023, arXiv:2307.09288
        ("GPT-3 175B", 174_604_259_328, 174.6, 1e9),  # Brown et al. 2020, Table D.1: 174,600 M
    ],
)
def test_totals_are_those_published(name, exact, published, unit):
    total = count_parameters(build(name)).total
    assert total == exact
    assert round(total / unit, len(str(published).partition(".")[2])) == published


@pytest.mark.parametrize(
    "name, L, d, kv, width",
    [
        ("RoBERTa-base", 12, 768, 768, 3072),
        ("Llama-2 7B", 32, 4096, 4096, 11_008),
        ("Llama-2 70B", 80, 8192, 1024, 28_672),
    ],
)
def test_trainable_parameters_follow_from_a_blocks_sizes(name, L, d, kv, width):
    by_hand = {
        "LoRA on q, v, r=8": L * (8 * (d + d) + 8 * (d + kv)),  # r (in + out) for each layer
        "(IA)3": L * (kv + kv + width),
        "VeRA on q, v, r=256": L * ((256 + d) + (256 + kv)),
    }
    for technique, count in by_hand.items():
        assert count_parameters(adapt(build(name), technique)).trainable == count, technique


@pytest.mark.parametrize("name, technique", large.PUBLISHED)
def test_trainable_counts_are_those_published(name, technique):
    published, _ = large.PUBLISHED[name, technique]
    assert count_parameters(adapt(build(name), technique)).trainable == published


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("technique", ["full fine-tuning", "LoRA on q, v, r=8", "BitFit", "(IA)3"])
@pytest.mark.parametrize("name", SMALL)
def test_activations_are_those_that_a_real_forward_pass_keeps(name, technique, checkpointing):
    if (name, technique) == ("Llama", "BitFit"):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no layer of that kind"):
            adapt(build("Llama-2 7B"), technique)
        return
    model, x, given = real(name, technique, n=5)
    if checkpointing:
        checkpoint_lower(model)
    kept = saved_bytes(lambda: large._loss(model, x), given=given)
    on_meta = adapt(build(lambda: SMALL[name](5)), technique)
    assert count_activations(on_meta, checkpointing=checkpointing, **ROWS) == kept


@pytest.mark.parametrize("name", SMALL)
def test_layers_extrapolate_exactly(name):
    model = adapt(build(lambda: SMALL[name](7)), "LoRA on all linears, r=16")
    counted = count_activations(model, **ROWS)
    x = torch.zeros(tuple(ROWS.values()), dtype=torch.long, device="meta")
    given = [*model.parameters(), *model.buffers(), x]
    assert saved_bytes(lambda: large._loss(model, x), given=given) == counted
    checkpoint_lower(model)
    kept = saved_bytes(lambda: large._loss(model, x), given=given)
    name, _ = large._blocks(model)
    model.set_submodule(
        name, nn.ModuleList(getattr(b, "block", b) for b in large._blocks(model)[1])
    )
    assert count_activations(model, checkpointing=True, **ROWS) == kept < counted


@pytest.mark.parametrize("technique", ["full fine-tuning", "LoRA on q, v, r=8"])
def test_activations_are_what_the_allocator_holds_after_a_forward_pass(technique):
    model, x, _ = real("Llama", technique)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = large._loss(model, x)
    held = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    counted = count_activations(adapt(build(SMALL["Llama"]), technique), **ROWS)
    assert held == counted + loss.nbytes


def test_the_loss_keeps_what_that_of_transformers_keeps():
    model, x, given = real("Llama", "full fine-tuning", torch.bfloat16)
    kept = saved_bytes(lambda: model(input_ids=x, labels=x, use_cache=False).loss, given=given)
    counted = count_activations(
        adapt(build(SMALL["Llama"]), "full fine-tuning").to(torch.bfloat16), **ROWS
    )
    # theirs has a row of 100 float32 and a label more in each sequence, the last token's
    assert kept == counted + len(x) * (100 * 4 + 8)


@pytest.mark.parametrize("recipe", [r for r in large.RECIPES if "NF4" not in r])
@pytest.mark.parametrize("name", SMALL)
def test_the_memory_model_equals_measured_bytes(name, recipe):
    technique, precision = large.RECIPES[recipe]
    model, x, given = real(name, technique, large.PRECISIONS[precision][0])
    output = []
    kept = saved_bytes(lambda: output.append(large._loss(model, x)), given=given)
    (output[0].pooler_output.sum() if name == "RoBERTa" else output[0]).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = [p if p.dtype == torch.float32 else p.detach().float() for p in trained]
    optimizer = torch.optim.Adam(masters)
    for master, p in zip(masters, trained, strict=True):
        master.grad = p.grad.float()
    optimizer.step()
    state = [t for of_one in optimizer.state.values() for key, t in of_one.items() if key != "step"]
    state += [master for master in masters if precision == "bfloat16"]
    parts = training_memory(SMALL[name], recipe, **ROWS)
    # Adam's float32 count of steps, 4 bytes for each tensor, is left out
    assert parts["optimiser state"] == sum(t.nbytes for t in state)
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    # beside bfloat16 the CPU's layer norm keeps mean and scale of a row in 2 bytes, a GPU's in 4;
    # the first norm, below all that LoRA trains, keeps nothing
    norms = sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    norms -= norms > 0 and technique != "full fine-tuning"
    less = 2 * 2 * norms * x.numel() if precision == "bfloat16" else 0
    assert parts["activations"] == kept + less
    assert parts["gradients"] == sum(p.dtype.itemsize * p.numel() for p in trained)


def test_nf4_shrinks_the_linear_weights_of_the_blocks_and_nothing_else():
    lora, qlora = (training_memory("Llama-2 7B", r) for r in list(large.RECIPES)[2:])
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    assert lora["weights"] - qlora["weights"] == math.floor(linear * (16 - bits) / 8)
    assert {k: lora[k] for k in list(lora)[1:]} == {k: qlora[k] for k in list(qlora)[1:]}
    assert round(bits, 3) == 4.127  # Dettmers et al. 2023, section 3: 0.127 bits for the constants


def test_qlora_on_a_real_4_bit_base_holds_what_is_counted():
    model = SMALL["Llama"]().eval().to(torch.bfloat16)
    layers = quantize_layers(model, large.LAYERS["llama"]["linear"])
    model = adapt(model, "LoRA on all linears, r=16").to(torch.bfloat16)  # as the recipe has it
    x = tokens()
    given = [*model.parameters(), *model.buffers(), x]
    parts = training_memory(SMALL["Llama"], "QLoRA, NF4 base", **ROWS)
    assert saved_bytes(lambda: large._loss(model, x), given=given) == parts["activations"]
    positions = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)  # not stored
    # a layer has a float32 more, its scales' mean, and in these small ones a step half used
    more = stored_bytes(model) - positions - parts["weights"]
    assert 0 <= more <= 8 * len(layers)


def test_memory_is_as_the_papers_print_it():
    # Rajbhandari et al. 2019, section 3.1: GPT-2 of 1.5B parameters, at least 24 GB for its states
    xl = lambda: GPT2LMHeadModel(GPT2Config(n_layer=48, n_embd=1600, n_head=25))  # noqa: E731
    parts = training_memory(xl, "full, bf16 mixed")
    total = count_parameters(build(xl)).total
    assert sum(parts.values()) - parts["activations"] == 16 * total
    assert 24e9 < 16 * total < 25e9
    # Hu et al. 2021, section 4.2: GPT-3 with LoRA holds 350 GB of weights
    assert round(training_memory("GPT-3 175B", "LoRA, bf16 base")["weights"] / 1e9) == 350
    # Dettmers et al. 2023, section 1: 65B parameters in less than 48 GB; 70B is a little more
    parts = training_memory("Llama-2 70B", "QLoRA, NF4 base", checkpointing=True)
    assert 36e9 < sum(parts.values()) < 48e9


def test_fewer_trained_layers_keep_less():
    def kept(technique):
        return count_activations(adapt(build("Llama-2 7B"), technique))

    assert kept("LoRA on q, v, r=8") < kept("LoRA on all linears, r=16") < kept("full fine-tuning")


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: build("GPT-4"), "no model is called 'GPT-4'; there are RoBERTa-base, GPT-2, Ll"),
        (lambda: adapt(build("GPT-2"), "DoRA"), "no technique is called 'DoRA'; there are full"),
        (
            lambda: training_memory("GPT-2", "LoRA"),
            "no recipe is called 'LoRA'; there are full",
        ),
        (
            lambda: adapt(build(lambda: BertModel(BertConfig(**BLOCK))), "LoRA on q, v, r=8"),
            "no family of models is called 'bert'; there are roberta, gpt2, llama",
        ),
        (
            lambda: training_memory(lambda: nn.Linear(2, 2), "full, float32"),
            "models is called 'Lin",
        ),
        (
            lambda: training_memory(lambda: SMALL["GPT-2"](1), "full, float32"),
            "1 block is too few: what a further one adds needs 2 or more",
        ),
        (lambda: training_memory("GPT-2", "full, float32", tokens=1025), "from 1 to .* 1024"),
        (lambda: training_memory("RoBERTa-base", "full, float32", tokens=513), "from 1 to .* 512"),
        (lambda: training_memory("GPT-2", "full, float32", batch=0), "batch=0 must be 1 or more"),
        (lambda: count_activations(SMALL["GPT-2"]()), "the model is on cpu; `build` puts it on m"),
    ],
)
def test_bad_input_is_refused_and_told_what_there_is(act, message):
    with pytest.raises(ValueError, match=message):
        act()
