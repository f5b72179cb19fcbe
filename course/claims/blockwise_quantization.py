"""What unit 03 states: errors on seeded numbers and on the tiny model's weights, prices counted, codes held against bitsandbytes'.

Everywhere ``levels`` is a key of ``CODEBOOKS``; ``block`` says whose largest value is the scale: so many values', a "row"'s or the whole
"tensor"'s; and ``name`` is what :func:`data` takes.
"""

import copy
import functools
import itertools
import math

import torch
from torch import Tensor, nn

from course.claims.shared import CPU, normal
from course.lab import models, training
from course.lab.world import World
from reference import blockwise
from reference.blockwise import dequantize_blockwise, fp4_codebook, int_codebook, quantize_blockwise, signal_to_noise
from reference.nf4 import NF4_CODEBOOK

WHOLE = 1 << 20  # a block that holds any tensor used here

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6]) / 6
E4M3 = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
CODEBOOKS = {f"INT{bits}": int_codebook(bits) for bits in range(2, 9)}
CODEBOOKS |= {"NF4": NF4_CODEBOOK, "FP4": fp4_codebook(), "E2M1": E2M1, "E4M3": E4M3[E4M3.isfinite()] / 448}  # FP4 is bitsandbytes'


@functools.cache
def _tiny() -> nn.Module:
    return models.load("tiny", where=torch.device(CPU))[0]


@functools.cache
def _weights() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in _tiny().named_parameters() if name.endswith("_proj.weight")}


def _silu() -> Tensor:
    seen, mlp = [], _tiny().model.layers[2].mlp
    hook = mlp.act_fn.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    with torch.no_grad():
        _tiny()(input_ids=World().sample("general", 16, 48, seed=3))
    hook.remove()
    return seen[0]


def student(seed: int = 0) -> Tensor:
    """A draw of 131,072 values of Student's t with three degrees of freedom."""
    n = 1 << 17
    return normal(n, seed=3 + 10 * seed) / normal(3, n, seed=4 + 10 * seed).square().mean(0).sqrt()


@functools.cache
def data(name: str) -> Tensor:
    """What the errors are measured on, here and in the notebook.

    Seeded numbers, (131072,): "uniform", "normal", "t" (Student's, three degrees of freedom). Or the tiny model's: "tiny" for all of its
    linears in one vector, "SiLU" for the outputs of that in layer 2, or one matrix, such as "layers.3.mlp.down_proj".
    """
    n = 1 << 17
    if name == "tiny":
        return torch.cat([w.flatten() for w in _weights().values()])
    if name == "SiLU":
        return _silu()
    if name == "uniform":
        return torch.rand(n, generator=torch.Generator().manual_seed(3)) * 2 - 1
    if name == "normal":
        return normal(n, seed=3)
    if name == "t":
        return student()
    return _weights()[f"model.{name}.weight"]


def _size(block: int | str, x: Tensor) -> int:
    return {"row": x.shape[-1], "tensor": WHOLE}.get(block, block)


def _restored(x: Tensor, levels: str, block: int | str) -> Tensor:
    return dequantize_blockwise(quantize_blockwise(x, CODEBOOKS[levels], _size(block, x)))


# Errors


@functools.cache
def snr_db(name: str, levels: str = "INT4", block: int | str = 64, kept: float = 0.0) -> float:
    """Signal to noise of what comes back, dB; the share ``kept`` of the values, the largest, stays apart as it is."""
    x = data(name).flatten()
    apart = x.abs().topk(int(kept * len(x))).indices
    restored = _restored(x.index_fill(0, apart, 0), levels, _size(block, data(name)))
    return signal_to_noise(x, restored.index_copy(0, apart, x[apart]))


def error_percent(name: str, levels: str = "INT4", block: int | str = 64, kept: float = 0.0) -> float:
    """Relative error of what comes back: that of :func:`snr_db` without the logarithm."""
    return 100 * 10 ** (-snr_db(name, levels, block, kept) / 20)


def gain_db(name: str, more: tuple, over: tuple) -> float:
    """What the levels and block of ``more`` bring over those of ``over``, dB."""
    return snr_db(name, *more) - snr_db(name, *over)


@functools.cache
def _heavy_gains(block: int | str) -> list[float]:
    draws = [student(seed) for seed in range(8)]
    codebooks = [CODEBOOKS[levels] for levels in ("INT3", "INT4")]
    return [_gain(x, codebooks, _size(block, x)) for x in draws]


def _gain(x: Tensor, codebooks: list[Tensor], size: int) -> float:
    less, more = (signal_to_noise(x, dequantize_blockwise(quantize_blockwise(x, codebook, size))) for codebook in codebooks)
    return more - less


def heavy_gain_db(block: int | str, of: str) -> float:
    """What the fourth bit brings on Student's t, dB: the "least" or the "most" of eight draws, which differ in their largest values."""
    return {"least": min, "most": max}[of](_heavy_gains(block))


def mean_error(name: str, levels: str) -> float:
    """Mean absolute error over the standard deviation, blocks of 64."""
    return blockwise.mean_absolute_error(data(name), _restored(data(name), levels, 64)) / data(name).std().item()


def crest(name: str, block: int | str = 64) -> float:
    """Root mean square of the blocks' absmax over that of the values."""
    x = data(name).flatten()
    absmax = blockwise.scale_blocks(x, _size(block, data(name)))[1]
    return (absmax.square().mean() / x.square().mean()).sqrt().item()


def predicted_db(name: str) -> float:
    """m·√12 over the crest factor, dB, for INT4 in blocks of 64: the error is even over a step."""
    return 20 * math.log10(7 * math.sqrt(12) / crest(name))


def predicted_percent(name: str) -> float:
    """The relative error that :func:`predicted_db` says."""
    return 100 * 10 ** (-predicted_db(name) / 20)


def error_is_half_a_step() -> bool:
    x = normal(1000, seed=3)
    return bool((x - _restored(x, "INT4", "tensor")).abs().max() <= x.abs().max() / 7 * 0.5000001)


def extra_level_db() -> float:
    """What the 16th level brings, dB, if the largest value of every block is put at −8: tiny model's weights, blocks of 64."""
    blocks = data("tiny").view(-1, 64)
    sign = -blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).sign()
    lopsided = dequantize_blockwise(quantize_blockwise(blocks * sign, torch.arange(-8, 8) / 8, 64))
    return signal_to_noise(blocks, lopsided * sign) - snr_db("tiny")


def ties_in_bfloat16_percent() -> float:
    """Weights exactly between two codes of INT4, blocks of 64."""
    steps = blockwise.scale_blocks(data("tiny").bfloat16(), 64)[0] * 7
    return 100 * (steps.abs() % 1 == 0.5).float().mean().item()


def zero_point_gain_db(name: str) -> float:
    """What a zero point brings in eight bits with one scale, dB."""
    x = data(name)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round()
    restored = (((x / scale).round() + zero).clamp(0, 255) - zero) * scale
    return signal_to_noise(x, restored) - snr_db(name, "INT8", "tensor")


def zeroed_by_one_outlier_percent() -> float:
    """64 × 64 normal weights, INT4, one scale: how many more are rounded to zero once one of them is 40 σ large."""
    x = normal(64, 64, seed=3)
    y = x.clone()
    y[20, 37] = 40
    zeros = [(quantize_blockwise(t, CODEBOOKS["INT4"], WHOLE).codes == 7).sum().item() for t in (x, y)]
    return 100 * (zeros[1] - zeros[0]) / x.numel()


def gains_are_those_of_the_largest_code() -> bool:
    """On uniform numbers one more bit brings what the ratio of the largest codes says, to a tenth of a decibel."""
    for less, more in itertools.pairwise(range(2, 9)):
        said = 20 * math.log10((2 ** (more - 1) - 1) / (2 ** (less - 1) - 1))
        if abs(gain_db("uniform", (f"INT{more}", "tensor"), over=(f"INT{less}", "tensor")) - said) > 0.1:
            return False
    return True


def row_scales_db(keepdim: bool) -> float:
    """Signal to noise, dB, of a square matrix in INT4 with a scale for each row; without ``keepdim`` they multiply columns."""
    w = data("layers.0.self_attn.q_proj")
    scales = w.abs().amax(1, keepdim=True) / 7
    return signal_to_noise(w, (w / scales).round() * (scales if keepdim else scales.squeeze()))


# Prices


def bits(levels: str = "INT4", block: int | str = 64) -> float:
    """Per value, float32 scales included; the whole "tensor" is 65,536 values."""
    x = torch.ones(1 << 16)
    return quantize_blockwise(x, CODEBOOKS[levels], _size(block, x)).bits_per_value


def more_bits(one: tuple, than: tuple) -> float:
    """Per value, of the levels and block of ``one``."""
    return bits(*one) - bits(*than)


def kept_bits(share: float) -> float:
    """Per value, of keeping this share of the values in 16 bits, with a 32-bit position."""
    return share * (16 + 32)


def halving_rate(block: int) -> float:
    """Decibels per bit spent on halving the block, tiny model's weights, INT4."""
    return gain_db("tiny", ("INT4", block // 2), over=("INT4", block)) / more_bits(("INT4", block // 2), than=("INT4", block))


# Levels


def fp4_percent(code: int) -> float:
    """Normal values, blocks of 64, that get this code of FP4 whatever their sign: 0 is zero, 1 the level next to it."""
    codes = quantize_blockwise(data("normal"), CODEBOOKS["FP4"], 64).codes & 7
    return 100 * (codes == code).float().mean().item()


def fp4_is_e2m1_but_for_one_level() -> bool:
    one, other = (CODEBOOKS[levels].abs().unique() for levels in ("FP4", "E2M1"))
    return torch.allclose(one[2:], other[2:]) and not torch.allclose(one[1], other[1])


def generator_level() -> float:
    """The level next to zero that bitsandbytes' own generator of small floats gives, over 1."""
    import bitsandbytes.functional as bnb

    levels = bnb.create_fp8_map(signed=True, exponent_bits=2, precision_bits=1, total_bits=4)
    return 1 / levels[levels > 0].min().item()


# The same function, harder weights


@functools.cache
@torch.no_grad()
def _rewritten(factor: float = 20.0) -> nn.Module:
    """One channel before each matrix divided by ``factor``, the column that reads it multiplied: the same function."""
    model = copy.deepcopy(_tiny())
    for number, layer in enumerate(model.model.layers):
        attention, mlp, channel = layer.self_attn, layer.mlp, 17 * number + 5
        for before, after in (
            (layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj.weight, (mlp.down_proj,)),
        ):
            before[channel] /= factor
            for linear in after:
                linear.weight[:, channel] *= factor
    return model


def rewriting_keeps_the_function() -> bool:
    ids = World().sample("general", 8, 48, seed=9)
    with torch.no_grad():
        return torch.allclose(_tiny()(input_ids=ids).logits, _rewritten()(input_ids=ids).logits, atol=1e-3)


@torch.no_grad()
def nats_left(levels: str | None = None, block: int | str = 64, rewritten: bool = False) -> float:
    """Nats per token above the floor of the tiny model, as trained or ``rewritten``, with every linear quantized; None leaves all as it is.

    A row or a "column" can be a block here, since their lengths are powers of two.
    """
    model = copy.deepcopy(_rewritten() if rewritten else _tiny())
    for name in _weights() if levels else ():
        w = model.get_parameter(name)
        w.copy_(_restored(w.T, levels, "row").T if block == "column" else _restored(w, levels, block))
    return training.above_floor(model, World(), "general", rows=32)


# Beside bitsandbytes


def fp4_is_bitsandbytes() -> bool:
    """Codes and scales, bit for bit."""
    import bitsandbytes.functional as bnb

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n in (1024, 65):
            x = normal(n, seed=3).to(dtype)
            packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="fp4")
            q = quantize_blockwise(x, CODEBOOKS["FP4"], 64)
            theirs = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:n]
            if not (torch.equal(q.codes, theirs) and torch.equal(q.absmax, state.absmax)):
                return False
    return True


@functools.cache
def _eight_bits() -> tuple[Tensor, Tensor]:
    """Codes of normal values: bitsandbytes' on a CPU, and the nearest."""
    import bitsandbytes.functional as bnb

    code = bnb.create_dynamic_map()
    return bnb.quantize_blockwise(data("normal"), code=code, blocksize=256)[0], quantize_blockwise(data("normal"), code, 256).codes


def eight_bit_codes_that_differ_percent() -> float:
    """Of bitsandbytes' 8-bit codes on a CPU, from the nearest; dynamic map, blocks of 256."""
    theirs, nearest = _eight_bits()
    return 100 * (theirs != nearest).float().mean().item()


def eight_bit_levels_used() -> int:
    """Of the 256, by the 131,072 values."""
    return len(_eight_bits()[0].unique())
