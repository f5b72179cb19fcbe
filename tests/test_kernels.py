"""The Triton kernels give what the torch modules give: on CUDA, or without it in Triton's interpreter, on small shapes.

The interpreter has two faults of its own: it cuts bfloat16 off instead of rounding, and multiplies matrices of bfloat16 as if they were
integers. So on a CPU bfloat16 is compared within one unit in the last place, and products are tried in float16.
"""

import pytest
import torch

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.reading_nf4 import read  # noqa: E402
from reference import nf4 as plain  # noqa: E402
from reference.blockwise import midpoints  # noqa: E402
from reference.double_quant import QuantizedScales, double_quantize  # noqa: E402
from reference.kernels import nf4 as kernels  # noqa: E402
from reference.nf4 import NF4_CODEBOOK, NF4Tensor  # noqa: E402
from reference.qlora import NF4Linear  # noqa: E402
from reference.qlora.product import parts, use_kernels  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = torch.bfloat16 if CUDA else torch.float16
EPSILON = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
few = settings(max_examples=40 if CUDA else 15)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 300))


def poison():
    """What is allocated next holds NaN, so that a value nobody wrote is found."""
    if CUDA:
        del [torch.full((1 << k,), torch.nan, device=DEVICE) for k in range(8, 24)][:]


def draw(shape, dtype, scale=1.0, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(DEVICE, dtype)


def with_float32_scales(q: NF4Tensor) -> NF4Tensor:
    return NF4Tensor(q.packed, q.absmax, q.shape, q.dtype, q.block_size)


@few
@given(
    shapes, st.sampled_from((2, 32, 64, 256, 4096)), st.sampled_from(DTYPES), st.sampled_from((1e-30, 0.02, 1.0, 1e4)), st.integers(0, 99)
)
def test_quantize_equals_torch(shape, block_size, dtype, scale, seed):
    weight = draw(shape, dtype, scale, seed)
    poison()
    ours, torchs = kernels.quantize_nf4(weight, block_size), plain.quantize_nf4(weight, block_size)
    assert torch.equal(ours.packed, torchs.packed) and torch.equal(ours.absmax, torchs.absmax)
    assert (ours.shape, ours.dtype, ours.block_size) == (torchs.shape, torchs.dtype, torchs.block_size)


def test_midpoints_and_their_neighbours():
    """Every border of a code and of a cell, and the floats beside it."""
    borders = torch.cat([midpoints(NF4_CODEBOOK), (torch.arange(33) - 16.5) / 15, torch.tensor([0.0])]).clamp(-1, 1)
    up, down = torch.full_like(borders, 2), torch.full_like(borders, -2)
    values = torch.cat([borders, borders.nextafter(up), borders.nextafter(down)]).clamp(-1, 1)
    blocks = torch.cat([values, values.new_zeros(-len(values) % 63)]).view(-1, 63)
    blocks = torch.cat([torch.ones(len(blocks), 1), blocks], 1).to(DEVICE)  # absmax 1: values are their own share of it
    assert torch.equal(kernels.quantize_nf4(blocks).packed, plain.quantize_nf4(blocks).packed)


@pytest.mark.parametrize("block", [torch.zeros(64), torch.full((64,), 1e-41), torch.full((64,), -3e38), torch.linspace(-1e-40, 1e-39, 64)])
def test_zeros_subnormals_and_the_largest(block):
    weight = torch.cat([torch.ones(64), block, torch.ones(3)]).to(DEVICE)
    ours, torchs = kernels.quantize_nf4(weight), plain.quantize_nf4(weight)
    assert torch.equal(ours.packed, torchs.packed) and torch.equal(ours.absmax, torchs.absmax)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [70, 133])
def test_what_is_not_finite_is_refused_with_its_block(bad, where):
    weight = draw(134, HALF)
    weight[where] = bad
    with pytest.raises(ValueError, match=f"weight holds NaN or infinite values, the first in block {where // 64}"):
        kernels.quantize_nf4(weight)
    if where == 70:
        unchecked = kernels.quantize_nf4(weight, check=False).absmax
        assert not torch.isfinite(unchecked[1]) and torch.isfinite(unchecked[[0, 2]]).all()


def test_bad_arguments_draw_the_messages_of_the_torch_module():
    for arguments in ((torch.ones(4, dtype=torch.int32),), (torch.ones(0),), (torch.ones(4), 48), (torch.ones(4), 1)):
        with pytest.raises((TypeError, ValueError)) as theirs:
            plain.quantize_nf4(*arguments)
        with pytest.raises(type(theirs.value)) as ours:
            kernels.quantize_nf4(*arguments)
        assert str(ours.value) == str(theirs.value)


@few
@given(shapes, st.sampled_from((2, 32, 64, 256)), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 99))
def test_dequantize_equals_torch(shape, block_size, dtype, double_quant, seed):
    q = plain.quantize_nf4(draw(shape, torch.float32, 0.02, seed), block_size)
    q = double_quantize(q) if double_quant else q
    poison()
    ours, torchs = kernels.dequantize_nf4(q, dtype), plain.dequantize_nf4(with_float32_scales(q), dtype)
    assert torch.equal(torchs, plain.dequantize_nf4(q, dtype))
    assert ours.dtype == dtype and ours.shape == shape
    if dtype == torch.bfloat16 and not CUDA:
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=0)
    else:
        assert torch.equal(ours, torchs)


def test_every_scale_finds_its_own_scale():
    """More than two blocks of scales, each of another size."""
    weight = draw((80, 512), torch.float32) * torch.arange(1, 81, device=DEVICE)[:, None]
    q = double_quantize(plain.quantize_nf4(weight, 64))
    assert len(q.scales.absmax) == 3
    assert torch.equal(kernels.dequantize_nf4(q), plain.dequantize_nf4(q))
    x = draw((1, 512), HALF)
    expected = x.double() @ plain.dequantize_nf4(q).double().T
    assert (kernels.linear_nf4(x, q) - expected).norm() <= EPSILON[HALF] * expected.norm()


@few
@given(
    st.sampled_from((1, 2, 5, 16, 17, 64, 65, 128, 129)),
    st.integers(1, 70),
    st.sampled_from(((64, 64), (192, 64), (1280, 64), (384, 128), (96, 32), (100, 64), (512, 256))),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_linear_is_the_product_with_the_dequantized_weight(rows, out_features, sizes, with_bias, double_quant, seed):
    """Within the rounding of the output, and of the weight where it meets the tensor cores in 16 bits."""
    in_features, block_size = sizes
    x = draw((rows, in_features), HALF, seed=seed)
    q = plain.quantize_nf4(draw((out_features, in_features), HALF, 0.1, seed + 1), block_size)
    bias = draw(out_features, HALF, seed=seed + 2) if with_bias else None
    q = double_quantize(q) if double_quant else q
    poison()
    y = kernels.linear_nf4(x.view(1, rows, in_features), q, bias)
    assert y.shape == (1, rows, out_features) and y.dtype == HALF
    weight = plain.dequantize_nf4(q, torch.float32).double()
    expected = x.double() @ weight.T + (bias.double() if with_bias else 0)
    error = y[0].double() - expected
    # Half a unit in the last place of the output, and of every weight where it meets the tensor cores in 16 bits; those add up as √Σ².
    terms = (x.double() ** 2 @ (weight**2).T).sqrt()
    assert error.norm() <= EPSILON[HALF] / 2 * (expected.norm() + 3 * terms.norm())
    assert (error.abs() <= EPSILON[HALF] * (expected.abs() + x.double().abs() @ weight.abs().T)).all()


def test_linear_in_float32_and_without_rows():
    q = plain.quantize_nf4(draw((24, 128), torch.float32), 64)
    x = draw((3, 128), torch.float32)
    assert torch.equal(kernels.linear_nf4(x, q), nn.functional.linear(x, plain.dequantize_nf4(q)))
    assert kernels.linear_nf4(x[:0].to(HALF), q).shape == (0, 24)


def test_linear_refuses_another_width():
    with pytest.raises(ValueError, match=r"x has shape \(3, 64\), but the weight takes 128 features"):
        kernels.linear_nf4(draw((3, 64), HALF), plain.quantize_nf4(draw((24, 128), HALF)))


@pytest.fixture
def without_kernels():
    use_kernels(False)
    yield
    use_kernels(True)


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [False, True])
def test_cuda_layer_uses_them_and_gives_the_same(double_quant, request):
    weight = draw((688, 512), torch.bfloat16, 0.05)
    linear = nn.Linear(512, 688, device=DEVICE, dtype=torch.bfloat16)
    linear.weight.data = weight
    layer = NF4Linear.from_linear(linear, double_quant=double_quant)
    found = []
    for rows in (1, 16, 300):
        x = draw((rows, 512), torch.bfloat16, seed=rows).requires_grad_()
        y = layer(x)
        y.backward(draw((rows, 688), torch.bfloat16, seed=rows + 1))
        found.append((x, y.detach(), x.grad))
    request.getfixturevalue("without_kernels")
    slow = NF4Linear.from_linear(linear, double_quant=double_quant)
    pairs = zip(parts(layer.quantized), parts(slow.quantized), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs if a is not None)
    for x, y, grad in found:
        again = x.detach().requires_grad_()
        expected = slow(again)
        expected.backward(draw((len(x), 688), torch.bfloat16, seed=len(x) + 1))
        assert torch.equal(grad, again.grad)  # the backward dequantizes, and the bits are the same
        assert (y - expected).norm() <= 2**-7 * expected.norm() if len(x) < 300 else torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_bitsandbytes(dtype):
    """Dequantized values bit for bit; codes too, except next to a midpoint, where bitsandbytes' fast division decides."""
    import bitsandbytes.functional as bnb

    weight = draw((2048, 1024), dtype, 0.02)
    poison()
    ours = kernels.quantize_nf4(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(ours.absmax, state.absmax)
    assert (ours.packed.view(-1) != packed.view(-1)).float().mean() < 1e-5
    theirs = NF4Tensor(packed.view(-1, 1), state.absmax, weight.shape, dtype, 64)
    assert torch.equal(kernels.dequantize_nf4(theirs), bnb.dequantize_4bit(packed, state))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    scales = QuantizedScales(state.absmax, state.state2.absmax, state.offset, 256)
    theirs = NF4Tensor(packed.view(-1, 1), scales, weight.shape, dtype, 64)
    assert torch.equal(kernels.dequantize_nf4(theirs), bnb.dequantize_4bit(packed, state))


def test_the_benchmark_that_only_reads_reads_everything():
    q = plain.quantize_nf4(draw((64, 512), HALF))
    codes, scales = read(q, parts=3, rows=32, blocks=2)  # the last part has nothing left
    assert codes.shape == scales.shape == (3, 64)
    words = q.packed.view(-1).view(torch.int32).view(64, -1).sum(1, dtype=torch.int32)
    assert torch.equal(codes.sum(0, dtype=torch.int32), words)
    torch.testing.assert_close(scales.sum(0), q.absmax.view(64, -1).sum(1), rtol=1e-6, atol=0)
