"""What the pages say of the bars, the candidates and the two versions of the kernels is what was recorded."""

import re

import pytest

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from benchmarks.kernel_limits import BARS, ROWS
from course import ROOT
from course.claims import kernels, qlora
from course.figures import kernels as pictures
from course.lab import recorded
from reference.kernels.nf4 import FUSED_ROWS

RESULT = recorded.load("kernel_limits", "h200")["result"]
LABELS = {"quantize": "quantize", "dequantize": "dequantize", "… double quantization": "dequantize, double quantization"}
REACHED = {("quantize", None), ("linear", 16), ("linear", 32)}  # by the lesson's bullets and the figure's alt text


def page(name: str) -> str:
    """Its text as a reader sees it."""
    return re.sub(r"<!--.*?-->", "", (ROOT / name).read_text(encoding="utf-8"))


def reached() -> set[tuple[str, int | None]]:
    return {(row["work"], row.get("rows")) for row in RESULT["rows"] if row["reached"] >= row["bar"]}


def test_bars_are_those_that_were_set():
    rows = {(row["work"], row.get("rows")): row["bar"] for row in RESULT["rows"]}
    assert rows == {(work, None): BARS[work] for work in LABELS.values()} | {
        ("linear", count): BARS["one row" if count == 1 else "rows"] for count in ROWS
    }


def test_the_pages_name_the_goals_that_were_reached():
    assert reached() == REACHED
    lesson, deck = page("lessons/13_kernels.md"), page("slides/13_kernels.md")
    assert "quantize, 16 and 32 rows reach theirs](figures/kernels_bars.png)" in lesson
    assert "**Dequantize** misses its goal at 90 %, with double quantization narrowly." in lesson
    said = re.search(r"Reached: (.*?)\. Missed: (.*?); bitsandbytes is lower everywhere\]", deck)
    for percent in ("quantize 87 of 85", "16 rows 122 and 32 rows 105 of 100"):
        assert percent in said[1]
    for percent in ("dequantize 90 of 93", "double quantization 89.6 of 90", "1 row 54 of 70", "64 rows 87 and 128 rows 55 of 100"):
        assert percent in said[2]


def test_the_appendix_has_every_goal_and_what_was_reached():
    table = dict(re.findall(r"^\| (.+?) \| ([\d.]+ \| \d+ \| [\d.]+) \|$", page("lessons/appendix/13_tried.md"), re.MULTILINE))
    for row in RESULT["rows"]:
        label = next((label for label, work in LABELS.items() if work == row["work"]), None)
        label = label or f"layer, {row['rows']} row{'s' * (row['rows'] > 1)}"
        numbers = [float(each) for each in table[label].split(" | ")]
        assert numbers == pytest.approx([100 * row["reached"], 100 * row["bar"], 100 * row["reached by the fastest"]], abs=0.051)


def test_only_the_loop_gains_enough_and_at_128_rows_all_are_slower():
    assert kernels.only_the_loop_is_worth_its_lines()
    assert kernels.speed("linear", rows=128) < 1 < kernels.speed("linear", rows=64) < 1.03
    assert all(kernels.speed("linear", rows=rows) < 1 for rows in (1, 16, 32))


def test_reading_alone_misses_the_bar_of_one_row():
    assert kernels.reached_percent("linear", 1) < kernels.reading_percent() < kernels.bar_percent("linear", 1)


def test_the_record_of_the_h200_is_of_the_kernels_as_they_are():
    """The text says up to which rows the version that was measured decodes on the way: then 128 rows beat decoding and product."""
    assert qlora.FUSED["h200"] == FUSED_ROWS == kernels.fused_rows()
    assert qlora.fused_percent(128) < 90 and qlora.fused_percent(128, "h100") > 98


def test_ours_is_above_bitsandbytes_in_every_bar_of_the_figures():
    assert all(each["ours"] > each["bitsandbytes"] for each in pictures.bars_data().values())
    floors = pictures.floors_data()
    assert all(ours > theirs for ways in floors.values() for ours, theirs in zip(ways["ours"], ways["bitsandbytes"], strict=True))


def test_every_candidate_is_in_the_figure():
    assert sum(len(speeds) for kinds in pictures.tried_data().values() for speeds in kinds.values()) == sum(
        len(row["candidates"]) for row in RESULT["rows"]
    )
