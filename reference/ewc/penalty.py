"""Elastic weight consolidation: let a parameter move as far as the earlier task does not mind.

Around the end θ* of the earlier task its loss is nearly a parabola, since the gradient is nearly
zero there. Of the parabola's matrix only the diagonal is kept, and for the curvature stands the
Fisher information F (:mod:`reference.ewc.fisher`):

    loss on the earlier task ≈ loss at θ* + ½ Σ F (θ − θ*)²

A later task is then trained with λ times that rise added to its own loss:

    L(θ) + λ/2 Σ F (θ − θ*)²

With F per prediction, as here, λ is a weight between two losses in one unit: at λ = 1 a nat on
the earlier task costs as much as a nat on the new one. With F = 1 it is plain L2 to the start.

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks". One penalty that
moves along, for more than two tasks: Huszár 2018; the decay γ: Schwarz et al. 2018 (online EWC).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from reference.arguments import check_number


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that require gradients.

    Raises:
        ValueError: there is none.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "model has no parameter that requires gradients: unfreeze it or inject adapters first"
        )
    return trained


def uniform_fisher(model: nn.Module) -> dict[str, Tensor]:
    """A "Fisher" of ones, which makes EWC plain L2 to the start (L2-SP: Li et al. 2018)."""
    return {name: torch.ones_like(p) for name, p in trained_parameters(model).items()}


def checked(fisher: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``fisher`` as detached copies on the devices of ``trained``.

    Raises:
        ValueError: names or shapes differ, or a value is negative, NaN or infinite.
    """
    if absent := sorted(set(fisher) - set(trained)):
        raise ValueError(f"fisher has {absent[0]!r}, which is no trained parameter of model")
    if missing := sorted(set(trained) - set(fisher)):
        raise ValueError(
            f"fisher lacks {missing[0]!r}: give zeros for a parameter that may move freely"
        )
    for name, p in trained.items():
        if fisher[name].shape != p.shape:
            shapes = f"{tuple(fisher[name].shape)}, its parameter {tuple(p.shape)}"
            raise ValueError(f"fisher[{name!r}] has the shape {shapes}")
        if not (torch.isfinite(fisher[name]).all() and (fisher[name] >= 0).all()):
            raise ValueError(f"fisher[{name!r}] must be finite and nowhere negative")
    return {name: fisher[name].detach().to(p.device, copy=True) for name, p in trained.items()}


class EWC:
    """Holds F and θ*, the parameters of now; ``penalty()`` goes into the next task's loss.

    One object for each task gives the sum of penalties of the first paper. One object with
    ``consolidate`` after each task gives the online form, whose memory does not grow.

    Args:
        model: at the end of the earlier task. Its trained parameters are penalised.
        fisher: name -> F, of the parameter's shape; what ``fisher_diagonal`` gives.
        lam: λ, at least 0.

    Raises:
        TypeError: ``lam`` is not a number.
        ValueError: ``lam`` is negative, nothing is trained, or ``fisher`` does not fit.
    """

    def __init__(self, model: nn.Module, fisher: Mapping[str, Tensor], lam: float) -> None:
        check_number("lam", lam, 0)
        self.model, self.lam = model, lam
        self.trained = trained_parameters(model)
        self.fisher = checked(fisher, self.trained)
        self.start = self._now()

    def _now(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trained.items()}

    def penalty(self) -> Tensor:
        """λ/2 Σ F (θ − θ*)², a scalar with a gradient; in nats if F is from a loss in nats."""
        rises = [
            (self.fisher[name] * (p - self.start[name]).square()).sum()
            for name, p in self.trained.items()
        ]
        return self.lam / 2 * torch.stack([rise.to(rises[0].device) for rise in rises]).sum()

    def consolidate(self, fisher: Mapping[str, Tensor], gamma: float = 1.0) -> None:
        """After one more task: F ← γF + F_new, and θ* ← θ. One penalty, centred where it is now.

        Args:
            fisher: of the task that was just learned, at the parameters of now.
            gamma: how much of the earlier tasks' F stays, from 0 to 1.

        Raises:
            TypeError, ValueError: as for the constructor; nothing is changed then.
        """
        check_number("gamma", gamma, 0, 1)
        new = checked(fisher, self.trained)
        self.fisher = {name: gamma * F + new[name] for name, F in self.fisher.items()}
        self.start = self._now()
