"""reference.double_quant against bitsandbytes' nested quantization; what it costs and saves; its errors."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.double_quant import QuantizedScales, bits_per_parameter, dequantize_scales, dynamic_codebook, quantize_scales
from reference.nf4 import quantize_nf4

few = settings(max_examples=40)


def restored(codes, state, offset):
    """The scales that bitsandbytes gives back."""
    return bnb.dequantize_blockwise(codes, state) + offset


def assert_equals_bitsandbytes(absmax, block_size=256):
    q = quantize_scales(absmax, block_size)
    codes, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=block_size)
    assert torch.equal(q.codes, codes) and torch.equal(q.absmax, state.absmax)
    assert torch.equal(dequantize_scales(q), restored(codes, state, absmax.mean()))


def test_levels_bit_for_bit():
    levels = dynamic_codebook()
    assert torch.equal(levels.view(torch.int32), bnb.create_dynamic_map().view(torch.int32))
    assert len(levels) == 256 and levels[127] == 0 and (levels < 0).sum() == 127 and levels[-1] == 1


@few
@given(
    st.one_of(st.integers(1, 700), st.sampled_from([64 * 256, 64 * 257, 64 * 1000 + 5, 300_001])),
    st.sampled_from([32, 64, 256]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 999),
    st.sampled_from([1.0, 0.02, 1e-30, 1e-39]),
)
def test_weights_equal_bitsandbytes(n, block_size, dtype, seed, size):
    weight = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    q = quantize_scales(quantize_nf4(weight, block_size).absmax)
    _, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4", compress_statistics=True)
    assert torch.equal(q.codes, state.absmax) and torch.equal(q.absmax, state.state2.absmax) and torch.equal(q.offset, state.offset)
    assert torch.equal(dequantize_scales(q), restored(state.absmax, state.state2, state.offset))


magnitudes = st.sampled_from([1.0, 1e-6, 1e-30, 1e-37, 3e-39, 1e-40, 1e-45, 1e30])


@few
@given(st.integers(1, 1100), st.sampled_from([64, 256, 1024]), st.integers(0, 999), magnitudes, st.sampled_from([0.0, 0.5, 1.0]))
def test_scales_equal_bitsandbytes(n, block_size, seed, size, zeros):
    """Down to subnormal spreads, whose inverse is infinite, and with some or all of the scales zero."""
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.rand(n, generator=generator) * size * (torch.rand(n, generator=generator) >= zeros)
    assert_equals_bitsandbytes(absmax, block_size)
    assert_equals_bitsandbytes(torch.full((n,), size), block_size)


def test_every_cell_of_the_table():
    """Two million scales from uniform to heavy-tailed."""
    generator = torch.Generator().manual_seed(0)
    for power in (1, 3, 8, 20):
        assert_equals_bitsandbytes(torch.rand(500_000, generator=generator) ** power)


def test_constant_scales_come_back_exactly():
    for absmax in (torch.full((300,), 0.5), torch.zeros(3), torch.ones(1)):
        assert torch.equal(dequantize_scales(quantize_scales(absmax)), absmax)


def test_what_it_costs_in_error():
    """0.16 % mean relative error in the scales of N(0, 1)."""
    absmax = quantize_nf4(torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).absmax
    error = ((dequantize_scales(quantize_scales(absmax)) - absmax).abs() / absmax).mean().item()
    assert error == pytest.approx(0.0016, abs=1e-4)


def test_what_it_saves():
    q = quantize_nf4(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    scales = quantize_scales(q.absmax)
    assert bits_per_parameter(q) == 4.5
    assert bits_per_parameter(q, scales) == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 1024**2  # the last is the offset
    odd = quantize_nf4(torch.ones(65))
    assert bits_per_parameter(odd) == 8 * (33 + 2 * 4) / 65


def test_other_blocks():
    absmax = torch.rand(100, generator=torch.Generator().manual_seed(0))
    q = quantize_scales(absmax, 32)
    assert q.absmax.shape == (4,) and q.block_size == 32
    centred = absmax - absmax.mean()
    assert torch.equal(q.absmax, torch.stack([block.abs().max() for block in centred.split(32)]))
    bound = q.absmax.repeat_interleave(32)[:100] * (0.5 * 0.0140625 + 1.6e-5)  # half the widest gap, and half a cell
    assert ((dequantize_scales(q) - absmax).abs() <= bound + 1e-7).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(bad):
    with pytest.raises(ValueError, match="absmax holds NaN or infinite values, the first in block 1 "):
        quantize_scales(torch.tensor([1.0, bad, 2.0]))


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "absmax must be a float32 tensor.*got torch.float16", (torch.ones(4).half(),)),
        (TypeError, "absmax must be a float32 tensor.*got list", ([1.0],)),
        (ValueError, "absmax must be a vector", (torch.ones(4, 1),)),
        (ValueError, "absmax must be a vector", (torch.ones(0),)),
        (ValueError, "power of two.*got 100", (torch.ones(4), 100)),
        (TypeError, "block_size must be an integer", (torch.ones(4), 256.0)),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=message):
        quantize_scales(*arguments)


def test_a_sum_that_overflows():
    with pytest.raises(ValueError, match=r"sum of absmax overflows float32, its largest is 3e\+38"):
        quantize_scales(torch.full((4,), 3e38))


def test_scales_of_another_weight():
    q = quantize_nf4(torch.ones(256))
    with pytest.raises(ValueError, match="scales holds 3 scales, but the weight has 4 blocks"):
        bits_per_parameter(q, quantize_scales(torch.ones(3)))


@pytest.mark.gpu
def test_cuda_equals_bitsandbytes():
    """Offset, scales' scales and dequantized values bit for bit; codes too, except next to a midpoint, where fast division decides."""
    weight = torch.randn(64 * 100_003, generator=torch.Generator().manual_seed(0)).cuda()
    absmax = quantize_nf4(weight).absmax
    q = quantize_scales(absmax)
    _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(q.offset, state.offset) and torch.equal(q.absmax, state.state2.absmax)
    same = QuantizedScales(state.absmax, state.state2.absmax, state.offset, 256)
    assert torch.equal(dequantize_scales(same), restored(state.absmax, state.state2, state.offset))
    ours, theirs = q.codes.long(), state.absmax.long()
    different = ours != theirs
    assert (ours - theirs).abs().max() <= 1 and different.float().mean() < 1e-4
    levels = dynamic_codebook().cuda().double()
    lower = torch.minimum(ours, theirs)[different]
    between = (levels[lower] + levels[lower + 1]) / 2
    scaled = (absmax - q.offset).double() / q.absmax.double().repeat_interleave(256)[: len(absmax)]
    assert ((scaled[different] - between).abs() <= 1e-6 * between.abs()).all()  # a few last places of float32


@pytest.mark.gpu
def test_cuda_and_zero_scales():
    absmax = torch.zeros(300, device="cuda")
    assert torch.equal(dequantize_scales(quantize_scales(absmax)), absmax)
    assert quantize_scales(torch.rand(300, device="cuda")).codes.device.type == "cuda"
