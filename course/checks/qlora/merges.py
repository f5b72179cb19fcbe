"""Exercise 4: three ways to merge a QLoRA adapter, and how far each is from what was trained."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.qlora.shared import entries
from reference.nf4 import NF4_CODEBOOK, NF4Tensor, dequantize_nf4, quantize_nf4

WAYS = ("dequantized", "requantized", "original")


def round_trip(weight: Tensor, block_size: int) -> Tensor:
    return dequantize_nf4(quantize_nf4(weight, block_size), torch.float32)


def rounded(weight: Tensor, like: Tensor | NF4Tensor) -> Tensor:
    """To the 16 bits of ``like``, and float32 again."""
    return weight.to(like.dtype).float()


def three_merges(
    q: NF4Tensor,
    original: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_alpha: float,
    *,
    scale=lambda alpha, r: alpha / r,
    product=lambda A, B, W: B @ A,
    update=lambda delta, original: delta,
    decode=lambda q: dequantize_nf4(q, torch.float32),
    from_W: tuple[str, ...] = ("original",),  # which of the ways start there
    in_16_bits: tuple[str, ...] = (),  # which round both numbers before they add them
    requantize=lambda total, q, delta: round_trip(total, q.block_size),
    unrounded: tuple[str, ...] = (),  # which are judged before they are rounded
    truth=lambda decoded, delta, W: decoded + delta,
    truth_of_original=None,  # what that way is compared with, if it has a truth of its own
    norm=torch.norm,
    over=lambda delta, merged, true: true,
    returned=lambda error: error,
) -> dict[str, dict]:
    """The worked answer: each sum in float32, and rounded once; its error, as it is stored, against Ŵ + ΔW."""
    delta = update(scale(lora_alpha, len(lora_A)) * product(lora_A, lora_B, original), original)  # (out, in)
    decoded, dtype, weights, errors = decode(q), original.dtype, {}, {}
    for way in WAYS:
        weight = original.float() if way in from_W else decoded
        added = weight.to(dtype) + delta.to(dtype) if way in in_16_bits else (weight + delta).to(dtype)
        weights[way] = requantize(weight + delta, q, delta) if way == "requantized" else added
        merged = weight + delta if way in unrounded else weights[way].float()
        true = (truth_of_original or truth if way == "original" else truth)(decoded, delta, original)
        errors[way] = returned(norm(merged - true) / norm(over(delta, merged, true))).item()
    return {"weights": weights, "errors": errors}


def in_float64(q: NF4Tensor, original: Tensor, lora_A: Tensor, lora_B: Tensor, lora_alpha: float) -> dict:
    delta = torch.einsum("or,ri->oi", lora_B.double(), lora_A.double()) * lora_alpha / len(lora_A)
    trained = dequantize_nf4(q, torch.float32) + delta  # float64
    packed = quantize_nf4(trained.float(), q.block_size)
    weights = {
        "original": (original.double() + delta).to(original.dtype),
        "dequantized": trained.to(original.dtype),
        "requantized": dequantize_nf4(packed, torch.float32),
    }
    errors = {way: math.sqrt(((weight.double() - trained) ** 2).sum() / (trained**2).sum()) for way, weight in weights.items()}
    return {"weights": weights, "errors": errors}


def own_sum(decoded: Tensor, delta: Tensor, W: Tensor) -> Tensor:
    return W + delta


def own_sum_as_stored(decoded: Tensor, delta: Tensor, W: Tensor) -> Tensor:
    return rounded(W + delta, W)


def on_levels(weight: Tensor, block_size: int) -> str:
    """Whether each block holds nothing but its scale times levels, to more digits than 16 bits have."""
    shares = [block / block.abs().max() for block in weight.flatten().split(block_size)]
    far = max((share[:, None] - NF4_CODEBOOK).abs().amin(1).max().item() for share in shares)
    return "a level times its block's scale" if far < 1e-5 else "near a level times its block's scale" if far < 0.02 else "no such product"


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for what, dtype, block_size, n, r, alpha, size, taken, digits in (
        ("", torch.bfloat16, 32, 48, 2, 5, 1, 0, 4),
        # it matters which norm is taken
        (", where the update takes most of the weight away", torch.float16, 128, 32, 4, 6, 1 / 16, 0.9, 4),
        (", where the update is large", torch.bfloat16, 256, 24, 4, 2.5, 1 / 512, 0, 4),  # its rounding is as large as W − Ŵ
        (", where A and B have more digits than 16 bits hold", torch.bfloat16, 64, 32, 2, 4, 1, 0, 10),
    ):
        # Binary digits so few that ΔW is exact in whatever order it is summed: no code hangs on the last bit of a sum.
        most = 2**digits
        lora_A, lora_B = (torch.randint(-most // 2, most // 2 + 1, shape, generator=g) / most for shape in ((r, n), (n, r)))
        original = (size * torch.randn(n, n, generator=g) - taken * (alpha / r) * lora_B @ lora_A).to(dtype)
        whole = answer(quantize_nf4(original, block_size), original.clone(), lora_A, lora_B, alpha)
        found = entries(whole, "weights", "errors")
        where = f"what your function returns for a {str(dtype).removeprefix('torch.')} weight{what}"
        if isinstance(found, Mapping) and not found and (flat := entries(whole, *WAYS)):
            yield where, f"a dictionary with the keys {', '.join(map(repr, flat))}"
            return
        if isinstance(found, Mapping):
            found = {part: entries(inner, *WAYS) for part, inner in found.items()}
        yield where, found
        kept = found.get("weights") if isinstance(found, Mapping) else None
        kept = kept.get("requantized") if isinstance(kept, Mapping) else None
        if isinstance(kept, Tensor) and kept.shape == original.shape:
            yield where.replace("what", "each number of 'requantized' that", 1), on_levels(kept.float(), block_size)


check = Check(
    task="three merges, and how far each is from what was trained",
    observe=observe,
    reference=three_merges,
    second=in_float64,
    misconceptions={
        "the update has no scale: ΔW = (α/r)·B·A": but(scale=lambda alpha, r: 1.0),
        "the update is scaled by α: ΔW = (α/r)·B·A": but(scale=lambda alpha, r: alpha),
        "the update is transposed: ΔW = (α/r)·B·A is (out, in), as the weight is": but(product=lambda A, B, W: (B @ A).T),
        "the errors compare with W + ΔW: the adapter was trained beside the dequantized weight, so the truth is Ŵ + ΔW": but(truth=own_sum),
        "the errors compare with W, the weight before anything was merged: the truth is Ŵ + ΔW, with the update": but(
            truth=lambda decoded, delta, W: W.float()
        ),
        "what was trained was rounded to 16 bits before the errors were taken, so that 'dequantized' is compared with itself: compare with "
        "Ŵ + ΔW in float32": but(truth=lambda decoded, delta, W: rounded(decoded + delta, W)),
        "the errors compare with the stored W + ΔW, so that 'original' is compared with itself: the adapter was trained beside the "
        "dequantized weight, compare with Ŵ + ΔW": but(truth=own_sum_as_stored),
        "the error of 'original' compares it with W + ΔW, the sum that it is made from: compare it with what was trained, Ŵ + ΔW, like the "
        "others": but(truth_of_original=own_sum),
        "the error of 'original' is zero: it was compared with itself; compare it with what was trained, Ŵ + ΔW, like the others": but(
            truth_of_original=own_sum_as_stored
        ),
        "the error of 'original' compares it with W, without the update: compare it with what was trained, Ŵ + ΔW, like the others": but(
            truth_of_original=lambda decoded, delta, W: W.float()
        ),
        "ΔW was rounded to 16 bits before it was added: add in float32, and round once, at the end": but(update=rounded),
        "ΔW was multiplied in 16 bits: B·A is a float32 product, round once, at the end": but(
            product=lambda A, B, W: (B.to(W.dtype) @ A.to(W.dtype)).float()
        ),
        "the weights are right, but the errors compare with Ŵ and a ΔW that was rounded to 16 bits: compare with the float32 sum": but(
            truth=lambda decoded, delta, W: decoded + rounded(delta, W)
        ),
        "the three ways stand at the top: return {'weights': {…}, 'errors': {…}}, each with the keys 'dequantized', 'requantized' and "
        "'original'": lambda *arguments: three_merges(*arguments)["weights"],
        "the errors compare with Ŵ, without the update: what was trained is Ŵ + ΔW": but(truth=lambda decoded, *_: decoded),
        "the errors are relative to the update: divide by the norm of the trained weight Ŵ + ΔW": but(over=lambda delta, *_: delta),
        "the errors are relative to the merged weight's own norm: divide by the norm of the trained weight": but(
            over=lambda delta, merged, true: merged
        ),
        "the errors are in per cent: return ‖merged − trained‖ / ‖trained‖ as it is": but(returned=lambda error: 100 * error),
        "the errors are of the largest element: the Frobenius norm is the root of the sum of all squares": but(
            norm=lambda matrix: matrix.abs().max()
        ),
        "the norm is the spectral one: the Frobenius norm is the root of the sum of all squares, tensor.norm()": but(
            norm=lambda matrix: torch.linalg.matrix_norm(matrix, 2)
        ),
        "the error of 'dequantized' is zero: it was taken before the weight was rounded to 16 bits, or it was compared with itself; "
        "compare the stored weight with Ŵ + ΔW in float32": but(unrounded=("dequantized",)),
        "the errors were taken before the weights were rounded to 16 bits: the rounding is part of what merging costs": but(
            unrounded=("dequantized", "original")
        ),
        "the error of 'original' was taken before the weight was rounded to 16 bits: compare the weight as it is stored": but(
            unrounded=("original",)
        ),
        "Ŵ was decoded to 16 bits, the default of dequantize_nf4: pass torch.float32, and round once, at the end": but(
            decode=lambda q: dequantize_nf4(q).float()
        ),
        "α/r was cut to a whole number: divide with / and not with //": but(scale=lambda alpha, r: alpha // r),
        "'dequantized' and 'original' are sums of 16-bit numbers: add in float32, and round once, at the end": but(
            in_16_bits=("dequantized", "original")
        ),
        "'dequantized' is a sum of 16-bit numbers: add Ŵ and ΔW in float32, and round once, at the end": but(in_16_bits=("dequantized",)),
        "'original' is a sum of 16-bit numbers: add W and ΔW in float32, and round once, at the end": but(in_16_bits=("original",)),
        "'requantized' starts from the merge that was rounded to 16 bits: quantize the float32 sum": but(
            requantize=lambda total, q, delta: round_trip(rounded(total, q), q.block_size)
        ),
        "α/√r is rank-stabilized LoRA; here ΔW = (α/r)·B·A": but(scale=lambda alpha, r: alpha / math.sqrt(r)),
        "the errors are absolute: divide by the norm of the trained weight": but(over=lambda *_: torch.ones(1)),
        "the errors are squared: take the root, ‖merged − trained‖ / ‖trained‖": but(returned=torch.square),
        "requantized from the original weights: what is at hand is Ŵ, so quantize Ŵ + ΔW": but(from_W=("requantized", "original")),
        "'requantized' was decoded to 16 bits: decode it to float32, as it would be for a product": but(
            requantize=lambda total, q, delta: rounded(round_trip(total, q.block_size), q)
        ),
        "nothing was requantized: Ŵ + ΔW lies between the levels; quantize the sum, then decode it": but(requantize=lambda t, *_: t),
        "the update was quantized by itself: quantize the sum Ŵ + ΔW, since that is what is stored": but(
            requantize=lambda total, q, delta: total - delta + round_trip(delta, q.block_size)
        ),
        "requantized in blocks of 64, whatever q has: use q.block_size": but(requantize=lambda total, *_: round_trip(total, 64)),
        "merged into the original weights twice: 'dequantized' starts from Ŵ, what q decodes to": but(from_W=("dequantized", "original")),
        "'original' starts from the dequantized weight: it is W + ΔW": but(from_W=()),
    },
    rtol=1e-2,  # a float32 and a float64 sum may round to neighbours in 16 bits
    atol=1e-5,
)
