"""Each factor's gradient is a product with the other: s·Bᵀ·G for A and s·G·Aᵀ for B. If both are zero, both gradients are.

No learning rate helps a gradient that is exactly zero. One factor must be random, the other zero; which one is a choice.
"""

import random

import torch
from torch import Tensor

from course.cases import flat_loss as script
from course.checking import Check, NotYet, Seen, unpacked


def factors(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """The worked answer: A random, B zero."""
    A = (torch.randn(rank, inputs) / inputs**0.5).requires_grad_()
    B = torch.zeros(outputs, rank, requires_grad=True)
    return A, B


def b_random(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """The other way round."""
    return torch.zeros(rank, inputs).requires_grad_(), torch.nn.init.kaiming_uniform_(torch.empty(outputs, rank)).requires_grad_()


def both_random(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    return factors(inputs, outputs, rank)[0], (torch.randn(outputs, rank) / rank**0.5).requires_grad_()


def equal_rows(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.full((rank, inputs), 0.1, requires_grad=True), script.factors(inputs, outputs, rank)[1]


def a_hair_from_zero(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    return (1e-18 * torch.randn(rank, inputs)).requires_grad_(), script.factors(inputs, outputs, rank)[1]


def a_does_not_train(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor]:
    A, B = factors(inputs, outputs, rank)
    return A.detach(), B


def observe(answer, seed: int) -> Seen:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    inputs, outputs, rank = rng.randrange(10, 16), rng.randrange(10, 16), rng.randrange(2, 5)
    A, B = unpacked(answer(inputs, outputs, rank), "the factors A and B", Tensor, Tensor)
    yield "the shapes", [list(A.shape), list(B.shape)]
    if A.shape != (rank, inputs) or B.shape != (outputs, rank):
        return
    x = torch.randn(64, inputs, generator=g)
    target = x @ torch.randn(inputs, outputs, generator=g)
    yield "both factors require gradients", [p.requires_grad for p in (A, B)]
    yield "B·A is exactly zero at the start", not (B @ A).any()
    trained = [p for p in (A, B) if p.requires_grad]
    if not trained:
        raise NotYet("neither factor requires a gradient: nothing can be trained")
    losses = []
    for _ in range(100):
        losses.append((x @ A.T @ B.T - target).square().mean())
        for p, gradient in zip(trained, torch.autograd.grad(losses[-1], trained), strict=True):
            p.data -= 0.1 * gradient
    yield "100 steps of gradient descent lower the loss", bool(losses[-1] < 0.95 * losses[0])
    yield "the rank of the trained update", int(torch.linalg.matrix_rank(B @ A, rtol=1e-3))


check = Check(
    task="factors that start as nothing and can learn",
    observe=observe,
    reference=factors,
    second=b_random,
    misconceptions={
        "both factors are zero, so both gradients are exactly zero at every step: start one of them at random": script.factors,
        "both factors are random: now they learn, but the first step starts from a model that is not the pretrained one; leave one of "
        "them zero": both_random,
        "all rows of A are equal: they get equal gradients for ever, and the update has rank one; draw them at random": equal_rows,
        "one factor is so small that it is zero in all but name: the other's gradient is as small, and gradient descent takes for ever; "
        "give it a size of about 1/√inputs": a_hair_from_zero,
        "A takes no gradient: it is random and stays what it was drawn; train both": a_does_not_train,
    },
)
