"""Exercise 13.3: bytes, operations and the least time of a linear layer."""

from numbers import Real

import torch
from torch import Tensor

from course.checking import Check, Seen, but, unpacked


def least_time(
    rows: int,
    in_features: int,
    out_features: int,
    bits: float,
    copy_rate: float,
    product_rate: float,
    *,
    per_byte=8,
    activations=lambda rows, n_in, n_out: 2 * rows * (n_in + n_out),
    per_product=2,
    join=max,
    unit=1e3,
    name=lambda moving, computing: "memory" if moving >= computing else "products",
) -> tuple[float, float, str]:
    """The worked answer: whichever takes longer."""
    moved = in_features * out_features * bits / per_byte + activations(rows, in_features, out_features)
    operations = per_product * rows * in_features * out_features
    moving, computing = moved / copy_rate, operations / product_rate
    return moved, unit * join(moving, computing), name(moving, computing)


def by_intensity(rows: int, in_features: int, out_features: int, bits: float, copy_rate: float, product_rate: float) -> tuple:
    weights = in_features * out_features
    moved = bits * weights / 8 + 2 * rows * in_features + 2 * rows * out_features
    intensity = 2 * rows * weights / moved
    reached = min(product_rate, intensity * copy_rate)
    return moved, 2000 * rows * weights / reached, "products" if intensity * copy_rate > product_rate else "memory"


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    for rows in (1, 3000, 64, int(torch.randint(2, 40, (1,), generator=g))):
        n_in, n_out = (int(torch.randint(1000, 9000, (1,), generator=g)) for _ in range(2))
        bits = (4.5, 16.0)[int(torch.randint(2, (1,), generator=g))]
        rates = (2 + 2 * torch.rand(1, generator=g).item()) * 1e12, (500 + 300 * torch.rand(1, generator=g).item()) * 1e12
        found = answer(rows, n_in, n_out, bits, *rates)
        moved, milliseconds, bound = unpacked(
            found, "bytes, milliseconds and which of the two it is", (Real, Tensor), (Real, Tensor), object
        )
        label = f"{rows} rows, {n_in} × {n_out} weights of {bits:g} bits"
        yield f"bytes, {label}", float(moved)
        yield f"milliseconds, {label}", float(milliseconds)
        yield f"what takes the time, {label}", bound


check = Check(
    task="bytes and the least time of a layer, and what it waits for",
    observe=observe,
    reference=least_time,
    second=by_intensity,
    misconceptions={
        "the weights are counted in bits: eight bits are a byte": but(per_byte=1),
        "x and y move as well: two bytes for each number of the input and of the output": but(activations=lambda *sizes: 0),
        "x and the result are bfloat16: two bytes each, not four": but(activations=lambda rows, n_in, n_out: 4 * rows * (n_in + n_out)),
        "the output moves as well as the input": but(activations=lambda rows, n_in, n_out: 2 * rows * n_in),
        "a weight takes two operations per row: a product and an addition": but(per_product=1),
        "moving and computing go on at the same time: the longer one counts, not the sum": but(join=lambda *both: sum(both)),
        "the shorter of the two is taken: nothing is done before both are": but(join=min),
        "that is in seconds: return milliseconds": but(unit=1),
        "memory and products are exchanged: it waits for what takes longer": but(
            name=lambda moving, computing: "products" if moving >= computing else "memory"
        ),
    },
)
