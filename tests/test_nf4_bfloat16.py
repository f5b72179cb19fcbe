"""Quantizing bfloat16 two weights at a time: the same codes for every bit pattern, on CUDA or in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from reference.blockwise import midpoints
from reference.kernels import nf4 as kernels
from reference.kernels.nf4 import bfloat16 as pairs
from reference.kernels.nf4 import codes as nf4_codes
from reference.nf4 import NF4_CODEBOOK, quantize_nf4

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
PATTERNS = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # all there are
# Digits of every kind, the smallest and the largest; of the last four, inverses or values are subnormal.
ABSMAX = [1.0, 1.0078125, 1.3359375, 1.4140625, 1.9921875, 0.03, 1e-20, 3e37, 3.3895e38, 2.0**126, 2.0**-126, 1.1e-38, 2.0**-133 * 77]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter takes its time for each program, however little it does."""
    if DEVICE.type == "cpu":
        monkeypatch.setitem(pairs.SIZES, "tile", 1 << 14)


@pytest.fixture
def only_pairs(monkeypatch):
    """The general kernel is not there."""
    monkeypatch.setattr(nf4_codes, "_quantize_any", None)


def all_under(absmax: float) -> torch.Tensor:
    """Blocks of 64 of every bfloat16 that is not above ``absmax``, which each block begins with."""
    absmax = torch.tensor(absmax).bfloat16()
    values = PATTERNS[PATTERNS.abs() <= absmax]  # no NaN
    values = torch.cat([values, values.new_zeros(-len(values) % 63)]).view(-1, 63)
    return torch.cat([absmax.expand(len(values), 1), values], 1).to(DEVICE)


def assert_same(weight: torch.Tensor, block_size: int = 64) -> None:
    q, right = kernels.quantize_nf4(weight, block_size), quantize_nf4(weight, block_size)
    assert torch.equal(q.packed, right.packed) and torch.equal(q.absmax, right.absmax)


@pytest.mark.parametrize("absmax", ABSMAX)
def test_every_bfloat16_gets_its_code(absmax, only_pairs):
    weight = all_under(absmax)
    assert absmax < 1 or len(weight) > 500
    assert_same(weight)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("in_high_half", [False, True])
def test_every_finite_bfloat16_is_an_absmax(negative, in_high_half, only_pairs):
    """In either half of a word; and the other weight does not spoil it, though its bits lie below."""
    largest = PATTERNS[torch.isfinite(PATTERNS) & (PATTERNS >= 0)]
    blocks = (largest[:, None].float() * torch.linspace(-1, 1, 62)).bfloat16()
    pair = torch.stack([largest / 2, -largest if negative else largest], 1)
    assert_same(torch.cat([blocks[:, :8], pair if in_high_half else pair.flip(1), blocks[:, 8:]], 1).to(DEVICE))


def test_moved_midpoints_part_all_scaled_values_as_the_midpoints_do():
    """Of both signs, by the table alone: the sign of the difference and the four last bits."""
    assert (by_table(pairs.cell_table(CPU)) == right_codes()).all()


def test_every_entry_counts():
    table, midpoint_cells = pairs.cell_table(CPU), 0
    for place in range(pairs.CELLS):
        broken = table.clone()
        broken[place] ^= 1  # one code beside
        used = (by_table(table) != by_table(broken)).any().item()
        n = (place + 16) % pairs.CELLS - 16
        assert used == (abs(n) <= 15)  # the others are no cells of [−1, 1]
        if entry_is_a_midpoint := table[place].view(torch.float32).abs() < 1:
            for factor in (1 - 2**-7, 1 + 2**-7):  # beyond the nearest scaled values
                moved = table.clone()
                moved.view(torch.float32)[place] *= factor
                moved[place] = moved[place] & -16 | table[place] & 15
                assert (by_table(moved) != right_codes()).any()
        midpoint_cells += int(entry_is_a_midpoint)
    assert midpoint_cells == len(NF4_CODEBOOK) - 1


def scaled() -> torch.Tensor:
    values = pairs.scaled_bfloat16()
    values = values[values <= 1]
    assert len(values) > 100_000
    return torch.cat([values, -values, torch.zeros(1)])


def right_codes() -> torch.Tensor:
    return torch.searchsorted(midpoints(NF4_CODEBOOK), scaled()).int()


def by_table(table: torch.Tensor) -> torch.Tensor:
    values = scaled()
    entry = table[((values * 15).round().int() & 31).long()]
    return (entry & 15) + (entry.view(torch.float32) < values).int()


@pytest.mark.parametrize("place", [0, 3, 15, 31 - 6])
def test_a_broken_entry_gives_other_codes(place, monkeypatch):
    broken = pairs.cell_table(DEVICE).clone()
    broken[place] ^= 1
    weight = all_under(1.0)
    monkeypatch.setattr(pairs, "cell_table", lambda device: broken)
    assert not torch.equal(kernels.quantize_nf4(weight).packed, quantize_nf4(weight).packed)


@pytest.mark.parametrize("block_size", [2, 32, 256, 4096])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1001, 5 * 4096 + 2])
def test_sizes_that_are_no_whole_blocks(n, block_size, only_pairs):
    """Whole blocks in pairs, the rest in torch."""
    assert_same(torch.randn(n, generator=torch.Generator().manual_seed(n)).bfloat16().to(DEVICE), block_size)


def test_what_does_not_begin_on_a_whole_word_or_is_no_bfloat16_goes_the_general_way(monkeypatch):
    weight = torch.randn(64 * 5 + 1, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    monkeypatch.setattr(pairs, "quantize_pairs", None)
    for other in (weight[1:], weight[:-1].half(), weight[:-1].float()):
        assert not pairs.takes(other)
        assert_same(other)
    with pytest.raises(TypeError):
        kernels.quantize_nf4(weight[:-1])


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [70, 71])
def test_what_is_not_finite_is_refused_in_either_half(bad, where, only_pairs):
    weight = torch.randn(64 * 3, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    weight[where] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinite values, the first in block 1 "):
        kernels.quantize_nf4(weight)
    unchecked = kernels.quantize_nf4(weight, check=False).absmax
    assert not torch.isfinite(unchecked[1]) and torch.isfinite(unchecked[[0, 2]]).all()
