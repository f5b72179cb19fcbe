"""What unit 06 states: bytes from shapes, identities checked on small tensors, and what the GPU and the tiny model measured."""

import copy
import math
import statistics
from functools import cache, partial

import torch
from scipy.stats import ttest_ind
from torch import Tensor, nn

from course.lab import evaluation, live, models, recorded
from course.lab.quantized import quantized_copy
from course.lab.traffic import MovedBytes
from course.lab.world import World
from reference.blockwise import midpoints
from reference.lora import LoRALinear
from reference.memory import training_memory
from reference.memory.recipes import LORA, QLORA, nf4_bytes, weights
from reference.model_shapes import GEMMA_3_270M, LLAMA_2_7B, LLAMA_2_70B, ModelShape
from reference.nf4 import NF4_CODEBOOK, dequantize_nf4, quantize_nf4
from reference.qlora import NF4Linear, merge_errors, quantize_linears

# Counting


def bits_per_weight() -> float:
    """NF4 in blocks of 64 with double quantization, in a layer of 4096 × 4096."""
    return 8 * nf4_bytes(4096**2) / 4096**2


def saved_bytes_per_weight() -> float:
    return 2 - bits_per_weight() / 8


def _gigabytes(shape: ModelShape, recipe) -> float:
    """Of the weights alone; in 4 bits with embedding and head in 16."""
    return weights(shape, recipe).bytes / 1e9


llama7b_weights_16_bit = partial(_gigabytes, LLAMA_2_7B, LORA)
llama7b_weights_4_bit = partial(_gigabytes, LLAMA_2_7B, QLORA)
llama70b_weights_16_bit = partial(_gigabytes, LLAMA_2_70B, LORA)
llama70b_weights_4_bit = partial(_gigabytes, LLAMA_2_70B, QLORA)


def llama70b_peak() -> float:
    """Predicted peak of a step, GB: r = 16 on all linears, 1 × 2048 tokens, checkpointing."""
    return training_memory(LLAMA_2_70B, QLORA, 1, 2048, 16, checkpointing=True).peak / 1e9


def llama70b_fits_48_gigabytes() -> bool:
    return llama70b_peak() < 48


def llama7b_cast_gigabytes() -> float:
    """What casting all that is not quantized to float32 adds."""
    return 2 * (LLAMA_2_7B.parameters - LLAMA_2_7B.linear_parameters) / 1e9


def gemma_saved_megabytes() -> float:
    """What quantizing the linears saves."""
    return saved_bytes_per_weight() * GEMMA_3_270M.linear_parameters / 1e6


def gemma_cast_megabytes() -> float:
    return 2 * (GEMMA_3_270M.parameters - GEMMA_3_270M.linear_parameters) / 1e6


def gemma_embedding_share() -> float:
    """In per cent of all parameters."""
    return 100 * GEMMA_3_270M.embedding / GEMMA_3_270M.parameters


def break_even_share() -> float:
    """Embedding over linears at which the cast of a tied embedding undoes the saving, in per cent."""
    return 100 * saved_bytes_per_weight() / 2


# Identities


@cache
def _layer() -> tuple[nn.Linear, NF4Linear]:
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 192, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=g) / 16)
    return linear, NF4Linear.from_linear(linear, compute_dtype=torch.float32)


def gradient_is_grad_times_weight() -> bool:
    """∂L/∂x = ∂L/∂y · Ŵ, as through the dense Ŵ."""
    _, layer = _layer()
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (packed,) = torch.autograd.grad(layer(x).square().sum(), x)
    (dense,) = torch.autograd.grad(nn.functional.linear(x, layer.dequantize()).square().sum(), x)
    return torch.allclose(packed, dense, rtol=1e-5, atol=1e-5)


def _kept(forward, owner: nn.Module) -> int:
    x = torch.randn(9, 256, requires_grad=True)
    with live.SavedForBackward(owner) as saved:
        forward(x)
    return saved.bytes


def backward_keeps_nothing_new() -> bool:
    _, layer = _layer()
    return _kept(layer, layer) == 0


def naive_backward_keeps_the_dense_weight() -> bool:
    _, layer = _layer()
    dense = 4 * layer.in_features * layer.out_features
    return _kept(lambda x: nn.functional.linear(x, layer.dequantize()), layer) == dense


def _adapted(size: float, seed: int = 0) -> tuple[LoRALinear, Tensor]:
    """A QLoRA layer whose update has ``size`` of the weight's norm; and the original weight."""
    linear, packed = _layer()
    layer = LoRALinear(copy.deepcopy(packed), 4, 10)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=g))
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g))
        layer.lora_B.mul_(size * linear.weight.norm() / layer.delta_weight().norm())
    return layer, linear.weight.detach().bfloat16()


def _merge_error(way: str, size: float) -> float:
    """In multiples of the update's own norm, for an update of ``size`` of the weight's norm; 16 bits are bfloat16."""
    layer, original = _adapted(size)
    trained = layer.base.dequantize() + layer.delta_weight()
    error = merge_errors(layer, original)[way] * trained.norm() if way != "dequantized" else (trained.bfloat16() - trained).norm()
    return (error / layer.delta_weight().norm()).item()


dequantized_error_large = partial(_merge_error, "dequantized", 0.5)
dequantized_error_small = partial(_merge_error, "dequantized", 0.01)
requantized_error_large = partial(_merge_error, "requantized", 0.5)
requantized_error_small = partial(_merge_error, "requantized", 0.01)
original_error_large = partial(_merge_error, "original", 0.5)
original_error_small = partial(_merge_error, "original", 0.01)


def requantized_update_tiny_is_lost() -> bool:
    """An update of a ten-thousandth of the weight's norm changes less than one code in a hundred, without double quantization."""
    linear, _ = _layer()
    q = quantize_nf4(linear.weight)
    restored = dequantize_nf4(q)
    g = torch.Generator().manual_seed(3)
    update = torch.randn(linear.weight.shape, generator=g) * 1e-4 * linear.weight.norm() / math.sqrt(linear.weight.numel())
    return (quantize_nf4(restored + update).packed != q.packed).float().mean().item() < 0.01


def nan_is_refused_by_name() -> bool:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data[3, 4] = float("nan")
    try:
        quantize_linears(model)
    except ValueError as error:
        return "1.weight" in str(error) and type(model[0]) is nn.Linear  # and nothing was changed
    return False


def nothing_lost_in_20() -> float:
    """Upper end of the 95 % interval, in points, when none of 20 answers changed."""
    return 100 * evaluation.compare_answers([True] * 20, [True] * 20).high


def questions_for_two_percent() -> int:
    """How many questions without any change it takes to show a loss below 2 points."""
    n = 20
    while evaluation.compare_answers([True] * n, [True] * n).high > 0.02:
        n += 1
    return n


def one_in_twenty_is_often_not_seen() -> bool:
    """A model that loses one answer in twenty loses none of twenty in more than a third of all samples."""
    return 0.95**20 > 1 / 3


def pairing_narrows() -> float:
    """64 sequences, INT4 with one scale a matrix, the tiny model: the interval of two averages over the paired one."""
    world, model = World(), models.load("tiny", where=torch.device("cpu"))[0]
    ids = world.sample("general", 64, 48, seed=11)
    before, after = (evaluation.sequence_losses(m, ids) for m in (model, quantized_copy(model, "INT4", 1 << 16)))
    paired, averages = evaluation.compare_losses(before, after), ttest_ind(after, before).confidence_interval()
    return float((averages.high - averages.low) / (paired.high - paired.low))


# Measured: memory


@cache
def _memory() -> dict:
    rows = recorded.load("qlora_memory", device="h100")["result"]["rows"]
    return {(row["shape"], row["batch"], row["sequence"], row["how"]): row for row in rows if "error" not in row}


def _peak(shape: str, batch: int, sequence: int, how: str) -> float:
    return _memory()[shape, batch, sequence, how]["peak"] / 1e9


SMALL = "Llama with Gemma-3-270M's sizes"
PEERS = "QLoRA, peft + bitsandbytes"
llama7b_peak_lora = partial(_peak, "Llama-2-7B", 4, 512, "LoRA")
llama7b_peak_qlora = partial(_peak, "Llama-2-7B", 4, 512, "QLoRA")
llama7b_peak_peers = partial(_peak, "Llama-2-7B", 4, 512, PEERS)
llama7b_peak_prepared = partial(_peak, "Llama-2-7B", 4, 512, f"{PEERS}, prepared")
small_peak_lora = partial(_peak, SMALL, 1, 128, "LoRA")
small_peak_qlora = partial(_peak, SMALL, 1, 128, "QLoRA")
small_peak_peers = partial(_peak, SMALL, 1, 128, PEERS)
small_peak_prepared = partial(_peak, SMALL, 1, 128, f"{PEERS}, prepared")


def llama7b_peak_predicted() -> float:
    return _memory()["Llama-2-7B", 4, 512, "QLoRA"]["predicted"] / 1e9


def ours_over_peers() -> float:
    """The largest ratio of peaks over the 7B cases."""
    ratios = recorded.load("qlora_memory", device="h100")["result"]["ours_over_peers"]
    return max(ratio for case, ratio in ratios.items() if case.startswith("Llama-2-7B"))


def small_prepared_needs_more() -> bool:
    return small_peak_prepared() > small_peak_lora() > small_peak_qlora()


def _slower(batch: int, sequence: int) -> float:
    """Time of peft's step over bitsandbytes' packed layers, over that of its step over bf16 layers."""
    times = [_memory()["Llama-2-7B", batch, sequence, how]["seconds"] for how in (PEERS, "LoRA, peft")]
    return times[0] / times[1]


slower_few_tokens = partial(_slower, 1, 512)
slower_many_tokens = partial(_slower, 4, 2048)


# Measured: whole steps in processes under a cap


@cache
def _capped() -> dict:
    """Name of a model, "70B" -> what was measured, with bytes in GB."""
    found = {}
    for row in recorded.load("qlora_caps", device="h100")["result"]["rows"]:
        sizes = {"process": row["context"] + row["reserved"], "weights": row["built"] - row["adapters"]}
        sizes |= {key: row[key] for key in ("cap", "peak", "predicted")}
        found[row["name"]] = row | {key: count / 1e9 for key, count in sizes.items()}
    return found


def _of_capped(name: str, what: str) -> float:
    return _capped()[name][what]


capped_70b_cap = partial(_of_capped, "70B", "cap")
capped_70b_peak = partial(_of_capped, "70B", "peak")
capped_70b_predicted = partial(_of_capped, "70B", "predicted")
capped_70b_process = partial(_of_capped, "70B", "process")
capped_70b_seconds = partial(_of_capped, "70B", "seconds")
capped_33b_cap = partial(_of_capped, "33B", "cap")
capped_33b_peak = partial(_of_capped, "33B", "peak")
capped_33b_predicted = partial(_of_capped, "33B", "predicted")
capped_33b_process = partial(_of_capped, "33B", "process")
capped_33b_seconds = partial(_of_capped, "33B", "seconds")
capped_13b_cap = partial(_of_capped, "13B", "cap")
capped_13b_peak = partial(_of_capped, "13B", "peak")
capped_13b_predicted = partial(_of_capped, "13B", "predicted")
capped_13b_process = partial(_of_capped, "13B", "process")
capped_13b_seconds = partial(_of_capped, "13B", "seconds")
capped_7b_cap = partial(_of_capped, "7B", "cap")
capped_7b_peak = partial(_of_capped, "7B", "peak")
capped_7b_predicted = partial(_of_capped, "7B", "predicted")
capped_7b_process = partial(_of_capped, "7B", "process")
capped_7b_seconds = partial(_of_capped, "7B", "seconds")


def capped_70b_first_loss() -> float:
    return _of_capped("70B", "losses")[0]


def capped_70b_last_loss() -> float:
    return _of_capped("70B", "losses")[-1]


def capped_losses_fall() -> bool:
    """For all four, from that of guessing; 70B's goes back up almost all the way at two of its steps."""
    fall = all(row["losses"][-1] < row["losses"][0] - 0.09 and abs(row["losses"][0] - math.log(32000)) < 0.01 for row in _capped().values())
    losses = _of_capped("70B", "losses")
    return fall and sum(loss > losses[1] - 0.005 for loss in losses[5:]) == 2


def capped_processes_fit() -> bool:
    return all(row["process"] <= row["cap"] for row in _capped().values())


def capped_predictions_hold() -> bool:
    """Peak and weights to within a thousandth."""
    peaks = all(abs(row["predicted"] / row["peak"] - 1) < 1e-3 for row in _capped().values())
    return peaks and all(abs(row["predicted_parts"]["weights"] / 1e9 / row["weights"] - 1) < 1e-3 for row in _capped().values())


# Measured: kernels


@cache
def _speed() -> dict:
    return recorded.load("nf4_kernels", device="h100")["result"]


def _milliseconds(work: str, who: str, rows: int | None = None) -> float:
    (row,) = [row for row in _speed()["rows"] if row["work"] == work and row.get("rows") == rows]
    return row[who]


def copy_rate() -> float:
    """GB/s of a copy within the card, read and written."""
    return _speed()["copy_gigabytes_per_second"]


quantize_torch = partial(_milliseconds, "quantize", "torch")
quantize_bitsandbytes = partial(_milliseconds, "quantize", "bitsandbytes")
quantize_ours = partial(_milliseconds, "quantize", "ours")
quantize_floor = partial(_milliseconds, "quantize", "floor")
dequantize_torch = partial(_milliseconds, "dequantize", "torch")
dequantize_compiled = partial(_milliseconds, "dequantize", "torch.compile")
dequantize_bitsandbytes = partial(_milliseconds, "dequantize", "bitsandbytes")
dequantize_ours = partial(_milliseconds, "dequantize", "ours")
dequantize_floor = partial(_milliseconds, "dequantize", "floor")


def _over_bitsandbytes(work: str, rows: int | None = None) -> float:
    """How many times as fast as bitsandbytes."""
    return _milliseconds(work, "bitsandbytes", rows) / _milliseconds(work, "ours", rows)


quantize_speedup = partial(_over_bitsandbytes, "quantize")
dequantize_speedup = partial(_over_bitsandbytes, "dequantize")
one_row_over_bitsandbytes = partial(_over_bitsandbytes, "linear", 1)
rows_16_over_bitsandbytes = partial(_over_bitsandbytes, "linear", 16)
rows_2048_over_bitsandbytes = partial(_over_bitsandbytes, "linear", 2048)


def kernels_give_the_same() -> bool:
    """Codes as bitsandbytes', decoded weights as plain torch's and bitsandbytes', bit for bit."""
    return all(_speed()["equal"].values())


def bytes_that_must_move() -> float:
    """Per weight, between bfloat16 and NF4 in blocks of 64."""
    return 2 + 0.5 + 4 / 64


@cache
def _moved(work: str) -> float:
    """Bytes a weight that plain torch's operators read and write."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = quantize_nf4(weight)
    with MovedBytes() as moved:
        quantize_nf4(weight) if work == "quantize" else dequantize_nf4(q)
    return moved.bytes / weight.numel()


quantize_moved = partial(_moved, "quantize")
dequantize_moved = partial(_moved, "dequantize")


def _moved_milliseconds(work: str) -> float:
    """The counted bytes of plain torch's operators, at the rate of a copy."""
    return _moved(work) * _speed()["side"] ** 2 / (1e6 * copy_rate())


quantize_moved_milliseconds = partial(_moved_milliseconds, "quantize")
dequantize_moved_milliseconds = partial(_moved_milliseconds, "dequantize")


def moved_bytes_explain_plain_torch() -> bool:
    """They take three quarters of the measured time or more, and not more than it."""
    return all(0.75 < _moved_milliseconds(work) / _milliseconds(work, "torch") < 1 for work in ("quantize", "dequantize"))


def one_comparison_is_enough() -> bool:
    """Cut at (k − ½)/15, no cell holds two midpoints, and none lies within a thousandth of an edge."""
    between, edges = midpoints(NF4_CODEBOOK), (torch.arange(33) - 16.5) / 15
    apart = (between[:, None] - edges).abs().min()
    return bool(torch.searchsorted(between, edges).diff().max() == 1 and apart > 1e-3)


def _linear(who: str, rows: int) -> float:
    return _milliseconds("linear", who, rows)


def _both_ways(who: str, rows: int) -> float:
    """Milliseconds of the layer forward and backward."""
    return next(row for row in recorded.load("nf4_training", device="h100")["result"]["rows"] if row["rows"] == rows)[who]


trained_2048_ours = partial(_both_ways, "ours", 2048)
trained_2048_bitsandbytes = partial(_both_ways, "bitsandbytes", 2048)
trained_2048_16_bit = partial(_both_ways, "bf16 weights", 2048)
one_row_ours = partial(_linear, "ours", 1)
one_row_ours_double = partial(_linear, "ours, double quantization", 1)
one_row_bitsandbytes = partial(_linear, "bitsandbytes", 1)
one_row_16_bit = partial(_linear, "bf16 weights", 1)
one_row_floor = partial(_linear, "floor", 1)
rows_2_ours = partial(_linear, "ours", 2)
rows_16_ours = partial(_linear, "ours", 16)
rows_16_bitsandbytes = partial(_linear, "bitsandbytes", 16)
rows_16_16_bit = partial(_linear, "bf16 weights", 16)
rows_16_floor = partial(_linear, "floor", 16)
rows_64_ours = partial(_linear, "ours", 64)
rows_64_bitsandbytes = partial(_linear, "bitsandbytes", 64)
rows_64_16_bit = partial(_linear, "bf16 weights", 64)
rows_64_floor = partial(_linear, "floor", 64)
rows_512_ours = partial(_linear, "ours", 512)
rows_512_bitsandbytes = partial(_linear, "bitsandbytes", 512)
rows_512_16_bit = partial(_linear, "bf16 weights", 512)
rows_512_floor = partial(_linear, "floor", 512)
rows_2048_ours = partial(_linear, "ours", 2048)
rows_2048_bitsandbytes = partial(_linear, "bitsandbytes", 2048)
rows_2048_16_bit = partial(_linear, "bf16 weights", 2048)
rows_2048_floor = partial(_linear, "floor", 2048)
rows_8192_ours = partial(_linear, "ours", 8192)
rows_8192_bitsandbytes = partial(_linear, "bitsandbytes", 8192)
rows_8192_16_bit = partial(_linear, "bf16 weights", 8192)
rows_8192_floor = partial(_linear, "floor", 8192)


def _operations_per_second() -> float:
    """Of a product of bf16 matrices, 8192 × 8192 each."""
    return 2 * _speed()["side"] ** 3 / (1e-3 * _linear("floor", 8192))


def fewer_bytes() -> float:
    """bf16 weights over NF4's codes and float32 scales."""
    return 2 / (0.5 + 4 / 64)


def one_row_speedup() -> float:
    """Over bf16 weights."""
    return one_row_16_bit() / one_row_ours()


def one_row_share_of_the_rate() -> float:
    """Of the rate of a copy that the four-bit layer reaches, per cent."""
    return 100 * _linear("floor", 1) / one_row_ours()


def one_row_share_of_the_rate_16_bit() -> float:
    return 100 * 2 * _speed()["side"] ** 2 / (1e6 * copy_rate()) / one_row_16_bit()


def flat_to_64_rows() -> float:
    """How much longer bf16 weights take for 64 rows than for one, per cent."""
    return 100 * (rows_64_16_bit() / one_row_16_bit() - 1)


def _compiled(rows: str, what: str) -> float:
    """Of the kernel's loop as it is compiled for an H100: instructions a weight, milliseconds that starting all of them takes at least."""
    return recorded.load("nf4_instructions", device="cpu")["result"][rows][what]


one_row_instructions = partial(_compiled, "1 row", "instructions")
one_row_starting = partial(_compiled, "1 row", "milliseconds")
few_rows_instructions = partial(_compiled, "16 rows", "instructions")


def reading_alone() -> float:
    """Milliseconds in which a launch reads codes and scales of the same weight, and does nothing else."""
    return _speed()["reading"]


def reading_share_of_the_rate() -> float:
    """Of the rate of a copy that such a launch reaches, per cent."""
    return 100 * _linear("floor", 1) / reading_alone()


def decoding_hides() -> bool:
    """The layer takes less than a tenth longer than only reading its weight."""
    return one_row_ours() < 1.1 * reading_alone()


def _counted(kernel: str, what: str) -> float:
    """By the hardware's counters while the kernel runs: a count, or how busy a part of the GPU is, per cent."""
    return recorded.load("nf4_profile", device="h100")["result"]["kernels"][kernel][what]


few_rows_logic_busy = partial(_counted, "16 rows", "alu")
few_rows_tensor_busy = partial(_counted, "16 rows", "tensor")


def few_rows_logic_share() -> float:
    """Of all instructions of the kernel for 16 rows, per cent."""
    return 100 * _counted("16 rows", "alu instructions") / _counted("16 rows", "instructions")


def few_rows_cost_about_the_same() -> bool:
    """From 2 to 16 rows, within 5 per cent."""
    return rows_16_ours() < 1.05 * rows_2_ours()


def rows_that_fill_the_arithmetic() -> float:
    """Rows at which a bf16 layer's products take as long as reading its weight: 2 operations a row against 2 bytes."""
    return _operations_per_second() / (1e9 * copy_rate())


def four_bits_win_to_16_rows_and_lose_from_64() -> bool:
    return all(
        (_linear("ours", rows) < _linear("bf16 weights", rows)) == (rows <= 32) for rows in (1, 2, 4, 8, 16, 64, 128, 512, 2048, 8192)
    )


def many_rows_cost_decoding_and_product() -> bool:
    """Above 64 rows: decoding plus the product over bf16 weights, to within 4 per cent."""
    sums = {rows: dequantize_ours() + _linear("bf16 weights", rows) for rows in (128, 512, 2048, 8192)}
    return all(abs(both / _linear("ours", rows) - 1) < 0.04 for rows, both in sums.items())


def fused_beats_both_at_64() -> bool:
    """Decoding on the way still takes less than writing the weight out and multiplying."""
    return rows_64_ours() < 0.7 * (dequantize_ours() + rows_64_16_bit())


# Measured: whole training steps


@cache
def _steps() -> dict:
    rows = recorded.load("qlora_step", device="h100")["result"]["rows"]
    return {(row["how"], row["sequence"]): row for row in rows}


def _step(how: str, sequence: int, key: str = "seconds") -> float:
    """Of a step with 1 × 512 or 4 × 2048 tokens."""
    return _steps()[how, sequence][key]


step_few_peft = partial(_step, "peft", 512)
step_few_ours = partial(_step, "llama", 512)
step_few_graph = partial(_step, "llama, graph", 512)
step_few_compiled = partial(_step, "llama, compiled, graph", 512)
step_many_peft = partial(_step, "peft", 2048)
step_many_ours = partial(_step, "llama", 2048)
step_many_graph = partial(_step, "llama, graph", 2048)
step_many_compiled = partial(_step, "llama, compiled, graph", 2048)
step_many_plain_update = partial(_step, "llama, plain update", 2048)
step_few_plain_update = partial(_step, "llama, plain update", 512)
step_many_whole_logits = partial(_step, "llama, whole logits", 2048)
step_kernels_peft = partial(_step, "peft", 512, "kernels")


def step_few_times_faster() -> float:
    return step_few_peft() / step_few_compiled()


def step_many_times_faster() -> float:
    return step_many_peft() / step_many_compiled()


def step_few_busy_peft() -> float:
    """Share of the step, in per cent, in which a kernel runs."""
    return 100 * _step("peft", 512, "kernel_seconds") / step_few_peft()


def _step_peak(how: str, sequence: int) -> float:
    """GB."""
    return _step(how, sequence, "peak") / 1e9


step_many_peak_peft = partial(_step_peak, "peft", 2048)
step_many_peak_ours = partial(_step_peak, "llama, compiled, graph", 2048)
step_many_peak_graph = partial(_step_peak, "llama, graph", 2048)
step_many_peak_chunked = partial(_step_peak, "llama", 2048)
step_many_peak_plain_update = partial(_step_peak, "llama, plain update", 2048)
step_many_peak_whole_logits = partial(_step_peak, "llama, whole logits", 2048)


def step_many_less_memory() -> float:
    """Peak of peft + bitsandbytes over that of the compiled step."""
    return step_many_peak_peft() / step_many_peak_ours()


# Measured: quality of the tiny model


@cache
def _tiny() -> dict:
    return recorded.load("quantization_quality_tiny", device="cpu")["result"]


def _format(kind: str) -> dict:
    (row,) = [row for row in _tiny()["table"] if row["kind"] == kind]
    return row


def _lost(kind: str) -> float:
    """Nats per token on the general domain."""
    return _format(kind)["lost_nats"]["general"]["estimate"]


tiny_nf4_lost = partial(_lost, "NF4+DQ")


def _in_units(kind: str, what: str, unit: float) -> float:
    return _format(kind)[what] / unit


tiny_nf2_facts = partial(_in_units, "NF2", "facts", 0.01)  # per cent
tiny_int2_facts = partial(_in_units, "INT2", "facts", 0.01)
tiny_nf4_divergence = partial(_in_units, "NF4", "divergence", 1e-3)  # thousandths of a nat per token
tiny_int4_divergence = partial(_in_units, "INT4", "divergence", 1e-3)


def four_bits_cost_the_tiny_model_nothing() -> bool:
    """The interval of NF4's loss holds zero."""
    lost = _format("NF4+DQ")["lost_nats"]["general"]
    return lost["low"] <= 0 <= lost["high"]


def _won(domain: str, kind: str) -> tuple[float, list[float]]:
    (row,) = [row for row in _tiny()["won_back"] if (row["domain"], row["kind"]) == (domain, kind)]
    return row["before"], row["after"]


def tiny_int2_before() -> float:
    return _won("general", "INT2")[0]


def _after(domain: str, kind: str) -> float:
    """Nats above the floor after LoRA; mean over seeds."""
    return statistics.fmean(_won(domain, kind)[1])


tiny_int2_after = partial(_after, "general", "INT2")
tiny_base_after = partial(_after, "general", "16-bit")
tiny_clinic_base = partial(_after, "clinic", "16-bit")
tiny_clinic_nf4 = partial(_after, "clinic", "NF4")


def clinic_seeds_overlap() -> bool:
    """On the new domain the worst seed over the full base ends above the best over NF4."""
    return max(_won("clinic", "16-bit")[1]) > min(_won("clinic", "NF4")[1])


def lora_wins_back() -> float:
    """Of what INT2 and NF2 lost on known text, against LoRA on the 16-bit base: the smallest share over bases and seeds, per cent."""
    shares = []
    for kind in ("INT2", "NF2"):
        before, after = _won("general", kind)
        base_before, base_after = _won("general", "16-bit")
        shares += [1 - (a - b) / (before - base_before) for a, b in zip(after, base_after, strict=True)]
    return 100 * min(shares)


# Measured: quality of Gemma 3 270M


@cache
def _gemma() -> dict:
    return recorded.load("quantization_quality_gemma", device="h100")["result"]


def _perplexity(kind: str, text: str = "passages") -> float:
    """On prose (the passages) or another text."""
    return math.exp(_gemma()["formats"][kind][text])


gemma_16_bit = partial(_perplexity, "16-bit")
gemma_int8 = partial(_perplexity, "INT8")
gemma_nf4 = partial(_perplexity, "NF4")
gemma_nf4_dq = partial(_perplexity, "NF4+DQ")
gemma_fp4 = partial(_perplexity, "FP4")
gemma_int4 = partial(_perplexity, "INT4")
gemma_code_16_bit = partial(_perplexity, "16-bit", "code")
gemma_code_int8 = partial(_perplexity, "INT8", "code")
gemma_code_nf4 = partial(_perplexity, "NF4", "code")
gemma_code_nf4_dq = partial(_perplexity, "NF4+DQ", "code")
gemma_code_fp4 = partial(_perplexity, "FP4", "code")
gemma_code_int4 = partial(_perplexity, "INT4", "code")


def _facts(kind: str) -> float:
    """Answered rightly, per cent."""
    return 100 * _gemma()["formats"][kind]["cloze"]


gemma_facts_16_bit = partial(_facts, "16-bit")
gemma_facts_int8 = partial(_facts, "INT8")
gemma_facts_nf4 = partial(_facts, "NF4")
gemma_facts_nf4_dq = partial(_facts, "NF4+DQ")
gemma_facts_fp4 = partial(_facts, "FP4")
gemma_facts_int4 = partial(_facts, "INT4")


def _asked(questions: str) -> int:
    return _gemma()["two_percent_rule"]["lost"]["8-bit"][questions]["count"]


gemma_facts_asked = partial(_asked, "cloze")
gemma_pairs_asked = partial(_asked, "pairs")


def _gap(kind: str, text: str, when: str) -> float:
    """Nats per token between this base and the 16-bit one, before or after LoRA on code; mean over seeds."""
    (row,) = [row for row in _gemma()["won_back"] if row["kind"] == kind]
    gap = row[text][f"gap_{when}"]
    return statistics.fmean(gap) if isinstance(gap, list) else gap


def gemma_seeds() -> int:
    """The fewest seeds of a base."""
    return min(len(row["seeds"]) for row in _gemma()["won_back"])


def _rise(kind: str, text: str = "passages") -> float:
    """Of perplexity against the 16-bit base, per cent."""
    return 100 * (_perplexity(kind, text) / _perplexity("16-bit", text) - 1)


gemma_nf4_rise = partial(_rise, "NF4+DQ")
gemma_int8_rise = partial(_rise, "INT8")


def gemma_nf4_is_beyond_two_percent() -> bool:
    """By the whole interval, on prose and on code."""
    lost = _gemma()["two_percent_rule"]["lost"]["4-bit"]
    return lost["passages"]["low"] > 0.02 and lost["code"]["low"] > 0.02


def gemma_int8_is_within_on_text_and_open_on_questions() -> bool:
    rule = _gemma()["two_percent_rule"]
    lost = rule["lost"]["8-bit"]
    on_text = max(lost["passages"]["high"], lost["code"]["high"]) <= 0.02
    return on_text and rule["choice"] == evaluation.UNKNOWN and lost["cloze"]["high"] > 0.02 and lost["pairs"]["high"] > 0.02


def gemma_formats_are_ordered() -> bool:
    """INT8, NF4, then FP4 and INT4, on each of three texts; double quantization adds less than a hundredth of what NF4 lost."""
    lost = {kind: {text: _gemma()["lost"][kind][text]["estimate"] for text in ("code", "passages", "manual")} for kind in _gemma()["lost"]}
    ordered = all(lost["INT8"][t] < lost["NF4"][t] < min(lost["FP4"][t], lost["INT4"][t]) for t in lost["NF4"])
    return ordered and all(abs(lost["NF4+DQ"][t] - lost["NF4"][t]) < 0.01 * lost["NF4"][t] for t in lost["NF4"])


def gemma_fp4_and_int4_swap() -> bool:
    """Which of the two is worse depends on the text."""
    return _perplexity("FP4") > _perplexity("INT4") and _perplexity("FP4", "code") < _perplexity("INT4", "code")


def _share_won(kind: str, text: str) -> float:
    """Per cent of the gap that LoRA closes; mean over seeds."""
    return 100 * (1 - _gap(kind, text, "after") / _gap(kind, text, "before"))


gemma_nf4_code_won = partial(_share_won, "NF4", "code")
gemma_nf4_prose_won = partial(_share_won, "NF4", "passages")


def gemma_more_is_won_where_it_is_trained() -> bool:
    """For each base and in every seed: over half of the gap on code, less than half of that on prose."""
    for row in _gemma()["won_back"][1:]:
        for code, prose in zip(row["code"]["gap_after"], row["passages"]["gap_after"], strict=True):
            if not (code < row["code"]["gap_before"] / 2 and prose > row["passages"]["gap_before"] / 2):
                return False
    return True


gemma_nf4_code_before = partial(_gap, "NF4", "code", "before")
gemma_nf4_code_after = partial(_gap, "NF4", "code", "after")
gemma_nf4_prose_before = partial(_gap, "NF4", "passages", "before")
gemma_nf4_prose_after = partial(_gap, "NF4", "passages", "after")
gemma_int4_code_before = partial(_gap, "INT4", "code", "before")
gemma_int4_code_after = partial(_gap, "INT4", "code", "after")
gemma_int4_prose_before = partial(_gap, "INT4", "passages", "before")
gemma_int4_prose_after = partial(_gap, "INT4", "passages", "after")
gemma_fp4_code_before = partial(_gap, "FP4", "code", "before")
gemma_fp4_code_after = partial(_gap, "FP4", "code", "after")
gemma_fp4_prose_before = partial(_gap, "FP4", "passages", "before")
gemma_fp4_prose_after = partial(_gap, "FP4", "passages", "after")
