"""reference.blockwise against the definition and bitsandbytes; its error measures; its errors."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.blockwise import (
    dequantize_blockwise,
    fp4_codebook,
    int_codebook,
    mean_absolute_error,
    quantize_blockwise,
    relative_rmse,
    signal_to_noise,
)

few = settings(max_examples=25)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def by_definition(x, codebook, block_size):
    """Codes, absmax and restored values, one block at a time and by distance."""
    codes, scales, restored = [], [], []
    for block in x.float().flatten().split(block_size):
        absmax = block.abs().max()
        distance = (block[:, None].double() / absmax.double() - codebook.double()).abs()  # (block, levels)
        codes.append(distance.argmin(1))
        scales.append(absmax)
        restored.append(codebook[codes[-1]] * absmax)
    return torch.cat(codes), torch.stack(scales), torch.cat(restored).to(x.dtype).view(x.shape)


@few
@given(st.integers(1, 300), st.sampled_from([1, 2, 16, 64, 512]), st.integers(2, 40), dtypes, st.integers(0, 999))
def test_any_codebook_sorted_or_not(n, block_size, levels, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator).to(dtype)
    codebook = torch.rand(levels, generator=generator) * 2 - 1
    q = quantize_blockwise(x, codebook, block_size)
    codes, absmax, restored = by_definition(x, codebook, block_size)
    assert torch.equal(q.codes.long(), codes)
    assert q.absmax.dtype == torch.float32 and torch.equal(q.absmax, absmax)
    assert torch.equal(dequantize_blockwise(q), restored) and dequantize_blockwise(q).dtype == dtype
    assert len(absmax) == math.ceil(n / block_size)


@few
@given(st.integers(1, 400), st.sampled_from([32, 64, 256]), dtypes, st.integers(0, 999), st.sampled_from([0.0, 1e-42, 1.0, 1e4]))
def test_fp4_equals_bitsandbytes(n, block_size, dtype, seed, size):
    x = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    q = quantize_blockwise(x, fp4_codebook(), block_size)
    packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type="fp4")
    theirs = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:n]
    assert torch.equal(q.codes, theirs) and torch.equal(q.absmax, state.absmax)


@pytest.mark.parametrize("n", [32, 31])  # whole blocks are multiplied by the inverse of absmax, a short one is divided
def test_fp4_equals_bitsandbytes_next_to_midpoints(n):
    generator = torch.Generator().manual_seed(0)
    levels = fp4_codebook().unique()
    between = ((levels[1:] + levels[:-1]) / 2).repeat(3)[: n - 1]  # (n - 1,)
    for _ in range(200):
        absmax = torch.rand(1, generator=generator) + 0.5
        x = torch.cat([absmax, between * absmax])  # on a midpoint up to the last place
        q = quantize_blockwise(x, fp4_codebook(), 32)
        packed, _ = bnb.quantize_4bit(x, blocksize=32, quant_type="fp4")
        assert torch.equal(q.codes, torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:n])


def test_fp4_levels_bit_for_bit():
    assert torch.equal(fp4_codebook().view(torch.int32), bnb.get_4bit_type("fp4", "cpu").view(torch.int32))  # no −0


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers(bits):
    codebook, largest = int_codebook(bits), 2 ** (bits - 1) - 1
    assert len(codebook) == 2**bits - 1 and codebook[largest] == 0 and codebook.dtype == torch.float32
    assert torch.equal(codebook, -codebook.flip(0)) and codebook[-1] == 1
    x = torch.arange(-largest, largest + 1).float()  # already integers of that range: nothing is lost
    assert torch.allclose(dequantize_blockwise(quantize_blockwise(x, codebook, 256)), x, rtol=2e-7, atol=0)


def test_a_value_between_two_levels_gets_the_lower():
    levels = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5])
    x = torch.tensor([1.0, 0.75, 0.25, -0.25, -0.75])  # absmax 1, then every midpoint
    q = quantize_blockwise(x, levels, 8)
    assert levels[q.codes.long()].tolist() == [1.0, 0.5, 0.0, -0.5, -1.0]


def test_blocks_run_over_row_ends_and_the_last_is_short():
    x = torch.tensor([[1.0, 2.0, 3.0], [-8.0, 5.0, -6.0], [7.0, 4.0, 9.0]])
    q = quantize_blockwise(x.T, int_codebook(8), 4)  # row-major order of the transposed view
    assert q.absmax.tolist() == [8.0, 6.0, 9.0] and q.codes.shape == (3, 3)
    assert q.absmax.tolist() == [b.abs().max().item() for b in x.T.reshape(-1).split(4)]


def test_one_outlier_spoils_one_block():
    x = torch.randn(256, generator=torch.Generator().manual_seed(0))
    x[70] = 100.0
    errors = (dequantize_blockwise(quantize_blockwise(x, int_codebook(4), 64)) - x).abs().view(4, 64).mean(1)
    assert errors[1] > 5 * errors[[0, 2, 3]].max()
    whole = mean_absolute_error(x, dequantize_blockwise(quantize_blockwise(x, int_codebook(4), 256)))
    assert whole > 2 * errors.mean()


def test_golden_error_of_fp4():
    """0.09655 and 0.1220 on N(0, 1), block 64; the band is five standard errors of a million values."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    restored = dequantize_blockwise(quantize_blockwise(x, fp4_codebook(), 64))
    assert mean_absolute_error(x, restored) == pytest.approx(0.09655, abs=4e-4)
    assert relative_rmse(x, restored) == pytest.approx(0.1220, abs=4e-4)


def test_error_measures():
    x, restored = torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.5])
    assert mean_absolute_error(x, restored) == 0.25
    assert relative_rmse(x, restored) == pytest.approx(0.1)
    assert signal_to_noise(x, restored) == pytest.approx(20)
    assert signal_to_noise(x, x) == math.inf
    with pytest.raises(ValueError, match="all zeros"):
        relative_rmse(x * 0, restored)
    with pytest.raises(ValueError, match="one shape"):
        mean_absolute_error(x, restored[:1])


def test_bits_are_counted_from_the_tensors():
    assert quantize_blockwise(torch.ones(128), fp4_codebook(), 64).bits_per_value == 4.5
    assert quantize_blockwise(torch.ones(65), fp4_codebook(), 64).bits_per_value == 4 + 64 / 65
    assert quantize_blockwise(torch.ones(128), int_codebook(8), 128).bits_per_value == 8.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at, block", [(5, 0), (64, 1), (129, 2)])
def test_nan_and_infinity_are_refused(bad, at, block):
    x = torch.ones(130)
    x[at] = bad
    with pytest.raises(ValueError, match=f"x holds NaN or infinite values, the first in block {block} "):
        quantize_blockwise(x, fp4_codebook(), 64)


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "x must be a float32", (torch.ones(4).int(), fp4_codebook(), 4)),
        (TypeError, "x must be a float32.*got list", ([1.0], fp4_codebook(), 4)),
        (ValueError, "x is empty", (torch.ones(0), fp4_codebook(), 4)),
        (ValueError, "positive power of two.*got 0", (torch.ones(4), fp4_codebook(), 0)),
        (ValueError, "positive power of two.*got 48", (torch.ones(4), fp4_codebook(), 48)),
        (TypeError, "block_size must be an integer", (torch.ones(4), fp4_codebook(), 64.0)),
        (TypeError, "codebook must be a tensor", (torch.ones(4), [0.0, 1.0], 4)),
        (ValueError, "2 to 256 levels", (torch.ones(4), torch.ones(257), 4)),
        (ValueError, "2 to 256 levels", (torch.ones(4), torch.ones(2, 2), 4)),
        (ValueError, "codebook holds NaN", (torch.ones(4), torch.tensor([0.0, math.nan]), 4)),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=message):
        quantize_blockwise(*arguments)


@pytest.mark.parametrize("bits, error", [(1, ValueError), (9, ValueError), (4.0, TypeError), (True, TypeError)])
def test_integers_of_no_such_width(bits, error):
    with pytest.raises(error, match="bits must be"):
        int_codebook(bits)


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives():
    x = torch.randn(1000, 77, generator=torch.Generator().manual_seed(0))
    cpu, cuda = (quantize_blockwise(x.to(where), fp4_codebook(), 64) for where in ("cpu", "cuda"))
    assert torch.equal(cuda.absmax.cpu(), cpu.absmax)
    assert (cuda.codes.cpu() != cpu.codes).float().mean() < 1e-4  # next to a midpoint the last place of the scaled value decides
    same = type(cuda)(cpu.codes.cuda(), cuda.absmax, cuda.codebook, 64, x.dtype)
    assert torch.equal(dequantize_blockwise(same).cpu(), dequantize_blockwise(cpu))
