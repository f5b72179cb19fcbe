"""Figures are drawn from what is recorded and computed now."""

import copy

import pytest
from PIL import Image

from course import ROOT, figures
from course.figures import memory_budget

FIGURES = figures.figures()
GROWTH = FIGURES["growth"]
every_figure = pytest.mark.parametrize("figure", FIGURES.values(), ids=lambda figure: figure.name)


@every_figure
def test_the_committed_figure_shows_the_data_of_now(figure):
    with Image.open(figure.path) as picture:
        assert picture.text["Source"] == figures.fingerprint(figure.data()), "run `course figures`"
        assert picture.width > 500
    assert figure.path.stat().st_size < 300_000


@every_figure
def test_its_page_shows_it_with_an_alt_text(figure):
    text = (ROOT / figure.page).read_text().replace("\n", " ")
    before, found, _ = text.partition(f"figures/{figure.path.name})")
    assert found, f"{figure.page} does not show it"
    assert len(before.rpartition("![")[2].partition("](")[0].split()) > 8


def test_no_picture_is_left_over():
    drawn = {figure.path for figure in FIGURES.values()} | {figures.FOLDER / "demo.png"}  # `course demo` draws that one
    assert set(figures.FOLDER.glob("*.png")) == drawn


def test_another_result_is_noticed(tmp_path):
    figure = FIGURES["four_bits"]
    data = figure.data()
    before = figures.fingerprint(data)
    data["nf4_kernels"]["result"]["rows"][0]["ours"] *= 1.01
    assert figures.fingerprint(data) != before
    with Image.open(figures.save(figure, tmp_path / "figure.png")) as picture:
        assert picture.text["Source"] == before and picture.width > 900


def test_the_last_digits_of_a_sum_are_not():
    assert figures.fingerprint({"x": [0.1 + 0.2, (1, "a")]}) == figures.fingerprint({"x": [0.3, [1, "a"]]})


def test_growth_draws_every_measured_point(tmp_path, monkeypatch):
    entries, drawn = GROWTH.data(), []
    monkeypatch.setattr(memory_budget, "mark", lambda axes, x, point, colour: drawn.append(point))
    figures.save(GROWTH, tmp_path / "growth.png")
    assert set(drawn) == set(memory_budget.points(entries))
    for gpu, name in ((True, "growth on a GPU"), (False, "growth on a CPU")):
        rows = entries[name]["result"]["rows"]
        assert {point.peak for point in drawn if point.gpu == gpu} == {row["peak"] for row in rows}
        assert len({point for point in drawn if point.gpu == gpu}) == len(rows)
    assert {point.shape for point in drawn if point.gpu} >= {"Llama-2-7B", "Llama-2-13B", "Llama-33B", "Llama-2-70B"}
    assert max(point.tokens for point in drawn if point.gpu) == 8192 and max(point.rank for point in drawn if point.gpu) == 256
    lines = {memory_budget.peak_gb(memory_budget.shapes(entries)[p.shape], **settings(p)) / (p.peak / 1e9) for p in drawn}
    assert min(lines) > 0.98 and max(lines) < 1.001  # predictions leave out something, and add nothing


def settings(point: memory_budget.Point) -> dict:
    keys = {"sequence": point.tokens, "rank": point.rank, "checkpointing": point.checkpointing}
    return keys | {"attention": point.attention}


def test_a_row_that_failed_is_no_point():
    entries = copy.deepcopy(GROWTH.data())
    before, failed = memory_budget.points(entries), entries["growth on a GPU"]["result"]["rows"][0]
    failed["error"] = failed.pop("peak")
    assert memory_budget.points(entries) == before[1:] and before[0].gpu
