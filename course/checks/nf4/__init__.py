"""The checks of unit 04: levels from quantiles, the nearest code, packing, restoring, occupancy, and one step of Lloyd's iteration.

Inputs are made so that two right answers can't differ by a rounding: ties are tested on levels that are multiples of 1/32, and
everywhere else no value lies next to a midpoint.
"""

from course.checks.nf4.dequantize import AS_MASK, looked_up
from course.checks.nf4.dequantize import check as dequantize
from course.checks.nf4.levels import check as levels
from course.checks.nf4.lloyd_step import check as lloyd_step
from course.checks.nf4.nearest import check as nearest
from course.checks.nf4.occupancy import check as occupancy
from course.checks.nf4.pack import check as pack

__all__ = ["AS_MASK", "dequantize", "levels", "lloyd_step", "looked_up", "nearest", "occupancy", "pack"]
