"""The kernel for one row: its look-up, instruction by instruction, each feature by itself, and which weights it takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptx import execute, words_of_codes

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from reference.double_quant import double_quantize
from reference.kernels import nf4 as kernels
from reference.kernels.nf4 import linear as nf4_linear
from reference.kernels.nf4 import pairs as nf4_pairs
from reference.kernels.nf4 import vector as nf4_vector
from reference.nf4 import NF4_CODEBOOK, NF4Tensor, dequantize_nf4, quantize_nf4

gpu = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # Triton's interpreter can't multiply matrices of bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_look_up_gives_the_levels_of_a_words_codes_in_order(dtype):
    """Whatever the lane: pairs are 128 bytes apart, and its own are four bytes of them."""
    table, levels = nf4_pairs.pair_table(torch.device("cpu"), dtype).tolist(), NF4_CODEBOOK.to(dtype)
    start, lane = 1024, 19
    memory = {start + 128 * byte + 4 * lane: pair & 0xFFFFFFFF for byte, pair in enumerate(table)}
    for word, codes in words_of_codes():
        registers = execute(nf4_pairs.LOOK_UP.value, {"$4": word, "$6": start + 4 * lane}, memory)
        pairs = torch.tensor([registers[f"${i}"] for i in range(4)], dtype=torch.int64).to(torch.int32)
        assert torch.equal(pairs.view(dtype), levels[codes])


@pytest.fixture
def only_the_vector_kernel(monkeypatch):
    monkeypatch.setattr(nf4_linear, "rows_product", None)


def exact_levels(q: NF4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(out_features, in_features) float32: levels in 16 bits, as the tensor cores get them, times their block's scale."""
    flat = q.packed.view(-1).long()
    codes = torch.stack([flat >> 4, flat & 15], 1).view(q.shape)
    return NF4_CODEBOOK.to(dtype).float().to(DEVICE)[codes] * q.absmax.view(q.shape[0], -1).repeat_interleave(q.block_size, 1)


@pytest.mark.parametrize("block_size", nf4_vector.BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("in_features", [640, 2048, 2048 + 1920])
def test_every_feature_meets_its_own(block_size, double_quant, in_features, only_the_vector_kernel):
    """A feature by itself shows a column of the weight, exactly: part of a step, one step, two."""
    out_features = 70
    q = quantize_nf4(torch.randn(out_features, in_features, device=DEVICE) * torch.rand(out_features, 1, device=DEVICE), block_size)
    q = double_quantize(q) if double_quant else q
    exact = exact_levels(q, HALF)
    for feature in {0, 63, 64, in_features // 2 + 5, in_features - 1, *torch.randint(in_features, (3,)).tolist()}:
        x = torch.zeros(1, in_features, device=DEVICE, dtype=HALF)
        x[0, feature] = 1
        assert torch.equal(kernels.linear_nf4(x, q)[0], exact[:, feature].to(HALF)), feature


@pytest.mark.parametrize("blocks", [1, 7, 67])
def test_rows_of_an_odd_number_of_blocks(blocks, only_the_vector_kernel):
    q = quantize_nf4(torch.randn(33, 64 * blocks, device=DEVICE))
    x, bias = torch.randn(1, 64 * blocks, device=DEVICE, dtype=HALF), torch.randn(33, device=DEVICE, dtype=HALF)
    for given in (q, double_quantize(q)):
        weight = dequantize_nf4(given, torch.float32).double()
        error = kernels.linear_nf4(x, given, bias)[0].double() - (x.double() @ weight.T + bias.double())[0]
        terms = (x.double() ** 2 @ (weight**2).T).sqrt()
        assert error.norm() <= torch.finfo(HALF).eps / 4 * ((x.double() @ weight.T).norm() + 3 * terms.norm() + bias.double().norm())


def test_what_is_not_for_it_goes_another_way():
    """More rows, other blocks, and what does not begin at a multiple of 16 bytes."""
    q = quantize_nf4(torch.randn(24, 128, device=DEVICE))
    x = torch.randn(1, 128, device=DEVICE, dtype=HALF)
    assert nf4_vector.takes(x, q)
    assert not nf4_vector.takes(torch.cat([x, x]), q)
    assert not nf4_vector.takes(x, quantize_nf4(torch.randn(24, 128, device=DEVICE), 32))
    shifted = torch.cat([x.new_zeros(1), x[0]])[1:].view(1, 128)
    packed = torch.cat([q.packed.new_zeros(4), q.packed.view(-1)])[4:]
    elsewhere = NF4Tensor(packed.view_as(q.packed), q.absmax, q.shape, q.dtype, q.block_size)
    expected = x.double() @ dequantize_nf4(q, torch.float32).double().T
    for row, weight in ((shifted, q), (x, elsewhere)):
        assert not nf4_vector.takes(row, weight)
        assert (kernels.linear_nf4(row, weight).double() - expected).norm() <= 2 * torch.finfo(HALF).eps * expected.norm()


@pytest.mark.parametrize("count", [1, 16])
def test_a_gpu_without_such_tensor_cores_writes_the_weight_out(count, monkeypatch):
    monkeypatch.setattr(nf4_linear, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(nf4_linear, "vector_product", None)
    monkeypatch.setattr(nf4_linear, "rows_product", None)
    q, x = quantize_nf4(torch.randn(24, 128, device=DEVICE)), torch.randn(count, 128, device=DEVICE, dtype=HALF)
    assert torch.equal(kernels.linear_nf4(x, q), torch.nn.functional.linear(x, kernels.dequantize_nf4(q, HALF)))


SHARED = """
from benchmarks import nf4_instructions as compiler
from reference.kernels.nf4 import vector as nf4_vector

for capability in (80, 90, 120):
    for double in (False, True):
        constants = {"BIAS": True, "PTX": True, "ODD": 0, "EVEN": False, "W": nf4_vector.WARPS}
        kernel = compiler.compiled(nf4_vector._vector_kernel, double, nf4_vector.OPTIONS, constants, capability)
        instructions = len(compiler.loop(compiler.listing(kernel.asm["cubin"])))
        print(kernel.metadata.shared, instructions / (nf4_vector.ROWS * nf4_vector.FEATURES / compiler.LANES))
"""


def test_levels_stay_where_they_were_looked_up():
    """Compiled for three generations of GPUs: neither shared memory nor shuffles between lanes bring levels to the tensor cores.

    The tables are not counted here; they leave 15 KB of the 48 that every program may have. Shuffles show in the number of instructions.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", SHARED], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    shared, instructions = zip(*(map(float, line.split()) for line in run.stdout.splitlines()), strict=True)
    assert len(shared) == 6 and max(shared) < 4096
    assert max(instructions) < 3  # a weight


@gpu
def test_a_scale_at_an_odd_address():
    q = quantize_nf4(torch.randn(512, 4096, device=DEVICE))
    absmax = torch.cat([q.absmax.new_zeros(1), q.absmax.view(-1)])[1:].view_as(q.absmax)
    x = torch.randn(1, 4096, device=DEVICE, dtype=HALF)
    moved = NF4Tensor(q.packed, absmax, q.shape, q.dtype, q.block_size)
    assert nf4_vector.takes(x, moved) and torch.equal(kernels.linear_nf4(x, moved), kernels.linear_nf4(x, q))


@gpu
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_same_bits_every_time(double_quant):
    q = quantize_nf4(torch.randn(4096, 8192, device=DEVICE))
    q = double_quantize(q) if double_quant else q
    x = torch.randn(1, 8192, device=DEVICE, dtype=HALF)
    first = kernels.linear_nf4(x, q)
    assert all(torch.equal(kernels.linear_nf4(x, q), first) for _ in range(200))
