"""A low-rank update beside a frozen linear layer.

Fine-tuning changes a weight W by some ΔW. LoRA keeps W as it is and writes the change as a product of two thin matrices, which are all that
is trained:

    W' = W + ΔW,    ΔW = s · B · A,    s = α/r        A: (r × in), random    B: (out × r), zero

B = 0 makes ΔW = 0, so training begins at the pretrained model; A ≠ 0 gives B a gradient from the first step. With r far below in and
out the factors hold r·(in + out) numbers instead of in·out. (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
rsLoRA, s = α/√r: Kalajdzievski 2023. PiSSA, the factors taken from the top of W itself: Meng et al. 2024.)

The factors are float32 even beside a half-precision base: a step of the optimizer is often too small for bfloat16 to add. The update
is computed and added in float32, and the sum is rounded once.
"""

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.lora_mixed import add_update
from reference.lowrank import truncated_svd

INITS = ("kaiming", "gaussian", "pissa")


class LoRALayer(nn.Module):
    """What every adapted layer shares: a frozen base, two factors, a scale, merging. Attributes of the base are read through it.

    Args:
        base: the layer to adapt; frozen here.
        r: rank, from 1 to the smaller side of the weight.
        lora_alpha: α; the update is scaled by s = α/r.
        lora_dropout: probability, in [0, 1), of dropping an input of A. The base's input is never dropped.
        use_rslora: scale by s = α/√r, so that the update keeps its size as r grows.
        init: "kaiming" (A as ``nn.Linear`` draws its weight, uniform within ±1/√in, B zero), "gaussian" (A from N(0, 1/r²), B zero),
            "pissa" (linear layers only: the top r singular triples of W become s·B·A and leave the base, which keeps the rest).

    Attributes:
        base, lora_A, lora_B, scaling (the number s), merged (whether ΔW is inside the base's weight now), and the arguments.

    Raises:
        TypeError: the base is of another kind, or its weight is packed where the weight itself is needed.
        ValueError: the base is wrapped already, an argument is out of range, or PiSSA finds NaN or infinity in the weight.
    """

    def __init__(
        self, base: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0, use_rslora: bool = False, init: str = "kaiming"
    ):
        self.check(base, r, lora_alpha, lora_dropout, init)
        super().__init__()
        self.base = base.requires_grad_(False)
        self.r, self.lora_alpha, self.use_rslora, self.init = r, lora_alpha, use_rslora, init
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merged = False
        kind = {"dtype": torch.float64 if base.weight.dtype == torch.float64 else torch.float32, "device": base.weight.device}
        shape_A, shape_B = self.factor_shapes(base, r)
        self.lora_A = nn.Parameter(torch.zeros(shape_A, **kind))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, **kind))
        self.reset_parameters()
        self.train(base.training)

    @classmethod
    def check(cls, base: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0, init: str = "kaiming") -> None:
        """Everything that the constructor would refuse, without changing anything."""
        if isinstance(base, LoRALayer):
            raise ValueError(f"base is wrapped already, in a {type(base).__name__}: merge it first, or train that one")
        cls.check_base(base)
        if isinstance(r, bool) or not isinstance(r, int):
            raise TypeError(f"r must be an integer, got {r!r}")
        shape_A, shape_B = cls.factor_shapes(base, max(r, 1))
        largest = min(math.prod(shape_A[1:]), shape_B[0])
        if not 1 <= r <= largest:
            raise ValueError(f"r must be from 1 to {largest}, the smaller side of the weight of {describe(base)}; got {r}")
        if not isinstance(lora_alpha, Real) or not (math.isfinite(lora_alpha) and lora_alpha > 0):
            raise ValueError(f"lora_alpha must be a positive number, got {lora_alpha!r}")
        if not isinstance(lora_dropout, Real) or not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be a probability in [0, 1), got {lora_dropout!r}")
        if init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {init!r}")
        if init == "pissa":
            cls.check_pissa(base)

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        raise NotImplementedError

    @classmethod
    def check_pissa(cls, base: nn.Module) -> None:
        raise ValueError(f"init='pissa' is defined for linear layers only, got {describe(base)}: use 'kaiming' or 'gaussian'")

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``lora_A`` and ``lora_B``."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # this a gives ±1/√fan_in
        nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> Tensor:
        """ΔW = s·B·A, in the shape of the base's weight and the dtype of the factors."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + ΔW. From here on the forward is the base's own, and the factors are frozen.

        A base that stores its weight in its own way offers ``merge_delta(delta)``, which adds ``delta`` (out, in) to that weight.

        Raises:
            ValueError: merged already, or ΔW or the sum holds NaN or infinity.
            TypeError: the weight is packed and the base has no ``merge_delta``.
        """
        if self.merged:
            raise ValueError(f"{describe(self)} is merged already: a second merge would add the update twice")
        self._add_to_base(self.delta_weight())
        self._set_merged(True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """W ← W − ΔW: the weight as it was before the merge, up to rounding in its dtype."""
        if not self.merged:
            raise ValueError(f"{describe(self)} is not merged: there is no update to take out")
        self._add_to_base(-self.delta_weight())
        self._set_merged(False)

    def _set_merged(self, merged: bool) -> None:
        self.merged = merged
        for factor in (self.lora_A, self.lora_B):  # if they went on training, unmerge would take out another update than merge put in
            factor.requires_grad_(not merged)
            factor.grad = None

    def _add_to_base(self, delta: Tensor) -> None:
        if hasattr(self.base, "merge_delta"):
            self.base.merge_delta(self._finite(delta))
        else:  # a new parameter: another layer may share the old one, as an output head shares the embedding's
            self.base.weight = nn.Parameter(self._sum(delta), requires_grad=False)

    def _sum(self, delta: Tensor) -> Tensor:
        weight = self.base.weight
        if not weight.is_floating_point():
            raise TypeError(
                f"{describe(self.base)} keeps its weight as {weight.dtype}, to which an update can't be added: dequantize it first"
            )
        return self._finite((weight + delta).to(weight.dtype))  # added in the wider dtype, rounded once

    def _finite(self, tensor: Tensor) -> Tensor:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"merging {describe(self)} would leave NaN or infinity in its weight: the adapter or the base is broken")
        return tensor

    @torch.no_grad()
    def check_merge(self) -> None:
        """Everything that ``merge`` would refuse, without changing anything."""
        delta = self._finite(self.delta_weight())
        if not hasattr(self.base, "merge_delta"):
            self._sum(delta)

    def _scaled(self, up, h: Tensor) -> Tensor:
        """s · up(h) for the linear map ``up``. A power of two changes no digit wherever it multiplies, so it multiplies the thin h."""
        return up(h * self.scaling) if math.frexp(self.scaling)[0] == 0.5 else up(h) * self.scaling

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # not the adapter's, so the base's: its weight, its sizes
            if name == "base":
                raise
            return getattr(self.base, name)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}, merged={self.merged}"


class LoRALinear(LoRALayer):
    """y = W·x + b + s · B·A·dropout(x).

    The base is an ``nn.Linear``, or any layer with ``in_features``, ``out_features`` and a ``weight``. The weight may be packed: only
    the base's own forward reads it. Shapes: ``lora_A`` (r, in_features), ``lora_B`` (out_features, r); input (..., in_features).
    """

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        if not is_linear(base):
            raise TypeError(f"base must be a linear layer, with in_features, out_features and a weight; got {describe(base)}")

    @classmethod
    def check_pissa(cls, base: nn.Module) -> None:
        if not base.weight.is_floating_point():
            raise TypeError(f"init='pissa' takes {describe(base)} apart, but it is kept as {base.weight.dtype}: apply it before quantizing")
        if not torch.isfinite(base.weight).all():
            raise ValueError(f"init='pissa': the weight of {describe(base)} holds NaN or infinity")

    @staticmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, base.in_features), (base.out_features, r)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init != "pissa":
            return super().reset_parameters()
        B, A = truncated_svd(self.base.weight.to(self.lora_A.dtype), self.r)  # W ≈ B·A, the best of rank r
        self.lora_A.copy_(A / math.sqrt(self.scaling))
        self.lora_B.copy_(B / math.sqrt(self.scaling))
        self._add_to_base(-self.delta_weight())  # the base keeps the rest, so the output does not change

    def delta_weight(self) -> Tensor:
        return product(self.lora_B, self.lora_A, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        A, B = self.lora_A, self.lora_B
        if (
            x.dtype.itemsize < A.dtype.itemsize
            and isinstance(self.lora_dropout, nn.Identity)
            and not torch.is_autocast_enabled(x.device.type)
        ):
            return add_update(y, x, A, B, self.scaling)  # what follows, number for number, without keeping a wide copy of x
        h = F.linear(self.lora_dropout(x.to(A.dtype)), A)  # (..., r)
        return (y + self._scaled(lambda h: F.linear(h, B), h)).to(y.dtype)  # (..., out)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` behaves as a linear layer does: ``in_features``, ``out_features`` and a ``weight``."""
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in ("in_features", "out_features", "weight"))


def product(lora_B: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """s · B · A, computed in float32 or wider; lora_B: (out, r), lora_A: (r, in)."""
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    return ((lora_B.to(wide) @ lora_A.to(wide)) * scaling).to(lora_A.dtype)


def describe(module: object) -> str:
    """``LoRALinear(Linear(8, 4))``: type and sizes, for messages."""
    if isinstance(module, LoRALayer):
        return f"{type(module).__name__}({describe(module.base)})"
    sizes = ("in_features", "out_features", "in_channels", "out_channels", "num_embeddings", "embedding_dim")
    return f"{type(module).__name__}({', '.join(str(getattr(module, size)) for size in sizes if hasattr(module, size))})"
