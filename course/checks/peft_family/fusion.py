"""Exercise 5: AdapterFusion's attention over adapters."""

import math

import torch
from torch import Tensor

from course.checking import Check, Seen, but


def fuse(
    h: Tensor,
    u: Tensor,
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    *,
    times=lambda x, W: x @ W.T,
    queried=lambda h, u: h,
    keyed=lambda h, u: u,
    valued=lambda u, V: u @ V.T,
    scores=lambda q, k: torch.einsum("td,tnd->tn", q, k),
    soft=lambda scores: scores.softmax(-1),
    finish=lambda mixed, h: mixed,
) -> Tensor:
    """The worked answer: every token weighs the adapters' outputs."""
    q, k, v = times(queried(h, u), Q), times(keyed(h, u), K), valued(u, V)  # (t, d), (t, n, d), (t, n, d)
    weights = soft(scores(q, k))  # (t, n)
    return finish(torch.einsum("tn,tnd->td", weights, v), h)


def by_loops(h: Tensor, u: Tensor, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    out = []
    for token, outputs in zip(h, u, strict=True):
        weights = torch.softmax(torch.stack([(Q @ token) @ (K @ each) for each in outputs]), 0)
        out.append(V @ sum(weight * each for weight, each in zip(weights, outputs, strict=True)))
    return torch.stack(out)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for tokens, n, d in ((4, 3, 6), (3, 3, 5), (1, 2, 4)):
        h, u = torch.randn(tokens, d, generator=g), torch.randn(tokens, n, d, generator=g)
        Q, K, V = (torch.randn(d, d, generator=g) / d**0.5 for _ in range(3))
        yield f"the output for {tokens} tokens and {n} adapters", answer(h, u, Q, K, V)
    yield "the output with Q = 0 and V = I, the adapters' mean", answer(h, u, torch.zeros(d, d), K, torch.eye(d))


check = Check(
    task="AdapterFusion: a softmax over adapters for every token",
    observe=observe,
    reference=fuse,
    second=by_loops,
    misconceptions={
        "the scores were divided by √d: attention between tokens does that, AdapterFusion does not": but(
            scores=lambda q, k: torch.einsum("td,tnd->tn", q, k) / math.sqrt(q.shape[1])
        ),
        "the softmax runs over tokens: for each token the adapters' weights add up to one, dim=-1": but(soft=lambda s: s.softmax(0)),
        "V is missing: the values are V times an adapter's output": but(valued=lambda u, V: u),
        "the query comes from the adapters: it is Q times the token's x": but(queried=lambda h, u: u.mean(1)),
        "x was added: the sum with the residual is the block's own, and would be there twice": but(finish=lambda mixed, h: mixed + h),
        "every adapter has the same weight: the softmax of q·k is missing, or the keys come from the token, the same for all": but(
            soft=lambda s: torch.full_like(s, 1 / s.shape[1])
        ),
        "the weights are the scores themselves: take their softmax": but(soft=lambda s: s),
        "Q, K and V were multiplied from the other side: like a linear layer's weight they are (out, in), so multiply by Q.T from the "
        "right": but(times=lambda x, W: x @ W, valued=lambda u, V: u @ V),
        "V was multiplied from the other side: like a linear layer's weight it is (out, in), so multiply by V.T from the right": but(
            valued=lambda u, V: u @ V
        ),
    },
)
