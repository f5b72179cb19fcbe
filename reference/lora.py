"""LoRA in a whole model: wrap the chosen layers, freeze the rest, train, merge.

The layers themselves, with the formula W' = W + (α/r)·B·A, are in :mod:`reference.lora_layers`; this module finds the layers that are to be
adapted in any tree of modules and puts the adapted ones in their place.
"""

import re
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from reference.lora_layers import LoRAConv2d, LoRAEmbedding, LoRALayer, LoRALinear, is_linear

__all__ = [
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "inject_lora",
    "lora_layers",
    "lora_state_dict",
    "merge_lora",
    "trainable_parameters",
]


def inject_lora(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    target_modules: str | Iterable[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init: str = "kaiming",
) -> list[str]:
    """Wrap the chosen layers of ``model`` in place and freeze everything else.

    Args:
        model: any tree of modules; the layers to adapt lie inside it.
        target_modules: which layers, by peft's rules. A list: full names ("encoder.0.query") or ends of names after a dot ("query"). One
            string: a regular expression that must match the full name. "all-linear": every linear layer except the output head that the
            model names through ``get_output_embeddings``.
        r, lora_alpha, lora_dropout, use_rslora, init: see :class:`LoRALinear`.

    Returns:
        The names of the wrapped layers, in the order of ``model.named_modules()``. A layer reached by two names is wrapped once, under the
        first.

    Raises:
        ValueError: nothing matches, a match is wrapped already or is no linear layer, convolution or embedding, or ``model`` itself is the
            layer to wrap. The model is unchanged then.
    """
    targets = _find_targets(model, target_modules)
    was_trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wrapped = {}
    try:
        for name, layer in targets.items():
            try:
                wrapped[layer] = _wrapper_class(layer)(layer, r, lora_alpha, lora_dropout, use_rslora, init)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
    except (TypeError, ValueError):
        for parameter, trainable in was_trainable:
            parameter.requires_grad_(trainable)
        raise
    for parameter, _ in was_trainable:
        parameter.requires_grad_(False)
    _replace(model, wrapped)
    return list(targets)


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge every adapted layer of ``model`` and put the plain layers back, in place; returns ``model``, now without a trace of LoRA.

    Raises:
        ValueError: ``model`` holds no adapted layer.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model holds no LoRA layer: nothing to merge")
    for layer in layers.values():
        if not layer.merged:
            layer.merge()
    _replace(model, {layer: layer.base for layer in layers.values()})
    return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and module of every adapted layer, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer))


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The factors alone, detached: "<layer>.lora_A", "<layer>.lora_B"; ``model.load_state_dict(factors, strict=False)`` takes them back."""
    return {
        f"{name}.{factor}" if name else factor: getattr(layer, factor).detach()
        for name, layer in lora_layers(model)
        for factor in ("lora_A", "lora_B")
    }


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) numbers of parameters; a shared one counts once, a packed weight by its stored elements."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """First name -> layer, for every layer that ``target_modules`` chooses."""
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    inside = {id(part) for _, layer in lora_layers(model) for part in layer.modules() if part is not layer}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    first_name, chosen = {}, set()
    for name, module in model.named_modules(remove_duplicate=False):
        first_name.setdefault(module, name)
        if id(module) in inside:
            continue
        if target_modules == "all-linear":
            match = is_linear(module) and module is not head
        elif isinstance(target_modules, str):
            match = re.fullmatch(target_modules, name) is not None
        else:
            match = any(name == target or name.endswith(f".{target}") for target in target_modules)
        if match:
            chosen.add(module)
    targets = {name: module for module, name in first_name.items() if module in chosen}
    if not targets:
        known = [name for module, name in first_name.items() if name and _wrapper_class(module) is not None]
        raise ValueError(
            f"target_modules={target_modules!r} matches no layer; layers that can be adapted: {', '.join(known[:8]) or 'none'}"
        )
    for name, module in targets.items():
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name or 'model'} is wrapped already: merge_lora(model) first, or choose other target_modules")
        if _wrapper_class(module) is None:
            raise ValueError(
                f"{name or 'model'} is a {type(module).__name__}: only linear layers, nn.Conv2d and nn.Embedding can be adapted"
            )
        if not name:
            raise ValueError(f"model itself is the layer to adapt: wrap it, {_wrapper_class(module).__name__}(model, r, lora_alpha)")
    return targets


def _wrapper_class(module: nn.Module) -> type[LoRALayer] | None:
    if isinstance(module, nn.Conv2d):
        return LoRAConv2d
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding
    return LoRALinear if is_linear(module) else None


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put ``new[old]`` wherever ``old`` is registered as a child."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # not named_children(), which hides a second name of the same child
            if child in new:
                parent._modules[name] = new[child]
