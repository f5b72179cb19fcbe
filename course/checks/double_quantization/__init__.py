"""The checks of unit 05: bits counted to the byte, the dynamic map, quantized scales, a weight read back, what the saving buys."""

from course.checks.double_quantization.bits import bits_check as bits
from course.checks.double_quantization.budget import budget_check as budget
from course.checks.double_quantization.dynamic import dynamic_check as dynamic
from course.checks.double_quantization.restore import Stored
from course.checks.double_quantization.restore import restore_check as restore
from course.checks.double_quantization.scales import scales_check as scales

__all__ = ["Stored", "bits", "budget", "dynamic", "restore", "scales"]
