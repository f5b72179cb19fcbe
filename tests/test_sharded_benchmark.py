"""The benchmark of sharded training: its dry run, and what it derives from rows."""

import sys

import pytest
import torch

from benchmarks import sharded, sharded_tokens
from course.claims import sharding
from course.lab import recorded
from reference.memory import sharded_memory


def test_a_dry_run_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["sharded", "--smoke", "--out", str(tmp_path)])
    sharded.main()
    rows = recorded.load("sharded_1", folder=tmp_path)["result"]["rows"]
    assert [row["how"] for row in rows] == list(sharded.WAYS)
    shape = sharded.SMOKE[0][0]
    *ours, peft = rows
    assert [row["predicted_received"] for row in ours] == [0, 0, 0] and "gathered" not in peft  # there is nobody to receive from
    assert [row["predicted_held"] for row in ours] == [sharded_memory(shape, 1, 16, block=block).held for block in (64, 64, None)]
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=0.01)  # near log 301, whatever the weights
    assert not torch.distributed.is_initialized()


def test_a_dry_run_by_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["sharded_tokens", "--smoke", "--out", str(tmp_path)])
    sharded_tokens.main()
    found = recorded.load("sharded_tokens_1", folder=tmp_path)["result"]
    measured = recorded.load("sharded_tokens_2", "h200")["result"]
    assert [set(row) for row in found["rows"]] == [set(row) for row in measured["rows"]]
    assert [row["how"] for row in found["rows"]] == [row["how"] for row in measured["rows"]]
    assert all(row["least"] <= row["seconds"] <= row["most"] for row in [*found["rows"], *measured["rows"]])


def test_what_follows_from_the_whole_model():
    common = {"case": "a", "tokens_a_second": 8}
    whole = common | {"how": "replicated", "seconds": 1.0, "held": 100, "peak": 160, "predicted_received": 4, "predicted_held": 99}
    split = common | {"how": "sharded", "seconds": 1.25, "held": 55, "peak": 130, "predicted_received": 50}
    split |= {"predicted_held": 50, "gathered": 20}
    peft = common | {"how": "peft", "seconds": 2.0, "held": 80, "peak": 200}
    failed = {"case": "a", "how": "16 bits", "error": "no memory"}
    first, second, third, fourth = sharded.compared([whole, split, failed, peft])
    assert first == whole and third == failed and fourth == peft | {"efficiency": 0.5}
    assert len(sharded.table([first, second, third, fourth]).splitlines()) == 5
    assert (second["efficiency"], second["bytes_a_second"], second["predicted_peak"]) == (0.8, 200, 130)


@pytest.mark.gpu
def test_a_dry_run_on_the_gpu(monkeypatch, tmp_path):
    """One card through NCCL: what is held is what was predicted."""
    monkeypatch.setattr(sharded, "CASES", sharded.SMOKE)
    monkeypatch.setattr(sys, "argv", ["sharded", "--out", str(tmp_path)])
    sharded.main()
    rows = recorded.load("sharded_1", folder=tmp_path)["result"]["rows"]
    assert [row["held"] for row in rows[:3]] == pytest.approx([row["predicted_held"] for row in rows[:3]], rel=0.1)


def test_what_the_appendix_says_of_two_cards():
    rows = {(row["case"], row["how"]): row for row in recorded.load("sharded_2", "h200")["result"]["rows"]}
    long, large = "Llama-2-7B, 4×2048", "Llama-2-70B, 1×2048"
    assert all(row["cards"] == 2 and "error" not in row for row in rows.values())
    for case in (long, large):
        assert rows[case, "sharded"]["seconds"] < rows[case, "peft"]["seconds"]
        assert rows[case, "sharded"]["peak"] < rows[case, "replicated"]["peak"]
    assert sharding.worst_peak_prediction() < 7
    assert abs(sharding.of_a_copy_each(long, "sharded") - sharding.engine_alone(long)) < 3  # what is sent is hidden
    assert sharding.of_a_copy_each(large, "sharded") < sharding.engine_alone(large) - 10  # and here it is not
    assert rows[large, "16 bits"]["seconds"] < rows[large, "sharded"]["seconds"]


def test_with_few_tokens_launches_decide_and_with_many_arithmetic():
    step = sharding.step_seconds
    for how in sharded_tokens.ORDER:
        assert step(how, 1, 16) > 0.7 * step(how, 1, 2048) and step(how, 4, 2048) > 2.9 * step(how, 1, 2048)
    assert step("16 bits", 1, 2048) < step("sharded", 1, 2048) and step("sharded", 4, 2048) < step("16 bits", 4, 2048)
