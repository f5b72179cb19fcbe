"""The loss of a LoRA run stands still, to the last digit.

A number of parameters is trained, the learning rate is not zero, the optimizer holds them, and no
error is raised. A hundred times the learning rate changes nothing. Mend `factors`.
"""

import torch
from torch import Tensor


def factors(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank × inputs) and B (outputs × rank), ready to train; B·A starts at zero."""
    A = torch.zeros(rank, inputs, requires_grad=True)
    B = torch.zeros(outputs, rank, requires_grad=True)
    return A, B


def main(factors=factors) -> None:
    torch.manual_seed(0)
    W, x = torch.randn(16, 32) / 6, torch.randn(256, 32)
    y = x @ (W + torch.randn(16, 2) @ torch.randn(2, 32) / 6).T
    A, B = factors(32, 16, rank=4)
    optimizer = torch.optim.AdamW([A, B], lr=0.02)
    for step in range(101):
        loss = (x @ W.T + x @ A.T @ B.T - y).square().mean()
        if step % 25 == 0:
            print(f"step {step:3}  loss {loss:.6f}  |A| {A.norm():.3f}  |B| {B.norm():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
