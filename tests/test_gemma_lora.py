"""The benchmark of real fine-tuning: its helpers, and the smallest run of all of it on a tiny random model."""

import copy
import dataclasses
import json
import time

import pytest
import torch

from benchmarks import gemma_lora
from course.lab import recorded
from reference.lowrank import truncated_svd

SMALLEST = dataclasses.replace(gemma_lora.QUICK, length=16, rows=1, steps=2, every=1, ranks=(1,), shown=1, seeds=(0, 1), probe_step=160)


@pytest.mark.parametrize("lowest", range(6))
def test_the_search_finds_the_lowest_and_has_measured_both_neighbours(lowest):
    tried = []

    def loss(value: float) -> float:
        tried.append(value)
        return abs(value - lowest)

    grid = tuple(map(float, range(6)))
    assert gemma_lora.downhill(grid, loss) == lowest
    assert len(tried) == len(set(tried))
    assert {value for value in (lowest - 1, lowest + 1) if value in grid} <= set(tried)


def test_the_search_avoids_what_diverges():
    assert gemma_lora.downhill((1.0, 2.0, 3.0, 4.0), lambda value: float("inf") if value > 2 else -value) == 2.0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_truncated_update_is_the_best_of_its_rank(shape, rank):
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    B, A = truncated_svd(update, rank)
    found = gemma_lora.truncated(update, gemma_lora.principal(update), rank)
    torch.testing.assert_close(found, B @ A, rtol=0, atol=1e-5)  # float32 of numbers around 1
    assert torch.equal(gemma_lora.truncated(update, gemma_lora.principal(update), 0), torch.zeros(shape))


def test_positions_span_the_spectrum():
    assert gemma_lora.evenly(1) == [0] and gemma_lora.evenly(5) == [0, 1, 2, 3, 4]
    positions = gemma_lora.evenly(640)
    assert (len(positions), positions[0], positions[-1]) == (64, 0, 639) and positions == sorted(set(positions))


def test_autocast_sees_the_weights_of_this_step():
    model, _ = gemma_lora.stand_in()
    wrapped, ids = gemma_lora.InBfloat16(model), torch.arange(20).view(1, -1)
    before = wrapped(ids).logits
    assert before.dtype == torch.bfloat16
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(1)
    after = wrapped(ids).logits
    assert not torch.equal(after, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, model(input_ids=ids).logits)


@pytest.fixture(scope="module")
def benchmark():
    """Set up once, on the first two modules of each split: four million bytes take their time as one token each."""
    whole = gemma_lora.text.code_documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma_lora.text, "code_documents", lambda split: dict(list(whole(split).items())[:2]))
        return gemma_lora.Benchmark(*gemma_lora.stand_in(), SMALLEST, minutes=10)


@pytest.fixture(scope="module")
def results(tmp_path_factory, benchmark):
    folder = tmp_path_factory.mktemp("recorded")
    benchmark, model = copy.copy(benchmark), benchmark.base
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma_lora, "FULL_LRS", (1e-4, 1e-3))
        patch.setattr(gemma_lora, "LORA_LRS", (1e-3, 1e-2))
        chosen = benchmark.execute()
    recorded.save("gemma_lora", benchmark.result("tiny", chosen), folder)
    recorded.save("gemma_spectra", benchmark.spectra(), folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # every run began from the same base
    return recorded.load("gemma_lora", folder=folder)["result"], recorded.load("gemma_spectra", folder=folder)["result"], benchmark


def test_every_configuration_has_all_seeds_and_all_measures(results):
    result, _, benchmark = results
    assert not result["stopped_early"]
    for row in result["summary"]:
        assert row["seeds"] == 2
        for name in ("code", "passages", "manual", "cloze", "pairs", "learned", "forgotten"):
            mean, low, high = row[name]
            assert low <= mean <= high
    shares = {row["config"]: row["parameters"] for row in result["summary"]}
    assert sum(row["chosen"] for row in result["summary"]) == len(result["chosen_lr"]) == len(benchmark.configurations())
    four = 4 * shares["all-linear r=1"]
    equal = [count for config, count in shares.items() if config.split()[0] in ("q,v", "attention", "mlp")]
    assert len(equal) == 3 and all(count == pytest.approx(four, rel=0.1) for count in equal)
    assert len(result["samples"]) == 4 and all(set(sample) == {"prompt", "base", "lora", "full"} for sample in result["samples"].values())
    assert "all-linear r=1, lr" in gemma_lora.table(result)


def test_spectra_hold_what_the_figures_need(results):
    _, spectra, _ = results
    assert spectra["weights"].keys() == spectra["updates"].keys() and len(spectra["weights"]) == 4 * 7
    for entry in (*spectra["weights"].values(), *spectra["updates"].values()):
        assert len(entry["singular_values"]) == min(*entry["shape"], 64) == len(spectra["positions"][str(min(entry["shape"]))])
        assert entry["singular_values"] == sorted(entry["singular_values"], reverse=True)
        assert 1 <= entry["stable_rank"] <= entry["effective_rank"] <= min(entry["shape"])
        assert list(entry["energy"].values()) == sorted(entry["energy"].values())
    ranks = [point["rank"] for point in spectra["retained"]]
    assert ranks[0] == 0 and ranks[-1] == 64 and ranks == sorted(ranks)
    assert spectra["retained"][-1]["loss"] == pytest.approx(spectra["loss_after_full"], abs=1e-4)  # nothing cut away


def test_time_that_runs_out_leaves_a_partial_result_that_says_so(benchmark):
    benchmark = copy.copy(benchmark)
    benchmark.deadline, benchmark.runs = 0.0, []
    result = benchmark.result("tiny", benchmark.execute())
    assert result["stopped_early"] and result["runs"] == [] and json.dumps(result, allow_nan=False)


def test_a_run_that_diverges_is_kept_as_such(benchmark):
    benchmark = copy.copy(benchmark)
    benchmark.base, benchmark.runs = copy.deepcopy(benchmark.base), []
    benchmark.base.lm_head.weight.data.fill_(float("nan"))
    run = benchmark.run(gemma_lora.FULL, 1e-3, 0, None, {"method": "full"})
    assert "nan" in run["diverged"] and run["lr"] == 1e-3 and "measures" not in run
    assert gemma_lora.summary(benchmark.runs, {gemma_lora.FULL: 1e-3}, benchmark.base_measures, 2) == []


@pytest.mark.parametrize("seconds, expected", [(1e-6, 100), (0.18, 60), (1.0, 40)])
def test_runs_are_shortened_alike_where_time_is_short(benchmark, seconds, expected):
    benchmark = copy.copy(benchmark)
    benchmark.settings = dataclasses.replace(benchmark.settings, steps=100, every=20)
    benchmark.step_seconds, benchmark.deadline = seconds, time.monotonic() + 300
    benchmark.measure = benchmark.loss = lambda *arguments: 0.0
    benchmark.fit_steps()
    assert benchmark.settings.steps == expected
