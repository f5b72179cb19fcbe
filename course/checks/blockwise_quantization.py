"""The checks of unit 03: absmax and zero point, one scale a row, one a block, a bit budget, and values kept out of the scale.

Two right answers may round x / scale in different last places, so no value here lies next to the border between two codes: such values
are replaced by zero before the answer sees them. Zeros alone (a tensor, a row, a block) are tried only once ordinary values come back
right: a learner hears of one mistake at a time.
"""

import math
import numbers
import random
from collections.abc import Callable

import torch
from torch import Tensor

from course.checking import Check, first_difference
from reference.blockwise import dequantize_blockwise, fp4_codebook, int_codebook, quantize_blockwise

TINY = 1e-14  # second moments of an optimizer are as small, and are quantized too


def _off_the_borders(x: Tensor, scale: Tensor | float, margin: float = 0.03) -> Tensor:
    """``x`` with zeros where x / scale is next to a half."""
    share = x.double() / scale
    return torch.where((share - share.floor() - 0.5).abs() < margin, 0, x)


def _largest_is(sign: int, x: Tensor) -> Tensor:
    """``x`` with its largest absolute value made a little larger, and of this sign."""
    flat = x.flatten().clone()
    at = flat.abs().argmax()
    flat[at] = 1.25 * sign * flat[at].abs()
    return flat.view(x.shape)


def _harder_in_16_bits(x: Tensor, g: torch.Generator) -> Tensor:
    """``x`` (16 bits) such that a step rounded to its dtype always shows in the scale, and a quotient rounded to bfloat16 in the codes."""
    flat = x.flatten().clone()
    at = flat.abs().argmax()
    tops = flat[at] * torch.linspace(1, 1.25, 100, dtype=x.dtype)
    steps = tops.abs().double() / 127
    flat[at] = tops[(steps.to(x.dtype) / steps - 1).abs() > 5e-4][0]  # five times what a check lets pass
    step = flat[at].abs().double() / 127
    values = (torch.linspace(64.5, 125.5, 1000).double() * step).to(x.dtype).unique()  # up there bfloat16 counts in half steps
    values = _off_the_borders(values, step)
    twice = values[(values / step.float()).round() != (values.double() / step).round()]
    others = torch.randperm(flat.numel() - 1, generator=g)[:3]
    flat[others + (others >= at)] = twice[torch.randint(len(twice), (3,), generator=g)]
    return flat.view(x.shape)


def _number(value) -> object:
    """A tensor of one element or a number of numpy's as a number; anything else as it is."""
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):
        return float(value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _tuple_of(count: int, result) -> bool:
    return isinstance(result, (tuple, list)) and len(result) == count


def transposed(x: Tensor) -> Tensor:
    """The same values in the same places of the tensor, but not in memory: ``x.view(-1)`` raises, ``x.flatten()`` is right."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _comes_back(x: Tensor, restored: Tensor, step: Tensor | float) -> bool:
    return restored.shape == x.shape and bool(((x.double() - restored.double()).abs() <= 0.51 * step).all())


# ----------------------------------------------------------------------------------------------------------- absmax, 8 bits


def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    absmax = x.float().abs().max()
    scale = torch.where(absmax > 0, absmax, 127) / 127
    return (x.float() / scale).round().to(torch.int8), scale


def _absmax_int8_again(x: Tensor) -> tuple[Tensor, float]:
    wide = x.double()
    largest = max(wide.max().item(), -wide.min().item()) or 1.0
    steps = torch.arange(-127, 128)
    nearest = (wide.flatten()[:, None] * 127 / largest - steps).abs().argmin(1)  # (n,)
    return steps[nearest].to(torch.int8).view(x.shape), largest / 127


def _absmax_with(
    largest: Callable[[Tensor], Tensor] = lambda x: x.abs().max(),
    levels: int = 127,
    finish: Callable[[Tensor], Tensor] = lambda codes: codes.round().clamp(-127, 127).to(torch.int8),
    scale: Callable[[Tensor], Tensor] = lambda scale: scale,
    wide: Callable[[Tensor], Tensor] = lambda x: x.float(),
):
    """The right answer with one part replaced."""

    def answer(x: Tensor) -> tuple[Tensor, Tensor]:
        x = wide(x)
        top = largest(x)
        step = torch.where(top == 0, 127, top) / levels
        return finish(x / step), scale(step)

    return answer


def _divided_in_its_own_dtype(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().max() / 127
    scale = torch.where(scale == 0, 1, scale)
    return (x / scale).round().to(torch.int8), scale  # a float32 scale of no dimension does not widen a 16-bit tensor


def _from_min_to_max(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = torch.where(x.any(), x.max() - x.min(), 255) / 255
    return ((x - x.min()) / scale - 128).round().clamp(-128, 127).to(torch.int8), scale


def _no_guard(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().max() / 127
    return (x.float() / scale).round().to(torch.int8), scale


def _epsilon_in_the_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().max() / 127 + 1e-8
    return (x.float() / scale).round().to(torch.int8), scale


def _observe_absmax(answer, seed: int) -> dict:
    g, seen = torch.Generator().manual_seed(seed), {}
    for name, shape, dtype, sign in (
        ("a float32 matrix, largest value negative", (7, 9), torch.float32, -1),
        ("a float32 vector, largest value positive", (50,), torch.float32, 1),
        ("a bfloat16 matrix", (12, 11), torch.bfloat16, -1),
        ("a transposed float16 tensor of three dimensions", (3, 5, 4), torch.float16, 1),
    ):
        x = _largest_is(sign, torch.randn(shape, generator=g) * 0.7).to(dtype)
        if dtype == torch.bfloat16:
            x = _harder_in_16_bits(x, g)
        x = _off_the_borders(x, x.double().abs().max() / 127)
        if name.startswith("a transposed"):
            x = transposed(x)
        result = answer(x.clone())
        if not _tuple_of(2, result) or not isinstance(result[0], Tensor):
            return seen | {"the answer is a pair, (codes, scale)": False}
        codes, scale = result
        seen |= {"the answer is a pair, (codes, scale)": True, f"codes of {name}": codes, f"scale of {name}": _number(scale)}
        step = x.double().abs().max() / 127
        if not isinstance(_number(scale), float) or not _comes_back(x, codes.double() * _number(scale), step):
            return seen
    tiny = _largest_is(1, TINY * torch.randn(30, generator=g))  # nothing that is added to their scale is small beside it
    step = tiny.double().abs().max() / 127
    tiny = _off_the_borders(tiny, step)
    codes, scale = answer(tiny.clone())
    back = _comes_back(tiny, codes.double() * _number(scale), step)  # not the scale itself: whatever was added, one message fits
    seen |= {f"codes of values of about {TINY:.0e}": codes, f"codes · scale gives values of about {TINY:.0e} back": back}
    if not back:
        return seen
    codes, scale = answer(torch.zeros(4, 3))
    seen["codes of a tensor of zeros"] = codes
    seen["the scale of a tensor of zeros is a positive, finite number"] = bool(0 < _number(scale) < math.inf)
    return seen


absmax = Check(
    task="eight bits from the largest absolute value, and back",
    observe=_observe_absmax,
    reference=absmax_int8,
    second=_absmax_int8_again,
    misconceptions={
        "the scale comes from x.max(): the value with the largest magnitude may be negative, so take x.abs().max()": _absmax_with(
            largest=lambda x: x.max()
        ),
        "the scale comes from x.max(), and values below −x.max() wrapped around in int8: take x.abs().max()": _absmax_with(
            largest=lambda x: x.max(), finish=lambda codes: codes.round().to(torch.int32).to(torch.int8)
        ),
        "you divided by 128 and clamped: there is no code 128, so the largest positive value is cut; use 127 steps on both sides": (
            _absmax_with(levels=128, finish=lambda codes: codes.round().clamp(-128, 127).to(torch.int8))
        ),
        "you divided by 128: the largest positive value gets the code 128, which wraps around to −128 in int8; use 127": _absmax_with(
            levels=128, finish=lambda codes: codes.round().to(torch.int32).to(torch.int8)
        ),
        "you divided by 255, the steps of the whole range: on each side of zero there are 127": _absmax_with(levels=255),
        "the fraction was cut off: .to(torch.int8) truncates towards zero; call .round() first": _absmax_with(
            finish=lambda codes: codes.to(torch.int8)
        ),
        "you took the floor: that pulls every value down by half a step on average; use .round()": _absmax_with(
            finish=lambda codes: codes.floor().to(torch.int8)
        ),
        "your scale is the inverse of the right one: it multiplies the codes to give x back, so it is absmax / 127": _absmax_with(
            scale=lambda scale: 1 / scale
        ),
        "you returned absmax as the scale: a code counts steps, and a step is absmax / 127": _absmax_with(scale=lambda scale: 127 * scale),
        "you divided in the tensor's own 16-bit dtype: the scale itself is then rounded to a few digits; convert x to float32 first": (
            _absmax_with(wide=lambda x: x)
        ),
        "the scale is right, but x / scale was computed in the tensor's own 16-bit dtype and rounded twice: divide x.float()": (
            _divided_in_its_own_dtype
        ),
        "you spread the codes from the smallest to the largest value: that needs a zero point (exercise 2); here zero has the code 0": (
            _from_min_to_max
        ),
        "the codes are still floating-point numbers: convert them to torch.int8, else nothing is saved": _absmax_with(
            finish=lambda codes: codes.round()
        ),
        "a tensor of zeros has absmax 0, by which nothing can be divided (0 / 0 is NaN): give it some positive scale, such as 1": _no_guard,
        "a number was added to the scale, or it has a least value: beside it tiny values are lost; replace a scale of 0 and no other": (
            _epsilon_in_the_scale
        ),
    },
    atol=0,  # a scale may be tiny
)


# --------------------------------------------------------------------------------------------------------------- zero point


def affine_uint8(x: Tensor, low: float, high: float) -> tuple[Tensor, float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    codes = (x.float() / scale).round() + zero_point
    return codes.clamp(0, 255).to(torch.uint8), scale, zero_point


def _affine_uint8_again(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    ends = torch.tensor([low, 0.0, high], dtype=torch.float64)
    scale = (ends.max() - ends.min()) / 255
    zero_point = (0 - ends.min()).div(scale).round().long()
    inside = x.double().clamp(-zero_point * scale, (255 - zero_point) * scale)
    return (inside / scale + zero_point).round().to(torch.uint8), scale, zero_point


def _affine_with(
    ends: Callable[[Tensor, float, float], tuple[float, float]] = lambda x, low, high: (min(low, 0.0), max(high, 0.0)),
    steps: int = 255,
    zero: Callable[[float, float], float] = lambda low, scale: round(-low / scale),
    code: Callable = lambda x, low, scale, zero: (x / scale).round() + zero,
    finish: Callable[[Tensor], Tensor] = lambda codes: codes.clamp(0, 255).to(torch.uint8),
    returned: Callable[[float], float] = lambda zero: zero,
    wide: Callable[[Tensor, float, float], Tensor] = lambda x, low, high: x.float(),
    step: Callable[[float], float] = lambda scale: scale,
):
    """The right answer with one part replaced."""

    def answer(x: Tensor, low: float, high: float) -> tuple[Tensor, float, float]:
        x = wide(x, low, high)
        low, high = ends(x, low, high)
        scale = (high - low) / steps
        zero_point = zero(low, scale)
        return finish(code(x, low, scale, zero_point)), step(scale), returned(zero_point)

    return answer


def _symmetric_ends(x: Tensor, low: float, high: float) -> tuple[float, float]:
    return -max(abs(low), abs(high)), max(abs(low), abs(high))


def _affine_epsilon(x: Tensor, low: float, high: float) -> tuple[Tensor, float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 + 1e-8
    zero_point = round(-low / scale)
    return ((x.float() / scale).round() + zero_point).clamp(0, 255).to(torch.uint8), scale, zero_point


def _observe_affine(answer, seed: int) -> dict:
    rng, g, seen = random.Random(seed), torch.Generator().manual_seed(seed), {}
    sign = rng.choice([-1, 1])
    for name, dtype, kind in (
        ("a float32 tensor", torch.float32, "around zero"),
        ("a bfloat16 tensor", torch.bfloat16, "around zero"),
        ("a float32 tensor, measured range above zero", torch.float32, "above"),
        ("a float32 tensor, measured range below zero", torch.float32, "below"),
        (f"values of about {TINY:.0e}", torch.float32, "around zero"),
    ):
        step = rng.uniform(0.01, 0.05) * (TINY if "about" in name else 1)
        zero = {"around zero": rng.randint(30, 90), "above": 0, "below": 255}[kind]
        sign = -sign  # −low / scale lies once above and once below a whole number: cutting the fraction off is wrong for one of the two
        part = sign * rng.uniform(0.2, 0.35) if kind == "around zero" else 0.0
        low, high = -(zero + part) * step, (255 - zero - part) * step
        x = low + (high - low) * (torch.rand(6, 25, generator=g) * 1.2 - 0.1)  # a sixth of the values lies outside of the range
        x[:, 0] = 0
        x = _off_the_borders(x.to(dtype), step)
        # the end at zero moves away from it: an answer has to widen the range again
        given = {"around zero": (low, high), "above": (0.1 * high, high), "below": (low, 0.1 * low)}[kind]
        result = answer(x.clone(), *given)
        if not _tuple_of(3, result) or not isinstance(result[0], Tensor):
            return seen | {"the answer is (codes, scale, zero_point)": False}
        codes, scale, zero_point = result
        seen |= {"the answer is (codes, scale, zero_point)": True, f"codes of {name}": codes}
        if "about" in name:  # not the scale itself: whatever was added to it, one message fits
            seen[f"255 scales are the range of {name}"] = first_difference(_number(scale), (high - low) / 255, 1e-4, 0) is None
        else:
            seen[f"scale of {name}"] = _number(scale)
        seen[f"zero_point of {name}"] = _number(zero_point)
    return seen


affine = Check(
    task="eight bits with a zero point, for a range measured before",
    observe=_observe_affine,
    reference=affine_uint8,
    second=_affine_uint8_again,
    misconceptions={
        "the range does not contain zero: widen it with min(low, 0) and max(high, 0), so that zero has a code": _affine_with(
            ends=lambda x, low, high: (low, high)
        ),
        "values outside of the range wrapped around in uint8: a value just above `high` came back as the lowest; clamp to 0 … 255": (
            _affine_with(finish=lambda codes: codes.to(torch.int32).to(torch.uint8))
        ),
        "you clamped before adding the zero point: all negative values were cut to zero; add it, then clamp": _affine_with(
            code=lambda x, low, scale, zero: (x / scale).round().clamp(0, 255) + zero
        ),
        "zero_point is not a whole number: round it, else zero lies between two codes and does not come back as zero": _affine_with(
            zero=lambda low, scale: -low / scale, code=lambda x, low, scale, zero: (x / scale + zero).round()
        ),
        "you rounded (x − low) / scale: zero_point is rounded too, the two differ by part of a step; round x / scale, add zero_point": (
            _affine_with(code=lambda x, low, scale, zero: ((x - low) / scale).round())
        ),
        "you divided the range by 256: 256 codes have 255 steps between them": _affine_with(steps=256),
        "the sign of zero_point is wrong: it is the code that zero gets, between 0 and 255": _affine_with(returned=lambda zero: -zero),
        "zero_point lost its fraction: int() and // cut it off, which is one code too low half of the time; use round()": _affine_with(
            zero=lambda low, scale: math.floor(-low / scale)
        ),
        "x / scale was computed in the tensor's own 16-bit dtype and rounded twice: divide x.float()": _affine_with(
            wide=lambda x, low, high: x
        ),
        "you clamped x to low and high as they were given: widen the range first, or clamp the codes to 0 … 255 instead": _affine_with(
            wide=lambda x, low, high: x.float().clamp(low, high)
        ),
        "your scale is the inverse of the right one: it multiplies codes − zero_point to give x back": _affine_with(
            step=lambda scale: 1 / scale
        ),
        "zero_point is in the unit of x: it is a code, so divide −low by the scale and round": _affine_with(
            zero=lambda low, scale: -low, code=lambda x, low, scale, zero: (x / scale).round() + round(zero / scale)
        ),
        "you took the range from x itself: it was measured before and given as low and high; x may go beyond it": _affine_with(
            ends=lambda x, low, high: (min(x.min().item(), 0.0), max(x.max().item(), 0.0))
        ),
        "that is a symmetric range, −m to m: the codes of the side that x does not use are wasted; go from low to high": _affine_with(
            ends=_symmetric_ends
        ),
        "the fraction was cut off: round x / scale to the nearest whole number": _affine_with(
            code=lambda x, low, scale, zero: (x / scale).trunc() + zero
        ),
        "the codes are still floating-point numbers: convert them to torch.uint8": _affine_with(finish=lambda codes: codes.clamp(0, 255)),
        "the codes are int8: with a zero point they run from 0 to 255, which is torch.uint8": _affine_with(
            finish=lambda codes: codes.clamp(0, 255).to(torch.uint8).view(torch.int8)
        ),
        "codes and zero_point are 128 too low: that is the same format with signed codes; asked are 0 to 255, torch.uint8": _affine_with(
            finish=lambda codes: (codes.clamp(0, 255) - 128).to(torch.int8), returned=lambda zero: zero - 128
        ),
        "a number was added to the scale, or it has a least value: beside it a narrow range is lost; since `low` < `high`, no scale is 0": (
            _affine_epsilon
        ),
    },
    atol=0,  # a scale may be tiny
)


# ------------------------------------------------------------------------------------------------------- one scale each row


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    largest = 2 ** (bits - 1) - 1
    absmax = weight.float().abs().amax(dim=1, keepdim=True)  # (out, 1)
    scales = torch.where(absmax > 0, absmax, largest) / largest
    return (weight.float() / scales).round().to(torch.int8), scales


def _quantize_rows_again(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    codes, scales = [], []
    for row in weight.double():
        scale = max(abs(value) for value in row.tolist()) / (2 ** (bits - 1) - 1) or 1.0
        codes.append([round(value / scale) for value in row.tolist()])
        scales.append([scale])
    return torch.tensor(codes, dtype=torch.int8), torch.tensor(scales)


def _rows_with(
    absmax: Callable[[Tensor], Tensor] = lambda w: w.abs().amax(1, keepdim=True),
    levels: Callable[[int], int] = lambda bits: 2 ** (bits - 1) - 1,
    finish: Callable[[Tensor], Tensor] = lambda codes: codes.round().clamp(-128, 127).to(torch.int8),
    scales: Callable[[Tensor], Tensor] = lambda scales: scales,
    wide: Callable[[Tensor], Tensor] = lambda w: w.float(),
):
    """The right answer with one part replaced."""

    def answer(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        weight = wide(weight)
        top = absmax(weight)
        step = torch.where(top == 0, 1, top) / levels(bits)
        return finish(weight / step), scales(step)

    return answer


def _all_patterns(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    half = 2 ** (bits - 1)
    return _rows_with(levels=lambda bits: half, finish=lambda codes: codes.round().clamp(-half, half - 1).to(torch.int8))(weight, bits)


def _signed_and_clamped(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    largest = _rows_with(absmax=lambda w: w.amax(1, keepdim=True), finish=lambda codes: codes.round().clamp(-top, top).to(torch.int8))
    return largest(weight, bits)


def _absmax_of_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    codes, scales = quantize_rows(weight, bits)
    return codes, scales * (2 ** (bits - 1) - 1)


def _rows_unguarded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scales = weight.float().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight.float() / scales).round().to(torch.int8), scales


def _rows_epsilon(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scales = weight.float().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1) + 1e-8
    return (weight.float() / scales).round().to(torch.int8), scales


def _observe_rows(answer, seed: int) -> dict:
    rng, g, seen = random.Random(seed), torch.Generator().manual_seed(seed), {}
    first = rng.choice([4, 5, 6])  # not 3: its 2^bits − 1 is the 7 of four bits, and the two mistakes would look the same
    for out, inside, dtype, bits in (
        (8, 8, torch.float32, first),
        (5, 13, torch.float32, rng.choice([bits for bits in (2, 3, 4, 5, 6) if bits != first])),
        (12, 7, torch.bfloat16, rng.choice([4, 7, 8])),  # not 2: a bfloat16 scale would be exact
    ):
        weight = torch.randn(out, inside, generator=g) * torch.logspace(-1, 1, out)[:, None]  # rows of different size
        for row, sign in enumerate([-1, 1] * out):
            if row < out:
                weight[row] = _largest_is(sign, weight[row])
        weight = weight.to(dtype)
        step = weight.double().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        weight = _off_the_borders(weight, step)
        result = answer(weight.clone(), bits)
        if not _tuple_of(2, result) or not all(isinstance(part, Tensor) for part in result):
            return seen | {"the answer is a pair of tensors, (codes, scales)": False}
        codes, scales = result
        name = f"a {out} × {inside} {str(dtype).removeprefix('torch.')} weight, {bits} bits"
        seen |= {"the answer is a pair of tensors, (codes, scales)": True, f"scales of {name}": scales, f"codes of {name}": codes}
        if scales.shape != (out, 1) or not _comes_back(weight, codes.double() * scales.double(), step):
            return seen
    weight = torch.randn(6, 9, generator=g)
    weight[2] = 0
    weight[4] *= TINY
    step = weight.double().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    weight = _off_the_borders(weight, step)
    codes, scales = answer(weight.clone(), bits)
    back = _comes_back(weight[4], codes[4].double() * scales[4].double(), step[4])
    seen |= {f"codes of a row of values of about {TINY:.0e}": codes[4], f"codes · scales gives a row of about {TINY:.0e} back": back}
    if not back:
        return seen
    seen["codes of a row of zeros"] = codes[2]
    seen["the scale of a row of zeros is positive and finite"] = bool(0 < scales[2] < math.inf)
    return seen


rows = Check(
    task="one scale for each output row",
    observe=_observe_rows,
    reference=quantize_rows,
    second=_quantize_rows_again,
    misconceptions={
        "your scales belong to the columns: for one scale a row, take the maximum *along* the row, over dim 1": _rows_with(
            absmax=lambda w: w.abs().amax(0, keepdim=True)
        ),
        "this is one scale for the whole tensor: take the maximum over dim 1 only": _rows_with(
            absmax=lambda w: w.abs().max().expand(len(w), 1)
        ),
        "the scales have shape (out,): on a square weight they would multiply columns, without an error; keep dim 1, shape (out, 1)": (
            _rows_with(scales=lambda scales: scales.flatten())
        ),
        "the scales come from the largest signed value of a row: take the absolute value first": _rows_with(
            absmax=lambda w: w.amax(1, keepdim=True), finish=lambda codes: codes.round().to(torch.int32).to(torch.int8)
        ),
        "the scales come from the largest signed value of a row, and what lies below its opposite was cut: take the absolute value first": (
            _signed_and_clamped
        ),
        "you divided by 2^(bits − 1): the largest code on both sides is 2^(bits − 1) − 1": _rows_with(levels=lambda bits: 2 ** (bits - 1)),
        "you divided by 2^(bits − 1) and clamped: the largest positive values are cut by a step; use 2^(bits − 1) − 1 on both sides": (
            _all_patterns
        ),
        "you divided by 127 whatever `bits` says: the largest code is 2^(bits − 1) − 1": _rows_with(levels=lambda bits: 127),
        "you divided by 2^bits − 1, the steps of the whole range: on each side of zero there are 2^(bits − 1) − 1": _rows_with(
            levels=lambda bits: 2**bits - 1
        ),
        "the fraction was cut off: round before you convert to int8": _rows_with(finish=lambda codes: codes.to(torch.int8)),
        "you took the floor, which moves every weight down by half a step on average: use round": _rows_with(
            finish=lambda codes: codes.floor().to(torch.int8)
        ),
        "you returned the largest values of the rows: a scale is one step, the largest value over 2^(bits − 1) − 1": _absmax_of_rows,
        "the scales were computed in the weight's own 16-bit dtype, which rounds them: start from weight.float()": _rows_with(
            wide=lambda w: w, scales=lambda scales: scales.float()
        ),
        "the scales are in the weight's own 16-bit dtype: start from weight.float(), they are to be float32": _rows_with(wide=lambda w: w),
        "your scales are the inverses of the right ones: a scale multiplies codes to give weights back": _rows_with(
            scales=lambda scales: 1 / scales
        ),
        "the codes are still floating-point numbers: convert them to torch.int8": _rows_with(finish=lambda codes: codes.round()),
        "a row of zeros has absmax 0, and 0 / 0 is NaN: give such a row some positive scale": _rows_unguarded,
        "a number was added to the scales, or they have a least value: beside it a row of tiny values is lost; replace scales of 0 only": (
            _rows_epsilon
        ),
    },
    atol=0,  # a scale may be tiny
)


# ------------------------------------------------------------------------------------------------------ one scale each block


def quantize_blocks(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes, absmax = [], []
    for block in x.float().flatten().split(block_size):
        absmax.append(block.abs().max())
        share = block / absmax[-1].clamp(min=1e-38)
        codes.append((share[:, None] - codebook).abs().argmin(1))
    return torch.cat(codes).to(torch.uint8).view(x.shape), torch.stack(absmax)


def _quantize_blocks_again(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    q = quantize_blockwise(x, codebook, block_size)
    return q.codes, q.absmax


def _nearest(share: Tensor, codebook: Tensor) -> Tensor:
    return (share[:, None] - codebook).abs().argmin(1)


def _blocks_with(
    cut: Callable[[Tensor, int], list[Tensor]] = lambda x, size: list(x.flatten().split(size)),
    largest: Callable[[Tensor], Tensor] = lambda block: block.abs().max(),
    code: Callable[[Tensor, Tensor], Tensor] = _nearest,
    wide: Callable[[Tensor], Tensor] = lambda x: x.float(),
    finish: Callable = lambda codes, absmax, x: (codes.to(torch.uint8).view(x.shape), absmax),
):
    """The right answer with one part replaced."""

    def answer(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        blocks = cut(wide(x), block_size)
        tops = [largest(block) for block in blocks]
        codes = [code(block / torch.where(top == 0, 1, top), codebook.to(block.dtype)) for block, top in zip(blocks, tops, strict=True)]
        return finish(torch.cat(codes), torch.stack(tops), x)

    return answer


def _scale_of_everything(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    flat = x.float().flatten()
    codes = _nearest(flat / flat.abs().max(), codebook)
    return codes.to(torch.uint8).view(x.shape), flat.abs().max().expand(math.ceil(len(flat) / block_size))


def _last_borrows_its_scale(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    flat = x.float().flatten()
    whole = flat[: len(flat) // block_size * block_size].view(-1, block_size).abs().amax(1)
    scales = whole.repeat_interleave(block_size)
    scales = torch.cat([scales, scales[-1:].expand(len(flat) - len(scales))])
    return _nearest(flat / scales, codebook).to(torch.uint8).view(x.shape), whole


def _level_below(share: Tensor, codebook: Tensor) -> Tensor:
    levels, order = codebook.sort(stable=True)
    return order[(torch.bucketize(share, levels, right=True) - 1).clamp(min=0)]


def _level_above(share: Tensor, codebook: Tensor) -> Tensor:
    levels, order = codebook.sort(stable=True)
    return order[torch.bucketize(share, levels).clamp(max=len(levels) - 1)]


def _as_if_sorted(share: Tensor, codebook: Tensor) -> Tensor:
    levels = codebook.sort().values
    return torch.bucketize(share, (levels[1:] + levels[:-1]) / 2)


def _blocks_unguarded(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    blocks = x.float().flatten().split(block_size)
    codes = [_nearest(block / block.abs().max(), codebook) for block in blocks]
    return torch.cat(codes).to(torch.uint8).view(x.shape), torch.stack([block.abs().max() for block in blocks])


def _undivided(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return _nearest(x.float().flatten(), codebook).to(torch.uint8).view(x.shape), quantize_blocks(x, codebook, block_size)[1]


def _without_rest(x: Tensor, size: int) -> list[Tensor]:
    flat = x.flatten()
    return list(flat[: len(flat) // size * size].split(size))


def _divided_by_more(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    tops = [block.abs().max() for block in x.float().flatten().split(block_size)]
    codes = [_nearest(block / (top + 1e-8), codebook) for block, top in zip(x.float().flatten().split(block_size), tops, strict=True)]
    return torch.cat(codes).to(torch.uint8).view(x.shape), torch.stack(tops)


def _shares_in_16_bits(x: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    tops = [block.float().abs().max() for block in x.flatten().split(block_size)]
    shares = [block / torch.where(top == 0, 1, top) for block, top in zip(x.flatten().split(block_size), tops, strict=True)]
    return _nearest(torch.cat(shares), codebook).to(torch.uint8).view(x.shape), torch.stack(tops)


def _off_the_midpoints(x: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    """``x`` with zeros where a value's share of its block's largest is next to the middle of two levels."""
    levels = codebook.double().sort().values
    borders = (levels[1:] + levels[:-1]) / 2
    flat = x.flatten().clone()
    for block in flat.split(block_size):
        share = block.double() / block.double().abs().max()
        near = (share[:, None] - borders).abs().amin(1) < 1e-5  # float32 divides a hundred times more exactly
        block[near & (share.abs() < 1)] = 0
    return flat.view(x.shape)


def _in_no_order(count: int, g: torch.Generator) -> Tensor:
    """A codebook. Zero is neither its first level nor that in the middle, and no two levels are equal: either code would be right."""
    inner = torch.randperm(9999, generator=g) - 4999
    levels = torch.cat([torch.tensor([-1.0, 1.0]), inner[inner != 0][: count - 3] / 5000])
    levels = levels[torch.randperm(count - 1, generator=g)]
    at = int(torch.randint(1, count // 4, (1,), generator=g))
    return torch.cat([levels[:at], torch.zeros(1), levels[at:]])


def _observe_blocks(answer, seed: int) -> dict:
    g, seen = torch.Generator().manual_seed(seed), {}
    uneven, many = _in_no_order(12, g), _in_no_order(256, g)
    for name, shape, block_size, codebook, dtype in (
        ("4-bit integers", (6, 32), 16, int_codebook(4), torch.float32),
        ("4-bit integers, rows that end inside a block", (5, 24), 16, int_codebook(4), torch.float32),
        ("a short last block", (7, 11), 32, int_codebook(5), torch.float32),
        ("a codebook in no order", (6, 10), 8, uneven, torch.float32),
        ("FP4 levels, a bfloat16 tensor", (3, 37), 16, fp4_codebook(), torch.bfloat16),
        ("256 levels, a transposed bfloat16 tensor of three dimensions", (6, 5, 23), 32, many, torch.bfloat16),
    ):
        x = torch.randn(shape, generator=g)
        x = torch.cat([_largest_is((-1) ** i, block) for i, block in enumerate(x.flatten().split(block_size), 1)]).view(shape)
        x[-1, -1] *= 3  # the last block has a scale of its own
        x = _off_the_midpoints(x.to(dtype), codebook, block_size)
        if "transposed" in name:
            x = transposed(x)
        result = answer(x.clone(), codebook.clone(), block_size)
        if not _tuple_of(2, result) or not all(isinstance(part, Tensor) for part in result):
            return seen | {"the answer is a pair of tensors, (codes, absmax)": False}
        codes, absmax = result
        seen |= {"the answer is a pair of tensors, (codes, absmax)": True, f"absmax, {name}": absmax}
        seen |= {f"dtype of the codes, {name}": str(codes.dtype), f"shape of the codes, {name}": str(tuple(codes.shape))}
        if codes.is_floating_point() or codes.numel() != x.numel() or len(absmax) != math.ceil(x.numel() / block_size):
            return seen
        levels = codebook[codes.long().clamp(0, len(codebook) - 1).flatten()]
        seen[f"the levels that the codes stand for, {name}"] = levels
        right = dequantize_blockwise(quantize_blockwise(x.float(), codebook, block_size)).flatten()
        if not torch.allclose(levels * absmax.float().repeat_interleave(block_size)[: len(levels)], right, rtol=1e-4):
            return seen
    x = torch.randn(4, 16, generator=g)
    x[1] *= TINY
    x[2] = 0
    codes, absmax = answer(_off_the_midpoints(x, uneven, 16), uneven.clone(), 16)
    seen[f"absmax of a block of values of about {TINY:.0e}"] = _number(absmax[1])
    seen[f"codes of a block of values of about {TINY:.0e}"] = codes[1]
    seen |= {"codes of a block of zeros": codes[2], "absmax of a block of zeros": _number(absmax[2])}
    return seen


blocks = Check(
    task="one scale for each block, any codebook",
    observe=_observe_blocks,
    reference=quantize_blocks,
    second=_quantize_blocks_again,
    misconceptions={
        "your blocks start anew in every row: they run over the flattened tensor, also past the end of a row": _blocks_with(
            cut=lambda x, size: [block for row in x for block in row.split(size)]
        ),
        "the values after the last whole block are missing: the last block is as short as it comes out, with a scale of its own": (
            _blocks_with(cut=_without_rest, finish=lambda codes, absmax, x: (codes.to(torch.uint8), absmax))
        ),
        "the short last block uses the scale of the block before it: it needs one of its own": _last_borrows_its_scale,
        "every block has the scale of the whole tensor: take the maximum inside each block": _scale_of_everything,
        "you cut the tensor into block_size blocks: block_size is how many values a block holds (split, not chunk)": _blocks_with(
            cut=lambda x, size: list(x.flatten().chunk(size))
        ),
        "the scales come from the largest signed value of a block: take the absolute value first": _blocks_with(
            largest=lambda block: block.max()
        ),
        "you took the level below each value: the nearest one changes at the midpoint between two levels": _blocks_with(code=_level_below),
        "you took the level above each value: bucketize on the levels does that; the nearest one changes at the midpoint of two": (
            _blocks_with(code=_level_above)
        ),
        "your codes count in the sorted codebook: a code is an index into the codebook as it was given": _blocks_with(code=_as_if_sorted),
        "you took midpoints between neighbours of the codebook as given, but it may be in any order: sort it first, then translate back": (
            _blocks_with(code=lambda share, codebook: torch.bucketize(share, (codebook[1:] + codebook[:-1]) / 2))
        ),
        "the codes are those of evenly spaced levels: look for the nearest level of the codebook": _blocks_with(
            code=lambda share, codebook: ((share + 1) / 2 * (len(codebook) - 1)).round()
        ),
        "the values were not divided by the absmax of their block before the nearest level was looked up": _undivided,
        "you kept the sign of a block's largest value: absmax is its absolute value, and is never negative": _blocks_with(
            largest=lambda block: block[block.abs().argmax()]
        ),
        "absmax was taken, and the division done, in 16 bits: convert x to float32 first": _blocks_with(wide=lambda x: x),
        "the codes are int64, eight bytes for each: convert them to torch.uint8": _blocks_with(
            finish=lambda codes, absmax, x: (codes.view(x.shape), absmax)
        ),
        "the codes are flat: give them the shape of x": _blocks_with(finish=lambda codes, absmax, x: (codes.to(torch.uint8), absmax)),
        "you returned steps (absmax over the number of levels): with a codebook from −1 to 1 the scale is absmax itself": _blocks_with(
            finish=lambda codes, absmax, x: (codes.to(torch.uint8).view(x.shape), absmax / 7)
        ),
        "a block of zeros was divided by zero: NaN has no nearest level; guard the division": _blocks_unguarded,
        "absmax is right, but x / absmax was computed in the tensor's own 16-bit dtype: divide x.float()": _shares_in_16_bits,
        "absmax is never below some number, or has one added, when you divide by it: beside it a block of tiny values is lost; "
        "guard against 0 alone": _divided_by_more,
        "the absmax of a block of zeros is 0: replace it where you divide, not in what you return": _blocks_with(
            finish=lambda codes, absmax, x: (codes.to(torch.uint8).view(x.shape), torch.where(absmax == 0, 1, absmax))
        ),
    },
    atol=1e-30,  # an absmax may be tiny; what keeps a divisor from being zero, 1e-38, may stay in it
)


# ---------------------------------------------------------------------------------------------------------------- bit budget


def smallest_block(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    block = 1
    while True:
        if n * code_bits + math.ceil(n / block) * scale_bits <= budget * n:
            return block
        if block >= n:
            return None
        block *= 2


def _smallest_block_again(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    scales = math.floor((budget - code_bits) * n / scale_bits)  # how many can be paid
    fitting = [2**power for power in range(n.bit_length() + 1) if -(-n // 2**power) <= scales]
    return fitting[0] if fitting else None


def _block_with(
    scales: Callable[[int, int], float] = lambda n, block: math.ceil(n / block),
    fits: Callable[[float, float], bool] = lambda used, allowed: used <= allowed,
    width: Callable[[int], float] = lambda scale_bits: scale_bits,
    nothing: Callable[[int], object] = lambda largest: None,
    first: int = 1,
):
    """The right answer with one part replaced."""

    def answer(n: int, code_bits: int, scale_bits: int, budget: float):
        block = first
        while not fits(n * code_bits + scales(n, block) * width(scale_bits), budget * n):
            if block >= n:
                return nothing(block)
            block *= 2
        return block

    return answer


def _largest_block(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    return 2 ** max(0, n - 1).bit_length() if n * code_bits + scale_bits <= budget * n else None


def _one_halving_too_many(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    right = smallest_block(n, code_bits, scale_bits, budget)
    return right // 2 if right and right > 1 else right


def _any_block(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    scales = math.floor((budget - code_bits) * n / scale_bits)
    return math.ceil(n / min(scales, n)) if scales > 0 else None


def _gives_up(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    right = smallest_block(n, code_bits, scale_bits, budget)
    return right if right and right <= 4096 else None


def _at_most_n(n: int, code_bits: int, scale_bits: int, budget: float) -> int | None:
    right = smallest_block(n, code_bits, scale_bits, budget)
    return right if right and right <= n else None


def _observe_budget(answer, seed: int) -> dict:
    rng, seen = random.Random(seed), {}
    wide = rng.choice([512, 1024, 4096]) * rng.choice([3, 5, 11])
    bits, power = rng.choice([3, 4, 5]), rng.randint(4, 7)
    odd = 2**power + rng.randint(1, 3)
    cases = {
        "scales that use the budget up exactly": (wide, bits, 32, bits + 32 / 2**power),
        "a little less than that": (wide, bits, 32, bits + 31 / 2**power),
        "scales of 16 bits": (wide, bits, 16, bits + 17 / 2**power),
        "scales of 8 bits, no power of two in the middle": (wide, 8, 8, 8 + 3 / 2 ** (power + 1)),
        "a last block of one to three values": (odd, bits, 32, bits + (32 + 8) / odd),
        "so many bits that every value can have a scale": (wide, bits, 8, bits + 9),
        "no room for a single scale": (wide, bits, 32, float(bits)),
        "fewer bits than the codes take": (wide, bits, 32, bits - 0.5),
        "a scale for a million values": (3 * 2**20, bits, 32, bits + 32 / 2**20),
    }
    for label, case in cases.items():
        seen[f"{label}: n = {case[0]}, codes of {case[1]} bits, scales of {case[2]}, budget {case[3]:.9g}"] = answer(*case)
    return seen


budget = Check(
    task="the smallest block that a bit budget allows",
    observe=_observe_budget,
    reference=smallest_block,
    second=_smallest_block_again,
    misconceptions={
        "the scales are missing from your sum: each block adds scale_bits": _block_with(scales=lambda n, block: 0),
        "the scale of the short last block is missing: the number of blocks is n / block_size rounded *up*": _block_with(
            scales=lambda n, block: n // block
        ),
        "you counted a fraction of a scale: a short last block has a whole one, so round n / block_size up": _block_with(
            scales=lambda n, block: n / block
        ),
        "a budget that is used up exactly is kept: compare with ≤": _block_with(fits=lambda used, allowed: used < allowed),
        "that is the largest block, with the fewest scales: the smallest one that fits gives the least error": _largest_block,
        "this block is one halving too small: its scales no longer fit into the budget": _one_halving_too_many,
        "that is not a power of two: try 1, 2, 4, 8, …": _any_block,
        "you read scale_bits as bytes: it is in bits, as the budget is": _block_with(width=lambda bits: 8 * bits),
        "you divided scale_bits by 8: everything here is in bits": _block_with(width=lambda bits: bits / 8),
        "you assumed float32 scales: use scale_bits": _block_with(width=lambda bits: 32),
        "blocks can be as small as one value: start at 1": _block_with(first=2),
        "a block may be longer than n: one block then holds everything, with one scale; don't stop before that": _at_most_n,
        "your search ended too early: no block is too long, up to the one that holds everything; go on until block ≥ n": _gives_up,
        "the codes take code_bits each, not 4": lambda n, code_bits, scale_bits, budget: smallest_block(n, 4, scale_bits, budget),
        "where nothing fits, return None: not even one scale for all values can be paid": _block_with(nothing=lambda largest: largest),
    },
    rtol=0,
    atol=0,
)


# ------------------------------------------------------------------------------------------------------------- kept outliers


def keep_outliers(x: Tensor, codebook: Tensor, block_size: int, k: int) -> tuple[Tensor, float]:
    flat = x.flatten()
    kept = flat.abs().topk(k).indices
    rest = flat.index_fill(0, kept, 0)
    q = quantize_blockwise(rest, codebook, block_size)
    restored = dequantize_blockwise(q).index_copy(0, kept, flat[kept]).view(x.shape)
    return restored, q.bits_per_value + k * (8 * x.element_size() + 32) / x.numel()


def _keep_outliers_again(x: Tensor, codebook: Tensor, block_size: int, k: int) -> tuple[Tensor, float]:
    order = sorted(range(x.numel()), key=lambda i: -abs(x.flatten()[i].item()))
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    mask = mask.view(x.shape)
    q = quantize_blockwise(torch.where(mask, 0, x), codebook, block_size)
    bits = math.ceil(math.log2(len(codebook))) * x.numel() + 32 * len(q.absmax) + mask.sum().item() * (torch.finfo(x.dtype).bits + 32)
    return torch.where(mask, x, dequantize_blockwise(q)), bits / x.numel()


def _kept_with(
    choose: Callable[[Tensor, int, int], Tensor] = lambda flat, k, width: flat.abs().topk(k).indices,
    remove: Callable[[Tensor, Tensor], Tensor] = lambda flat, kept: flat.index_fill(0, kept, 0),
    back: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda restored, kept, flat: restored.index_copy(0, kept, flat[kept]),
    price: Callable[[Tensor, float, int], float] = lambda x, codes, k: codes + k * (8 * x.element_size() + 32) / x.numel(),
):
    """The right answer with one part replaced."""

    def answer(x: Tensor, codebook: Tensor, block_size: int, k: int) -> tuple[Tensor, float]:
        flat = x.flatten()
        kept = choose(flat, k, x.shape[-1])
        q = quantize_blockwise(remove(flat, kept), codebook, block_size)
        return back(dequantize_blockwise(q), kept, flat).view(x.shape), price(x, q.bits_per_value, k)

    return answer


def _clipped(flat: Tensor, kept: Tensor) -> Tensor:
    if not len(kept):
        return flat
    limit = flat.index_fill(0, kept, 0).abs().max().item()
    return flat.clamp(-limit, limit)


def _of_each_row(flat: Tensor, k: int, width: int) -> Tensor:
    starts = torch.arange(0, len(flat), width)[:, None]
    return (flat.view(-1, width).abs().topk(min(k, width), dim=1).indices + starts).flatten()


def _of_each_block(x: Tensor, codebook: Tensor, block_size: int, k: int) -> tuple[Tensor, float]:
    flat = x.flatten()
    starts = range(0, len(flat), block_size)
    kept = torch.cat([flat[at : at + block_size].abs().topk(min(k, len(flat) - at)).indices + at for at in starts])
    q = quantize_blockwise(flat.index_fill(0, kept, 0), codebook, block_size)
    bits = q.bits_per_value + len(kept) * (8 * x.element_size() + 32) / len(flat)
    return dequantize_blockwise(q).index_copy(0, kept, flat[kept]).view(x.shape), bits


def _taken_out(x: Tensor, codebook: Tensor, block_size: int, k: int) -> tuple[Tensor, float]:
    rest = torch.ones(x.numel(), dtype=torch.bool).index_fill(0, x.flatten().abs().topk(k).indices, False)
    q = quantize_blockwise(x.flatten()[rest], codebook, block_size)
    restored = x.flatten().masked_scatter(rest, dequantize_blockwise(q)).view(x.shape)
    return restored, q.bits_per_value + k * (8 * x.element_size() + 32) / x.numel()


def _one_too_few(flat: Tensor, k: int, width: int) -> Tensor:
    return flat.abs().topk(max(k - 1, 0)).indices


def _in_place(x: Tensor, codebook: Tensor, block_size: int, k: int) -> tuple[Tensor, float]:
    right = keep_outliers(x, codebook, block_size, k)
    x[torch.unravel_index(x.flatten().abs().topk(k).indices, x.shape)] = 0
    return right


def _observe_kept(answer, seed: int) -> dict:
    rng, g, seen = random.Random(seed), torch.Generator().manual_seed(seed), {}
    for shape, block_size, bits, k, dtype in (
        ((8, 24), 32, 4, 5, torch.float32),
        ((7, 30), 64, 3, 3, torch.bfloat16),
        ((6, 8, 4), 16, 4, 0, torch.float32),
    ):
        x = torch.randn(shape, generator=g)
        places = rng.sample(range(x.numel()), 5)
        for number, place in enumerate(places):  # the largest is negative, no two are equal
            x.view(-1)[place] = -(20 + 8 * number + 1 / 3) * (-1) ** number  # nor one of 16 bits
        x = x.to(dtype) if k else transposed(x.to(dtype))
        given = x.clone()
        result = answer(given, int_codebook(bits), block_size, k)
        if not _tuple_of(2, result) or not isinstance(result[0], Tensor):
            return seen | {"the answer is a pair, (restored, bits)": False}
        restored, price = result
        name = f"{str(dtype).removeprefix('torch.')}{', three dimensions, transposed' * (k == 0)}, {k} values kept, blocks of {block_size}"
        seen |= {"the answer is a pair, (restored, bits)": True, f"restored, {name}": restored, f"bits per value, {name}": _number(price)}
        seen[f"x is left as it was, {name}"] = torch.equal(given, x)
    return seen


outliers = Check(
    task="the k largest values kept out of the scale",
    observe=_observe_kept,
    reference=keep_outliers,
    second=_keep_outliers_again,
    misconceptions={
        "the outliers were still there when the scales were taken: set them to zero before quantizing, else nothing is gained": _kept_with(
            remove=lambda flat, kept: flat
        ),
        "the outliers did not come back: write the kept values into the restored tensor": _kept_with(
            back=lambda restored, kept, flat: restored
        ),
        "you chose the largest signed values: an outlier may be negative, so compare absolute values": _kept_with(
            choose=lambda flat, k, width: flat.topk(k).indices
        ),
        "you kept k values of every row: k counts the whole tensor": _kept_with(choose=_of_each_row),
        "you kept k values of every block: k counts the whole tensor": _of_each_block,
        "the kept values were cut out, and all that follows moved up into other blocks: put zeros in their places": _taken_out,
        "one value too few was kept: a mask |x| > threshold loses the k-th largest, which is the threshold": _kept_with(
            choose=_one_too_few
        ),
        "you clipped the outliers to the largest ordinary value: keep them as they are, outside of the codes": _kept_with(
            remove=_clipped, back=lambda restored, kept, flat: restored
        ),
        "you kept the smallest values: topk gives the largest, of the absolute values": _kept_with(
            choose=lambda flat, k, width: flat.abs().topk(k, largest=False).indices
        ),
        "the positions are missing from the bits: each kept value needs 32 bits more to say where it belongs": _kept_with(
            price=lambda x, codes, k: codes + k * 8 * x.element_size() / x.numel()
        ),
        "the kept values are missing from the bits: each costs the bits of its own dtype": _kept_with(
            price=lambda x, codes, k: codes + k * 32 / x.numel()
        ),
        "the bits do not count what is kept: value and position, for each of the k": _kept_with(price=lambda x, codes, k: codes),
        "you took the codes of the kept values off: the codes are a dense tensor, these have one too": _kept_with(
            price=lambda x, codes, k: codes + k * (8 * x.element_size() + 32 - (4 if codes > 4 else 3)) / x.numel()
        ),
        "you counted 32 bits for a kept value: it has the dtype of x, 16 bits for bfloat16": _kept_with(
            price=lambda x, codes, k: codes + k * 64 / x.numel()
        ),
        "element_size() counts bytes: everything here is in bits": _kept_with(
            price=lambda x, codes, k: codes + k * (x.element_size() + 32) / x.numel()
        ),
        "that is the price for all values together: divide by how many there are": _kept_with(
            price=lambda x, codes, k: codes * x.numel() + k * (8 * x.element_size() + 32)
        ),
        "x itself was changed: work on a copy": _in_place,
    },
)
