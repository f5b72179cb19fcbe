"""AdapterFusion: several trained adapters at once, mixed anew for every token.

Each of n adapters was trained alone, on a task of its own. At every place in the model they all
stand side by side, frozen, and what is trained is an attention over their outputs:

    q = Q·h,   k_i = K·u_i,   v_i = V·u_i         u_i = a_i(h)
    a(h) = Σ_i softmax_i(q·k_i) · v_i             no 1/√d

The adapters' own knowledge is not overwritten; that is the point of a second step. It is not small:
Q, K and V are (d × d) at every place, far more than the adapters. V starts at the identity (and
1e-6 beside the diagonal), so that a fresh fusion gives about the adapters' mean, and 0.01·‖I − V‖²
may hold it there.

Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition" (2005.00247).
"""

import copy

import torch
from torch import Tensor, nn

from reference.bottleneck import Bottleneck, Placed
from reference.wrapped import adapters


class Fusion(nn.Module):
    """Takes a :class:`reference.bottleneck.Bottleneck`'s place: h (…, d) -> (…, d).

    Args:
        several: at least one adapter of width d; frozen here.

    Attributes:
        query, key: nn.Linear(d, d), weights N(0, 0.02²), biases zero; value without a bias.
    """

    def __init__(self, several: list[Bottleneck]):
        super().__init__()
        widths = {each.down.in_features for each in several}
        if len(widths) != 1:
            raise ValueError(f"several must be adapters of one width, got widths {sorted(widths)}")
        d = widths.pop()
        self.adapters = nn.ModuleList(several).requires_grad_(False)
        self.query, self.key = nn.Linear(d, d), nn.Linear(d, d)
        self.value = nn.Linear(d, d, bias=False)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.value.weight.fill_(1e-6).fill_diagonal_(1)
        self.to(several[0].down.weight.device)

    def weights(self, h: Tensor, u: Tensor) -> Tensor:
        """softmax(q·k): h (…, d), u (…, n, d) -> (…, n)."""
        q, k = self.query(h), self.key(u)  # (…, d), (…, n, d)
        return (q[..., None, :] @ k.transpose(-1, -2)).squeeze(-2).softmax(-1)

    def forward(self, h: Tensor) -> Tensor:
        wide = h.to(self.query.weight.dtype)
        u = torch.stack([adapter(wide) for adapter in self.adapters], -2)  # (…, n, d)
        mixed = self.weights(wide, u)[..., None, :] @ self.value(u)  # (…, 1, d)
        return mixed.squeeze(-2).to(h.dtype)


def fuse(model: nn.Module, others: list[nn.Module]) -> list[str]:
    """Let the adapters of ``model`` and copies of those of ``others`` stand side by side.

    All are of the same shape, each adapted by :func:`reference.bottleneck.inject_bottleneck` alike.
    In ``model`` only Q, K and V train afterwards.

    Returns:
        The names of the places.

    Raises:
        ValueError: a model holds no bottleneck, or at other places, or is fused already. Nothing is
            changed then.
    """
    tables = [_places(each) for each in (model, *others)]
    first = tables[0]
    for i, table in enumerate(tables):
        if not table or [*table] != [*first]:
            raise ValueError(f"model {i} has bottlenecks at {[*table][:3]}, not {[*first][:3]}")
    new = {}
    for name, placed in first.items():
        copies = [copy.deepcopy(table[name].adapter) for table in tables[1:]]
        new[placed] = Fusion([placed.adapter, *copies])
    model.requires_grad_(False)
    for placed, fusion in new.items():
        placed.adapter = fusion
        for layer in (fusion.query, fusion.key, fusion.value):
            layer.requires_grad_(True)
    return list(first)


def _places(model: nn.Module) -> dict[str, Placed]:
    found = {name: part for name, part in adapters(model) if isinstance(part, Placed)}
    if any(isinstance(part.adapter, Fusion) for part in found.values()):
        raise ValueError("model is fused already: fuse fresh models with their adapters")
    return found


def value_penalty(model: nn.Module, strength: float = 0.01) -> Tensor:
    """strength · Σ ‖I − V‖² over all places, to be added to the loss.

    Raises:
        ValueError: ``model`` holds no fusion.
    """
    values = [part.value.weight for part in model.modules() if isinstance(part, Fusion)]
    if not values:
        raise ValueError("model holds no fusion: call fuse(model, others) first")
    away = [value - torch.eye(len(value), device=value.device) for value in values]
    return strength * torch.stack([each.square().sum() for each in away]).sum()
