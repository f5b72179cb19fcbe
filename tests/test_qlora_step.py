"""The benchmark of training steps on a small shape, on the CPU: every variant trains the same model."""

import json

import pytest
import torch

from benchmarks import qlora_step as benchmark
from course.lab import recorded
from reference.lora import lora_layers
from reference.qlora import NF4Linear


def models_of():
    cpu = torch.device("cpu")
    return benchmark.Models(benchmark.SMOKE_SHAPE, benchmark.Meter(cpu), cpu)


def test_every_variant_trains():
    models = models_of()
    rows = [benchmark.attempt(name, (1, 24), models) for name in dict(benchmark.ORDER)]
    assert not [row for row in rows if "error" in row]
    first = rows[0]["losses"][0]
    assert all(row["losses"][0] == pytest.approx(first, rel=0.01) for row in rows)  # random weights: near log of the vocabulary
    assert all(row["losses"][-1] < row["losses"][0] for row in rows)
    ratios = benchmark.compared(rows)
    assert ratios["peft 1×24"]["faster"] == 1 and len(ratios) == len(rows)
    json.dumps(rows, allow_nan=False)
    assert "compiled, graph" in benchmark.table({"rows": rows})


def test_ours_is_quantized_once_and_a_compiled_layer_can_be_plain_again():
    models = models_of()
    model = models.get("llama, graph")
    assert len([layer for _, layer in lora_layers(model) if isinstance(layer.base, NF4Linear)]) == 7 * benchmark.SMOKE_SHAPE.layers
    assert models.get("llama, compiled") is model and model.model.layers[0]._compiled_call_impl is not None
    assert models.get("llama") is model and model.model.layers[0]._compiled_call_impl is None
    assert models.get("library") is not model


def test_a_failure_is_a_row():
    row = benchmark.attempt("llama", (1, 0), models_of())
    assert "error" in row and "FAILED" in benchmark.table({"rows": [row]}) and benchmark.compared([row]) == {}


def test_recorded_steps_are_faster_than_those_of_the_libraries():
    try:
        result = recorded.load("qlora_step", device="h100")["result"]
    except FileNotFoundError:
        pytest.skip("not recorded yet")
    best = lambda batch: max(row["faster"] for name, row in result["compared"].items() if name.endswith(batch))  # noqa: E731
    assert best("1×512") >= 3 and best("4×2048") >= 1.25
    assert not [row for row in result["rows"] if "error" in row]
