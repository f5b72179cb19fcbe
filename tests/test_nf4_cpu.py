"""What benchmarks/nf4_cpu.py compares gives equal results, and what it recorded is within the bars."""

import pytest
import torch

from benchmarks import nf4_cpu as benchmark
from course.lab import recorded

BARS = {"quantize": 1.0, "dequantize": 3.0}  # ours / bitsandbytes'


@pytest.mark.parametrize("name", benchmark.DTYPES)
def test_both_sides_do_the_same_work(name):
    calls = benchmark.contestants(512, benchmark.DTYPES[name])
    ours, (packed, state) = calls["quantize"]["ours"](), calls["quantize"]["bitsandbytes"]()
    assert torch.equal(ours.packed, packed) and torch.equal(ours.absmax, state.absmax)
    values = {who: call() for who, call in calls["dequantize"].items()}
    assert values["ours"].dtype == benchmark.DTYPES[name] and torch.equal(values["ours"], values["bitsandbytes"])


def test_a_small_run_has_every_figure():
    result = benchmark.measure_here(side=256, rounds=2)
    assert {work: set(rows) for work, rows in result.items()} == {work: set(benchmark.DTYPES) for work in BARS}
    for rows in result.values():
        for row in rows.values():
            assert set(row) == {"ours", "bitsandbytes", "ratio"} and all(value > 0 for value in row.values())


def test_turns_are_taken_and_the_first_is_not_counted(monkeypatch):
    clock = iter([0, 9, 9, 19, *(t for start in (20, 30, 40) for t in (start, start + 1, start + 1, start + 3))])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    order = []
    measured = benchmark.in_turns({"ours": lambda: order.append("o"), "bitsandbytes": lambda: order.append("b")}, rounds=3)
    assert order == ["o", "b"] * 4
    assert measured == {"ours": 1000, "bitsandbytes": 2000, "ratio": 0.5}


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("work", ["quantize", "dequantize"])
def test_recorded_figures_are_within_the_bars(threads, work):
    measured = recorded.load("nf4_cpu")["result"]["threads"][threads][work]
    assert {name: row["ratio"] for name, row in measured.items() if row["ratio"] > BARS[work]} == {}
