"""Two evaluations in a row, no training between them, and the second is worse.

Evaluation merges the adapter for speed, and so does the code that saves. Mend the class `Adapted`.
"""

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.base, self.A, self.B, self.scale, self.merged = base, A, B, scale, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.merged else y + self.scale * (x @ self.A.T @ self.B.T)

    @torch.no_grad()
    def merge(self) -> None:
        self.base.weight += self.scale * (self.B @ self.A)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        self.base.weight -= self.scale * (self.B @ self.A)
        self.merged = False


def main(Adapted=Adapted) -> None:
    torch.manual_seed(0)
    A, B, x = torch.randn(4, 32) / 6, torch.randn(32, 4) / 6, torch.randn(256, 32)
    layer = Adapted(nn.Linear(32, 32), A, B, scale=2.0)
    y = layer(x).detach() + 0.1 * torch.randn(256, 32)
    print(f"in training       error {(layer(x) - y).square().mean():.4f}")
    for occasion in ("first evaluation", "saving", "second evaluation"):
        layer.merge()
        print(f"{occasion:17} error {(layer(x) - y).square().mean():.4f}")
    layer.unmerge()
    print(f"back in training  error {(layer(x) - y).square().mean():.4f}")
