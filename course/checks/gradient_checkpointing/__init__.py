"""The checks of unit 08: segments, checkpoint, parameters without a gradient, Revolve's count, loss scaling, stochastic rounding."""

from course.checks.gradient_checkpointing.function import check as checkpoint
from course.checks.gradient_checkpointing.runs import check as runs
from course.checks.gradient_checkpointing.scaling import check as scaling
from course.checks.gradient_checkpointing.segments import check as segments
from course.checks.gradient_checkpointing.silent import check as silent
from course.checks.gradient_checkpointing.stochastic import check as stochastic

__all__ = ["checkpoint", "runs", "scaling", "segments", "silent", "stochastic"]
