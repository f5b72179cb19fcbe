"""What launches of kernels share: facts about a device, and the current device."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
from torch import Tensor

# Whether assembly is compiled: not for other GPUs, and not in Triton's interpreter.
PTX = torch.version.cuda is not None and not triton.knobs.runtime.interpret
_NOTHING = nullcontext()


def on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING  # entering a device costs as much as a launch
    return torch.cuda.device(tensor.device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """1 without a GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def ahead(device: torch.device) -> bool:
    """Whether a launch may begin before the one before it has ended, from compute capability 9 on.

    The earlier kernel says ``gdc_launch_dependents``; the later one reads what needs no waiting,
    then says ``gdc_wait``.
    """
    return PTX and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache
def _counters(tiles: int, device: torch.device, stream: int) -> Tensor:
    return torch.zeros(tiles, dtype=torch.int32, device=device)


def counters(tiles: int, device: torch.device) -> Tensor:
    """(tiles,) zeros, which a kernel leaves as zeros again.

    One set for a stream: launches in two of them may run at the same time. While a CUDA graph is
    recorded new ones, since nothing is cleared then, only when the graph runs.
    """
    if device.type != "cuda":
        return _counters(tiles, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    return _counters(tiles, device, torch.cuda.current_stream(device).cuda_stream)
