"""Whether a device has bfloat16, and which 16-bit dtype to compute in.

GPUs before compute capability 8.0, such as a T4, only emulate bfloat16, and the kernels of this
course are not laid out for them. There everything runs in float16 through plain torch.
"""

from functools import lru_cache

import torch


@lru_cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 itself; a CPU always does."""
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def half_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has it, else float16."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float16
