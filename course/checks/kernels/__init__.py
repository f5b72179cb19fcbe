"""The checks of unit 13: dequantize with masks, a race, bytes and time, a kernel that is right for one size only, a tiled shrink.

Kernels run in Triton's interpreter, with or without a GPU, under a trace of what each program touches: so the judge sees what values do
not show. Outputs hold NaN before, and every tensor lies in the middle of a larger one.
"""

from course.lab.kernel_trace import interpret

interpret()  # before any of these loads Triton

from course.checks.kernels.dequantize import check as dequantize  # noqa: E402
from course.checks.kernels.histogram import check as histogram  # noqa: E402
from course.checks.kernels.least_time import check as least_time  # noqa: E402
from course.checks.kernels.row_absmax import check as row_absmax  # noqa: E402
from course.checks.kernels.shrink import check as shrink  # noqa: E402

__all__ = ["dequantize", "histogram", "least_time", "row_absmax", "shrink"]
