"""Exercise 3: the frozen bytes under LoRA and QLoRA, and where QLoRA needs more."""

import math
import random
from statistics import fmean

from course.checking import Check, Seen, but
from course.checks.qlora.shared import BITS, entries


def frozen_bytes(
    linears: list[tuple[int, int]],
    others: int,
    *,
    bits=BITS,
    copied=max,
    copy_bytes=2,
    cast=lambda packed, weights: packed,
    wide=4,
    saved=lambda lora, packed, copy: lora - packed - copy,
    even=lambda saved: saved / 2,
    unit=1,
) -> dict[str, float]:
    """The worked answer: packed weights, the largest of them in 16 bits for a moment, and the others in two or four bytes."""
    sizes = [out * into for out, into in linears]
    weights, copy = sum(sizes), copy_bytes * copied(sizes)
    packed = weights * bits / 8
    return {
        "LoRA": unit * (2 * weights + 2 * others),
        "QLoRA": unit * (packed + 2 * others + copy),
        "QLoRA, the rest in float32": unit * (cast(packed, weights) + wide * others + copy),
        "QLoRA needs more from": even(saved(2 * weights, packed, copy)),
    }


def layer_by_layer(linears: list[tuple[int, int]], others: int) -> dict[str, float]:
    weights = largest = 0
    for out, into in linears:
        weights += out * into
        largest = max(largest, out * into)
    held = weights * (4 + (8 + 32 / 256) / 64) / 8 + largest * 2
    return {
        "LoRA": (weights + others) * 16 / 8,
        "QLoRA": held + others * 2,
        "QLoRA, the rest in float32": held + others * 4,
        "QLoRA needs more from": weights - held / 2,  # 2·weights + 2·others = held + 4·others
    }


def sizes_of(rng: random.Random, layers: int) -> list[tuple[int, int]]:
    hidden = 64 * rng.randrange(3, 8, 2)  # an odd number of bytes is packed, so the break-even ends in ½
    linears = [size for _ in range(layers) for size in ((hidden, hidden), (3 * hidden, hidden), (hidden, 3 * hidden + 64))]
    rng.shuffle(linears)
    # the largest is neither the first nor the last
    return [(hidden, hidden), *linears, (hidden + 64, hidden)] if layers else [(3 * hidden, hidden)]


def rounds_down(linears: list[tuple[int, int]]) -> bool:
    even = frozen_bytes(linears, 0)["QLoRA needs more from"]
    return round(even) < even


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    for name, least, most, share in (
        ("many layers", 20, 40, 0.05),
        ("a small model with a large vocabulary", 4, 8, 1.7),
        ("a single layer", 0, 0, 0.5),
    ):
        linears = sizes_of(rng, rng.randint(least, most))
        while name == "many layers" and rounds_down(linears):  # a single layer's does: round() is then neither floor nor ceil
            linears = sizes_of(rng, rng.randint(least, most))
        others = int(share * sum(out * into for out, into in linears)) + linears[0][1]
        yield name, entries(answer(linears, others), "LoRA", "QLoRA", "QLoRA, the rest in float32", "QLoRA needs more from")


check = Check(
    task="frozen bytes under LoRA and QLoRA, and where QLoRA needs more",
    observe=observe,
    reference=frozen_bytes,
    second=layer_by_layer,
    misconceptions={
        "the decoded copy is missing: while a layer computes, its weight is there in 16 bits too; count the largest": but(copy_bytes=0),
        "all layers are counted as dequantized at once: a copy lives for one product, so only the largest counts": but(copied=sum),
        "the decoded copy is counted in float32: it has the compute dtype, bfloat16, 2 bytes": but(copy_bytes=4),
        "the copy is of the last layer, whatever its size: the peak is set by the largest": but(copied=lambda sizes: sizes[-1]),
        "the copy is left out of the break-even: the third has it and the first has not": but(saved=lambda lora, packed, _: lora - packed),
        "these are bits: divide by 8": but(unit=8),
        "these are gigabytes: return bytes": but(unit=1e-9),
        "the copy is of an average layer: the peak is set by the largest": but(copied=fmean),
        "the scales are missing: a quantized weight takes 4 + 8/64 + 32/(64·256) bits": but(bits=4),
        "the scales are counted in float32, 4.5 bits a weight: with double quantization it is 4 + 8/64 + 32/(64·256)": but(bits=4.5),
        "half a bit is taken off for double quantization: it saves 0.373 bits of the 0.5, and the scales still cost 0.127": but(
            bits=4.5 - 0.5 + 32 / (64 * 256)
        ),
        "the float32 copies are counted beside the 16-bit tensors: they take their place, so the rest costs 4 bytes and not 6": but(wide=6),
        "the quantized layers became float32 as well: only what is not quantized does": but(cast=lambda packed, weights: 4 * weights),
        "the break-even is twice what it should be: each of the others costs 2 bytes more than under LoRA, so divide the saved bytes by "
        "2": but(even=lambda saved: saved),
        "the break-even is cut off at zero: where it is negative, QLoRA needs more whatever the others; return it as it is": but(
            even=lambda saved: max(0, saved / 2)
        ),
        "the break-even is rounded: return it as it is": but(even=lambda saved: round(saved / 2)),
        "the break-even is rounded up: it is where the two are equal, not the first whole number from there on; return it as it is": but(
            even=lambda saved: math.ceil(saved / 2)
        ),
        "the break-even is rounded down: divide with / and not with //, and return it as it is": but(even=lambda saved: saved // 2),
        "what follows the break-even's decimal point is cut off: return it as it is, without int()": but(even=lambda saved: int(saved / 2)),
        "the break-even is rounded up, and cut off at zero: return it as it is, a half and negative where it comes out so": but(
            even=lambda saved: max(0, math.ceil(saved / 2))
        ),
    },
    rtol=1e-12,
)
