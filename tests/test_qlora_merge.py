"""Three ways to merge a QLoRA adapter: what each gives, how far it is from what was trained, and that an error changes nothing."""

import copy
import itertools
import warnings

import bitsandbytes
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import ULP, tiny_llama
from qlora_helpers import Block, both, factors_of
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_and_replace

from course.lab import models
from reference.lora import LoRALinear, inject_lora, lora_layers, merge_lora
from reference.qlora import NF4Linear, merge_errors, merge_into_dequantized, merge_into_original, quantize_linears

few = settings(max_examples=15)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def filled(layer, size=0.1):
    with torch.no_grad():
        layer.lora_A.normal_(std=size)
        layer.lora_B.normal_(std=size)
    return layer


def adapted(out_features=40, in_features=72, bias=True, double_quant=True, dtype=torch.bfloat16, size=0.1, block_size=64):
    """An adapter of rank 3 and alpha 7 over a quantized layer; and the weight before."""
    linear = nn.Linear(in_features, out_features, bias).to(dtype)
    base = NF4Linear.from_linear(linear, block_size, double_quant, torch.float32)
    return filled(LoRALinear(base, min(3, in_features, out_features), 7), size), linear.weight.detach()


def trained_model(dtype=torch.float32, targets="all-linear"):
    """A small model in the middle of QLoRA training, and the weights that it had before."""
    model = tiny_llama().to(dtype).eval()
    weights = copy.deepcopy(model.state_dict())
    quantize_linears(model, block_size=16, compute_dtype=dtype)
    inject_lora(model, 2, 5, targets)
    for _, layer in lora_layers(model):
        filled(layer, 0.3)
    return model, weights


def snapshot(model):
    return copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]


def unchanged(model, before):
    state, types = before
    now = model.state_dict()
    return list(now) == list(state) and types == [type(m) for m in model.modules()] and all(torch.equal(now[k], state[k]) for k in state)


@few
@given(
    out_features=st.integers(1, 30),
    in_features=st.integers(1, 70),
    block_size=st.sampled_from([2, 16, 64]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_each_way_gives_the_weight_that_it_says(out_features, in_features, block_size, double_quant, bias, dtype):
    layer, original = adapted(out_features, in_features, bias, double_quant, dtype, block_size=block_size)
    delta, decoded = layer.delta_weight(), layer.base.dequantize(torch.float32)
    expected = {
        merge_into_dequantized: (decoded + delta).to(dtype),
        lambda model: merge_into_original(model, {"layer.weight": original}): (original.float() + delta).to(dtype),
    }
    for merge, weight in expected.items():
        model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
        assert merge(model) is model
        merged = model["layer"]
        assert type(merged) is nn.Linear and torch.equal(merged.weight, weight) and merged.weight.dtype == dtype
        assert (merged.bias is None) == (not bias) and not any(p.requires_grad for p in merged.parameters())
        if bias:
            assert torch.equal(merged.bias, layer.base.bias)
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    merged = merge_lora(model)["layer"]
    again = NF4Linear.from_weight(decoded + delta, None, block_size, double_quant)
    assert isinstance(merged, NF4Linear) and torch.equal(merged.weight, again.weight) and torch.equal(merged.absmax, again.absmax)
    assert merged.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_into_dequantized_keeps_the_trained_function_up_to_a_rounding(dtype):
    model, _ = trained_model(dtype)
    ids = torch.randint(40, (2, 9))
    before = model(input_ids=ids).logits
    merge_into_dequantized(model)
    assert not any(isinstance(m, (NF4Linear, LoRALinear)) for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert list(model.state_dict()) == list(tiny_llama().state_dict())
    # rounding each weight once, and sums in another order, through 14 layers
    error = (model(input_ids=ids).logits - before).float().norm() / before.float().norm()
    assert error < 40 * ULP[dtype]


def test_the_model_may_become_wider_than_it_was():
    model, _ = trained_model(torch.bfloat16)
    merge_into_dequantized(model, torch.float32)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_a_zero_adapter_merges_into_the_original_as_the_original():
    model = tiny_llama()
    weights = copy.deepcopy(model.state_dict())
    quantize_linears(model, block_size=16)
    inject_lora(model, 2, 5)
    merge_into_original(model, weights)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_weights_may_come_from_a_function_one_by_one():
    model, weights = trained_model()
    asked, twin = [], copy.deepcopy(model)
    merge_into_original(model, lambda name: asked.append(name) or weights[name])
    merge_into_original(twin, weights)
    assert len(asked) == 14 and all(name in weights and "proj" in name for name in asked)
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("original", [True, False])
def test_layers_without_an_adapter_become_plain_too(original):
    model, weights = trained_model(targets=["q_proj"])
    decoded = model.model.layers[0].mlp.up_proj.dequantize()
    merge_into_original(model, weights) if original else merge_into_dequantized(model)
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    expected = weights["model.layers.0.mlp.up_proj.weight"] if original else decoded
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_adapters_of_other_layers_are_merged_as_well():
    model, _ = trained_model(targets=["q_proj"])
    inject_lora(model, 2, 5, ["lm_head", "embed_tokens"])
    for _, layer in lora_layers(model):
        filled(layer)
    head = model.lm_head.base.weight + model.lm_head.delta_weight()
    merge_into_dequantized(model)
    assert not list(lora_layers(model)) and torch.equal(model.lm_head.weight, head)


def test_what_was_requantized_before_stays_so():
    model, weights = trained_model(targets=["q_proj"])
    layer = model.model.layers[0].self_attn.q_proj
    delta = layer.delta_weight().detach().clone()
    layer.merge()
    held = layer.base.dequantize()
    twin = copy.deepcopy(model)
    merge_into_dequantized(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, held)
    merge_into_original(twin, weights)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(twin.get_submodule(name).weight, weights[f"{name}.weight"] + delta)


def test_a_shared_layer_stays_shared():
    layer, _ = adapted()
    model = nn.ModuleDict({"first": layer, "second": layer})
    merge_into_dequantized(model)
    assert model["first"] is model["second"] and type(model["first"]) is nn.Linear


# ---- requantizing --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_requantizing_nothing_changes_nothing(dtype):
    """The largest of each block is at ±1 exactly, so the scale comes out again. Scales that are quantized too move in their last digits."""
    layer, _ = adapted(double_quant=False, dtype=dtype)
    packed, absmax = layer.base.weight.clone(), layer.base.absmax.clone()
    layer.base.merge_delta(torch.zeros(40, 72))
    assert torch.equal(layer.base.weight, packed) and torch.equal(layer.base.absmax, absmax)
    layer, _ = adapted(double_quant=True, dtype=dtype)
    before, packed = layer.base.dequantize(torch.float32), layer.base.weight.clone()
    layer.base.merge_delta(torch.zeros(40, 72))
    assert torch.equal(layer.base.weight, packed)
    torch.testing.assert_close(layer.base.dequantize(torch.float32), before, rtol=0.02, atol=0)


def test_unmerging_a_requantized_layer_does_not_bring_it_back():
    layer, _ = adapted(size=0.2)
    before = layer.base.dequantize(torch.float64)
    layer.merge()
    assert layer.merged and isinstance(layer.base, NF4Linear)
    layer.unmerge()
    error = ((layer.base.dequantize(torch.float64) - before).norm() / before.norm()).item()
    assert 0.03 < error < 0.3  # two quantizations, each about a tenth


def test_a_small_update_is_lost_in_requantizing():
    """Codes move where an update reaches half a step between levels. One of a thousandth of the weights arrives nearly nowhere."""
    layer, _ = adapted(double_quant=False, size=0.005)
    codes, before, delta = layer.base.weight.clone(), layer.base.dequantize(torch.float32), layer.delta_weight()
    assert delta.norm() < 0.002 * before.norm()
    layer.merge()
    assert (layer.base.weight == codes).float().mean() > 0.97
    arrived = layer.base.dequantize(torch.float32) - before
    assert (arrived - delta).norm() > 0.9 * delta.norm()


# ---- errors of merging ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, double_quant", itertools.product(DTYPES, (True, False)))
def test_errors_are_those_of_the_merged_layers(dtype, double_quant):
    layer, original = adapted(96, 128, True, double_quant, dtype, size=0.05)
    state = copy.deepcopy(layer.state_dict())
    errors = merge_errors(layer, original)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in state.items())
    trained = layer.base.dequantize(torch.float64) + layer.delta_weight().double()
    for name, merge in {
        "dequantized": merge_into_dequantized,
        "requantized": merge_lora,
        "original": lambda model: merge_into_original(model, {"layer.weight": original}),
    }.items():
        merged = merge(nn.ModuleDict({"layer": copy.deepcopy(layer)}))["layer"]
        weight = merged.dequantize(torch.float32) if isinstance(merged, NF4Linear) else merged.weight
        assert errors[name] == pytest.approx(((weight - trained).norm() / trained.norm()).item(), rel=1e-6)
    assert errors["dequantized"] < ULP[dtype] / 2  # one rounding
    for name in ("requantized", "original"):  # a quantization error of normal or uniform weights: about a tenth
        assert 0.03 < errors[name] < 0.2


def test_on_the_tiny_model_merging_into_the_dequantized_weights_is_the_faithful_way():
    model = models.load("tiny", where=torch.device("cpu"))[0].to(torch.bfloat16)
    weights = copy.deepcopy(model.state_dict())
    quantize_linears(model)
    inject_lora(model, 4, 10)
    for name, layer in lora_layers(model):
        errors = merge_errors(filled(layer, 0.02), weights[f"{name}.weight"])
        assert errors["dequantized"] < 0.003 < 0.02 < min(errors["requantized"], errors["original"])


def test_what_can_not_be_compared():
    layer, original = adapted()
    with pytest.raises(TypeError, match="over an NF4Linear"):
        merge_errors(LoRALinear(nn.Linear(8, 8), 2, 4), torch.ones(8, 8))
    with pytest.raises(TypeError, match="over an NF4Linear"):
        merge_errors(layer.base, original)
    with pytest.raises(ValueError, match=r"shape \(40, 72\); got .* \(72, 40\)"):
        merge_errors(layer, original.T)
    layer.merge()
    with pytest.raises(ValueError, match="merged already"):
        merge_errors(layer, original)


# ---- refused, and the model as it was ------------------------------------------------------------------------------------------------


def broken_adapter(model, weights):
    model.model.layers[1].mlp.up_proj.lora_B.data[0, 0] = float("nan")


def too_large_for_half(model, weights):
    model.model.layers[1].mlp.up_proj.lora_B.data.fill_(1e6)
    model.model.layers[1].mlp.up_proj.lora_A.data.fill_(1e6)


def missing(model, weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


def of_another_shape(model, weights):
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].T


def packed_already(model, weights):
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(24, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    "spoil, original, error, words",
    [
        (broken_adapter, True, ValueError, r"model\.layers\.1\.mlp\.up_proj"),
        (broken_adapter, False, ValueError, r"model\.layers\.1\.mlp\.up_proj"),
        (too_large_for_half, True, ValueError, "too narrow"),
        (too_large_for_half, False, ValueError, "too narrow"),
        (missing, True, KeyError, r"model\.layers\.1\.mlp\.up_proj\.weight"),
        (of_another_shape, True, ValueError, r"up_proj\.weight must be the weight before quantization"),
        (packed_already, True, ValueError, r"up_proj\.weight must be the weight before quantization"),
    ],
)
def test_an_error_changes_nothing(spoil, original, error, words):
    model, weights = trained_model(torch.float16)
    spoil(model, weights)
    state, types = snapshot(model)
    with pytest.raises(error, match=words):
        merge_into_original(model, weights) if original else merge_into_dequantized(model)
    now = model.state_dict()
    assert types == [type(m) for m in model.modules()]
    assert all(torch.equal(now[key].nan_to_num(), value.nan_to_num()) for key, value in state.items())


def test_a_broken_adapter_of_another_layer_changes_nothing():
    model, _ = trained_model(targets=["q_proj"])
    inject_lora(model, 2, 5, ["lm_head"])
    model.lm_head.lora_B.data.fill_(float("inf"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN or infinity"):
        merge_into_dequantized(model)
    assert unchanged(model, before)


def test_there_must_be_something_to_merge():
    with pytest.raises(ValueError, match="no NF4Linear"):
        merge_into_dequantized(tiny_llama())
    layer, original = adapted()
    with pytest.raises(ValueError, match="can't be replaced in place"):
        merge_into_dequantized(layer)
    with pytest.raises(ValueError, match="can't be replaced in place"):
        merge_into_original(layer.base, {"weight": original})


def test_a_requantizing_merge_that_breaks_leaves_the_layer():
    layer, _ = adapted()
    before = layer.base.weight.clone()
    with pytest.raises(ValueError, match="NaN or inf"):
        layer.base.merge_delta(torch.full((40, 72), float("inf")))
    assert torch.equal(layer.base.weight, before)
    filled(layer).lora_A.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        merge_lora(nn.ModuleDict({"layer": layer}))
    assert torch.equal(layer.base.weight, before) and not layer.merged


def of_the_library(model, ours):
    """The merge of peft's adapter with our factors over ``model``, which may be quantized: name -> weight."""
    names = [name for name, _ in lora_layers(ours)]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=10, target_modules=names))
    for name, layer in lora_layers(ours):
        for target, source in zip(factors_of(model.base_model.model.get_submodule(name)), (layer.lora_A, layer.lora_B), strict=True):
            target.data = source.data.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a merge into four bits
        merged = model.merge_and_unload()
    return {name: merged.get_submodule(name) for name in names}


def test_which_call_of_the_library_is_which_merge():
    """merge_and_unload over four bits requantizes; after dequantizing, or over the original, it adds."""
    original = Block()
    state = copy.deepcopy(original.state_dict())
    ours, theirs, _ = both(original, double_quant=False)
    packed = theirs.unload()  # bitsandbytes' layers, without the adapter
    plain = copy.deepcopy(packed)
    plain = dequantize_and_replace(plain, BitsAndBytesConfig(load_in_4bit=True))

    requantized = merge_lora(copy.deepcopy(ours))
    packed.is_loaded_in_4bit = True
    for name, layer in of_the_library(packed, ours).items():
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        assert (layer.weight.data.flatten() != requantized.get_submodule(name).weight.flatten()).float().mean() < 1e-3
    for base, merged in ((plain, merge_into_dequantized(copy.deepcopy(ours))), (original, merge_into_original(copy.deepcopy(ours), state))):
        for name, layer in of_the_library(base, ours).items():
            torch.testing.assert_close(layer.weight, merged.get_submodule(name).weight, rtol=1e-5, atol=1e-6)
