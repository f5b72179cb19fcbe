"""The checks of unit 02: a layer, merging, counting, injecting, convolutions, and a training run that does not learn."""

from course.checks.lora.conv_delta import check as conv_delta
from course.checks.lora.forward import check as forward
from course.checks.lora.inject import check as inject
from course.checks.lora.merge import check as merge
from course.checks.lora.parameter_count import check as parameter_count
from course.checks.lora.repair import check as repair

__all__ = ["conv_delta", "forward", "inject", "merge", "parameter_count", "repair"]
