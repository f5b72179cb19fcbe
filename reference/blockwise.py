"""Blockwise absmax quantization: a scale for every few values, and the nearest of a few levels.

A row-major tensor is cut into blocks of ``block_size`` values, the last one as short as it comes
out. Each block keeps its largest absolute value, and each value the index of the level that is
nearest to its share of it:

    absmax_b = max_{i in b} |x_i|        code_i = argmin_k |x_i / absmax_b − codebook_k|
    x̂_i = codebook[code_i] · absmax_b

An outlier spoils only its own block; smaller blocks cost more scales, 32/block_size bits per value.
The levels are free: evenly spaced integers, a small floating-point format, or quantiles
(:mod:`reference.nf4`). Dettmers et al. 2021, "8-bit optimizers via block-wise quantization".
Arithmetic follows bitsandbytes' CPU path step by step, so that codes are equal and not just close.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.arguments import check_integer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALLEST = 1e-38  # divisor of a block of zeros; its inverse is still finite in float32


@dataclass(frozen=True, eq=False)
class BlockwiseTensor:
    """What :func:`quantize_blockwise` keeps of a tensor.

    Attributes:
        codes: uint8, in the tensor's shape: indices into ``codebook``, one byte each (packing is
            another matter: :mod:`reference.nf4`).
        absmax: float32, (blocks,).
        codebook: float32, (levels,).
        block_size: values in a block; the last block may hold fewer.
        dtype: the tensor's.
    """

    codes: Tensor
    absmax: Tensor
    codebook: Tensor
    block_size: int
    dtype: torch.dtype

    @property
    def bits_per_value(self) -> float:
        """Bits of packed codes and of scales for each value."""
        bits = math.ceil(math.log2(len(self.codebook)))
        return bits + 8 * self.absmax.nbytes / self.codes.numel()


def check_tensor(x: Tensor, name: str) -> None:
    """Raise unless ``x`` is a tensor that holds values in one of ``DTYPES``."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        wanted = "a float32, float16 or bfloat16 tensor"
        raise TypeError(f"{name} must be {wanted}, got {kind}: convert it with .float()")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(x.shape)}: there is nothing to quantize")


def check_block_size(block_size: int) -> None:
    """Raise unless ``block_size`` is a positive power of two."""
    check_integer("block_size", block_size)
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a positive power of two such as 64, got {block_size}")


def check_finite(absmax: Tensor, name: str, block_size: int) -> None:
    """Raise if a block holds NaN or infinity: its absmax then does too."""
    bad = (~torch.isfinite(absmax)).nonzero()
    if len(bad):
        first = bad[0].item()
        values = f"values {first * block_size} to {(first + 1) * block_size - 1} in row-major order"
        raise ValueError(
            f"{name} holds NaN or infinite values, the first in block {first} ({values}): "
            "repair the tensor before it is quantized"
        )


def scale_blocks(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Every value's share of its block's largest, (n,), and those largest, (blocks,): float32.

    Whole blocks are multiplied by the float32 inverse of absmax, a short last block is divided, and
    has an absmax of at least 1e-38: two roundings that differ, in the way of bitsandbytes.
    """
    x = flat.float()
    full = len(x) // block_size * block_size
    blocks = x[:full].view(-1, block_size)  # (whole blocks, block_size)
    absmax = blocks.abs().amax(1)  # (whole blocks,)
    scaled = (blocks * absmax.clamp(min=SMALLEST).reciprocal()[:, None]).view(-1)  # (full,)
    if full < len(x):
        last = x[full:].abs().max().clamp(min=SMALLEST)
        scaled = torch.cat([scaled, x[full:] / last])  # (n,)
        absmax = torch.cat([absmax, last[None]])  # (blocks,)
    return scaled, absmax


def midpoints(levels: Tensor) -> Tensor:
    """Where the nearest of two neighbours changes, for sorted ``levels``: (len(levels) − 1,)."""
    return (levels[:-1] + levels[1:]) / 2


def quantize_blockwise(x: Tensor, codebook: Tensor, block_size: int) -> BlockwiseTensor:
    """The nearest level of ``codebook`` to every value's share of the largest in its block.

    A value exactly between two levels gets the lower level. Of equal levels, the first in the
    codebook is used.

    Args:
        x: any shape; float32, float16 or bfloat16; CPU or CUDA.
        codebook: 2 to 256 levels in any order, usually from −1 to 1. A scaled value beyond the
            outermost level gets that level.
        block_size: a power of two. Blocks run over the flattened tensor and don't stop at the end
            of a row.

    Raises:
        TypeError: ``x`` or ``codebook`` is no tensor of real numbers, ``block_size`` no integer.
        ValueError: ``x`` is empty or holds NaN or infinity; a codebook of the wrong shape or not
            finite; a block size out of range.
    """
    check_tensor(x, "x")
    check_block_size(block_size)
    if not isinstance(codebook, Tensor) or not codebook.is_floating_point():
        got = codebook.dtype if isinstance(codebook, Tensor) else repr(codebook)
        raise TypeError(f"codebook must be a tensor of real numbers, got {got}")
    if codebook.ndim != 1 or not 2 <= len(codebook) <= 256:
        got = tuple(codebook.shape)
        raise ValueError(f"codebook must be a vector of 2 to 256 levels, got shape {got}")
    if not torch.isfinite(codebook).all():
        raise ValueError("codebook holds NaN or infinite levels")
    codebook = codebook.detach().to(x.device, torch.float32)
    scaled, absmax = scale_blocks(x.detach().reshape(-1), block_size)
    check_finite(absmax, "x", block_size)
    levels, order = codebook.sort(stable=True)
    rank = torch.bucketize(scaled, midpoints(levels))  # (n,): midpoints below the value
    codes = order.to(torch.uint8)[rank]
    return BlockwiseTensor(codes.view(x.shape), absmax, codebook, block_size, x.dtype)


def dequantize_blockwise(q: BlockwiseTensor, dtype: torch.dtype | None = None) -> Tensor:
    """codebook[code] · absmax in the tensor's shape.

    The product is float32, then rounded once to ``dtype`` (default: the tensor's own).
    """
    levels = q.codebook[q.codes.view(-1).int()]  # (n,)
    scales = q.absmax.repeat_interleave(q.block_size)[: len(levels)]  # (n,)
    return (levels * scales).to(dtype or q.dtype).view(q.codes.shape)


def int_codebook(bits: int) -> Tensor:
    """Signed integers over the largest: −m/m, …, 0, …, m/m with m = 2^(bits−1) − 1, float32.

    One bit pattern stays unused: with it, −1 and 1 would not both be levels, or zero would be none.

    Args:
        bits: 2 to 8.
    """
    check_integer("bits", bits, 2, 8)
    largest = 2 ** (bits - 1) - 1
    return torch.arange(-largest, largest + 1, dtype=torch.float32) / largest


def fp4_codebook() -> Tensor:
    """bitsandbytes' four-bit float by bit pattern s·ee·m, over its largest value 12: 16 levels.

    Value ±(1 + m/2)·2^(4 − e); where e = 0, ±m/16; float32, not sorted. The exponent counts *down*,
    zero comes twice, 1/16 is far below the next level, 2: this is neither IEEE's nor OCP's E2M1.
    """
    magnitudes = [0, 1 / 16, *((1 + m / 2) * 2 ** (4 - e) for e in (1, 2, 3) for m in (0, 1))]
    positive = torch.tensor(magnitudes) / max(magnitudes)  # (8,)
    return torch.cat([positive, 0 - positive])  # 0 − 0 is 0, while −(0) would be −0


def mean_absolute_error(x: Tensor, restored: Tensor) -> float:
    """Mean of |x − x̂|, in the unit of x."""
    return _difference(x, restored).abs().mean().item()


def relative_rmse(x: Tensor, restored: Tensor) -> float:
    """√(Σ (x − x̂)² / Σ x²): 0.1 is an error with a tenth of the signal's root mean square."""
    error, size = _difference(x, restored).norm(), x.detach().double().norm()
    if size == 0:
        raise ValueError("x is all zeros: an error relative to it has no meaning")
    return (error / size).item()


def signal_to_noise(x: Tensor, restored: Tensor) -> float:
    """10·log₁₀(Σ x² / Σ (x − x̂)²) in decibels; infinite without an error."""
    relative = relative_rmse(x, restored)
    return -20 * math.log10(relative) if relative else math.inf


def _difference(x: Tensor, restored: Tensor) -> Tensor:
    if x.shape != restored.shape:
        shapes = f"{tuple(x.shape)} and {tuple(restored.shape)}"
        raise ValueError(f"x and restored must have one shape, got {shapes}")
    return x.detach().double() - restored.detach().double()
