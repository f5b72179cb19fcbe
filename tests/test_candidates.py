"""Candidates for faster NF4 kernels give what the course's give: on CUDA, or without it in Triton's interpreter, on small shapes."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from benchmarks import candidates_nf4 as candidates
from benchmarks import kernel_limits as benchmark
from course import beside
from reference.double_quant import double_quantize
from reference.nf4 import dequantize_nf4, quantize_nf4

CUDA = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float16)  # the interpreter can't multiply bfloat16


def weights(blocks: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    w = (torch.randn(blocks, 64, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()
    w[1], w[2] = 0, torch.linspace(-1, 1, 64) * scale
    return w.to(DEVICE)


@pytest.mark.parametrize("scale", [1e-39, 0.02, 1e37])
@pytest.mark.parametrize("programs", [1, 2])
def test_quantize_goes_from_tile_to_tile(scale, programs):
    w = weights(37, scale)
    q, right = candidates.quantize(w, tile=256, programs=programs), quantize_nf4(w)
    assert torch.equal(q.packed, right.packed) and torch.equal(q.absmax, right.absmax)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_dequantize_by_words(double, stream):
    q = quantize_nf4(weights(37))
    q = double_quantize(q) if double else q
    found = candidates.dequantize(q, stream, 256, 1).float()
    error = (found - dequantize_nf4(q).float()).abs()
    assert not found.isnan().any() and (error <= (0 if CUDA else 2**-7) * found.abs()).all()  # the interpreter cuts bfloat16 off


@pytest.mark.parametrize("count, rows, warps", [(5, 64, 4), (33, 128, 8), (64, 256, 8), (100, 64, 4), (128, 128, 8)])
@pytest.mark.parametrize("ahead", [False, True])
def test_few_rows(count, rows, warps, ahead):
    q, x = quantize_nf4(weights(256 * 2).view(256, 128)), torch.randn(count, 128, device=DEVICE, dtype=HALF)
    right = x.double() @ dequantize_nf4(q, HALF).double().T
    y = candidates.few_rows(x, q, ahead, rows, warps, 2)
    assert (y.double() - right).norm() <= 2 * torch.finfo(HALF).eps * right.norm()


@pytest.mark.parametrize("count, rows, warps", [(5, 64, 4), (33, 128, 8), (64, 256, 8), (128, 128, 8)])
@pytest.mark.parametrize("scaled, blocks", [(False, 1), (True, 1), (True, 2)])
def test_few_rows_in_stages(count, rows, warps, scaled, blocks):
    """Rows of the weight that do not fill a tile; two parts of the features where there are processors."""
    q, x = quantize_nf4(weights(72 * 8).view(72, 512)), torch.randn(count, 512, device=DEVICE, dtype=HALF)
    right = x.double() @ dequantize_nf4(q, HALF).double().T
    y = candidates.stages(x, q, scaled, rows, warps, 2, blocks, 3)
    assert (y.double() - right).norm() <= 2 * torch.finfo(HALF).eps * right.norm()


@pytest.mark.parametrize("warps, programs", [(2, 8), (8, 1)])
@pytest.mark.parametrize("ahead", [False, True])
def test_one_row(warps, programs, ahead):
    q, x = quantize_nf4(weights(32 * 8).view(32, 512)), torch.randn(1, 512, device=DEVICE, dtype=HALF)
    right = x.double() @ dequantize_nf4(q, HALF).double().T
    assert (candidates.one_row(x, q, ahead, warps, programs).double() - right).norm() <= 2 * torch.finfo(HALF).eps * right.norm()


def test_the_courses_kernels_keep_their_sizes():
    before = dict(candidates.nf4_bfloat16.SIZES)
    w = weights(8)
    assert torch.equal(candidates.quantize_in(w, tile=128, warps=1).packed, quantize_nf4(w).packed)
    assert before == candidates.nf4_bfloat16.SIZES


def test_a_candidate_that_is_wrong_or_fails_is_told_and_not_timed():
    ways = {"right": lambda x: x, "wrong": lambda x: x + 1, "fails": lambda x: x.nothing}
    found = list(benchmark._tried(ways, ([torch.ones(2)],), lambda y: torch.equal(y, torch.ones(2)), lambda *given: 1.5))
    problem = "AttributeError: 'Tensor' object has no attribute 'nothing'"
    wrong, fails = ({"way": way, "problem": words} for way, words in (("wrong", "gives other numbers"), ("fails", problem)))
    assert found == [{"way": "right", "ms": 1.5}, wrong, fails]


def test_what_torch_compile_quantizes_with_is_nf4():
    w = weights(8, 0.02)[3:]  # a block of zeros has no scaled values
    codes, absmax = benchmark.encode(w)
    right = quantize_nf4(w)
    assert torch.equal(absmax, right.absmax) and (codes == right.packed.view(-1)).float().mean() > 0.99


def test_a_dry_run_has_every_bar():
    small = {"side": 128, "counts": (1, 16), "copies": 1, "repeats": 1, "many": 16, "first": 1}
    result = benchmark.measure(**small)
    rows = {(row["work"], row.get("rows")): row for row in result["rows"]}
    assert [row["bar"] for row in rows.values()] == [0.85, 0.93, 0.90, 0.70, 1.0]
    for row in rows.values():
        (candidate,) = row["candidates"]
        assert "ms" in candidate or not CUDA  # the interpreter cuts bfloat16 off: not equal
        against = row["bf16 weights"] if row.get("rows", 1) > 1 else row["floor"]
        assert row["reached"] == against / row["ours"] and {"ours", "bitsandbytes"} <= set(row)
    assert "missed, at" in benchmark.table(result)
    labels = beside.rows({"result": result})
    assert list(labels) == ["quantize", "dequantize", "dequantize, double quantization", "linear, 1 row", "linear, 16 rows"]
    assert labels["quantize"].limit and labels["linear, 16 rows"].peer
