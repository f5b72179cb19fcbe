"""Candidates for one row with one adapter give what the definition gives: on CUDA, or without it in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from benchmarks import candidates_multi_lora as candidates

CUDA = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float16)  # the interpreter cuts bfloat16 off


def problem(N: int, K: int, r: int, scaling: float = 0.75):
    made = torch.randn(N, K), torch.randn(r, K) / K**0.5, torch.randn(N, r), torch.randn(1, K)
    weight, A, B, x = (each.to(DEVICE, HALF) for each in made)
    base = x.double() @ weight.double().T
    return candidates.OneRow(weight, A, B, scaling), x, base, scaling * (x.double() @ A.double().T) @ B.double().T


@pytest.mark.parametrize("N, K, r", [(24, 48, 5), (33, 100, 16), (8, 40, 17)])
@pytest.mark.parametrize("columns", [None, 32])
@pytest.mark.parametrize("way", [candidates.one_launch, candidates.shrink_then_fused])
def test_base_and_update_in_one(way, columns, N, K, r):
    layer, x, base, update = problem(N, K, r)
    for _ in range(2):  # the second launch finds what the first has left
        y = way(layer, x, 4, columns, 4).double()
        assert (y - base - update).norm() <= torch.finfo(HALF).eps * y.norm() < 0.1 * update.norm()
    assert not layer.flag.any()


def test_without_the_adapter():
    layer, x, base, _ = problem(24, 48, 5)
    y = candidates.one_launch(layer, x, 8, 32, 4, base=True).double()
    assert (y - base).norm() <= torch.finfo(HALF).eps * y.norm()


@pytest.mark.parametrize("way", candidates.WAYS)
def test_every_way_in_the_sizes_that_are_measured(way):
    layer, x, base, update = problem(24, 48, 5)
    right = base if way == "base, 1 × all, 4 warps" else base + update
    assert (candidates.WAYS[way](layer, x).double() - right).norm() <= 2 * torch.finfo(HALF).eps * right.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("way", candidates.WAYS)
def test_a_thousand_launches_from_a_graph(way):
    """Flags go back, and dependent launches wait."""
    layer, x, base, update = problem(4096, 4096, 16)
    update = 0 if way == "base, 1 × all, 4 warps" else update
    y, graph = candidates.WAYS[way](layer, x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = candidates.WAYS[way](layer, x)
    for _ in range(1000):
        graph.replay()
    assert (y.double() - base - update).norm() <= 2 * torch.finfo(HALF).eps * base.norm() and not layer.flag.any()
