"""The gradient of a batch's mean loss is squared; the Fisher information is the mean of squared gradients, row by row.

Rows pull in different directions and cancel in the mean, the more so where training has ended. The square of what is left is smaller by
about the number of rows, and belongs to other weights. No λ repairs that.
"""

import random
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from course.cases import ewc_forgets as script
from course.checking import Check, NotYet, Seen


def fisher(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The worked answer: one row at a time."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters)
        total = [old + gradient.square() for old, gradient in zip(total, gradients, strict=True)]
    return [each / len(x) for each in total]


def of_rows(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The gradients of each row's loss, for each parameter."""
    for i in range(len(x)):
        yield torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))


def absolute(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [torch.stack(each).abs().mean(0) for each in zip(*of_rows(model, x, y), strict=True)]


def of_its_own_guesses(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return fisher(model, x, model(x).argmax(1))


def added_up(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [len(x) * each for each in fisher(model, x, y)]


def by_vmap(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """All rows at once."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    of_row = grad(lambda p, one, label: F.cross_entropy(functional_call(model, p, one[None]), label[None]))
    return [gradients.square().mean(0) for gradients in vmap(of_row, (None, 0, 0))(named, x, y).values()]


def batch_times_rows(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [len(x) * each for each in script.fisher(model, x, y)]


def scaled_to_one(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    found = fisher(model, x, y)
    return [each / max(each.max() for each in found) for each in found]


def at_least(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [each.clamp(min=0.1) for each in fisher(model, x, y)]


def observe(answer, seed: int) -> Seen:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, n = rng.randrange(12, 20), rng.randrange(3, 6)
    model = nn.Sequential(nn.Linear(n, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(rows, n, generator=g), torch.randint(3, (rows,), generator=g)
    for name, repeat in (("each row once", 1), ("each row three times", 3)):
        found = answer(model, x.repeat(repeat, 1), y.repeat(repeat))
        if not isinstance(found, (list, tuple)) or not all(isinstance(each, Tensor) for each in found):
            raise NotYet("return a list of tensors, one for each parameter")
        yield f"the Fisher of each parameter, {name}", [each.detach() for each in found]
    yield "no gradient is left in the model", all(p.grad is None for p in model.parameters())


check = Check(
    task="the diagonal of the empirical Fisher information, row by row",
    observe=observe,
    reference=fisher,
    second=by_vmap,
    misconceptions={
        "the batch's mean gradient is squared: rows cancel in it before they are squared; square the gradient of each row, then take the "
        "mean": script.fisher,
        "the square of the batch's gradient was multiplied by the number of rows, as a larger λ would: the size is nearer, and it still "
        "belongs to other weights, since rows have cancelled; square row by row": batch_times_rows,
        "the squares are added up and not divided: with more rows λ would mean something else; take the mean": added_up,
        "the largest value was scaled to 1: then λ depends on one weight, and the size of the curvature is lost": scaled_to_one,
        "absolute values instead of squares: the Fisher information is a mean of squared gradients": absolute,
        "the labels are the model's own guesses: its best ones make all gradients small; take those that were given": of_its_own_guesses,
        "the values were raised to a least one: weights that don't matter are then held as well": at_least,
    },
    rtol=1e-3,
)
