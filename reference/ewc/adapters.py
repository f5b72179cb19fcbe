"""EWC for LoRA, on the update itself; and the penalty that keeps adapters out of each other's way.

EWC on the factors as parameters fails quietly: before training B = 0, so the gradient of A, and
with it A's Fisher, is exactly zero, and B's is right for that first A only. What the earlier task
feels is the weight, W + ΔW. So F is taken of W, once, on the plain model, and the penalty is

    λ/2 Σ F (ΔW − ΔW*)²,    ΔW = s·B·A

which is the penalty of full fine-tuning, with θ confined to where the adapter can reach.
O-LoRA (Wang et al. 2023) trains an adapter for each task, asking that the rows of a new A be
orthogonal to those of the old: Σ |A_old · A_newᵀ|.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from reference.arguments import check_number
from reference.ewc.penalty import checked
from reference.lora.targets import lora_layers


class LoRAEWC:
    """Holds F of the adapted weights and ΔW* as it is now; ``penalty()`` goes into the loss.

    Args:
        model: holds LoRA layers, not merged.
        fisher: name of a weight in the *plain* model ("layers.0.up.weight") -> F, (out, in). What
            else it holds, of weights that have no adapter and can't move, is left aside.
        lam: λ, at least 0.

    Raises:
        TypeError: ``lam`` is not a number.
        ValueError: ``lam`` is negative, there is no adapter or one that is merged, or ``fisher``
            lacks an adapted weight or has another shape.
    """

    def __init__(self, model: nn.Module, fisher: Mapping[str, Tensor], lam: float) -> None:
        check_number("lam", lam, 0)
        self.lam = lam
        self.layers = {f"{name}.weight": layer for name, layer in lora_layers(model)}
        if not self.layers:
            raise ValueError("model holds no LoRA layer: inject adapters first, or use EWC")
        for name, layer in self.layers.items():
            if layer.merged:
                raise ValueError(f"{name.removesuffix('.weight')} is merged: unmerge it first")
        weights = {name: layer.base.weight for name, layer in self.layers.items()}
        self.fisher = checked({n: F for n, F in fisher.items() if n in weights}, weights)
        self.start = {n: layer.delta_weight().detach() for n, layer in self.layers.items()}

    def penalty(self) -> Tensor:
        """λ/2 Σ F (ΔW − ΔW*)², a scalar with a gradient for A and B."""
        rises = [
            (self.fisher[name] * (layer.delta_weight() - self.start[name]).square()).sum()
            for name, layer in self.layers.items()
        ]
        return self.lam / 2 * torch.stack(rises).sum()


def orthogonality(old: Iterable[Tensor], new: Tensor) -> Tensor:
    """Σ |A_old · A_newᵀ| over earlier adapters of a layer, a scalar with a gradient for ``new``.

    Args:
        old: the factors A of earlier tasks, each (r_old, in); no gradient reaches them.
        new: A of the task that is learned, (r, in).

    Raises:
        ValueError: the factors are not matrices over the same inputs.
    """
    total = new.new_zeros(())
    for A in old:
        if A.dim() != 2 or new.dim() != 2 or A.shape[1] != new.shape[1]:
            shapes = f"{tuple(A.shape)} and new {tuple(new.shape)}"
            raise ValueError(f"old and new must be (r, in) with equal in, got old {shapes}")
        total = total + (A.detach().to(new) @ new.T).abs().sum()  # (r_old, r)
    return total
