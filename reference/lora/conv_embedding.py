"""LoRA's three layers: linear, convolution, embedding.

Each adds s·B·A to what its frozen base does, and holds A and B where the base holds one weight. Arguments, merging and errors are those
of :class:`reference.lora.layer.LoRALayer`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.lora.layer import LoRALayer, describe, product
from reference.lora.mixed import add_update
from reference.lowrank import truncated_svd


class LoRALinear(LoRALayer):
    """y = W·x + b + s · B·A·dropout(x).

    The base is an ``nn.Linear``, or any layer with ``in_features``, ``out_features`` and a ``weight``. The weight may be packed: only
    the base's own forward reads it.

    Shapes: input (..., in_features), ``lora_A`` (r, in_features), ``lora_B`` (out_features, r).
    """

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, base.in_features), (base.out_features, r)

    @classmethod
    def check_base(cls, base: nn.Module, r: int, init: str) -> None:
        if not is_linear(base):
            raise TypeError(f"base must be a linear layer, with in_features, out_features and a weight; got {describe(base)}")
        if init == "pissa" and not base.weight.is_floating_point():
            raise TypeError(f"init='pissa' takes {describe(base)} apart, but it is kept as {base.weight.dtype}: apply it before quantizing")
        if init == "pissa" and not torch.isfinite(base.weight).all():
            raise ValueError(f"init='pissa': the weight of {describe(base)} holds NaN or infinity")

    def _start(self) -> None:
        if self.init != "pissa":
            return super()._start()
        B, A = truncated_svd(self.base.weight.to(self.lora_A.dtype), self.r)  # W ≈ B·A, the best of rank r
        self.lora_A.copy_(A / math.sqrt(self.scaling))
        self.lora_B.copy_(B / math.sqrt(self.scaling))
        self._add_to_base(-self.delta_weight())  # the base keeps the rest, so the output does not change

    def delta_weight(self) -> Tensor:
        return product(self.lora_B, self.lora_A, self.scaling)  # (out, in)

    def forward(self, x: Tensor) -> Tensor:
        A, B, y = self.lora_A, self.lora_B, self.base(x)
        if self.merged:
            return y
        if self._is_mixed(x):
            return add_update(y, x, A, B, self.scaling)  # the lines below, number for number, without keeping a wide copy of x
        h = F.linear(self.lora_dropout(x.to(A.dtype)), A)  # (..., r)
        update = self._scaled(lambda h: F.linear(h, B), h)  # (..., out)
        return (y + update).to(y.dtype)  # added in the wider dtype, rounded once

    def _is_mixed(self, x: Tensor) -> bool:
        """Half-precision input, wider factors, and nothing in between that needs the wide input: no dropout now, no autocast."""
        drops = self.lora_dropout.p > 0 and self.training
        return x.dtype.itemsize < self.lora_A.dtype.itemsize and not drops and not torch.is_autocast_enabled(x.device.type)


class LoRAConv2d(LoRALayer):
    """y = W ∗ x + b + s · B ∗ (A ∗ dropout(x)): a k×k convolution to r channels, then a 1×1 convolution to the base's output channels.

    As matrices, A is (r × in·k·k) and B (out × r), so ΔW = s·B·A reshapes to the base's (out, in, k, k). In a grouped convolution A sees
    all input channels and B is grouped, as in peft; such an update does not fit the base's weight and can't be merged.

    Shapes: ``lora_A`` (r, in_channels, kh, kw), ``lora_B`` (out_channels, r / groups, 1, 1).
    """

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups, 1, 1)

    @classmethod
    def check_base(cls, base: nn.Module, r: int, init: str) -> None:
        if not isinstance(base, nn.Conv2d):
            raise TypeError(f"base must be an nn.Conv2d, got {describe(base)}")
        if r % base.groups:
            raise ValueError(f"r must be a multiple of the convolution's groups ({base.groups}), got {r}")
        _refuse_pissa(base, init)

    def delta_weight(self) -> Tensor:
        if self.base.groups > 1:
            raise ValueError(
                f"the update of {describe(self.base)} with groups={self.base.groups} mixes the groups: it does not fit the weight"
            )
        return product(self.lora_B.flatten(1), self.lora_A.flatten(1), self.scaling).view_as(self.base.weight)  # (out, in, kh, kw)

    def forward(self, x: Tensor) -> Tensor:
        base, y = self.base, self.base(x)
        if self.merged:
            return y
        x, padding = self.lora_dropout(x.to(self.lora_A.dtype)), base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        h = F.conv2d(x, self.lora_A, None, base.stride, padding, base.dilation)  # (batch, r, h', w')
        update = self._scaled(lambda h: F.conv2d(h, self.lora_B, groups=base.groups), h)  # (batch, out, h', w')
        return (y + update).to(y.dtype)


class LoRAEmbedding(LoRALayer):
    """y = W[token] + s · B · A[:, token].

    Here A is zero and B is drawn from N(0, 1), as in peft: the column of a token that never occurs stays zero, and its row as it was. So
    ``init`` chooses nothing, and there is no input to drop.

    Shapes: ``lora_A`` (r, num_embeddings), ``lora_B`` (embedding_dim, r).
    """

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, base.num_embeddings), (base.embedding_dim, r)

    @classmethod
    def check_base(cls, base: nn.Module, r: int, init: str) -> None:
        if not isinstance(base, nn.Embedding):
            raise TypeError(f"base must be an nn.Embedding, got {describe(base)}")
        if base.max_norm is not None:
            raise ValueError(
                f"{describe(base)} has max_norm={base.max_norm}: it rewrites its own weight in the forward and can't be frozen"
            )
        _refuse_pissa(base, init)

    def _start(self) -> None:
        nn.init.normal_(self.lora_B)

    def delta_weight(self) -> Tensor:
        return product(self.lora_B, self.lora_A, self.scaling).T  # (num_embeddings, embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        base, y = self.base, self.base(ids)
        if self.merged:
            return y
        h = F.embedding(ids, self.lora_A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # (..., r)
        update = self._scaled(lambda h: F.linear(h, self.lora_B), h)  # (..., embedding_dim)
        if (embed_scale := getattr(base, "embed_scale", None)) is not None:  # Gemma multiplies what it looks up
            update = update * embed_scale
        return (y + update).to(y.dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` behaves as a linear layer does: ``in_features``, ``out_features`` and a ``weight``."""
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in ("in_features", "out_features", "weight"))


def _refuse_pissa(base: nn.Module, init: str) -> None:
    if init == "pissa":
        raise ValueError(f"init='pissa' is defined for linear layers only, got {describe(base)}: use 'kaiming' or 'gaussian'")
