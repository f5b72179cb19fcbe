"""The layer under an adapter: which may be one, how it takes an update, how it is reached.

:mod:`reference.lora.layer` says what LoRA computes. Here is what it asks of the layer that it
wraps, and what a wrapper needs as a module: attributes and state dicts.
"""

import copy
from abc import ABC, abstractmethod
from numbers import Integral

import torch
from torch import Tensor, nn

from reference.arguments import check_integer, check_number
from reference.lora.weights import check_values, check_weight, describe

INITS = ("kaiming", "gaussian", "pissa")


class Wrapper(nn.Module, ABC):
    """What is common to all modules that hold a ``base`` and two factors, whatever they compute.

    Attributes of the base are read through the wrapper. The ``state_dict`` of a merged layer has
    one more entry, "merged", without which its weight would be taken for the base's own.
    """

    factor_names = ("lora_A", "lora_B")  # the names of its parameters

    @staticmethod
    @abstractmethod
    def factor_shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``lora_A`` and ``lora_B``."""

    @staticmethod
    @abstractmethod
    def check_base(base: nn.Module, r: int, init: str) -> None:
        """Raise what is wrong with ``base`` for this kind of layer."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # not the adapter's, so the base's: its weight, its sizes
            if name == "base":
                raise
            return getattr(self.base, name)

    def extra_repr(self) -> str:
        settings = f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}"
        return f"{settings}, merged={self.merged}"

    @torch.no_grad()
    def check_merge(self) -> None:
        """Raise what ``merge`` would, without changing anything."""
        check_weight(self.base)
        self.check_factors()
        delta = _finite(self.base, self.delta_weight())
        if hasattr(self.base, "merge_delta"):
            _twin(self.base).merge_delta(delta)
        else:
            _sum(self.base, delta)

    def check_factors(self) -> None:
        """Raise if a factor has no values."""
        for name in self.factor_names:
            check_values(f"{describe(self)}.{name}", getattr(self, name))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A weight that is set on the wrapper, as tying embeddings does, becomes the base's."""
        if name != "weight":
            return super().register_parameter(name, param)
        if param.numel() != self.lora_A[0].numel() * len(self.lora_B):
            words = f"a weight of shape {tuple(param.shape)} does not fit its adapter"
            raise ValueError(f"{describe(self)}: {words}; merge_lora(model) first, then resize")
        self.base.weight = param

    def _set_merged(self, merged: bool) -> None:
        """Factors that trained on would be another update than the one that was merged."""
        factors = [getattr(self, name) for name in self.factor_names]
        if merged:
            self._trained = [factor.requires_grad for factor in factors]
        for factor, trained in zip(factors, self._trained, strict=True):
            factor.requires_grad_(trained and not merged)
            factor.grad = None
        self.merged = merged

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[f"{prefix}merged"] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments) -> None:
        """With the base's weight comes whether it holds the update; factors alone are unmerged."""
        merged = state_dict.pop(f"{prefix}merged", None) is not None
        if f"{prefix}base.weight" in state_dict:
            self.unmerged_weight = None  # it was the weight of before another merge
            if merged != self.merged:
                self._set_merged(merged)
        elif self.merged and f"{prefix}lora_A" in state_dict:
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _twin(base: nn.Module) -> nn.Module:
    """A layer like ``base`` with tensors of its own; hooks, and all else, are the same."""
    twin = copy.copy(base)
    twin._parameters, twin._buffers = (
        {name: copy.deepcopy(tensor) for name, tensor in table.items()}
        for table in (base._parameters, base._buffers)
    )
    return twin


def add_to_weight(base: nn.Module, delta: Tensor) -> None:
    """W ← W + ``delta``, in the weight's dtype; delta: (out, in), or in the weight's own shape.

    Raises:
        ValueError: ``delta`` or the sum holds NaN or infinity.
        TypeError: the weight is packed and the base has no ``merge_delta``.
    """
    if hasattr(base, "merge_delta"):
        base.merge_delta(_finite(base, delta))
    else:  # a new parameter: another layer may share the old one, as a head shares the embedding's
        base.weight = nn.Parameter(_sum(base, delta), requires_grad=False)


def _sum(base: nn.Module, delta: Tensor) -> Tensor:
    weight = base.weight
    if not weight.is_floating_point():
        words = "to which an update can't be added: dequantize it first"
        raise TypeError(f"{describe(base)} keeps its weight as {weight.dtype}, {words}")
    total = (weight + delta).to(weight.dtype)  # added in the wider dtype, rounded once
    return _finite(base, total)


def _finite(base: nn.Module, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        words = "would leave NaN or infinity in its weight: the adapter or the base is broken"
        raise ValueError(f"merging into {describe(base)} {words}")
    return tensor


def check(
    kind: type[Wrapper],
    base: nn.Module,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    init: str = "kaiming",
) -> None:
    """Raise what the constructor of ``kind`` would, without changing anything."""
    if isinstance(base, Wrapper):
        name = type(base).__name__
        raise ValueError(f"base is wrapped already, in a {name}: merge it first, or train that one")
    check_integer("r", int(r) if isinstance(r, Integral) and not isinstance(r, bool) else r, 1)
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}")
    kind.check_base(base, r, init)
    check_weight(base)
    if init == "pissa":  # which takes r singular triples, and a weight has no more than this
        check_integer("r", r, 1, min(base.weight.shape))
    check_number("lora_alpha", lora_alpha)
    if lora_alpha <= 0:
        raise ValueError(f"lora_alpha must be above 0, got {lora_alpha}")
    check_number("lora_dropout", lora_dropout, 0, 1)
    if lora_dropout == 1:
        raise ValueError("lora_dropout must be below 1, which would drop every input, got 1")
