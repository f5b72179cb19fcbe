"""A LoRA run in which lora_B has a gradient at every step, and is still zero at the end.

The base must not move, and does not. The loss stands still. Mend `prepare`.
"""

import torch
from reference.lora import inject_lora
from torch import Tensor, nn


def prepare(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Put adapters into ``model``, freeze the rest, and return the optimizer of the run, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    inject_lora(model, r=2, lora_alpha=4)  # freezes the base, too
    return optimizer


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int
) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(prepare=prepare) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), torch.randn(128, 16)
    y = model(x).detach() + x @ torch.randn(16, 1) @ torch.randn(1, 4) / 3
    losses = train(model, prepare(model, lr=0.02), x, y, steps=60)
    print(f"loss {losses[0]:.4f} → {losses[-1]:.4f}")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            print(f"{name}: size {p.norm():.4f}, its last gradient {p.grad.norm():.4f}")
