"""Weight-only quantization of a whole model, in any of the formats that units 03 to 05 build, to see what it costs in quality.

*Simulated*: each linear layer's weight is quantized, decoded again and put back as an ordinary dense weight. It holds exactly the numbers
that a packed layer would compute with. Nothing gets smaller or slower; every format can be compared, whether or not there is a layer that
runs it, and a simulated model can be adapted, trained and merged like any other.
"""

import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reference.blockwise import dequantize_blockwise, fp4_codebook, int_codebook, quantize_blockwise
from reference.double_quant import dequantize_scales, quantize_scales
from reference.nf4 import NF4Tensor, dequantize_nf4, normal_float_codebook, quantize_nf4

_CODEBOOKS = {"FP4": fp4_codebook} | {f"INT{bits}": functools.partial(int_codebook, bits) for bits in (8, 4, 3, 2)}
_CODEBOOKS |= {f"NF{bits}": functools.partial(normal_float_codebook, bits) for bits in (3, 2)}
KINDS = ("INT8", "NF4", "NF4+DQ", "FP4", "INT4", "NF3", "INT3", "NF2", "INT2")


@torch.no_grad()
def round_trip(weight: Tensor, kind: str, block_size: int = 64, dtype: torch.dtype | None = None) -> Tensor:
    """``weight`` after quantizing and decoding, in its own shape and device.

    Args:
        kind: one of ``KINDS``. "NF4+DQ" is NF4 with double-quantized scales; the INTs are evenly spaced levels, symmetric around zero.
        dtype: what a packed layer would decode to, its compute dtype; the result has it too. Default: the weight's.

    Raises:
        ValueError: an unknown kind, or what the quantization refuses (NaN, a block size that is no power of two).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    dtype = dtype or weight.dtype
    if kind in _CODEBOOKS:
        return dequantize_blockwise(quantize_blockwise(weight, _CODEBOOKS[kind](), block_size), dtype)
    q = quantize_nf4(weight, block_size)
    if kind == "NF4+DQ":
        q = NF4Tensor(q.packed, dequantize_scales(quantize_scales(q.absmax)), q.shape, q.dtype, q.block_size)
    return dequantize_nf4(q, dtype)


def linears(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> Iterator[tuple[str, nn.Linear]]:
    """Name and module of every linear layer whose name does not end in one of ``skip``."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in skip:
            yield name, module


@torch.no_grad()
def quantize_in_place(
    model: nn.Module, kind: str, block_size: int = 64, skip: tuple[str, ...] = ("lm_head",), compute_dtype: torch.dtype | None = None
) -> list[str]:
    """Give every linear layer the weight that it would have in ``kind``; embeddings, norms and the output head stay as they are.

    Args:
        compute_dtype: see ``dtype`` of :func:`round_trip`; the weight then keeps its own dtype, which should be as wide or wider.

    Returns:
        The names of the layers, in the order of ``model.named_modules()``.

    Raises:
        ValueError: there is no linear layer, a weight can't be quantized (the message names it), or ``kind`` is unknown. Nothing is
            changed then.
    """
    found = dict(linears(model, skip))
    if not found:
        raise ValueError(f"model has no linear layer besides {', '.join(skip)}: there is nothing to quantize")
    decoded = {}
    for name, layer in found.items():
        try:
            decoded[name] = round_trip(layer.weight, kind, block_size, compute_dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, layer in found.items():
        layer.weight.copy_(decoded[name])
    return list(found)


def quantized_copy(
    model: nn.Module, kind: str, block_size: int = 64, skip: tuple[str, ...] = ("lm_head",), compute_dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of ``model`` after :func:`quantize_in_place`."""
    other = copy.deepcopy(model)
    quantize_in_place(other, kind, block_size, skip, compute_dtype)
    return other


def bits_per_weight(kind: str, block_size: int = 64, nested: int = 256) -> float:
    """Bits that one weight of a large layer takes, scales included.

    Args:
        nested: scales that share a second scale under double quantization.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return int(kind.removesuffix("+DQ")[-1]) + (8 / block_size + 32 / (block_size * nested) if kind == "NF4+DQ" else 32 / block_size)
