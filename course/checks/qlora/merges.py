"""Exercise 4: three ways to merge a QLoRA adapter, and how far each is from what was trained."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from course.checking import Check, Seen
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
    product=lambda A, B: B @ A,
    update=lambda delta, original: delta,
    decode=lambda q: dequantize_nf4(q, torch.float32),
    base=lambda way, decoded, original: original if way == "original" else decoded,
    add=lambda weight, delta, dtype, way: (weight + delta).to(dtype),
    requantize=lambda base, delta, q: round_trip(base + delta, q.block_size),
    judge=lambda way, stored, exact: stored,
    truth=lambda way, decoded, original, delta: decoded + delta,
    error=lambda merged, true, delta: (merged - true).norm() / true.norm(),
) -> dict[str, dict]:
    """The worked answer: each sum in float32, and rounded once; its error, as it is stored, against Ŵ + ΔW."""
    delta = update(scale(lora_alpha, len(lora_A)) * product(lora_A, lora_B), original)  # (out, in)
    decoded, weights, errors = decode(q), {}, {}
    for way in WAYS:
        weight = base(way, decoded, original.float())
        weights[way] = requantize(weight, delta, q) if way == "requantized" else add(weight, delta, original.dtype, way)
        merged = judge(way, weights[way].float(), weight + delta)
        errors[way] = error(merged, truth(way, decoded, original, delta), delta).item()
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


def in_16_bits(*ways: str):
    """An addition in which both numbers are rounded first where the merge is one of ``ways``."""
    return lambda weight, delta, dtype, way: weight.to(dtype) + delta.to(dtype) if way in ways else (weight + delta).to(dtype)


def on_levels(weight: Tensor, block_size: int) -> str:
    """Whether each block holds nothing but its scale times levels, to more digits than 16 bits have."""
    shares = [block / block.abs().max() for block in weight.flatten().split(block_size)]
    far = max((share[:, None] - NF4_CODEBOOK).abs().amin(1).max().item() for share in shares)
    return "a level times its block's scale" if far < 1e-5 else "near a level times its block's scale" if far < 0.02 else "no such product"


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for what, dtype, block_size, n, r, alpha, size, taken in (
        ("", torch.bfloat16, 32, 48, 2, 5, 1, 0),
        (", where the update takes most of the weight away", torch.float16, 128, 32, 4, 6, 1 / 16, 0.9),  # it matters which norm is taken
        (", where the update is large", torch.bfloat16, 256, 24, 4, 2.5, 1 / 512, 0),  # its rounding is as large as W − Ŵ
    ):
        # numbers with few digits, so that ΔW is exact in whatever order it is summed
        lora_A, lora_B = (torch.randint(-8, 9, shape, generator=g) / 16 for shape in ((r, n), (n, r)))
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
        "the update has no scale: ΔW = (α/r)·B·A": {"scale": lambda alpha, r: 1.0},
        "the update is scaled by α: ΔW = (α/r)·B·A": {"scale": lambda alpha, r: alpha},
        "the update is transposed: ΔW = (α/r)·B·A is (out, in), as the weight is": {"product": lambda A, B: (B @ A).T},
        "the errors compare with W + ΔW: the adapter was trained beside the dequantized weight, so the truth is Ŵ + ΔW": {
            "truth": lambda way, decoded, original, delta: original + delta
        },
        "the errors compare with W, the weight before anything was merged: the truth is Ŵ + ΔW, with the update": {
            "truth": lambda way, decoded, original, delta: original.float()
        },
        "what was trained was rounded to 16 bits before the errors were taken, so that 'dequantized' is compared with itself: compare with "
        "Ŵ + ΔW in float32": {"truth": lambda way, decoded, original, delta: rounded(decoded + delta, original)},
        "the errors compare with the stored W + ΔW, so that 'original' is compared with itself: the adapter was trained beside the "
        "dequantized weight, compare with Ŵ + ΔW": {"truth": lambda way, decoded, original, delta: rounded(original + delta, original)},
        "the error of 'original' compares it with W + ΔW, the sum that it is made from: compare it with what was trained, Ŵ + ΔW, like the "
        "others": {"truth": lambda way, decoded, original, delta: (original if way == "original" else decoded) + delta},
        "the error of 'original' is zero: it was compared with itself; compare it with what was trained, Ŵ + ΔW, like the others": {
            "truth": lambda way, decoded, original, delta: rounded(original + delta, original) if way == "original" else decoded + delta
        },
        "the error of 'original' compares it with W, without the update: compare it with what was trained, Ŵ + ΔW, like the others": {
            "truth": lambda way, decoded, original, delta: original.float() if way == "original" else decoded + delta
        },
        "ΔW was rounded to 16 bits before it was added: add in float32, and round once, at the end": {"update": rounded},
        "the weights are right, but the errors compare with Ŵ and a ΔW that was rounded to 16 bits: compare with the float32 sum": {
            "truth": lambda way, decoded, original, delta: decoded + rounded(delta, original)
        },
        "the three ways stand at the top: return {'weights': {…}, 'errors': {…}}, each with the keys 'dequantized', 'requantized' and "
        "'original'": lambda *arguments: three_merges(*arguments)["weights"],
        "the errors compare with Ŵ, without the update: what was trained is Ŵ + ΔW": {
            "truth": lambda way, decoded, original, delta: decoded
        },
        "the errors are relative to the update: divide by the norm of the trained weight Ŵ + ΔW": {
            "error": lambda merged, true, delta: (merged - true).norm() / delta.norm()
        },
        "the errors are relative to the merged weight's own norm: divide by the norm of the trained weight": {
            "error": lambda merged, true, delta: (merged - true).norm() / merged.norm()
        },
        "the errors are in per cent: return ‖merged − trained‖ / ‖trained‖ as it is": {
            "error": lambda merged, true, delta: 100 * (merged - true).norm() / true.norm()
        },
        "the errors are of the largest element: the Frobenius norm is the root of the sum of all squares": {
            "error": lambda merged, true, delta: (merged - true).abs().max() / true.abs().max()
        },
        "the norm is the spectral one: the Frobenius norm is the root of the sum of all squares, tensor.norm()": {
            "error": lambda merged, true, delta: torch.linalg.matrix_norm(merged - true, 2) / torch.linalg.matrix_norm(true, 2)
        },
        "the error of 'dequantized' is zero: it was taken before the weight was rounded to 16 bits, or it was compared with itself; "
        "compare the stored weight with Ŵ + ΔW in float32": {"judge": lambda way, stored, exact: exact if way == "dequantized" else stored},
        "the errors were taken before the weights were rounded to 16 bits: the rounding is part of what merging costs": {
            "judge": lambda way, stored, exact: stored if way == "requantized" else exact
        },
        "the error of 'original' was taken before the weight was rounded to 16 bits: compare the weight as it is stored": {
            "judge": lambda way, stored, exact: exact if way == "original" else stored
        },
        "Ŵ was decoded to 16 bits, the default of dequantize_nf4: pass torch.float32, and round once, at the end": {
            "decode": lambda q: dequantize_nf4(q).float()
        },
        "α/r was cut to a whole number: divide with / and not with //": {"scale": lambda alpha, r: alpha // r},
        "'dequantized' and 'original' are sums of 16-bit numbers: add in float32, and round once, at the end": {
            "add": in_16_bits("dequantized", "original")
        },
        "'dequantized' is a sum of 16-bit numbers: add Ŵ and ΔW in float32, and round once, at the end": {"add": in_16_bits("dequantized")},
        "'original' is a sum of 16-bit numbers: add W and ΔW in float32, and round once, at the end": {"add": in_16_bits("original")},
        "'requantized' starts from the merge that was rounded to 16 bits: quantize the float32 sum": {
            "requantize": lambda base, delta, q: round_trip(rounded(base + delta, q), q.block_size)
        },
        "α/√r is rank-stabilized LoRA; here ΔW = (α/r)·B·A": {"scale": lambda alpha, r: alpha / math.sqrt(r)},
        "the errors are absolute: divide by the norm of the trained weight": {"error": lambda merged, true, delta: (merged - true).norm()},
        "the errors are squared: take the root, ‖merged − trained‖ / ‖trained‖": {
            "error": lambda merged, true, delta: ((merged - true).norm() / true.norm()).square()
        },
        "requantized from the original weights: what is at hand is Ŵ, so quantize Ŵ + ΔW": {
            "base": lambda way, decoded, original: decoded if way == "dequantized" else original
        },
        "'requantized' was decoded to 16 bits: decode it to float32, as it would be for a product": {
            "requantize": lambda base, delta, q: rounded(round_trip(base + delta, q.block_size), q)
        },
        "nothing was requantized: Ŵ + ΔW lies between the levels; quantize the sum, then decode it": {
            "requantize": lambda base, delta, q: base + delta
        },
        "the update was quantized by itself: quantize the sum Ŵ + ΔW, since that is what is stored": {
            "requantize": lambda base, delta, q: base + round_trip(delta, q.block_size)
        },
        "requantized in blocks of 64, whatever q has: use q.block_size": {
            "requantize": lambda base, delta, q: round_trip(base + delta, 64)
        },
        "merged into the original weights twice: 'dequantized' starts from Ŵ, what q decodes to": {
            "base": lambda way, decoded, original: decoded if way == "requantized" else original
        },
        "'original' starts from the dequantized weight: it is W + ΔW": {"base": lambda way, decoded, original: decoded},
    },
    rtol=1e-2,  # a float32 and a float64 sum may round to neighbours in 16 bits
    atol=1e-5,
)
