"""The checks of unit 05: bits counted to the byte, the dynamic map, quantized scales, a weight read back, what the saving buys."""

from course.checks.double_quantization.bits import check as bits
from course.checks.double_quantization.budget import check as budget
from course.checks.double_quantization.dynamic import check as dynamic
from course.checks.double_quantization.restore import Stored
from course.checks.double_quantization.restore import check as restore
from course.checks.double_quantization.scales import check as scales

__all__ = ["Stored", "bits", "budget", "dynamic", "restore", "scales"]
