"""A merged adapter is worse than the same adapter beside the weight.

Merged into the weight for serving, it loses most of its gain. All is float32. Mend `merged`.
"""

import copy

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def merged(layer: LoRALinear) -> nn.Linear:
    """A plain linear layer that computes what ``layer`` does, which stays as it is."""
    linear = copy.deepcopy(layer.base)
    linear.weight.data += (layer.B @ layer.A).detach()
    return linear


def main(merged=merged) -> None:
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(32, 32), r=4, alpha=16), torch.randn(256, 32)
    y = layer.base(x) + x @ torch.randn(32, 4) @ torch.randn(4, 32) / 6
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    for name, model in (("base", layer.base), ("unmerged", layer), ("merged", merged(layer))):
        print(f"{name:8} error {(model(x) - y).square().mean():.4f}")
