"""Exercise 3: TIES, entry by entry."""

import torch
from torch import Tensor

from course.checking import Check, Seen, but


def largest(delta: Tensor, density: float) -> Tensor:
    count = int(density * delta.numel())
    kept = torch.zeros(delta.numel())
    kept[delta.abs().flatten().topk(count).indices] = 1
    return delta * kept.view_as(delta)


def rounded(delta: Tensor, density: float) -> Tensor:
    return largest(delta, (round(density * delta.numel()) + 0.5) / delta.numel())


def most_positive(delta: Tensor, density: float) -> Tensor:
    return torch.where(delta >= delta.flatten().topk(int(density * delta.numel())).values[-1], delta, 0.0)


def smallest(delta: Tensor, density: float) -> Tensor:
    return delta - largest(delta, 1 - density)


def by_total(trimmed: Tensor, weights: Tensor) -> Tensor:
    return torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)


def ties(
    deltas: list[Tensor],
    weights: list[float],
    density: float,
    *,
    trim=largest,
    elect=by_total,
    count=lambda agrees, weights: agrees.sum(0).clamp(min=1),
    agree=lambda trimmed, sign: trimmed.sign() == sign,
) -> Tensor:
    """The worked answer: trim each, elect a sign for each entry, average who agrees."""
    trimmed = torch.stack([trim(delta, density) for delta in deltas])  # (adapters, out, in)
    w = torch.tensor(weights).view(-1, 1, 1)
    agrees = agree(trimmed, elect(trimmed, w))
    return (w * trimmed * agrees).sum(0) / count(agrees, w)


def by_entries(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """With loops, the way one would explain it."""
    trimmed = []
    for delta in deltas:
        order = sorted(range(delta.numel()), key=lambda i, d=delta: -abs(d.flatten()[i].item()))
        kept = set(order[: int(density * delta.numel())])
        trimmed.append([v if i in kept else 0.0 for i, v in enumerate(delta.flatten().tolist())])
    out = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        same = [(w, v) for w, v in zip(weights, entries, strict=True) if v * sign > 0]
        out.append(sum(w * v for w, v in same) / len(same) if same else 0.0)
    return torch.tensor(out).view_as(deltas[0])


def together_trimmed(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """One threshold for all adapters: the larger ones keep more."""
    stacked = largest(torch.stack(deltas), density)
    return ties(list(stacked), weights, 1.0)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for adapters, weights, density in ((2, [1.0, 1.0], 1.0), (3, [1.0, 1.0, 1.0], 0.5), (3, [3.0, 0.25, 1.0], 0.7), (4, [0.25] * 4, 0.65)):
        sizes = 0.5 + torch.arange(adapters)  # adapters of different sizes
        deltas = [float(size) * torch.randn(8, 9, generator=g) for size in sizes]
        yield f"the merge of {adapters} updates, weights {weights}, density {density}", answer(deltas, weights, density)
    one = [torch.randn(3, 4, generator=g)]
    yield "the merge of a single update with density 1", answer(one, [1.0], 1.0)
    level = torch.randint(1, 9, (3, 4), generator=g).float()  # whole numbers: totals are 0 exactly
    yield "the merge of an update and its negative, where every total is 0", answer([level, -level], [1.0, 1.0], 1.0)


check = Check(
    task="TIES: trim each update, elect a sign for each entry, average those that agree",
    observe=observe,
    reference=ties,
    second=by_entries,
    misconceptions={
        "the sign was elected by how many have it: TIES lets the larger total win, so a large entry outvotes two small ones": but(
            elect=lambda trimmed, w: torch.where(trimmed.sign().sum(0) >= 0, 1.0, -1.0)
        ),
        "the sign was elected after the weights were applied: here, as in peft, the vote is over the trimmed updates": but(
            elect=lambda trimmed, w: torch.where((w * trimmed).sum(0) >= 0, 1.0, -1.0)
        ),
        "a total of 0 elected no sign, so the entry was lost: here it counts as plus": but(elect=lambda trimmed, w: trimmed.sum(0).sign()),
        "the sum is divided by the number of adapters: divide each entry by how many agree with its sign there": but(
            count=lambda agrees, w: torch.full(agrees.shape[1:], float(len(agrees)))
        ),
        "where no update has the elected sign, 0 is divided by 0: the result there is 0": but(count=lambda agrees, w: agrees.sum(0)),
        "the sum is not divided: TIES averages those that agree, so weights 1 and 1 give a mean": but(count=lambda agrees, w: 1.0),
        "the sum is divided by the weights of those that agree: TIES counts them": but(
            count=lambda agrees, w: torch.where(agrees.any(0), (agrees * w).sum(0), 1.0)
        ),
        "no sign was elected: without it opposite entries cancel each other, which is what TIES avoids": but(
            agree=lambda trimmed, sign: trimmed != 0
        ),
        "nothing was trimmed: only the largest int(density·n) entries of each update vote and count": but(
            trim=lambda delta, density: delta
        ),
        "the number of entries that stay was rounded: here it is int(density·n), rounded down": but(trim=rounded),
        "the largest entries were kept, signs included, so negative ones are lost: the largest by absolute value stay": but(
            trim=most_positive
        ),
        "the weights have no effect: add up weight · entry": lambda deltas, weights, density: ties(deltas, [1.0] * len(deltas), density),
        "the smallest entries were kept: trim those, and keep the largest": but(trim=smallest),
        "all updates were trimmed by one threshold: each keeps its own largest entries, or a small adapter loses everything": (
            together_trimmed
        ),
    },
)
