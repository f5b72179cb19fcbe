"""Which layers of a model LoRA adapts: those that it can, and of these the ones that were named.

The rules for names are peft's, so that a config written for either chooses the same layers.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from reference.lora.base import is_linear
from reference.lora.conv_embedding import LoRAConv2d, LoRAEmbedding
from reference.lora.layer import LoRALayer, LoRALinear


def wrapper_of(layer: nn.Module) -> type[LoRALayer] | None:
    """The class that adapts ``layer``; None if none does."""
    if isinstance(layer, nn.Conv2d):
        return LoRAConv2d
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding
    return LoRALinear if is_linear(layer) else None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and module of every adapted layer, each once."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, LoRALayer))


def find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """First name -> layer, for every layer that ``target_modules`` chooses.

    Args:
        model, target_modules: as in :func:`reference.lora.inject_lora`.

    Raises:
        ValueError: nothing matches, or a match is wrapped already or can't be.
    """
    if not isinstance(target_modules, str):
        target_modules = sorted(set(target_modules))
    matches = _matcher(model, target_modules)
    adapted = [layer for _, layer in lora_layers(model)]
    inside = {part for layer in adapted for part in layer.modules() if part is not layer}
    first_names, chosen = {}, set()
    for name, module in model.named_modules(remove_duplicate=False):
        first_names.setdefault(module, name)
        if module not in inside and matches(name, module):
            chosen.add(module)
    targets = {name: module for module, name in first_names.items() if module in chosen}
    if not targets:
        others = inside | set(adapted)
        free = [name for layer, name in first_names.items() if name and layer not in others]
        known = [name for name in free if wrapper_of(model.get_submodule(name))]
        words = f"layers that can be adapted: {', '.join(known[:8]) or 'none'}"
        raise ValueError(f"target_modules={target_modules!r} matches no layer; {words}")
    for name, module in targets.items():
        _check_target(model, name, module)
    return targets


def _check_target(model: nn.Module, name: str, module: nn.Module) -> None:
    kind = wrapper_of(module)
    if isinstance(module, LoRALayer):
        words = "merge_lora(model) first, or choose other target_modules"
        raise ValueError(f"{name or 'model'} is wrapped already: {words}")
    if kind is None:
        words = "only linear layers, nn.Conv2d and nn.Embedding can be adapted"
        raise ValueError(f"{name or 'model'} is a {type(module).__name__}: {words}")
    if not name:
        words = f"wrap it, {kind.__name__}(model, r, lora_alpha)"
        raise ValueError(f"model itself is the layer to adapt: {words}")
    if module in _never_called(model):
        words = "which reads its weight and never calls it: choose others"
        raise ValueError(f"{name} belongs to nn.MultiheadAttention, {words}")


def _matcher(model: nn.Module, target_modules: str | list[str]) -> Callable[[str, nn.Module], bool]:
    """``target_modules`` as a function of name and module."""
    if not isinstance(target_modules, str):
        ends = tuple(f".{target}" for target in target_modules)
        return lambda name, module: name in target_modules or name.endswith(ends)
    if target_modules.lower() == "all-linear":
        names_head = hasattr(model, "get_output_embeddings")
        skipped = {model.get_output_embeddings() if names_head else None} | _never_called(model)
        return lambda name, module: is_linear(module) and module not in skipped
    try:
        pattern = re.compile(target_modules)
    except re.error as error:
        words = f"is not a regular expression: {error}"
        raise ValueError(f"target_modules={target_modules!r} {words}") from None
    return lambda name, module: pattern.fullmatch(name) is not None


def _never_called(model: nn.Module) -> set[nn.Module]:
    """The output projections whose weight ``nn.MultiheadAttention`` reads without calling them.

    An update of theirs would not be seen.
    """
    return {part.out_proj for part in model.modules() if isinstance(part, nn.MultiheadAttention)}
