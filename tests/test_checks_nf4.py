"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import norm

from course import ROOT
from course.checking import NotYet, mistaken
from course.checks import nf4 as check
from course.checks.nf4.dequantize import dequantize
from course.checks.nf4.levels import normal_levels
from course.checks.nf4.lloyd_step import lloyd_step, weighted_mean
from course.checks.nf4.nearest import nearest
from course.checks.nf4.occupancy import occupancy
from course.checks.nf4.pack import pack
from course.checks.qlora.product import decode
from reference import nf4
from reference.blockwise import midpoints, scale_blocks
from reference.nf4 import NF4_CODEBOOK, nearest_codes, normal_float_codebook

COUNTS = {(2 ** (bits - 1) - 1, 2 ** (bits - 1)): bits for bits in range(2, 9)}


def levels_by_ppf(negative, positive, offset):
    below, above = (torch.linspace(offset, 0.5, n + 1).numpy()[:-1] for n in (negative, positive))
    found = torch.tensor([*-norm.ppf(below), 0.0, *norm.ppf(above)[::-1]], dtype=torch.float32)
    return found / found[-1]


def levels_of_nf4_only(negative, positive, offset):
    return NF4_CODEBOOK.clone()


def levels_of_the_reference(negative, positive, offset):
    return normal_float_codebook(COUNTS.get((negative, positive), 4))


def levels_mirrored(negative, positive, offset):
    found = normal_levels(negative, positive, offset)
    return -found.flip(0)


def levels_nearly(negative, positive, offset):
    found = normal_levels(negative, positive, offset)
    return torch.where(found == 0, 1e-4, found)


def test_other_right_levels_pass():
    for _ in range(3):
        check.levels(levels_by_ppf)


def test_minus_zero_is_named():
    """The table is to be equal bit for bit; −Φ⁻¹(½) gives the other zero."""

    def with_the_zero_of_the_negative_side(negative, positive, offset):
        below = -ndtri(torch.linspace(offset, 0.5, negative + 1).numpy())
        above = ndtri(torch.linspace(offset, 0.5, positive + 1)[:-1].numpy())
        found = torch.tensor([*below, *above]).sort().values
        return found / found.max()

    with pytest.raises(NotYet, match=r"zero is −0\.0"):
        check.levels(with_the_zero_of_the_negative_side)
    with pytest.raises(NotYet, match="right to six digits"):  # a wrong grid comes first
        check.levels(lambda *counts: torch.where((found := normal_levels(*counts, grid=torch.float64)) == 0, 0.0, found))


@pytest.mark.parametrize("sly", [levels_of_nf4_only, levels_of_the_reference, levels_mirrored, levels_nearly])
def test_sly_levels_are_refused(sly):
    with pytest.raises(NotYet):
        check.levels(sly)


def test_one_last_place_is_named():
    def off_by_one_bit(negative, positive, offset):
        found = normal_levels(negative, positive, offset)
        found[3] = torch.nextafter(found[3], torch.tensor(math.inf))
        return found

    with pytest.raises(NotYet, match="right to six digits, but not the table"):
        check.levels(off_by_one_bit)


@pytest.mark.parametrize(
    "grid",
    [
        lambda offset, n: np.linspace(offset, 0.5, n + 1, dtype=np.float32),
        lambda offset, n: (offset + (0.5 - offset) * torch.arange(n + 1) / n).numpy(),
    ],
)
def test_another_float32_grid_is_named(grid):
    def levels(negative, positive, offset):
        below, above = (ndtri(grid(offset, n)[:-1]) for n in (negative, positive))
        found = torch.tensor([*-below, 0.0, *above]).float().sort().values
        return found / found.max()

    with pytest.raises(NotYet, match=r"right to six digits, but not the table .* torch\.linspace in float32"):
        check.levels(levels)


def test_other_right_codes_pass():
    check.nearest(lambda scaled, levels: (scaled[..., None] > midpoints(levels)).sum(-1).to(torch.uint8))
    check.nearest(lambda scaled, levels: torch.searchsorted(midpoints(levels), scaled.contiguous(), out_int32=True).to(torch.uint8))


def codes_by_neighbours(scaled, levels):
    upper = torch.searchsorted(levels, scaled.contiguous()).clamp(1, len(levels) - 1)
    return torch.where(levels[upper] - scaled < scaled - levels[upper - 1], upper, upper - 1).to(torch.uint8)


def test_codes_by_the_nearer_neighbour_pass():
    for seed in range(8):
        check.nearest._judge(codes_by_neighbours, seed)


def test_no_two_levels_are_equal():
    """Of two equal levels either code is right."""
    seen = []
    for seed in range(20):
        check.nearest._run(lambda scaled, levels: seen.append(levels) or nearest(scaled, levels), seed)
    assert all((levels.diff() > 1e-4).all() for levels in seen)


@pytest.mark.parametrize(
    "sly",
    [
        lambda scaled, levels: nearest_codes(scaled),  # NF4 whatever the levels
        lambda scaled, levels: nearest(scaled.clamp(-1, 1).round(decimals=1), levels),
        lambda scaled, levels: nearest(scaled, levels) * 0,
        lambda scaled, levels: nearest(scaled, levels).to(torch.int8),
        lambda scaled, levels: nearest(scaled.clamp(-1, 1), levels),
        lambda scaled, levels: nearest(scaled.view(-1), levels).view(scaled.shape),
    ],
)
def test_sly_codes_are_refused(sly):
    with pytest.raises(NotYet):
        check.nearest(sly)


def pads_in_place(codes):
    if len(codes) % 2:
        codes.resize_(len(codes) + 1)[-1] = 7
    return pack(codes)


def clears_its_input(codes):
    packed = pack(codes)
    codes.zero_()
    return packed


def packed_as_text(codes):
    text = "".join(f"{code:x}" for code in codes.tolist()) + "7" * (len(codes) % 2)
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def test_other_right_packing_passes():
    for seed in range(5):
        check.pack._judge(packed_as_text, seed)


def test_a_lone_code_without_a_partner_is_named():
    """For longer odd lengths this raises; the learner should hear of the length, not of broadcasting."""
    with pytest.raises(NotYet, match="it has no partner"):
        check.pack(lambda codes: codes[::2] * 16 + codes[1::2])


@pytest.mark.parametrize("sly, words", [(clears_its_input, "changed"), (pads_in_place, "changed")])
def test_packing_that_changes_the_codes_is_refused(sly, words):
    with pytest.raises(NotYet, match=words):
        check.pack(sly)


@pytest.mark.parametrize(
    "sly",
    [
        lambda codes: pack(codes)[:, None],  # the library's shape, not the one asked for
        lambda codes: pack(codes).flip(0),
        lambda codes: pack(codes.clamp(max=7)),
        lambda codes: pack(codes, dtype=torch.int8),
        lambda codes: torch.cat([pack(codes), torch.zeros(1, dtype=torch.uint8)]),
    ],
)
def test_sly_packing_is_refused(sly):
    with pytest.raises(NotYet):
        check.pack(sly)


def test_the_reference_restores():
    for seed in range(3):
        check.dequantize._judge(decode, seed)


def restored_one_by_one(packed, absmax, shape, block_size, dtype):
    values = []
    for i in range(math.prod(shape)):
        code = packed[i // 2].item() // 16 if i % 2 == 0 else packed[i // 2].item() % 16
        values.append(NF4_CODEBOOK[code] * absmax[i // block_size])
    return torch.stack(values).reshape(shape).to(dtype)


def test_restoring_one_by_one_passes():
    for seed in range(3):
        check.dequantize._judge(restored_one_by_one, seed)


@pytest.mark.parametrize(
    "sly",
    [
        lambda packed, absmax, shape, block_size, dtype: torch.zeros(shape, dtype=dtype),
        lambda packed, absmax, shape, block_size, dtype: dequantize(packed, absmax, shape, 64, dtype),  # the usual block size
        lambda packed, absmax, shape, block_size, dtype: dequantize(packed, absmax, shape[::-1], block_size, dtype),
        lambda packed, absmax, shape, block_size, dtype: dequantize(packed, absmax.half().float(), shape, block_size, dtype),
        lambda packed, absmax, shape, block_size, dtype: dequantize(packed, absmax.clamp(min=1e-12), shape, block_size, dtype),
        lambda packed, absmax, shape, block_size, dtype: dequantize(packed, absmax, shape, block_size, torch.bfloat16).to(dtype),
    ],
)
def test_sly_restoring_is_refused(sly):
    with pytest.raises(NotYet):
        check.dequantize(sly)


def test_other_right_shares_pass():
    def by_library_parts(x, levels, block_size):
        codes = torch.bucketize(scale_blocks(x.flatten(), block_size)[0], midpoints(levels))
        return codes.bincount(minlength=len(levels)).div(x.numel())

    def in_double(x, levels, block_size):
        counts = torch.zeros(len(levels), dtype=torch.float64)
        for block in x.double().flatten().split(block_size):
            near = (block[:, None] - levels * block.abs().max()).abs() if block.any() else levels.abs().expand(len(block), -1)
            counts += torch.nn.functional.one_hot(near.argmin(1), len(levels)).sum(0)
        return (counts / x.numel()).float()

    for seed in range(5):
        check.occupancy._judge(by_library_parts, seed)
        check.occupancy._judge(in_double, seed)
        check.occupancy._judge(zeros_go_to(lambda levels: levels.abs().argmin()), seed)


def shares_in_16_bits(guarded):
    def occupancy(x, levels, block_size):
        scaled = torch.cat([guarded(block, block.abs().max()) for block in x.flatten().split(block_size)])
        return torch.bincount(torch.bucketize(scaled, midpoints(levels)), minlength=len(levels)).float() / x.numel()

    return occupancy


@pytest.mark.parametrize(
    "guarded, words",
    [
        (lambda block, largest: block / largest.clamp(min=1e-38), "own 16-bit dtype: convert x to float32 first$"),
        (lambda block, largest: block / largest if largest > 0 else block, "own 16-bit dtype: convert x to float32 first$"),
        (lambda block, largest: (block / largest).nan_to_num(), "own 16-bit dtype: convert x to float32 first$"),
        (lambda block, largest: block / torch.where(largest == 0, 1, largest), "own 16-bit dtype: convert x to float32 first$"),
        (lambda block, largest: block / largest.clamp(min=1e-12), "and by no less than a least value"),
        (lambda block, largest: block / largest, "and a block of zeros by zero"),
    ],
)
def test_a_division_in_16_bits_is_named_however_zeros_are_guarded(guarded, words):
    for seed in range(5):
        with pytest.raises(NotYet, match=words):
            check.occupancy._judge(shares_in_16_bits(guarded), seed)


def test_an_index_error_that_is_not_about_a_mask_is_shown_as_it_is():
    with pytest.raises(NotYet, match="your code raised IndexError: index 16 is out of bounds"):
        check.dequantize(lambda packed, absmax, shape, block_size, dtype: NF4_CODEBOOK[torch.tensor([16])])


def zeros_go_to(code):
    def occupancy(x, levels, block_size):
        counts = torch.zeros(len(levels))
        for block in x.float().flatten().split(block_size):
            if block.any():
                counts += torch.bucketize(block / block.abs().max(), midpoints(levels)).bincount(minlength=len(levels))
            else:
                counts[code(levels)] += len(block)
        return counts / x.numel()

    return occupancy


@pytest.mark.parametrize(
    "sly, words",
    [
        (zeros_go_to(lambda levels: 7), "a block of zeros"),
        (zeros_go_to(lambda levels: len(levels) // 2), "a block of zeros"),
        (zeros_go_to(lambda levels: len(levels) // 2 - 1), "a block of zeros"),
        (lambda x, levels, block_size: occupancy(x.view(-1), levels, block_size), "Use .reshape"),
        (lambda x, levels, block_size: occupancy(x.as_strided((x.numel(),), (1,)), levels, block_size), "a transposed float16 tensor"),
        (mistaken(occupancy, guard=lambda largest: largest + 1e-12), "a block of tiny values is lost"),
        (mistaken(occupancy, guard=lambda largest: largest.clamp(min=1e-6)), "a block of tiny values is lost"),
    ],
)
def test_shares_that_are_right_for_some_tensors_are_refused(sly, words):
    for seed in range(2):
        with pytest.raises(NotYet, match=words):
            check.occupancy._judge(sly, seed)


def by_distances(x, levels, block_size):
    """Without a guard: a block of zeros is NaN, which argmin takes for the least distance."""
    scaled = torch.cat([block / block.abs().max() for block in x.float().flatten().split(block_size)])
    return torch.nn.functional.one_hot((scaled[:, None] - levels).abs().argmin(1), len(levels)).float().mean(0)


def test_zeros_over_zero_are_named_for_argmin_too():
    for seed in range(5):
        with pytest.raises(NotYet, match="argmin of NaN is 0"):
            check.occupancy._judge(by_distances, seed)


@pytest.mark.parametrize(
    "sly",
    [
        lambda x, levels, block_size: occupancy(x, NF4_CODEBOOK, block_size),
        lambda x, levels, block_size: occupancy(x, levels, 64),
        lambda x, levels, block_size: occupancy(x.abs(), levels, block_size),
        lambda x, levels, block_size: occupancy(x, levels, block_size).softmax(0),
        lambda x, levels, block_size: occupancy(x, levels, block_size).sort().values,
    ],
)
def test_sly_shares_are_refused(sly):
    with pytest.raises(NotYet):
        check.occupancy(sly)


def many_steps(scaled, weight, levels, kept=()):
    for _ in range(30):
        levels = lloyd_step(scaled, weight, levels, kept)
    return levels


def step_by_averages(scaled, weight, levels, kept=()):
    values, weights = scaled.double().numpy(), weight.double().numpy()
    codes = np.abs(values[:, None] - levels.double().numpy()).argmin(1)
    new = levels.clone()
    for code in sorted(set(codes.tolist()) - set(kept)):
        new[code] = np.average(values[codes == code], weights=weights[codes == code]).item()
    return new


def step_by_one_hot(scaled, weight, levels, kept=()):
    member = torch.nn.functional.one_hot(torch.bucketize(scaled, midpoints(levels)), len(levels)).float()
    mass = member.T @ weight
    new = torch.where(mass > 0, member.T @ (weight * scaled) / mass, levels)
    new[list(kept)] = levels[list(kept)]
    return new


def test_other_right_steps_pass():
    for seed in range(5):
        check.lloyd_step._judge(step_by_averages, seed)
        check.lloyd_step._judge(step_by_one_hot, seed)


def test_no_scaled_value_is_next_to_a_midpoint():
    """There, two right answers could differ by a rounding."""
    seen = []

    def spy(scaled, weight, levels, kept=()):
        seen.append((scaled, levels))
        return levels

    def spy_on_shares(x, levels, block_size):
        pieces = [piece / piece.abs().max().clamp(min=1e-38) for piece in x.double().flatten().split(block_size)]
        seen.append((torch.cat(pieces), levels))
        return levels

    for seed in range(20):
        check.lloyd_step._run(spy, seed)
        check.occupancy._run(spy_on_shares, seed)
    for scaled, levels in seen:
        assert (scaled[:, None].double() - midpoints(levels.double())).abs().min() > 5e-6


@pytest.mark.parametrize(
    "sly",
    [
        many_steps,
        lambda scaled, weight, levels, kept=(): levels,
        lambda scaled, weight, levels, kept=(): (levels + lloyd_step(scaled, weight, levels, kept)) / 2,
        lambda scaled, weight, levels, kept=(): lloyd_step(scaled, weight, levels, (0, 7, 15)),
        lambda scaled, weight, levels, kept=(): lloyd_step(scaled, weight.flip(0), levels, kept),
    ],
)
def test_sly_steps_are_refused(sly):
    with pytest.raises(NotYet):
        check.lloyd_step(sly)


def kept_only_if(change):
    return lambda scaled, weight, levels, kept=(): lloyd_step(scaled, weight, levels, change(kept))


@pytest.mark.parametrize(
    "sly, words",
    [
        (kept_only_if(lambda kept: (0, 7, 15)), "codes 0, 7 and 15 stayed"),
        (kept_only_if(lambda kept: (0, 7, 15) if kept else ()), "with codes"),
        (kept_only_if(lambda kept: (0, 7, 15) if len(kept) == 3 else kept), "with codes 2, 9 and 12 kept"),
        (kept_only_if(lambda kept: kept[:1]), "kept"),
        (mistaken(lloyd_step, centre=partial(weighted_mean, more=1e-12)), "the weights of small blocks are lost"),
        (
            lambda s, weight, levels, kept=(): lloyd_step(s, torch.where(weight < 1e-8, 0, weight), levels, kept),
            "weights of about 1e-20",
        ),
    ],
)
def test_steps_that_are_right_for_some_levels_are_refused(sly, words):
    for seed in range(2):
        with pytest.raises(NotYet, match=words):
            check.lloyd_step._judge(sly, seed)


def test_the_levels_table_is_the_references():
    assert torch.equal(check.levels.reference(7, 8, nf4.OFFSET), NF4_CODEBOOK)


def test_the_table_in_the_lesson():
    """Its sixteen numbers carry no claims of their own."""
    rows = re.findall(r"^\| level \|(.+)\|$", (ROOT / "lessons" / "04_nf4.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = [float(number.replace("−", "-")) for row in rows for number in row.split("|")]
    assert shown == [round(level, 3) for level in NF4_CODEBOOK.tolist()]
