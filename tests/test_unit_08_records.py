"""What was measured on a GPU for unit 08, beside its bars; and that the measurements on small shapes hold together."""

import sys

import pytest
import torch

from benchmarks import activation_offloading, bf16_training, checkpointing, checkpointing_lora, precision_step
from benchmarks.meters import Meter
from course import bench
from course.lab import recorded

CPU = torch.device("cpu")


def rows(name: str, device: str, **where) -> list[dict]:
    found = recorded.load(name, device)["result"]["rows"]
    return [row for row in found if all(row.get(key) == value for key, value in where.items())]


# ---- bars


def test_checkpointing_is_within_two_percent_of_torch():
    times = {row["how"]: row for row in rows("checkpointing", "h200", work="time")}
    assert set(times) == set(checkpointing.HOWS) and not [row for row in times.values() if "error" in row]
    assert {how for how, row in times.items() if row.get("over_torch", 9) <= 1.02} == set(checkpointing.PEER)


def test_gradients_are_those_without_checkpointing_bit_for_bit():
    same = rows("checkpointing_lora", "h200", work="equal")
    assert len(same) == 2 * len(checkpointing.HOWS) and all(row["equal"] for row in same)


def test_one_more_forward_takes_20_to_40_percent_of_a_full_step():
    for row in rows("checkpointing", "h200", work="time"):
        assert row["how"] == "none" or 20 <= row["extra_percent"] <= 40, row["how"]


def test_memory_of_64_layers_is_within_ten_percent_of_the_formula():
    memory = rows("checkpointing", "h200", work="memory")
    assert [row["segments"] for row in memory] == [1, 2, 4, 8, 16, 32, 64] and {row["layers"] for row in memory} == {64}
    for row in memory:
        assert row["peak"] == pytest.approx(row["predicted"], rel=0.1)
        assert row["peak"] == pytest.approx(row["formula"], rel=0.1)  # without what comes and goes in one MLP


def test_offloading_is_faster_than_save_on_cpu_with_its_memory():
    (theirs,) = rows("activation_offloading", "h200", how="save_on_cpu")
    for how in ("ours", "ours, 0.1 GB ahead", "ours, nothing ahead"):
        (ours,) = rows("activation_offloading", "h200", how=how)
        assert ours["seconds"] < theirs["seconds"]
        assert ours["peak"] <= 1.1 * theirs["peak"], how
    (ours,) = rows("activation_offloading", "h200", how="ours")
    assert ours["seconds"] < 1.05 * ours["limit"]  # what the bus allows
    (nothing,) = rows("activation_offloading", "h200", how="ours, nothing ahead")
    assert nothing["activations"] <= 1.1 * theirs["activations"]


def test_sixteen_bits_are_faster_and_hold_what_they_say():
    found = {row["way"]: row for row in rows("precision_step", "h200")}
    assert set(found) == set(precision_step.WAYS) and not [row for row in found.values() if "error" in row]
    for way, held in (("float32", 12), ("autocast bfloat16", 12), ("bfloat16", 6), ("bfloat16, masters", 14)):
        assert found[way]["held"] / found[way]["parameters"] == pytest.approx(held, rel=0.05)
    assert found["bfloat16"]["seconds"] < found["autocast bfloat16"]["seconds"] < found["float32, TF32 products"]["seconds"]


def test_rounding_to_nearest_loses_at_small_rates_in_every_seed():
    for rate, least in ((1e-3, -0.1), (1e-4, 1.0), (1e-5, 0.9)):
        by_way = {row["way"]: row["losses"] for row in rows("bf16_training", "cpu", rate=rate)}
        assert min(by_way["nearest"]) - max(by_way["float32"]) > least
        for way in ("masters", "stochastic", "Kahan"):
            assert max(by_way[way]) - min(by_way["float32"]) < 0.06


# ---- small shapes


@pytest.mark.parametrize("name", ["activation_offloading", "bf16_training", "checkpointing", "checkpointing_lora", "precision_step"])
def test_a_dry_run_gives_what_is_recorded(name, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "--out", str(tmp_path)])
    bench.load(name).main()
    found, known = (recorded.load(name, folder=folder)["result"] for folder in (tmp_path, recorded.FOLDER))
    assert set(found) == set(known)
    kinds = {row.get("work") for row in known["rows"]}  # of checkpointing_lora the times are not recorded yet
    assert set().union(*(row for row in found["rows"] if row.get("work") in kinds)) == set().union(*known["rows"])


@pytest.fixture(scope="module")
def small() -> dict:
    return checkpointing.measure(True, CPU)


def test_the_formula_holds_on_small_shapes(small):
    memory = [row for row in small["rows"] if row["work"] == "memory"]
    assert [row["segments"] for row in memory] == [1, 2, 4, 8]
    for row in memory:
        assert row["ratio"] == pytest.approx(1, abs=0.08)
        assert row["kept"] < row["peak"]


def test_every_way_needs_less(small):
    peaks = {row["how"]: row["peak"] for row in small["rows"] if row["work"] == "time"}
    assert set(peaks) == set(checkpointing.HOWS)
    assert all(peak < 0.3 * peaks["none"] for how, peak in peaks.items() if how != "none")


@pytest.mark.parametrize("recipe", ["full", "LoRA"])
def test_equality_is_noticed_and_so_is_a_difference(recipe, monkeypatch):
    small = checkpointing_lora.with_layers(checkpointing.SMOKE_SHAPE, 2)
    monkeypatch.setitem(checkpointing.HOWS, "torch", lambda layer, x: layer(x) * 1.001)
    found = {row["how"]: row["equal"] for row in checkpointing_lora.equal(recipe, small, (1, 16), CPU)}
    assert found == dict.fromkeys(checkpointing.HOWS, True) | {"torch": False}


def test_a_way_that_fails_is_a_row_and_stops_nothing(monkeypatch):
    def broken(layer, x):
        raise ValueError("no")

    monkeypatch.setitem(checkpointing.HOWS, "ours", broken)
    layers = checkpointing.chain(checkpointing.SMOKE_SHAPE, 16, CPU)
    x = torch.randn(1, 16, 64, requires_grad=True)
    with Meter(CPU) as meter:
        found = checkpointing.times(layers, x, torch.randn_like(x), meter, 1)
    assert [row["how"] for row in found if "error" in row] == ["ours"]
    assert "FAILED ValueError: no" in checkpointing.table_of_times(found)


def test_offloading_counts_what_leaves():
    result = activation_offloading.measure(True, CPU)
    by_how = {row["how"]: row for row in result["rows"]}
    assert not [row for row in by_how.values() if "error" in row]
    assert by_how["ours"]["copied"] > 20 * by_how["checkpoint, inputs offloaded"]["copied"] * 0.9
    assert by_how["ours, nothing ahead"]["activations"] < 0.3 * by_how["none"]["activations"]


def test_the_update_is_adamws_in_every_way():
    """One step from the same weights: masters are float32 AdamW, the other ways are within a rounding of it."""
    torch.manual_seed(0)
    start, grad = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    exact = start.float().requires_grad_()
    exact.grad = grad.float()
    torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0).step()
    for way in ("masters", "nearest", "stochastic", "Kahan"):
        p = start.clone().requires_grad_()
        p.grad = grad.clone()
        optimizer = bf16_training.InBFloat16([p], 1e-3, way, seed=0)
        optimizer.step()
        assert ((p.float() - exact).abs() <= exact.abs() * 2**-7).all()
        assert 0 < optimizer.unmoved < 1
        if way != "stochastic":
            assert torch.equal(p, exact.bfloat16())
