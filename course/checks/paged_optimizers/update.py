"""Exercise 3: AdamW on one page, which holds pieces of several parameters."""

import torch
from torch import Tensor

from course.checking import Check, but


def torchs_way(m: Tensor, v: Tensor, t: int, beta1: float, beta2: float, eps: float) -> Tensor:
    """m and v corrected for the zeros that they began with: what p moves by, over η."""
    return m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)


def update_page(
    page: Tensor,
    pieces: list[tuple[int, int, int, int]],
    parameters: list[Tensor],
    gradients: list[Tensor | None],
    steps: list[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    rows=lambda page: (page[0], page[1]),
    place_in_gradient=lambda start, offset: start,
    place_in_page=lambda start, offset: offset,
    order=lambda betas: betas,
    step_of=lambda steps, number: steps[number],
    absent=lambda parameter: None,  # what stands for a gradient that is not there
    with_decay=lambda g, p, weight_decay: g,
    decay=lambda p, lr, weight_decay: p * (1 - lr * weight_decay),
    late=lambda p, lr, weight_decay: p,
    direction=torchs_way,
) -> None:
    """The worked answer: views of the piece in parameter, gradient and page, then AdamW's four lines."""
    beta1, beta2 = order(betas)
    for number, start, offset, length in pieces:
        g = gradients[number] if gradients[number] is not None else absent(parameters[number])
        if g is None:
            continue
        p = parameters[number][start : start + length]
        here = place_in_gradient(start, offset)
        g = with_decay(g[here : here + length], p, weight_decay)
        first = place_in_page(start, offset)
        m, v = (row[first : first + length] for row in rows(page))
        p.copy_(decay(p, lr, weight_decay))
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g.square())
        p.sub_(lr * direction(m, v, step_of(steps, number), beta1, beta2, eps))
        p.copy_(late(p, lr, weight_decay))


def by_torchs_optimizer(page, pieces, parameters, gradients, steps, lr, betas, eps, weight_decay):
    for number, start, offset, length in pieces:
        if gradients[number] is None:
            continue
        p = torch.nn.Parameter(parameters[number][start : start + length].clone())
        p.grad = gradients[number][start : start + length].clone()
        optimizer = torch.optim.AdamW([p], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        m, v = page[:, offset : offset + length]
        optimizer.state[p] = {"step": torch.tensor(float(steps[number] - 1)), "exp_avg": m, "exp_avg_sq": v}
        optimizer.step()
        parameters[number][start : start + length] = p.detach()


def early_eps(m: Tensor, v: Tensor, t: int, beta1: float, beta2: float, eps: float) -> Tensor:
    return m / (1 - beta1**t) / ((v.sqrt() + eps) / (1 - beta2**t) ** 0.5)


def observe(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *bounds: int(torch.randint(*bounds, (), generator=g))  # noqa: E731
    lengths = [draw(3, 7) for _ in range(4)]
    offsets = [0]
    for length in lengths[:-1]:
        offsets.append(offsets[-1] + length + draw(0, 3))  # pieces may have a gap between them
    starts = [offset + 1 + draw(0, 4) if i % 2 else max(1, offset - draw(1, 3)) for i, offset in enumerate(offsets)]
    pieces = [(i, starts[i], offsets[i], lengths[i]) for i in range(4)]
    sizes = [max(start, offset) + length + draw(0, 4) for _, start, offset, length in pieces]
    parameters, gradients = ([torch.randn(size, generator=g) for size in sizes] for _ in range(2))
    steps = torch.randperm(9, generator=g)[:4].add(2).tolist()
    page = torch.randn(2, offsets[-1] + lengths[-1] + 10, generator=g)
    page[1] = page[1].square() / 4
    settings = {"lr": 0.1 + 0.1 * torch.rand((), generator=g).item(), "betas": (0.7, 0.9), "eps": 0.1, "weight_decay": 0.4}
    seen = {}
    for name, which, missing in (
        ("one piece", pieces[1:2], ()),
        ("four pieces", pieces, ()),
        ("one parameter without a gradient", pieces, (2,)),
    ):
        given = page.clone(), list(which), [p.clone() for p in parameters], [None if i in missing else x for i, x in enumerate(gradients)]
        answer(*given, list(steps), **settings)
        seen |= {f"{name}: exp_avg, row 0 of the page": given[0][0], f"{name}: exp_avg_sq, row 1 of the page": given[0][1]}
        seen |= {f"{name}: parameter {i}": p for i, p in enumerate(given[2])}
    return seen


check = Check(
    task="AdamW on one page",
    observe=observe,
    reference=update_page,
    second=by_torchs_optimizer,
    misconceptions={
        "weights decay after the update, as in bitsandbytes' CUDA kernels: torch multiplies p by 1 − η·wd first, so that the update itself "
        "does not decay": but(decay=lambda p, *_: p, late=lambda p, lr, weight_decay: p * (1 - lr * weight_decay)),
        "the decay is added to the gradient: that is Adam with L2. AdamW multiplies p by 1 − η·wd and leaves g alone": but(
            with_decay=lambda g, p, weight_decay: g + weight_decay * p, decay=lambda p, *_: p
        ),
        "p decays by 1 − wd: multiply it by 1 − η·wd": but(decay=lambda p, lr, weight_decay: p * (1 - weight_decay)),
        "no weight decay: multiply p by 1 − η·wd before the update": but(decay=lambda p, *_: p),
        "no bias correction: divide m by 1 − β₁ᵗ, and v by 1 − β₂ᵗ": but(direction=lambda m, v, t, beta1, beta2, eps: m / (v.sqrt() + eps)),
        "ε stands under the root: add it to √v̂": but(
            direction=lambda m, v, t, beta1, beta2, eps: m / (1 - beta1**t) / (v / (1 - beta2**t) + eps).sqrt()
        ),
        "ε is added before v is corrected: first √(v / (1 − β₂ᵗ)), then + ε": but(direction=early_eps),
        "t is the same for all parameters: take steps[number], a parameter may have had fewer gradients": but(
            step_of=lambda steps, number: steps[0]
        ),
        "t is one too small: steps counts this step already": but(step_of=lambda steps, number: steps[number] - 1),
        "t is one too large: steps counts this step already": but(step_of=lambda steps, number: steps[number] + 1),
        "the gradient's piece is taken at the place in the page: it begins at start, like the parameter's": but(
            place_in_gradient=lambda start, offset: offset
        ),
        "the moments are taken at the place in the parameter: in the page the piece begins at offset": but(
            place_in_page=lambda start, offset: start
        ),
        "β₁ and β₂ have changed places: betas is (β₁, β₂), β₁ for m": but(order=lambda betas: betas[::-1]),
        "the rows have changed places: row 0 of the page is exp_avg, row 1 exp_avg_sq": but(rows=lambda page: (page[1], page[0])),
        "a parameter without a gradient was updated as if its gradient were zero: leave it and its moments as they are": but(
            absent=torch.zeros_like
        ),
    },
)
