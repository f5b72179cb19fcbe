"""What several exercises of the unit use: factors that are not zero, which parameters train, which layers a target names."""

import torch
from torch import nn

from course.checking import but


def nothing(*_) -> None:
    """The part that was left out."""


def fill(layer: nn.Module, g: torch.Generator, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
    """Both factors with normal numbers that ``dtype`` holds."""
    for factor in (layer.lora_A, layer.lora_B):
        factor.data.copy_((spread * torch.randn(factor.shape, generator=g)).to(dtype))


def trainable(model: nn.Module, besides: tuple[str, ...] = ()) -> str:
    return ", ".join(sorted(name for name, p in model.named_parameters() if p.requires_grad and name not in besides))


def is_target(name: str, targets: list[str]) -> bool:
    """Whether one of the targets is the layer's full name, or its end after a dot."""
    return any(name == target or name.endswith("." + target) for target in targets)


def last_word(name: str, targets: list[str]) -> bool:
    return name.split(".")[-1] in targets


def after_dot(name: str, targets: list[str]) -> bool:
    return any(name.endswith("." + target) for target in targets)


MATCHED_TOO_MUCH = {
    "names were matched anywhere: 'q_proj' is inside 'xq_proj' too; a target is the full name or what follows a dot": but(
        match=lambda name, targets: any(target in name for target in targets)
    ),
    "names were matched by their last letters: 'xq_proj' ends with 'q_proj' too; compare after a dot": but(
        match=lambda name, targets: name.endswith(tuple(targets))
    ),
}
