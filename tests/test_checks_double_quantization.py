"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused. And the judges' arithmetic is the reference's."""

import pytest
import torch

from course.checking import NotYet
from course.checks import double_quantization as check
from reference.double_quant import bits_per_parameter, dequantize_scales, dynamic_codebook, quantize_scales
from reference.nf4 import NF4_CODEBOOK, dequantize_nf4, quantize_nf4


def test_the_judges_map_is_the_references():
    assert torch.equal(check.dynamic_map(7), dynamic_codebook())


@pytest.mark.parametrize("elements", [1, 64, 65, 16_385, 40_001])
@pytest.mark.parametrize("second", [None, 64, 256])
def test_the_judges_bits_are_those_of_tensors(elements, second):
    q = quantize_nf4(torch.ones(elements))
    scales = None if second is None else quantize_scales(q.absmax, second)
    assert check.bits_per_weight(elements, 64, second) == pytest.approx(bits_per_parameter(q, scales))


def test_the_judges_weight_is_the_references():
    weight = torch.randn(30, 41, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    q = quantize_nf4(weight, 32)
    s = quantize_scales(q.absmax, 16)
    tensors = q.packed.view(-1), NF4_CODEBOOK, s.codes, dynamic_codebook(), s.absmax, s.offset
    mine = check.dequantize(check.Stored(*tensors, 32, 16, weight.shape, weight.dtype))
    assert torch.equal(mine, dequantize_nf4(type(q)(q.packed, dequantize_scales(s), q.shape, q.dtype, 32)))


def by_formula(elements, block_size, second):
    return 4 + (32 / block_size if second is None else 8 / block_size + 32 / (block_size * second))


def for_large_second_only(elements, block_size, second):
    return check.bits_per_weight(elements, block_size, second and 256)


@pytest.mark.parametrize(
    "answer", [by_formula, for_large_second_only, lambda n, b, s: 4.127, lambda n, b, s: str(check.bits_per_weight(n, b, s))]
)
def test_sly_counts_are_refused(answer):
    with pytest.raises(NotYet):
        check.bits(answer)


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda decades: dynamic_codebook(), "3 decades: expected shape"),  # the usual one by heart
        (lambda decades: check.dynamic_map(decades).double(), "float32"),
        (lambda decades: check.dynamic_map(decades).tolist(), "a tensor"),
        (lambda decades: check.dynamic_map(decades) * (1 - 1e-3), "values differ"),
    ],
)
def test_sly_maps_are_refused(answer, words):
    with pytest.raises(NotYet, match=words):
        check.dynamic(answer)


def changed(position, change):
    def answer(absmax, levels, block_size):
        parts = list(check.quantize(absmax, levels, block_size))
        parts[position] = change(parts[position])
        return tuple(parts)

    return answer


def drops_the_short_block(absmax, levels, block_size):
    codes, largest, offset = check.quantize(absmax, levels, block_size)
    whole = len(absmax) // block_size
    return codes[: whole * block_size], largest[:whole], offset


@pytest.mark.parametrize(
    "answer, words",
    [
        (changed(0, lambda codes: codes.long()), "codes.*uint8"),
        (changed(0, lambda codes: codes.roll(1)), "codes"),
        (changed(1, lambda largest: largest[:, None]), "scales of scales.*shape"),
        (changed(2, lambda offset: offset[None]), "offset.*shape"),
        (changed(2, lambda offset: -offset), "offset"),
        (drops_the_short_block, "shape"),
        (lambda absmax, levels, block_size: check.quantize(absmax, dynamic_codebook(), block_size), "codes"),
    ],
)
def test_sly_scales_are_refused(answer, words):
    with pytest.raises(NotYet, match=words):
        check.scales(answer)


def divides_as_a_library(absmax, levels, block_size):
    """By the inverse, in float64, the nearest by distance."""
    offset = absmax.double().mean().float()
    blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % block_size)).view(-1, block_size)
    largest = blocks.abs().max(1).values
    scaled = (blocks * largest.reciprocal()[:, None]).flatten()[: len(absmax)].double()
    return (scaled[:, None] - levels.double()).abs().argmin(1).byte(), largest, offset


def test_another_order_of_operations_passes_every_time():
    for seed in range(30):
        check.scales._judge(divides_as_a_library, seed)


def with_one_dtype(q):
    return check.dequantize(q._replace(dtype=torch.float32))


@pytest.mark.parametrize(
    "answer, words",
    [
        (with_one_dtype, "dtype"),
        (lambda q: check.dequantize(q._replace(offset=q.offset * 1.01)), "values differ"),
        (lambda q: check.dequantize(q._replace(levels=q.levels.flip(0))), "values differ"),
        (lambda q: check.dequantize(q).T, "shape"),
    ],
)
def test_sly_weights_are_refused(answer, words):
    with pytest.raises(NotYet, match=words):
        check.restore(answer)


@pytest.mark.parametrize("answer", [lambda budget, second: 64, lambda budget, second: check.smallest_block(budget, second) or 4096])
def test_sly_budgets_are_refused(answer):
    with pytest.raises(NotYet):
        check.budget(answer)
