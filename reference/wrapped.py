"""What the methods of unit 10 share: a frozen layer inside another, put into a model and taken out.

    names = wrap(model, target_modules, make)    # make(name, layer) -> Adapter
    ...                                          # train what requires a gradient
    merge_adapters(model)                        # the plain model again, with W' for W

LoRA has machinery of its own (:mod:`reference.lora`); the rules for names are the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from reference.lora.conv_embedding import LoRATransposed
from reference.lora.layer import LoRALinear
from reference.lora.replace import carry_hooks, replace_layers
from reference.lora.targets import find_targets, lora_layers, wrapper_of
from reference.lora.weights import describe, is_transposed


class Adapter(nn.Module):
    """A frozen ``base`` layer and a few trained numbers around it.

    Subclasses put their names into ``trained`` and say ``forward`` and, if they can be merged,
    ``merged_weight``. Attributes of the base are read through the adapter.
    """

    trained: tuple[str, ...] = ()

    def __init__(self, base: nn.Module):
        if isinstance(base, Adapter):
            raise ValueError(f"base is a {type(base).__name__} already: merge it first")
        super().__init__()
        self.base = base.requires_grad_(False)
        self.train(base.training)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def merged_weight(self) -> tuple[Tensor, Tensor | None]:
        """W' (out, in) and b' of the plain layer that computes the same.

        Raises:
            TypeError: no plain layer does.
        """
        raise TypeError(f"{type(self).__name__} can't be merged: no single weight computes it")


def wide(tensor: Tensor) -> torch.dtype:
    """float32 beside a half type or packed codes: what trained numbers are kept in."""
    kept = tensor.dtype if tensor.is_floating_point() else torch.float32
    return torch.promote_types(kept, torch.float32)


def sizes(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, GPT-2's included."""
    return (base.nx, base.nf) if is_transposed(base) else (base.in_features, base.out_features)


def matrix(base: nn.Module) -> Tensor:
    """W (out, in) of a linear layer with a weight that is stored as numbers.

    Raises:
        TypeError: it is packed.
    """
    if not base.weight.is_floating_point():
        words = "dequantize it first (reference.qlora.merge_into_dequantized)"
        raise TypeError(f"{describe(base)} keeps its weight as {base.weight.dtype}: {words}")
    return base.weight.T if is_transposed(base) else base.weight


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Name and module of every adapter, each once."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, Adapter))


def linear_targets(
    model: nn.Module, target_modules: str | Iterable[str]
) -> Mapping[str, nn.Module]:
    """The linear layers that ``target_modules`` chooses by LoRA's rules.

    Raises:
        ValueError: a match is not linear; the model holds adapters already; and as for LoRA.
    """
    check_plain(model)
    targets = find_targets(model, target_modules)
    for name, layer in targets.items():
        if wrapper_of(layer) not in (LoRALinear, LoRATransposed):
            words = "only linear layers can be: choose other target_modules"
            raise ValueError(f"{name} is {describe(layer)}, {words}")
    return targets


def check_plain(model: nn.Module) -> None:
    """Raise if ``model`` holds adapters already, of this kind or LoRA's."""
    for name, part in [*adapters(model), *lora_layers(model)]:
        kind = type(part).__name__
        raise ValueError(f"{name or 'model'} is a {kind} already: merge it, or take a fresh model")


def wrap(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    make: Callable[[str, nn.Module], nn.Module],
) -> list[str]:
    """Put ``make(name, layer)`` in the place of each layer; freeze all that is not the adapters'.

    ``make`` is called for all before anything is replaced, so an error leaves the model's layers;
    what it froze is thawed again.

    Returns:
        The names of the layers.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        new = {layer: make(name, layer) for name, layer in targets.items()}
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    replace_layers(model, new)
    return list(targets)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Give every adapted layer its W' and b' and put the plain layers back, in place.

    All stays frozen. No old weight is kept.

    Raises:
        ValueError: ``model`` holds no adapter or is one; a merged number would not be finite.
        TypeError: an adapter can't be merged, or a weight is packed. The model is as it was then.
    """
    layers = dict(adapters(model))
    if not layers or model in layers.values():
        raise ValueError("model must hold adapters and be none itself: there is nothing to merge")
    merged = {layer: layer.merged_weight() for layer in layers.values()}
    for name, layer in layers.items():
        for tensor in merged[layer]:
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"merging {name} would leave NaN or infinity: it is broken")
    for layer, (weight, bias) in merged.items():
        base = layer.base
        weight = weight.T if is_transposed(base) else weight
        base.weight = nn.Parameter(weight.to(base.weight.dtype).contiguous(), requires_grad=False)
        if bias is not None:
            base.bias = nn.Parameter(bias.to(base.bias.dtype), requires_grad=False)
        carry_hooks(layer, base)
    replace_layers(model, {layer: layer.base for layer in layers.values()})
    return model
