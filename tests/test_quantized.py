"""Simulated quantization: the numbers are those that packed layers compute with, and only linear layers change."""

import importlib.util

import pytest
import torch
from torch import nn

from course.lab.quantized import KINDS, bits_per_weight, linears, quantize_in_place, quantized_copy, round_trip
from reference.double_quant import bits_per_parameter, quantize_scales
from reference.nf4 import quantize_nf4

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
has_qlora = pytest.mark.skipif(importlib.util.find_spec("reference.qlora") is None, reason="reference.qlora is not there")


def weight(dtype=torch.float32, shape=(96, 128), seed=0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 10).to(dtype)


class Small(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(20, 64), nn.Linear(64, 96), nn.Linear(96, 64)
        self.norm, self.lm_head = nn.LayerNorm(64), nn.Linear(64, 20)
        self.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_more_bits_or_better_levels_lose_less(kind, dtype):
    w = weight(dtype, shape=(1024, 1024))
    found = round_trip(w, kind)
    assert found.dtype == dtype and found.shape == w.shape
    error = ((found.float() - w.float()).norm() / w.float().norm()).item()
    roughly = {"INT8": 0.0059, "NF4": 0.092, "NF4+DQ": 0.092, "FP4": 0.122, "INT4": 0.1077}
    roughly |= {"NF3": 0.2016, "INT3": 0.2514, "NF2": 0.563, "INT2": 0.718}
    assert error == pytest.approx(
        roughly[kind], rel=0.02 if dtype != torch.bfloat16 or kind != "INT8" else 0.1
    )  # of normal weights in blocks of 64


@pytest.mark.parametrize("kind", KINDS)
def test_twice_is_once(kind):
    once = round_trip(weight(), kind)
    if kind != "NF4+DQ":  # the scales of a quantized tensor are not their own fixed point
        assert torch.equal(round_trip(once, kind), once)


@has_qlora
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_the_numbers_are_those_of_the_packed_layer(dtype, double):
    from reference.qlora import NF4Linear

    base = nn.Linear(128, 96, dtype=torch.bfloat16)
    packed = NF4Linear.from_linear(base, double_quant=double, compute_dtype=dtype)
    assert torch.equal(packed.dequantize(dtype), round_trip(base.weight, "NF4+DQ" if double else "NF4", dtype=dtype))


def test_only_the_linear_layers_change():
    model = Small()
    other = quantized_copy(model, "NF4")
    changed = {name for name, value in other.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {"up.weight", "down.weight"} == {f"{name}.weight" for name, _ in linears(model)}
    assert quantize_in_place(model, "NF4") == ["up", "down"]
    assert torch.equal(model.up.weight, other.up.weight)


def test_what_a_layer_decodes_to_may_be_narrower_than_the_weight():
    model = Small()
    quantize_in_place(model, "INT8", compute_dtype=torch.bfloat16)
    assert model.up.weight.dtype == torch.float32 and torch.equal(model.up.weight, model.up.weight.bfloat16().float())


@pytest.mark.parametrize("kind", ["NF4", "NF4+DQ"])
def test_bits_are_those_of_real_tensors(kind):
    q = quantize_nf4(weight(shape=(1024, 4096)))
    scales = quantize_scales(q.absmax) if kind == "NF4+DQ" else None
    assert bits_per_weight(kind) == pytest.approx(bits_per_parameter(q, scales), abs=1e-4)  # one offset in four million weights
    assert [bits_per_weight(k) for k in ("INT8", "FP4", "INT3", "NF2")] == [8.5, 4.5, 3.5, 2.5]


def test_nothing_is_changed_after_an_error():
    model = Small()
    model.down.weight.data[3, 5] = float("nan")
    before = model.up.weight.clone()
    with pytest.raises(ValueError, match=r"down: .*NaN"):
        quantize_in_place(model, "NF4")
    assert torch.equal(model.up.weight, before)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: round_trip(weight(), "int4"), "kind must be one of"),
        (lambda: bits_per_weight("INT5"), "kind must be one of"),
        (lambda: quantize_in_place(nn.Embedding(4, 4), "NF4"), "no linear layer"),
        (lambda: quantize_in_place(Small(), "NF4", block_size=60), "up: block_size"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
