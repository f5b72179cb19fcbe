"""The checks of unit 01: factors, energy, effective rank, the break-even rank, truncating an update, and a step inside a subspace.

Singular vectors have no sign of their own, so factors are compared by what does not depend on it: their product and the sizes of their
entries. Wrong answers are small functions, each one right answer with one thing wrong.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from course.checking import Check, unwritten
from reference import lowrank

# ---------------------------------------------------------------------------------------------------------------- factors


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(weight.float(), full_matrices=False)


def _factors(choose: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """An answer from what it does with u, s, vh and the rank; the dtype is handled."""

    def answer(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        b, a = choose(*_svd(weight), rank)
        return b.to(weight.dtype), a.to(weight.dtype)

    return answer


def _or_torchs_refusal(answer: Callable, *arguments) -> tuple[object, str | None]:
    """The result, or what torch says of a dtype that an operation does not take."""
    try:
        return answer(*arguments), None
    except NotImplementedError as error:
        if unwritten(error):
            raise
        return None, str(error)


def in_its_own_dtype(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]


def left_in_float32(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return lowrank.truncated_svd(weight.float(), rank)


def factors_from_eigenvectors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A right answer without an SVD: the right singular vectors are the eigenvectors of WᵀW."""
    full = weight.double()
    values, vectors = torch.linalg.eigh(full.T @ full)  # ascending
    v = vectors[:, -rank:].flip(1)  # (in, r)
    s = values[-rank:].flip(0).sqrt()
    return (full @ v / s.sqrt()).to(weight.dtype), (s.sqrt()[:, None] * v.T).to(weight.dtype)


def observe_factors(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    seen = {}
    for name, (out, inside, rank), dtype in (
        ("a wide float32 matrix", (5, 9, 2), torch.float32),
        ("a tall float32 matrix", (11, 6, 3), torch.float32),
        ("a square float32 matrix", (7, 7, 4), torch.float32),
        ("a float64 matrix", (6, 7, 3), torch.float64),
        ("a bfloat16 matrix", (8, 6, 2), torch.bfloat16),
        ("a float16 matrix", (6, 8, 3), torch.float16),
    ):
        weight = torch.randn(out, inside, generator=g).to(dtype)
        kept = weight.clone()
        result, refusal = _or_torchs_refusal(answer, weight, rank)
        seen[f"an error of torch for {name}"] = refusal
        if refusal:
            return seen
        pair = isinstance(result, (tuple, list)) and len(result) == 2 and all(isinstance(part, Tensor) for part in result)
        seen["the answer is a pair of tensors, (B, A)"] = pair
        if not pair:
            return seen
        b, a = result
        seen[f"the shape of B, for {name}, {out} × {inside}, and rank {rank}"] = str(tuple(b.shape))
        seen[f"the shape of A, for {name}, {out} × {inside}, and rank {rank}"] = str(tuple(a.shape))
        if b.shape != (out, rank) or a.shape != (rank, inside):
            return seen
        seen[f"the dtypes of B and A, for {name}"] = f"{b.dtype}, {a.dtype}"
        if dtype in (torch.float32, torch.float64):  # in 16 bits two right answers differ by a rounding: shapes and dtypes are enough there
            seen[f"B @ A, for {name}"] = b @ a
            seen[f"the sizes of B's entries, for {name}"] = b.abs()
            seen[f"the sizes of A's entries, for {name}"] = a.abs()
        else:
            error = torch.linalg.matrix_norm(weight.double() - b.double() @ a.double())
            least = torch.linalg.svdvals(weight.double())[rank:].norm()
            seen[f"B @ A is as close to {name} as rank {rank} allows"] = bool(error < 1.01 * least)
        seen[f"{name} is unchanged"] = torch.equal(weight, kept)
    return seen


factors = Check(
    task="the two factors of the best rank-r approximation",
    observe=observe_factors,
    reference=lowrank.truncated_svd,
    second=factors_from_eigenvectors,
    rtol=1e-3,  # singular vectors of close singular values are less exact than float32 itself
    atol=2e-4,
    misconceptions={
        "all of S went into B: share it, √S to each factor (B = U·√S, A = √S·Vᵀ)": _factors(lambda u, s, vh, r: (u[:, :r] * s[:r], vh[:r])),
        "all of S went into A: share it, √S to each factor (B = U·√S, A = √S·Vᵀ)": _factors(
            lambda u, s, vh, r: (u[:, :r], s[:r, None] * vh[:r])
        ),
        "S went into both factors whole, so B @ A holds σ² in place of σ: give √S to each": _factors(
            lambda u, s, vh, r: (u[:, :r] * s[:r], s[:r, None] * vh[:r])
        ),
        "the singular values are missing: U and V alone say the directions, not how long each piece is": _factors(
            lambda u, s, vh, r: (u[:, :r], vh[:r])
        ),
        "torch.linalg.svd returns Vᵀ already (it is called Vh): you transposed it again; A is its first rows": _factors(
            lambda u, s, vh, r: (u[:, :r] * s[:r].sqrt(), s[:r, None].sqrt() * vh.T[:r])
        ),
        "B holds the first rows of U: the left singular vectors are its columns": _factors(
            lambda u, s, vh, r: (u[:r].T * s[:r].sqrt(), s[:r, None].sqrt() * vh[:r])
        ),
        "you kept the smallest singular values: svd sorts them largest first, so the best pieces are the first ones": _factors(
            lambda u, s, vh, r: (u[:, -r:] * s[-r:].sqrt(), s[-r:, None].sqrt() * vh[-r:])
        ),
        "one piece too few: rank r keeps indices 0 to r − 1, so slice with [:rank]": _factors(
            lambda u, s, vh, r: (u[:, : r - 1] * s[: r - 1].sqrt(), s[: r - 1, None].sqrt() * vh[: r - 1])
        ),
        "A came first: return (B, A), B with shape (out, rank)": lambda weight, rank: lowrank.truncated_svd(weight, rank)[::-1],
        "torch has no SVD for 16-bit types: decompose a float32 copy, and convert the factors back": in_its_own_dtype,
        "the factors of a 16-bit or float64 weight came back in float32: return them in the weight's own dtype": left_in_float32,
    },
)

# ---------------------------------------------------------------------------------------------------------------- energy


def _smallest_rank(sizes: Callable[[Tensor], Tensor], offset: int = 1) -> Callable[[Tensor, float], int]:
    """The smallest rank by cumulated ``sizes`` of the sorted singular values."""

    def answer(singular_values: Tensor, share: float) -> int:
        total = sizes(singular_values.double()).cumsum(0)
        return int((total < share * total[-1]).sum()) + offset

    return answer


def strictly_more(singular_values: Tensor, share: float) -> int:
    total = singular_values.double().square().cumsum(0)
    return int((total <= share * total[-1]).sum()) + 1


def ratio_of_norms(singular_values: Tensor, share: float) -> int:
    total = singular_values.double().square().cumsum(0).sqrt()
    return int((total < share * total[-1]).sum()) + 1


def relative_to_the_largest(singular_values: Tensor, share: float) -> int:
    return int((singular_values >= (1 - share) * singular_values.max()).sum())


def energy_by_loop(singular_values: Tensor, share: float) -> int:
    kept, total = 0.0, math.fsum(value**2 for value in singular_values.tolist())
    for rank, value in enumerate(singular_values.tolist(), start=1):
        kept += value**2
        if kept >= share * total * (1 - 1e-12):
            return rank
    return len(singular_values)


def _spectrum_away_from(shares: tuple[float, ...], n: int, g: torch.Generator) -> Tensor:
    """Decaying singular values of which no rank keeps one of ``shares`` so nearly that float32's rounding decides."""
    while True:
        s = (torch.linspace(0, -3, n).exp() * (0.8 + 0.4 * torch.rand(n, generator=g))).sort(descending=True).values
        kept = s.double().square().cumsum(0)
        if (kept[:, None] / kept[-1] - torch.tensor(shares)).abs().min() > 1e-5:
            return s


def observe_rank_for_energy(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    # A share that is reached exactly, not passed: its squares, sums and the norms of both are powers of two, exact in any order.
    seen = {"sixteen equal singular values, share 0.25": answer(torch.ones(16), 0.25)}
    seen["one singular value, share 0.9"] = answer(torch.tensor([2.0]), 0.9)
    shares = (0.5, 0.9, 0.99)
    for n in (12, 30, 48):
        s = _spectrum_away_from(shares, n, g)
        for share in shares:
            seen[f"{n} decaying singular values, share {share}"] = answer(s, share)
    seen["the singular values 3, 2, 1, 1, 1, share 1"] = answer(torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0]), 1.0)  # 9 + 4 + 3 = 16
    return {label: int(value) if isinstance(value, Tensor) and value.numel() == 1 else value for label, value in seen.items()}


rank_for_energy = Check(
    task="the smallest rank that keeps a share of the energy",
    observe=observe_rank_for_energy,
    reference=lowrank.rank_for_energy,
    second=energy_by_loop,
    rtol=0,
    atol=0,
    misconceptions={
        "you added up σ: energy is the sum of σ², because ‖W‖_F² = Σ σ²": _smallest_rank(lambda s: s),
        "σ was squared twice: svdvals gives σ itself, so square once": _smallest_rank(lambda s: s**4),
        "one too few: you counted the ranks that fall short; the answer is the next one": _smallest_rank(torch.square, offset=0),
        "one too many: a share that is reached exactly is enough (at least, not more than)": strictly_more,
        "you compared the share with ‖W_r‖ / ‖W‖: energy is the square of that ratio": ratio_of_norms,
        "you started from the smallest singular value: the largest ones keep the most": _smallest_rank(lambda s: s.flip(0).square()),
        "you compared each σ with the largest one: energy is a share of the sum over all": relative_to_the_largest,
    },
)

# ---------------------------------------------------------------------------------------------------------------- effective rank


def _entropy(p: Tensor, log: Callable[[Tensor], Tensor] = torch.log) -> Tensor:
    positive = p[p > 0]
    return -(positive * log(positive)).sum()


def nan_at_zero(singular_values: Tensor) -> float:
    p = singular_values.double() / singular_values.double().sum()
    return math.exp(-(p * p.log()).sum().item())


def _normalised(by: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], float]:
    def answer(singular_values: Tensor) -> float:
        s = singular_values.double()
        return (finish or (lambda p: _entropy(p).exp()))(by(s)).item()

    return answer


def perplexity_by_product(singular_values: Tensor) -> float:
    """The same number as a product: Π p_i^(−p_i)."""
    p = [value / sum(singular_values.tolist()) for value in singular_values.tolist()]
    return math.prod(value**-value for value in p if value > 0)


def observe_effective_rank(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    spectra = {
        "five equal singular values (not 1)": torch.full((5,), 3.0),
        "random singular values": torch.rand(9, generator=g) + 0.1,
        "a decaying float64 spectrum": torch.linspace(2, -4, 40, dtype=torch.float64).exp() * torch.rand(40, generator=g).double(),
        "a rank-one matrix (one singular value, then zeros)": torch.tensor([2.5, 0.0, 0.0, 0.0]),
        "a spectrum that ends in zeros": torch.cat([torch.rand(6, generator=g) + 0.5, torch.zeros(3)]),
    }
    seen = {}
    for label, s in spectra.items():
        value = answer(s)
        number = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        seen[label] = torch.tensor(float(value), dtype=torch.float64) if number else value  # a tensor, so that NaN equals NaN
    return seen


effective_rank = Check(
    task="the effective rank of Roy and Vetterli",
    observe=observe_effective_rank,
    reference=lowrank.effective_rank,
    second=perplexity_by_product,
    misconceptions={
        "you normalised σ²: the paper's p_i = σ_i / Σ σ uses the singular values themselves": _normalised(lambda s: s**2 / (s**2).sum()),
        "you divided by the largest σ: the p_i must sum to one, so divide by the sum": _normalised(lambda s: s / s.max()),
        "you divided by the root of Σ σ²: the p_i must sum to one, so divide by the sum": _normalised(lambda s: s / s.norm()),
        "the singular values were not normalised: entropy needs p_i = σ_i / Σ σ": _normalised(lambda s: s),
        "that is the entropy itself: the effective rank is its exponential": _normalised(lambda s: s / s.sum(), _entropy),
        "the entropy is in bits (log2) but the exponential is base e: use the natural logarithm": _normalised(
            lambda s: s / s.sum(), lambda p: _entropy(p, torch.log2).exp()
        ),
        "the entropy is in nats but you raised 2 to it: use exp": _normalised(lambda s: s / s.sum(), lambda p: _entropy(p).exp2()),
        "the minus of the entropy is missing: −Σ p ln p": _normalised(lambda s: s / s.sum(), lambda p: (-_entropy(p)).exp()),
        "that is the number of singular values above zero: the rank, not how evenly they are spread": lambda s: float((s > 0).sum()),
        "a singular value of zero gave NaN: 0·ln 0 counts as 0 (torch.special.entr, or leave zeros out)": nan_at_zero,
        "that is the stable rank, Σ σ² / σ_1²: another measure; here it is exp of the entropy": lowrank.stable_rank,
    },
)

# ---------------------------------------------------------------------------------------------------------------- break-even rank


def largest_saving_rank_reference(out_features: int, in_features: int) -> int:
    """r·(out + in) < out·in, in whole numbers."""
    return (out_features * in_features - 1) // (out_features + in_features)


def saving_rank_by_search(out_features: int, in_features: int) -> int:
    rank = 0
    while (rank + 1) * (out_features + in_features) < out_features * in_features:
        rank += 1
    return rank


def observe_break_even(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    shapes = [(64, 64), (6, 3), (1, 5), (128, 512)]
    shapes += [tuple(torch.randint(20, 400, (2,), generator=g).tolist()) for _ in range(6)]
    return {f"a matrix {m} × {n}": answer(m, n) for m, n in shapes}


break_even = Check(
    task="the largest rank at which factors are smaller than the matrix",
    observe=observe_break_even,
    reference=largest_saving_rank_reference,
    second=saving_rank_by_search,
    rtol=0,
    atol=0,
    misconceptions={
        "where m + n divides m·n, factors of that rank are as large as the matrix (6 × 3: rank 2 needs 18 numbers)": (
            lambda m, n: m * n // (m + n)
        ),
        "that is the largest rank the matrix can have: its factors need more numbers than the matrix itself": min,
        "half of the smaller side is right for square matrices alone: count r·(m + n) against m·n": lambda m, n: (min(m, n) - 1) // 2,
        "that is the first rank that does not save: you want the one before": lambda m, n: -(-m * n // (m + n)),
        "return a whole number: a rank of 31.5 does not exist": lambda m, n: m * n / (m + n),
        "you counted r² numbers for the factors: B has m·r and A has r·n": lambda m, n: math.isqrt(m * n - 1),
        "you counted one factor: B has m·r numbers and A has r·n, together r·(m + n)": lambda m, n: (m * n - 1) // max(m, n),
    },
)

# ---------------------------------------------------------------------------------------------------------------- truncating an update


def _best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def keep_update_reference(before: Tensor, after: Tensor, rank: int) -> Tensor:
    """W0 + the best rank-r part of (W1 − W0), in the weights' own dtype."""
    b, a = lowrank.truncated_svd(after.float() - before.float(), rank)
    return (before.float() + b @ a).to(before.dtype)


def keep_update_in_its_dtype(before: Tensor, after: Tensor, rank: int) -> Tensor:
    b, a = lowrank.truncated_svd(after - before, rank)
    return before + b @ a


def keep_update_by_projection(before: Tensor, after: Tensor, rank: int) -> Tensor:
    change = after.double() - before.double()
    q = torch.linalg.eigh(change @ change.T).eigenvectors[:, -rank:]  # (out, r): the left singular vectors of the largest
    return (before.double() + q @ (q.T @ change)).to(before.dtype)


def _keep(finish: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[Tensor, Tensor, int], Tensor]:
    return lambda before, after, rank: finish(before.float(), after.float(), rank).to(before.dtype)


def keep_smallest(before: Tensor, after: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(after - before, full_matrices=False)
    return before + (u[:, -rank:] * s[-rank:]) @ vh[-rank:]


def keep_in_place(before: Tensor, after: Tensor, rank: int) -> Tensor:
    before.copy_(keep_update_reference(before, after, rank))
    return before


def nearest(weight: Tensor, exact: Tensor, slack: float = 1e-6) -> bool:
    """Is every number of ``weight`` a nearest one of its dtype to ``exact`` (float64)? The slack is float32's own rounding."""
    lower, upper = (torch.nextafter(weight, torch.full_like(weight, side)).double() for side in (-math.inf, math.inf))
    error = (weight.double() - exact).abs()
    return bool((error <= (lower - exact).abs() + slack).all() and (error <= (upper - exact).abs() + slack).all())


def _change_with_few_large(out: int, inside: int, rank: int, g: torch.Generator) -> Tensor:
    """Singular values 2, …, 1 and then 0.4, …: with a gap behind ``rank``, float32 finds the best part to its last digits."""
    u, v = (torch.linalg.qr(torch.randn(n, min(out, inside), generator=g)).Q for n in (out, inside))
    s = torch.cat([torch.linspace(2, 1, rank), torch.linspace(0.4, 0.1, min(out, inside) - rank)])
    return (u * s) @ v.T


def observe_keep_update(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    seen = {}
    for name, (out, inside, rank), dtype in (
        ("a wide float32 layer", (6, 10, 2), torch.float32),
        ("a tall float32 layer", (12, 5, 3), torch.float32),
        ("a bfloat16 layer", (40, 32, 2), torch.bfloat16),
    ):
        before = torch.randn(out, inside, generator=g).to(dtype)
        after = (before.float() + _change_with_few_large(out, inside, rank, g)).to(dtype)
        kept = before.clone(), after.clone()
        result, refusal = _or_torchs_refusal(answer, before, after, rank)
        seen[f"an error of torch for {name}"] = refusal
        if refusal:
            return seen
        if dtype is torch.float32:
            seen[f"the weight of {name}"] = result
        else:
            exact = kept[0].double() + _best(kept[1].double() - kept[0].double(), rank)
            like = isinstance(result, Tensor) and result.shape == exact.shape and result.dtype == dtype
            seen[f"the dtype of {name}"] = str(result.dtype) if isinstance(result, Tensor) else type(result).__name__
            seen[f"the weight of {name} is right to within 1 %"] = like and torch.allclose(result.double(), exact, rtol=1e-2, atol=1e-2)
            seen[f"every number of {name} is the {dtype} number nearest to the exact one"] = like and nearest(result, exact, slack=1e-5)
        seen[f"the weights passed in, of {name}, are unchanged"] = torch.equal(before, kept[0]) and torch.equal(after, kept[1])
    return seen


keep_update = Check(
    task="a weight with only the best rank-r part of its update",
    observe=observe_keep_update,
    reference=keep_update_reference,
    second=keep_update_by_projection,
    rtol=1e-3,
    atol=1e-4,
    misconceptions={
        "you truncated the fine-tuned weight itself, and with it what pre-training had learned: truncate the change, W1 − W0": _keep(
            lambda w0, w1, r: _best(w1, r)
        ),
        "you truncated the weight from before and added the whole change: truncate the change, W1 − W0": _keep(
            lambda w0, w1, r: _best(w0, r) + w1 - w0
        ),
        "that is the truncated change alone: add it to the weight from before": _keep(lambda w0, w1, r: _best(w1 - w0, r)),
        "the change has the wrong sign: it is after − before": _keep(lambda w0, w1, r: w0 + _best(w0 - w1, r)),
        "the truncated change was added to the weight from after, which already holds all of it: add it to the one from before": _keep(
            lambda w0, w1, r: w1 + _best(w1 - w0, r)
        ),
        "each weight was truncated on its own before the difference was taken: take the difference first": _keep(
            lambda w0, w1, r: w0 + _best(w1, r) - _best(w0, r)
        ),
        "you kept the smallest singular values of the change: the first ones are the largest": _keep(keep_smallest),
        "the bfloat16 weight was rounded more than once: convert both weights to float32 first, subtract, truncate and add there, and "
        "round at the end": keep_update_in_its_dtype,
        "torch has no SVD for 16-bit types: convert both weights to float32 first": (
            lambda w0, w1, r: w0 + torch.matmul(*in_its_own_dtype(w1 - w0, r))
        ),
        "the weight came back in float32: the layer needs its own dtype": lambda w0, w1, r: keep_update_reference(
            w0.float(), w1.float(), r
        ),
        "you wrote into the weight from before: whoever passed it still needs it; return a new tensor": keep_in_place,
    },
)

# ---------------------------------------------------------------------------------------------------------------- a step in a subspace

Gradient = Callable[[Tensor], Tensor]  # parameters θ (D,) -> gradient of the loss there (D,)


def subspace_step_reference(start: Tensor, projection: Tensor, z: Tensor, gradient: Gradient, lr: float) -> Tensor:
    """One step of gradient descent on z where θ = θ0 + P·z: dL/dz = Pᵀ·dL/dθ."""
    return z - lr * projection.T @ gradient(start + projection @ z)


def subspace_step_by_columns(start: Tensor, projection: Tensor, z: Tensor, gradient: Gradient, lr: float) -> Tensor:
    theta = start.clone()
    for column, amount in zip(projection.unbind(1), z, strict=True):
        theta += amount * column
    slope = gradient(theta)
    return torch.stack([amount - lr * (column * slope).sum() for column, amount in zip(projection.unbind(1), z, strict=True)])


def pseudo_inverse(start: Tensor, projection: Tensor, z: Tensor, gradient: Gradient, lr: float) -> Tensor:
    return z - lr * torch.linalg.pinv(projection) @ gradient(start + projection @ z)


def in_place(start: Tensor, projection: Tensor, z: Tensor, gradient: Gradient, lr: float) -> Tensor:
    z -= lr * projection.T @ gradient(start + projection @ z)
    return z


def observe_subspace_step(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    many, few = 15, 4
    target = torch.randn(many, generator=g)
    weights = torch.rand(many, generator=g) + 0.5

    def gradient(theta: Tensor) -> Tensor:  # of Σ w·(θ − target)² / 2
        return weights * (theta - target)

    def loss(theta: Tensor) -> float:
        return (weights * (theta - target).square()).sum().item() / 2

    orthonormal = torch.linalg.qr(torch.randn(many, few, generator=g)).Q
    start, seen = torch.randn(many, generator=g), {}
    lr = 0.05 + 0.3 * torch.rand((), generator=g).item()
    for name, projection in (
        ("orthonormal columns", orthonormal),
        ("columns of other lengths", 1.5 * torch.rand(many, few, generator=g) - 0.2),
    ):
        z = torch.randn(few, generator=g)
        kept = z.clone()
        result = answer(start, projection, z, gradient, lr)
        seen[f"the shape of z after one step, P with {name}"] = (
            str(tuple(result.shape)) if isinstance(result, Tensor) else type(result).__name__
        )
        if not isinstance(result, Tensor) or result.shape != kept.shape:
            return seen
        seen[f"z after one step, P with {name}"] = result
        seen[f"the z passed in is unchanged, P with {name}"] = torch.equal(z, kept)
    z = torch.zeros(few)
    for _ in range(100):
        z = answer(start, orthonormal, z, gradient, 0.3)
    # 100 steps end in the subspace's own minimum, which the normal equations give
    seen["the loss after 100 steps from z = 0"] = loss(start + orthonormal @ z)
    return seen


subspace_step = Check(
    task="a training step inside a random subspace",
    observe=observe_subspace_step,
    reference=subspace_step_reference,
    second=subspace_step_by_columns,
    misconceptions={
        "the gradient was taken at θ0: take it where the model is now, at θ0 + P·z": (
            lambda start, projection, z, gradient, lr: z - lr * projection.T @ gradient(start)
        ),
        "θ0 is missing: the model's parameters are θ0 + P·z, not P·z": (
            lambda start, projection, z, gradient, lr: z - lr * projection.T @ gradient(projection @ z)
        ),
        "you went up the slope: subtract the gradient": (
            lambda start, projection, z, gradient, lr: z + lr * projection.T @ gradient(start + projection @ z)
        ),
        "you returned θ: only z is trained; return the new z": (
            lambda start, projection, z, gradient, lr: start + projection @ subspace_step_reference(start, projection, z, gradient, lr)
        ),
        "you returned the gradient of z: take the step, z − lr · gradient": (
            lambda start, projection, z, gradient, lr: projection.T @ gradient(start + projection @ z)
        ),
        "you divided by the squared lengths of P's columns (a least-squares fit): the chain rule asks for Pᵀ, nothing else": pseudo_inverse,
        "the old z was not there: a step is z − lr · gradient, not −lr · gradient": (
            lambda start, projection, z, gradient, lr: -lr * projection.T @ gradient(start + projection @ z)
        ),
        "you changed the z that was passed in: return a new tensor": in_place,
    },
)
