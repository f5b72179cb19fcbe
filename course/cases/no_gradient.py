"""With gradient checkpointing on, the loss falls a little and the adapters stay where they were.

Without checkpointing all is well, but the real model then does not fit. The embedding is frozen,
as it is under LoRA. Mend `run_blocks`; every block has to stay checkpointed.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.W, self.dropout = nn.Linear(n, n).requires_grad_(False), nn.Dropout(0.1)
        self.A, self.B = nn.Linear(n, 2, bias=False), nn.Linear(2, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.W(x) + self.B(self.dropout(self.A(x))))


def run_blocks(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=True)
    return x


def main(run_blocks=run_blocks) -> None:
    warnings.simplefilter("ignore")  # torch has something to say here
    torch.manual_seed(0)
    embedding, head = nn.Embedding(50, 16).requires_grad_(False), nn.Linear(16, 5)
    blocks, ids = nn.ModuleList(Block(16) for _ in range(3)), torch.randint(50, (256,))
    logits = head(run_blocks(blocks, embedding(ids)))
    nn.functional.cross_entropy(logits, ids % 5).backward()
    for name, p in nn.ModuleDict({"head": head, "blocks": blocks}).named_parameters():
        if p.requires_grad:
            print(f"{name:18} gradient {'None' if p.grad is None else f'{p.grad.norm():.4f}'}")
