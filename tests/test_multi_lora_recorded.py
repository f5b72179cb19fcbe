"""What the benchmarks of many adapters recorded on an H200 is within the bars, and unit 11's claims follow from it."""

import nbformat
import pytest

from benchmarks.multi_lora import ratios
from course.claims import multi_lora as claims
from course.lab import recorded
from course.units import ROOT

KERNELS = recorded.load("multi_lora", "h200")["result"]
SCENARIO = recorded.load("serving_scenario", "h200")["result"]
PEERS = ("loop", "gather + bmm", "grouped_mm", "vLLM")


def test_every_contestant_ran_in_every_cell_and_was_right():
    assert len(KERNELS["cells"]) == 240 and len(KERNELS["peft"]) == 16
    for cell in KERNELS["cells"]:
        assert set(cell["milliseconds"]) == {"ours", *PEERS}
        assert all(isinstance(time, float) and time > cell["floor"] for time in cell["milliseconds"].values())
        assert cell["error"]["ours"] < 2**-7


def test_all_but_vllm_are_slower_in_every_cell():
    for cell in KERNELS["cells"]:
        times = cell["milliseconds"]
        assert min(times[peer] for peer in PEERS if peer != "vLLM") > times["ours"]
    assert all(cell["milliseconds"]["peft"] > cell["milliseconds"]["ours"] for cell in KERNELS["peft"])
    assert claims.ahead_of_all_but_vllm()


def test_vllm_is_slower_in_the_median_and_nowhere_much_faster():
    assert claims.ratio("vLLM") >= 1 and claims.ratio("vLLM", "least") >= 0.8
    assert all(claims.ratio("vLLM", "median", mix) >= 1 for mix in ("distinct", "uniform", "zipf", "identical"))


def test_the_recorded_ratios_are_those_of_the_cells():
    for again, row in zip(ratios(KERNELS), KERNELS["ratios"], strict=True):
        assert (again["peer"], again["mix"], again["cells"], again["below_1"]) == (row["peer"], row["mix"], row["cells"], row["below_1"])
        assert again["median"] == pytest.approx(row["median"], rel=1e-4) and again["least"] == pytest.approx(row["least"], rel=1e-4)


@pytest.mark.parametrize("r", [8, 16, 32, 64])
def test_one_adapter_at_one_row_costs_at_most_15_percent(r):
    (row,) = (row for row in KERNELS["one_row"] if row["r"] == r)
    assert not row["problems"] and row["cost"]["one adapter"] <= 0.15 and row["cost"]["LoRALinear"] <= 0.15
    assert claims.one_row_percent(r) == pytest.approx(100 * row["cost"]["one adapter"], abs=0.05)
    assert claims.one_row_percent(r, claims.OURS_BARE) > 0  # beside our own product an adapter is not free


@pytest.mark.parametrize("name", ["swap", "swap_70b"])
def test_a_swap_reaches_80_percent_of_the_bus(name):
    assert KERNELS[name]["share_of_bus"] >= 0.8
    assert KERNELS["swap_70b"]["share_of_bus_looked_at"] >= 0.8


def test_a_hundred_tenants_under_the_cap():
    assert SCENARIO["peak_bytes"] <= SCENARIO["reserved_bytes"] <= SCENARIO["setting"]["cap"] == 80 * 10**9
    assert [row["live"] for row in SCENARIO["unmerged"]] == [1, 5, 25, 100]
    rates = [row["requests_per_second"] for row in SCENARIO["unmerged"]]
    assert rates == sorted(rates, reverse=True) and rates[0] < SCENARIO["base"]["requests_per_second"]
    assert rates[-1] > 3 * SCENARIO["in_turn"]["requests_per_second"] and claims.graphs_times() > 5
    for row in (SCENARIO["base"], SCENARIO["merged"], *SCENARIO["unmerged"]):
        assert row["between_tokens"]["p50"] <= row["between_tokens"]["p99"]
        assert row["requests_per_second"] == pytest.approx(SCENARIO["setting"]["requests"] / row["seconds"], rel=1e-3)


def test_prompts_read_together_share_their_launches():
    """The time of a pass is found by subtraction; the whole run must add up, and the merged model must give the same."""
    one, four, many = (claims.prompts_s(count) for count in (1, 4, 32))
    assert 0.9 < four / one < 1.2 and one < many < 32 * one / 4
    assert claims.prompts_s(32, "merged") == pytest.approx(many, rel=0.02)
    assert claims.prompts_s(4, "merged") == pytest.approx(four, rel=0.05)
    assert claims.prompts_s(32, 100) > many


def test_the_simulation_comes_near_what_was_measured():
    for who in ("base", "merged", "in_turn", 1, 5):
        assert claims.off_percent(who) < 10
    assert claims.off_percent(25) < 15 and claims.off_percent(100) < 25
    assert all(claims.predicted_percent(live) > 0 for live in (1, 5, 25, 100))  # too fast: what it leaves out takes time
    assert all(claims.predicted_percent(live, alone=True) < -40 for live in (1, 5, 25, 100))


@pytest.mark.parametrize("rows", [1, 64])
def test_the_notebook_was_run_after_the_layer_was_measured(rows: int):
    cells = nbformat.read(ROOT / "notebooks" / "11_multi_lora.ipynb", 4).cells
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    eager, graph = (claims.generation_percent(rows, replayed) for replayed in (False, True))
    assert f"{rows:2} row{'s' * (rows > 1)}: {eager:+.0f} %; from a CUDA graph {graph:+.0f} %" in printed
