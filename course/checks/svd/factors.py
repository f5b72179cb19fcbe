"""Exercise 1: the two thin factors of the best rank-r approximation.

Singular vectors have no sign of their own, so factors are compared by what does not depend on it: their product and the sizes of their
entries.
"""

import torch
from torch import Tensor

from course.checking import Check, Seen, but, unpacked
from course.checks.svd.shared import as_given, or_torchs_refusal, with_singular_values


def float32_at_least(weight: Tensor) -> Tensor:
    return weight.float() if weight.itemsize < 4 else weight


def exact_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(weight, full_matrices=False)


def randomized_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Near the first ``rank`` pieces; on a matrix of half a dozen singular values it is exact as soon as it takes all of them."""
    u, s, v = torch.svd_lowrank(weight, q=rank)
    return u, s, v.T


def truncated_svd(
    weight: Tensor,
    rank: int,
    *,
    wide=float32_at_least,
    decompose=exact_svd,
    left=as_given,
    right=as_given,
    kept=slice,
    powers: tuple[float, float] = (0.5, 0.5),
    narrow=Tensor.type_as,
    pair=lambda b, a: (b, a),
) -> tuple[Tensor, Tensor]:
    """The worked answer: the first pieces of U and of Vᵀ, √S to each, decomposed in at least 32 bits."""
    u, s, vh = decompose(wide(weight), rank)
    u, s, vh = left(u)[:, kept(rank)], s[kept(rank)], right(vh)[kept(rank)]
    b = u * s ** powers[0]  # (out, r)
    a = s[:, None] ** powers[1] * vh  # (r, in)
    return pair(narrow(b, weight), narrow(a, weight))


def from_eigenvectors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A right answer without an SVD: the right singular vectors are the eigenvectors of WᵀW."""
    full = weight.double()
    values, vectors = torch.linalg.eigh(full.T @ full)  # ascending
    v = vectors[:, -rank:].flip(1)  # (in, r)
    s = values[-rank:].flip(0).sqrt()
    return (full @ v / s.sqrt()).to(weight.dtype), (s.sqrt()[:, None] * v.T).to(weight.dtype)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for name, (out, inside, rank), dtype in (
        ("a wide float32 matrix", (5, 9, 2), torch.float32),
        ("a tall float32 matrix", (11, 6, 3), torch.float32),
        ("a square float32 matrix", (7, 7, 4), torch.float32),
        ("a float64 matrix", (6, 7, 3), torch.float64),
        ("a bfloat16 matrix", (8, 6, 2), torch.bfloat16),
        ("a float16 matrix", (6, 8, 3), torch.float16),
    ):
        weight = torch.randn(out, inside, generator=g).to(dtype)
        result, refusal = or_torchs_refusal(answer, weight, rank)
        yield f"an error of torch for {name}", refusal
        if refusal:
            return
        b, a = unpacked(result, "a pair of tensors, (B, A)", Tensor, Tensor)
        yield f"the shape of B, for {name}, {out} × {inside}, and rank {rank}", str(tuple(b.shape))
        yield f"the shape of A, for {name}, {out} × {inside}, and rank {rank}", str(tuple(a.shape))
        if b.shape != (out, rank) or a.shape != (rank, inside):
            return
        yield f"the dtypes of B and A, for {name}", f"{b.dtype}, {a.dtype}"
        if weight.itemsize >= 4:  # in 16 bits two right answers differ by a rounding: shapes and dtypes are enough there
            yield f"B @ A, for {name}", b @ a
            yield f"the sizes of B's entries, for {name}", b.abs()
            yield f"the sizes of A's entries, for {name}", a.abs()
        else:
            error = torch.linalg.matrix_norm(weight.double() - b.double() @ a.double())
            least = torch.linalg.svdvals(weight.double())[rank:].norm()
            yield f"B @ A is as close to {name} as rank {rank} allows", bool(error < 1.01 * least)
    # Many singular values of nearly one size: here an approximate decomposition is seen, and the gap behind the third keeps float32 exact.
    large = with_singular_values(torch.cat([torch.tensor([2.0, 1.5, 1.0]), torch.linspace(0.7, 0.3, 37)]), (50, 40), g)
    b, a = unpacked(answer(large, 3), "a pair of tensors, (B, A)", Tensor, Tensor)
    yield "B @ A, for a 50 × 40 matrix, where an approximate decomposition is not enough", b @ a


check = Check(
    task="the two factors of the best rank-r approximation",
    observe=observe,
    reference=truncated_svd,
    second=from_eigenvectors,
    rtol=1e-3,  # singular vectors of close singular values are less exact than float32 itself
    atol=2e-4,
    misconceptions={
        "all of S went into B: share it, √S to each factor (B = U·√S, A = √S·Vᵀ)": but(powers=(1, 0)),
        "all of S went into A: share it, √S to each factor (B = U·√S, A = √S·Vᵀ)": but(powers=(0, 1)),
        "S went into both factors whole, so B @ A holds σ² in place of σ: give √S to each": but(powers=(1, 1)),
        "the singular values are missing: U and V alone say the directions, not how long each piece is": but(powers=(0, 0)),
        "torch.linalg.svd returns Vᵀ already (it is called Vh): you transposed it again; A is its first rows": but(right=torch.t),
        "B holds the first rows of U: the left singular vectors are its columns": but(left=torch.t),
        "you kept the smallest singular values: svd sorts them largest first, so the best pieces are the first ones": but(
            kept=lambda rank: slice(-rank, None)
        ),
        "one piece too few: rank r keeps indices 0 to r − 1, so slice with [:rank]": but(kept=lambda rank: slice(rank - 1)),
        "the pieces are the right ones in another order: B's first column and A's first row belong to the largest singular value (eigh "
        "sorts upwards)": but(pair=lambda b, a: (b.flip(1), a.flip(0))),
        "A came first: return (B, A), B with shape (out, rank)": but(pair=lambda b, a: (a, b)),
        "torch.svd_lowrank starts from random directions and comes near the best pieces, not to them: use torch.linalg.svd": but(
            decompose=randomized_svd
        ),
        "torch has no SVD for 16-bit types: decompose a float32 copy, and convert the factors back": but(wide=as_given),
        "the factors of a 16-bit or float64 weight came back in float32: return them in the weight's own dtype": but(
            narrow=lambda factor, weight: factor.float()
        ),
    },
)
