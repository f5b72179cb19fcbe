"""An adapter as what it is: a few thin matrices for each layer, without any model around them.

    ΔW = scaling · B·A        A: (r × in)    B: (out × r)        a layer
    {"model.layers.0.self_attn.q_proj": Factors(A, B, scaling), ...}        an adapter

A server keeps hundreds of these beside one base, and so does whoever merges some of them into one.
They never change: a new version of an adapter is a new object, and a request that holds the old
one goes on with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reference.adapter_format.config import CONFIG, read_config
from reference.adapter_format.files import WEIGHTS, check_finite, read_weights
from reference.adapter_format.keys import PREFIX
from reference.arguments import check_number
from reference.lora import LoRALinear, lora_layers

ENDS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, eq=False)
class Factors:
    """The update of one linear layer.

    Attributes:
        A, B: (r, in) and (out, r), of one floating dtype and on one device.
        scaling: the number s, whatever rule gave it: α/r, or α/√r with rsLoRA.

    Raises:
        TypeError: A or B is no tensor of floating numbers, or ``scaling`` no number.
        ValueError: the shapes, dtypes or devices don't fit each other; ``scaling`` is not finite.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        for name, factor in (("A", self.A), ("B", self.B)):
            if not isinstance(factor, Tensor) or not factor.is_floating_point():
                raise TypeError(f"{name} must be a tensor of floating numbers, got {factor!r}")
        shapes = tuple(self.A.shape), tuple(self.B.shape)
        if self.A.dim() != 2 or self.B.dim() != 2 or len(self.A) != self.B.shape[1]:
            raise ValueError(f"A must be (r, in) and B (out, r) with one r, got {shapes}")
        if not len(self.A):
            raise ValueError(f"the rank must be at least 1, got shapes {shapes}")
        for what in ("dtype", "device"):
            a, b = getattr(self.A, what), getattr(self.B, what)
            if a != b:
                raise ValueError(f"A and B must be of one {what}, got {a} and {b}")
        check_number("scaling", self.scaling)

    @classmethod
    def unchecked(cls, A: Tensor, B: Tensor, scaling: float) -> "Factors":
        """The same of parts that were checked before: a server makes thousands at a swap."""
        made = object.__new__(cls)
        made.__dict__.update(A=A, B=B, scaling=scaling)
        return made

    @property
    def r(self) -> int:
        return len(self.A)

    @property
    def sizes(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return len(self.B), self.A.shape[1]

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes

    def delta(self) -> Tensor:
        """ΔW, (out, in), computed and returned in float32 or wider."""
        wide = torch.promote_types(self.A.dtype, torch.float32)
        return (self.B.to(wide) @ self.A.to(wide)) * self.scaling

    def to(self, *to) -> "Factors":
        """In another dtype or on another device."""
        return Factors(self.A.to(*to), self.B.to(*to), self.scaling)


Adapter = Mapping[str, Factors]


def bytes_of(adapter: Adapter) -> int:
    """Bytes of all factors."""
    return sum(factors.nbytes for factors in adapter.values())


def common_dtype(factors: Sequence[Factors | None]) -> torch.dtype | None:
    """The dtype of all factors, if there is one and they lie as the kernels read them."""
    there = [f for f in factors if f is not None]
    dtypes = {f.A.dtype for f in there}
    packed = all(f.A.is_contiguous() and f.B.is_contiguous() for f in there)
    return dtypes.pop() if len(dtypes) == 1 and packed else None


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """The adapter in an injected model, copied: layer's name -> factors.

    Raises:
        ValueError: there is none, or a layer is merged.
        TypeError: a layer is adapted by something else than plain LoRA over a linear layer.
    """
    found = {}
    for name, layer in lora_layers(model):
        if type(layer) is not LoRALinear:
            words = "only LoRALinear can be one of many"
            raise TypeError(f"{name} is a {type(layer).__name__}: {words}")
        if layer.merged:
            raise ValueError(f"{name} is merged: unmerge() it first")
        A, B = (factor.detach().clone() for factor in (layer.lora_A, layer.lora_B))
        found[name] = Factors(A, B, layer.scaling)
    if not found:
        raise ValueError("model holds no LoRA layer: call inject_lora(model, ...) first")
    return found


def read_factors(directory: str | Path, dtype: torch.dtype | None = None) -> dict[str, Factors]:
    """The adapter in peft's files, without a model.

    Args:
        dtype: of the factors; default: the file's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file asks for more than plain LoRA on linear layers, lacks a factor or holds
            NaN.
    """
    directory = Path(directory)
    settings, tensors = read_config(directory), read_weights(directory)
    check_finite(tensors, directory / WEIGHTS)
    if settings["init"] == "pissa":
        words = "belongs to a base of its own (init='pissa'), and can't be one of many"
        raise ValueError(f"{directory / CONFIG}: the adapter {words}")
    layers = {key.removesuffix(end) for key in tensors for end in ENDS if key.endswith(end)}
    wanted = {name + end for name in layers for end in ENDS}
    if wanted != set(tensors):
        odd = ", ".join(sorted(wanted ^ set(tensors))[:4])
        raise ValueError(f"{directory / WEIGHTS}: not pairs of A and B of linear layers: {odd}")
    if settings["fan_in_fan_out"]:
        raise ValueError(f"{directory / CONFIG}: fan_in_fan_out=True is not served here")
    found = {}
    for name in sorted(layers):
        A, B = (tensors[name + end] for end in ENDS)
        divisor = math.sqrt(len(A)) if settings["use_rslora"] else len(A)
        factors = Factors(A, B, settings["lora_alpha"] / divisor)
        found[name.removeprefix(PREFIX)] = factors.to(dtype) if dtype else factors
    return found
