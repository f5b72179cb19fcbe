"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused."""

import re

import numpy as np
import pytest
import torch

from course.checking import NotYet
from course.checks import capstone as check
from course.checks.capstone.budget import briefs
from course.checks.capstone.diagnose import diagnose
from course.checks.capstone.triage import REASONS, sample, triage

ALL = (check.budget, check.diagnose, check.triage)


def refused(judge, answer) -> str:
    with pytest.raises(NotYet) as caught:
        judge._judge(answer, 3)
    return str(caught.value)


@pytest.mark.parametrize("judge", ALL)
def test_another_seed_is_another_question(judge):
    assert repr(judge._run(judge.reference, 1)) != repr(judge._run(judge.reference, 2))


@pytest.mark.parametrize("seed", range(4))
def test_each_brief_has_another_answer_and_each_reason_comes_up(seed):
    answers = [check.budget.reference(brief) for brief in briefs(seed).values()]
    assert [(each["method"], each["checkpointing"]) for each in answers[2:]] == [("LoRA", True), ("QLoRA", True), ("refuse", False)]
    assert answers[0]["method"] == "LoRA" and not answers[0]["checkpointing"] and answers[1] != answers[0]
    assert set(triage(*sample(seed))) == set(REASONS)
    asked = check.diagnose._run(diagnose, seed)
    assert {found["do"] for found in asked.values() if isinstance(found, dict)} == {
        "ship", "merge again", "look at the server", "replay", "train again", "ask more",
    }  # fmt: skip


def test_a_guess_of_the_method_is_not_enough():
    def guess(brief):
        return {"method": "QLoRA", "checkpointing": True, "peak_gb": 20.0}

    assert "a card with room for all" in refused(check.budget, guess)


def test_a_refusal_that_says_less_is_told_what_is_missing():
    def short(brief):
        found = check.budget.reference(brief)
        return {"method": "refuse"} if found["method"] == "refuse" else found

    assert re.search(r"a card that is too small \(.*\): missing: checkpointing, peak_gb", refused(check.budget, short))


def test_numpy_numbers_and_other_orders_of_keys_are_right():
    def other(brief):
        found = check.budget.reference(brief)
        return {"peak_gb": np.float64(found["peak_gb"]), "checkpointing": found["checkpointing"], "method": found["method"]}

    check.budget._judge(other, 3)


def test_rows_compared_with_dropped_ones():
    def with_dropped(rows, held_out, longest):
        found, seen = triage(rows, held_out, longest), set()
        for i, row in enumerate(rows):
            key = " ".join(row["instruction"].split()).casefold()
            if key in seen and found[i] == "keep":
                found[i] = "repeated"
            seen.add(key)
        return found

    assert "a row that repeats one without an answer" in refused(check.triage, with_dropped)


def test_everything_kept_is_refused():
    assert re.match(
        r"a sample: row \d+, '.+' → '.*': expected '[a-z ]+', got 'keep'", refused(check.triage, lambda rows, *_: ["keep"] * len(rows))
    )


def test_a_list_of_another_length_is_told_its_length():
    assert refused(check.triage, lambda *_: ["keep"]).endswith("17 here, got 1 values")
    assert refused(check.triage, lambda *_: None).endswith("17 here, got NoneType")


def test_another_stage_to_blame_is_refused():
    def always(measured, tolerance):
        return {"do": "ship", "upper": 0.0}

    assert "all is well: upper" in refused(check.diagnose, always)


def test_the_measurements_are_left_alone():
    def changing(measured, tolerance):
        measured["merged"] -= measured["trained"]
        return diagnose(measured, tolerance)

    refused(check.diagnose, changing)


def test_normal_instead_of_t_is_seen():
    def normal(measured, tolerance):
        found = diagnose(measured, tolerance)
        if "upper" in found:
            lost = (measured["merged"] - measured["trained"]).double()
            found["upper"] = torch.expm1(lost.mean() + 1.96 * lost.std() / len(lost) ** 0.5).item()
        return found

    refused(check.diagnose, normal)
