"""The adapter into the weights, by the way that its base calls for, and how far the result is from what was trained.

An adapter was trained beside the weights it saw. Over a plain base those are W; over a four-bit base they are Ŵ, the dequantized ones, and
W + s·B·A is *another* function than the one that was trained and evaluated (unit 06). So a QLoRA adapter is merged into Ŵ. What else it
would have cost is stated beside it.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.lora import lora_layers, merge_lora, replace_layers, trained_parts
from reference.qlora import merge_errors, merge_into_dequantized
from reference.qlora.layer import NF4Linear

RIGHT = {"lora": "into the base's own weights", "qlora": "into the dequantized weights", "full": "nothing to merge"}


@dataclass(frozen=True)
class Merge:
    """How it was done.

    Attributes:
        way: in words.
        error: ‖merged − trained‖ / ‖trained‖, the largest of all layers; both include the update.
        update_lost: the same difference as a share of the update, ‖ΔW‖: what rounding took of what was learned.
        others: what another way would have given, as ``error``.
    """

    way: str
    error: float
    update_lost: float
    others: Mapping[str, float]


@torch.no_grad()
def merge(model: nn.Module, method: str, original: Mapping[str, Tensor] | None = None) -> Merge:
    """Merge all that an adapter holds, in place.

    Args:
        original: the weights before quantization, by name, for the error of merging into them; not needed without quantization.
    """
    if method == "full":
        return Merge(RIGHT[method], 0.0, 0.0, {})
    errors: list[dict[str, float]] = []
    found: list[tuple[float, float]] = []
    for name, layer in lora_layers(model):
        base, delta = layer.base, layer.delta_weight()
        if isinstance(base, NF4Linear):
            trained = base.dequantize(torch.float64) + delta.double()
            found.append(_far((base.dequantize(torch.float32) + delta).to(base.dtype), trained, delta))
            errors += [merge_errors(layer, original[f"{name}.weight"])] if original else []
        else:
            trained = base.weight.double() + delta.double()
            layer.merge(keep=False)  # one at a time: beside the model, the sums of one layer need memory
            found.append(_far(base.weight, trained, delta))
    if method == "lora":
        merge_lora(model)
    else:
        merge_into_dequantized(model)
        rows = trained_parts(model)[1]
        for layer in rows.values():
            layer.merge()
        replace_layers(model, {layer: layer.base for layer in rows.values()})
    others = {way: statistics.fmean(each[way] for each in errors) for way in ("original", "requantized")} if errors else {}
    return Merge(RIGHT[method], max(error for error, _ in found), max(lost for _, lost in found), others)


def _far(weight: Tensor, trained: Tensor, update: Tensor) -> tuple[float, float]:
    difference = (weight.double() - trained).norm()
    return (difference / trained.norm()).item(), (difference / update.double().norm().clamp(min=1e-30)).item()
