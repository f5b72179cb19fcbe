"""The checks of unit 10: DoRA, IA³ merged, a prefix, P-tuning's numbers, AdapterFusion, and which method to choose."""

from course.checks.peft_family.choose import check as choose
from course.checks.peft_family.dora import check as dora
from course.checks.peft_family.encoder import check as encoder
from course.checks.peft_family.fusion import check as fusion
from course.checks.peft_family.merge import check as merge
from course.checks.peft_family.prefix import check as prefix

__all__ = ["choose", "dora", "encoder", "fusion", "merge", "prefix"]
