"""A linear layer that keeps its weight in NF4.

    y = x · Ŵᵀ + b        Ŵ = dequantize(weight), in ``compute_dtype``

An ordinary base layer: QLoRA is ``LoRALinear(NF4Linear.from_linear(linear), r, lora_alpha)``. Product and gradient are in
:mod:`reference.qlora.product`; the ``state_dict`` has the names and the bytes of bitsandbytes' ``Linear4bit`` (:mod:`reference.qlora.format`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reference.nf4 import check_packable
from reference.qlora.format import belongs, read_state, write_state
from reference.qlora.ops import nf4_product
from reference.qlora.product import SCALES_BLOCK, Layout, Packed, pack, unpack


class NF4Linear(nn.Module):
    """y = x · Ŵᵀ + b with the weight in NF4; made from a layer by :meth:`from_linear`, or empty, to load a ``state_dict`` into.

    Args:
        in_features, out_features, bias, device: as in ``nn.Linear``.
        block_size: weights that share a scale; a power of two, at least 2. Blocks run over the flattened weight.
        double_quant: keep the scales in 8 bits.
        compute_dtype: of the product. The input is cast to it and the output back to the input's dtype, under autocast too.
        dtype: what ``dequantize()`` returns: of the weight before it was quantized.

    Attributes:
        weight: the packed codes, uint8, ((n + 1) // 2, 1), a parameter without gradient.
        absmax, nested_absmax, offset: see :class:`reference.qlora.format.Packed`. Moving the layer moves them; no cast touches them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_packable(block_size)
        if not isinstance(compute_dtype, torch.dtype) or not compute_dtype.is_floating_point:
            raise TypeError(f"compute_dtype must be a floating dtype such as torch.bfloat16, got {compute_dtype!r}")
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.double_quant, self.compute_dtype, self.dtype = block_size, double_quant, compute_dtype, dtype
        layout, empty = self.layout, {"device": device}
        self.weight = nn.Parameter(torch.full(layout.packed_shape, 0x77, dtype=torch.uint8, **empty), requires_grad=False)  # zeros
        scales = torch.zeros(layout.blocks, dtype=torch.uint8 if double_quant else torch.float32, **empty)
        self.register_buffer("absmax", scales, persistent=False)
        self.register_buffer("nested_absmax", torch.zeros(-(len(scales) // -SCALES_BLOCK), **empty) if double_quant else None, False)
        self.register_buffer("offset", torch.zeros((), **empty) if double_quant else None, persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, **empty)) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, block_size: int = 64, double_quant: bool = True, compute_dtype: torch.dtype = torch.bfloat16
    ) -> NF4Linear:
        """Quantize a layer, on its device. ``linear`` stays as it is; its bias, never quantized, is shared.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, its weight not float32, float16 or bfloat16.
            ValueError: the weight is empty, on the meta device, or holds NaN or infinity; the block size is out of range.
        """
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise TypeError(f"linear must be an nn.Linear with a weight of floating numbers, got {linear!r}")
        if linear.weight.is_meta:
            raise ValueError("linear is on the meta device, where a weight has no values: load them first")
        layer = cls.from_weight(linear.weight, linear.bias, block_size, double_quant, compute_dtype)
        return layer.train(linear.training)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: nn.Parameter | None = None,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> NF4Linear:
        """The layer with this weight (out, in) and bias."""
        packed = pack(weight, block_size, double_quant)
        layer = cls(weight.shape[1], weight.shape[0], False, block_size, double_quant, compute_dtype, weight.dtype, device="meta")
        layer._hold(packed)
        layer.bias = bias
        return layer

    @property
    def layout(self) -> Layout:
        return Layout((self.out_features, self.in_features), self.block_size, self.dtype)

    @property
    def packed(self) -> Packed:
        return Packed(self.weight, self.absmax, self.nested_absmax, self.offset)

    def _hold(self, packed: Packed) -> None:
        self.weight = nn.Parameter(packed.weight, requires_grad=False)  # a new one: a graph may still need the old bytes
        self.absmax, self.nested_absmax, self.offset = packed.absmax, packed.nested_absmax, packed.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ, (out, in): level · scale as a float32 product, rounded once to ``dtype`` (default: the weight's own)."""
        return unpack(self.packed, self.layout, dtype or self.dtype)

    @torch.no_grad()
    def merge_delta(self, delta: Tensor) -> None:
        """Ŵ ← quantize(Ŵ + delta), computed in float32; delta: (out, in).

        Not lossless: an update smaller than half a step between levels is lost, and −delta does not bring the old codes back.

        Raises:
            ValueError: ``delta`` has another shape, or the sum holds NaN or infinity. The layer is then as it was.
        """
        if tuple(delta.shape) != self.layout.shape:
            raise ValueError(f"delta must have the weight's shape {self.layout.shape}, got {tuple(delta.shape)}")
        self._hold(pack(self.dequantize(torch.float32).add_(delta.to(self.weight.device)), self.block_size, self.double_quant))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"the input must hold floating numbers, got {x.dtype}")
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return nf4_product(x.to(self.compute_dtype), bias, self.packed, self.layout).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """``to``, ``half`` and the like: codes and scales follow to another device, and keep their dtype and so their bits."""
        kept = {name: tensor.detach() for name, tensor in vars(self.packed).items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                moved = old.to(new.device)
                setattr(self, name, nn.Parameter(moved, requires_grad=False) if name == "weight" else moved)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # weight and bias
        destination |= {f"{prefix}weight.{name}": tensor for name, tensor in write_state(self.packed, self.layout).items()}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        """The whole layer or, on any error, nothing of it. On the meta device it takes the tensors themselves."""
        start, weight, bias = f"{prefix}weight.", state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}bias")
        ours = {key for key in state_dict if key.startswith(start) and belongs(key.removeprefix(start))}
        entries = {key.removeprefix(start): state_dict[key] for key in ours}
        plain = {key: value for key, value in state_dict.items() if key not in ours}
        packed = None
        if weight is not None or entries:
            try:
                packed, dtype = read_state(weight, entries, self.layout, self.double_quant)
                if (bias is None) != (self.bias is None) and strict:
                    raise ValueError(f"it has {'no' if bias is None else 'a'} bias, and this layer has {'a' if bias is None else 'none'}")
                if bias is not None and self.bias is not None and bias.shape != self.bias.shape:
                    raise ValueError(f"bias must have shape {tuple(self.bias.shape)}, got {tuple(bias.shape)}")
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or 'the layer'}: {error}")
                return
            plain[f"{prefix}weight"] = packed.weight
        if self.weight.is_meta:
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(plain, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if packed is not None:
            scales = {name: getattr(packed, name) for name in ("absmax", "nested_absmax", "offset")}
            for name, tensor in scales.items():
                setattr(self, name, None if tensor is None else tensor.detach().to(self.weight.device, copy=True))
            self.dtype = dtype

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, compute_dtype={self.compute_dtype}"
        )
