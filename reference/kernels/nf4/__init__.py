"""NF4 at the speed of the memory: quantize, dequantize, and a linear layer over four bits.

All three move little and compute little, so the floor is the time in which their bytes cross the
memory bus: 2 bytes for a bfloat16 weight and 0.5625 for its code and its share of a scale. Plain
torch writes every intermediate to memory and reads it back; one kernel keeps them in registers.
Then every instruction counts that is spent on a weight:

- quantize: fifteen comparisons become one. [−1, 1] is cut into equal cells, none of which holds two
  midpoints, so a value's cell says all of its code but whether the value lies above the cell's
  midpoint. bfloat16 has so few digits that two weights are quantized in one word
  (:mod:`reference.kernels.nf4.bfloat16`).
- dequantize: sixteen levels lie in sixteen banks of shared memory (or in the lanes of a warp),
  where any codes are looked up at once.
- linear: up to ``FUSED_ROWS`` rows the weight is read once and decoded on the way to the tensor
  cores, never written; scales come in after the products. For one row a table of pairs decodes two
  codes at a time, for a few rows bytes are permuted. With more rows the weight would be decoded
  again for each tile of them, which costs more than writing it out once and leaving the product to
  the library.

Same arguments and same numbers, bit for bit, as :mod:`reference.nf4`. Without a GPU they run in
Triton's interpreter (TRITON_INTERPRET=1).
"""

from reference.kernels.nf4.codes import dequantize_nf4, quantize_nf4
from reference.kernels.nf4.linear import FUSED_ROWS, linear_nf4

__all__ = ["FUSED_ROWS", "dequantize_nf4", "linear_nf4", "quantize_nf4"]
