"""Figures are drawn from what is recorded now."""

import copy

import pytest
from PIL import Image

from course import ROOT, figures

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


def test_growth_draws_every_measured_point(tmp_path, monkeypatch):
    entries, drawn = figures.results(figures.GROWTH), []
    monkeypatch.setattr(figures, "mark", lambda axes, x, point, colour: drawn.append(point))
    figures.main(tmp_path / "growth.png", figures.GROWTH.name)
    assert set(drawn) == set(figures.points(entries))
    for gpu, name in ((True, "growth on a GPU"), (False, "growth on a CPU")):
        rows = entries[name]["result"]["rows"]
        assert {point.peak for point in drawn if point.gpu == gpu} == {row["peak"] for row in rows}
        assert len({point for point in drawn if point.gpu == gpu}) == len(rows)
    assert {point.shape for point in drawn if point.gpu} >= {"Llama-2-7B", "Llama-2-13B", "Llama-33B", "Llama-2-70B"}
    assert max(point.tokens for point in drawn if point.gpu) == 8192 and max(point.rank for point in drawn if point.gpu) == 256
    lines = {figures.peak_gb(figures.shapes(entries)[p.shape], **settings(p)) / (p.peak / 1e9) for p in drawn}
    assert min(lines) > 0.98 and max(lines) < 1.001  # predictions leave out something, and add nothing


def settings(point: figures.Point) -> dict:
    keys = {"sequence": point.tokens, "rank": point.rank, "checkpointing": point.checkpointing}
    return keys | {"attention": point.attention}


def test_a_row_that_failed_is_no_point():
    entries = copy.deepcopy(figures.results(figures.GROWTH))
    before, failed = figures.points(entries), entries["growth on a GPU"]["result"]["rows"][0]
    failed["error"] = failed.pop("peak")
    assert figures.points(entries) == before[1:] and before[0].gpu
