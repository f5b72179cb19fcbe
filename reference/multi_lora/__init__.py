"""Many adapters over one base: begin at :mod:`reference.multi_lora.layer`."""

from reference.multi_lora.combine import combine, combine_adapters, merged_update
from reference.multi_lora.factors import Adapter, Factors, bytes_of, factors_of, read_factors
from reference.multi_lora.layer import MultiLoRALinear
from reference.multi_lora.model import MultiLoRA
from reference.multi_lora.route import Route
from reference.multi_lora.rules import merge_tensors

__all__ = [
    "Adapter",
    "Factors",
    "MultiLoRA",
    "MultiLoRALinear",
    "Route",
    "bytes_of",
    "combine",
    "combine_adapters",
    "factors_of",
    "merge_tensors",
    "merged_update",
    "read_factors",
]
