"""Double quantization: the scales of blockwise quantization, quantized in their turn.

A float32 scale for every 64 weights costs half a bit a weight. Scales are positive and close to
each other, so their mean is taken off and the rest is kept in 8 bits, with one float32 scale for
every 256 of them:

    absmax ≈ codebook[code] · absmax₂ + offset        offset = mean(absmax)
    32/64 = 0.5  →  8/64 + 32/(64·256) = 0.127 bits a weight

Codes index the signed 8-bit dynamic map: small numbers have many decades and few digits, large ones
many digits. Dettmers et al. 2023, "QLoRA", section 3; the map is from Dettmers 2015, "8-bit
approximations for parallelism in deep learning". Numbers follow bitsandbytes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from reference.blockwise import check_block_size, check_finite, midpoints
from reference.nf4 import NF4Tensor

DECADES = 7
CELLS = 65_536  # of the table that bitsandbytes' CPU path looks codes up in


@dataclass(frozen=True, eq=False)
class QuantizedScales:
    """What :func:`quantize_scales` keeps of (blocks,) scales.

    Attributes:
        codes: uint8, (blocks,): indices into :func:`dynamic_codebook`.
        absmax: float32, (ceil(blocks / block_size),): the scales' scales.
        offset: float32, no axes: the mean that was taken off.
        block_size: scales in a block; the last block may hold fewer.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    block_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offset; the codebook is the same for all, and not counted."""
        return self.codes.nbytes + self.absmax.nbytes + self.offset.nbytes

    def dequantize(self) -> Tensor:
        """As :func:`dequantize_scales`."""
        return dequantize_scales(self)


def dynamic_codebook() -> Tensor:
    """The signed 8-bit dynamic map: float32, 256 levels, sorted.

    For every decade 10⁻⁶ … 10⁰ the interval from a tenth to the whole of it is cut into 1, 2, 4 …
    64 equal parts, whose centres are levels, with both signs: 127 negative and 127 positive. Zero
    and one complete them, so the smallest level is −0.993 and the largest 1.
    """
    levels = [0.0, 1.0]
    for i in range(DECADES):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        centres = 10 ** (i - DECADES + 1) * midpoints(edges)  # (2^i,)
        levels += [*centres.tolist(), *(-centres).tolist()]
    return torch.tensor(levels).sort().values


_LEVELS = dynamic_codebook()
_BETWEEN = midpoints(_LEVELS.double())  # float64: midpoints of float32 levels are exact in it


def _check_scales(absmax: Tensor) -> None:
    if not isinstance(absmax, Tensor) or absmax.dtype != torch.float32:
        kind = str(absmax.dtype) if isinstance(absmax, Tensor) else type(absmax).__name__
        raise TypeError(f"absmax must be a float32 tensor, as quantize_nf4 gives, got {kind}")
    if absmax.ndim != 1 or absmax.numel() == 0:
        got = f"shape {tuple(absmax.shape)}"
        raise ValueError(f"absmax must be a vector of at least one scale, got {got}")


@torch.no_grad()
def quantize_scales(absmax: Tensor, block_size: int = 256) -> QuantizedScales:
    """Quantize scales to 8 bits around their mean, in blocks with a scale of their own.

    On a CPU a scaled value is first rounded to one of 65,536 evenly spaced points of [−1, 1] and
    then to the nearest level: bitsandbytes looks its code up in a table of that size there, which
    moves a value by at most 1.6e-5 of absmax₂. On CUDA, in both, the nearest level is taken at
    once.

    Args:
        absmax: float32, (blocks,).
        block_size: a power of two.

    Raises:
        TypeError: ``absmax`` is not a float32 tensor, ``block_size`` not an integer.
        ValueError: ``absmax`` is not a vector, is empty, holds NaN or infinity, or its sum
            overflows; ``block_size`` is out of range.
    """
    _check_scales(absmax)
    check_block_size(block_size)
    check_finite(absmax, "absmax", 1)
    offset = absmax.mean()
    if not torch.isfinite(offset):
        largest = f"its largest is {absmax.max():.3g}"
        raise ValueError(f"the sum of absmax overflows float32, {largest}: scale the weight down")
    centred = absmax - offset  # (blocks,)
    blocks = pad(centred, (0, -len(centred) % block_size)).view(-1, block_size)  # zeros at the end
    largest = blocks.abs().amax(1)  # (ceil(blocks / block_size),)
    scaled = (blocks * largest.reciprocal()[:, None]).view(-1)[: len(centred)]  # (blocks,)
    # Where the inverse is infinite, 0 · ∞ gets code 0, as in bitsandbytes.
    scaled = scaled.nan_to_num(-1).clamp(-1, 1)
    if scaled.device.type == "cpu":
        half = (CELLS - 1) / 2
        scaled = ((scaled + 1) * half + 0.5).floor().double() / half - 1
    codes = torch.bucketize(scaled.double(), _BETWEEN.to(scaled.device)).to(torch.uint8)
    return QuantizedScales(codes, largest, offset, block_size)


def dequantize_scales(q: QuantizedScales) -> Tensor:
    """codebook[code] · absmax₂ + offset: float32, (blocks,)."""
    levels = _LEVELS.to(q.codes.device)[q.codes.int()]  # (blocks,)
    scaled = levels * q.absmax.repeat_interleave(q.block_size)[: len(levels)]
    return scaled + q.offset


def double_quantize(q: NF4Tensor, block_size: int = 256) -> NF4Tensor:
    """``q`` with its scales in 8 bits; arguments and errors are those of :func:`quantize_scales`.

    The codes are shared.
    """
    return replace(q, scales=quantize_scales(q.absmax, block_size))


def bits_per_parameter(q: NF4Tensor, scales: QuantizedScales | None = None) -> float:
    """Bits that each weight takes, counted from the tensors: packed codes and scales.

    Args:
        q: a quantized weight.
        scales: counted in place of its own.

    Raises:
        ValueError: ``scales`` are not as many as the weight has blocks.
    """
    if scales is not None and len(scales.codes) != len(q.absmax):
        counts = (
            f"scales holds {len(scales.codes)} scales, but the weight has {len(q.absmax)} blocks"
        )
        raise ValueError(f"{counts}: quantize its own absmax")
    counted = q.scales if scales is None else scales
    return 8 * (q.packed.nbytes + counted.nbytes) / q.shape.numel()
