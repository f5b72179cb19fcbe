"""What every adapted layer shares: a frozen base, two thin factors, a scale, merging. The layers are in :mod:`reference.lora.conv_embedding`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

INITS = ("kaiming", "gaussian", "pissa")


class LoRALayer(nn.Module, ABC):
    """A frozen layer with weight W and the update ΔW = s·B·A beside it. Attributes of the base are read through it.

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
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.merged = False
        # float32 even beside a half-precision base: a step of the optimizer is often too small for bfloat16 to add
        like = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        shape_A, shape_B = self.factor_shapes(base, r)
        self.lora_A = nn.Parameter(torch.zeros(shape_A, **like))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, **like))
        with torch.no_grad():
            self._start()
        self.train(base.training)

    # ---- what a kind of layer defines

    @staticmethod
    @abstractmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``lora_A`` and ``lora_B``."""

    @classmethod
    @abstractmethod
    def check_base(cls, base: nn.Module, r: int, init: str) -> None:
        """Raise what is wrong with ``base`` for this kind of layer."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """ΔW = s·B·A, in the shape of the base's weight and the dtype of the factors."""

    def _start(self) -> None:
        """The first values of the factors, which are zero before."""
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # this a gives ±1/√in

    # ---- merging

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

    @torch.no_grad()
    def check_merge(self) -> None:
        """Raise what ``merge`` would find in the numbers, without changing anything."""
        delta = self._finite(self.delta_weight())
        if not hasattr(self.base, "merge_delta"):
            self._sum(delta)

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

    def _set_merged(self, merged: bool) -> None:
        self.merged = merged
        for factor in (self.lora_A, self.lora_B):  # if they went on training, unmerge would take out another update than merge put in
            factor.requires_grad_(not merged)
            factor.grad = None

    # ---- helpers

    @classmethod
    def check(cls, base: nn.Module, r: int, lora_alpha: float, lora_dropout: float = 0.0, init: str = "kaiming") -> None:
        """Raise what the constructor would, without changing anything."""
        if isinstance(base, LoRALayer):
            raise ValueError(f"base is wrapped already, in a {type(base).__name__}: merge it first, or train that one")
        if isinstance(r, bool) or not isinstance(r, int):
            raise TypeError(f"r must be an integer, got {r!r}")
        if init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {init!r}")
        cls.check_base(base, r, init)
        shape_A, shape_B = cls.factor_shapes(base, r)
        largest = min(math.prod(shape_A[1:]), shape_B[0])
        if not 1 <= r <= largest:
            raise ValueError(f"r must be from 1 to {largest}, the smaller side of the weight of {describe(base)}; got {r}")
        if not isinstance(lora_alpha, Real) or not (math.isfinite(lora_alpha) and lora_alpha > 0):
            raise ValueError(f"lora_alpha must be a positive number, got {lora_alpha!r}")
        if not isinstance(lora_dropout, Real) or not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be a probability in [0, 1), got {lora_dropout!r}")

    def _scaled(self, up: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        """s · up(h) for a linear map ``up``. A power of two changes no digit wherever it multiplies, so it multiplies the thin h."""
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


def product(lora_B: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """s · B · A, computed in float32 or wider; lora_B: (out, r), lora_A: (r, in)."""
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    return ((lora_B.to(wide) @ lora_A.to(wide)) * scaling).to(lora_A.dtype)  # (out, in)


def describe(module: object) -> str:
    """``LoRALinear(Linear(8, 4))``: type and sizes, for messages."""
    if isinstance(module, LoRALayer):
        return f"{type(module).__name__}({describe(module.base)})"
    sizes = ("in_features", "out_features", "in_channels", "out_channels", "num_embeddings", "embedding_dim")
    return f"{type(module).__name__}({', '.join(str(getattr(module, size)) for size in sizes if hasattr(module, size))})"
