"""reference.memory against reality: parameters, bytes of every kept tensor, and the height of a real training step.

Byte counts are integers and are compared exactly. Peaks are compared within 2 %: the prediction leaves out norms' and softmax's short-lived
vectors and autograd's order of freeing.
"""

import dataclasses
import math
import weakref
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig

from benchmarks import cases, memory_peaks
from course.lab import recorded
from reference.lora import inject_lora, trainable_parameters
from reference.memory import RECIPES, SHAPES, activations, training_memory
from reference.memory.activations import Run
from reference.memory.recipes import (
    ADAM_8BIT,
    FULL_BF16,
    FULL_FP32,
    FULL_MIXED,
    LORA,
    LORA_PEFT,
    QLORA,
    Recipe,
    adam_8bit_bytes,
    nf4_bytes,
)
from reference.model_shapes import GEMMA_3_270M, GPT_3, LLAMA_2_7B, LLAMA_2_70B, LLAMA_3_2_1B, LLAMA_3_8B, LLAMA_3_70B, ModelShape

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = ModelShape("small", 64, 4, 4, 2, 16, 256, 64, tied=True)


def config_of(shape: ModelShape):
    if shape is GPT_3:
        return GPT2Config(
            n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads, n_positions=shape.positions, vocab_size=shape.vocab
        )
    return cases.config_of(shape, Gemma3TextConfig if shape is GEMMA_3_270M else LlamaConfig)


def model_of(shape: ModelShape, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config_of(shape)).to(dtype).train()


# --- parameters


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_are_those_of_the_model(shape):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    assert shape.parameters == model.num_parameters()


def test_known_totals():
    assert LLAMA_2_7B.parameters == 6_738_415_616
    assert LLAMA_2_70B.parameters == 68_976_648_192
    assert LLAMA_3_8B.parameters == 8_030_261_248
    assert LLAMA_3_70B.parameters == 70_553_706_496
    assert GEMMA_3_270M.parameters == 268_098_176


def test_shape_from_a_configuration():
    for shape in (LLAMA_2_7B, LLAMA_3_2_1B, LLAMA_3_70B):
        assert ModelShape.from_config(config_of(shape), shape.name) == shape
    assert ModelShape.from_config(MistralConfig(tie_word_embeddings=False)).parameters == 7_241_732_096  # Mistral 7B
    with pytest.raises(ValueError, match="gemma3_text"):
        ModelShape.from_config(config_of(GEMMA_3_270M))
    with pytest.raises(ValueError, match="biases"):
        ModelShape.from_config(LlamaConfig(attention_bias=True))


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), ("k_proj", "down_proj")])
def test_adapter_parameters_are_those_that_inject_lora_trains(targets):
    model = model_of(SMALL, torch.float32)
    inject_lora(model, 6, 15, targets)
    assert SMALL.adapter_parameters(6, targets) == trainable_parameters(model)[0]


def test_adapter_of_gpt_3_in_the_lora_paper():
    assert GPT_3.adapter_parameters(4, ("q_proj", "v_proj")) == 18_874_368


# --- bytes of a parameter


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sixteen_bytes_a_parameter(shape):
    for recipe, each in ((FULL_FP32, 16), (FULL_MIXED, 16), (FULL_BF16, 8)):
        lines = training_memory(shape, recipe, sequence=1).lines
        of_parameters = ("weights", "gradients", "master weights", "optimizer states")
        assert sum(lines[kind].bytes for kind in of_parameters if kind in lines) == each * shape.parameters


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (333, 1000), (4096, 256)])
def test_nf4_bytes_are_those_of_bitsandbytes(size):
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(size, dtype=torch.bfloat16), blocksize=64, compress_statistics=True, quant_type="nf4")
    parts = (packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert nf4_bytes(math.prod(size)) == sum(part.nbytes for part in parts)


@pytest.mark.parametrize("elements", [100, 4095, 4096, 5000, 70_001])
def test_adam_8bit_bytes_are_those_of_bitsandbytes(elements):
    from bitsandbytes.optim import AdamW8bit

    parameter = torch.nn.Parameter(torch.randn(elements))
    optimizer = AdamW8bit([parameter])
    parameter.grad = torch.randn(elements)
    optimizer.step()
    own = {name: value for name, value in optimizer.state[parameter].items() if torch.is_tensor(value) and not name.startswith("qmap")}
    assert adam_8bit_bytes(elements) == sum(value.nbytes for value in own.values())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_a_real_model_holds_between_steps(recipe):
    """Weights and states after two steps, in every recipe that the benchmark runs; the few kB over are rotary tables and code books."""
    live, held = Live(), {}
    configuration = memory_peaks.Configuration(SMALL, recipe, 2, 16, rank=4)
    with live:
        memory_peaks.steps(configuration, torch.device("cpu"), lambda moment: held.setdefault(moment, []).append(live.bytes), count=2)
    lines = training_memory(SMALL, recipe, 2, 16, rank=4).lines
    expected = sum(lines[kind].bytes for kind in lines if kind.endswith(("weights", "states")))
    assert 0 <= held["held"][-1] - expected < 5_000


# --- bytes of a token


def kept_by_autograd(model, ids, mask=None) -> int:
    """Bytes of the distinct storages that a forward pass saves for the backward pass, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding the tensor keeps its address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, attention_mask=mask)
    return sum(count for count, _ in kept.values())


shapes = st.builds(
    lambda kv_heads, group, head_dim, wide, layers, mlp, tied: ModelShape(
        "drawn", kv_heads * group * wide, layers, kv_heads * group, kv_heads, head_dim, mlp, 37, tied=tied
    ),
    st.integers(1, 3), st.integers(1, 2), st.sampled_from([8, 16]), st.sampled_from([8, 12]), st.integers(2, 3), st.sampled_from([20, 52]),
    st.booleans(),
)  # fmt: skip
targets_or_none = st.one_of(st.none(), st.just(ALL), st.sets(st.sampled_from(ALL), min_size=1, max_size=3).map(tuple))


@settings(max_examples=40)
@given(shapes, targets_or_none, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 3), st.integers(2, 9), st.booleans())
def test_kept_bytes_are_exact(shape, targets, dtype, batch, sequence, fused):
    """Full training and LoRA on any linears, grouped queries, both dtypes, both attentions: not a byte off."""
    model = model_of(shape, dtype)
    if targets:
        inject_lora(model, 3, 7, targets)
    run = Run(batch, sequence, dtype.itemsize, not targets, targets or (), 3, 4, attention="fused" if fused else "math")
    with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        assert kept_by_autograd(model, torch.randint(37, (batch, sequence))) == activations.kept(shape, run)


@settings(max_examples=25)
@given(shapes, targets_or_none, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(2, 3), st.integers(3, 9), st.booleans())
def test_kept_bytes_are_exact_with_padding(shape, targets, dtype, batch, sequence, fused):
    """A mask is kept in each layer, and with one the library repeats keys and values for each head."""
    model = model_of(shape, dtype)
    if targets:
        inject_lora(model, 3, 7, targets)
    run = Run(batch, sequence, dtype.itemsize, not targets, targets or (), 3, 4, attention="fused" if fused else "math", padding=True)
    ids, mask = torch.randint(37, (batch, sequence)), torch.ones(batch, sequence, dtype=torch.long)
    mask[0, : sequence // 2] = 0
    with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        assert kept_by_autograd(model, ids, mask) == activations.kept(shape, run)


def test_padding_costs_what_the_repeated_keys_and_the_masks_take():
    """Nothing under attention that stores its scores; in the whole answer, the activations alone grow, and the peak with them."""
    for shape in (LLAMA_3_8B, LLAMA_2_7B):
        plain, padded = (training_memory(shape, LORA, 4, 512, padding=padding) for padding in (False, True))
        repeated = 2 * (shape.heads - shape.kv_heads) * shape.head_dim * 2 * 4 * 512
        mask = 2 * 4 * 512 * 512
        assert padded["activations"] - plain["activations"] == shape.layers * (repeated + mask)
        assert padded.peak - plain.peak == shape.layers * (repeated + mask) and "padding" in padded.title
        math = (training_memory(shape, LORA, 4, 512, attention="math", padding=padding).peak for padding in (False, True))
        assert len(set(math)) == 1


@pytest.mark.parametrize("targets", [None, ALL, ("q_proj", "v_proj")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_are_exact_with_checkpointing(targets, dtype):
    model = model_of(SMALL, dtype)
    if targets:
        inject_lora(model, 4, 12, targets)
    model.gradient_checkpointing_enable()
    run = Run(2, 9, dtype.itemsize, not targets, targets or (), 4)
    rotary = activations.head(SMALL, run)["rotary tables"]  # held by the checkpoints themselves, not by autograd
    assert kept_by_autograd(model, torch.randint(64, (2, 9))) == activations.kept(SMALL, run, checkpointing=True) - rotary


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj"), ("o_proj", "up_proj")])
def test_kept_bytes_are_exact_for_peft(targets, adapter_dtype):
    """peft's layer keeps a float32 copy of the input for each float32 adapter; with bf16 adapters it keeps the shared input."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(targets))
    model = peft.get_peft_model(model_of(SMALL, torch.bfloat16), config, autocast_adapter_dtype=adapter_dtype == torch.float32)
    run = Run(2, 9, 2, False, targets, 4, adapter_dtype.itemsize, input_copies=True)
    assert kept_by_autograd(model, torch.randint(64, (2, 9))) == activations.kept(SMALL, run)


def test_under_autocast_pefts_copies_have_sixteen_bits():
    """Copies of inputs and A·x are halved, and A and B have 16-bit copies where a gradient flows through them: not a byte off."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model_of(SMALL, torch.bfloat16), peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(ALL)))
    run = Run(2, 9, 2, False, ALL, 4, input_copies=True)
    groups = [activations.layer(SMALL, run, inflow) for inflow in (False, *[True] * (SMALL.layers - 1))]
    halved = sum(each["A's copies of inputs"] + each["A·x"] for each in groups) // 2
    first = sum(4 * SMALL.linears[name][1] for name in activations.ATTENTION_INPUTS)  # A of q, k, v in the first layer: no gradient of x
    cast = 2 * (SMALL.adapter_parameters(4, ALL) - first)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept_by_autograd(model, torch.randint(64, (2, 9))) == activations.kept(SMALL, run) - halved + cast


def test_kept_bytes_are_exact_over_four_bit_weights():
    model = model_of(SMALL, torch.bfloat16)
    cases.pack_with_bitsandbytes(model, lambda name: model.get_parameter(name).data, torch.device("cpu"))
    inject_lora(model, 4, 12)
    assert kept_by_autograd(model, torch.randint(64, (2, 9))) == activations.kept(SMALL, Run(2, 9, 2, False, ALL, 4))


def test_lora_keeps_nearly_as_much_as_full_training():
    full, qv, everywhere = (
        activations.layers(LLAMA_2_7B, Run(1, 2048, 2, trained, targets, 16))
        for trained, targets in ((True, ()), (False, ("q_proj", "v_proj")), (False, ALL))
    )
    assert 0.7 < qv / full < everywhere / full < 1
    copies = activations.layers(LLAMA_2_7B, Run(1, 2048, 2, False, ALL, 16, input_copies=True))
    assert copies > full  # with peft's float32 copies LoRA needs more activation memory than full training


# --- the peak of a step


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that torch's operations hand out while it is active, and their highest sum."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes and storage.nbytes():
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key):
        self.bytes -= self.sizes.pop(key, 0)


def real_peaks(configuration, count: int = 2) -> dict[str, int]:
    """Highest live bytes of the last step on a CPU, by moment."""
    live, highest = Live(), {}

    def note(moment):
        highest[moment], live.peak = live.peak, live.bytes

    with live:
        memory_peaks.steps(configuration, torch.device("cpu"), note, count)
    return highest


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sequence, vocab, tied", [(16, 64, True), (256, 64, True), (128, 2048, False), (4, 4096, True), (4, 16, True)])
def test_peak_of_a_real_step(recipe, checkpointing, sequence, vocab, tied):
    shape = dataclasses.replace(SMALL, vocab=vocab, tied=tied)
    configuration = memory_peaks.Configuration(shape, recipe, 2, sequence, checkpointing, rank=4)
    highest = real_peaks(configuration)
    expected = training_memory(shape, recipe, 2, sequence, 4, checkpointing=checkpointing)
    step = sum(expected.moments["optimizer's step"].values())
    if recipe.moment_bytes > 1:  # on a CPU bitsandbytes unpacks its states: its GPU kernels don't
        assert step == pytest.approx(highest["step"], rel=0.02)
    before = max(sum(there.values()) for moment, there in expected.moments.items() if moment != "optimizer's step")
    assert before == pytest.approx(max(highest["forward"], highest["backward"]), rel=0.02)


def test_adamw_needs_a_fifth_copy_unless_fused():
    parameter = torch.nn.Parameter(torch.randn(100_000))
    more = {}
    for fused in (False, True):
        optimizer = torch.optim.AdamW([parameter], **({"fused": True} if fused else {"foreach": True}))
        live = Live()
        parameter.grad = torch.randn(100_000)
        optimizer.step()
        with live:
            optimizer.step()
        more[fused] = live.peak
    assert more[False] == pytest.approx(FULL_FP32.moment_bytes * 100_000, rel=1e-3)
    assert more[True] < 1_000


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_recorded_peaks_are_within_the_bar(card):
    """Every configuration of the benchmark as it was measured on a GPU, against what the code predicts today."""
    rows = {row["name"]: row for row in recorded.load("memory_peaks", card)["result"]["rows"]}
    assert set(rows) == {configuration.name for configuration in memory_peaks.CONFIGURATIONS}, "run benchmarks.memory_peaks again"
    for configuration in memory_peaks.CONFIGURATIONS:
        predicted, row = memory_peaks.predict(configuration), rows[configuration.name]
        assert row["predicted"] == predicted.peak, f"{configuration.name}: run benchmarks.memory_peaks again"
        assert predicted.peak == pytest.approx(row["measured"], rel=0.05 if row["activation_share"] < 0.5 else 0.15), configuration.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("batch, sequence, checkpointing", [(1, 256, False), (4, 1024, False), (4, 1024, True)])
def test_peak_on_a_gpu(recipe, batch, sequence, checkpointing):
    shape = ModelShape("a fifth of a billion", 1024, 8, 16, 4, 64, 4096, 64_000)
    configuration = memory_peaks.Configuration(shape, recipe, batch, sequence, checkpointing)
    device = torch.device("cuda")
    row = memory_peaks.measure_one(configuration, memory_peaks.Meter(device), device)
    assert row["ratio"] == pytest.approx(1, abs=0.05 if row["activation_share"] < 0.5 else 0.15), row


# --- the breakdown as a whole


def test_prints_the_formula_beside_each_line():
    breakdown = training_memory(LLAMA_2_7B, QLORA, 4, 2048, checkpointing=True)
    text = str(breakdown)
    for kind, line in breakdown.lines.items():
        (row,) = (row for row in text.splitlines() if row.strip().startswith(f"{kind}  "))
        assert row.endswith(line.formula) and f"{line.bytes / 1e9:,.3f} GB" in row
    assert f"{breakdown.peak / 1e9:,.3f} GB   ◀ peak" in text
    assert max(map(len, text.splitlines())) < 120


@settings(max_examples=25)
@given(
    st.sampled_from(list(SHAPES.values())), st.sampled_from(list(RECIPES.values())), st.integers(1, 8), st.integers(1, 4096), st.booleans()
)
def test_every_moment_is_made_of_the_lines(shape, recipe, batch, sequence, checkpointing):
    breakdown = training_memory(shape, recipe, batch, sequence, checkpointing=checkpointing)
    for there in breakdown.moments.values():
        assert all(0 <= count <= breakdown[kind] for kind, count in there.items() if kind not in ("temporaries", "activations"))
        assert sum(there.values()) <= breakdown.peak
    larger = training_memory(shape, recipe, batch + 1, sequence, checkpointing=checkpointing)
    assert larger.peak >= breakdown.peak and larger["activations"] > breakdown["activations"]
    assert larger["weights"] == breakdown["weights"]


def test_which_part_is_the_smallest_depends_on_the_recipe():
    full = training_memory(LLAMA_3_70B, FULL_MIXED, sequence=1)
    assert full["weights"] == min(full[kind] for kind in ("weights", "gradients", "master weights", "optimizer states"))
    lora = training_memory(LLAMA_3_70B, LORA, sequence=2048, checkpointing=True)
    assert lora["weights"] > 0.9 * lora.peak


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"sequence": 2.5}, TypeError, "sequence must be an integer, got 2.5"),
        ({"batch": True}, TypeError, "batch must be an integer, got True"),
        ({"rank": 0}, ValueError, "rank must be an integer from 1 to 1024"),
        ({"rank": 1025}, ValueError, "got 1025"),
        ({"targets": ("q_proj", "wq")}, ValueError, "Llama-3-8B has no wq; choose from q_proj"),
        ({"targets": ()}, ValueError, "targets is empty"),
        ({"attention": "flash"}, ValueError, "'fused' or 'math', got 'flash'"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        training_memory(LLAMA_3_8B, LORA, **change)


def test_shapes_and_recipes_refuse():
    with pytest.raises(ValueError, match="mlp must be at least 1, got -1"):
        dataclasses.replace(SMALL, mlp=-1)
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads"):
        dataclasses.replace(SMALL, kv_heads=3)
    with pytest.raises(ValueError, match="weight_bytes must be one of"):
        Recipe("quarter", 1, 2, 4)
    with pytest.raises(ValueError, match="quantized weights can't be trained"):
        dataclasses.replace(ADAM_8BIT, quantized=True)
    with pytest.raises(ValueError, match="step_buffer"):
        dataclasses.replace(LORA_PEFT, step_buffer="some")


# --- the exercises' worked answers are the same arithmetic


def test_worked_answers_agree_with_the_reference():
    from course.checks import memory_budget as worked

    for recipe, name in ((FULL_FP32, "fp32"), (FULL_MIXED, "mixed"), (FULL_BF16, "bf16"), (ADAM_8BIT, "8-bit Adam")):
        lines = training_memory(LLAMA_2_7B, recipe, sequence=1).lines
        total = sum(lines[kind].bytes for kind in ("weights", "gradients", "master weights", "optimizer states") if kind in lines)
        assert worked.full.reference(LLAMA_2_7B.parameters, name) == pytest.approx(total / 1e9, rel=1e-5)  # norms' moments in float32
    for shape in (LLAMA_3_8B, LLAMA_3_2_1B):
        sizes = worked.Sizes(*(getattr(shape, field) for field in worked.Sizes._fields))
        lora = training_memory(shape, LORA, rank=8, targets=("k_proj", "o_proj", "down_proj"))
        budget = worked.lora.reference(sizes, 8, ("k_proj", "o_proj", "down_proj"))
        assert budget["trained"] == shape.adapter_parameters(8, ("k_proj", "o_proj", "down_proj"))
        assert budget["gradient bytes"] == lora["adapter gradients"] and budget["optimizer bytes"] == lora["adapter states"]
        exact = training_memory(shape, QLORA)["weights"]  # code books and offsets: about 1 kB a matrix
        assert worked.qlora.reference(sizes, True) == pytest.approx(exact, rel=5e-4)
        groups = ("input of gate, up", "gate, silu(gate), up", "input of down")
        for trained, adapted in ((True, ()), (False, ("gate_proj",)), (False, ("down_proj", "up_proj")), (False, ("q_proj",))):
            kept = activations.layer(shape, Run(2, 50, 2, trained, adapted, 4))
            answer = worked.mlp.reference(100, shape.hidden, shape.mlp, 2, trained, set(adapted))
            assert answer == sum(kept.get(group, 0) for group in groups)


def test_worked_batch_is_the_largest_that_the_breakdown_admits():
    from course.checks import memory_budget as worked

    capacity, at = 80 * 10**9, [training_memory(LLAMA_3_2_1B, LORA, batch, 1024) for batch in (2, 3)]
    row = at[1].moments["at the loss"]["activations"] - at[0].moments["at the loss"]["activations"]
    held = sum(at[0].moments["at the loss"].values()) - 2 * (row + 12 * 1024 * LLAMA_3_2_1B.vocab)
    batch = worked.batch.reference(capacity, held, row // 1024, 1024, LLAMA_3_2_1B.vocab)
    assert training_memory(LLAMA_3_2_1B, LORA, batch, 1024).peak <= capacity < training_memory(LLAMA_3_2_1B, LORA, batch + 1, 1024).peak
