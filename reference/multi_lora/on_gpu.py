"""Where many adapters' updates are computed by kernels: they are loaded at the first call."""

import importlib.util
from types import ModuleType

import torch

_TRITON = importlib.util.find_spec("triton") is not None


def kernels_for(device: torch.device) -> bool:
    """Whether there are kernels on this device."""
    return _TRITON and device.type == "cuda"


def kernels() -> ModuleType:
    from reference.kernels import multi_lora

    return multi_lora
