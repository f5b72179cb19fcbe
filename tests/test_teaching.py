"""The plans add up, leave room for what they contain, and the notes say what the judges say."""

import ast
import re

import pytest

from course import ROOT, build, claimed, teaching
from course.units import CourseError, find, units

PLANS = (ROOT / "TEACHING.md").read_text(encoding="utf-8")
NOTES = sorted((ROOT / "teaching").glob("*.md"))
TAUGHT = [unit for unit in units() if unit.solution.exists()]
ROW = re.compile(r"^\| (?P<hour>\d+):(?P<minute>\d\d) \| (?P<minutes>\d+) \| (?P<what>.*) \|$", re.MULTILINE)
DAYS = [[*ROW.finditer(table)] for table in PLANS.split("| time | minutes | what |")[1:]]


def test_every_day_runs_on_without_a_gap():
    assert len(DAYS) == 3
    for rows in DAYS:
        ends = None
        for row in rows:
            begins = 60 * int(row["hour"]) + int(row["minute"])
            assert ends in (None, begins), row[0]
            ends = begins + int(row["minutes"])
    assert sum(int(row["minutes"]) for row in DAYS[0]) == 240
    for rows in DAYS[1:]:
        assert 7 * 60 <= sum(int(row["minutes"]) for row in rows) <= 8 * 60


def test_what_is_done_fits_into_its_minutes():
    held = 0
    for rows in DAYS:
        for row in rows:
            stated = sum(claimed.value(call) for call in claimed.in_page(row["what"]))
            assert stated <= int(row["minutes"]), row[0]
            held += bool(stated)
            if row["what"].startswith("Exercise"):
                assert stated, f"{row[0]}: say how long they take"
    assert held > 12


def test_nobody_sits_longer_than_two_hours():
    for rows in DAYS:
        since = 0
        for row in rows:
            since = 0 if row["what"] in ("Break", "Lunch") else since + int(row["minutes"])
            assert since <= 130, row[0]


def test_the_exercises_that_a_plan_names_are_those_it_counts():
    """ "02: 1, 2 and 6" stands beside the minutes of exactly these."""
    found = re.findall(r"(\d\d): ([\d, and]+?) \(\d+<!--claim teaching:exercises\((.*?)\) d-->", PLANS)
    assert len(found) == PLANS.count("claim teaching:exercises(")
    for unit, named, arguments in found:
        counted = ast.literal_eval(f"({arguments},)")
        assert counted == (unit, *map(int, re.findall(r"\d+", named)))


def test_eight_weeks_hold_every_unit():
    weeks = re.findall(r"^\| \d \| ([^|]*) \|", PLANS, re.MULTILINE)
    named = re.findall(r"\d\d", " ".join(weeks))
    assert len(weeks) == 8 and sorted(named) == [path.stem[:2] for path in NOTES] == [unit.number for unit in TAUGHT]


def test_a_week_is_an_hour_of_exercises_from_its_own_units():
    weeks = re.findall(r"^\| \d \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", PLANS, re.MULTILINE)
    assert len(weeks) == 8
    for named, exercises, hours in weeks:
        assert 20 <= sum(claimed.value(call) for call in claimed.in_page(exercises)) <= 55, named
        assert re.findall(r"'(\d\d)'", exercises) == re.findall(r"'(\d\d)'", hours) == re.findall(r"\d\d", named)


@pytest.mark.parametrize("path", NOTES, ids=lambda path: path.stem)
def test_notes_say_what_the_judge_says_and_give_nothing_away(path):
    text = path.read_text(encoding="utf-8")
    (derived,) = build.pages([path])
    assert derived.fresh, "run `course build`"
    assert "solutions/" not in text and "```" not in text
    for heading in ("## Afterwards they can", "## Ask the room", "## Time", "## Watch out", "## What the judge will say"):
        assert heading in text
    assert text.count("The judge knows") == len(teaching.exercise_minutes(find(path.stem)))


@pytest.mark.parametrize("unit", TAUGHT, ids=lambda unit: unit.stem)
def test_minutes_are_read_from_the_unit(unit):
    stated, sections = teaching.exercise_minutes(unit), teaching.notebook_minutes(unit)
    assert [*stated] == [*range(1, len(stated) + 1)] and len(stated) >= 3
    assert 10 <= sections[0] <= 60 and sections[0] >= max(sections.values())


def test_a_page_without_a_place_for_them_is_refused():
    with pytest.raises(CourseError, match="needs a line"):
        teaching.refresh("# A page", "02_lora")
