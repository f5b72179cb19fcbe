"""LoRA over a convolution, an embedding, a turned linear layer: the same s·B·A in other shapes.

A convolution is a linear layer on patches, an embedding one whose input is a one-hot vector; GPT-2
keeps the weights of its linear layers as (in, out). Scale, merging and errors are those of
:class:`reference.lora.layer.LoRALayer`; what is here is how A and B act and which shape ΔW has.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from reference.lora.layer import LoRALayer, LoRALinear
from reference.lora.weights import check_pissa, describe, is_transposed, refuse_pissa


class LoRAConv2d(LoRALayer):
    """y = W ∗ x + b + s · B ∗ (A ∗ dropout(x)).

    A is a k×k convolution to r channels, B a 1×1 convolution to the base's output channels. As
    matrices, A is (r × in·k·k) and B (out × r), so ΔW = s·B·A reshapes to the base's
    (out, in, k, k). In a grouped convolution A sees all input channels and B is grouped, as in
    peft; such an update does not fit the base's weight and can't be merged.

    Shapes: ``lora_A`` (r, in_channels, kh, kw), ``lora_B`` (out_channels, r / groups, 1, 1).
    """

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape_B = (base.out_channels, r // base.groups, 1, 1)
        return (r, base.in_channels, *base.kernel_size), shape_B

    @staticmethod
    def check_base(base: nn.Module, r: int, init: str) -> None:
        if not isinstance(base, nn.Conv2d):
            raise TypeError(f"base must be an nn.Conv2d, got {describe(base)}")
        if r % base.groups:
            words = f"a multiple of the convolution's groups ({base.groups})"
            raise ValueError(f"r must be {words}, got {r}")
        refuse_pissa(base, init)

    def down(self, x: Tensor) -> Tensor:
        base, x, padding = self.base, self.lora_dropout(x.to(self.lora_A.dtype)), self.base.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        return F.conv2d(x, self.lora_A, None, base.stride, padding, base.dilation)  # (…, r, h', w')

    def up(self, h: Tensor) -> Tensor:
        return F.conv2d(h, self.lora_B, groups=self.base.groups)  # (batch, out, h', w')

    def delta_weight(self) -> Tensor:
        """ΔW = s·B·A in the shape of the weight, (out, in, kh, kw).

        Raises:
            ValueError: the convolution is grouped.
        """
        if self.base.groups > 1:
            groups = f"{describe(self.base)} with groups={self.base.groups}"
            raise ValueError(f"the update of {groups} mixes the groups: it does not fit the weight")
        return super().delta_weight().view_as(self.base.weight)


class LoRAEmbedding(LoRALayer):
    """y = W[token] + s · B · A[:, token].

    Here A is zero and B is drawn from N(0, 1), as in peft: the column of a token that never occurs
    stays zero, and its row as it was. So ``init`` chooses nothing, and there is no input to drop.

    Shapes: ``lora_A`` (r, num_embeddings), ``lora_B`` (embedding_dim, r).
    """

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, base.num_embeddings), (base.embedding_dim, r)

    @staticmethod
    def check_base(base: nn.Module, r: int, init: str) -> None:
        if not isinstance(base, nn.Embedding):
            raise TypeError(f"base must be an nn.Embedding, got {describe(base)}")
        if base.max_norm is not None:
            words = "it rewrites its own weight in the forward and can't be frozen"
            raise ValueError(f"{describe(base)} has max_norm={base.max_norm}: {words}")
        refuse_pissa(base, init)

    def start(self) -> None:
        nn.init.normal_(self.lora_B)

    def down(self, ids: Tensor) -> Tensor:
        by_frequency, padding = self.base.scale_grad_by_freq, self.base.padding_idx
        return F.embedding(ids, self.lora_A.T, padding, scale_grad_by_freq=by_frequency)  # (..., r)

    def up(self, h: Tensor) -> Tensor:
        update = F.linear(h, self.lora_B)  # (..., embedding_dim)
        scale = getattr(self.base, "embed_scale", None)  # Gemma multiplies what it looks up
        return update if scale is None else update * scale

    def delta_weight(self) -> Tensor:
        """ΔW = (s·B·A)ᵀ in the shape of the weight, (num_embeddings, embedding_dim)."""
        return super().delta_weight().T


class LoRATransposed(LoRALinear):
    """LoRA over the ``Conv1D`` of transformers' GPT-2, which is linear: y = x·W + b, W (in, out).

    Shapes: those of :class:`LoRALinear`; only ΔW is turned.
    """

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, base.nx), (base.nf, r)

    @staticmethod
    def check_base(base: nn.Module, r: int, init: str) -> None:
        if not is_transposed(base):
            raise TypeError(f"base must be a Conv1D of transformers, got {describe(base)}")
        check_pissa(base, init)

    def matrix(self) -> Tensor:
        return self.base.weight.T

    def delta_weight(self) -> Tensor:
        """ΔW = (s·B·A)ᵀ in the shape of the weight, (in, out)."""
        return super().delta_weight().T
