"""LoRA over a base that is frozen in four bits: begin at :mod:`reference.qlora.quantize`."""

from reference.lora import merge_lora
from reference.qlora.dense import DenseReport, dense_report
from reference.qlora.layer import NF4Linear
from reference.qlora.merge import merge_errors, merge_into_dequantized, merge_into_original
from reference.qlora.quantize import quantize_linears

__all__ = [
    "DenseReport",
    "NF4Linear",
    "dense_report",
    "merge_errors",
    "merge_into_dequantized",
    "merge_into_original",
    "merge_lora",
    "quantize_linears",
]
