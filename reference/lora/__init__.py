"""Low-rank adaptation: begin at :mod:`reference.lora.layer`."""

from reference.lora.conv_embedding import LoRAConv2d, LoRAEmbedding, LoRALinear
from reference.lora.inject import (
    find_targets,
    inject_lora,
    lora_layers,
    lora_state_dict,
    merge_lora,
    replace_layers,
    trainable_parameters,
    wrapper_of,
)
from reference.lora.layer import LoRALayer

__all__ = [
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "find_targets",
    "inject_lora",
    "lora_layers",
    "lora_state_dict",
    "merge_lora",
    "replace_layers",
    "trainable_parameters",
    "wrapper_of",
]
