"""Which layers of a model LoRA adapts: those that it can, and of these the ones that were named.

The rules for names are peft's, so that a config written for either chooses the same layers. What an
adapter can't replace is left out by "all-linear", which says so, and refused where it is named.
"""

import re
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from reference.lora.called import never_called
from reference.lora.conv_embedding import LoRAConv2d, LoRAEmbedding, LoRATransposed
from reference.lora.layer import LoRALayer, LoRALinear
from reference.lora.weights import is_linear, is_transposed, unstored

# Whose forward is W·x + b, W∗x + b or W[x], by the class that defines it.
FORWARDS = {
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.sparse.Embedding",
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
    "reference.sharded.layer.RowwiseNF4Linear",
    "transformers.pytorch_utils.Conv1D",
    "transformers.models.falcon.modeling_falcon.FalconLinear",  # in two operations
}
SEE_THROUGH = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COMPILED = "is compiled by itself: inject first, then compile"


class Targets(dict[str, nn.Module]):
    """First name -> layer, of the layers to adapt.

    Attributes:
        skipped: first name -> why, of the linear layers that "all-linear" leaves out.
    """

    def __init__(self, chosen: dict[str, nn.Module], skipped: dict[str, str]):
        super().__init__(chosen)
        self.skipped = skipped


def wrapper_of(layer: nn.Module) -> type[LoRALayer] | None:
    """The class that adapts ``layer``; None if none does."""
    if isinstance(layer, nn.Conv2d):
        return LoRAConv2d
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding
    if is_transposed(layer):
        return LoRATransposed
    return LoRALinear if is_linear(layer) else None


def plain_name(name: str) -> str:
    """``name`` without what ``torch.compile`` and FSDP put between a model's own modules."""
    return ".".join(part for part in name.split(".") if part not in SEE_THROUGH)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and module of every adapted layer, each once."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, LoRALayer))


def find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> Targets:
    """The layers that ``target_modules`` chooses, by their first names.

    Args:
        model, target_modules: as in :func:`reference.lora.inject_lora`.

    Raises:
        ValueError: nothing matches; a match is wrapped already or can't be; peft has adapted the
            model.
    """
    if not isinstance(target_modules, str):
        target_modules = sorted(set(target_modules))
    _refuse_peft(model)
    matches, every = _matcher(model, target_modules)
    adapted = [layer for _, layer in lora_layers(model)]
    inside = {part for layer in adapted for part in layer.modules() if part is not layer}
    first_names, chosen = {}, set()
    for name, module in model.named_modules(remove_duplicate=False):
        first_names.setdefault(module, name)
        named = any(matches(spelling, module) for spelling in (name, plain_name(name)))
        if named and module not in inside:
            chosen.add(module)
    reasons = _reasons(model, chosen)
    skipped = {first_names[layer]: why for layer, why in reasons.items()} if every else {}
    targets = {
        name: module
        for module, name in first_names.items()
        if module in chosen and name not in skipped
    }
    for name, module in targets.items():
        _check_target(name, module, reasons.get(module))
    if not targets:
        others = inside | set(adapted)
        free = {name: layer for layer, name in first_names.items() if name and layer not in others}
        known = [name for name, layer in free.items() if wrapper_of(layer)]
        words = f"layers that can be adapted: {', '.join(known[:8]) or 'none'}"
        left = "".join(f"; {name} {why}" for name, why in list(skipped.items())[:4])
        raise ValueError(f"target_modules={target_modules!r} matches no layer; {words}{left}")
    return Targets(targets, skipped)


def _refuse_peft(model: nn.Module) -> None:
    for name, part in model.named_modules():
        if type(part).__module__.startswith("peft.") and hasattr(part, "base_layer"):
            words = "merge_and_unload() there first, or go on in peft"
            raise ValueError(f"{name} is adapted by peft, as {type(part).__name__}: {words}")


def _check_target(name: str, module: nn.Module, why_not: str | None) -> None:
    kind = wrapper_of(module)
    if isinstance(module, LoRALayer):
        words = "merge_lora(model) first, or choose other target_modules"
        raise ValueError(f"{name or 'model'} is wrapped already: {words}")
    if hasattr(module, "_orig_mod"):
        raise ValueError(f"{name or 'model'} {COMPILED}")
    if kind is None:
        words = "only linear layers, nn.Conv2d and nn.Embedding can be adapted"
        raise ValueError(f"{name or 'model'} is a {type(module).__name__}: {words}")
    if not name:
        words = f"wrap it, {kind.__name__}(model, r, lora_alpha)"
        raise ValueError(f"model itself is the layer to adapt: {words}")
    if why_not:
        raise ValueError(f"{name} {why_not}: choose other target_modules")


def _matcher(
    model: nn.Module, target_modules: str | list[str]
) -> tuple[Callable[[str, nn.Module], bool], bool]:
    """``target_modules`` as a function of name and module, and whether it is "all-linear"."""
    if not isinstance(target_modules, str):
        ends = tuple(f".{target}" for target in target_modules)
        return lambda name, module: name in target_modules or name.endswith(ends), False
    if target_modules.lower() == "all-linear":
        names_head = hasattr(model, "get_output_embeddings")
        head = model.get_output_embeddings() if names_head else None
        return (
            lambda name, module: (
                wrapper_of(module) in (LoRALinear, LoRATransposed) and module is not head
            ),
            True,
        )
    try:
        pattern = re.compile(target_modules)
    except re.error as error:
        words = f"is not a regular expression: {error}"
        raise ValueError(f"target_modules={target_modules!r} {words}") from None
    return lambda name, module: pattern.fullmatch(name) is not None, False


def _reasons(model: nn.Module, layers: set[nn.Module]) -> dict[nn.Module, str]:
    """Layer -> why it can't be adapted in its place, of those in ``layers`` that can't be."""
    unseen, reasons = never_called(model), {}
    compiled = {part._modules.get("_orig_mod") for part in model.modules() if part is not model}
    for layer in layers:
        if isinstance(layer, LoRALayer) or wrapper_of(layer) is None:
            continue
        if layer in compiled:
            reasons[layer] = COMPILED
        elif why := unseen.get(layer) or unstored(layer) or _own_forward(layer):
            reasons[layer] = why
    return reasons


def _own_forward(layer: nn.Module) -> str | None:
    """Why what ``layer`` computes is not known, if it isn't."""
    placed = hasattr(layer, "_hf_hook")  # accelerate moves inputs, and calls the forward of before
    own = vars(layer).get("_old_forward" if placed else "forward")
    if own is not None and getattr(own, "__func__", own) is not type(layer).forward:
        return "has a forward that was put on it from outside"
    kind = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    scaled = isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale")
    if f"{kind.__module__}.{kind.__qualname__}" in FORWARDS or scaled:
        return None
    if not isinstance(layer, nn.Linear) and hasattr(layer, "merge_delta"):
        return None  # it says that ΔW can be added to its weight
    return f"is a {type(layer).__name__}, whose forward is its own"
