"""The checks of unit 03: absmax and zero point, one scale a row, one a block, a bit budget, and values kept out of the scale.

Two right answers may round x / scale in different last places, so no value here lies next to the border between two codes: such values
are replaced by zero before the answer sees them. Zeros alone (a tensor, a row, a block) are tried only once ordinary values come back
right: a learner hears of one mistake at a time.
"""

from course.checks.blockwise_quantization.absmax import check as absmax
from course.checks.blockwise_quantization.affine import check as affine
from course.checks.blockwise_quantization.blocks import check as blocks
from course.checks.blockwise_quantization.budget import check as budget
from course.checks.blockwise_quantization.outliers import check as outliers
from course.checks.blockwise_quantization.rows import check as rows
from course.checks.blockwise_quantization.shared import TINY, transposed

__all__ = ["TINY", "absmax", "affine", "blocks", "budget", "outliers", "rows", "transposed"]
