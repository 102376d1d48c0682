"""What training a large model costs, counted without the model: parameters and bytes.

Models are built from their configurations on torch's meta device, whose tensors have a shape and a
type and hold no numbers: 175 billion parameters take no memory and no download.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from helpers.peft.base import is_conv1d
from helpers.peft.inject import inject_bitfit, inject_ia3, inject_lora, inject_vera
from helpers.training import count_parameters, freeze, saved_bytes, unfreeze

# GB of 10^9 bytes. A card sold as 24 GB has up to 7 % more: the driver and the allocator use it
BUDGETS = (8, 24, 80)

# NF4 keeps 4 bits a weight, one 8-bit scale for each 64 weights, and for each 256 scales one
# float32 (Dettmers et al. 2023, section 3, "double quantization", arXiv:2305.14314)
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def _llama(layers, d, *, width, kv_heads):  # heads of 128, 32,000 tokens by default
    heads = {"num_attention_heads": d // 128, "num_key_value_heads": kv_heads}
    sizes = {"num_hidden_layers": layers, "hidden_size": d, "intermediate_size": width}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=4096, **sizes, **heads))


MODELS = {  # name: a function without arguments that builds the model
    "RoBERTa-base": lambda: RobertaModel(  # the encoder with its pooler; a task adds a small head
        RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1)
    ),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config()),
    "Llama-2 7B": lambda: _llama(32, 4096, width=11_008, kv_heads=32),
    "Llama-2 70B": lambda: _llama(80, 8192, width=28_672, kv_heads=8),
    "GPT-3 175B": lambda: GPT2LMHeadModel(  # GPT-3's sparse attention has the same parameters
        GPT2Config(n_layer=96, n_embd=12_288, n_head=96, n_positions=2048)
    ),
}

# Ends of names in a block, the feed-forward's second layer last. GPT-2 computes q, k and v in one
# layer of shape (d, 3 d): LoRA has r d + 3 d r parameters on it, as on a q and a v, 2 (r d + d r)
LAYERS = {
    "roberta": {
        "q, v": ["query", "value"],
        "k, v": ["key", "value"],
        "linear": ["query", "key", "value", "intermediate.dense", "output.dense"],
    },
    "gpt2": {"q, v": ["c_attn"], "k, v": ["c_attn"], "linear": ["c_attn", "c_fc", "c_proj"]},
    "llama": {
        "q, v": ["q_proj", "v_proj"],
        "k, v": ["k_proj", "v_proj"],
        "linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
}


def _ia3(model):
    end = f".{_layers(model, 'linear')[-1]}"  # some attention has a layer of that name as well
    last = [n for n, _ in model.named_modules() if n.endswith(end) and "att" not in n]
    inject_ia3(model, _layers(model, "k, v"), feedforward=last)


TECHNIQUES = {  # name: a function of a frozen model; BitFit refuses Llama, which has no biases
    "full fine-tuning": unfreeze,
    "LoRA on all linears, r=16": lambda m: inject_lora(m, _layers(m, "linear"), r=16),
    "LoRA on q, v, r=8": lambda m: inject_lora(m, _layers(m, "q, v"), r=8),
    "VeRA on q, v, r=256": lambda m: inject_vera(m, _layers(m, "q, v"), r=256),
    "(IA)3": _ia3,
    "BitFit": inject_bitfit,
}

PUBLISHED = {  # trained parameters, and where they are printed
    ("RoBERTa-base", "LoRA on q, v, r=8"): (294_912, "0.3M, Hu et al. 2021, Table 2"),
    ("Llama-2 7B", "LoRA on q, v, r=8"): (4_194_304, "4,194,304, torchtune's docs"),
    ("Llama-2 7B", "LoRA on all linears, r=16"): (39_976_960, "39,976,960, by peft"),
    ("GPT-3 175B", "LoRA on q, v, r=8"): (37_748_736, "37.7M, Hu et al. 2021, Table 4"),
}

# The type that the model runs in, adapters included (by default ours are float32 on a base in half
# precision, and then keep float32 inputs), and bytes of each trained parameter's gradient and
# optimiser state. Adam keeps two float32 moments and, beside bfloat16 weights, a float32 copy of
# these: 16 bytes in all either way (Rajbhandari et al. 2019, section 3.1, arXiv:1910.02054)
PRECISIONS = {
    "float32": (torch.float32, 4, 8),
    "bfloat16": (torch.bfloat16, 2, 12),
    "NF4": (torch.bfloat16, 2, 12),  # the base's linear weights are stored in it, nothing computed
}

RECIPES = {  # name: technique and precision
    "full, float32": ("full fine-tuning", "float32"),
    "full, bf16 mixed": ("full fine-tuning", "bfloat16"),
    "LoRA, bf16 base": ("LoRA on all linears, r=16", "bfloat16"),
    "QLoRA, NF4 base": ("LoRA on all linears, r=16", "NF4"),
}


def build(model):
    """Build a model on the meta device, in eval mode: dropout keeps nothing.

    Parameters
    ----------
    model : str or callable
        A key of `MODELS`, or a function without arguments that returns the model.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If no model has that name.
    """
    make = model if callable(model) else _look_up(MODELS, model, "model")
    with torch.device("meta"):
        return make().eval()


def adapt(model, technique):
    """Freeze a model and make a technique's parameters trainable in it.

    Parameters
    ----------
    model : nn.Module
        Of a family in `LAYERS`. Changed in place.
    technique : str
        A key of `TECHNIQUES`.

    Returns
    -------
    nn.Module
        The model, for `helpers.training.count_parameters`.

    Raises
    ------
    ValueError
        If there is no such technique, or none of its layers in the model.
    """
    function = _look_up(TECHNIQUES, technique, "technique")
    freeze(model)
    function(model)
    return model


def count_activations(model, *, batch=1, tokens=512, checkpointing=False):
    """Count what the model keeps for the backward pass: two blocks + (L - 2) x what a third adds.

    The model's own code runs, on shapes, with the next token's cross-entropy where it has logits.
    Attention counts as a fused kernel: it keeps q, k, v, its output and one float32 per row and
    head, no matrix of T x T. Temporary memory is not counted.

    With checkpointing a block keeps its input and runs again in the backward pass, so that one
    block at a time is there in full.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of a family in `LAYERS`, on the meta device, with L blocks that are alike, two or more.
    batch : int, default=1
    tokens : int, default=512
        Of each sequence.
    checkpointing : bool, default=False

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ValueError
        If the model is of another family, elsewhere, has one block, or fewer positions.

    References
    ----------
    Chen et al. (2016), section 4, arXiv:1604.06174 (checkpointing); Dao et al. (2022), section 3,
    arXiv:2205.14135 (attention).
    """
    _layers(model, "linear")  # refuses a model that it does not know
    if model.device.type != "meta":
        raise ValueError(f"the model is on {model.device}; `build` puts it on meta")
    config = model.config
    positions = config.max_position_embeddings - 2 * (config.model_type == "roberta")
    if batch < 1 or not 1 <= tokens <= positions:
        raise ValueError(f"{batch=} must be 1 or more, {tokens=} from 1 to the model's {positions}")
    name, blocks = _blocks(model)
    if len(blocks) < 2:
        raise ValueError(f"{len(blocks)} block is too few: what a further one adds needs 2 or more")
    AttentionInterface.register("fused", _fused_attention)
    model.set_attn_implementation("fused")
    x = torch.zeros(batch, tokens, dtype=torch.long, device="meta")  # (B, T)
    given, counts = [*model.parameters(), *model.buffers(), x], []
    lower = _Checkpointed(blocks[-1]) if checkpointing else blocks[-1]
    try:
        for n in (2, 3):
            model.set_submodule(name, nn.ModuleList([lower] * (n - 1) + [blocks[-1]]))
            counts.append(saved_bytes(lambda: _loss(model, x), given=given))
    finally:
        model.set_submodule(name, blocks)
    two, three = counts
    return two + (len(blocks) - 2) * (three - two)


def training_memory(model, recipe, **options):
    """Count the bytes of a training step, by what they are for.

    Parameters
    ----------
    model : str or callable
        As in `build`.
    recipe : str
        A key of `RECIPES`.
    **options : object
        `batch`, `tokens` and `checkpointing` of `count_activations`.

    Returns
    -------
    dict of str to int
        "weights", "gradients", "optimiser state" and "activations". Left out are temporary memory
        (in QLoRA one layer's weights at a time, dequantised), the CUDA context and fragmentation.

    Raises
    ------
    ValueError
        If there is no such model or recipe, or too few positions.
    """
    technique, precision = _look_up(RECIPES, recipe, "recipe")
    dtype, gradient, state = PRECISIONS[precision]
    model = adapt(build(model), technique).to(dtype)
    trained = count_parameters(model).trainable
    stored = {tensor.untyped_storage() for tensor in model.state_dict().values()}  # tied ones once
    weights = sum(storage.nbytes() for storage in stored)
    if precision == "NF4":  # embeddings, norms, biases and the head stay in bfloat16
        for layer in _blocks(model)[1].modules():
            if isinstance(layer, nn.Linear) or is_conv1d(layer):
                weights += math.ceil(layer.weight.numel() * NF4_BITS / 8) - layer.weight.nbytes
    return {
        "weights": weights,
        "gradients": gradient * trained,
        "optimiser state": state * trained,
        "activations": count_activations(model, **options),
    }


class _Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


def _fused_attention(module, q, k, v, mask, **options):
    """Attention by torch's fused CPU kernel, also on meta, where torch itself takes the T x T way.

    A registered function also spares transformers the mask, for which it looks into the numbers.
    """
    y, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)  # (B, H, T, d_head)
    return y.transpose(1, 2), None


def _loss(model, x):
    """Cross-entropy of the next token in float32; an encoder's output has no loss yet."""
    output = model(input_ids=x, use_cache=False)
    if "logits" not in output:
        return output
    logits = output.logits[:, :-1].float().flatten(0, 1)  # (B (T - 1), vocabulary)
    return F.cross_entropy(logits, x[:, 1:].flatten())


def _blocks(model):
    """Return the name of a model's stack of blocks, and the stack."""
    return next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))


def _layers(model, which):
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return _look_up(LAYERS, family, "family of models")[which]


def _look_up(table, name, what):
    if name not in table:
        raise ValueError(f"no {what} is called {name!r}; there are {', '.join(table)}")
    return table[name]
