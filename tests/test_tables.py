"""Columns of text, and the table of all comparisons with other libraries, whose rows are what was recorded."""

import pytest
import torch

from course.lab import peers, recorded
from course.lab.tables import columns


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
    rows = [*peers.kernels("h100"), *peers.trained("h100"), *peers.layers("h100"), *peers.steps("h100")]
    assert all((row.verdict == "") == (row.goal is None) for row in rows)
    missed = [row for row in rows if row.goal is not None and row.library / row.ours < row.goal]
    assert [row.verdict for row in missed] == ["not met"] * len(missed)
    assert peers.table("h100").count("not met") == len(missed)


def test_what_notebook_06_says_of_the_table():
    """All goals are met; the gain in time is largest in quantizing and in a short step, and smallest in the largest product."""
    rows = [*peers.kernels("h100"), *peers.layers("h100"), *peers.steps("h100")]
    assert "not met" not in peers.table("h100")
    smallest, *_, second, largest = sorted((row for row in rows if row.unit != "GB"), key=lambda row: row.times)
    assert (smallest.work, second.work, largest.work) == ("8,192 rows of x", "1 × 512 tokens", "quantize")


def test_a_verdict_turns_at_the_goal():
    verdicts = {peers.Row("", "", 1.0, library, "ms", 2).verdict for library in (2.0, 2.1)}
    assert verdicts == {"met"}
    assert peers.Row("", "", 1.0, 1.99, "ms", 2).verdict == "not met"
