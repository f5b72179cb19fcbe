"""The checks of unit 12, a file an exercise."""

from course.checks.instruction_tuning.borders import check as borders
from course.checks.instruction_tuning.collate import check as collate
from course.checks.instruction_tuning.fitting import check as fitting
from course.checks.instruction_tuning.novel import check as novel
from course.checks.instruction_tuning.targets import check as targets
from course.checks.instruction_tuning.tokens import check as tokens

__all__ = ["borders", "collate", "fitting", "novel", "targets", "tokens"]
