"""Exercise 6: a training step inside a random subspace."""

from collections.abc import Callable

import torch
from torch import Tensor

from course.checking import Check, Seen, but

Gradient = Callable[[Tensor], Tensor]  # parameters θ (D,) -> gradient of the loss there (D,)


def subspace_step(
    start: Tensor,
    projection: Tensor,
    z: Tensor,
    gradient: Gradient,
    lr: float,
    *,
    theta=torch.add,
    back=lambda projection: projection.T,
    update=lambda z, slope, lr: z - lr * slope,
    returned=lambda z, start, projection: z,
) -> Tensor:
    """The worked answer: one step of gradient descent on z where θ = θ0 + P·z: dL/dz = Pᵀ·dL/dθ."""
    slope = back(projection) @ gradient(theta(start, projection @ z))
    return returned(update(z, slope, lr), start, projection)


def by_columns(start: Tensor, projection: Tensor, z: Tensor, gradient: Gradient, lr: float) -> Tensor:
    slope = gradient(start + sum(amount * column for amount, column in zip(z, projection.T, strict=True)))
    return torch.stack([amount - lr * column.dot(slope) for amount, column in zip(z, projection.T, strict=True)])


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    many, few = 15, 4
    target = torch.randn(many, generator=g)
    weights = torch.rand(many, generator=g) + 0.5

    def gradient(theta: Tensor) -> Tensor:  # of Σ w·(θ − target)² / 2
        return weights * (theta - target)

    orthonormal = torch.linalg.qr(torch.randn(many, few, generator=g)).Q
    start = torch.randn(many, generator=g)
    lr = 0.05 + 0.3 * torch.rand((), generator=g).item()
    for name, projection in (
        ("orthonormal columns", orthonormal),
        ("columns of other lengths", 1.5 * torch.rand(many, few, generator=g) - 0.2),
    ):
        result = answer(start, projection, torch.randn(few, generator=g), gradient, lr)
        yield f"z after one step, P with {name}", result
        if not isinstance(result, Tensor) or result.shape != (few,):
            return
    z = torch.zeros(few)
    for _ in range(100):
        z = answer(start, orthonormal, z, gradient, 0.3)
    # 100 steps end in the subspace's own minimum, which the normal equations give
    yield "the loss after 100 steps from z = 0", (weights * (start + orthonormal @ z - target).square()).sum().item() / 2


check = Check(
    task="a training step inside a random subspace",
    observe=observe,
    reference=subspace_step,
    second=by_columns,
    misconceptions={
        "the gradient was taken at θ0: take it where the model is now, at θ0 + P·z": but(theta=lambda start, step: start),
        "θ0 is missing: the model's parameters are θ0 + P·z, not P·z": but(theta=lambda start, step: step),
        "you went up the slope: subtract the gradient": but(update=lambda z, slope, lr: z + lr * slope),
        "you returned θ: only z is trained; return the new z": but(returned=lambda z, start, projection: start + projection @ z),
        "you returned the gradient of z: take the step, z − lr · gradient": but(update=lambda z, slope, lr: slope),
        "you divided by the squared lengths of P's columns (a least-squares fit): the chain rule asks for Pᵀ, nothing else": but(
            back=torch.linalg.pinv
        ),
        "the old z was not there: a step is z − lr · gradient, not −lr · gradient": but(update=lambda z, slope, lr: -lr * slope),
        "you changed the z that was passed in: return a new tensor": but(update=lambda z, slope, lr: z.sub_(lr * slope)),
    },
)
