"""state_dict of a quantized layer in bitsandbytes' own keys: there and back through a file, and what is refused."""

import copy
import itertools
import json

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import tiny_llama
from qlora_helpers import bnb_linear
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig

from reference.lora import LoRALinear
from reference.qlora import NF4Linear, quantize_linears
from reference.qlora.format import STATE

few = settings(max_examples=25)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def quantized(out_features=32, in_features=64, bias=True, block_size=64, double_quant=True, dtype=torch.bfloat16):
    return NF4Linear.from_linear(nn.Linear(in_features, out_features, bias).to(dtype), block_size, double_quant, torch.float32)


def empty_like(layer, **other):
    options = dict(block_size=layer.block_size, double_quant=layer.double_quant, compute_dtype=layer.compute_dtype)
    return NF4Linear(layer.in_features, layer.out_features, layer.bias is not None, **{**options, **other})


def same(a, b):
    return list(a) == list(b) and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype, double_quant, bias, block_size", itertools.product(DTYPES, (True, False), (True, False), (64, 128)))
def test_our_file_is_theirs_byte_for_byte(tmp_path, dtype, double_quant, bias, block_size):
    linear = nn.Linear(256, 96, bias).to(dtype)
    ours, theirs = NF4Linear.from_linear(linear, block_size, double_quant, dtype), bnb_linear(linear, block_size, double_quant, dtype)
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("dtype, double_quant", itertools.product(DTYPES, (True, False)))
def test_our_layer_loads_in_bitsandbytes(tmp_path, dtype, double_quant):
    ours = quantized(96, 256, True, 64, double_quant, dtype)
    save_file(ours.state_dict(prefix="layer."), tmp_path / "layer.safetensors")
    tensors = load_file(tmp_path / "layer.safetensors")
    stats = {key.removeprefix("layer.weight."): value for key, value in tensors.items() if key.startswith("layer.weight.")}
    theirs = bitsandbytes.nn.Linear4bit(256, 96, True, torch.float32, double_quant, "nf4", device="meta").train()
    theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(tensors["layer.weight"], stats, device="cpu", module=theirs)
    theirs.bias = nn.Parameter(tensors["layer.bias"], requires_grad=False)
    x = torch.randn(5, 256)
    assert torch.equal(theirs(x), ours(x))
    state = theirs.weight.quant_state
    assert torch.equal(bitsandbytes.functional.dequantize_4bit(theirs.weight.data, state), ours.dequantize())
    assert (state.shape, state.blocksize, state.dtype, state.quant_type) == (torch.Size([96, 256]), 64, dtype, "nf4")


@pytest.mark.parametrize("dtype, double_quant, bias", itertools.product(DTYPES, (True, False), (True, False)))
def test_their_layer_loads_in_ours(tmp_path, dtype, double_quant, bias):
    linear = nn.Linear(256, 96, bias).to(dtype)
    theirs = bnb_linear(linear, 64, double_quant)
    save_file(theirs.state_dict(), tmp_path / "layer.safetensors")
    ours = NF4Linear(256, 96, bias, double_quant=double_quant, compute_dtype=torch.float32)
    if bias:
        ours.bias.data = ours.bias.data.to(dtype)
    assert ours.load_state_dict(load_file(tmp_path / "layer.safetensors")) == ([], [])
    assert ours.dtype == dtype and same(ours.state_dict(), NF4Linear.from_linear(linear, 64, double_quant).state_dict())
    x = torch.randn(5, 256)
    assert torch.equal(theirs(x), ours(x))


def test_their_bytes_under_another_dtype_load_too():
    """bitsandbytes can store the codes as bfloat16, for FSDP; the bytes are the same."""
    ours = quantized()
    entries = ours.state_dict()
    entries["weight"] = entries["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    loaded = empty_like(ours)
    loaded.load_state_dict(entries)
    assert same(loaded.state_dict(), ours.state_dict())


@few
@given(
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 70),
    block_size=st.sampled_from([2, 32, 64, 128]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    device=st.sampled_from(["cpu", "meta"]),
    assign=st.booleans(),
)
def test_any_layer_survives_the_trip(out_features, in_features, block_size, double_quant, bias, dtype, device, assign):
    layer = quantized(out_features, in_features, bias, block_size, double_quant, dtype)
    other = empty_like(layer, device=device, dtype=dtype)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=assign)
    assert same(other.state_dict(), layer.state_dict())
    assert torch.equal(other.dequantize(), layer.dequantize())
    assert not other.weight.requires_grad and isinstance(other.weight, nn.Parameter)


def test_loading_copies():
    layer = quantized()
    other, entries = empty_like(layer), layer.state_dict()
    other.load_state_dict(entries)
    own = {tensor.data_ptr() for tensor in entries.values()}
    assert not own & {t.data_ptr() for t in (other.weight, other.absmax, other.nested_absmax, other.bias)}


def test_whole_models_and_adapters_save_and_load(tmp_path):
    model = tiny_llama()
    quantize_linears(model, block_size=16)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = tiny_llama()
    quantize_linears(other, block_size=16)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same(other.state_dict(), model.state_dict())
    layer = LoRALinear(quantized(), 2, 6)
    nn.init.normal_(layer.lora_B)
    twin = LoRALinear(quantized(), 2, 6)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, 64)
    assert "base.weight.absmax" in layer.state_dict() and torch.equal(layer(x), twin(x))


def test_the_keys_are_theirs_and_no_other():
    scales = {"weight.absmax", "weight.quant_map", f"weight.{STATE}"}
    nested = {"weight.nested_absmax", "weight.nested_quant_map"}
    assert set(quantized(double_quant=False, bias=False).state_dict()) == {"weight"} | scales
    assert set(quantized().state_dict()) == {"weight", "bias"} | scales | nested


# ---- errors: the layer stays as it was -----------------------------------------------------------------------------------------------


def with_words(**words):
    """A change of the JSON object among the entries; None takes a word out."""

    def change(entries):
        known = json.loads(bytes(entries[f"weight.{STATE}"].tolist())) | words
        text = json.dumps({key: value for key, value in known.items() if value is not None})
        entries[f"weight.{STATE}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def renamed(entries):
    entries["weight.quant_state.bitsandbytes__fp4"] = entries.pop(f"weight.{STATE}")


def scaled(key, factor=1.5):
    return lambda entries: entries.update({key: entries[key] * factor})


WRONG = {
    "another type in the key": (renamed, "quant_type is fp4 there; this layer holds nf4"),
    "another type in the words": (with_words(quant_type="fp4"), "quant_type is fp4 there"),
    "another shape": (with_words(shape=[64, 32]), r"shape is \[64, 32\] there and \[32, 64\] in this layer"),
    "another block size": (with_words(blocksize=128), "block_size is 128 there and 64 in this layer"),
    "no block size": (with_words(blocksize=None), "block_size is None there"),
    "an unknown dtype": (with_words(dtype="float5"), "names no dtype of a weight: 'float5'"),
    "an integer dtype": (with_words(dtype="int32"), "names no dtype of a weight: 'int32'"),
    "another nested block": (with_words(nested_blocksize=128), "blocks of 256"),
    "no offset": (with_words(nested_offset=None), "nested_offset must be a finite number, got None"),
    "an infinite offset": (with_words(nested_offset=float("inf")), "nested_offset must be a finite number"),
    "no state": (lambda e: e.pop(f"weight.{STATE}"), "this is no quantized weight"),
    "a broken state": (lambda e: e.update({f"weight.{STATE}": torch.tensor([1, 2], dtype=torch.uint8)}), "can't be read"),
    "no absmax": (lambda e: e.pop("weight.absmax"), "weight.absmax is missing"),
    "no weight": (lambda e: e.pop("weight"), "weight is missing"),
    "no map": (lambda e: e.pop("weight.quant_map"), "weight.quant_map is missing"),
    "no nested map": (lambda e: e.pop("weight.nested_quant_map"), "weight.nested_quant_map is missing"),
    "no nested scales": (lambda e: e.pop("weight.nested_absmax"), "its scales are not quantized: .* double_quant=False"),
    "other levels": (scaled("weight.quant_map"), "quant_map holds other levels"),
    "other nested levels": (scaled("weight.nested_quant_map"), "nested_quant_map holds other levels"),
    "scales in half precision": (lambda e: e.update({"weight.nested_absmax": e["weight.nested_absmax"].half()}), "must be torch.float32"),
    "scales with NaN": (scaled("weight.nested_absmax", float("nan")), "nested_absmax holds NaN"),
    "too few codes": (lambda e: e.update({"weight": e["weight"][:-1]}), r"weight must be torch.uint8 of shape \(1024, 1\)"),
    "too few scales": (lambda e: e.update({"weight.absmax": e["weight.absmax"][:-1]}), r"absmax must be torch.uint8 of shape \(32,\)"),
    "another bias": (lambda e: e.update({"bias": torch.ones(31)}), r"bias must have shape \(32,\), got \(31,\)"),
    "no bias": (lambda e: e.pop("bias"), "it has no bias, and this layer has a"),
    "a plain weight": (lambda e: [e.clear(), e.update(nn.Linear(64, 32).state_dict())], "Load it into nn.Linear"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(name):
    change, words = WRONG[name]
    layer, entries = quantized(), copy.deepcopy(quantized().state_dict())
    before = copy.deepcopy(layer.state_dict())
    change(entries)
    for strict in (True, False) if name != "no bias" else (True,):
        with pytest.raises(RuntimeError, match=words):
            layer.load_state_dict(entries, strict=strict)
        assert same(layer.state_dict(), before)


def test_scales_that_are_not_quantized_do_not_fit_a_layer_whose_are():
    with pytest.raises(RuntimeError, match="its scales are quantized: load it into a layer with double_quant=True"):
        quantized(double_quant=False).load_state_dict(quantized().state_dict())


def test_the_layer_is_named():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up": quantized()})})
    entries = {key.replace("bitsandbytes__nf4", "bitsandbytes__fp4"): value for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"mlp\.up: quant_type is fp4"):
        model.load_state_dict(entries)


def test_missing_and_unexpected_keys_are_reported_as_torch_does():
    layer = quantized()
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": layer.bias.detach()})
    result = layer.load_state_dict({}, strict=False)
    assert result.missing_keys == ["weight", "bias"]
    extra = layer.state_dict() | {"weight.other": torch.ones(1), "other": torch.ones(1)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(extra)
    assert set(layer.load_state_dict(extra, strict=False).unexpected_keys) == {"weight.other", "other"}
    without = quantized(bias=False)
    with pytest.raises(RuntimeError, match="it has a bias, and this layer has none"):
        without.load_state_dict(quantized().state_dict())


def test_the_defaults_that_answers_state():
    """The library's layer is FP4, and transformers' configuration FP4 in float32 with single scales."""
    assert bitsandbytes.nn.Linear4bit(64, 64, device="meta").weight.quant_type == "fp4"
    config = BitsAndBytesConfig(load_in_4bit=True)
    found = (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype, config.bnb_4bit_use_double_quant)
    assert found == ("fp4", torch.float32, False)
