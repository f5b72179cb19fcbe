"""One adapter for all rows, where rows are few: an unmerged LoRA layer that generates.

    y += s·B·(A·x)      in two launches

Written with torch, the same takes a cast, two products, a scale and a sum, and each launch takes
longer to begin than to run. What :mod:`.grouped` must be told of the adapter and the rows is the
same for every token, so it is made once and found again.
"""

from functools import lru_cache

import torch
from torch import Tensor

from reference.kernels.multi_lora.grouped import add_updates
from reference.kernels.multi_lora.tables import TILES, Plan, Table

FEW = TILES[0]  # rows of one tile


@lru_cache(maxsize=4096)
def _table(
    a: int, b: int, r: int, scaling: float, dtype: torch.dtype, device: torch.device
) -> Table:
    """A table says where factors lie, so it is right for whatever lies there."""
    bits = torch.tensor(scaling, dtype=torch.float64).view(torch.int64).item()
    return Table(torch.tensor([[a, b, r, bits]], device=device), dtype, r, ())


@lru_cache(maxsize=64)
def _plan(rows: int, device: torch.device) -> Plan:
    return Plan([range(rows)], rows, 1, device)


def add_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> None:
    """y += s·B·(A·x), in place; dtypes as for :func:`.grouped.add_updates`.

    The first call of a layer puts its table on the device: in a CUDA graph it must be the second.

    Args:
        y, x: (n, out) and (n, in), contiguous.
        A, B: (r, in) and (out, r), contiguous.
    """
    table = _table(A.data_ptr(), B.data_ptr(), len(A), scaling, A.dtype, A.device)
    add_updates(y, x, table, _plan(len(x), x.device))
