"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused. And the judges' arithmetic is the reference's."""

import math

import numpy as np
import pytest
import torch

from course.checking import NotYet, mistaken
from course.checks import double_quantization as check
from course.checks.double_quantization.bits import bits_per_weight
from course.checks.double_quantization.budget import smallest_block
from course.checks.double_quantization.dynamic import dynamic_map
from course.checks.double_quantization.restore import Stored, dequantize
from course.checks.double_quantization.scales import quantize_scales as quantize
from reference.double_quant import bits_per_parameter, dequantize_scales, dynamic_codebook, quantize_scales
from reference.nf4 import NF4_CODEBOOK, NF4Tensor, dequantize_nf4, quantize_nf4


def test_the_judges_map_is_the_references():
    assert torch.equal(dynamic_map(7), dynamic_codebook())


@pytest.mark.parametrize("elements", [1, 64, 65, 16_385, 40_001])
@pytest.mark.parametrize("second", [None, 64, 256])
def test_the_judges_bits_are_those_of_tensors(elements, second):
    q = quantize_nf4(torch.ones(elements))
    scales = None if second is None else quantize_scales(q.absmax, second)
    assert bits_per_weight(elements, 64, second) == pytest.approx(bits_per_parameter(q, scales))


def test_the_judges_weight_is_the_references():
    weight = torch.randn(30, 41, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    q = quantize_nf4(weight, 32)
    s = quantize_scales(q.absmax, 16)
    tensors = q.packed.view(-1), NF4_CODEBOOK, s.codes, dynamic_codebook(), s.absmax, s.offset
    mine = dequantize(Stored(*tensors, 32, 16, weight.shape, weight.dtype))
    assert torch.equal(mine, dequantize_nf4(type(q)(q.packed, dequantize_scales(s), q.shape, q.dtype, 32)))


def by_formula(elements, block_size, second):
    return 4 + (32 / block_size if second is None else 8 / block_size + 32 / (block_size * second))


def for_large_second_only(elements, block_size, second):
    return bits_per_weight(elements, block_size, second and 256)


def for_the_usual_blocks(elements, block_size, second_block):
    return bits_per_weight(elements, block_size, second_block) if block_size in (32, 64) and elements > 9_000 else 0.0


def one_block_at_least(elements, block_size, second_block):
    return mistaken(bits_per_weight, groups=lambda blocks, size: max(1, blocks // size))(elements, block_size, second_block)


@pytest.mark.parametrize(
    "answer",
    [
        by_formula,
        for_large_second_only,
        for_the_usual_blocks,
        one_block_at_least,
        lambda n, b, s: 4.127,
        lambda n, b, s: str(bits_per_weight(n, b, s)),
        lambda n, b, s: round(bits_per_weight(n, b, s), 3),
        lambda n, b, s: bits_per_weight(n, b, s) + 8 * 1024 / n,  # with the code book
        lambda n, b, s: bits_per_weight(n, 64, s),
    ],
)
def test_sly_counts_are_refused(answer):
    for seed in range(5):
        with pytest.raises(NotYet):
            check.bits._judge(answer, seed)


def bits_with_numpy(elements, block_size, second_block):
    blocks = np.ceil(np.float64(elements) / block_size)
    constants = 4 * blocks if second_block is None else blocks + 4 * np.ceil(blocks / second_block) + 4
    return np.int64(elements + 1) // 2 * 8 / elements + constants * 8 / elements


def map_with_numpy(decades):
    centres = []
    for decade in range(decades):
        parts = 2 ** (decades - 1 - decade)
        centres.append(10.0**-decade * (0.1 + 0.9 * (np.arange(parts) + 0.5) / parts))
    positive = np.sort(np.concatenate(centres))
    return torch.from_numpy(np.concatenate([-positive[::-1], [0.0], positive, [1.0]]).astype(np.float32))


def scales_by_loops(absmax, levels, block_size):
    values = [float(value) for value in absmax]
    offset, codes, largest = math.fsum(values) / len(values), [], []
    for start in range(0, len(values), block_size):
        block = [value - offset for value in values[start : start + block_size]]
        largest.append(max(abs(value) for value in block))
        codes += [min(range(len(levels)), key=lambda i, v=value: abs(v - float(levels[i]) * largest[-1])) for value in block]
    return torch.tensor(codes, dtype=torch.uint8), torch.tensor(largest), torch.tensor(offset)


def weight_by_loops(q):
    weight = np.zeros(np.prod(q.shape))
    for i in range(len(weight)):
        code = q.packed[i // 2].item() >> 4 if i % 2 == 0 else q.packed[i // 2].item() & 15
        block = i // q.block_size
        scale = q.dynamic[q.codes[block].item()].item() * q.absmax[block // q.second_block].item() + q.offset.item()
        weight[i] = q.levels[code].item() * scale  # float64
    return torch.from_numpy(weight).reshape(q.shape).to(q.dtype)


def block_with_numpy(budget, second_block):
    sizes = 2 ** np.arange(3, 13)
    bits = 4 + (32 if second_block is None else 8 + 32 / second_block) / sizes
    return sizes[bits <= budget][0] if (bits <= budget).any() else None  # numpy's int64


def block_by_logarithm(budget, second_block):
    each = 32 if second_block is None else 8 + 32 / second_block
    return None if budget - 4 < each / 4096 else max(8, 2 ** math.ceil(math.log2(each / (budget - 4))))


@pytest.mark.parametrize(
    "judge, answer",
    [
        (check.bits, bits_with_numpy),
        (check.dynamic, map_with_numpy),
        (check.scales, scales_by_loops),
        (check.restore, weight_by_loops),
        (check.budget, block_with_numpy),
        (check.budget, block_by_logarithm),
    ],
)
def test_right_answers_in_other_dress_pass_every_time(judge, answer):
    for seed in range(5):
        judge._judge(answer, seed)


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda decades: dynamic_codebook(), "3 decades: expected shape"),  # the usual one by heart
        (lambda decades: dynamic_map(decades).double(), "float32"),
        (lambda decades: dynamic_map(decades).tolist(), "a tensor"),
        (lambda decades: dynamic_map(decades) * (1 - 1e-3), "values differ"),
        (lambda decades: {3: dynamic_map(3), 7: dynamic_map(7)}[decades], "KeyError"),
        (lambda decades: dynamic_map(decades).numpy(), "a tensor, got ndarray"),
        (mistaken(dynamic_map, parts=lambda decade, decades: decade + 1), "expected shape"),
    ],
)
def test_sly_maps_are_refused(answer, words):
    with pytest.raises(NotYet, match=words):
        check.dynamic(answer)


def test_a_fraction_of_a_scale_of_scales_is_named():
    def answer(n, block, second):
        blocks = math.ceil(n / block)
        return 8 * ((n + 1) // 2 + (4 * blocks if second is None else blocks + 4 * blocks / second + 4)) / n

    for seed in range(5):
        with pytest.raises(NotYet, match="block of scales can't be a fraction"):
            check.bits._judge(answer, seed)


def changed(position, change):
    def answer(absmax, levels, block_size):
        parts = list(quantize(absmax, levels, block_size))
        parts[position] = change(parts[position])
        return tuple(parts)

    return answer


def drops_the_short_block(absmax, levels, block_size):
    codes, largest, offset = quantize(absmax, levels, block_size)
    whole = len(absmax) // block_size
    return codes[: whole * block_size], largest[:whole], offset


def by_a_table(absmax, levels, block_size):
    """Codes are looked up in a table of 65,536 places, and 0/0 has none."""
    offset = absmax.mean()
    blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % block_size)).view(-1, block_size)
    largest = blocks.abs().amax(1)
    place = ((blocks / largest[:, None] + 1) * 32_767.5).round().long().flatten()[: len(absmax)]
    table = torch.bucketize(torch.linspace(-1, 1, 65_536), (levels[1:] + levels[:-1]) / 2).byte()
    return table[place], largest, offset


def guarded(guard, what=slice(0, 1)):
    """A block's scale is changed by ``guard``: by default where the block is divided by it, with slice(0, 2) also where it is returned."""

    def answer(*arguments):
        found = mistaken(quantize, largest=lambda block, raw: guard(block.abs().max()))(*arguments)
        return found[what] + quantize(*arguments)[what.stop :]

    return answer


@pytest.mark.parametrize(
    "answer, words",
    [
        (guarded(lambda largest: largest.clamp(min=1e-6)), "codes, 96 scales of about 1e-6"),
        (guarded(lambda largest: largest.clamp(min=1e-6), slice(0, 2)), "scales of scales, 96 scales of about 1e-6"),
        (guarded(lambda largest: largest + torch.finfo(torch.float32).eps), "codes, 96 scales of about 1e-6"),
        (guarded(lambda largest: largest + 1e-8), "1e-8 is added to what a block is divided by"),
        (guarded(lambda largest: largest.clamp(min=1e-8)), "what a block is divided by has a least value of 1e-8"),
        (guarded(lambda largest: largest.clamp(min=1e-8), slice(0, 2)), "a block's scale has a least value of 1e-8"),
        (guarded(lambda largest: largest.clamp(min=1e-9)), "codes, 40 scales of about 1e-8"),
        (guarded(lambda largest: torch.where(largest == 0, 1, largest), slice(0, 2)), "scales of scales, 20 scales that are all equal"),
        (changed(0, lambda codes: torch.where(codes.sum() == 63 * len(codes), 64, codes)), "each code is an index into levels"),
        (by_a_table, "your code raised (IndexError|RuntimeError)"),
        (guarded(lambda largest: largest + 1e-8, slice(0, 2)), "1e-8 is added to a block's scale"),
        (changed(0, lambda codes: codes.long()), "codes.*uint8"),
        (changed(0, lambda codes: codes.roll(1)), "codes"),
        (changed(1, lambda largest: largest[:, None]), "scales of scales.*shape"),
        (changed(2, lambda offset: offset[None]), "offset.*shape"),
        (changed(2, lambda offset: -offset), "offset"),
        (drops_the_short_block, "shape"),
        (lambda absmax, levels, block_size: quantize(absmax, levels, 64), "blocks of 16.*shape"),
        (lambda absmax, levels, block_size: quantize(absmax.sort().values, levels, block_size), "scales of scales"),
        (mistaken(quantize, offset=lambda a, b: torch.stack([block.mean() for block in a.split(b)]).mean()), "offset"),
        (mistaken(quantize, largest=lambda block, raw: block.abs().mean()), "scales of scales"),
        (lambda absmax, levels, block_size: quantize(absmax, dynamic_codebook(), block_size), "codes"),
    ],
)
def test_sly_scales_are_refused(answer, words):
    with pytest.raises(NotYet, match=words):
        check.scales(answer)


def in_one_piece(mean, largest, shift=0.0):
    """Padded to whole blocks first, then everything at once, as many write it."""

    def answer(absmax, levels, block_size):
        blocks = torch.nn.functional.pad(absmax - shift * absmax.mean(), (0, -len(absmax) % block_size)).view(-1, block_size)
        offset = mean(blocks, absmax)
        blocks = blocks - offset * (1 - shift)
        scale = largest(blocks)
        codes = torch.bucketize(blocks / scale[:, None], (levels[1:] + levels[:-1]) / 2).flatten()[: len(absmax)]
        return codes.byte(), scale, offset

    return answer


def each_block_alone(returned):
    return lambda absmax, levels, block_size: (
        *in_one_piece(lambda blocks, _: blocks.mean(1, keepdim=True), lambda blocks: blocks.abs().amax(1))(absmax, levels, block_size)[:2],
        returned(absmax.split(block_size)),
    )


@pytest.mark.parametrize(
    "answer, words",
    [
        (in_one_piece(lambda blocks, _: blocks.mean(), lambda blocks: blocks.abs().amax(1)), "counted in it, and became −mean"),
        (
            in_one_piece(lambda blocks, _: blocks.mean(1, keepdim=True), lambda blocks: blocks.abs().amax(1)),
            "you took each block's own mean",
        ),
        (each_block_alone(lambda blocks: [block.mean() for block in blocks]), "you took each block's own mean"),
        (in_one_piece(lambda _, absmax: absmax.mean(), lambda blocks: blocks.amax(1), 1.0), "largest .absolute. value: a scale far below"),
        (mistaken(quantize, largest=lambda block, raw: block.max().abs()), "largest .absolute. value: a scale far below"),
        (lambda *arguments: None, "your function returned nothing: is the `return` missing.*return three"),
        (lambda *arguments: quantize(*arguments)[:2], "your function returned 2 values: return three"),
    ],
)
def test_scales_that_many_get_wrong_are_named_every_time(answer, words):
    for seed in range(10):
        with pytest.raises(NotYet, match=words):
            check.scales._judge(answer, seed)


def test_whole_blocks_filled_up_once_the_mean_is_off_pass_every_time():
    right = in_one_piece(lambda _, absmax: absmax.mean(), lambda blocks: blocks.abs().amax(1), 1.0)
    for seed in range(10):
        check.scales._judge(right, seed)


def divides_as_a_library(absmax, levels, block_size):
    """By the inverse, in float64, the nearest by distance."""
    offset = absmax.double().mean().float()
    blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % block_size)).view(-1, block_size)
    largest = blocks.abs().max(1).values
    scaled = (blocks * largest.reciprocal()[:, None]).flatten()[: len(absmax)].double()
    return (scaled[:, None] - levels.double()).abs().argmin(1).byte(), largest, offset


@pytest.mark.parametrize(
    "answer",
    [divides_as_a_library, guarded(lambda largest: largest + 1e-12, slice(0, 2)), guarded(lambda largest: largest.clamp(min=1e-12))],
)
def test_another_order_of_operations_and_a_harmless_epsilon_pass_every_time(answer):
    for seed in range(30):
        check.scales._judge(answer, seed)


def masks(codes_of_weight, codes_of_scales):
    def answer(q):
        n = torch.Size(q.shape).numel()
        scales = q.dynamic[codes_of_scales(q.codes)] * q.absmax.repeat_interleave(q.second_block)[: len(q.codes)] + q.offset
        codes = codes_of_weight(torch.stack([q.packed >> 4, q.packed & 15], 1).flatten()[:n])
        return (q.levels[codes] * scales.repeat_interleave(q.block_size)[:n]).to(q.dtype).view(q.shape)

    return answer


@pytest.mark.parametrize(
    "answer", [masks(torch.clone, torch.clone), masks(torch.clone, torch.Tensor.int), masks(torch.Tensor.bool, torch.Tensor.long)]
)
def test_an_index_that_is_taken_for_a_mask_is_named(answer):
    for seed in range(3):
        with pytest.raises(NotYet, match="torch takes an index of dtype uint8 for a mask"):
            check.restore._judge(answer, seed)
    check.restore(masks(torch.Tensor.int, torch.Tensor.long))


def test_a_block_of_256_written_in_is_named():
    for seed in range(3):
        with pytest.raises(NotYet, match="256 is written in"):
            check.restore._judge(lambda q: dequantize(q._replace(second_block=256)), seed)


def with_one_dtype(q):
    return dequantize(q._replace(dtype=torch.float32))


def with_two_axes(q):
    rows, columns = q.shape
    return dequantize(q).view(rows, columns)


def by_the_nf4_of_others(q):
    """The scales are right, and the function that reads the weight knows its own levels only."""
    scales = q.dynamic[q.codes.int()] * q.absmax.repeat_interleave(q.second_block)[: len(q.codes)] + q.offset
    return dequantize_nf4(NF4Tensor(q.packed, scales, torch.Size(q.shape), q.dtype, q.block_size))


@pytest.mark.parametrize(
    "answer, words",
    [
        (with_one_dtype, "dtype"),
        (with_two_axes, "ValueError: not enough values to unpack"),
        (by_the_nf4_of_others, "NF4's levels by heart"),
        (lambda q: dequantize(q).half() if q.dtype != torch.float32 else dequantize(q), "expected torch.bfloat16, got"),
        (lambda q: dequantize(q._replace(offset=q.offset * 1.01)), "values differ"),
        (lambda q: dequantize(q._replace(levels=q.levels.flip(0))), "values differ"),
        (lambda q: dequantize(q).T, "shape"),
        (lambda q: dequantize(q._replace(absmax=q.absmax.reciprocal())), "values differ"),
        (lambda q: dequantize(q) if q.dtype == torch.float32 else torch.zeros(q.shape, dtype=q.dtype), "values differ"),
        (lambda q: dequantize(q).double(), "float64"),
    ],
)
def test_sly_weights_are_refused(answer, words):
    with pytest.raises(NotYet, match=words):
        check.restore(answer)


@pytest.mark.parametrize(
    "answer",
    [
        lambda budget, second: 64,
        lambda budget, second: smallest_block(budget, second) or False,
        lambda budget, second: smallest_block(budget, second and 256),
        lambda budget, second: smallest_block(budget + 1e-3, second),
        lambda budget, second: 8 if budget < 4 else smallest_block(budget, second),  # a quotient that became negative
        lambda budget, second: None if budget <= 4 else (32 if second is None else 8 + 32 / second) / (budget - 4),
    ],
)
def test_sly_budgets_are_refused(answer):
    for seed in range(5):
        with pytest.raises(NotYet):
            check.budget._judge(answer, seed)
