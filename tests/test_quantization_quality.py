"""The benchmark of quality: every run starts from the base that its name says, and what is recorded holds together."""

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import gemma_lora
from benchmarks import quantization_quality as benchmark
from course.lab import recorded
from course.lab.quantized import quantized_copy

SMALLEST = dataclasses.replace(benchmark.STAND_IN, length=16, rows=1, steps=2, every=1, probe_step=32, kinds=("NF4+DQ", "INT8", "INT4"))
SMALLEST = dataclasses.replace(SMALLEST, trained=("16-bit", "INT4"))


@pytest.fixture(scope="module")
def fewer_sources():
    """The first two modules of each split: four million bytes take their time as one token each."""
    whole = gemma_lora.text.code_documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma_lora.text, "code_documents", lambda split: dict(list(whole(split).items())[:2]))
        yield


@pytest.fixture(scope="module")
def finished(fewer_sources):
    bases, saved = {}, []

    class Watched(benchmark.Quality):
        def run(self, config, lr, seed, adapt, details):
            bases[config, seed] = {name: value.clone() for name, value in self.base.state_dict().items()}
            return super().run(config, lr, seed, adapt, details)

    model, tokenizer = gemma_lora.stand_in()
    made = Watched(model.bfloat16().float(), tokenizer, SMALLEST, 10, None, lambda b: saved.append(len(b.runs)))
    made.execute()
    return made, bases, saved


def test_every_run_starts_from_the_base_of_its_name(finished):
    made, bases, _ = finished
    assert len(bases) == 4
    for (config, _), state in bases.items():
        kind = config.removeprefix("LoRA on ")
        expected = made.original if kind == "16-bit" else quantized_copy(made.original, kind, compute_dtype=torch.bfloat16)
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items()), config
    assert made.base is made.original


def test_it_saves_as_it_goes(finished):
    _, _, saved = finished
    assert saved == [0, 0, 0, 1, 2, 3, 4]


def test_the_result_holds_together(finished, tmp_path):
    made, _, _ = finished
    recorded.save("quantization_quality_gemma", made.quality_result("stand-in", None), tmp_path)
    result = recorded.load("quantization_quality_gemma", folder=tmp_path)["result"]
    assert not result["stopped_early"] and result["two_percent_rule"]["choice"]
    base = result["formats"]["16-bit"]
    for kind, row in result["formats"].items():
        assert len(row["items"]["code"]) == result["counts"]["code"] and len(row["items"]["cloze"]) == result["counts"]["cloze"]
        if kind != "16-bit":
            for name, lost in result["lost"][kind].items():
                difference = row[name] - base[name] if name in ("code", "manual", "passages") else base[name] - row[name]
                assert lost["estimate"] == pytest.approx(difference, abs=2e-4)  # both are rounded
    zero, other = result["won_back"]
    assert zero["code"]["gap_after"] == [0, 0] and other["seeds"] == [0, 1]
    assert other["code"]["gap_before"] == pytest.approx(other["code"]["before"] - zero["code"]["before"], abs=1e-5)
    assert "LoRA on it: gap to 16 bits" in benchmark.table(result)


def test_it_resumes_and_runs_only_what_is_missing(finished, fewer_sources, tmp_path):
    made, _, _ = finished
    result = json.loads(json.dumps(made.quality_result("stand-in", None)))
    result["runs"] = result["runs"][:3]
    del result["formats"]["INT4"]
    model, tokenizer = gemma_lora.stand_in()
    again = benchmark.Quality(model.bfloat16().float(), tokenizer, SMALLEST, 10, result, lambda b: None)
    again.execute()
    assert [(r["config"], r["seed"]) for r in again.runs] == [(r["config"], r["seed"]) for r in made.runs]
    assert again.known["INT4"]["items"]["cloze"] == made.known["INT4"]["items"]["cloze"]
    late = benchmark.Quality(model.bfloat16().float(), tokenizer, SMALLEST, 0, result, lambda b: None)
    late.execute()
    assert late.stopped_early and len(late.runs) == 3


def test_a_run_that_fails_is_recorded_and_the_others_go_on(finished, monkeypatch):
    made, _, _ = finished

    def broken(self, config, lr, seed, adapt, details):
        raise RuntimeError("CUDA out of memory\nand more")

    monkeypatch.setattr(gemma_lora.Benchmark, "run", broken)
    runs, made.runs = made.runs, []
    try:
        made.execute()
        assert len(made.runs) == 4 and made.runs[0]["error"] == "RuntimeError: CUDA out of memory"
        assert made.won_back() == []
    finally:
        made.runs = runs


def test_the_tiny_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantization_quality.py", "--smoke", "--out", str(tmp_path)])
    benchmark.main()
    assert "INT2" in capsys.readouterr().out
    result = recorded.load("quantization_quality_tiny", folder=tmp_path)["result"]
    by_kind = {row["kind"]: row for row in result["table"]}
    assert by_kind["INT2"]["above_floor"]["general"] > by_kind["NF4"]["above_floor"]["general"]
    assert by_kind["16-bit"]["divergence"] < by_kind["NF4"]["divergence"] < by_kind["INT2"]["divergence"]
    assert all(len(row["after"]) == 2 for row in result["won_back"])
