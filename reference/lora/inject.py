"""LoRA: fine-tune a model through low-rank updates of some of its weights.

Fine-tuning changes a weight W by some ΔW. LoRA keeps W as it is and writes the change as a product of two thin matrices, which are all
that is trained:

    W' = W + ΔW,    ΔW = s · B · A,    s = α/r        A: (r × in), random    B: (out × r), zero

B = 0 makes ΔW = 0, so training begins at the pretrained model; A ≠ 0 gives B a gradient from the first step. With r far below in and
out the factors hold r·(in + out) numbers instead of in·out. (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
rsLoRA, s = α/√r: Kalajdzievski 2023. PiSSA, the factors taken from the top of W itself: Meng et al. 2024.)

The layers that do this are in :mod:`reference.lora.conv_embedding`. This module finds the layers to adapt in any tree of modules and puts
adapted ones in their place:

    names = inject_lora(model, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ...                                   # train the parameters that require a gradient: only A and B do
    merge_lora(model)                     # the plain model again, with W' for W
"""

import re
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from reference.lora.conv_embedding import LoRAConv2d, LoRAEmbedding, LoRALinear, is_linear
from reference.lora.layer import LoRALayer

__all__ = [
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "find_targets",
    "inject_lora",
    "lora_layers",
    "lora_state_dict",
    "merge_lora",
    "replace_layers",
    "trainable_parameters",
    "wrapper_of",
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
    """Wrap the chosen layers of ``model`` in place and freeze everything else but factors that are there already.

    Args:
        model: any tree of modules; the layers to adapt lie inside it.
        target_modules: which layers, by peft's rules. A list: full names ("encoder.0.query") or ends of names after a dot ("query"). One
            string: a regular expression that must match the full name. "all-linear": every linear layer except the output head that a model
            names in ``get_output_embeddings()``.
        r, lora_alpha, lora_dropout, use_rslora, init: see :class:`LoRALayer`.

    Returns:
        The names of the wrapped layers, in the order of ``model.named_modules()``. A layer with two names is wrapped once, for both, and
        returned under the first.

    Raises:
        ValueError: nothing matches; a match is wrapped already or can't be; ``model`` itself is the layer to wrap; an argument is out of
            range.
        TypeError: PiSSA on a packed weight, or an argument of the wrong type. In every case the model is left as it was.
    """
    targets = find_targets(model, target_modules)
    for name, layer in targets.items():
        try:
            wrapper_of(layer).check(layer, r, lora_alpha, lora_dropout, init)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    adapted = {layer: wrapper_of(layer)(layer, r, lora_alpha, lora_dropout, use_rslora, init) for layer in targets.values()}
    factors = {id(factor) for _, layer in lora_layers(model) for factor in (layer.lora_A, layer.lora_B)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in factors)
    replace_layers(model, adapted)
    return list(targets)


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge every adapted layer and put the plain layers back, in place; returns ``model``, which holds no trace of LoRA any more.

    A weight shared with a layer that is not adapted (an output head tied to the embedding) is shared no longer: each keeps its own
    values. All parameters stay frozen; ``model.requires_grad_(True)`` thaws them.

    Raises:
        ValueError: ``model`` holds no adapted layer, is one itself, or a merged weight would hold NaN or infinity.
        TypeError: a weight is packed and its layer has no ``merge_delta``. In every case the model is left as it was.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model holds no LoRA layer: there is nothing to merge")
    if model in layers.values():
        raise ValueError("model is itself a LoRA layer and can't be replaced in place: call its merge() and take its base")
    for name, layer in layers.items():
        try:
            if not layer.merged:
                layer.check_merge()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    for layer in layers.values():
        if not layer.merged:
            layer.merge()
    replace_layers(model, {layer: layer.base for layer in layers.values()})
    return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and module of every adapted layer, each once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer))


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The factors alone, detached, not copied: "<layer>.lora_A" and "<layer>.lora_B", as in ``model.state_dict()``."""
    factors = ("lora_A", "lora_B")
    return {f"{name}.{key}".lstrip("."): getattr(layer, key).detach() for name, layer in lora_layers(model) for key in factors}


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, all)`` numbers of parameters. A shared one counts once; a packed weight counts the elements that it stores."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def find_targets(model: nn.Module, target_modules: str | Iterable[str]) -> dict[str, nn.Module]:
    """First name -> layer, for every layer that ``target_modules`` chooses; arguments and errors as in :func:`inject_lora`."""
    target_modules = target_modules if isinstance(target_modules, str) else sorted(set(target_modules))
    matches = _matcher(model, target_modules)
    inside = {part for _, layer in lora_layers(model) for part in layer.modules() if part is not layer}
    never_called = _never_called(model)
    first_names, chosen = {}, set()
    for name, module in model.named_modules(remove_duplicate=False):
        first_names.setdefault(module, name)
        if module not in inside and matches(name, module):
            chosen.add(module)
    targets = {name: module for module, name in first_names.items() if module in chosen}
    if not targets:
        known = [
            name
            for module, name in first_names.items()
            if name and wrapper_of(module) and not isinstance(module, LoRALayer) and module not in inside
        ]
        raise ValueError(
            f"target_modules={target_modules!r} matches no layer; layers that can be adapted: {', '.join(known[:8]) or 'none'}"
        )
    for name, module in targets.items():
        if isinstance(module, LoRALayer):
            raise ValueError(f"{name or 'model'} is wrapped already: merge_lora(model) first, or choose other target_modules")
        if wrapper_of(module) is None:
            raise ValueError(
                f"{name or 'model'} is a {type(module).__name__}: only linear layers, nn.Conv2d and nn.Embedding can be adapted"
            )
        if not name:
            raise ValueError(f"model itself is the layer to adapt: wrap it, {wrapper_of(module).__name__}(model, r, lora_alpha)")
        if module in never_called:
            raise ValueError(f"{name} belongs to nn.MultiheadAttention, which reads its weight and never calls it: choose others")
    return targets


def wrapper_of(layer: nn.Module) -> type[LoRALayer] | None:
    """The class that adapts ``layer``; None if none does."""
    if isinstance(layer, nn.Conv2d):
        return LoRAConv2d
    if isinstance(layer, nn.Embedding):
        return LoRAEmbedding
    return LoRALinear if is_linear(layer) else None


def _matcher(model: nn.Module, target_modules: str | list[str]) -> Callable[[str, nn.Module], bool]:
    """``target_modules`` as a function of name and module."""
    if not isinstance(target_modules, str):
        ends = tuple(f".{target}" for target in target_modules)
        return lambda name, module: name in target_modules or name.endswith(ends)
    if target_modules.lower() == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        skipped = {head} | _never_called(model)
        return lambda name, module: is_linear(module) and module not in skipped
    try:
        pattern = re.compile(target_modules)
    except re.error as error:
        raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from None
    return lambda name, module: pattern.fullmatch(name) is not None


def _never_called(model: nn.Module) -> set[nn.Module]:
    """``nn.MultiheadAttention`` reads the weight of its output projection and never calls it: an update there would not be seen."""
    return {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}


def replace_layers(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put ``new[old]`` wherever ``old`` is a child."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # not named_children(), which hides the second name of a child
            if child in new:
                parent._modules[name] = new[child]
                if isinstance(parent, nn.TransformerEncoderLayer):  # in eval mode it reads its layers' weights, unless one has a hook
                    new[child].register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, args: tuple) -> None:
    """A hook whose presence is all it is for."""
