"""What unit 00 states: sums from the shapes of named models, bytes kept by autograd, and peaks measured on a GPU."""

import copy
import dataclasses
import functools
import warnings

import torch
from torch import nn

from course.lab import recorded
from reference.lora import LoRALinear
from reference.memory import activations, training_memory
from reference.memory.activations import Run
from reference.memory.recipes import ADAM_8BIT, FULL_BF16, FULL_FP32, FULL_MIXED, LORA, QLORA, Recipe
from reference.model_shapes import GEMMA_3_270M, LLAMA_2_7B, LLAMA_2_70B, LLAMA_3_8B, LLAMA_3_70B, ModelShape

QV = ("q_proj", "v_proj")
ALL = tuple(LLAMA_2_7B.linears)
NO_MASTER = dataclasses.replace(FULL_MIXED, name="mixed, no master weights", master_bytes=0)

# By the parameter


def gib_over_gb_percent() -> float:
    """How much more a GiB is than a GB."""
    return 100 * (2**30 / 1e9 - 1)


def twenty_four_gib() -> float:
    """In GB."""
    return 24 * 2**30 / 1e9


def bf16_loses_small_steps() -> bool:
    """Beside a weight of 1, a step a little below 2⁻⁸ is lost, one a little above is not."""
    one = torch.ones((), dtype=torch.bfloat16)
    return bool(one + 0.99 * 2**-8 == one) and bool(one + 1.01 * 2**-8 > one)


def _held(shape: ModelShape, recipe: Recipe, rank: int = 16) -> dict[str, int]:
    """Everything that is counted by the parameter, r = 16 on all linears where there are adapters."""
    lines = training_memory(shape, recipe, sequence=1, rank=rank).lines
    wanted = ("weights", "gradients", "master weights", "optimizer states", "adapter weights", "adapter gradients", "adapter states")
    return {kind: lines[kind].bytes for kind in wanted if kind in lines}


def _held_gb(shape: ModelShape, recipe: Recipe) -> float:
    return sum(_held(shape, recipe).values()) / 1e9


def fp32_70b_gb() -> float:
    return _held_gb(LLAMA_3_70B, FULL_FP32)


def mixed_70b_gb() -> float:
    return _held_gb(LLAMA_3_70B, FULL_MIXED)


def no_master_70b_gb() -> float:
    return _held_gb(LLAMA_3_70B, NO_MASTER)


def bf16_70b_gb() -> float:
    return _held_gb(LLAMA_3_70B, FULL_BF16)


def adam_8bit_bytes_each() -> float:
    """Bytes a parameter."""
    return 1e9 * _held_gb(LLAMA_3_70B, ADAM_8BIT) / LLAMA_3_70B.parameters


def adam_8bit_70b_gb() -> float:
    return _held_gb(LLAMA_3_70B, ADAM_8BIT)


def lora_70b_gb() -> float:
    return _held_gb(LLAMA_3_70B, LORA)


def qlora_70b_gb() -> float:
    return _held_gb(LLAMA_3_70B, QLORA)


def nf4_bytes_each() -> float:
    """Bytes of a weight in a quantized linear layer."""
    rest = 2 * (LLAMA_3_70B.parameters - LLAMA_3_70B.linear_parameters)
    return (training_memory(LLAMA_3_70B, QLORA, sequence=1)["weights"] - rest) / LLAMA_3_70B.linear_parameters


def scale_bits() -> float:
    """Bits a weight that its scale costs, with double quantization."""
    return 8 / 64 + 32 / (64 * 256)


def mixed_7b_gb() -> float:
    return _held_gb(LLAMA_2_7B, FULL_MIXED)


def mixed_8b_gb() -> float:
    return _held_gb(LLAMA_3_8B, FULL_MIXED)


def twelve_for_65b_is_the_papers_figure() -> bool:
    """The QLoRA paper's "more than 780 GB" for 65 billion parameters."""
    return 12 * 65 == 780


def bf16_70b_rest_gb() -> float:
    """Gradients and moments in bf16."""
    held = _held(LLAMA_3_70B, FULL_BF16)
    return (held["gradients"] + held["optimizer states"]) / 1e9


def _weights_share(recipe: Recipe) -> float:
    held = _held(LLAMA_3_70B, recipe)
    return 100 * held["weights"] / sum(held.values())


def weights_share_mixed() -> float:
    return _weights_share(FULL_MIXED)


def weights_share_lora() -> float:
    return _weights_share(LORA)


def weights_share_qlora() -> float:
    return _weights_share(QLORA)


def weights_are_smallest_in_mixed_precision() -> bool:
    """Together with the gradients, which are as large."""
    held = _held(LLAMA_3_70B, FULL_MIXED)
    return held["weights"] == min(held.values())


def adapter_7b_millions() -> float:
    return LLAMA_2_7B.adapter_parameters(16) / 1e6


def adapter_7b_gb() -> float:
    """Weights, gradients and moments of the adapters."""
    return sum(count for kind, count in _held(LLAMA_2_7B, LORA).items() if kind.startswith("adapter")) / 1e9


def adapter_7b_qv_megabytes() -> float:
    """r = 8 on q and v, float32."""
    return 4 * LLAMA_2_7B.adapter_parameters(8, QV) / 1e6


def gradients_and_moments_7b_gb() -> float:
    """What freezing the base of a 7B removes, master weights included."""
    held = _held(LLAMA_2_7B, FULL_MIXED)
    return (sum(held.values()) - held["weights"]) / 1e9


def weights_7b_lora() -> float:
    return training_memory(LLAMA_2_7B, LORA)["weights"] / 1e9


def weights_7b_qlora() -> float:
    return training_memory(LLAMA_2_7B, QLORA)["weights"] / 1e9


def weights_70b_lora() -> float:
    return training_memory(LLAMA_3_70B, LORA)["weights"] / 1e9


def weights_70b_qlora() -> float:
    return training_memory(LLAMA_3_70B, QLORA)["weights"] / 1e9


def tables_70b_gb() -> float:
    """Embedding and output head of Llama 3 70B in 16 bits."""
    return 2 * 2 * LLAMA_3_70B.embedding / 1e9


def adam_8bit_8b_gb() -> float:
    return _held_gb(LLAMA_3_8B, ADAM_8BIT)


def weights_8b_lora() -> float:
    return training_memory(LLAMA_3_8B, LORA)["weights"] / 1e9


def weights_8b_qlora() -> float:
    return training_memory(LLAMA_3_8B, QLORA)["weights"] / 1e9


def _peak_8b_gb(recipe: Recipe, rows: int = 1, checkpointing: bool = True) -> float:
    """Predicted: Llama-3-8B, r = 16 on all linears, rows of 2,048 tokens."""
    return training_memory(LLAMA_3_8B, recipe, rows, 2048, checkpointing=checkpointing).peak / 1e9


def lora_8b_gb() -> float:
    return _peak_8b_gb(LORA)


def lora_8b_plain_gb() -> float:
    return _peak_8b_gb(LORA, checkpointing=False)


def qlora_8b_gb() -> float:
    return _peak_8b_gb(QLORA)


def qlora_8b_two_rows_gb() -> float:
    return _peak_8b_gb(QLORA, 2)


def qlora_8b_four_rows_gb() -> float:
    return _peak_8b_gb(QLORA, 4)


def row_8b_gb() -> float:
    """What one more row costs."""
    return qlora_8b_two_rows_gb() - qlora_8b_gb()


def _rows_that_fit(shape: ModelShape, gb: float = 23.0) -> int:
    """Rows of 2,048 tokens whose predicted QLoRA peak stays below ``gb``, with checkpointing."""
    return next(rows for rows in range(100) if training_memory(shape, QLORA, rows + 1, 2048, checkpointing=True).peak > 1e9 * gb)


def rows_8b() -> int:
    return _rows_that_fit(LLAMA_3_8B)


def rows_8b_small_vocabulary() -> int:
    """The same layers with 32,000 words."""
    return _rows_that_fit(dataclasses.replace(LLAMA_3_8B, vocab=32_000))


def gemma_16bit_gb() -> float:
    return 2 * GEMMA_3_270M.parameters / 1e9


def gemma_qlora_gb() -> float:
    return training_memory(GEMMA_3_270M, QLORA)["weights"] / 1e9


def gemma_embedding_percent() -> float:
    """Share of the embedding in Gemma 3 270M's parameters."""
    return 100 * GEMMA_3_270M.embedding / GEMMA_3_270M.parameters


def gemma_linears_percent() -> float:
    """Share of the linear layers."""
    return 100 * GEMMA_3_270M.linear_parameters / GEMMA_3_270M.parameters


def gemma_upcast_costs_more_than_nf4_saves() -> bool:
    """Two more bytes for each number of the embedding, against what NF4 takes off the linears."""
    return 2 * GEMMA_3_270M.embedding / 1e9 > gemma_16bit_gb() - gemma_qlora_gb()


def qlora_70b_one_row_gb() -> float:
    """Predicted peak: Llama-3-70B, r = 16 on all linears, checkpointing, one row of 512 tokens."""
    return training_memory(LLAMA_3_70B, QLORA, 1, 512, checkpointing=True).peak / 1e9


# By the token


def _kept_7b(trained: bool, targets: tuple[str, ...] = (), input_copies: bool = False) -> int:
    """Bytes that one layer of Llama-2-7B keeps for 2,048 tokens in bf16."""
    run = Run(1, 2048, 2, trained, targets, 16 if targets else 0, input_copies=input_copies)
    return sum(activations.layer(LLAMA_2_7B, run).values())


def kept_full_kb() -> float:
    """For one token."""
    return _kept_7b(True) / 2048 / 1e3


def kept_full_2048_gb() -> float:
    """All layers."""
    return activations.layers(LLAMA_2_7B, Run(1, 2048, 2, True)) / 1e9


def kept_qv_percent() -> float:
    return 100 * _kept_7b(False, QV) / _kept_7b(True)


def kept_all_percent() -> float:
    return 100 * _kept_7b(False, ALL) / _kept_7b(True)


def kept_copies_percent() -> float:
    return 100 * _kept_7b(False, ALL, input_copies=True) / _kept_7b(True)


def float32_layer_keeps_less_than_twice() -> bool:
    """Norms and softmax keep float32 tensors in a bf16 model too."""
    wide, narrow = (sum(activations.layer(LLAMA_2_7B, Run(1, 2048, width, True)).values()) for width in (4, 2))
    return 1.7 < wide / narrow < 2


def checkpoint_times() -> float:
    """How many times less the layers keep with checkpointing, in full training."""
    run = Run(1, 2048, 2, True)
    return activations.layers(LLAMA_2_7B, run) / activations.layers(LLAMA_2_7B, run, checkpointing=True)


def loss_mb_a_token() -> float:
    return 12 * LLAMA_3_8B.vocab / 1e6


def loss_row_gb() -> float:
    """One row of 2,048 tokens, 128,256 words."""
    return 12 * 2048 * LLAMA_3_8B.vocab / 1e9


def gemma_loss_percent() -> float:
    budget = training_memory(GEMMA_3_270M, LORA, 8, 1024, checkpointing=True)
    return 100 * (budget["log-probabilities"] + budget["loss gradients"]) / budget.peak


def _kept_by_autograd(layer: nn.Module, *inputs, **named) -> int:
    """Bytes of the storages that the forward pass keeps, weights aside."""
    own, kept = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), *layer.buffers())}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(*inputs, **named)
    return sum(count for count, _ in kept.values())


def frozen_linear_keeps_nothing() -> bool:
    x = torch.randn(50, 32, requires_grad=True)
    trained, frozen = nn.Linear(32, 16), nn.Linear(32, 16).requires_grad_(False)
    return _kept_by_autograd(trained, x) == x.nbytes and _kept_by_autograd(frozen, x) == 0


def adapter_keeps_the_input() -> bool:
    """The very input, in float32 and in bfloat16, and A·x, which is r numbers a row in float32."""
    ok = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(50, 32, requires_grad=True, dtype=dtype)
        layer = LoRALinear(nn.Linear(32, 16, dtype=dtype), r=4, lora_alpha=12)
        ok.append(_kept_by_autograd(layer, x) == x.nbytes + 4 * 50 * 4)
    return all(ok)


def dropout_makes_adapters_keep_more() -> bool:
    """LoRA dropout above zero: each adapter keeps its own copy of the input and a mask."""
    x = torch.randn(50, 32, requires_grad=True)
    plain, dropped = (LoRALinear(nn.Linear(32, 16), r=4, lora_alpha=12, lora_dropout=p) for p in (0.0, 0.1))
    return _kept_by_autograd(dropped, x) > 1.2 * _kept_by_autograd(plain, x)


@functools.cache
def _small_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=176,
        vocab_size=50,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def padding_keeps_more() -> bool:
    """With padding in the batch: keys and values for every query head, and a mask."""
    ids = torch.randint(50, (2, 64))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    plain, padded = (_kept_by_autograd(_small_llama(), input_ids=ids, labels=ids, attention_mask=m) for m in (None, mask))
    repeated = 2 * 2 * (8 - 2) * 8 * 4 * ids.numel()  # layers · (k and v) · more heads · head_dim · float32
    return padded - plain > repeated


# Measured on a GPU


@functools.cache
def _rows() -> dict[str, dict]:
    return {row["name"]: row for row in recorded.load("memory_peaks")["result"]["rows"]}


def _peak_gb(name: str) -> float:
    return _rows()[name]["measured"] / 1e9


def configurations() -> int:
    return len(_rows())


def worst_percent() -> float:
    """Largest distance between prediction and measurement; a test holds the recorded predictions to today's code."""
    return max(abs(100 * (row["predicted"] / row["measured"] - 1)) for row in _rows().values())


def workspaces_mb() -> float:
    return recorded.load("memory_peaks")["result"]["workspaces"] / 1e6


def fp32_1b_measured() -> float:
    return _peak_gb("Llama-3.2-1B full fp32 1×512")


def fp32_1b_sixteen() -> float:
    lines = _rows()["Llama-3.2-1B full fp32 1×512"]["predicted_lines"]
    return sum(lines[kind] for kind in ("weights", "gradients", "optimizer states")) / 1e9


def mixed_1b_512() -> float:
    return _peak_gb("Llama-3.2-1B full mixed precision 1×512")


def mixed_1b_8192() -> float:
    return _peak_gb("Llama-3.2-1B full mixed precision 4×2048")


def mixed_1b_8192_checkpointing() -> float:
    return _peak_gb("Llama-3.2-1B full mixed precision 4×2048 checkpointing")


def lora_1b_512() -> float:
    return _peak_gb("Llama-3.2-1B LoRA all-linear 1×512")


def lora_1b_8192() -> float:
    return _peak_gb("Llama-3.2-1B LoRA all-linear 4×2048")


def lora_1b_8192_checkpointing() -> float:
    return _peak_gb("Llama-3.2-1B LoRA all-linear 4×2048 checkpointing")


def times_less_512() -> float:
    return mixed_1b_512() / lora_1b_512()


def times_less_8192() -> float:
    return mixed_1b_8192() / lora_1b_8192()


def times_less_8192_checkpointing() -> float:
    return mixed_1b_8192_checkpointing() / lora_1b_8192_checkpointing()


def peft_copies_gb() -> float:
    """How much more peft's layer needs than this course's, same run."""
    return _peak_gb("Llama-3.2-1B LoRA, peft's layer all-linear 4×2048") - lora_1b_8192()


def _passing_gb(name: str) -> float:
    """Peak less what was held before the step: activations and loss."""
    return (_rows()[name]["measured"] - _rows()[name]["measured_held"]) / 1e9


def passing_full_gb() -> float:
    return _passing_gb("Llama-3.2-1B full mixed precision 4×2048")


def passing_qv_gb() -> float:
    return _passing_gb("Llama-3.2-1B LoRA q,v 4×2048")


def passing_all_gb() -> float:
    return _passing_gb("Llama-3.2-1B LoRA all-linear 4×2048")


def passing_peft_gb() -> float:
    return _passing_gb("Llama-3.2-1B LoRA, peft's layer all-linear 4×2048")


def passing_checkpointing_gb() -> float:
    return _passing_gb("Llama-3.2-1B LoRA all-linear 4×2048 checkpointing")


def lora_7b_512() -> float:
    return _peak_gb("Llama-2-7B LoRA all-linear 1×512 checkpointing")


def qlora_7b_512() -> float:
    return _peak_gb("Llama-2-7B QLoRA all-linear 1×512 checkpointing")


def lora_7b_8192() -> float:
    return _peak_gb("Llama-2-7B LoRA all-linear 4×2048 checkpointing")


def qlora_7b_8192() -> float:
    return _peak_gb("Llama-2-7B QLoRA all-linear 4×2048 checkpointing")


def lora_7b_2048_plain() -> float:
    return _peak_gb("Llama-2-7B LoRA all-linear 1×2048")


def qlora_7b_2048_plain() -> float:
    return _peak_gb("Llama-2-7B QLoRA all-linear 1×2048")


# How cost grows: a QLoRA step of 1 × 512 tokens, r = 16 on all linears, checkpointing, and one thing changed at a time


def _grown(shape: ModelShape = LLAMA_2_7B, sequence: int = 512, rank: int = 16, checkpointing: bool = True, attention: str = "fused"):
    return training_memory(shape, QLORA, 1, sequence, rank, checkpointing=checkpointing, attention=attention)


def _grown_gb(**settings) -> float:
    return _grown(**settings).peak / 1e9


@functools.cache
def _growth(device: str = "h100") -> list[dict]:
    return recorded.load("growth", device=device)["result"]["rows"]


def _row(shape: str = LLAMA_2_7B.name, **setting) -> dict:
    """The step measured on the H100; ``shape`` is the beginning of its name."""
    wanted = {"sequence": 512, "rank": 16, "checkpointing": True, "attention": "fused"} | setting
    (row,) = [row for row in _growth() if row["shape"].startswith(shape) and wanted.items() <= row.items()]
    return row


def _measured_gb(shape: str = LLAMA_2_7B.name, **setting) -> float:
    return _row(shape, **setting)["peak"] / 1e9


def _off_percent(row: dict) -> float:
    """Distance of the prediction from the measurement; a test holds the recorded predictions to today's code."""
    return abs(100 * (row["ratio"] - 1))


def growth_rows() -> int:
    return len(_growth())


def growth_rows_cpu() -> int:
    return len(_growth("cpu"))


def growth_close_rows() -> int:
    """Steps on the H100 within half a percent of the prediction."""
    return sum(_off_percent(row) < 0.5 for row in _growth())


def growth_worst_percent() -> float:
    return max(map(_off_percent, _growth()))


def growth_worst_cpu_percent() -> float:
    return max(map(_off_percent, _growth("cpu")))


def growth_worst_is_the_tiny_model() -> bool:
    """On both devices, and then in the backward pass, where its tables and products of width r are."""
    worst = [max(_growth(device), key=_off_percent) for device in ("h100", "cpu")]
    return all(row["shape"] == "the course's tiny model" and row["peak"] == row["peaks"]["backward"] for row in worst)


def growth_missed_kb() -> float:
    """What a token needs beyond the prediction without checkpointing, measured between 4,096 and 8,192 tokens."""
    less, more = (_row(sequence=n, checkpointing=False) for n in (4096, 8192))
    return ((more["peak"] - more["predicted"]) - (less["peak"] - less["predicted"])) / 4096 / 1e3


def growth_missed_as_expected() -> bool:
    """The embedding's output in bf16, and the first norm's input and its 1/rms in float32: 6h + 4 bytes, and the allocator's rounding."""
    expected = (2 * LLAMA_2_7B.hidden + 4 * (LLAMA_2_7B.hidden + 1)) / 1e3
    return expected <= growth_missed_kb() < 1.02 * expected


def growth_predictions_are_not_too_high() -> bool:
    """On the H100, by more than a thousandth of a percent."""
    return all(row["ratio"] < 1.00001 for row in _growth())


def growth_switch_leaves_a_gradient() -> bool:
    """After checkpointing was switched on and off again the first layer keeps its norm's input: 4 (h + 1) bytes a token.

    The embedding's output stays, too, but as a leaf that gets a gradient: no operation saves it, so it isn't counted here.
    """
    ids, model = torch.randint(50, (2, 64)), copy.deepcopy(_small_llama())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)
    before = _kept_by_autograd(model, input_ids=ids, labels=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library is going to rename the two
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.gradient_checkpointing_disable()
    after = _kept_by_autograd(model, input_ids=ids, labels=ids)
    model.disable_input_require_grads()
    again = _kept_by_autograd(model, input_ids=ids, labels=ids)
    return again == before and after - before == 4 * (model.config.hidden_size + 1) * ids.numel()


def growth_rank_128_off_percent() -> float:
    return _off_percent(_row(rank=128))


def growth_256_plain_off_percent() -> float:
    return _off_percent(_row(sequence=256, checkpointing=False))


def _exact() -> list[dict]:
    return recorded.load("growth_exact", device="h100")["result"]["rows"]


def growth_exact_rows() -> int:
    return len(_exact())


def growth_exact_off_percent() -> float:
    """Largest distance without hooks left behind, and where the allocator can split every block."""
    return max(map(_off_percent, _exact()))


def growth_7b_gb() -> float:
    return _measured_gb()


growth_13b_gb = functools.partial(_measured_gb, "Llama-2-13B")
growth_70b_gb = functools.partial(_measured_gb, "Llama-2-70B")


def growth_gb_a_billion() -> float:
    """Measured, between 7B and 70B."""
    return (growth_70b_gb() - growth_7b_gb()) / (LLAMA_2_70B.parameters - LLAMA_2_7B.parameters) * 1e9


def growth_7b_weights_percent() -> float:
    """Share of the weights in the step's measured peak."""
    return 100 * _row()["predicted_weights"] / _row()["peak"]


def growth_70b_weights_percent() -> float:
    row = _row("Llama-2-70B")
    return 100 * row["predicted_weights"] / row["peak"]


growth_gemma_gb = functools.partial(_measured_gb, "Llama with Gemma")
growth_1b_gb = functools.partial(_measured_gb, "Llama-3.2-1B")
growth_small_gb = functools.partial(_measured_gb, "Gemma-3-270M's layers")


def growth_loss_decides_below_a_billion() -> bool:
    """268 million parameters with 262,144 words need more than 1.24 billion with 128,256."""
    return growth_gemma_gb() > growth_1b_gb() > growth_small_gb()


def growth_token_mb(checkpointing: bool = True) -> float:
    """Measured, from 2,048 to 8,192 tokens."""
    less, more = (_measured_gb(sequence=n, checkpointing=checkpointing) for n in (2048, 8192))
    return 1e3 * (more - less) / (8192 - 2048)


growth_token_plain_mb = functools.partial(growth_token_mb, checkpointing=False)


def growth_token_loss_mb() -> float:
    return 12 * LLAMA_2_7B.vocab / 1e6


def growth_token_inputs_mb() -> float:
    """What checkpointing keeps: the input of each layer in bf16."""
    return 2 * LLAMA_2_7B.hidden * LLAMA_2_7B.layers / 1e6


def growth_token_times() -> float:
    return growth_token_plain_mb() / growth_token_mb()


growth_7b_128_gb = functools.partial(_measured_gb, sequence=128)


def growth_7b_flat_below_256_tokens() -> bool:
    """There the fullest moment is the optimizer's step, where no token is left but its id."""
    rows = [_row(sequence=n) for n in (128, 256)]
    return abs(rows[1]["peak"] - rows[0]["peak"]) < 10_000 and all(row["peak"] == row["peaks"]["step"] for row in rows)


def growth_7b_1024_percent(checkpointing: bool = True) -> float:
    """Measured: more than with 512 tokens."""
    return 100 * (_measured_gb(sequence=1024, checkpointing=checkpointing) / _measured_gb(checkpointing=checkpointing) - 1)


growth_7b_1024_plain_percent = functools.partial(growth_7b_1024_percent, checkpointing=False)


def growth_13b_percent() -> float:
    """Measured: 13B over 7B."""
    return 100 * (growth_13b_gb() / growth_7b_gb() - 1)


def growth_rank_32_percent() -> float:
    """Measured: r = 32 over r = 16."""
    return 100 * (_measured_gb(rank=32) / _measured_gb() - 1)


# Without checkpointing: attention that is fused, and one that stores its scores
growth_plain_512_gb, growth_plain_1024_gb, growth_plain_2048_gb = (
    functools.partial(_measured_gb, sequence=n, checkpointing=False) for n in (512, 1024, 2048)
)
growth_scores_512_gb, growth_scores_1024_gb, growth_scores_2048_gb = (
    functools.partial(_measured_gb, sequence=n, checkpointing=False, attention="math") for n in (512, 1024, 2048)
)


def growth_scores_2048_in_attention() -> bool:
    """There the fullest moment has moved into attention's backward pass; at the lengths below it is the loss."""
    moments = [_row(sequence=n, checkpointing=False, attention="math")["predicted_moment"] for n in (512, 1024, 2048)]
    return moments == ["at the loss", "at the loss", "last attention back"]


def growth_scores_without_their_gradients_percent() -> float:
    """How far below the measured peak the fullest other moment is."""
    moments = _grown(sequence=2048, checkpointing=False, attention="math").moments
    others = [sum(there.values()) for moment, there in moments.items() if not moment.endswith("attention back")]
    return 100 * (1 - max(others) / 1e9 / growth_scores_2048_gb())


def growth_scores_8192_gb() -> float:
    """All scores of Llama-2-7B in float32, one row of 8,192 tokens."""
    return 4 * LLAMA_2_7B.layers * LLAMA_2_7B.heads * 8192**2 / 1e9


growth_8192_gb = functools.partial(_measured_gb, sequence=8192)


def growth_8192_scores_gb() -> float:
    """Predicted: the same where attention stores the scores of the layer that runs again, and their gradients beside them."""
    return _grown_gb(sequence=8192, attention="math")


def _attention_percent(sequence: int) -> float:
    """Share of the two causal attention products in a decoder layer's multiplications; half of the pairs are needed."""
    linear = LLAMA_2_7B.linear_parameters // LLAMA_2_7B.layers
    attention = sequence * LLAMA_2_7B.heads * LLAMA_2_7B.head_dim
    return 100 * attention / (linear + attention)


growth_attention_2048_percent = functools.partial(_attention_percent, 2048)
growth_attention_8192_percent = functools.partial(_attention_percent, 8192)


def growth_rank_millions() -> float:
    """Parameters of one more unit of rank on all linears of the 7B."""
    return LLAMA_2_7B.adapter_parameters(1) / 1e6


def growth_rank_mb() -> float:
    """Measured from r = 64 to 256, where the optimizer's step is the fullest moment."""
    return 1e3 * (_measured_gb(rank=256) - _measured_gb(rank=64)) / (256 - 64)


def growth_rank_expected_mb() -> float:
    """Twenty bytes each: weight, gradient, two moments, and the root that the optimizer makes for a moment."""
    return 20 * growth_rank_millions()


def growth_rank_turns_between_16_and_32() -> bool:
    """Up to r = 16 the fullest moment is in the backward pass, from r = 32 on the optimizer's step."""
    rows = {rank: _row(rank=rank) for rank in (4, 8, 16, 32, 64, 128, 256)}
    return all((row["peak"] == row["peaks"]["step"]) == (rank >= 32) for rank, row in rows.items())


def growth_rank_16_percent() -> float:
    """Measured: how much the peak grows from r = 4 to r = 16."""
    return 100 * (_measured_gb() / _measured_gb(rank=4) - 1)


growth_rank_256_gb = functools.partial(_measured_gb, rank=256)


def growth_rank_256_adapters_gb() -> float:
    """Adapters, their gradients, states and the step's buffer."""
    budget = _grown(rank=256)
    return sum(budget[kind] for kind in ("adapter weights", "adapter gradients", "adapter states", "step buffer")) / 1e9


def growth_rank_256_over_weights() -> float:
    return 1e9 * growth_rank_256_adapters_gb() / _grown(rank=256)["weights"]


def _seconds(how: str) -> float:
    """16 times the tokens in how many times the seconds, on the H100."""
    rows = {
        (row["how"], row["sequence"]): row for row in recorded.load("qlora_step", device="h100")["result"]["rows"] if "error" not in row
    }
    return rows[how, 2048]["seconds"] / rows[how, 512]["seconds"]


growth_seconds_times = functools.partial(_seconds, "llama, compiled, graph")
growth_seconds_waiting_times = functools.partial(_seconds, "library")
