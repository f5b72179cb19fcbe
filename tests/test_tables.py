"""Columns of text, and the table of all comparisons with other libraries, whose rows are what was recorded."""

import pytest
import torch

from course.lab import peers, recorded
from course.lab.tables import columns, short, wrapped


def test_columns_are_as_wide_as_they_need():
    text = columns(("who", "ms", "rows"), [("ours", 0.5, 8192), ("a longer name", torch.tensor(12.345), None)])
    assert text.splitlines() == ["who               ms   rows", "ours            0.50  8,192", "a longer name  12.35      –"]


def test_other_numbers_take_the_form():
    assert columns(("", "loss"), [("a", 0.12345)], "+.3f").splitlines()[1] == "a  +0.123"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"must have 2 values.*got \['1'\]"):
        columns(("a", "b"), [(1,)])


def test_every_row_of_the_kernels_is_in_the_table():
    measured = recorded.load("nf4_kernels", "h100")["result"]["rows"]
    assert [(row.ours, row.library) for row in peers.kernels("h100")] == [(row["ours"], row["bitsandbytes"]) for row in measured]


def test_every_row_of_training_is_in_the_table():
    measured = recorded.load("nf4_training", "h100")["result"]["rows"]
    assert [(row.ours, row.library) for row in peers.trained("h100")] == [(row["ours"], row["bitsandbytes"]) for row in measured]


def test_goals_that_were_missed_are_said():
    rows = [row for card in ("h100", "h200") for row in peers.all_rows(card)]
    assert all((row.verdict == "") == (row.goal is None) for row in rows)
    missed = [row for row in rows if row.goal is not None and row.library / row.ours < row.goal]
    assert [row.verdict for row in missed] == ["not met"] * len(missed)
    assert peers.table().count("not met") == len({(row.group, row.work) for row in missed})
    assert set(peers.table().splitlines()[0].split()) >= {"H100:", "H200:", "×", "goal"}
    assert len(peers.table(("h100",)).splitlines()) == len(peers.table().splitlines())


def test_what_notebook_06_says_of_the_table():
    """All goals are met; the gain in time is largest in quantizing and in a short step, and smallest in the largest product."""
    assert "not met" not in peers.table()
    for card in ("h100", "h200"):
        rows = [row for row in (*peers.kernels(card), *peers.layers(card), *peers.steps(card)) if row.unit != "GB"]
        *_, second, largest = sorted(rows, key=lambda row: row.times)
        assert {second.work, largest.work} == {"1 × 512 tokens", "quantize"}


def test_a_verdict_turns_at_the_goal():
    verdicts = {peers.Row("", "", 1.0, library, "ms", 2).verdict for library in (2.0, 2.1)}
    assert verdicts == {"met"}
    assert peers.Row("", "", 1.0, 1.99, "ms", 2).verdict == "not met"


def test_three_digits_that_count():
    assert [short(value) for value in (0.012345, 1.5, 99.96, 1234.5, 0)] == ["0.0123", "1.50", "100", "1,234", "0.00"]


def test_sentences_beside_a_table_are_cut_into_lines():
    lines = wrapped("word " * 40).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80 and lines[1].startswith("    word")
