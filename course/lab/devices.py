"""Where an experiment runs, and how it starts the same way twice."""

import random

import numpy as np
import torch


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(where: torch.device | None = None) -> str:
    """The device as a person would name it: "NVIDIA H100 80GB HBM3", or "CPU, 2 threads"."""
    where = where or device()
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    count = torch.get_num_threads()
    return f"CPU, {count} thread{'s' * (count > 1)}"


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
