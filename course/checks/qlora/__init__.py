"""The checks of unit 06: the gradient through packed weights, bytes of a quantized model, LoRA against QLoRA, merging, the 2 % rule."""

from course.checks.qlora.bytes_of_base import check as bytes_of_base
from course.checks.qlora.frozen import check as frozen
from course.checks.qlora.merges import check as merges
from course.checks.qlora.product import check as product
from course.checks.qlora.rule import check as rule

__all__ = ["bytes_of_base", "frozen", "merges", "product", "rule"]
