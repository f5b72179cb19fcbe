"""Exercise 1: bytes of full fine-tuning, recipe by recipe."""

import random

from course.checking import Check, but

RECIPES = {  # bytes of: weight, master copy of it, one of Adam's two moments, that moment's share of a scale
    "fp32": (4, 0, 4, 0),
    "mixed": (2, 4, 4, 0),
    "bf16": (2, 0, 2, 0),
    "8-bit Adam": (2, 0, 1, 4 / 256),
}


def full_fine_tuning_gb(
    parameters: int, recipe: str, *, gradient=lambda weight: weight, master: int = 1, moments: int = 2, scales: float = 1, unit: float = 1e9
) -> float:
    """The worked answer: weight, gradient of the same dtype, master weight, two moments with their scales."""
    weight, copy, moment, scale = RECIPES[recipe]
    return parameters * (weight + gradient(weight) + master * copy + moments * (moment + scales * scale)) / unit


def in_bits(parameters: int, recipe: str) -> float:
    """A right answer that counts bits and billions."""
    moments = {"fp32": 2 * 32, "mixed": 2 * 32, "bf16": 2 * 16, "8-bit Adam": 2 * (8 + 32 / 256)}[recipe]
    rest = {"fp32": 32 + 32, "mixed": 16 + 16 + 32, "bf16": 16 + 16, "8-bit Adam": 16 + 16}[recipe]
    return (rest + moments) / 8 * (parameters / 10**9)


def observe(answer, seed: int) -> dict:
    parameters = 256 * random.Random(seed).randint(10**6, 10**8)  # whole blocks: who counts blocks and rounds up is right too
    return {f"{recipe}, {parameters:,} parameters": answer(parameters, recipe) for recipe in RECIPES}


check = Check(
    task="bytes of full fine-tuning, recipe by recipe",
    observe=observe,
    reference=full_fine_tuning_gb,
    second=in_bits,
    misconceptions={
        "you divided by 2³⁰: that gives GiB; 1 GB is 10⁹ bytes, and the two differ by 7 %": but(unit=2**30),
        "the float32 master copy is missing: in mixed precision the optimizer updates it, and the bf16 weights follow from it": but(
            master=0
        ),
        "Adam keeps two moments for each parameter, the mean of the gradient and of its square; one of them is missing": but(moments=1),
        "the gradients are missing: after the backward pass there is one number for each trained weight": but(gradient=lambda weight: 0),
        "8-bit moments need their scales: one float32 for each block of 256, for both moments": but(scales=0),
        "one of the two 8-bit moments has no scales in your sum: each moment has its own blocks of 256": but(scales=1 / 2),
        "your gradients are float32 in every recipe: a gradient has the dtype of its weight, 2 bytes for a bf16 weight": but(
            gradient=lambda weight: 4
        ),
        "these are bits: divide by 8 to get bytes": but(unit=1e9 / 8),
        "these are bytes: divide by 10⁹ to get GB": but(unit=1),
    },
    rtol=1e-9,
)
