"""The low-rank update beside a convolution and beside an embedding: the formula of :mod:`reference.lora_linear`, with other shapes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.lora_linear import LoRALayer, describe, product


class LoRAConv2d(LoRALayer):
    """A k×k convolution to r channels, shaped as the base's, then a 1×1 convolution to the base's output channels.

    As matrices, A is (r × in·k·k) and B (out × r), so ΔW = s·B·A reshapes to the base's (out, in, k, k). Shapes: ``lora_A``
    (r, in_channels, kh, kw), ``lora_B`` (out_channels, r / groups, 1, 1). In a grouped convolution A sees all input channels and
    B is grouped, as in peft; such an update does not fit the base's weight and can't be merged.
    """

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        if not isinstance(base, nn.Conv2d):
            raise TypeError(f"base must be an nn.Conv2d, got {describe(base)}")

    @classmethod
    def check(cls, base: nn.Module, r: int, *args, **kwargs) -> None:
        super().check(base, r, *args, **kwargs)
        if r % base.groups:
            raise ValueError(f"r must be a multiple of the convolution's groups ({base.groups}), got {r}")

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups, 1, 1)

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
        return (y + self._scaled(lambda h: F.conv2d(h, self.lora_B, groups=base.groups), h)).to(y.dtype)  # (batch, out, h', w')


class LoRAEmbedding(LoRALayer):
    """The row of a token gets s · B · A[:, token].

    Here A is zero and B is drawn from N(0, 1), as in peft: the column of a token that never occurs stays zero, and its row as it was.
    ``init`` and ``lora_dropout`` are there for one signature: ids can't be dropped, and this start is the only one. Shapes: ``lora_A``
    (r, num_embeddings), ``lora_B`` (embedding_dim, r).
    """

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        if not isinstance(base, nn.Embedding):
            raise TypeError(f"base must be an nn.Embedding, got {describe(base)}")
        if base.max_norm is not None:
            raise ValueError(
                f"{describe(base)} has max_norm={base.max_norm}: it rewrites its own weight in the forward and can't be frozen"
            )

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, base.num_embeddings), (base.embedding_dim, r)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def delta_weight(self) -> Tensor:
        return product(self.lora_B, self.lora_A, self.scaling).T  # (num_embeddings, embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        base, y = self.base, self.base(ids)
        if self.merged:
            return y
        h = F.embedding(ids, self.lora_A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse)  # (..., r)
        update = self._scaled(lambda h: F.linear(h, self.lora_B), h)  # (..., embedding_dim)
        if (embed_scale := getattr(base, "embed_scale", None)) is not None:  # Gemma multiplies what it looks up
            update = update * embed_scale
        return (y + update).to(y.dtype)
