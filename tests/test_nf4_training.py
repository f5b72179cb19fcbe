"""The benchmark of the layer in training: everybody computes the same gradient, and the table says who is faster."""

import pytest
import torch

from benchmarks import nf4_training as benchmark
from course.units import CourseError


def test_all_compute_the_same_gradient():
    """Of a small layer, wherever the tests run; bf16 weights are other weights, by what quantization changes."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    result = benchmark.measure(side=128, counts=(3, 70), repeats=2, where=where)
    assert [row["rows"] for row in result["rows"]] == [3, 70]
    for row in result["rows"]:
        assert row["difference"] < 2**-8  # the same weight in bfloat16, perhaps in another order
        assert all(row[name] > 0 for name in ("ours", "ours, double quantization", "bitsandbytes", "bf16 weights"))


def test_the_gradient_is_that_of_the_dequantized_weight():
    layer = benchmark.NF4Linear.from_weight(torch.randn(48, 64), None, 64, True, torch.float32)
    x, direction = torch.randn(5, 64, requires_grad=True), torch.randn(5, 48)
    found = benchmark.both_ways(lambda x, layer: layer(x), x, direction)(layer)
    torch.testing.assert_close(found, direction @ layer.dequantize().float())


def test_the_table_names_the_ratio():
    row = {"rows": 2048, "ours": 0.8, "ours, double quantization": 0.81, "bitsandbytes": 1.0, "bf16 weights": 0.7, "difference": 1e-3}
    head, line = (text.split() for text in benchmark.table({"rows": [row]}).splitlines()[:2])
    assert head[-3] == "×" and line == ["2,048", "rows", "0.8000", "0.8100", "1.0000", "1.25", "0.7000"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_without_a_gpu_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr("sys.argv", ["nf4_training.py"])
    with pytest.raises(CourseError, match="nf4_training is measured on a CUDA device, and this machine has none"):
        benchmark.main()
