"""What unit 06 states: bytes from shapes, identities checked on small tensors, and what the GPU and the tiny model measured.

A figure that a GPU measured takes the ``device`` of the record, by default the one that the pages speak of. ``how``, ``who`` and ``kind``
are written as in the records.
"""

import copy
import math
import statistics
from functools import cache

import torch
from scipy.stats import ttest_ind
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from course.claims import double_quantization
from course.claims.memory_budget import predicted_gb
from course.claims.shared import GPU, UNITS, kept_by_autograd, normal
from course.lab import evaluation, models, recorded
from course.lab.quantized import quantized_copy
from course.lab.traffic import MovedBytes
from course.lab.world import World
from reference.blockwise import midpoints
from reference.lora import LoRALinear
from reference.memory import SHAPES
from reference.nf4 import NF4_CODEBOOK, dequantize_nf4, quantize_nf4
from reference.qlora import NF4Linear, merge_errors, quantize_linears

FOUR_BITS = 0.5 + 4 / 64  # bytes a weight of codes and float32 scales
FUSED = {
    "h100": 64,
    "h200": 128,
}  # rows that the kernels decoded on the way when each card was measured: the H100's were an earlier version

# Counting


def saved_bytes_per_weight() -> float:
    """By NF4 with double quantization, against 16 bits."""
    return 2 - double_quantization.bits() / 8


def step_fits(model: str, gigabytes: float) -> bool:
    """A QLoRA step of 1 × 2048 tokens with checkpointing, in a GPU of this size."""
    return predicted_gb(model, "QLoRA") < gigabytes


def quantizing_saves(model: str, unit: str) -> float:
    """Of the linears' bytes, in MB or GB."""
    return saved_bytes_per_weight() * SHAPES[model].linear_parameters / UNITS[unit]


def cast_adds(model: str, unit: str) -> float:
    """What casting all that is not quantized to float32 adds, in MB or GB."""
    return 2 * (SHAPES[model].parameters - SHAPES[model].linear_parameters) / UNITS[unit]


def break_even_percent() -> float:
    """Embedding over linears at which the cast of a tied embedding undoes the saving."""
    return 100 * saved_bytes_per_weight() / 2


# Identities


@cache
def _layer() -> tuple[nn.Linear, NF4Linear]:
    linear = nn.Linear(256, 192, bias=False)
    linear.weight.data.copy_(normal(192, 256) / 16)
    return linear, NF4Linear.from_linear(linear, compute_dtype=torch.float32)


def gradient_is_grad_times_weight() -> bool:
    """∂L/∂x = ∂L/∂y · Ŵ, as through the dense Ŵ."""
    _, layer = _layer()
    x = normal(9, 256, seed=1).requires_grad_()
    (packed,) = torch.autograd.grad(layer(x).square().sum(), x)
    (dense,) = torch.autograd.grad(nn.functional.linear(x, layer.dequantize()).square().sum(), x)
    return torch.allclose(packed, dense, rtol=1e-5, atol=1e-5)


def backward_keeps_nothing_new() -> bool:
    _, layer = _layer()
    return kept_by_autograd(layer, normal(9, 256).requires_grad_()) == 0


def naive_backward_keeps_the_dense_weight() -> bool:
    _, layer = _layer()
    dense = layer.dequantize()
    return kept_by_autograd(layer, normal(9, 256).requires_grad_(), dense, forward=nn.functional.linear) == dense.nbytes


def checkpointing_frees_the_dense_weight() -> bool:
    """A checkpointed layer keeps nothing dense between its two forward passes, however it is written."""
    _, layer = _layer()
    dense = layer.dequantize()

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(lambda x: nn.functional.linear(x, dense), x, use_reentrant=False)

    return kept_by_autograd(layer, normal(9, 256).requires_grad_(), forward=checkpointed) < dense.nbytes


def bfloat16_loses_percent() -> float:
    """Steps smaller than this, as a share of the number that they are added to, always round away."""
    numbers = torch.arange(128, 256, dtype=torch.float64) / 128  # all bfloat16 numbers from 1 to 2
    return 100 * (0.5 / 128 / numbers).min().item()


def _adapted(size: float) -> tuple[LoRALinear, Tensor]:
    """A QLoRA layer whose update has ``size`` of the weight's norm; and the original weight."""
    linear, packed = _layer()
    layer = LoRALinear(copy.deepcopy(packed), 4, 10)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=g))
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g))
        layer.lora_B.mul_(size * linear.weight.norm() / layer.delta_weight().norm())
    return layer, linear.weight.detach().bfloat16()


def merge_error(way: str, size: float) -> float:
    """In multiples of the update's own norm, for an update of ``size`` of the weight's norm; 16 bits are bfloat16.

    Args:
        way: into the "dequantized" weight, "requantized", or into the "original" weight.
    """
    layer, original = _adapted(size)
    trained = layer.base.dequantize() + layer.delta_weight()
    error = merge_errors(layer, original)[way] * trained.norm() if way != "dequantized" else (trained.bfloat16() - trained).norm()
    return (error / layer.delta_weight().norm()).item()


def requantized_update_tiny_is_lost() -> bool:
    """An update of a ten-thousandth of the weight's norm changes less than one code in a hundred, without double quantization."""
    linear, _ = _layer()
    q = quantize_nf4(linear.weight)
    restored = dequantize_nf4(q)
    update = normal(*linear.weight.shape, seed=3) * 1e-4 * linear.weight.norm() / math.sqrt(linear.weight.numel())
    return (quantize_nf4(restored + update).packed != q.packed).float().mean().item() < 0.01


def nan_is_refused_by_name() -> bool:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data[3, 4] = float("nan")
    try:
        quantize_linears(model)
    except ValueError as error:
        return "1.weight" in str(error) and type(model[0]) is nn.Linear  # and nothing was changed
    return False


def points_lost_unseen(questions: int) -> float:
    """Upper end of the 95 % interval of the loss, in points, when none of so many answers changed."""
    return 100 * evaluation.compare_answers([True] * questions, [True] * questions).high


def questions_to_show(points: float) -> int:
    """How many questions without any change it takes to show a loss below so many points."""
    n = 20
    while points_lost_unseen(n) > points:
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

SMALL = "Llama with Gemma-3-270M's sizes"
PEFT_4_BITS = "QLoRA, peft + bitsandbytes"


def peak_gb(how: str, shape: str = "Llama-2-7B", batch: int = 4, sequence: int = 512, what: str = "peak", device: str = GPU) -> float:
    """Of a step, measured or, as ``what``, "predicted"."""
    return recorded.row("qlora_memory", device, how=how, shape=shape, batch=batch, sequence=sequence)[what] / 1e9


def small_prepared_needs_more() -> bool:
    """On Gemma's sizes, than LoRA; and QLoRA as it is needs less."""
    prepared, lora, qlora = (peak_gb(how, SMALL, 1, 128) for how in (f"{PEFT_4_BITS}, prepared", "LoRA", "QLoRA"))
    return prepared > lora > qlora


def step_over_16_bit(batch: int, sequence: int, device: str = GPU) -> float:
    """Time of peft's step over bitsandbytes' packed layers, over that of its step over bf16 layers, 7B."""
    where = {"shape": "Llama-2-7B", "batch": batch, "sequence": sequence}
    packed, dense = (recorded.row("qlora_memory", device, how=how, **where)["seconds"] for how in (PEFT_4_BITS, "LoRA, peft"))
    return packed / dense


# Measured: whole steps in processes under a cap


def _bytes(row: dict) -> dict[str, int]:
    return row | {"process": row["context"] + row["reserved"], "weights": row["built"] - row["adapters"]}


def capped(shape: str, what: str, device: str = GPU) -> float:
    """In GB the "cap"; the "peak" of all tensors and what was "predicted"; or the whole "process". The "seconds" of a step."""
    return _bytes(recorded.row("qlora_caps", device, shape=shape))[what] / (1 if what == "seconds" else 1e9)


def _capped() -> list[dict]:
    return [_bytes(row) for row in recorded.load("qlora_caps", GPU)["result"]["rows"]]


def capped_losses_fall() -> bool:
    """For all four, from that of guessing; 70B's goes back up almost all the way at two of its steps."""
    fall = all(row["losses"][-1] < row["losses"][0] - 0.09 and abs(row["losses"][0] - math.log(32000)) < 0.01 for row in _capped())
    losses = recorded.row("qlora_caps", GPU, shape="Llama-2-70B")["losses"]
    return fall and sum(loss > losses[1] - 0.005 for loss in losses[5:]) == 2


def capped_processes_fit() -> bool:
    return all(row["process"] <= row["cap"] for row in _capped())


def capped_predictions_hold() -> bool:
    """Peak and weights to within a thousandth."""
    ratios = [(row["predicted"] / row["peak"], row["predicted_parts"]["weights"] / row["weights"]) for row in _capped()]
    return all(abs(ratio - 1) < 1e-3 for pair in ratios for ratio in pair)


# Measured: kernels, 8192 × 8192


def _kernels(device: str = GPU) -> dict:
    return recorded.load("nf4_kernels", device)["result"]


def kernel_ms(work: str, who: str, rows: int | None = None, device: str = GPU) -> float:
    """Milliseconds of "quantize", "dequantize", or the "linear" layer with so many rows."""
    return recorded.row("nf4_kernels", device, work=work, rows=rows)[who]


def times_as_fast(than: str, work: str, rows: int | None = None, device: str = GPU) -> float:
    """Our kernel, as "bitsandbytes" or as the product with "bf16 weights"."""
    return kernel_ms(work, than, rows, device) / kernel_ms(work, "ours", rows, device)


def training_ms(who: str, rows: int, device: str = GPU) -> float:
    """Milliseconds of the layer forward and backward."""
    return recorded.row("nf4_training", device, rows=rows)[who]


def copy_rate(device: str = GPU) -> float:
    """GB/s of a copy within the card, read and written."""
    return _kernels(device)["copy_gigabytes_per_second"]


def reading_ms(device: str = GPU) -> float:
    """Milliseconds in which a launch reads codes and scales of the same weight, and does nothing else."""
    return _kernels(device)["reading"]


def kernels_give_the_same() -> bool:
    """Codes as bitsandbytes', decoded weights as plain torch's and bitsandbytes', bit for bit."""
    return all(_kernels()["equal"].values())


def bytes_that_must_move() -> float:
    """Per weight, between bfloat16 and NF4 in blocks of 64."""
    return 2 + FOUR_BITS


@cache
def moved_bytes(work: str) -> float:
    """Bytes a weight that plain torch's operators read and write to "quantize" or "dequantize"."""
    weight = normal(256, 1024).bfloat16()
    q = quantize_nf4(weight)
    with MovedBytes() as moved:
        quantize_nf4(weight) if work == "quantize" else dequantize_nf4(q)
    return moved.bytes / weight.numel()


def _copy_ms(bytes_per_weight: float, device: str = GPU) -> float:
    """Milliseconds that so many bytes a weight take at the rate of a copy."""
    return bytes_per_weight * _kernels(device)["side"] ** 2 / (1e6 * copy_rate(device))


def moved_ms(work: str, device: str = GPU) -> float:
    """The counted bytes of plain torch's operators, at the rate of a copy."""
    return _copy_ms(moved_bytes(work), device)


def moved_bytes_explain_plain_torch() -> bool:
    """They take three quarters of the measured time or more, and not more than it."""
    return all(0.75 < moved_ms(work) / kernel_ms(work, "torch") < 1 for work in ("quantize", "dequantize"))


def one_comparison_is_enough() -> bool:
    """Cut at (k − ½)/15, no cell holds two midpoints, and none lies within a thousandth of an edge."""
    between, edges = midpoints(NF4_CODEBOOK), (torch.arange(33) - 16.5) / 15
    apart = (between[:, None] - edges).abs().min()
    return bool(torch.searchsorted(between, edges).diff().max() == 1 and apart > 1e-3)


def fewer_bytes() -> float:
    """bf16 weights over NF4's codes and float32 scales."""
    return 2 / FOUR_BITS


def copy_rate_percent(who: str, device: str = GPU) -> float:
    """Of a copy's rate at which weights are read, by the layer of "ours" or "bf16 weights" with one row, or by "reading" alone."""
    ms = reading_ms(device) if who == "reading" else kernel_ms("linear", who, 1, device)
    return 100 * _copy_ms(2 if who == "bf16 weights" else FOUR_BITS, device) / ms


def longer_than_one_row_percent(rows: int, device: str = GPU) -> float:
    """How much longer bf16 weights take for so many rows than for one."""
    return 100 * (kernel_ms("linear", "bf16 weights", rows, device) / kernel_ms("linear", "bf16 weights", 1, device) - 1)


def compiled(kernel: str, what: str) -> float:
    """Of the loop of "1 row" or "16 rows" as compiled for an H100: "instructions" a weight; "milliseconds" to start all, at least."""
    return recorded.load("nf4_instructions", "cpu")["result"][kernel][what]


def counted(kernel: str, what: str, device: str = GPU) -> float:
    """By the hardware's counters: how busy, in percent, "alu" or "tensor" is while the kernel runs; how many "instructions" it executes."""
    return recorded.load("nf4_profile", device)["result"]["kernels"][kernel][what]


def logic_percent(kernel: str, device: str = GPU) -> float:
    """Of the instructions that the kernel executes: integers and logic."""
    return 100 * counted(kernel, "alu instructions", device) / counted(kernel, "instructions", device)


def rows_decoded_on_the_way(device: str) -> int:
    """The most, by the version of the kernels that was measured on this card."""
    return FUSED[device]


def longer_than_reading_percent(device: str = GPU) -> float:
    """How much longer the layer with one row takes than only reading its weight."""
    return 100 * (kernel_ms("linear", "ours", 1, device) / reading_ms(device) - 1)


def few_rows_cost_about_the_same() -> bool:
    """From 2 to 16 rows, within 5 per cent, on both cards."""
    return all(kernel_ms("linear", "ours", 16, card) < 1.05 * kernel_ms("linear", "ours", 2, card) for card in FUSED)


def rows_that_fill_the_arithmetic(device: str = GPU) -> float:
    """Rows at which a bf16 layer's products take as long as reading its weight: 2 operations a row against 2 bytes."""
    operations_per_second = 2 * _kernels(device)["side"] ** 3 / (1e-3 * kernel_ms("linear", "floor", 8192, device))
    return operations_per_second / (1e9 * copy_rate(device))


def _layers(device: str) -> list[dict]:
    return [row for row in _kernels(device)["rows"] if row["work"] == "linear"]


def four_bits_win_up_to_32_rows() -> bool:
    """Over bf16 weights, and lose from 64: on both cards."""
    return all((row["ours"] < row["bf16 weights"]) == (row["rows"] <= 32) for card in FUSED for row in _layers(card))


def many_rows_cost_decoding_and_product() -> bool:
    """Above the rows that are decoded on the way: decoding plus the product over bf16 weights, to within 4 per cent, on both cards."""
    apart = [
        (kernel_ms("dequantize", "ours", device=card) + row["bf16 weights"]) / row["ours"]
        for card, most in FUSED.items()
        for row in _layers(card)
        if row["rows"] > most
    ]
    return all(abs(each - 1) < 0.04 for each in apart)


def fused_percent(rows: int, device: str = "h200") -> float:
    """Time to decode on the way, of the time to write the weight out and multiply."""
    apart = kernel_ms("dequantize", "ours", device=device) + kernel_ms("linear", "bf16 weights", rows, device)
    return 100 * kernel_ms("linear", "ours", rows, device) / apart


# Measured: whole training steps, with 1 × 512 or 4 × 2048 tokens


def step(how: str, sequence: int, what: str, device: str = GPU) -> float:
    """Its "seconds", how many "kernels" are launched, or the share of it in which one runs, "busy"."""
    return recorded.row("qlora_step", device, how=how, sequence=sequence)[what]


def step_seconds(how: str, sequence: int, device: str = GPU) -> float:
    """Of a step."""
    return step(how, sequence, "seconds", device)


def step_range(how: str, sequence: int, which: str, device: str = GPU) -> float:
    """Seconds of the fastest step that was timed, "least", or of the slowest, "most"."""
    return {"least": min, "most": max}[which](step(how, sequence, "all_seconds", device))


def step_peak_gb(how: str, sequence: int = 2048, device: str = GPU) -> float:
    """Of all tensors in a step."""
    return step(how, sequence, "peak", device) / 1e9


def step_busy_percent(how: str, sequence: int, device: str = GPU) -> float:
    """Of the step in which a kernel runs."""
    return 100 * step(how, sequence, "busy", device)


def peft_times(what: str, sequence: int, device: str = GPU) -> float:
    """The "seconds" or the "peak" of the step of peft + bitsandbytes, over that of the compiled one."""
    return step("peft", sequence, what, device) / step("llama, compiled, graph", sequence, what, device)


# Measured: quality of the tiny model


def _only(rows: list[dict], **where: str) -> dict:
    """The one row in which every key of ``where`` has that value, of a result that holds several tables."""
    (found,) = [row for row in rows if all(row[key] == value for key, value in where.items())]
    return found


@cache
def _tiny() -> dict:
    return recorded.load("quantization_quality_tiny", "cpu")["result"]


def tiny_lost(kind: str, what: str = "estimate") -> float:
    """Nats per token on the general domain, or an end of their interval, "low" or "high"."""
    return _only(_tiny()["table"], kind=kind)["lost_nats"]["general"][what]


def four_bits_cost_the_tiny_model_nothing() -> bool:
    """The interval of NF4's loss holds zero."""
    return tiny_lost("NF4+DQ", "low") <= 0 <= tiny_lost("NF4+DQ", "high")


def _mean(found: float | list[float]) -> float:
    return statistics.fmean(found) if isinstance(found, list) else found


def _after(domain: str, kind: str, when: str = "after") -> list[float]:
    return _only(_tiny()["won_back"], domain=domain, kind=kind)[when]


def tiny_nats(when: str, domain: str, kind: str) -> float:
    """Above the floor, "before" or "after" LoRA; mean over seeds."""
    return _mean(_after(domain, kind, when))


def clinic_seeds_overlap() -> bool:
    """On the new domain the worst seed over the full base ends above the best over NF4."""
    return max(_after("clinic", "16-bit")) > min(_after("clinic", "NF4"))


def lora_wins_back() -> float:
    """Of what INT2 and NF2 lost on known text, against LoRA on the 16-bit base: the smallest share over bases and seeds, per cent."""
    shares = []
    for kind in ("INT2", "NF2"):
        lost = tiny_nats("before", "general", kind) - tiny_nats("before", "general", "16-bit")
        shares += [1 - (a - b) / lost for a, b in zip(_after("general", kind), _after("general", "16-bit"), strict=True)]
    return 100 * min(shares)


# Measured: quality of Gemma 3 270M; "passages" are prose, "cloze" facts, "pairs" sentence pairs


@cache
def _gemma(device: str = GPU) -> dict:
    return recorded.load("quantization_quality_gemma", device)["result"]


def gemma_perplexity(kind: str, text: str = "passages", device: str = GPU) -> float:
    """On prose or another text."""
    return math.exp(_gemma(device)["formats"][kind][text])


def gemma_perplexity_rise_percent(kind: str, device: str = GPU) -> float:
    """On prose, against the 16-bit base."""
    return 100 * (gemma_perplexity(kind, device=device) / gemma_perplexity("16-bit", device=device) - 1)


def gemma_asked(questions: str, device: str = GPU) -> int:
    """How many questions of a kind both models answered."""
    return _gemma(device)["two_percent_rule"]["lost"]["8-bit"][questions]["count"]


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
    lost = {kind: {text: each[text]["estimate"] for text in ("code", "passages", "manual")} for kind, each in _gemma()["lost"].items()}
    ordered = all(lost["INT8"][t] < lost["NF4"][t] < min(lost["FP4"][t], lost["INT4"][t]) for t in lost["NF4"])
    return ordered and all(abs(lost["NF4+DQ"][t] - lost["NF4"][t]) < 0.01 * lost["NF4"][t] for t in lost["NF4"])


def gemma_fp4_and_int4_swap() -> bool:
    """Which of the two is worse depends on the text."""
    return gemma_perplexity("FP4") > gemma_perplexity("INT4") and gemma_perplexity("FP4", "code") < gemma_perplexity("INT4", "code")


def gemma_gap(kind: str, text: str, when: str, device: str = GPU) -> float:
    """Nats per token between this base and the 16-bit one, "before" or "after" LoRA on code; mean over seeds."""
    return _mean(_only(_gemma(device)["won_back"], kind=kind)[text][f"gap_{when}"])


def gemma_won_percent(kind: str, text: str, device: str = GPU) -> float:
    """Of the gap that LoRA closes; mean over seeds."""
    return 100 * (1 - gemma_gap(kind, text, "after", device) / gemma_gap(kind, text, "before", device))


def gemma_more_is_won_where_it_is_trained() -> bool:
    """For each base and in every seed: over half of the gap on code, less than half of that on prose."""
    for row in _gemma()["won_back"][1:]:
        for code, prose in zip(row["code"]["gap_after"], row["passages"]["gap_after"], strict=True):
            if not (code < row["code"]["gap_before"] / 2 and prose > row["passages"]["gap_before"] / 2):
                return False
    return True
