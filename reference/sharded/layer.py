"""A linear layer in NF4 whose tensors can be dealt out by rows, and cast by nobody.

    weight   uint8 (out, in/2)           codes, two a byte               } dealt out by rows
    absmax   uint8 (out, in/block)       the scales' 8-bit codes         }
    nested   uint8 (4·(in·out/(block·256) + 1),)  the scales' scales and offset: on every rank

An engine that shards a parameter cuts it along its first axis. Here that axis is the layer's rows,
and a block of weights lies inside a row, so every rank holds whole rows with their scales. What is
left over, the scales' scales, is 1/2000 of the weight: it stays whole everywhere.

Everything is kept as *bytes*. An engine with a policy of mixed precision casts parameters that are
floating numbers, and a float32 scale in bfloat16 is another weight, without an error. Integers are
left alone. So float32 numbers lie here as four bytes each, and are read where they are needed.
The bytes of codes are those of :class:`reference.qlora.NF4Linear`, whose product this is.
"""

import torch
from torch import Tensor, nn

from reference.nf4 import NF4Tensor, check_packable
from reference.qlora.ops import nf4_product
from reference.qlora.product import join, pack, parts, unpack, zeros


class RowwiseNF4Linear(nn.Module):
    """y = x · Ŵᵀ + b with the weight in NF4, kept in rows of bytes; made of zeros.

    Args:
        in_features, out_features, bias, device: as in ``nn.Linear``.
        block_size: weights that share a scale; a power of two that divides ``in_features``.
        double_quant: keep the scales in 8 bits; else ``absmax`` holds four bytes for each.
        compute_dtype: of the product. The input is cast to it and the output back.
        dtype: of the weight before it was quantized, and of the bias.

    Raises:
        ValueError: ``block_size`` is no such number.
        TypeError: it is not an integer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_packable(block_size)
        if in_features % block_size:
            remedy = "a block would run over the end of a row: choose a smaller one"
            raise ValueError(f"block_size must divide {in_features}, got {block_size}; {remedy}")
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.double_quant = block_size, double_quant
        self.compute_dtype, self.dtype = compute_dtype, dtype
        self.shape = torch.Size((out_features, in_features))
        q = zeros(self.shape, dtype, block_size, double_quant, device)
        weight, absmax, nested = self._bytes(q)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.register_buffer("nested", nested)
        self.bias = None
        if bias:
            zero = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(zero, requires_grad=False)

    def _bytes(self, q: NF4Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors above, of a weight; no nested ones where its scales are float32."""
        codes, absmax, nested, offset = parts(q)
        weight = codes.view(self.out_features, -1)  # (out, in/2)
        absmax = absmax.view(torch.uint8).view(self.out_features, -1)  # (out, in/block · 1 or 4)
        if nested is not None:
            nested = torch.cat([nested, offset.view(1)]).view(torch.uint8)
        return weight, absmax, nested

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> None:
        """Take the values of ``weight``, (out, in), quantized on its device.

        Raises:
            TypeError: it is not float32, float16 or bfloat16.
            ValueError: it has another shape, or holds NaN or infinity.
        """
        if weight.shape != self.shape:
            shapes = f"{tuple(self.shape)}, got {tuple(weight.shape)}"
            raise ValueError(f"weight must have shape {shapes}")
        new = self._bytes(pack(weight, self.block_size, self.double_quant))
        for mine, value in zip((self.weight, self.absmax, self.nested), new, strict=True):
            if mine is not None:
                mine.copy_(value)

    @property
    def quantized(self) -> NF4Tensor:
        """The weight, made of views of the layer's own tensors, which must be whole here."""
        absmax, nested, offset = self.absmax.view(-1), None, None
        if self.double_quant:
            numbers = self.nested.view(torch.float32)
            nested, offset = numbers[:-1], numbers[-1]
        else:
            absmax = absmax.view(torch.float32)
        codes = self.weight.view(-1, 1)
        return join(codes, absmax, nested, offset, self.shape, self.dtype, self.block_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ, (out, in)."""
        return unpack(self.quantized, dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return nf4_product(x.to(self.compute_dtype), bias, self.quantized).to(x.dtype)

    def extra_repr(self) -> str:
        names = "in_features", "out_features", "block_size", "double_quant", "compute_dtype"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
