"""What both optimizers with their state on the host ask of parameters, gradients and state dicts.

``torch.optim.Optimizer.load_state_dict`` moves every state to its parameter's device. That would
end the paging silently, so the moments are taken out before torch sees the rest.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise if a group asks for a variant of AdamW that is not built here."""
    if asked := [name for name in REFUSED if group.get(name)]:
        raise ValueError(f"{', '.join(asked)} must be False here: use torch.optim.AdamW for it")
    if isinstance(group["lr"], Tensor):
        raise TypeError(f"lr must be a number, got {group['lr']!r}: use lr.item()")


def check_parameters(parameters: Iterable[Tensor], earlier: Sequence[Tensor]) -> None:
    """Raise unless all are dense floating tensors of the device that the earlier ones are on."""
    device = earlier[0].device if earlier else None
    for number, parameter in enumerate(parameters, len(earlier)):
        device = device or parameter.device
        if parameter.device != device:
            remedy = "make an optimizer for each device"
            raise ValueError(f"parameter {number} is on {parameter.device}, not {device}: {remedy}")
        if parameter.device.type not in ("cpu", "cuda"):
            raise ValueError(f"parameter {number} is on {parameter.device}: give it memory first")
        if not parameter.is_floating_point():
            raise ValueError(f"parameter {number} is {parameter.dtype}: only floats are trained")
        _check_contiguous(number, parameter)


def _check_contiguous(number: int, parameter: Tensor) -> None:
    if not parameter.is_contiguous():
        remedy = "make it of parameter.contiguous(): pages are cut in the order of memory"
        raise ValueError(f"parameter {number} is not contiguous: {remedy}")


def gradients_of(parameters: Sequence[Tensor], device: torch.device) -> dict[int, Tensor]:
    """Number -> contiguous gradient of each parameter that has one.

    Raises:
        ValueError: a gradient is sparse or of another dtype, or a parameter has left the device or
            is no longer contiguous.
    """
    found = {}
    for number, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout != torch.strided:
            remedy = "AdamW moves every number at every step; use torch.optim.SparseAdam"
            raise ValueError(f"the gradient of parameter {number} is sparse: {remedy}")
        if gradient.dtype != parameter.dtype:
            kinds = f"{gradient.dtype}, the parameter {parameter.dtype}"
            raise ValueError(f"the gradient of parameter {number} is {kinds}: they must agree")
        if parameter.device != device:
            moved = f"parameter {number} has moved from {device} to {parameter.device}"
            raise ValueError(f"{moved}: make a new optimizer and load the state into it")
        _check_contiguous(number, parameter)
        found[number] = gradient.contiguous()
    return found


def split_state(
    state_dict: Mapping[str, Any], parameters: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[int, list[Tensor]]]:
    """A state dict of AdamW -> what torch shall load, and number -> the two moments.

    Raises:
        ValueError: the moments are missing, are of another shape, or more than the two are there;
            a group asks for what is not built here.
    """
    groups = state_dict["param_groups"]
    for group in groups:
        check_group({"lr": 0.0, **group})
    names = list(itertools.chain.from_iterable(group["params"] for group in groups))
    rest, moments = {}, {}
    for number, (name, parameter) in enumerate(zip(names, parameters, strict=False)):
        entry = state_dict["state"].get(name)
        if not entry:
            continue
        if set(entry) != {"step", *MOMENTS}:
            wanted = f"step, {', '.join(MOMENTS)}"
            there = ", ".join(map(str, entry))
            raise ValueError(f"state {name} must hold {wanted} as AdamW's does, got {there}")
        for moment in MOMENTS:
            if entry[moment].shape != parameter.shape:
                shapes = f"{tuple(entry[moment].shape)}, the parameter {tuple(parameter.shape)}"
                raise ValueError(f"{moment} of state {name} has shape {shapes}")
        moments[number] = [entry[moment] for moment in MOMENTS]
        rest[name] = {"step": torch.tensor(float(entry["step"]))}
    # Steps are counted on the CPU: torch's fused AdamW would move them to the GPU.
    groups = [{**group, "fused": None, "foreach": None} for group in groups]
    return {**state_dict, "state": rest, "param_groups": groups}, moments
