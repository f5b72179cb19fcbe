"""What unit 10 states."""

import torch
from reference.peft_family import mean_square


def of_first(count: int) -> float:
    """Mean square of 1, 2, …, ``count``."""
    return mean_square(torch.arange(1.0, count + 1)).item()
