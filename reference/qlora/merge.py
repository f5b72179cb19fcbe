"""What to do with a trained QLoRA adapter: three ways to merge it, and what each costs.

The adapter was trained beside Ŵ, the dequantized weight, so what it fits is the function with the
weight Ŵ + ΔW. One plain layer instead:

    into the dequantized weight   round₁₆(Ŵ + ΔW)    16 bits a weight again; wrong by a rounding
    requantized                   quantize(Ŵ + ΔW)   4 bits; wrong by a new quantization error
    into the original weight      W + ΔW             16 bits; wrong by W − Ŵ, the error that the
                                                     adapter was trained with

The last is the pitfall. W is the better base on its own, and W + ΔW may or may not be the better
model, but it is not the one that was trained and evaluated: part of ΔW answers to the quantization
error, and that part has lost what it answered to.

``merge_lora`` (:mod:`reference.lora`) merges in the second way, through
:meth:`NF4Linear.merge_delta`.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from reference.lora import LoRALayer, LoRALinear, lora_layers, merge_lora, replace_layers
from reference.lora.replace import carry_hooks
from reference.lora.weights import check_values, describe
from reference.qlora.layer import NF4Linear

Weights = Mapping[str, Tensor] | Callable[[str], Tensor]
Merged = Callable[[str, NF4Linear, Tensor | None], Tensor]  # name, layer and ΔW -> weight


def merge_into_dequantized(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Make every quantized layer a plain ``nn.Linear`` with the weight Ŵ + ΔW, in place.

    A quantized layer without an adapter gets Ŵ, one that is merged by requantization what it holds
    then. Adapters of other layers are merged as :func:`reference.lora.merge_lora` does it.

    Args:
        dtype: of the new weights; default: what each had before it was quantized.

    Returns:
        ``model``, without LoRA and frozen.

    Raises:
        ValueError: ``model`` holds no quantized layer or is one itself, or a sum holds NaN or
            infinity. The model is left as it was.
    """

    def merged(name: str, layer: NF4Linear, delta: Tensor | None) -> Tensor:
        weight = layer.dequantize(torch.float32)
        total = weight if delta is None else weight + delta
        return total.to(dtype or layer.dtype)  # rounded once

    return _to_plain(model, merged)


def merge_into_original(model: nn.Module, weights: Weights) -> nn.Module:
    """Make every quantized layer a plain ``nn.Linear`` with the weight W + ΔW, in place.

    Args:
        weights: W, the weight before it was quantized, by its full name
            ("model.layers.0.mlp.up_proj.weight"): a function, or a mapping such as the
            ``state_dict()`` of the model that was quantized. The dtype of W is the result's.

    Returns:
        ``model``, without LoRA and frozen.

    Raises:
        KeyError: a weight is missing in the mapping.
        ValueError: as in :func:`merge_into_dequantized`, or W has another shape. The model is left
            as it was.
    """

    def merged(name: str, layer: NF4Linear, delta: Tensor | None) -> Tensor:
        original = _original(f"{name}.weight", weights, layer)
        if delta is None:
            return original.clone()
        return (original + delta.to(original.device)).to(original.dtype)

    return _to_plain(model, merged, original=True)


@torch.no_grad()
def merge_errors(layer: LoRALinear, original_weight: Tensor) -> dict[str, float]:
    """How far each way of merging ends from the function that was trained.

    That is ‖merged − (Ŵ + ΔW)‖ / ‖Ŵ + ΔW‖, in Frobenius norms.

    Args:
        layer: an adapter over an ``NF4Linear``, not merged.
        original_weight: W, (out, in), in its own dtype.

    Returns:
        "dequantized", "requantized", "original" -> relative error. ``layer`` is left as it was.
    """
    if not isinstance(layer, LoRALinear) or not isinstance(layer.base, NF4Linear):
        raise TypeError(f"layer must be a LoRALinear over an NF4Linear, got {describe(layer)}")
    if layer.merged:
        problem = "what was trained is no longer there to compare with"
        raise ValueError(f"{describe(layer)} is merged already: {problem}")
    base, delta = layer.base, layer.delta_weight()
    original = _original("original_weight", lambda name: original_weight, base)
    trained = base.dequantize(torch.float64) + delta  # (out, in)
    requantized = copy.deepcopy(base)
    requantized.merge_delta(delta)
    results = {
        "dequantized": (base.dequantize(torch.float32) + delta).to(base.dtype),
        "requantized": requantized.dequantize(torch.float32),
        "original": (original + delta).to(original.dtype),
    }
    errors = {name: (result - trained).norm() for name, result in results.items()}
    return {name: (error / trained.norm()).item() for name, error in errors.items()}


@torch.no_grad()
def _to_plain(model: nn.Module, merged: Merged, original: bool = False) -> nn.Module:
    """Put a linear layer, with what ``merged`` gives, in the place of each quantized one.

    Where there is an adapter around the layer, it goes too.
    """
    found = {name: layer for name, layer in lora_layers(model) if isinstance(layer.base, NF4Linear)}
    inside = {id(layer.base) for layer in found.values()}
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear) and id(module) not in inside:
            found[name] = module
    if not found:
        raise ValueError("model holds no NF4Linear: there is nothing to merge into")
    if "" in found:
        problem = f"model is itself a {type(model).__name__} and can't be replaced in place"
        raise ValueError(f"{problem}: put it into a module")
    others = [layer for name, layer in lora_layers(model) if name not in found]
    for layer in others:
        if not layer.merged:
            layer.check_merge()
    plain = {}
    for name, outer in found.items():
        base = outer.base if isinstance(outer, LoRALayer) else outer
        check_values(f"{name}.weight", base.weight)
        if isinstance(outer, LoRALayer):
            outer.check_factors()
        adapted = isinstance(outer, LoRALayer) and (original or not outer.merged)
        weight = merged(name, base, outer.delta_weight().float() if adapted else None)
        if not torch.isfinite(weight).all():
            reason = f"the adapter is broken, or {weight.dtype} is too narrow for it"
            raise ValueError(f"{name}.weight would hold NaN or infinity: {reason}")
        plain[outer] = _linear(weight, base)
    for outer, linear in plain.items():
        for old in {outer, outer.base if isinstance(outer, LoRALayer) else outer}:
            carry_hooks(old, linear)
    replace_layers(model, plain)
    return merge_lora(model) if others else model


def _original(name: str, weights: Weights, layer: NF4Linear) -> Tensor:
    weight = weights(name) if callable(weights) else weights[name]
    if weight.shape != layer.shape or not weight.is_floating_point():
        wanted = f"the weight before quantization, of shape {tuple(layer.shape)}"
        got = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise ValueError(f"{name} must be {wanted}; got {got}")
    return weight.detach()


def _linear(weight: Tensor, layer: NF4Linear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(layer.weight.device), requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)
