"""The benchmark of many adapters: its mixes, and that all contestants compute the same."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from benchmarks import multi_lora
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
        assert set(cell["error"]) == set(cell["milliseconds"]) == set(multi_lora.CONTESTANTS)
        assert all(isinstance(time, float) and time > 0 for time in cell["milliseconds"].values())
        assert max(cell["error"].values()) < 0.02  # bfloat16, several roundings in the contestants
    assert all(row["difference"] < 0.05 for row in result["peft"]) and result["swap"]["bytes"] > 0


@pytest.mark.gpu
def test_on_a_gpu_a_cell_runs_from_a_graph():
    found = multi_lora.cell((4096, 4096), 16, 16, "uniform", torch.device("cuda"), 4e12, 5, 4)
    assert isinstance(found["milliseconds"]["ours"], float) and found["error"]["ours"] < 2**-8
