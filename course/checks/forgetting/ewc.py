"""Exercise 2: EWC over a sequence of tasks."""

import torch
from torch import Tensor, nn

from course.checking import Check, Seen, but, raised
from reference.ewc import EWC, uniform_fisher


class OnlineEWC:
    """The worked answer: one F and one centre, which move along."""

    def __init__(self, model: nn.Module, lam: float, gamma: float) -> None:
        if self.refused(lam):
            raise ValueError(f"lam must be at least 0, got {lam}")
        self.model, self.lam, self.gamma = model, lam, gamma
        self.fisher = self.start = None

    def refused(self, lam: float) -> bool:
        return lam < 0

    def now(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def centre(self) -> dict[str, Tensor]:
        return self.now()

    def kept(self, F: Tensor) -> Tensor:
        return F.clone()

    def add(self, old: Tensor, new: Tensor) -> Tensor:
        return self.gamma * old + new

    def consolidate(self, fisher: dict[str, Tensor]) -> None:
        first = self.fisher is None
        self.fisher = {n: self.kept(F) if first else self.add(self.fisher[n], F) for n, F in fisher.items()}
        self.start = self.centre()

    def strength(self) -> float:
        return self.lam / 2

    def distance(self, F: Tensor, p: Tensor, start: Tensor) -> Tensor:
        return (F * (p - start).square()).sum()

    def returned(self, penalty: Tensor) -> Tensor:
        return penalty

    def penalty(self) -> Tensor:
        if self.fisher is None:
            return torch.zeros(())
        parts = [self.distance(self.fisher[n], p, self.start[n]) for n, p in self.model.named_parameters()]
        return self.returned(self.strength() * torch.stack(parts).sum())


class ByTheReference:
    """On reference.ewc, which holds F and θ*."""

    def __init__(self, model: nn.Module, lam: float, gamma: float) -> None:
        self.inner = EWC(model, {n: 0 * ones for n, ones in uniform_fisher(model).items()}, lam)
        self.gamma = gamma

    def consolidate(self, fisher: dict[str, Tensor]) -> None:
        self.inner.consolidate(fisher, self.gamma)

    def penalty(self) -> Tensor:
        return self.inner.penalty()


def keep_first(self) -> dict[str, Tensor]:
    return self.start or self.now()


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    lam, gamma = 1 + 5 * torch.rand((), generator=g).item(), 0.2 + 0.5 * torch.rand((), generator=g).item()

    def moved() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=g))

    def fisher() -> dict[str, Tensor]:
        return {n: torch.rand(p.shape, generator=g) for n, p in model.named_parameters()}

    moved()
    ewc = answer(model, lam, gamma)
    yield "the penalty before any task", float(ewc.penalty())
    first = fisher()
    ewc.consolidate(first)
    yield "the penalty right after the first task", float(ewc.penalty())
    moved()
    penalty = ewc.penalty()
    yield "the penalty after the parameters moved", penalty.detach() if isinstance(penalty, Tensor) else penalty
    graded = isinstance(penalty, Tensor) and penalty.requires_grad
    yield "whether the penalty has a gradient", graded
    if not graded:
        return
    model.zero_grad()
    penalty.backward()
    yield "the gradient of the first bias", model[0].bias.grad.clone()
    with torch.no_grad():
        first["0.weight"].zero_()  # the caller's own: a copy must have been kept
    ewc.consolidate(fisher())
    yield "the penalty right after the second task", float(ewc.penalty())
    moved()
    yield "the penalty after the second task, and a move", ewc.penalty().detach()
    ewc.consolidate(fisher())
    moved()
    yield "the penalty after the third task, and a move", ewc.penalty().detach()
    yield "λ below zero", raised(answer, model, -0.5, gamma)
    yield "λ = 0", raised(answer, model, 0.0, gamma)


check = Check(
    task="EWC over a sequence of tasks: the penalty, F and θ* that move along",
    observe=observe,
    reference=OnlineEWC,
    second=ByTheReference,
    misconceptions={
        "the ½ is missing: the penalty is λ/2 Σ F (θ − θ*)²": but(strength=lambda self: self.lam),
        "F is squared. It holds squared gradients already": but(distance=lambda self, F, p, start: (F**2 * (p - start).square()).sum()),
        "the distance is not squared": but(distance=lambda self, F, p, start: (F * (p - start).abs()).sum()),
        "θ* moves with the model, so that the penalty stays zero: keep copies, detach().clone()": but(
            now=lambda self: dict(self.model.named_parameters())
        ),
        "F is the caller's own tensor, who may change it later: keep copies, F.clone()": but(kept=lambda self, F: F),
        "the penalty has no gradient: θ must not be detached, only θ*": but(returned=lambda self, penalty: penalty.detach()),
        "θ* is still that of the first task: after each task the centre is where the model is then": but(centre=keep_first),
        "only the last task's F is left: F ← γ·F + F_new": but(add=lambda self, old, new: new),
        "the decay is forgotten: F ← γ·F + F_new": but(add=lambda self, old, new: old + new),
        "γ multiplies the wrong one: it fades the *earlier* tasks, F ← γ·F + F_new": but(add=lambda self, old, new: old + self.gamma * new),
        "that is a running average. Online EWC adds: F ← γ·F + F_new": but(
            add=lambda self, old, new: self.gamma * old + (1 - self.gamma) * new
        ),
        "a negative λ would *push* the model away from θ*: raise a ValueError": but(refused=lambda self, lam: False),
    },
)
