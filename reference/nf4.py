"""NF4: four bits a weight, levels at the quantiles of a normal distribution, two codes a byte.

Weights of a trained layer are close to normal, so levels are put where a normal variable is often
found: at evenly spaced quantiles, seven below zero, zero itself and eight above it, divided by the
largest:

    positive = Φ⁻¹(linspace(δ, ½, 9))[:8]      negative = −Φ⁻¹(linspace(δ, ½, 8))[:7]

with δ = 0.9677083 and not 1, because Φ⁻¹(1) is infinite. Zero is exact, so that padding and pruned
weights stay zero. Each block of 64 values is scaled by its largest absolute value
(:mod:`reference.blockwise`). Dettmers et al. 2023, "QLoRA", equation 4; the number δ is from
bitsandbytes, whose CPU path gives the same codes, scales and bytes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.special import ndtri
from torch import Tensor

from reference.arguments import check_integer
from reference.blockwise import (
    check_block_size,
    check_finite,
    check_tensor,
    midpoints,
    scale_blocks,
)

OFFSET = 0.9677083
# Values worked on at a time on a CPU: what is between input and output stays in a core's cache, and
# torch, which splits work from 32,768 values on, leaves each piece to one thread: threads that wait
# for each other at every step cost more than they save.
CHUNK = 28_672


def normal_float_codebook(bits: int = 4) -> Tensor:
    """The levels of a normal float, sorted: float32, 2^bits, from −1 to 1 with an exact zero.

    The probabilities are a float32 grid; a float64 grid gives levels that differ in the last places
    from those that everybody ships.

    Args:
        bits: 2 to 8. δ is the one of 4 bits for every width: the share of the outermost levels does
            not shrink with more of them.
    """
    check_integer("bits", bits, 2, 8)
    half = 2 ** (bits - 1)
    positive = ndtri(torch.linspace(OFFSET, 0.5, half + 1)[:-1].numpy())  # (half,), without Φ⁻¹(½)
    negative = -ndtri(torch.linspace(OFFSET, 0.5, half)[:-1].numpy())  # (half − 1,)
    levels = torch.tensor([*negative, 0.0, *positive]).sort().values
    return levels / levels.max()


NF4_CODEBOOK = normal_float_codebook()
_MIDPOINTS = midpoints(NF4_CODEBOOK).tolist()
_BYTE = torch.arange(256)
_LEVELS_OF_BYTE = torch.stack([NF4_CODEBOOK[_BYTE >> 4], NF4_CODEBOOK[_BYTE & 15]], 1)  # (256, 2)


class Scales(Protocol):
    """Scales in another form than float32: :class:`reference.double_quant.QuantizedScales`."""

    nbytes: int

    def dequantize(self) -> Tensor:
        """float32, (blocks,)."""


@dataclass(frozen=True, eq=False)
class NF4Tensor:
    """A weight of n values in (n + 1) // 2 bytes of codes, and a scale for every block.

    Attributes:
        packed: uint8, ((n + 1) // 2, 1), row-major; the first of two values is in the high four
            bits. bitsandbytes' layout.
        scales: float32, (blocks,), as :func:`quantize_nf4` gives them, or quantized in their turn.
        shape: the weight's.
        dtype: the weight's.
        block_size: values in a block; the last block may hold fewer.
    """

    packed: Tensor
    scales: Tensor | Scales
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    @property
    def absmax(self) -> Tensor:
        """The scales in float32, (blocks,)."""
        return self.scales if isinstance(self.scales, Tensor) else self.scales.dequantize()


def nearest_codes(scaled: Tensor) -> Tensor:
    """The code of the nearest level, the lower one on a midpoint: uint8, in ``scaled``'s shape.

    It is the number of midpoints below the value. Fifteen comparisons of a whole vector are faster
    than a binary search for each value.
    """
    codes = (scaled > _MIDPOINTS[0]).view(torch.uint8)
    for midpoint in _MIDPOINTS[1:]:
        codes += (scaled > midpoint).view(torch.uint8)
    return codes


def check_packable(block_size: int) -> None:
    """Raise unless ``block_size`` is a power of two, and at least 2."""
    check_block_size(block_size)
    if block_size < 2:
        problem = "a block of one value would share a byte with the next block"
        raise ValueError(f"block_size must be at least 2: {problem}")


@torch.no_grad()
def quantize_nf4(weight: Tensor, block_size: int = 64) -> NF4Tensor:
    """Quantize to NF4 in blocks of the flattened weight.

    Args:
        weight: any shape, often (out_features, in_features); float32, float16 or bfloat16; CPU or
            CUDA.
        block_size: a power of two, at least 2; bitsandbytes takes 32 to 4096.

    Raises:
        TypeError: ``weight`` is not a tensor of one of these dtypes, ``block_size`` not an integer.
        ValueError: ``weight`` is empty or holds NaN or infinity, ``block_size`` is out of range.
    """
    check_tensor(weight, "weight")
    check_packable(block_size)
    flat = weight.detach().reshape(-1)
    n = len(flat)
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(n // -block_size), device=flat.device)
    whole = max(CHUNK // block_size, 1) * block_size
    step = whole if flat.device.type == "cpu" else n  # a GPU wants all at once
    for start in range(0, n, step):
        scaled, scales = scale_blocks(flat[start : start + step], block_size)
        if len(scaled) % 2:
            scaled = torch.cat([scaled, scaled.new_zeros(1)])  # half a byte is left: code of zero
        codes = nearest_codes(scaled)
        packed[start // 2 :][: len(codes) // 2, 0] = codes[::2] << 4 | codes[1::2]
        absmax[start // block_size :][: len(scales)] = scales
    check_finite(absmax, "weight", block_size)
    return NF4Tensor(packed, absmax, weight.shape, weight.dtype, block_size)


@torch.no_grad()
def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """level · absmax in the weight's shape.

    The product is float32, then rounded once to ``dtype`` (default: the weight's own).
    """
    n, block_size, absmax = q.shape.numel(), q.block_size, q.absmax
    out = torch.empty(n, dtype=dtype or q.dtype, device=q.packed.device)
    # Two float32 levels side by side are moved as one number.
    pairs = _LEVELS_OF_BYTE.to(out.device).view(torch.int64).view(-1)  # (256,)
    whole = max(CHUNK // block_size, 1) * block_size
    step = whole if out.device.type == "cpu" else 2 * len(q.packed)
    for start in range(0, n, step):
        packed = q.packed.view(-1)[start // 2 : (start + step) // 2]
        values = pairs.index_select(0, packed.int()).view(torch.float32)
        values = values[: n - start]  # (up to step,): the last half byte may be unused
        scales = absmax[start // block_size :]
        full = len(values) // block_size
        blocks = values[: full * block_size].view(full, block_size)
        blocks *= scales[:full, None]
        if full * block_size < len(values):
            values[full * block_size :] *= scales[full]
        out[start : start + step] = values
    return out.view(q.shape)
