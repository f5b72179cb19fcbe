"""The checks of unit 00: bytes of a recipe, of an adapter, of a 4-bit base, of what an MLP keeps; which recipe, and how large a batch.

The worked answers are plain arithmetic, written apart from ``reference.memory``; its tests hold the two together.
"""

from course.checks.memory_budget.batch import check as batch
from course.checks.memory_budget.full import check as full
from course.checks.memory_budget.lora import check as lora
from course.checks.memory_budget.matching import check as matching
from course.checks.memory_budget.mlp import check as mlp
from course.checks.memory_budget.qlora import check as qlora
from course.checks.memory_budget.shared import Sizes

__all__ = ["Sizes", "batch", "full", "lora", "matching", "mlp", "qlora"]
