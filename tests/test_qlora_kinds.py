"""reference.qlora in models whose code knows of the weights: what stays dense and is said to, hooks, and what can't be taken over."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from lora_helpers import tiny_llama
from test_lora_kinds import TINY, ByWeight, Deeper, Looped, assert_refused, fill
from torch import nn
from torch.nn.utils import prune
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM, Llama4TextConfig

from reference.lora import inject_lora, merge_lora
from reference.qlora import NF4Linear, dense_report, merge_into_dequantized, merge_into_original, quantize_linears
from reference.qlora.dense import left_dense

IDS = torch.randint(30, (2, 7), generator=torch.Generator().manual_seed(1))
SMALL = dict(decoder_start_token_id=0, vocab_size=30, d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8)


def names_of(model, parts):
    return {name for name, part in model.named_modules() if part in parts}


# ---- layers whose weight is read by other code ---------------------------------------------------------------------------------------


def t5(gated):
    return T5ForConditionalGeneration(T5Config(**SMALL, feed_forward_proj="gated-gelu" if gated else "relu"))


def switch():
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**SMALL, num_experts=2, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0)
    )


@pytest.mark.parametrize("make", [lambda: t5(False), lambda: t5(True), switch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_asks_for_the_dtype_of_wo(make, dtype):
    """Its forward casts to it: to uint8, if the weight were packed."""
    model = make().to(dtype).eval()
    names = quantize_linears(model)
    left = names_of(model, left_dense(model))
    assert left and all(name.endswith(".wo") for name in left) and not any(name.endswith(".wo") for name in names)
    assert inject_lora(model, 2, 3)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert "reads: " in str(dense_report(model))


@pytest.mark.parametrize(
    "make, dense",
    [
        (tiny_llama, set()),
        (ByWeight, {"read", "both", "asked"}),
        (Deeper, {"block.read", "block.both", "block.asked", "block.spare"}),
        (Looped, {"first"}),
        (lambda: nn.TransformerEncoderLayer(16, 2, 32), set()),
        (lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=30)), {"dense", "dense_4h_to_h"}),
        (lambda: MambaForCausalLM(MambaConfig(**TINY)), {"dt_proj", "x_proj", "out_proj", "lm_head"}),
    ],
)
def test_what_the_code_around_a_layer_reads_is_left_dense(make, dense):
    model = make()
    names = quantize_linears(model, block_size=16, compute_dtype=torch.float32)
    left = names_of(model, left_dense(model))
    assert {name if name in dense else name.rpartition(".")[2] for name in left} == dense
    assert not left & set(names)
    assert {name for name, part in model.named_modules() if isinstance(part, NF4Linear)} == set(names)
    for name in left - {"lm_head"}:  # which is tied to the embedding, and counted there
        assert "weight" in dense_report(model).dense[f"{name}.weight"][1]


def test_a_quantized_mamba_runs():
    model = MambaForCausalLM(MambaConfig(**TINY)).eval()
    assert quantize_linears(model) == ["backbone.layers.0.mixer.in_proj"]
    assert torch.isfinite(model(IDS).logits).all()


def test_pruned_layers_are_left():
    model = nn.Sequential(nn.Linear(8, 8), prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5))
    assert quantize_linears(model) == ["0"]
    assert "computes its weight" in dense_report(model).dense["1.weight_orig"][1]


# ---- how much stays dense ------------------------------------------------------------------------------------------------------------

EXPERTS = dict(vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=8))


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**EXPERTS, num_local_experts=8, head_dim=8, layer_types=["full_attention"] * 2))


def llama4():
    return Llama4ForCausalLM(
        Llama4TextConfig(**EXPERTS, intermediate_size_mlp=32, num_local_experts=8, head_dim=8, interleave_moe_layer_step=1)
    )


@pytest.mark.parametrize("make", [mixtral, gpt_oss, llama4])
def test_experts_of_three_axes_stay_dense_and_are_told(make):
    model = make()
    whole = sum(p.numel() for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 3}
    assert before
    quantize_linears(model, block_size=16)
    report = dense_report(model)
    assert report.quantized + sum(count for count, _ in report.dense.values()) == whole
    experts = {name for name, (_, why) in report.dense.items() if "tensors of 3 axes" in why}
    assert experts == set(before)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert report.percent > 80
    rows = str(report).splitlines()
    assert rows[0] == f"{report.percent:.1f} % of {whole:,} parameters stay dense" and "which are no nn.Linear" in rows[1]
    assert sum(float(row.split("%")[0]) for row in rows[1:]) == pytest.approx(report.percent, abs=0.05 * len(rows) + 0.05)


def test_the_report_counts_each_weight_once_and_no_adapter():
    model = tiny_llama(tie_word_embeddings=True)
    whole = sum(p.numel() for p in model.parameters())
    assert dense_report(model).percent == 100
    quantize_linears(model)
    report = dense_report(model)
    embedding_and_norms = model.model.embed_tokens.weight.numel() + 5 * 16
    assert report.quantized == whole - embedding_and_norms
    assert report.percent == pytest.approx(100 * embedding_and_norms / whole)
    inject_lora(model, 2, 3)
    assert {name.replace(".base", "") for name in dense_report(model).dense} == set(report.dense)
    assert dense_report(model).percent == report.percent
    biased = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_linears(biased, skip="1")
    assert dense_report(biased).dense == {
        "0.bias": (8, "biases of quantized layers"),
        "1.weight": (64, "linear layers that were skipped"),
        "1.bias": (8, "linear layers that were skipped"),
    }


# ---- hooks ---------------------------------------------------------------------------------------------------------------------------

REGISTER = {
    "forward": lambda layer, note: layer.register_forward_hook(lambda *_: note()),
    "forward with keywords": lambda layer, note: layer.register_forward_hook(lambda *_: note(), with_kwargs=True, always_call=True),
    "before forward": lambda layer, note: layer.register_forward_pre_hook(lambda *_: note()),
    "before forward with keywords": lambda layer, note: layer.register_forward_pre_hook(lambda *_: note(), with_kwargs=True),
    "backward": lambda layer, note: layer.register_full_backward_hook(lambda *_: note()),
    "before backward": lambda layer, note: layer.register_full_backward_pre_hook(lambda *_: note()),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_survive_quantizing_adapting_and_every_merge(kind):
    calls = []

    def count(model):
        calls.clear()
        x = torch.randn(3, 8, requires_grad=True)
        model(x).sum().backward()
        return len(calls)

    dense = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weights = {name: value.clone() for name, value in dense.state_dict().items()}
    handle = REGISTER[kind](dense[0], lambda: calls.append(1))
    assert count(dense) == 1
    quantize_linears(dense)
    assert isinstance(dense[0], NF4Linear) and count(dense) == 1
    inject_lora(dense, 2, 3)
    fill(dense)
    second = REGISTER[kind](dense[0], lambda: calls.append(1))  # on the adapter
    assert count(dense) == 2
    for merge in (merge_lora, merge_into_dequantized, lambda model: merge_into_original(model, weights)):
        assert count(merge(copy.deepcopy(dense))) == 2
    handle.remove()
    assert count(dense) == 1
    second.remove()
    assert count(dense) == 0


def test_a_handle_still_removes_its_hook_after_quantizing():
    model = nn.Sequential(nn.Linear(8, 8))
    handle = model[0].register_forward_hook(lambda *_: None)
    quantize_linears(model)
    assert len(model[0]._forward_hooks) == 1
    handle.remove()
    assert not model[0]._forward_hooks


STATE = {
    "register_state_dict_post_hook": lambda *_: None,
    "register_state_dict_pre_hook": lambda *_: None,
    "register_load_state_dict_pre_hook": lambda *_: None,
    "register_load_state_dict_post_hook": lambda *_: None,
}


@pytest.mark.parametrize("register", STATE)
def test_state_dict_hooks_are_refused_by_name(register):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    getattr(model[1], register)(STATE[register])
    assert_refused(model, r"1 has a state-dict hook \(.*state_dict.*hooks\).*remove it", quantize_linears)
    assert quantize_linears(model, skip="1") == ["0"]


def test_a_forward_put_on_from_outside_is_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    add_hook_to_module(model[1], AlignDevicesHook(execution_device="cpu"))
    assert_refused(model, "1 has a forward that was put on it from outside.*remove_hook_from_module", quantize_linears)
    model[1] = nn.Linear(8, 8)
    model[1].forward = lambda x: x
    assert_refused(model, "1 has a forward that was put on it", quantize_linears)


# ---- merging -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [merge_lora, merge_into_dequantized, lambda m: merge_into_original(m, lambda name: torch.randn(8, 8))])
@pytest.mark.parametrize("spoil", ["base", "factors"])
def test_merging_what_is_on_the_meta_device_is_refused(merge, spoil):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_linears(model)
    inject_lora(model, 2, 3)
    if spoil == "base":
        model[1].base.to("meta")
    else:
        model[1].lora_A = nn.Parameter(model[1].lora_A.to("meta"))
    parts = dict(model.named_modules())
    with pytest.raises(ValueError, match="is on the meta device, without values"):
        merge(model)
    assert dict(model.named_modules()) == parts and not any(layer.merged for layer in model)
