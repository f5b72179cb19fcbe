"""What unit 03 states: errors on seeded numbers and on the tiny model's weights, prices counted, codes held against bitsandbytes'."""

import copy
import functools
import itertools
import math

import torch
from torch import Tensor, nn

from course.lab import models, training
from course.lab.world import World
from reference import blockwise
from reference.blockwise import dequantize_blockwise, fp4_codebook, int_codebook, quantize_blockwise, signal_to_noise
from reference.model_shapes import LLAMA_2_7B

WHOLE = 1 << 20  # a block that holds any tensor used here
CPU = torch.device("cpu")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@functools.cache
def _tiny() -> nn.Module:
    return models.load("tiny", where=CPU)[0]


@functools.cache
def _weights() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in _tiny().named_parameters() if name.endswith("_proj.weight")}


@functools.cache
def _data(name: str) -> Tensor:
    n = 1 << 17
    if name == "tiny":
        return torch.cat([w.flatten() for w in _weights().values()])
    if name == "uniform":
        return torch.rand(n, generator=_generator()) * 2 - 1
    normal = torch.randn(n, generator=_generator())
    if name == "normal":
        return normal
    chi = torch.randn(3, n, generator=torch.Generator().manual_seed(4)).square().sum(0)
    return normal / (chi / 3).sqrt()  # Student's t, three degrees of freedom


def _back(x: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    return dequantize_blockwise(quantize_blockwise(x, codebook, block_size))


@functools.cache
def _db(name: str, bits: int, block_size: int) -> float:
    return signal_to_noise(_data(name), _back(_data(name), int_codebook(bits), block_size))


def _e2m1() -> Tensor:
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    return torch.cat([magnitudes, -magnitudes[1:]])


def _e4m3() -> Tensor:
    levels = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    return levels[levels.isfinite()] / 448


# A code and a scale


def error_is_half_a_step() -> bool:
    x = torch.randn(1000, generator=_generator())
    return bool((x - _back(x, int_codebook(4), WHOLE)).abs().max() <= x.abs().max() / 7 * 0.5000001)


def extra_level_db() -> float:
    """What the 16th level brings if the largest value of every block is put at −8, tiny model's weights, blocks of 64."""
    blocks = _data("tiny").view(-1, 64)
    sign = -blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).sign()
    lopsided = torch.arange(-8, 8) / 8
    return signal_to_noise(blocks, _back(blocks * sign, lopsided, 64) * sign) - _db("tiny", 4, 64)


def ties_in_bfloat16_percent() -> float:
    """Weights exactly between two codes of INT4, blocks of 64."""
    steps = blockwise.scale_blocks(_data("tiny").bfloat16(), 64)[0] * 7
    return 100 * (steps.abs() % 1 == 0.5).float().mean().item()


# A zero point


@functools.cache
def _silu() -> Tensor:
    seen, mlp = [], _tiny().model.layers[2].mlp
    hook = mlp.act_fn.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    with torch.no_grad():
        _tiny()(input_ids=World().sample("general", 16, 48, seed=3))
    hook.remove()
    return seen[0]


def _affine_db(x: Tensor, bits: int = 8) -> float:
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return signal_to_noise(x, (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale)


def zero_point_gain_silu_db() -> float:
    return _affine_db(_silu()) - signal_to_noise(_silu(), _back(_silu(), int_codebook(8), WHOLE))


def zero_point_gain_weights_db() -> float:
    w = _weights()["model.layers.2.mlp.up_proj.weight"]
    return _affine_db(w) - signal_to_noise(w, _back(w, int_codebook(8), WHOLE))


# Whose largest value


def _down(block_size: int) -> float:
    w = _weights()["model.layers.3.mlp.down_proj.weight"]  # (128, 512): a row is a block of 512
    return signal_to_noise(w, _back(w, int_codebook(4), block_size))


def down_tensor_db() -> float:
    return _down(WHOLE)


def down_row_db() -> float:
    return _down(512)


def down_64_db() -> float:
    return _down(64)


def down_16_db() -> float:
    return _down(16)


def down_crest() -> float:
    """Largest weight over the root mean square."""
    w = _weights()["model.layers.3.mlp.down_proj.weight"]
    return (w.abs().max() / w.square().mean().sqrt()).item()


def _kept(share: float, block_size: int) -> float:
    """INT4 with the largest ``share`` of the weights kept apart."""
    w = _weights()["model.layers.3.mlp.down_proj.weight"].flatten()
    kept = w.abs().topk(int(share * len(w))).indices
    restored = _back(w.index_fill(0, kept, 0), int_codebook(4), block_size)
    return signal_to_noise(w, restored.index_copy(0, kept, w[kept]))


def down_tensor_kept_db() -> float:
    """One in a thousand kept."""
    return _kept(0.001, WHOLE)


def down_64_kept_db() -> float:
    return _kept(0.001, 64)


def kept_price_bits() -> float:
    """Of one value in a thousand in 16 bits, with a 32-bit position."""
    return 0.001 * (16 + 32)


def bits_block_64() -> float:
    return quantize_blockwise(torch.ones(4096), int_codebook(4), 64).bits_per_value


def bits_block_16() -> float:
    return quantize_blockwise(torch.ones(4096), int_codebook(4), 16).bits_per_value


def bits_row_512() -> float:
    return quantize_blockwise(torch.ones(128, 512), int_codebook(4), 512).bits_per_value


def bits_one_scale() -> float:
    return quantize_blockwise(torch.ones(128, 512), int_codebook(4), 1 << 16).bits_per_value


def bits_row_4096() -> float:
    return quantize_blockwise(torch.ones(4096, 4), int_codebook(4), 4096).bits_per_value


def scales_7b_gigabytes() -> float:
    """Float32 scales of all linears of Llama-2-7B's layers, blocks of 64."""
    return LLAMA_2_7B.linear_parameters / 64 * 4 / 1e9


def zeroed_by_one_outlier_percent() -> float:
    """64 × 64 normal weights, INT4, one scale: how many more are rounded to zero once one of them is 40 σ large."""
    x = torch.randn(64, 64, generator=_generator())
    y = x.clone()
    y[20, 37] = 40
    zeros = [(quantize_blockwise(t, int_codebook(4), WHOLE).codes == 7).sum().item() for t in (x, y)]
    return 100 * (zeros[1] - zeros[0]) / x.numel()


# Spending bits


def uniform_db() -> float:
    return _db("uniform", 4, 64)


def uniform_4096_db() -> float:
    return _db("uniform", 4, 4096)


def normal_db() -> float:
    return _db("normal", 4, 64)


def normal_4096_db() -> float:
    return _db("normal", 4, 4096)


def tiny_db() -> float:
    return _db("tiny", 4, 64)


def tiny_4096_db() -> float:
    return _db("tiny", 4, 4096)


def t_db() -> float:
    return _db("t", 4, 64)


def t_4096_db() -> float:
    return _db("t", 4, 4096)


def _rate(block_size: int) -> float:
    """Decibels for each bit spent on halving the block, float32 scales."""
    return (_db("tiny", 4, block_size // 2) - _db("tiny", 4, block_size)) / (32 / block_size)


def halving_256_rate() -> float:
    return _rate(256)


def halving_128_rate() -> float:
    return _rate(128)


def halving_64_rate() -> float:
    return _rate(64)


def fifth_bit_rate() -> float:
    return _db("tiny", 5, 64) - _db("tiny", 4, 64)


def int5_1024_costs_more() -> float:
    x = torch.ones(1 << 15)
    return quantize_blockwise(x, int_codebook(5), 1024).bits_per_value - quantize_blockwise(x, int_codebook(4), 32).bits_per_value


def int5_1024_gains_db() -> float:
    return _db("tiny", 5, 1024) - _db("tiny", 4, 32)


def int5_1024_beats_int4_32() -> bool:
    """Nearly the same price, 5.03 against 5 bits, a better result."""
    return _db("tiny", 5, 1024) > _db("tiny", 4, 32)


# Levels


def _with(codebook: Tensor, name: str, measure) -> float:
    return measure(_data(name), _back(_data(name), codebook, 64)) / (1.0 if measure is signal_to_noise else _data(name).std().item())


def int4_normal_error() -> float:
    """Mean absolute error over σ, blocks of 64; so are the next."""
    return _with(int_codebook(4), "normal", blockwise.mean_absolute_error)


def fp4_normal_error() -> float:
    return _with(fp4_codebook(), "normal", blockwise.mean_absolute_error)


def e2m1_normal_error() -> float:
    return _with(_e2m1(), "normal", blockwise.mean_absolute_error)


def fp4_normal_db() -> float:
    return _with(fp4_codebook(), "normal", signal_to_noise)


def e2m1_normal_db() -> float:
    return _with(_e2m1(), "normal", signal_to_noise)


def fp4_uniform_db() -> float:
    return _with(fp4_codebook(), "uniform", signal_to_noise)


def e2m1_uniform_db() -> float:
    return _with(_e2m1(), "uniform", signal_to_noise)


def fp4_tiny_db() -> float:
    return _with(fp4_codebook(), "tiny", signal_to_noise)


def e2m1_tiny_db() -> float:
    return _with(_e2m1(), "tiny", signal_to_noise)


def fp4_t_db() -> float:
    return _with(fp4_codebook(), "t", signal_to_noise)


def e2m1_t_db() -> float:
    return _with(_e2m1(), "t", signal_to_noise)


def fp4_near_zero_percent() -> float:
    """Normal values, blocks of 64, that get one of FP4's two levels next to zero."""
    codes = quantize_blockwise(_data("normal"), fp4_codebook(), 64).codes & 7
    return 100 * (codes == 1).float().mean().item()


def fp4_zero_percent() -> float:
    codes = quantize_blockwise(_data("normal"), fp4_codebook(), 64).codes & 7
    return 100 * (codes == 0).float().mean().item()


def fp4_is_e2m1_but_for_one_level() -> bool:
    one, other = fp4_codebook().abs().unique(), _e2m1().abs().unique()
    return torch.allclose(one[2:], other[2:]) and not torch.allclose(one[1], other[1])


def generator_level() -> float:
    """The level next to zero that bitsandbytes' own generator of small floats gives, over 1."""
    import bitsandbytes.functional as bnb

    levels = bnb.create_fp8_map(signed=True, exponent_bits=2, precision_bits=1, total_bits=4)
    return 1 / levels[levels > 0].min().item()


# Six decibels a bit


def first_gain_db() -> float:
    """From 2 to 3 bits, uniform numbers."""
    return _db("uniform", 3, WHOLE) - _db("uniform", 2, WHOLE)


def second_gain_db() -> float:
    return _db("uniform", 4, WHOLE) - _db("uniform", 3, WHOLE)


def last_gain_db() -> float:
    """From 7 to 8."""
    return _db("uniform", 8, WHOLE) - _db("uniform", 7, WHOLE)


def t_gain_one_scale_db() -> float:
    """From 3 to 4 bits, Student's t, one scale."""
    return _db("t", 4, WHOLE) - _db("t", 3, WHOLE)


def t_gain_blocks_db() -> float:
    return _db("t", 4, 64) - _db("t", 3, 64)


def t_int8_one_scale_db() -> float:
    return _db("t", 8, WHOLE)


def t_int8_blocks_db() -> float:
    return _db("t", 8, 64)


def t_fp8_one_scale_db() -> float:
    return signal_to_noise(_data("t"), _back(_data("t"), _e4m3(), WHOLE))


def t_fp8_blocks_db() -> float:
    return signal_to_noise(_data("t"), _back(_data("t"), _e4m3(), 64))


def crest_64() -> float:
    """Root mean square of absmax over σ, blocks of 64 normal values."""
    return _data("normal").view(-1, 64).abs().amax(1).square().mean().sqrt().item()


def predicted_normal_db() -> float:
    """m·√12 over that crest factor, in decibels: the error is even over a step."""
    return 20 * math.log10(7 * math.sqrt(12) / crest_64())


def gains_are_those_of_the_largest_code() -> bool:
    """On uniform numbers one more bit brings what the ratio of the largest codes says, to a tenth of a decibel."""
    gains = [_db("uniform", b + 1, WHOLE) - _db("uniform", b, WHOLE) for b in range(2, 8)]
    largest = [2 ** (b - 1) - 1 for b in range(2, 9)]
    said = [20 * math.log10(more / less) for less, more in itertools.pairwise(largest)]
    return all(abs(one - other) < 0.1 for one, other in zip(gains, said, strict=True))


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


@torch.no_grad()
def _left(model: nn.Module, bits: int, how) -> float:
    """Nats above the floor with every linear quantized; ``how`` is a block size, "row" or "column".

    A row or a column is a block here, since their lengths are powers of two.
    """
    model, codebook = copy.deepcopy(model), int_codebook(bits)
    for name in _weights():
        w = model.get_parameter(name)
        if how == "column":
            w.copy_(_back(w.T, codebook, len(w)).T)
        else:
            w.copy_(_back(w, codebook, w.shape[1] if how == "row" else how))
    return training.above_floor(model, World(), "general", rows=32)


def rewriting_keeps_the_function() -> bool:
    ids = World().sample("general", 8, 48, seed=9)
    with torch.no_grad():
        return torch.allclose(_tiny()(input_ids=ids).logits, _rewritten()(input_ids=ids).logits, atol=1e-3)


def as_is_left() -> float:
    return training.above_floor(_tiny(), World(), "general", rows=32)


def as_is_tensor_left() -> float:
    return _left(_tiny(), 4, WHOLE)


def as_is_row_left() -> float:
    return _left(_tiny(), 4, "row")


def as_is_64_left() -> float:
    return _left(_tiny(), 4, 64)


def as_is_16_left() -> float:
    return _left(_tiny(), 4, 16)


def as_is_column_left() -> float:
    return _left(_tiny(), 4, "column")


def rewritten_tensor_left() -> float:
    return _left(_rewritten(), 4, WHOLE)


def rewritten_row_left() -> float:
    return _left(_rewritten(), 4, "row")


def rewritten_64_left() -> float:
    return _left(_rewritten(), 4, 64)


def rewritten_16_left() -> float:
    return _left(_rewritten(), 4, 16)


def rewritten_column_left() -> float:
    return _left(_rewritten(), 4, "column")


def rewritten_int8_row_left() -> float:
    return _left(_rewritten(), 8, "row")


# Going wrong, and going right


def wrong_axis_db() -> float:
    """Row scales without ``keepdim`` on a square matrix."""
    w = _weights()["model.layers.0.self_attn.q_proj.weight"]
    scales = w.abs().amax(1) / 7
    return signal_to_noise(w, (w / scales[:, None]).round() * scales)


def right_axis_db() -> float:
    w = _weights()["model.layers.0.self_attn.q_proj.weight"]
    scales = w.abs().amax(1, keepdim=True) / 7
    return signal_to_noise(w, (w / scales).round() * scales)


def fp4_is_bitsandbytes() -> bool:
    import bitsandbytes.functional as bnb

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for n in (1024, 65):
            x = torch.randn(n, generator=_generator()).to(dtype)
            packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="fp4")
            q, theirs = quantize_blockwise(x, fp4_codebook(), 64), torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1)[:n]
            if not (torch.equal(q.codes, theirs) and torch.equal(q.absmax, state.absmax)):
                return False
    return True


@functools.cache
def _eight_bits() -> tuple[Tensor, Tensor]:
    """Codes of normal values: bitsandbytes' on a CPU, and the nearest."""
    import bitsandbytes.functional as bnb

    code = bnb.create_dynamic_map()
    return bnb.quantize_blockwise(_data("normal"), code=code, blocksize=256)[0], quantize_blockwise(_data("normal"), code, 256).codes


def eight_bit_codes_that_differ_percent() -> float:
    theirs, nearest = _eight_bits()
    return 100 * (theirs != nearest).float().mean().item()


def eight_bit_levels_used() -> int:
    return len(_eight_bits()[0].unique())
