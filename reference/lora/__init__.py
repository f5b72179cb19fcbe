"""Low-rank adaptation: begin at :mod:`reference.lora.layer`."""

from reference.lora.conv_embedding import LoRAConv2d, LoRAEmbedding, LoRATransposed
from reference.lora.inject import inject_lora, merge_lora
from reference.lora.layer import LoRALayer, LoRALinear
from reference.lora.parameters import (
    adapter_parameters,
    lora_state_dict,
    thaw,
    trainable_parameters,
    trained_parts,
)
from reference.lora.replace import replace_layers
from reference.lora.targets import Targets, find_targets, lora_layers, wrapper_of
from reference.lora.trained import TrainedRows

__all__ = [
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRATransposed",
    "Targets",
    "TrainedRows",
    "adapter_parameters",
    "find_targets",
    "inject_lora",
    "lora_layers",
    "lora_state_dict",
    "merge_lora",
    "replace_layers",
    "thaw",
    "trainable_parameters",
    "trained_parts",
    "wrapper_of",
]
