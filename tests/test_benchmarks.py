"""Every benchmark starts the same way, and its dry run gives what its recorded result holds."""

import sys

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
