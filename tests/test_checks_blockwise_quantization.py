"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused."""

import math

import numpy as np
import pytest
import torch

from course.checking import NotYet
from course.checks import blockwise_quantization as check
from course.checks.blockwise_quantization.absmax import absmax_int8
from course.checks.blockwise_quantization.affine import affine_uint8
from course.checks.blockwise_quantization.blocks import quantize_blocks
from course.checks.blockwise_quantization.outliers import keep_outliers
from course.checks.blockwise_quantization.rows import quantize_rows
from reference.blockwise import dequantize_blockwise, int_codebook, quantize_blockwise


def absmax_by_codebook(x):
    q = quantize_blockwise(x, int_codebook(8), 1 << 16)
    return (q.codes.int() - 127).to(torch.int8), q.absmax.clamp(min=1e-30) / 127


def absmax_as_a_number(x):
    scale = x.abs().max().item() / 127 or 1.0
    return torch.floor(x.double() / scale + 0.5).to(torch.int8), scale


def absmax_in_numpy(x):
    values = x.float().numpy()
    scale = np.abs(values).max() / np.float32(127) or np.float32(1)
    return torch.from_numpy(np.rint(values / scale).astype(np.int8)), scale


def affine_of_int32(x, low, high):
    scale = (max(high, 0) - min(low, 0)) / 255
    zero_point = torch.tensor(-min(low, 0) / scale).round()
    codes = (x.float() / scale).round().int() + zero_point.int()
    return codes.clamp(0, 255).byte(), torch.tensor(scale), zero_point


def affine_by_library(x, low, high):
    low, high = min(low, 0.0), max(high, 0.0)
    scale, zero_point = (high - low) / 255, round(-low * 255 / (high - low))
    return torch.quantize_per_tensor(x.float(), scale, zero_point, torch.quint8).int_repr(), scale, zero_point


def affine_in_numpy(x, low, high):
    scale = np.float64(max(high, 0) - min(low, 0)) / 255
    zero_point = np.rint(-min(low, 0) / scale)
    codes = np.clip(np.rint(x.float().numpy() / scale) + zero_point, 0, 255)
    return torch.from_numpy(codes.astype(np.uint8)), np.float32(scale), np.int64(zero_point)


def rows_in_numpy(weight, bits):
    largest, values = (1 << (bits - 1)) - 1, weight.float().numpy()
    scales = np.abs(values).max(axis=1, keepdims=True) / np.float32(largest)
    scales[scales == 0] = 1
    return torch.from_numpy(np.rint(values / scales).astype(np.int8)), torch.from_numpy(scales)


def blocks_with(divisor=lambda top: top.clamp(min=1e-38), returned=lambda top: top, zeros=None):
    def answer(x, codebook, block_size):
        codes, absmax = [], []
        for block in x.float().flatten().split(block_size):
            top = block.abs().max()
            absmax.append(returned(top))
            near = (block[:, None] / divisor(top) - codebook).abs().argmin(1)
            codes.append(torch.full_like(near, zeros(codebook)) if zeros and top == 0 else near)
        return torch.cat(codes).byte().view(x.shape), torch.stack(absmax)

    return answer


def blocks_by_scaled_levels(x, codebook, block_size):
    """The levels are multiplied, no value is divided."""
    codes, absmax = [], []
    for block in x.float().flatten().split(block_size):
        absmax.append(block.abs().max())
        near = (block[:, None] - codebook * absmax[-1]).abs()
        codes.append(near.argmin(1) if absmax[-1] > 0 else torch.full((len(block),), (codebook == 0).nonzero()[0].item()))
    return torch.cat(codes).byte().view(x.shape), torch.stack(absmax)


def kept_as_a_second_tensor(x, codebook, block_size, k):
    flat = x.flatten()
    where = flat.abs().topk(k).indices
    sparse = torch.zeros_like(flat).index_copy(0, where, flat[where])
    q = quantize_blockwise((flat - sparse).view(x.shape), codebook, block_size)
    return dequantize_blockwise(q) + sparse.view(x.shape), q.bits_per_value + k * (torch.finfo(x.dtype).bits + 32) / x.numel()


def rows_by_blocks(weight, bits):
    """A row is a block, padded with zeros to a power of two."""
    size = 1 << (weight.shape[1] - 1).bit_length()
    padded = torch.nn.functional.pad(weight, (0, size - weight.shape[1]))
    q = quantize_blockwise(padded, int_codebook(bits), size)
    largest = 2 ** (bits - 1) - 1
    return (q.codes[:, : weight.shape[1]].int() - largest).to(torch.int8), q.absmax.clamp(min=1e-30)[:, None] / largest


def blocks_by_padding(x, codebook, block_size):
    """Zeros at the end don't change a largest absolute value."""
    flat = x.float().flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    absmax = padded.abs().amax(1)
    share = padded / torch.where(absmax > 0, absmax, 1)[:, None]
    codes = (share[..., None] - codebook).abs().argmin(-1).flatten()[: len(flat)]
    return codes.byte().view(x.shape), absmax


def budget_from_above(n, code_bits, scale_bits, budget):
    block, found = 1 << n.bit_length(), None
    while block and n * code_bits + -(-n // block) * scale_bits <= budget * n:
        found, block = block, block // 2
    return found


def kept_in_a_loop(x, codebook, block_size, k):
    rest, restored = x.clone(), None
    where = []
    for _ in range(k):
        where.append(rest.abs().argmax().item())
        rest.view(-1)[where[-1]] = 0
    q = quantize_blockwise(rest, codebook, block_size)
    restored = dequantize_blockwise(q)
    for at in where:
        restored.view(-1)[at] = x.flatten()[at]
    return restored, torch.tensor(q.bits_per_value + k * (x.element_size() * 8 + 32) / x.numel())


@pytest.mark.parametrize(
    "judge, answer",
    [
        (check.absmax, absmax_by_codebook),
        (check.absmax, absmax_as_a_number),
        (check.absmax, absmax_in_numpy),
        (check.affine, affine_of_int32),
        (check.affine, affine_by_library),
        (check.affine, affine_in_numpy),
        (check.rows, rows_by_blocks),
        (check.rows, rows_in_numpy),
        (check.blocks, blocks_by_padding),
        (check.blocks, blocks_with()),
        (check.blocks, blocks_with(returned=lambda top: top.clamp(min=1e-38))),  # no one can tell it from 0
        (check.blocks, blocks_by_scaled_levels),
        (check.budget, budget_from_above),
        (check.outliers, kept_in_a_loop),
        (check.outliers, kept_as_a_second_tensor),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_right_answers_pass(judge, answer):
    for seed in range(20):
        judge._judge(answer, seed)


def wrong_absmax(change):
    def answer(x):
        codes, scale = absmax_int8(x)
        return change(codes, scale, x)

    return answer


def scale_of_each_row(x):
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x.float() / scale).round().to(torch.int8), scale


def affine_with_a_zero_point(rounded):
    """Right but for how the zero point is rounded: with half of all ranges this is no mistake."""

    def answer(x, low, high):
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        zero_point = rounded(-low / scale)
        return ((x.float() / scale).round() + zero_point).clamp(0, 255).to(torch.uint8), scale, zero_point

    return answer


def affine_divided_in_16_bits(x, low, high):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    return ((x / scale).round() + zero_point).clamp(0, 255).to(torch.uint8), scale, zero_point


def absmax_of_a_view(x):
    codes, scale = absmax_int8(x.view(-1))
    return codes.view(x.shape), scale


def rows_with_a_least_scale(weight, bits, least=1e-6):
    scales = (weight.float().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=least)
    return (weight.float() / scales).round().to(torch.int8), scales


def affine_with_a_least_scale(x, low, high):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-5)
    zero_point = round(-low / scale)
    return ((x.float() / scale).round() + zero_point).clamp(0, 255).to(torch.uint8), scale, zero_point


def blocks_in_the_order_of_memory(x, codebook, block_size):
    codes, absmax = quantize_blocks(x.as_strided((x.numel(),), (1,)), codebook, block_size)
    return codes.as_strided(x.shape, x.stride()), absmax


def blocks_with_codes_up_to(most):
    def answer(x, codebook, block_size):
        codes, absmax = quantize_blocks(x, codebook, block_size)
        return codes.clamp(max=most), absmax

    return answer


def shares_rounded_to_16_bits(x, codebook, block_size):
    codes, absmax = [], []
    for block in x.flatten().split(block_size):
        absmax.append(block.abs().max().float())
        share = (block.float() / absmax[-1].clamp(min=1e-38)).to(x.dtype)
        codes.append((share[:, None] - codebook).abs().argmin(1))
    return torch.cat(codes).byte().view(x.shape), torch.stack(absmax)


def blocks_by_midpoints_unguarded(x, codebook, block_size):
    """NaN is above every midpoint, so a block of zeros gets the code of the highest level."""
    levels, order = codebook.sort()
    codes, absmax = [], []
    for block in x.float().flatten().split(block_size):
        absmax.append(block.abs().max())
        codes.append(order[torch.bucketize(block / absmax[-1], (levels[:-1] + levels[1:]) / 2)])
    return torch.cat(codes).byte().view(x.shape), torch.stack(absmax)


def one_block_more(n, code_bits, scale_bits, budget):
    sizes = [2**power for power in range(n.bit_length() + 1)]
    return next((size for size in sizes if n * code_bits + (n // size + 1) * scale_bits <= budget * n), None)


def kept_by_a_mask(count_all):
    def answer(x, codebook, block_size, k):
        magnitudes = x.abs()
        mask = magnitudes >= magnitudes.flatten().topk(k).values[-1] if k else torch.zeros_like(x, dtype=torch.bool)
        q = quantize_blockwise(torch.where(mask, 0, x), codebook, block_size)
        kept = mask.sum().item() if count_all else k
        return torch.where(mask, x, dequantize_blockwise(q)), q.bits_per_value + kept * (8 * x.element_size() + 32) / x.numel()

    return answer


def budget_up_to(longest):
    def answer(n, code_bits, scale_bits, budget):
        sizes = [2**power for power in range(longest.bit_length())]
        return next((size for size in sizes if n * code_bits + math.ceil(n / size) * scale_bits <= budget * n), None)

    return answer


def kept_in_float16(x, codebook, block_size, k):
    restored, bits = keep_outliers(x, codebook, block_size, k)
    at = x.flatten().abs().topk(k).indices
    return restored.flatten().index_copy(0, at, x.flatten()[at].half().to(x.dtype)).view(x.shape), bits


def right_for_one_shape(weight, bits):
    return quantize_rows(weight, bits) if weight.shape == (8, 8) else (weight.to(torch.int8) * 0, torch.ones(len(weight), 1))


@pytest.mark.parametrize("rounded", [int, math.floor, math.ceil], ids=lambda rounded: rounded.__name__)
def test_a_zero_point_that_is_not_rounded_is_refused_for_every_seed(rounded):
    for seed in range(40):
        with pytest.raises(NotYet):
            check.affine._judge(affine_with_a_zero_point(rounded), seed)


def test_sixteen_bits_are_told_from_float32_for_every_seed():
    """What rounds the step, and what rounds the quotient: neither passes, and neither is taken for the other."""
    mistakes = {message: check.absmax.wrong(message) for message in check.absmax.misconceptions if "16-bit" in message}
    assert len(mistakes) == 2
    for seed in (1030, 1046, 1066, *range(150)):
        for message, wrong in mistakes.items():
            with pytest.raises(NotYet) as caught:
                check.absmax._judge(wrong, seed)
            assert str(caught.value) == message, seed


def no_guard(function):
    """With the guard against zeros, the one mistake of ``function`` would be its only one; learners make two."""

    def answer(x, *rest):
        codes, scale = function(x, *rest)
        return codes, scale * float("nan") if not x.any() else scale

    return answer


@pytest.mark.parametrize(
    "judge, answer, words",
    [
        (check.absmax, wrong_absmax(lambda codes, scale, x: codes), "a pair"),
        (check.absmax, lambda x: None, "returned nothing: is the `return` missing.* a pair"),
        (check.absmax, wrong_absmax(lambda codes, scale, x: (scale, codes)), "codes of a float32 matrix"),
        (check.absmax, wrong_absmax(lambda codes, scale, x: (codes, float(scale) * 1.01)), "scale of a float32 matrix"),
        (check.absmax, wrong_absmax(lambda codes, scale, x: (codes.flatten(), scale)), "expected shape"),
        (check.absmax, wrong_absmax(lambda codes, scale, x: (codes * 0, scale)), "values differ"),
        (check.absmax, wrong_absmax(lambda codes, scale, x: (codes, scale if x.any() else 0.0)), "0 / 0 is NaN"),
        (check.absmax, scale_of_each_row, "codes of"),
        (check.absmax, absmax_of_a_view, "Use .reshape"),
        (check.absmax, wrong_absmax(lambda codes, scale, x: (codes, scale.clamp(min=1e-10))), "gives values of about 1e-14 back"),
        (check.affine, affine_with_a_least_scale, "a narrow range is lost"),
        (check.rows, rows_with_a_least_scale, "a row of tiny values is lost"),
        (check.rows, lambda w, bits: rows_with_a_least_scale(w, bits, 1e-12), "a row of tiny values is lost"),
        (check.blocks, blocks_with(divisor=lambda top: top + 1e-8), "a block of tiny values is lost"),
        (check.blocks, blocks_with(divisor=lambda top: top.clamp(min=1e-6)), "a block of tiny values is lost"),
        (check.blocks, blocks_with(returned=lambda top: top.clamp(min=1e-6)), "absmax of a block of values of about 1e-14"),
        (check.blocks, blocks_with(returned=lambda top: torch.where(top == 0, 1, top)), "the absmax of a block of zeros is 0"),
        (check.blocks, blocks_with(zeros=lambda codebook: 7), "codes of a block of zeros"),
        (check.blocks, blocks_with(zeros=lambda codebook: len(codebook) // 2), "codes of a block of zeros"),
        (check.blocks, blocks_with(zeros=lambda codebook: 0), "codes of a block of zeros do not stand for 0"),
        (check.blocks, blocks_by_midpoints_unguarded, "0 / 0 is NaN"),
        (check.blocks, blocks_in_the_order_of_memory, "a transposed bfloat16 tensor"),
        (check.blocks, blocks_with_codes_up_to(31), "256 levels"),
        (check.blocks, blocks_with_codes_up_to(127), "256 levels"),
        (check.blocks, shares_rounded_to_16_bits, "own 16-bit dtype"),
        (check.budget, budget_up_to(4096), "ended too early"),
        (check.budget, one_block_more, "a block too many"),
        (check.outliers, kept_by_a_mask(count_all=True), "keep k, whichever"),
        (check.outliers, kept_by_a_mask(count_all=False), "the number that your bits count"),
        (check.budget, budget_up_to(2**19), "ended too early"),
        (check.outliers, kept_in_float16, "restored, float32"),
        (check.affine, lambda x, low, high: (x.byte(), 1.0, 0), "codes of"),
        (check.affine, lambda x, low, high: affine_uint8(x, low, high)[:2], "zero_point"),
        (check.affine, lambda x, low, high: (*affine_uint8(x, low, high)[:2], 128), "zero_point of"),
        (check.affine, affine_divided_in_16_bits, "own 16-bit dtype"),
        (check.affine, affine_with_a_zero_point(math.floor), "lost its fraction"),
        (check.absmax, lambda x: (x / absmax_int8(x)[1], absmax_int8(x)[1]), "expected torch.int8|still floating"),
        (check.rows, lambda w, bits: quantize_rows(w, 4), "scales of"),
        (check.rows, right_for_one_shape, "scales of a 5 × 13"),
        (check.rows, lambda w, bits: (w.to(torch.int8), torch.ones(len(w), 1)), "scales of"),
        (check.rows, lambda w, bits: quantize_rows(w.T, bits), "belong to the columns|scales of"),
        (check.rows, lambda w, bits: quantize_rows(w, 8), "127 whatever"),
        (check.blocks, lambda x, codebook, size: quantize_blocks(x, codebook, 16), "absmax, a short last block"),
        (check.blocks, lambda x, codebook, size: quantize_blocks(x, int_codebook(4), size), "the levels that the codes stand for"),
        (check.blocks, lambda x, codebook, size: quantize_blocks(x.T.contiguous().T, codebook, size)[0], "a pair"),
        (check.budget, lambda n, code_bits, scale_bits, budget: 64, "n ="),
        (
            check.budget,
            lambda n, code_bits, scale_bits, budget: 2 ** math.ceil(math.log2(scale_bits / max(budget - code_bits, 1e-9))),
            "n =",
        ),
        (check.outliers, lambda x, codebook, size, k: (x, 4.0), "restored"),
        (check.outliers, lambda x, codebook, size, k: keep_outliers(x, codebook, size, 5), "restored|bits"),
        (check.outliers, lambda x, codebook, size, k: keep_outliers(x, codebook, 32, k), "bits|restored"),
    ],
)
def test_sly_answers_are_refused(judge, answer, words):
    for seed in range(5):
        with pytest.raises(NotYet, match=words):
            judge._judge(answer, seed)


def test_a_second_mistake_about_zeros_does_not_hide_the_first():
    judge = check.absmax
    for message in judge.misconceptions:
        if "zeros" not in message:
            with pytest.raises(NotYet) as caught:
                judge._judge(no_guard(judge.wrong(message)), 0)
            if "still floating-point" not in message:  # its values come back right, so zeros are looked at
                assert str(caught.value) == message


def test_inputs_are_clear_of_ties():
    """No value of the inputs is so near to the border of two codes that a last place decides."""
    for seed in range(20):
        seen = []

        def spy(x, seen=seen):
            seen.append(x)
            return absmax_int8(x)

        check.absmax._run(spy, seed)
        for x in seen[:-1]:
            share = x.double() / x.double().abs().max() * 127
            assert ((share - share.floor() - 0.5).abs() > 0.02).all()
