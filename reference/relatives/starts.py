"""LoRA with another start or another rate: LoftQ and LoRA+.

**LoftQ** starts A and B at what quantizing W loses. Without it QLoRA begins at Ŵ, which is not the
pretrained model. Alternately, from R = W:

    Ŵ = dequantize(quantize(R)),    (B, A) = the best of rank r for W − Ŵ,    R = W − B·A

and training begins at Ŵ + B·A, which is nearer to W than Ŵ is. The scale must be one (α = r), or
be taken out of the factors.

**LoRA+** gives B a higher rate than A. With B = 0 and A of order 1/√in, B has the longer way: for
wide layers the best ratio of the two grows with the width, and 4 to 16 are usual.

Li et al. 2023 (2310.08659); Hayou et al. 2024 (2402.12354).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reference.arguments import check_integer, check_number
from reference.lora import find_targets, inject_lora, lora_layers, replace_layers
from reference.lowrank import truncated_svd
from reference.nf4 import dequantize_nf4, quantize_nf4
from reference.qlora import NF4Linear


def loftq(weight: Tensor, r: int, rounds: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(R, A, B), float32: Ŵ = dequantize(quantize(R)), and Ŵ + B·A is near the weight.

    Args:
        weight: W, (out, in). NF4 here is in blocks of 64 with float32 scales.
        r: A is (r, in), B (out, r); they share the singular values evenly.
        rounds: how often both are found, each for the other. In the first R is W.
    """
    check_integer("r", r, 1, min(weight.shape))
    check_integer("rounds", rounds, 1)
    W = weight.detach().float()
    product = torch.zeros_like(W)
    for _ in range(rounds):
        R = W - product
        B, A = truncated_svd(W - dequantize_nf4(quantize_nf4(R)), r)
        product = B @ A
    return R, A, B


def inject_loftq(
    model: nn.Module,
    r: int,
    target_modules: str | Iterable[str] = "all-linear",
    rounds: int = 1,
    compute_dtype: torch.dtype | None = None,
) -> list[str]:
    """Quantize the chosen ``nn.Linear`` layers to NF4 under LoRA factors that LoftQ starts.

    α = r, so that the scale is one. Returns the names of the layers.

    Raises:
        ValueError, TypeError: as ``inject_lora``, or a match is no plain ``nn.Linear``. The model
            is as it was then.
    """
    targets = find_targets(model, target_modules)
    for name, layer in targets.items():
        if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
            raise TypeError(f"{name} is a {type(layer).__name__}: LoftQ quantizes an nn.Linear")
    found = {name: loftq(layer.weight, r, rounds) for name, layer in targets.items()}
    packed = {}
    for name, layer in targets.items():
        new = NF4Linear.from_weight(found[name][0], layer.bias, 64, False, compute_dtype)
        new.dtype = layer.weight.dtype  # what the layer decodes to
        packed[layer] = new.train(layer.training)
    replace_layers(model, packed)
    names = inject_lora(model, r, r, [*targets])
    for name, layer in lora_layers(model):
        with torch.no_grad():
            layer.lora_A.copy_(found[name][1])
            layer.lora_B.copy_(found[name][2])
    return names


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict]:
    """Parameter groups for an optimizer: A and other matrices at ``lr``, B at ``ratio · lr``.

    Vectors (biases, DoRA's magnitudes) go with B, as in peft.

    Raises:
        ValueError: ``model`` trains no lora_B, or a number is not above 0.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        check_number(name, value)
        if value <= 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    groups = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fast = "lora_B" in name or parameter.dim() == 1
            groups["B" if fast else "A"].append(parameter)
    if not any("lora_B" in name and p.requires_grad for name, p in model.named_parameters()):
        raise ValueError("model trains no lora_B: inject_lora(model, ...) first")
    return [{"params": groups["A"], "lr": lr}, {"params": groups["B"], "lr": lr * ratio}]
