"""Figures are drawn from what is recorded now."""

import copy

import pytest
from PIL import Image

from course import ROOT, figures
from course.lab import recorded
from reference.model_shapes import LLAMA_2_7B

PAGES = {figures.FIGURE: ROOT / "README.md", figures.GROWTH: ROOT / "lessons" / "00_memory_budget.md"}


@pytest.mark.parametrize("figure", PAGES, ids=lambda path: path.stem)
def test_the_committed_figure_shows_the_recorded_results(figure):
    with Image.open(figure) as picture:
        assert picture.text["Source"] == figures.fingerprint(figures.results(figure)), "run python -m course.figures"


@pytest.mark.parametrize("figure", PAGES, ids=lambda path: path.stem)
def test_a_page_shows_it_with_an_alt_text(figure):
    (line,) = [line for line in PAGES[figure].read_text().splitlines() if figure.name in line]
    assert line.startswith("![") and len(line.partition("](")[0].split()) > 8


def test_another_result_is_noticed(tmp_path):
    entries = figures.results()
    before = figures.fingerprint(entries)
    entries["nf4_kernels"]["result"]["rows"][0]["ours"] *= 1.01
    assert figures.fingerprint(entries) != before
    path = figures.main(tmp_path / "figure.png")
    with Image.open(path) as picture:
        assert picture.text["Source"] == before and picture.width > 900


def test_growth_draws_every_measured_point_once_on_its_panel(tmp_path, monkeypatch):
    entries, drawn = figures.results(figures.GROWTH), []
    monkeypatch.setattr(figures, "mark", lambda axes, x, point, colour: drawn.append(point))
    figures.main(tmp_path / "growth.png", figures.GROWTH.name)
    points = figures.points(entries)
    on_cpu = [point for point in points if not point.gpu]
    assert len(on_cpu) == len(entries["growth on a CPU"]["result"]["rows"])
    assert set(drawn) >= set(on_cpu)
    assert {point.shape for point in drawn if point.gpu} >= {"Llama-2-7B", "Llama-2-13B", "Llama-33B", "Llama-2-70B"}
    assert {point.tokens for point in drawn if point.gpu and point.shape == LLAMA_2_7B.name} >= {512, 2048, 8192}
    peft = [row["peak"] for row in recorded.load("qlora_memory", device="h100")["result"]["rows"] if row["how"] != "QLoRA"]
    assert not {point.peak for point in drawn} & set(peft)  # only steps that the prediction is of
    lines = {figures.peak_gb(figures.shapes(entries)[p.shape], **settings(p)) / (p.peak / 1e9) for p in drawn}
    assert min(lines) > 0.98 and max(lines) < 1.02


def settings(point: figures.Point) -> dict:
    keys = {"sequence": point.tokens, "rank": point.rank, "checkpointing": point.checkpointing}
    return keys | {"attention": point.attention}


def test_a_gpus_own_record_replaces_the_points_borrowed_from_others(monkeypatch):
    own = copy.deepcopy(recorded.load("growth", device="cpu"))
    failed = own["result"]["rows"][0]
    failed["error"] = failed.pop("peak")
    real = recorded.load
    monkeypatch.setattr(recorded, "load", lambda name, device: own if (name, device) == ("growth", "h100") else real(name, device))
    entries = figures.results(figures.GROWTH)
    assert set(entries) == {"growth on a CPU", "growth on a GPU"}
    assert sum(point.gpu for point in figures.points(entries)) == len(own["result"]["rows"]) - 1
