"""Guesses and cells to write: what a reader sees for a right answer, a wrong one and none."""

import pytest
import torch

from course.lab import practice
from course.lab.practice import predict, yours


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr(practice, "display", lambda thing: found.append(getattr(thing, "data", thing)))
    return found


def test_a_number_is_taken_before_it_is_shown(shown):
    guess = predict("How much?", unit="%")
    guess._field.value = "12"
    guess.compare(11.08)
    assert shown[0] == "**Your guess.** How much?" and shown[-1] == "You said 12 %; it is **11.1 %**."
    guess._field.value = "33 %"
    guess.compare(11.0)
    assert shown[-1] == "You said 33 %; it is **11 %**, 3 times as little."
    guess._field.value = "11.10"
    guess.compare(11.1)
    assert shown[-1] == "You said 11.1 %, and so it is: **11.1 %**."


@pytest.mark.parametrize("typed", ["", "many"])
def test_without_a_guess_the_result_is_shown_all_the_same(shown, typed):
    guess = predict("How many factors?")
    guess._field.value = typed
    guess.compare(1234567)
    assert shown[-1] == "It is **1,234,567**. *(You made no guess.)*"


def test_an_option_is_chosen(shown):
    guess = predict("Which?", options=(0, 96, 448))
    guess.compare(0)
    assert shown[-1] == "It is **0**. *(You made no guess.)*"
    guess._field.value = 96
    guess.compare(0)
    assert shown[-1] == "You said 96; it is **0**."
    predict("Which?", options=("NF4", "INT4"), guess="NF4").compare("NF4")
    assert shown[-1] == "You said NF4, and so it is: **NF4**."
    with pytest.raises(ValueError, match="guess must be one of NF4, INT4, got 'FP4'"):
        predict("Which?", options=("NF4", "INT4"), guess="FP4")


def worked(x, times):
    return times * x


def stub(x, times):
    raise NotImplementedError()


def wrong(x, times):
    return x + times


def in_place(x, times):
    return x.mul_(times)


def fails(x, times):
    return x @ times


INPUTS = ((torch.ones(3), 2), (torch.arange(3.0), 3))


@pytest.mark.parametrize(
    "answer, used, words",
    [
        (stub, worked, "Your `stub` is not written yet."),
        (wrong, worked, "Your `wrong` is not right yet: values differ by up to 1, first at [0]: expected 2, got 3."),
        (fails, worked, "Your `fails` raised TypeError"),
        (in_place, in_place, "✓ Your `in_place` is right"),
    ],
)
def test_the_readers_function_is_used_once_it_is_right(shown, answer, used, words):
    assert yours(answer, worked, *INPUTS) is used
    assert shown[-1].startswith(words)
    assert torch.equal(INPUTS[0][0], torch.ones(3))


def test_something_must_be_tried():
    with pytest.raises(ValueError, match="inputs is empty"):
        yours(worked, worked)
