"""Exercise 5: a weight with only the best rank-r part of its update."""

import torch
from torch import Tensor

from course.checking import Check, Seen, but, mistaken
from course.checks.svd.factors import truncated_svd
from course.checks.svd.shared import as_given, nearest, or_torchs_refusal, with_singular_values


def keep_update(
    before: Tensor,
    after: Tensor,
    rank: int,
    *,
    wide=Tensor.float,
    truncate=truncated_svd,
    combine=lambda w0, w1, best: w0 + best(w1 - w0),
    narrow=Tensor.type_as,
) -> Tensor:
    """The worked answer: W0 + the best rank-r part of W1 − W0, in float32, rounded once to the weights' own dtype."""

    def best(matrix: Tensor) -> Tensor:
        b, a = truncate(matrix, rank)
        return b @ a

    return narrow(combine(wide(before), wide(after), best), before)


def by_projection(before: Tensor, after: Tensor, rank: int) -> Tensor:
    change = after.double() - before.double()
    q = torch.linalg.eigh(change @ change.T).eigenvectors[:, -rank:]  # (out, r): the left singular vectors of the largest
    return (before.double() + q @ (q.T @ change)).to(before.dtype)


def change_with_few_large(out: int, inside: int, rank: int, g: torch.Generator) -> Tensor:
    """Singular values 2, …, 1 and then 0.4, …: with a gap behind ``rank``, float32 finds the best part to its last digits."""
    s = torch.cat([torch.linspace(2, 1, rank), torch.linspace(0.4, 0.1, min(out, inside) - rank)])
    return with_singular_values(s, (out, inside), g)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for name, (out, inside, rank), dtype in (
        ("a wide float32 layer", (6, 10, 2), torch.float32),
        ("a tall float32 layer", (12, 5, 3), torch.float32),
        ("a bfloat16 layer", (40, 32, 2), torch.bfloat16),
    ):
        before = torch.randn(out, inside, generator=g).to(dtype)
        after = (before.float() + change_with_few_large(out, inside, rank, g)).to(dtype)
        exact = keep_update(before, after, rank, wide=Tensor.double, narrow=as_given)
        result, refusal = or_torchs_refusal(answer, before, after, rank)
        yield f"an error of torch for {name}", refusal
        if refusal:
            return
        if dtype is torch.float32:
            yield f"the weight of {name}", result
        else:
            like = isinstance(result, Tensor) and result.shape == exact.shape and result.dtype == dtype
            yield f"the dtype of {name}", str(result.dtype) if isinstance(result, Tensor) else type(result).__name__
            yield f"the weight of {name} is right to within 1 %", like and torch.allclose(result.double(), exact, rtol=1e-2, atol=1e-2)
            yield f"every number of {name} is the {dtype} number nearest to the exact one", like and nearest(result, exact, slack=1e-5)


check = Check(
    task="a weight with only the best rank-r part of its update",
    observe=observe,
    reference=keep_update,
    second=by_projection,
    rtol=1e-3,
    atol=1e-4,
    misconceptions={
        "you truncated the fine-tuned weight itself, and with it what pre-training had learned: truncate the change, after − before": but(
            combine=lambda w0, w1, best: best(w1)
        ),
        "you truncated the weight from before and added the whole change: truncate the change, after − before": but(
            combine=lambda w0, w1, best: best(w0) + w1 - w0
        ),
        "that is the truncated change alone: add it to the weight from before": but(combine=lambda w0, w1, best: best(w1 - w0)),
        "the change has the wrong sign: it is after − before": but(combine=lambda w0, w1, best: w0 + best(w0 - w1)),
        "the truncated change was added to the weight from after, which already holds all of it: add it to the one from before": but(
            combine=lambda w0, w1, best: w1 + best(w1 - w0)
        ),
        "each weight was truncated on its own before the difference was taken: take the difference first": but(
            combine=lambda w0, w1, best: w0 + best(w1) - best(w0)
        ),
        "you kept the smallest singular values of the change: the first ones are the largest": but(
            truncate=mistaken(truncated_svd, kept=lambda rank: slice(-rank, None))
        ),
        "the bfloat16 weight was rounded more than once: convert both weights to float32 first, subtract, truncate and add there, and "
        "round at the end": but(wide=as_given),
        "torch has no SVD for 16-bit types: convert both weights to float32 first": but(
            wide=as_given, truncate=mistaken(truncated_svd, wide=as_given)
        ),
        "the weight came back in float32: the layer needs its own dtype": but(narrow=as_given),
        "you wrote into the weight from before: its caller still needs it, so return a new tensor": but(
            narrow=lambda weight, before: before.copy_(weight)
        ),
    },
)
