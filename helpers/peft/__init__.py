"""Parameter-efficient fine-tuning: techniques, surgery, files, many adapters, four bits.

`helpers.peft.large` counts what large models need; it is imported apart, as it needs transformers.
"""

# fmt: off
from helpers.peft.arithmetic import (
    adapter_state, add, delta_weights, switch, task_vector, ties, weighted_sum
)
from helpers.peft.base import Adapter, is_conv1d, matrix
from helpers.peft.files import load_trainable, save_trainable
from helpers.peft.four_bits import (
    CODEBOOKS, Quantized, QuantizedLinear, dequantize, loftq, low_rank, normal_float, quantize
)
from helpers.peft.hub import load_peft, save_peft
from helpers.peft.inject import (
    inject_adapter, inject_bitfit, inject_dora, inject_ia3, inject_layer_norm, inject_lora,
    inject_oft, inject_prefix, inject_prompt, inject_vera
)
from helpers.peft.layers import BottleneckAdapter, IA3, OFT, PrefixTuning, PromptTuning, Tuned
from helpers.peft.lora import DoRA, ExpertLoRA, LoRA, Projection, VeRA
from helpers.peft.mixed import MixedBatch, serving_memory
from helpers.peft.product import add_low_rank
from helpers.peft.qlora import dequantize_layers, inject_loftq, quantize_layers
from helpers.peft.surgery import (
    adapters, adapters_disabled, find, merge, replace, unload, unwrapped
)
