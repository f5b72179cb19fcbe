"""The benchmark of many adapters: its mixes, and that all contestants compute the same."""

import importlib
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from benchmarks import multi_lora
from benchmarks.candidates_multi_lora import WAYS
from course.lab import recorded


def test_mixes_are_what_they_say():
    assert multi_lora.mixed("distinct", 5) == [0, 1, 2, 3, 4] and multi_lora.mixed("identical", 3) == [0, 0, 0]
    for mix in ("uniform", "zipf"):
        rows = multi_lora.mixed(mix, 256)
        assert len(rows) == 256 and set(rows) == set(range(max(rows) + 1)) and max(rows) < 16
        assert multi_lora.groups_of(rows)[rows[3]].count(3) == 1
    most = {mix: max(map(len, multi_lora.groups_of(multi_lora.mixed(mix, 256)))) for mix in ("uniform", "zipf")}
    assert most["zipf"] > 3 * most["uniform"]


def test_a_dry_run_measures_all_and_contestants_agree(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["multi_lora", "--smoke", "--out", str(tmp_path)])
    multi_lora.main()
    result = recorded.load("multi_lora", folder=tmp_path)["result"]
    assert len(result["cells"]) == 8
    for cell in result["cells"]:
        assert set(cell["milliseconds"]) == set(multi_lora.CONTESTANTS)
        peer = cell["milliseconds"].pop("vLLM")  # not installed, or not for the interpreter, which multiplies no bfloat16
        assert isinstance(peer, str)
        cell["error"].pop("vLLM", None)
        assert set(cell["error"]) == set(cell["milliseconds"])
        assert all(isinstance(time, float) and time > 0 for time in cell["milliseconds"].values())
        assert max(cell["error"].values()) < 0.02  # bfloat16, several roundings in the contestants
    (row,) = result["one_row"]
    assert not row["problems"] and {"one adapter", "LoRALinear", *WAYS} == set(row["cost"])
    assert all(row["difference"] < 0.05 for row in result["peft"])
    assert result["swap"]["bytes"] == 4 * 2 * 2 * 16 * 64 and result["swap_70b"]["layers"] == 14
    for row in (result["swap"], result["swap_70b"]):
        assert row["milliseconds"] > 0 and row["looked_at_milliseconds"] > 0 and row["share_of_bus"] > 0


def test_the_70b_adapter_is_one_of_all_linear_layers():
    shape = multi_lora.LLAMA_3_70B
    sizes = multi_lora.linears_of(shape)
    embeddings, norms = 2 * shape.vocab * shape.hidden, (2 * shape.layers + 1) * shape.hidden
    assert len(sizes) == 560 and sum(a * b for a, b in sizes) == shape.parameters - embeddings - norms


def test_ratios_name_the_worst_cell():
    def cell(mix: str, batch: int, **times: float | str) -> dict:
        return {"batch": batch, "r": 8, "mix": mix, "milliseconds": times, "floor": 0.5}

    cells = [cell("zipf", 1, ours=1.0, loop=3.0), cell("zipf", 4, ours=2.0, loop=1.0), cell("distinct", 4, ours=1.0, loop="fails")]
    rows = multi_lora.ratios({"cells": cells, "peft": []})
    found = {(row["peer"], row["mix"]): row for row in rows}
    assert found["loop", "zipf"]["median"] == 1.75 and found["loop", "all"]["cells"] == 2 and ("loop", "distinct") not in found
    assert found["loop", "all"]["least"] == 0.5 and found["loop", "all"]["least_at"] == "4 rows, r 8, zipf"
    assert found["floor", "all"]["least"] == 0.25 and found["loop", "zipf"]["below_1"] == 1


def test_vllms_kernels_give_the_same_where_they_are_installed():
    """Factors of float16, which Triton's interpreter multiplies too."""
    try:
        importlib.import_module(multi_lora.VLLM)
    except ImportError:
        pytest.skip("vLLM is not installed")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer, batch = multi_lora.Layer(3, 8, 40, 72, where), multi_lora.Batch([2, 0, 1, 1, 0], where)
    layer.A, layer.B = layer.A.half(), layer.B.half()
    layer.factors = [multi_lora.Factors(a, b, multi_lora.SCALE) for a, b in zip(layer.A, layer.B, strict=True)]
    x, y = torch.randn(5, 72, device=where).half(), torch.randn(5, 40, device=where).half()
    right = y.clone()
    multi_lora.loop(right, x, layer, batch)
    for _ in range(2):  # the second finds what the first has prepared
        again = y.clone()
        multi_lora.vllm(again, x, layer, batch)
        assert (again - right).abs().max() < 0.02 * right.abs().max()
    multi_lora.forget_vllm()
    assert not importlib.import_module(f"{multi_lora.VLLM}.utils")._LORA_A_PTR_DICT


@pytest.mark.gpu
def test_on_a_gpu_a_cell_runs_from_a_graph():
    found = multi_lora.cell((4096, 4096), 16, 16, "uniform", torch.device("cuda"), 4e12, 5, 4)
    assert isinstance(found["milliseconds"]["ours"], float) and found["error"]["ours"] < 2**-8
