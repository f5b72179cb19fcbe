"""The weight of a k×k convolution and a 1×1 convolution after it."""

import torch
from torch import Tensor

from course.checking import Check, Seen, but


def conv_delta(
    lora_A: Tensor, lora_B: Tensor, scaling: float, *, matrix=lambda B: B[:, :, 0, 0], scale=lambda s: s, arranged=lambda update: update
) -> Tensor:
    """The worked answer: the rank is summed over, the positions of A are carried along."""
    return arranged(scale(scaling) * torch.einsum("or,rihw->oihw", matrix(lora_B), lora_A))


def by_matrix(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    flat = lora_B.flatten(1) @ lora_A.flatten(1)  # (out, in·h·w)
    return (scaling * flat).view(lora_B.shape[0], *lora_A.shape[1:])


def centre_alone(update: Tensor) -> Tensor:
    centre, (h, w) = torch.zeros_like(update), (size // 2 for size in update.shape[2:])
    centre[:, :, h, w] = update[:, :, h, w]
    return centre


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)

    def update(out: int, r: int, inn: int, h: int, w: int, scaling: float, dtype: torch.dtype = torch.float32) -> Tensor:
        lora_A = torch.randn(r, inn, h, w, generator=g, dtype=dtype)
        return answer(lora_A, torch.randn(out, r, 1, 1, generator=g, dtype=dtype), scaling)

    yield "the update of a 3×3 convolution with 4 input and 5 output channels", update(5, 3, 4, 3, 3, 2.6)
    yield "the update of a 3×5 convolution with 4 input and 4 output channels", update(4, 2, 4, 3, 5, 2.6, torch.float64)
    yield "the update of a 1×1 convolution", update(5, 2, 4, 1, 1, 1.4)
    try:
        squeezed = update(5, 1, 4, 3, 2, 0.7)
    except (RuntimeError, IndexError):
        squeezed = "an error"
    yield "the update of rank 1 of a 3×2 convolution", squeezed


check = Check(
    task="the weight that a k×k and a 1×1 convolution make together",
    observe=observe,
    reference=conv_delta,
    second=by_matrix,
    misconceptions={
        "the scale is missing: the update is scaling·(B after A)": but(scale=lambda s: 1.0),
        "the update is divided by the scaling: multiply": but(scale=lambda s: 1 / s),
        "input and output channels are swapped: a convolution's weight is (out, in, h, w)": but(arranged=lambda u: u.transpose(0, 1)),
        "height and width are swapped: keep A's last two axes in their order": but(arranged=lambda u: u.transpose(2, 3)),
        "the kernel is turned by 180°: torch's conv2d correlates, it does not flip": but(arranged=lambda u: u.flip(2, 3)),
        "the numbers are right but in the wrong places: A was flattened as (h, w, in) and unfolded as (in, h, w)": but(
            arranged=lambda u: u.permute(0, 2, 3, 1).reshape(u.shape)
        ),
        "only the centre of the kernel was filled: all k·k positions of A count": but(arranged=centre_alone),
        "the positions of the kernel were summed up: every position keeps its own value": but(
            arranged=lambda u: u.sum((2, 3), keepdim=True).expand_as(u)
        ),
        "your code fails at rank 1: squeeze() takes away every axis of length 1, that of the rank too; take only the last two, as "
        "lora_B[:, :, 0, 0] or lora_B.flatten(1) does": but(matrix=torch.squeeze),
        "the update is still a matrix (out, in·h·w): give it the shape of the convolution's weight": but(arranged=lambda u: u.flatten(1)),
    },
)
