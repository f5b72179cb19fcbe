"""The kernel for a few rows: its look-up, instruction by instruction, and what only a GPU shows: graphs, streams, the order of sums.

Its numbers are tested with the other kernels' in test_kernels.py.
"""

import pytest
import torch
from ptx import execute, words_of_codes

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from reference.kernels import nf4 as kernels
from reference.kernels.nf4 import permute as nf4_permute
from reference.kernels.nf4 import rows as nf4_rows
from reference.nf4 import NF4_CODEBOOK, quantize_nf4

gpu = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_look_up_gives_the_levels_of_a_words_codes_in_order(dtype):
    table = [word & 0xFFFFFFFF for word in nf4_permute.byte_table(torch.device("cpu"), dtype)[:, 0].tolist()]
    places = dict(zip((f"${6 + 2 * i}" for i in range(8)), table, strict=True))  # every operand comes twice: two elements a register
    levels = NF4_CODEBOOK.to(dtype)
    for word, codes in words_of_codes():
        registers = execute(nf4_permute.LOOK_UP.value, places | {"$4": word})
        pairs = torch.tensor([registers[f"${i}"] for i in range(4)], dtype=torch.int64).to(torch.int32)
        assert torch.equal(pairs.view(dtype), levels[codes])


def parts(count: int, in_features: int = 4096, out_features: int = 256):
    g = torch.Generator("cuda").manual_seed(count)
    draw = lambda *shape: torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return draw(count, in_features), quantize_nf4(draw(out_features, in_features) * 0.05)


@gpu
@pytest.mark.parametrize("count", [2, 16, 33, 64, 65, 128])
def test_the_same_bits_every_time(count):
    """Whichever part of the features is done last."""
    x, q = parts(count)
    first = kernels.linear_nf4(x, q)
    assert all(torch.equal(kernels.linear_nf4(x, q), first) for _ in range(200))


@gpu
def test_in_two_streams_at_once():
    cases = [parts(count) for count in (16, 16)]
    expected = [kernels.linear_nf4(*case) for case in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found = [[], []]
    torch.cuda.synchronize()
    for _ in range(100):
        for case, stream, results in zip(cases, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(kernels.linear_nf4(*case))
    torch.cuda.synchronize()
    assert all(torch.equal(y, one) for results, one in zip(found, expected, strict=True) for y in results)


@gpu
def test_in_two_graphs_recorded_before_either_runs():
    cases = [parts(16), parts(16)]
    cases[1] = (cases[1][0] * 2, cases[1][1])
    expected = [kernels.linear_nf4(*case) for case in cases]
    graphs, outputs = [torch.cuda.CUDAGraph() for _ in cases], []
    for graph, case in zip(graphs, cases, strict=True):
        with torch.cuda.graph(graph):
            outputs.append(kernels.linear_nf4(*case))
    for _ in range(3):
        for graph, output, y in reversed(list(zip(graphs, outputs, expected, strict=True))):
            output.fill_(torch.nan)
            graph.replay()
            assert torch.equal(output, y)
    assert torch.equal(kernels.linear_nf4(*cases[0]), expected[0])


# Triton's interpreter can't multiply matrices of bfloat16
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize("block_size", nf4_rows.BLOCK_SIZES)
@pytest.mark.parametrize("count", nf4_rows.SIZES)
def test_every_row_and_feature_meets_its_own(dtype, block_size, count):
    """x with one feature each shows a column of the weight, exactly: the level in 16 bits, times its block's scale, rounded once."""
    weight = torch.randn(200, 512, device=DEVICE, dtype=dtype)
    q = quantize_nf4(weight, block_size)
    columns = torch.randperm(512)[:count]
    x = torch.zeros(count, 512, device=DEVICE, dtype=dtype)
    x[torch.arange(count), columns] = 1
    flat = q.packed.view(-1).long()
    codes = torch.stack([flat >> 4, flat & 15], 1).view(200, 512)
    exact = NF4_CODEBOOK.to(dtype).float().to(DEVICE)[codes] * q.absmax.view(200, -1).repeat_interleave(block_size, 1)
    assert torch.equal(kernels.linear_nf4(x, q), exact.to(dtype).T[columns])
