"""LoRA: fine-tune a model through low-rank updates of some of its weights.

Fine-tuning changes a weight W by some ΔW. LoRA keeps W as it is and writes the change as a product
of two thin matrices, which are all that is trained:

    W' = W + ΔW,    ΔW = s · B · A,    s = α/r        A: (r × in), random    B: (out × r), zero

B = 0 makes ΔW = 0, so training begins at the pretrained model; A ≠ 0 gives B a gradient from the
first step. With r far below in and out the factors hold r·(in + out) numbers instead of in·out.
In training ΔW is never formed: the layer computes W·x + s·B·(A·x), from the right. Afterwards W'
is an ordinary weight, and merged into it the update costs nothing.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". rsLoRA, s = α/√r:
Kalajdzievski 2023. PiSSA, the factors taken from the top of W itself: Meng et al. 2024.
"""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.lora import generation
from reference.lora.base import Wrapper, add_to_weight, check
from reference.lora.mixed import add_update
from reference.lora.weights import check_linear, check_weight, describe
from reference.lowrank import truncated_svd


class LoRALayer(Wrapper):
    """y = W·x + b + s · B·A·dropout(x), over a frozen layer with the weight W.

    Args:
        base: the layer to adapt; frozen here. Its attributes are read through the adapter.
        r: rank, at least 1. Above the smaller side of the weight it adds nothing, and PiSSA, which
            takes r singular triples, refuses it.
        lora_alpha: α, above 0; the update is scaled by s = α/r.
        lora_dropout: probability, in [0, 1), of dropping an input of A; never one of the base.
        use_rslora: scale by s = α/√r, so that the update keeps its size as r grows.
        init: "kaiming" (A as ``nn.Linear`` draws its weight, uniform within ±1/√in, B zero),
            "gaussian" (A from N(0, 1/r²), B zero), "pissa" (linear layers only: the top r singular
            triples of W become s·B·A and leave the base, which keeps the rest).

    Attributes:
        base, lora_A, lora_B, the arguments, and scaling, the number s.
        merged: whether ΔW is inside the base's weight now.
        unmerged_weight: W while merged, where it is kept; else None. Not in the ``state_dict``.

    Raises:
        TypeError: the base or an argument is of another kind, or PiSSA meets a packed weight.
        ValueError: the base is wrapped already, computes its weight or has it on the meta device
            or, for PiSSA, holds NaN or infinity; an argument is out of range.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
    ):
        check(type(self), base, r, lora_alpha, lora_dropout, init)
        super().__init__()
        self.base = base.requires_grad_(False)
        r = int(r)  # numpy's integers are taken too
        self.r, self.lora_alpha, self.use_rslora, self.init = r, lora_alpha, use_rslora, init
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout)
        # float32 even beside a half-precision base: bfloat16 is too coarse for an optimizer's steps
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        shape_A, shape_B = self.factor_shapes(base, r)
        self.lora_A = nn.Parameter(torch.zeros(shape_A, dtype=dtype, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=dtype, device=base.weight.device))
        with torch.no_grad():
            self.start()
        self.merged = False
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.train(base.training)

    def start(self) -> None:
        """Give the factors, which are zero, their first values."""
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # this a gives ±1/√in

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        h, s = self.down(x), self.scaling
        # A power of two changes no digit wherever it multiplies, so it multiplies the thin h.
        update = self.up(h * s) if math.frexp(s)[0] == 0.5 else self.up(h) * s
        return (y + update).to(y.dtype)  # added in the wider dtype, rounded once

    @abstractmethod
    def down(self, x: Tensor) -> Tensor:
        """h = A·dropout(x): r channels, in the dtype of the factors."""

    @abstractmethod
    def up(self, h: Tensor) -> Tensor:
        """B·h, of the shape of the base's output."""

    # ---- merging

    def delta_weight(self) -> Tensor:
        """ΔW = s·B·A, (out, in): computed in float32 or wider, in the dtype of the factors."""
        A, B = self.lora_A.flatten(1), self.lora_B.flatten(1)  # a convolution's, as matrices
        wide = torch.promote_types(A.dtype, torch.float32)
        return ((B.to(wide) @ A.to(wide)) * self.scaling).to(A.dtype)

    @torch.no_grad()
    def merge(self, keep: bool = True) -> None:
        """W ← W + ΔW. From here on the forward is the base's own, and the factors are frozen.

        A base that stores its weight in its own way offers ``merge_delta(delta)``, which adds
        ``delta`` (out, in) to that weight; of such a weight nothing is kept.

        Args:
            keep: hold W for ``unmerge``, at the cost of the weight's bytes once more while merged.

        Raises:
            ValueError: merged already; ΔW or the sum holds NaN or infinity; the weight is computed
                or on the meta device.
            TypeError: the weight is packed and the base has no ``merge_delta``.
        """
        if self.merged:
            raise ValueError(f"{describe(self)} is merged already: merging again adds ΔW twice")
        check_weight(self.base)
        weight, own_way = self.base.weight, hasattr(self.base, "merge_delta")
        add_to_weight(self.base, self.delta_weight())
        self.unmerged_weight = weight.detach() if keep and not own_way else None
        self._set_merged(True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W back, to the bit: W' − ΔW would leave the roundings of two sums in it.

        A base with ``merge_delta`` has no W to put back: it gets −ΔW, which is not lossless.

        Raises:
            ValueError: not merged, or W was not kept.
        """
        if not self.merged:
            raise ValueError(f"{describe(self)} is not merged: there is no update to take out")
        if hasattr(self.base, "merge_delta"):
            add_to_weight(self.base, -self.delta_weight())
        elif self.unmerged_weight is None:
            raise ValueError(f"{describe(self)} kept no W: load the base's own weights again")
        else:
            self.base.weight = nn.Parameter(self.unmerged_weight, requires_grad=False)
        self.unmerged_weight = None
        self._set_merged(False)


class LoRALinear(LoRALayer):
    """LoRA over an ``nn.Linear``, or over what has its sizes and a ``weight``.

    That weight may be packed: only the base's own forward reads it. Input (..., in_features),
    ``lora_A`` (r, in_features), ``lora_B`` (out_features, r).
    """

    check_base = staticmethod(check_linear)

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, base.in_features), (base.out_features, r)

    def start(self) -> None:
        if self.init != "pissa":
            return super().start()
        W, root = self.matrix().to(self.lora_A.dtype), math.sqrt(self.scaling)
        B, A = truncated_svd(W, self.r)  # W ≈ B·A, the best of rank r
        self.lora_A.copy_(A / root)
        self.lora_B.copy_(B / root)
        add_to_weight(self.base, -self.delta_weight())  # W = (W − s·B·A) + s·B·A: no output changes

    def matrix(self) -> Tensor:
        """W, (out, in)."""
        return self.base.weight

    def down(self, x: Tensor) -> Tensor:
        return F.linear(self.lora_dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., r)

    def up(self, h: Tensor) -> Tensor:
        return F.linear(h, self.lora_B)  # (..., out)

    def forward(self, x: Tensor) -> Tensor:
        A, B, drops = self.lora_A, self.lora_B, self.lora_dropout.p > 0 and self.training
        if self.merged or drops or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        if generation.takes_kernels(x, A, B):
            return generation.forward(self.base, x, A, B, self.scaling)
        if x.dtype.itemsize >= A.dtype.itemsize:
            return super().forward(x)
        # The same numbers, without keeping a wide copy of x for the backward.
        return add_update(self.base(x), x, A, B, self.scaling)
