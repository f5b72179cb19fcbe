"""The benchmark of capped QLoRA training on a small shape: it trains, and it measures what reference.memory counts."""

import pytest
import torch

from benchmarks import qlora_caps as benchmark
from course.lab import recorded


def test_a_small_model_trains_and_is_counted():
    cpu = torch.device("cpu")
    with benchmark.Meter(cpu) as meter:
        row = benchmark.attempt("smoke", meter, cpu)
    assert row["losses"][-1] < row["losses"][0] and len(row["losses"]) == benchmark.STEPS
    parts = row["predicted_parts"]["weights"] + row["adapters"]
    assert row["built"] == pytest.approx(parts, rel=0.05)  # counts bitsandbytes' tables of levels, one for each layer; ours has one
    assert row["peaks"]["step"] >= row["held"] and row["peak"] > row["built"]
    assert row["shape"] in benchmark.table({"steps": benchmark.STEPS, "rows": [row]})


def test_a_cap_that_is_too_small_is_a_row(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(benchmark, "train", full)
    row = benchmark.attempt("7B", None, torch.device("cpu"))
    assert row == {"name": "7B", "error": "CUDA out of memory. Tried to allocate 2.00 GiB."}
    assert "7B: FAILED CUDA out of memory" in benchmark.table({"steps": benchmark.STEPS, "rows": [row]})


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_recorded_models_stayed_below_their_caps(card):
    for row in recorded.load("qlora_caps", card)["result"]["rows"]:
        case = benchmark.CASES[row["name"]]
        assert row["context"] + row["reserved"] <= row["cap"] == case.cap and row["shape"] == case.shape.name
        assert row["losses"][-1] < row["losses"][0]
        assert row["predicted"] == pytest.approx(row["peak"], rel=0.05)
