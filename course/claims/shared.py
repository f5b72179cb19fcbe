"""What the claims of several units need; it states nothing itself."""

import torch
from torch import Tensor, nn

from course.lab.live import SavedForBackward

GPU, CPU = "h100", "cpu"  # whose records the pages speak of, where they name no other device
UNITS = {"MB": 1e6, "GB": 1e9}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded numbers from N(0, 1)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept_by_autograd(layer: nn.Module, *inputs, forward=None, **named) -> int:
    """Bytes of the storages that the forward pass keeps, the layer's weights aside; ``forward`` is the layer's own unless it is given."""
    with SavedForBackward(layer) as saved:
        (forward or layer)(*inputs, **named)
    return saved.bytes
