"""A linear layer that keeps its weight in NF4.

    y = x · Ŵᵀ + b        Ŵ = dequantize(weight), in ``compute_dtype``

An ordinary base layer: QLoRA is ``LoRALinear(NF4Linear.from_linear(linear), r, lora_alpha)``.
Product and gradient are in :mod:`reference.qlora.product`; the ``state_dict`` has the names and the
bytes of bitsandbytes' ``Linear4bit`` (:mod:`reference.qlora.format`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reference.capability import half_dtype
from reference.nf4 import NF4Tensor, check_packable
from reference.qlora.format import check_bias, read_state, split, write_state
from reference.qlora.ops import nf4_product
from reference.qlora.product import PARTS, join, pack, parts, unpack, zeros


class NF4Linear(nn.Module):
    """y = x · Ŵᵀ + b with the weight in NF4.

    Made from a layer by :meth:`from_linear`, or empty, to load a ``state_dict`` into.

    Args:
        in_features, out_features, bias, device: as in ``nn.Linear``.
        block_size: weights that share a scale; a power of two, at least 2. Blocks run over the
            flattened weight.
        double_quant: keep the scales in 8 bits.
        compute_dtype: of the product. The input is cast to it and the output back to the input's
            dtype, under autocast too. Default: bfloat16, or float16 on a GPU that has none.
        dtype: what ``dequantize()`` returns: of the weight before it was quantized.

    Attributes:
        weight: the packed codes, uint8, ((n + 1) // 2, 1), a parameter without gradient.
        absmax: a scale for each block: float32, or uint8 codes where the scales are quantized too.
        nested_absmax, offset: of quantized scales, float32: (blocks of scales,) and no axes; else
            None. Moving the layer moves all four; no cast touches them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_packable(block_size)
        compute_dtype = compute_dtype or half_dtype(torch.device(device or "cpu"))
        if not isinstance(compute_dtype, torch.dtype) or not compute_dtype.is_floating_point:
            wanted = "a floating dtype such as torch.bfloat16"
            raise TypeError(f"compute_dtype must be {wanted}, got {compute_dtype!r}")
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.double_quant = block_size, double_quant
        self.compute_dtype, self.dtype = compute_dtype, dtype
        self.shape = torch.Size((out_features, in_features))
        codes, *scales = parts(zeros(self.shape, dtype, block_size, double_quant, device))
        self.weight = nn.Parameter(codes, requires_grad=False)
        for name, tensor in zip(PARTS[1:], scales, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> NF4Linear:
        """Quantize a layer, on its device.

        ``linear`` stays as it is; its bias, never quantized, is shared.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, its weight not float32, float16 or bfloat16.
            ValueError: the weight is empty, on the meta device, or holds NaN or infinity; the block
                size is out of range.
        """
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            wanted = "an nn.Linear with a weight of floating numbers"
            raise TypeError(f"linear must be {wanted}, got {linear!r}")
        if linear.weight.is_meta:
            raise ValueError("linear is on the meta device: load values into its weight first")
        layer = cls.from_weight(linear.weight, linear.bias, block_size, double_quant, compute_dtype)
        return layer.train(linear.training)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: nn.Parameter | None = None,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> NF4Linear:
        """The layer with this weight (out, in) and bias."""
        q = pack(weight, block_size, double_quant)
        compute = compute_dtype or half_dtype(weight.device)
        options = block_size, double_quant, compute, weight.dtype
        layer = cls(weight.shape[1], weight.shape[0], False, *options, device="meta")
        layer._hold(q)
        layer.bias = bias
        return layer

    @property
    def quantized(self) -> NF4Tensor:
        """The weight, made of the layer's own tensors."""
        tensors = self.weight, self.absmax, self.nested_absmax, self.offset
        return join(*tensors, self.shape, self.dtype, self.block_size)

    def _hold(self, q: NF4Tensor) -> None:
        codes, *scales = parts(q)
        self.weight = nn.Parameter(codes, requires_grad=False)  # new: a graph may need the old one
        self.absmax, self.nested_absmax, self.offset = scales

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ, (out, in): a float32 product rounded once to ``dtype`` (default: the weight's own)."""
        return unpack(self.quantized, dtype or self.dtype)

    @torch.no_grad()
    def merge_delta(self, delta: Tensor) -> None:
        """Ŵ ← quantize(Ŵ + delta), computed in float32; delta: (out, in).

        Not lossless: an update smaller than half a step between levels is lost, and −delta does not
        bring the old codes back.

        Raises:
            ValueError: ``delta`` has another shape, or the sum holds NaN or infinity. The layer is
                then as it was.
        """
        if delta.shape != self.shape:
            shapes = f"{tuple(self.shape)}, got {tuple(delta.shape)}"
            raise ValueError(f"delta must have the weight's shape {shapes}")
        total = self.dequantize(torch.float32).add_(delta.to(self.weight.device))  # (out, in)
        self._hold(pack(total, self.block_size, self.double_quant))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"the input must hold floating numbers, got {x.dtype}")
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return nf4_product(x.to(self.compute_dtype), bias, self.quantized).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """``to``, ``half`` and the like: codes and scales change their device, never their bits."""
        codes, *scales = (None if part is None else part.detach() for part in parts(self.quantized))
        super()._apply(fn, recurse)
        device = self.weight.device
        if self.weight.dtype != codes.dtype:
            self.weight = nn.Parameter(codes.to(device), requires_grad=False)
        for name, old in zip(PARTS[1:], scales, strict=True):
            if old is not None and getattr(self, name).dtype != old.dtype:
                setattr(self, name, old.to(device))
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # weight and bias
        entries = write_state(self.quantized)
        destination |= {f"{prefix}weight.{name}": tensor for name, tensor in entries.items()}

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """All of it or, on an error, nothing. On the meta device it takes the file's tensors."""
        weight, bias = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}bias")
        entries, plain = split(state_dict, f"{prefix}weight.")
        q = None
        if weight is not None or entries:
            try:
                q = read_state(weight, entries, self.quantized)
                check_bias(bias, self.bias, strict)
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.') or 'the layer'}: {error}")
                return
            plain[f"{prefix}weight"] = q.packed
        if self.weight.is_meta:
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        lists = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(plain, prefix, local_metadata, strict, *lists)
        if q is not None:
            for name, tensor in zip(PARTS[1:], parts(q)[1:], strict=True):
                if tensor is not None:
                    setattr(self, name, tensor.detach().to(self.weight.device, copy=True))
            self.dtype = q.dtype

    def extra_repr(self) -> str:
        options = "in_features", "out_features", "block_size", "double_quant", "compute_dtype"
        told = [f"{name}={getattr(self, name)}" for name in options]
        return ", ".join([*told[:2], f"bias={self.bias is not None}", *told[2:]])
