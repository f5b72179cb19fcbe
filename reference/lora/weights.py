"""What an adapter asks of the layer under it: its kind, and a weight that is stored and has values.

All of it is asked before anything is changed.
"""

import torch
from torch import Tensor, nn

SIZES = ("in_features", "out_features", "in_channels", "out_channels")
SIZES += ("num_embeddings", "embedding_dim", "nx", "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether it has ``in_features``, ``out_features`` and a ``weight``, as a linear layer has."""
    if not isinstance(module, nn.Module):
        return False
    if "lora_A" in module._parameters:
        return is_linear(module.base)
    # Looked up, not read: reading a weight under spectral_norm takes a step of its power iteration.
    tables = vars(module), module._parameters, module._buffers
    return all(
        any(name in table for table in tables) or hasattr(type(module), name)
        for name in ("in_features", "out_features", "weight")
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's ``Conv1D``: a linear layer that keeps its weight as (in, out)."""
    return (
        isinstance(module, nn.Module)
        and type(module).__name__ == "Conv1D"
        and hasattr(module, "nx")
    )


def unstored(layer: nn.Module) -> str | None:
    """Why there is no weight to adapt in ``layer``, if there is none."""
    if layer._parameters.get("weight") is not None or layer._buffers.get("weight") is not None:
        return None
    words = "by a parametrization, pruning or a quantized type"
    return f"computes its weight at each call ({words}) and stores none"


def check_weight(base: nn.Module) -> None:
    """Raise unless the weight of ``base`` is stored there and has values."""
    if why := unstored(base):
        remedy = "make it a plain parameter first, as remove_parametrizations does"
        raise ValueError(f"{describe(base)} {why}: {remedy}")
    check_values(f"{describe(base)}.weight", base.weight)


def check_values(name: str, tensor: Tensor) -> None:
    """Raise if ``tensor`` is on the meta device, where it has a shape and nothing else."""
    if tensor.is_meta:
        words = "or was offloaded by accelerate: load the model whole onto a real device first"
        raise ValueError(f"{name} is on the meta device, without values, {words}")


def check_linear(base: nn.Module, r: int, init: str) -> None:
    """Raise unless ``base`` is a linear layer, and one that PiSSA can take apart if it shall."""
    if not is_linear(base):
        words = "a linear layer, with in_features, out_features and a weight"
        raise TypeError(f"base must be {words}; got {describe(base)}")
    check_pissa(base, init)


def check_pissa(base: nn.Module, init: str) -> None:
    """Raise if ``init`` is "pissa" and the weight of ``base`` packed or broken."""
    if init != "pissa" or unstored(base) or base.weight.is_meta:  # which has words of its own
        return
    if not base.weight.is_floating_point():
        words = f"but it is kept as {base.weight.dtype}: apply it before quantizing"
        raise TypeError(f"init='pissa' takes {describe(base)} apart, {words}")
    if not torch.isfinite(base.weight).all():
        raise ValueError(f"init='pissa': the weight of {describe(base)} holds NaN or infinity")


def refuse_pissa(base: nn.Module, init: str) -> None:
    """Raise where ``init`` is "pissa" and ``base`` not linear."""
    if init == "pissa":
        words = f"is defined for linear layers only, got {describe(base)}"
        raise ValueError(f"init='pissa' {words}: use 'kaiming' or 'gaussian'")


def describe(module: object) -> str:
    """``LoRALinear(Linear(8, 4))``: type and sizes, for messages."""
    if hasattr(module, "lora_A"):  # a wrapper
        return f"{type(module).__name__}({describe(module.base)})"
    sizes = ", ".join(str(getattr(module, size)) for size in SIZES if hasattr(module, size))
    return f"{type(module).__name__}({sizes})"
