"""The names of an adapter's tensors: in a model, in a file, and where the two differ."""

from pathlib import Path

import torch
from torch import Tensor, nn

from reference.lora import LoRAEmbedding, wrapper_of
from reference.lora.targets import plain_name

PREFIX = "base_model.model."
PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def inner(model: nn.Module) -> nn.Module:
    """The model itself, without what compiles it or spreads its batches."""
    while isinstance(model, PARALLEL) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, PARALLEL) else model._orig_mod
    return model


def keys_of(name: str, base: nn.Module) -> tuple[str, str]:
    """The names of A and B in the file, for the layer ``name``."""
    name = plain_name(name)
    infix, suffix = ("embedding_", "") if wrapper_of(base) is LoRAEmbedding else ("", ".weight")
    return f"{PREFIX}{name}.lora_{infix}A{suffix}", f"{PREFIX}{name}.lora_{infix}B{suffix}"


def drop_copies_of_the_base(model: nn.Module, tensors: dict, shapes: dict) -> dict[str, Tensor]:
    """peft adds the table of an adapted embedding. Where it is the model's own, it says nothing."""

    def is_copy(key: str, tensor: Tensor) -> bool:
        path, _, name = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
        try:
            own = getattr(model.get_submodule(path), name).detach().cpu()
        except AttributeError:
            return False
        return own.shape == tensor.shape and torch.equal(own, tensor.to(own.dtype))

    return {
        key: value for key, value in tensors.items() if key in shapes or not is_copy(key, value)
    }


def check_keys(tensors: dict[str, Tensor], shapes: dict[str, tuple], file: Path) -> None:
    found = {key: tuple(tensors[key].shape) for key in shapes if key in tensors}
    wrong = {key: shape for key, shape in found.items() if shape != shapes[key]}
    problems = {
        "missing": sorted(set(shapes) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(shapes)),
        "of another shape": [f"{key} {shape}, not {shapes[key]}" for key, shape in wrong.items()],
    }
    words = []
    for kind, keys in problems.items():
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        words += [f"{kind}: {', '.join(keys[:4])}{more}"] if keys else []
    if words:
        raise ValueError(f"{file} does not fit the model; {'; '.join(words)}")
