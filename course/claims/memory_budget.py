"""What unit 00 states: sums from the shapes of named models, bytes kept by autograd, and peaks measured on a GPU.

``model`` is a key of ``SHAPES``, ``recipe`` one of ``WAYS``, and ``targets`` one of ``TARGETS``. Adapters have r = 16 on all linears
where nothing else is said. Measured figures take the ``device`` of the record, by default the one that the pages speak of.
"""

import copy
import dataclasses
import math
import warnings
from functools import cache

import torch
from torch import nn

from course.claims.shared import GPU, UNITS, kept_by_autograd
from course.lab import recorded
from reference.lora import LoRALinear
from reference.memory import RECIPES, SHAPES, activations, training_memory
from reference.memory.activations import Run
from reference.memory.breakdown import parameter_lines
from reference.memory.recipes import nf4_bytes, trained_tensors

NO_MASTER = dataclasses.replace(RECIPES["full mixed precision"], name="mixed, no master weights", master_bytes=0)
WAYS = RECIPES | {NO_MASTER.name: NO_MASTER}
TARGETS = {"all-linear": "all-linear", "q, v": ["q_proj", "v_proj"]}

# By the parameter


def gib_in_gb(count: float) -> float:
    """So many GiB, in GB."""
    return count * 2**30 / 1e9


def gib_over_gb_percent() -> float:
    """How much more a GiB is than a GB."""
    return 100 * (gib_in_gb(1) - 1)


def bf16_loses_small_steps() -> bool:
    """Beside a weight of 1, a step a little below 2⁻⁸ is lost, one a little above is not."""
    one = torch.ones((), dtype=torch.bfloat16)
    return bool(one + 0.99 * 2**-8 == one) and bool(one + 1.01 * 2**-8 > one)


@cache
def _held(model: str, recipe: str) -> dict[str, int]:
    shape, way = SHAPES[model], WAYS[recipe]
    lines = parameter_lines(shape, way, trained_tensors(shape, way, 16, shape.targets()))
    return {kind: line.bytes for kind, line in lines.items()}


def held_gb(model: str, recipe: str) -> float:
    """All that is counted by the parameter."""
    return sum(_held(model, recipe).values()) / 1e9


def weights_gb(model: str, recipe: str) -> float:
    """The base's weights alone; QLoRA's have embedding and head in 16 bits."""
    return _held(model, recipe)["weights"] / 1e9


def beside_weights_gb(model: str, recipe: str) -> float:
    """What training adds to the base's weights: gradients, master weights, moments; with LoRA the adapters and theirs."""
    return held_gb(model, recipe) - weights_gb(model, recipe)


def weights_percent(model: str, recipe: str) -> float:
    """The base's weights, of all that is counted by the parameter."""
    return 100 * weights_gb(model, recipe) / held_gb(model, recipe)


def times_held(model: str, recipe: str, over: str) -> float:
    """How many times as much a recipe holds as another."""
    return held_gb(model, recipe) / held_gb(model, over)


def bytes_each(model: str, recipe: str) -> float:
    """Held for a parameter of the model."""
    return 1e9 * held_gb(model, recipe) / SHAPES[model].parameters


def nf4_bytes_each() -> float:
    """Of a weight in NF4 with double quantization, in a layer of 8192 × 8192."""
    return nf4_bytes(8192**2) / 8192**2


def tables_gb(model: str) -> float:
    """Embedding and output head in 16 bits."""
    return 2 * 2 * SHAPES[model].embedding / 1e9


def part_percent(model: str, part: str) -> float:
    """Of the model's parameters, those in its "embedding" or its "linears"."""
    parts = {"embedding": SHAPES[model].embedding, "linears": SHAPES[model].linear_parameters}
    return 100 * parts[part] / SHAPES[model].parameters


def twelve_bytes_are_the_papers_figure() -> bool:
    """The QLoRA paper's "more than 780 GB" for 65B: no master weights, and less than a percent above it."""
    return 780 < held_gb("LLaMA-65B", NO_MASTER.name) < 1.01 * 780


def weights_are_smallest_in_mixed_precision() -> bool:
    """Together with the gradients, which are as large."""
    held = _held("Llama-3-70B", "full mixed precision")
    return held["weights"] == min(held.values())


def gemma_upcast_costs_more_than_nf4_saves() -> bool:
    """Two more bytes for each number of the embedding, against what NF4 takes off the linears."""
    saved = weights_gb("Gemma-3-270M", "LoRA") - weights_gb("Gemma-3-270M", "QLoRA")
    return 2 * SHAPES["Gemma-3-270M"].embedding / 1e9 > saved


# Predicted peaks


def predicted_gb(
    model: str, recipe: str, batch: int = 1, sequence: int = 2048, checkpointing: bool = True, attention: str = "fused"
) -> float:
    """Peak of a step."""
    return training_memory(SHAPES[model], WAYS[recipe], batch, sequence, checkpointing=checkpointing, attention=attention).peak / 1e9


def another_row_gb(model: str, recipe: str) -> float:
    """What a second row of 2,048 tokens adds to the peak, with checkpointing."""
    return predicted_gb(model, recipe, 2) - predicted_gb(model, recipe)


def rows_that_fit(model: str, words: int | None = None, gb: float = 23) -> int:
    """Of 2,048 tokens, with QLoRA and checkpointing, below a peak of ``gb``; the vocabulary the model's own or so many words."""
    shape = dataclasses.replace(SHAPES[model], vocab=words or SHAPES[model].vocab)
    return next(rows for rows in range(100) if training_memory(shape, WAYS["QLoRA"], rows + 1, 2048, checkpointing=True).peak > 1e9 * gb)


def loss_percent(model: str, recipe: str, batch: int, sequence: int) -> float:
    """Of the peak, with checkpointing."""
    budget = training_memory(SHAPES[model], WAYS[recipe], batch, sequence, checkpointing=True)
    return 100 * (budget["log-probabilities"] + budget["loss gradients"]) / budget.peak


# By the token

FULL = Run(1, 2048, 2, trained=True)  # in bf16


def _layer(run: Run) -> int:
    """Bytes that one layer of Llama-2-7B keeps."""
    return sum(activations.layer(SHAPES["Llama-2-7B"], run).values())


def kept_kb() -> float:
    """By one layer of Llama-2-7B for a token, in full training."""
    return _layer(FULL) / FULL.tokens / 1e3


def kept_gb() -> float:
    """By all layers of Llama-2-7B for 2,048 tokens, in full training."""
    return activations.layers(SHAPES["Llama-2-7B"], FULL) / 1e9


def kept_percent(targets: str, input_copies: bool = False, autocast: bool = False) -> float:
    """By a layer of Llama-2-7B with LoRA, of what it keeps in full training.

    Under ``autocast`` to bf16 the adapters' copies of inputs and A·x are 16-bit; tests/test_memory.py counts that in peft's layer.
    """
    names = SHAPES["Llama-2-7B"].targets(TARGETS[targets])
    groups = activations.layer(SHAPES["Llama-2-7B"], Run(1, 2048, 2, False, names, 16, input_copies=input_copies))
    halved = sum(groups.get(name, 0) for name in ("A's copies of inputs", "A·x")) // 2 * autocast
    return 100 * (sum(groups.values()) - halved) / _layer(FULL)


def checkpointing_keeps_times_less() -> float:
    """By all layers of Llama-2-7B, in full training."""
    return activations.layers(SHAPES["Llama-2-7B"], FULL) / activations.layers(SHAPES["Llama-2-7B"], FULL, checkpointing=True)


def float32_layer_keeps_less_than_twice() -> bool:
    """Norms and softmax keep float32 tensors in a bf16 model too."""
    return 1.7 < _layer(dataclasses.replace(FULL, compute_bytes=4)) / _layer(FULL) < 2


def loss(model: str, unit: str, tokens: int = 1) -> float:
    """Three float32 numbers for each token and word, in MB or GB."""
    return 12 * tokens * SHAPES[model].vocab / UNITS[unit]


def inputs_mb(model: str) -> float:
    """What checkpointing keeps of a token: the input of each layer in bf16."""
    return 2 * SHAPES[model].hidden * SHAPES[model].layers / 1e6


def scores_gb(model: str, sequence: int) -> float:
    """Attention's scores in all layers in float32, one row."""
    return 4 * SHAPES[model].layers * SHAPES[model].heads * sequence**2 / 1e9


def attention_percent(model: str, sequence: int) -> float:
    """Of a decoder layer's multiplications, those of the two causal attention products; half of the pairs are needed."""
    shape = SHAPES[model]
    attention = shape.layers * sequence * shape.heads * shape.head_dim
    return 100 * attention / (shape.linear_parameters + attention)


def frozen_linear_keeps_nothing() -> bool:
    """A trained one keeps its input."""
    x = torch.randn(50, 32, requires_grad=True)
    trained, frozen = nn.Linear(32, 16), nn.Linear(32, 16).requires_grad_(False)
    return kept_by_autograd(trained, x) == x.nbytes and kept_by_autograd(frozen, x) == 0


def adapter_keeps_the_input() -> bool:
    """The very input, in float32 and in bfloat16, and A·x, which is r numbers a row in float32."""
    ok = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(50, 32, requires_grad=True, dtype=dtype)
        layer = LoRALinear(nn.Linear(32, 16, dtype=dtype), r=4, lora_alpha=12)
        ok.append(kept_by_autograd(layer, x) == x.nbytes + 4 * 50 * 4)
    return all(ok)


def dropout_makes_adapters_keep_more() -> bool:
    """LoRA dropout above zero: each adapter keeps its own copy of the input and a mask."""
    x = torch.randn(50, 32, requires_grad=True)
    plain, dropped = (LoRALinear(nn.Linear(32, 16), r=4, lora_alpha=12, lora_dropout=p) for p in (0.0, 0.1))
    return kept_by_autograd(dropped, x) > 1.2 * kept_by_autograd(plain, x)


@cache
def _small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).train()


def padding_keeps_more() -> bool:
    """With padding in the batch: keys and values for every query head, and a mask."""
    ids = torch.randint(50, (2, 64))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    plain, padded = (kept_by_autograd(_small_llama(), input_ids=ids, labels=ids, attention_mask=m) for m in (None, mask))
    repeated = 2 * 2 * (8 - 2) * 8 * 4 * ids.numel()  # layers · (k and v) · more heads · head_dim · float32
    return padded - plain > repeated


# Predictions held against measurements; a test holds the recorded predictions to today's code


def _steps(record: str, device: str = GPU) -> list[dict]:
    return recorded.load(record, device)["result"]["rows"]


def _off_percent(row: dict) -> float:
    return abs(100 * (row["ratio"] - 1))


def steps(record: str, device: str = GPU, within: float = math.inf) -> int:
    """How many were measured, and were within so many percent of the prediction."""
    return sum(_off_percent(row) < within for row in _steps(record, device))


def farthest_percent(record: str, device: str = GPU) -> float:
    """Largest distance of a prediction from the measured peak."""
    return max(map(_off_percent, _steps(record, device)))


# Measured: recipes


def _peak(model: str, recipe: str, batch: int, sequence: int, checkpointing: bool, targets: str, device: str) -> dict:
    adapted = None if RECIPES[recipe].trains_base else TARGETS[targets]
    where = {"shape": model, "recipe": recipe, "batch": batch, "sequence": sequence}
    return recorded.row("memory_peaks", device, **where, checkpointing=checkpointing, targets=adapted)


def peak_gb(model: str, recipe: str, batch: int, sequence: int, checkpointing: bool = False, device: str = GPU) -> float:
    """Of a step."""
    return _peak(model, recipe, batch, sequence, checkpointing, "all-linear", device)["measured"] / 1e9


def lora_times_less(batch: int, sequence: int, checkpointing: bool = False, device: str = GPU) -> float:
    """Peak of the 1B in mixed precision over that with LoRA."""
    full, lora = (peak_gb("Llama-3.2-1B", way, batch, sequence, checkpointing, device) for way in ("full mixed precision", "LoRA"))
    return full / lora


def peft_copies_gb(device: str = GPU) -> float:
    """How much more peft's layer needs than this course's: the 1B, 4 × 2,048 tokens."""
    return peak_gb("Llama-3.2-1B", "LoRA, peft's layer", 4, 2048, device=device) - peak_gb("Llama-3.2-1B", "LoRA", 4, 2048, device=device)


def passing_gb(recipe: str, targets: str = "all-linear", checkpointing: bool = False, device: str = GPU) -> float:
    """Peak less what was held before the step, so activations and loss: the 1B, 4 × 2,048 tokens."""
    row = _peak("Llama-3.2-1B", recipe, 4, 2048, checkpointing, targets, device)
    return (row["measured"] - row["measured_held"]) / 1e9


def workspaces_mb(device: str = GPU) -> float:
    """Of the matrix library."""
    return recorded.load("memory_peaks", device)["result"]["workspaces"] / 1e6


# Measured: how cost grows. A QLoRA step of Llama-2-7B with 1 × 512 tokens, r = 16 on all linears and checkpointing, but for what is given


@cache
def _step(
    model: str = "Llama-2-7B",
    sequence: int = 512,
    rank: int = 16,
    checkpointing: bool = True,
    attention: str = "fused",
    device: str = GPU,
) -> dict:
    where = {"shape": model, "sequence": sequence, "rank": rank, "checkpointing": checkpointing, "attention": attention}
    return recorded.row("growth", device, **where)


def step_gb(**setting) -> float:
    """Peak."""
    return _step(**setting)["peak"] / 1e9


def step_off_percent(**setting) -> float:
    """Distance of the prediction from the peak."""
    return _off_percent(_step(**setting))


def _change(setting: dict) -> tuple[float, float]:
    """Peaks in GB with the first and with the second of the pair among the settings."""
    return tuple(step_gb(**{key: pair[i] if isinstance(pair, tuple) else pair for key, pair in setting.items()}) for i in (0, 1))


def growth_percent(**setting) -> float:
    """Of the peak, where one setting is a pair: ``rank=(4, 16)`` says how much more it is with 16 than with 4."""
    before, after = _change(setting)
    return 100 * (after / before - 1)


def slope_mb(**setting) -> float:
    """By which the peak grows for each one of what is a pair, such as ``sequence=(2048, 8192)``."""
    ((low, high),) = (value for value in setting.values() if isinstance(value, tuple))
    before, after = _change(setting)
    return 1e3 * (after - before) / (high - low)


def gb_a_billion(less: str, more: str) -> float:
    """For each further billion of parameters between two models."""
    before, after = _change({"model": (less, more)})
    return 1e9 * (after - before) / (SHAPES[more].parameters - SHAPES[less].parameters)


def checkpointing_flattens() -> float:
    """How many times less a token costs with checkpointing."""
    tokens = (2048, 8192)
    return slope_mb(sequence=tokens, checkpointing=False) / slope_mb(sequence=tokens)


def adapters(rank: int, unit: str) -> float:
    """Adapters of Llama-2-7B with gradients, moments and what the optimizer makes for a moment, in its step; in MB or GB."""
    budget = training_memory(SHAPES["Llama-2-7B"], WAYS["QLoRA"], rank=rank)
    return sum(budget[kind] for kind in ("adapter weights", "adapter gradients", "adapter states", "step buffer")) / UNITS[unit]


def adapters_over_weights(rank: int) -> float:
    """The same, over the 4-bit weights."""
    return adapters(rank, "GB") / weights_gb("Llama-2-7B", "QLoRA")


def seconds_times(how: str, device: str = GPU) -> float:
    """Time of a step of 4 × 2,048 tokens over that of one of 1 × 512."""
    long, short = (recorded.row("qlora_step", device, how=how, sequence=n)["seconds"] for n in (2048, 512))
    return long / short


def farthest_is_the_tiny_model() -> bool:
    """On both devices, and then in the backward pass, where its tables and products of width r are."""
    worst = [max(_steps("growth", device), key=_off_percent) for device in (GPU, "cpu")]
    return all(row["shape"] == "the course's tiny model" and row["peak"] == row["peaks"]["backward"] for row in worst)


def predictions_are_not_too_high() -> bool:
    """On the GPU, by more than a thousandth of a percent."""
    return all(row["ratio"] < 1.00001 for row in _steps("growth"))


def missed_kb() -> float:
    """What a token needs beyond the prediction without checkpointing, measured between 4,096 and 8,192 tokens."""
    less, more = (_step(sequence=n, checkpointing=False) for n in (4096, 8192))
    return ((more["peak"] - more["predicted"]) - (less["peak"] - less["predicted"])) / 4096 / 1e3


def missed_is_what_the_switch_leaves() -> bool:
    """The embedding's output in bf16, and the first norm's input and its 1/rms in float32: 6h + 4 bytes, and the allocator's rounding."""
    hidden = SHAPES["Llama-2-7B"].hidden
    expected = (2 * hidden + 4 * (hidden + 1)) / 1e3
    return expected <= missed_kb() < 1.02 * expected


def switch_leaves_a_gradient() -> bool:
    """After checkpointing was switched on and off again the first layer keeps its norm's input: 4 (h + 1) bytes a token.

    The embedding's output stays, too, but as a leaf that gets a gradient: no operation saves it, so it isn't counted here.
    """
    ids, model = torch.randint(50, (2, 64)), copy.deepcopy(_small_llama())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)
    before = kept_by_autograd(model, input_ids=ids, labels=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library is going to rename the two
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.gradient_checkpointing_disable()
    after = kept_by_autograd(model, input_ids=ids, labels=ids)
    model.disable_input_require_grads()
    again = kept_by_autograd(model, input_ids=ids, labels=ids)
    return again == before and after - before == 4 * (model.config.hidden_size + 1) * ids.numel()


def loss_decides_below_a_billion() -> bool:
    """268 million parameters with 262,144 words need more than 1.24 billion with 128,256; their layers with 32,000 need less than both."""
    shapes = ("Llama with Gemma-3-270M's sizes", "Llama-3.2-1B", "Gemma-3-270M's layers, 32,000 words")
    large_vocabulary, larger_model, small = (step_gb(model=shape) for shape in shapes)
    return large_vocabulary > larger_model > small


def flat_below_256_tokens() -> bool:
    """There the fullest moment is the optimizer's step, where no token is left but its id."""
    rows = [_step(sequence=n) for n in (128, 256)]
    return abs(rows[1]["peak"] - rows[0]["peak"]) < 10_000 and all(row["peak"] == row["peaks"]["step"] for row in rows)


def rank_turns_between_16_and_32() -> bool:
    """Up to r = 16 the fullest moment is in the backward pass, from r = 32 on the optimizer's step."""
    rows = {rank: _step(rank=rank) for rank in (4, 8, 16, 32, 64, 128, 256)}
    return all((row["peak"] == row["peaks"]["step"]) == (rank >= 32) for rank, row in rows.items())


def scores_move_the_peak_into_attention() -> bool:
    """With 2,048 tokens and no checkpointing the fullest moment is in attention's backward pass; with fewer it is the loss."""
    moments = [_step(sequence=n, checkpointing=False, attention="math")["predicted_moment"] for n in (512, 1024, 2048)]
    return moments == ["at the loss", "at the loss", "last attention back"]
