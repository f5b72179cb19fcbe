"""reference.nf4 against bitsandbytes, bit for bit; its codebook; its errors."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from course import ROOT
from reference.blockwise import mean_absolute_error, relative_rmse
from reference.nf4 import NF4_CODEBOOK, NF4Tensor, dequantize_nf4, normal_float_codebook, quantize_nf4

few = settings(max_examples=40)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
TIES = (NF4_CODEBOOK[1:] + NF4_CODEBOOK[:-1]) / 2


@pytest.fixture(autouse=True, scope="module")
def eager():
    """bitsandbytes compiles its fallback for every new shape; the numbers are the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def bits(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_equals_bitsandbytes(weight, block_size):
    q = quantize_nf4(weight, block_size)
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    assert q.packed.shape == packed.shape and q.packed.dtype == packed.dtype and torch.equal(q.packed, packed)
    assert q.absmax.dtype == state.absmax.dtype and torch.equal(bits(q.absmax), bits(state.absmax))
    assert (q.shape, q.dtype, q.block_size) == (weight.shape, weight.dtype, block_size)
    # flat: bitsandbytes' AVX-512 kernel takes other scales where a row of a matrix ends inside a block
    state.shape = torch.Size([weight.numel()])
    theirs = bnb.dequantize_4bit(packed, state).view(weight.shape)
    ours = dequantize_nf4(q)
    if weight.dtype == torch.bfloat16:  # a CPU's own instruction for rounding to it (AVX512-BF16) makes zeros of subnormal numbers
        ours = ours.masked_fill((ours.abs() < torch.finfo(torch.float32).tiny) & (theirs == 0), 0)
    assert ours.dtype == weight.dtype and torch.equal(ours, theirs)


lengths = st.one_of(st.integers(1, 200), st.sampled_from([4095, 4096, 4097, 8191, 65_536, 65_537, 70_000, 131_105]))


def test_the_lesson_prints_the_codebook():
    lines = (ROOT / "lessons" / "04_nf4.md").read_text(encoding="utf-8").splitlines()
    cells = [cell for line in lines if line.startswith("| level |") for cell in line.strip("|").split("|")[1:]]
    assert [float(cell.replace("−", "-")) for cell in cells] == [round(level, 3) for level in NF4_CODEBOOK.tolist()]


@few
@given(lengths, st.sampled_from(BLOCKS), st.sampled_from(DTYPES), st.integers(0, 999), st.sampled_from([1.0, 1e-6, 1e-39, 1e4]))
@example(4096, 32, torch.bfloat16, 0, 1e-39)
def test_codes_scales_bytes_and_values(n, block_size, dtype, seed, size):
    weight = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    assert_equals_bitsandbytes(weight, block_size)


edges = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-40, 1.2e-38, 1e-38, 6e-8, 65504.0, *TIES.tolist()])


@few
@given(st.lists(st.one_of(edges, st.floats(-1, 1, width=16)), min_size=1, max_size=140), st.sampled_from([32, 64]), st.sampled_from(DTYPES))
def test_zeros_subnormals_and_midpoints(values, block_size, dtype):
    assert_equals_bitsandbytes(torch.tensor(values).to(dtype), block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [32, 31, 64, 47])
def test_next_to_midpoints(n, dtype):
    """On a midpoint up to the last place, where multiplying by the inverse of absmax and dividing by it part."""
    generator = torch.Generator().manual_seed(n)
    for _ in range(50):
        absmax = torch.rand(1, generator=generator) + 0.5
        weight = torch.cat([absmax, TIES * absmax, absmax, -absmax * TIES, TIES.repeat(4) * absmax])[:n].to(dtype)
        assert_equals_bitsandbytes(weight, 32)


def test_a_value_on_a_midpoint_gets_the_lower_code():
    q = quantize_nf4(torch.cat([TIES, torch.ones(1)]))
    codes = torch.stack([q.packed >> 4, q.packed & 15], 1).view(-1)
    assert codes.tolist() == [*range(15), 15]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (64, 128), (3, 50), (50, 3), (5, 7, 6), (2, 3, 4, 5)])
def test_shapes(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_equals_bitsandbytes(weight, 64)
    assert_equals_bitsandbytes(weight.transpose(0, -1), 64)  # not contiguous: row-major order of what is seen
    assert_equals_bitsandbytes(torch.nn.Parameter(weight), 64)


def test_layout():
    assert quantize_nf4(torch.tensor([1.0, -1.0])).packed.tolist() == [[0xF0]]
    assert quantize_nf4(torch.zeros(64)).packed.unique().tolist() == [0x77]
    q = quantize_nf4(torch.ones(65))
    assert q.packed.shape == (33, 1) and q.absmax.shape == (2,) and q.packed[-1].item() == 0xF7


def test_levels_bit_for_bit():
    assert torch.equal(bits(NF4_CODEBOOK), bits(bnb.get_4bit_type("nf4", "cpu")))
    assert torch.equal(normal_float_codebook(), NF4_CODEBOOK)


@pytest.mark.parametrize("width", range(2, 9))
def test_levels_of_every_width(width):
    levels = normal_float_codebook(width)
    assert len(levels) == 2**width and (levels.diff() > 0).all() and levels[0] == -1 and levels[-1] == 1
    assert levels[2 ** (width - 1) - 1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_survive_the_round_trip(dtype):
    weight = (NF4_CODEBOOK.repeat(4) * 2).to(dtype)
    q = quantize_nf4(weight)
    assert torch.equal(dequantize_nf4(q), weight)
    for other in DTYPES:
        assert torch.equal(dequantize_nf4(q, other), (NF4_CODEBOOK.repeat(4) * 2).to(other))  # one rounding, from float32


def test_golden_errors():
    """0.07280 and 0.0920 on N(0, 1), block 64; the band is five standard errors of a million values."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    restored = dequantize_nf4(quantize_nf4(x))
    assert mean_absolute_error(x, restored) == pytest.approx(0.07280, abs=3e-4)
    assert relative_rmse(x, restored) == pytest.approx(0.0920, abs=3e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at, block", [(0, 0), (100, 1), (128, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_refused(bad, at, block, dtype):
    weight = torch.ones(129, dtype=dtype)
    weight[at] = bad
    with pytest.raises(ValueError, match=f"weight holds NaN or infinite values, the first in block {block} "):
        quantize_nf4(weight)


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "weight must be a float32.*got torch.int8", (torch.ones(4, dtype=torch.int8),)),
        (TypeError, "weight must be a float32.*got torch.float64", (torch.ones(4, dtype=torch.float64),)),
        (ValueError, "weight is empty", (torch.ones(0, 4),)),
        (ValueError, "power of two.*got 0", (torch.ones(4), 0)),
        (ValueError, "power of two.*got 65", (torch.ones(4), 65)),
        (ValueError, "at least 2", (torch.ones(4), 1)),
        (TypeError, "block_size must be an integer", (torch.ones(4), "64")),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=message):
        quantize_nf4(*arguments)


@pytest.mark.parametrize("width, error", [(1, ValueError), (9, ValueError), (4.0, TypeError), (True, TypeError)])
def test_no_such_width(width, error):
    with pytest.raises(error, match="bits must be"):
        normal_float_codebook(width)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4096 * 64, 100_001])
def test_cuda_equals_bitsandbytes(n, dtype):
    weight = torch.randn(n, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    q = quantize_nf4(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(q.absmax, state.absmax)
    ours, theirs = (torch.cat([p.view(-1, 1) >> 4, p.view(-1, 1) & 15], 1).view(-1)[:n].long() for p in (q.packed, packed))
    different = ours != theirs
    scaled = weight.float() / q.absmax.repeat_interleave(64)[:n]
    between = TIES.cuda()[torch.minimum(ours, theirs).clamp(max=14)]
    assert (ours - theirs).abs().max() <= 1 and different.float().mean() < 1e-3
    assert ((scaled - between).abs()[different] < 1e-6).all()  # fast division is off by a few last places
    same = NF4Tensor(packed, state.absmax, weight.shape, weight.dtype, 64)
    assert torch.equal(dequantize_nf4(same), bnb.dequantize_4bit(packed, state))
