"""The 4-bit formats of unit 03's map, against their definitions and against the package that reads GGUF files."""

import gguf
import numpy as np
import pytest
import torch

from course.claims import four_bit_formats as formats
from course.claims.shared import normal
from reference.blockwise import relative_rmse

FORMATS = {name: each for name, each in formats.FORMATS.items() if each.restored}
every_format = pytest.mark.parametrize("name", FORMATS)


def rows(name: str, seed: int = 3) -> torch.Tensor:
    """Blocks of different size, one of them zeros."""
    x = normal(40, FORMATS[name].block, seed=seed) * torch.logspace(-3, 1, 40)[:, None]
    x[7] = 0
    return x


@every_format
def test_zeros_come_back_and_the_error_is_of_four_bits(name):
    x = rows(name)
    restored = FORMATS[name].restored(x)
    assert restored.shape == x.shape and not restored[7].any()
    assert 0.02 < relative_rmse(x, restored) < 0.2


@every_format
def test_a_block_takes_no_more_levels_than_a_code_can_name(name):
    """16 for every scale: of Q4_K's 256 values each 32 have levels of their own."""
    of_one_scale = 32 if name == "Q4_K" else FORMATS[name].block
    restored = FORMATS[name].restored(normal(64, FORMATS[name].block, seed=5))
    assert max(len(block.unique()) for block in restored.view(-1, of_one_scale)) <= 16


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("HQQ", "NF4+DQ")])
def test_what_is_restored_depends_on_its_own_block_alone(name):
    """Or on the largest value of the tensor, which is in another block. HQQ's rounds end for all together, NF4+DQ's scales have scales."""
    x = rows(name)
    y = x.clone()
    y[3] *= -1.7
    same = torch.arange(40) != 3
    assert torch.equal(FORMATS[name].restored(x)[same], FORMATS[name].restored(y)[same])


def test_mxfp4_by_hand():
    """7.9 has exponent 2, so the scale is 1: it is cut to 6; with 8.1 the scale is 2."""
    x = torch.zeros(1, 32)
    x[0, :5] = torch.tensor([7.9, -0.7, 2.4, 0.2, 5.1])
    assert formats.mxfp4(x)[0, :5].tolist() == [6, -0.5, 2, 0, 6]
    x[0, 0] = 8.1
    assert formats.mxfp4(x)[0, :5].tolist() == [8, -1, 2, 0, 6]


def test_nvfp4_by_hand():
    """The block with the largest value of the tensor has the scale 448, another one a power of two here; E2M1 is all that is left."""
    x = torch.zeros(2, 16)
    x[0, :3] = torch.tensor([6.0, -3.1, 0.2])
    x[1, :3] = torch.tensor([6 / 64, 2.9 / 64, -0.3 / 64])
    expected = torch.zeros(2, 16)
    expected[0, :3] = torch.tensor([6.0, -3, 0])
    expected[1, :3] = torch.tensor([6 / 64, 3 / 64, -0.5 / 64])
    assert torch.allclose(formats.nvfp4(x), expected, rtol=1e-6)


def test_nvfp4_rounds_its_scales_to_e4m3():
    """Between 64 and 128 E4M3 counts in eights: a block that asks for the scale 101 gets 104, and its largest value comes back larger."""
    x = torch.zeros(2, 16)
    x[0, 0], x[1, 0] = 6 * 448, 6 * 101
    assert formats.nvfp4(x)[:, 0].tolist() == [6 * 448, 6 * 104]


def test_q4_0_puts_the_largest_value_at_minus_eight():
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([4.0, -4.6, 1.0, 4.6])  # the first of the largest values decides the sign
    step = torch.tensor(4.6 / 8).half().item()
    assert torch.allclose(formats.q4_0(x)[0, :4], step * torch.tensor([7.0, -8, 2, 7]))


def test_the_search_of_q4_k_is_better_than_min_and_max():
    x = normal(500, 32, seed=3)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = (high - low) / 15
    plain = ((x - low) / step).round() * step + low
    steps, lows = formats.steps_and_lows(x)
    searched = ((x - lows) / steps).round().clamp(0, 15) * steps + lows
    assert relative_rmse(x, searched) < 0.95 * relative_rmse(x, plain)


def test_hqq_lets_large_errors_be():
    """A smaller mean of |error|^0.7 than with min and max alone."""
    x = normal(500, 64, seed=3)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = (high - low) / 15
    plain = ((x - low) / step).round() * step + low
    norms = [(x - restored).abs().pow(0.7).mean() for restored in (formats.hqq(x), plain)]
    assert norms[0] < norms[1]


def test_bits_are_those_that_are_stored():
    found = {name: formats.bits(name) for name in formats.FORMATS}
    assert found.pop("NF4+DQ") == 4 + 8 / 64 + 32 / (64 * 256)
    assert found.pop("MXFP4") == 4.25
    assert found.pop("GPTQ") == found.pop("AWQ") == 4.15625
    assert set(found.values()) == {4.5}


# beside the package gguf


@pytest.mark.parametrize("name", ["Q4_0", "MXFP4"])
def test_as_the_gguf_package_writes_and_reads_it(name):
    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    assert 8 * size / values == formats.bits(name)
    x = rows(name)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    assert torch.equal(FORMATS[name].restored(x), torch.from_numpy(theirs))


def test_q4_k_as_the_gguf_package_reads_it():
    x = rows("Q4_K")
    of_steps, of_lows, steps, lows, codes = formats.q4_k_fields(x)
    steps, lows, codes = (each.to(torch.uint8).numpy() for each in (steps, lows, codes))
    low_bits = [steps[:, :4] | steps[:, 4:] >> 4 << 6, lows[:, :4] | lows[:, 4:] >> 4 << 6, steps[:, 4:] & 15 | lows[:, 4:] << 4]
    pairs = codes[:, 0::2] | codes[:, 1::2] << 4  # (n, 4, 32): two groups of 32 share their bytes
    halves = [each.half().numpy().view(np.uint8) for each in (of_steps, of_lows)]
    stored = np.concatenate([*halves, *low_bits, pairs.reshape(len(x), -1)], axis=1)
    kind = gguf.GGMLQuantizationType.Q4_K
    assert gguf.GGML_QUANT_SIZES[kind] == (256, stored.shape[1]) and 8 * stored.shape[1] / 256 == formats.bits("Q4_K")
    assert torch.equal(formats.q4_k(x), torch.from_numpy(gguf.quants.dequantize(stored, kind)))
