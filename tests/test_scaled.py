"""What is computed of scaled values without sampling is what samples show."""

import numpy as np
import pytest
import torch

from course.claims.shared import normal
from course.figures import double_quantization as pictures
from course.lab import scaled
from reference.blockwise import scale_blocks
from reference.nf4 import quantize_nf4


@pytest.mark.parametrize("block", [16, 64, 1024])
@pytest.mark.parametrize("levels", [scaled.NF4, np.linspace(-1, 1, 15)], ids=["NF4", "even"])
def test_shares_and_errors_are_those_of_a_sample(block, levels):
    x = normal(1 << 20, seed=block)
    u, absmax = scale_blocks(x, block)
    codes = scaled.nearest(levels, u.double().numpy())
    assert np.abs(np.bincount(codes, minlength=len(levels)) / len(u) - scaled.occupancy(levels, block)).max() < 2e-3
    off = np.abs(levels[codes] - u.double().numpy()) * absmax.repeat_interleave(block).double().numpy()
    for power in (1, 2):
        assert (off**power).mean() == pytest.approx(scaled.error(levels, block, power), rel=0.03)


@pytest.mark.parametrize("values", scaled.INSIDE)
def test_shares_sum_to_one(values):
    places, shares = scaled.distribution(64, 0, values)
    assert shares.sum() == pytest.approx(1, abs=1e-9) and (np.diff(places) > 0).all()
    assert shares[0] + shares[-1] == pytest.approx(1 / 64)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("kept", [(), (0, 7, 15)], ids=["free", "kept"])
def test_no_small_step_from_the_best_levels_helps(power, kept):
    best = scaled.best_levels(64, power, kept)
    least = scaled.error(best, 64, power)
    assert least < scaled.error(scaled.NF4, 64, power)
    assert np.array_equal(best[list(kept)], scaled.NF4[list(kept)])
    for code in set(range(16)) - set(kept):
        for step in (-0.01, 0.01):
            moved = best.copy()
            moved[code] += step
            assert scaled.error(moved, 64, power) > least


@pytest.mark.parametrize("centre", [True, False])
def test_the_density_of_scales_in_the_figure_is_that_of_a_sample(centre):
    places, shares = pictures.shares_of_largest(centre, points=20)
    scales = torch.cat([quantize_nf4(normal(1 << 20, seed=seed)).absmax for seed in range(4)]).view(-1, 256)
    rest = scales - scales.mean() if centre else scales
    found = rest / rest.abs().amax(1, keepdim=True)
    counts = torch.histc(found[found.abs() < 1], 20, -1, 1).double().numpy() / found.numel()
    assert shares.sum() == pytest.approx(1, abs=1e-6) and len(places) == 20
    assert np.abs(counts - shares * 255 / 256).max() < 0.01
