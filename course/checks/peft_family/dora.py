"""Exercise 1: DoRA's forward pass, and through what its gradient flows."""

import torch
from torch import Tensor
from torch.nn import functional as F

from course.checking import Check, Seen, but


def direction(weight: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return weight + s * (B @ A)  # D, (out, in)


def of_rows(V: Tensor) -> Tensor:
    return V.norm(dim=1, keepdim=True)  # (out, 1)


def dora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    s: float,
    m: Tensor,
    *,
    changed=direction,
    norm=of_rows,
    of=lambda weight, V: V,
    constant=Tensor.detach,
    scaled=lambda V, m, length: m[:, None] * V / length,
    add=lambda y, bias, m: y + bias,
) -> Tensor:
    """The worked answer: W' = μ ⊙ D/‖D‖ with the norm as a constant; the bias is left alone."""
    V = changed(weight, A, B, s)
    W = scaled(V, m, constant(norm(of(weight, V))))
    return add(x @ W.T, bias, m)


def by_gain(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, s: float, m: Tensor) -> Tensor:
    """LoRA's output times μ/‖D‖; the norm without B·A."""
    with torch.no_grad():
        squares = weight.square().sum(1) + 2 * s * ((weight @ A.T) * B).sum(1) + s * s * ((B @ (A @ A.T)) * B).sum(1)
    return (F.linear(x, weight) + s * F.linear(F.linear(x, A), B)) * (m / squares.sqrt()) + bias


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for n_out, n_in, r in ((6, 6, 2), (5, 8, 3)):  # square first, so that a norm over columns fits too
        weight, bias, s = torch.randn(n_out, n_in, generator=g), torch.randn(n_out, generator=g), 1.5 + torch.rand(1, generator=g).item()
        trained = torch.randn(r, n_in, generator=g), torch.randn(n_out, r, generator=g), torch.rand(n_out, generator=g) + 0.5
        A, B, m = (each.requires_grad_() for each in trained)
        x = torch.randn(3, n_in, generator=g)
        still = weight.norm(dim=1)
        size = f"of a {n_out} × {n_in} layer"
        yield (
            f"the output {size} where training starts",
            answer(x, weight, bias, A.detach(), torch.zeros(n_out, r), s, still),
        )
        y = answer(x, weight, bias, A, B, s, m)
        yield f"the output {size}", y
        if not isinstance(y, Tensor):
            return
        loss = (y * torch.randn(y.shape, generator=g)).sum()
        gradients = torch.autograd.grad(loss, (A, B, m), allow_unused=True) if y.requires_grad else (None, None, None)
        reached = {name: gradient for name, gradient in zip(("A", "B", "magnitude"), gradients, strict=True) if gradient is not None}
        yield f"what gets a gradient through the output {size}", ", ".join(reached) or "nothing"
        for name, gradient in reached.items():
            yield f"the gradient of {name} {size}", gradient


check = Check(
    task="DoRA: a magnitude for each output, a direction from LoRA, and a norm that is a constant",
    observe=observe,
    reference=dora,
    second=by_gain,
    rtol=1e-3,
    atol=1e-4,
    misconceptions={
        "the norm runs over the wrong axis: torch keeps W as (out, in), and there is one magnitude for each output, so take the norm of "
        "each row, dim=1": but(norm=lambda V: V.norm(dim=0, keepdim=True)),
        "one norm for the whole matrix: each row has its own": but(norm=lambda V: V.norm()),
        "the gradient flows through the norm: DoRA treats it as a constant, so detach it (the output is right, the gradients of A and B "
        "are not)": but(constant=lambda length: length),
        "the norm is that of W alone: it must be that of D = W + s·B·A": but(of=lambda weight, V: weight),
        "D is not divided by its norm: multiply by magnitude/‖D‖, not by the magnitude": but(scaled=lambda V, m, length: m[:, None] * V),
        "the scale is missing: D = W + s·B·A": but(changed=lambda weight, A, B, s: direction(weight, A, B, 1.0)),
        "the bias was multiplied by the magnitude: only the weight is rescaled; add the bias as it is": but(
            add=lambda y, bias, m: y + bias * m
        ),
        "the bias is missing: add the frozen layer's": but(add=lambda y, bias, m: y),
        "D is detached as a whole: then A and B never learn; detach the norm alone": but(
            changed=lambda weight, A, B, s: direction(weight, A, B, s).detach()
        ),
        "the update is missing: D = W + s·B·A is what is normalized": but(
            changed=lambda weight, A, B, s: weight,
        ),
        "the norms multiply columns: of (out,) torch makes a row; keepdim=True makes it (out, 1)": but(norm=lambda V: V.norm(dim=1)),
        "the magnitudes multiply columns: of (out,) torch makes a row; magnitude[:, None] is (out, 1)": but(
            scaled=lambda V, m, length: m * V / length
        ),
        "norms and magnitudes both multiply columns: of (out,) torch makes a row; make them (out, 1)": but(
            norm=lambda V: V.norm(dim=1), scaled=lambda V, m, length: m * V / length
        ),
    },
)
