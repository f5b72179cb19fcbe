"""Worked solutions run from top to bottom and get full score; the exercises made of them get none, and say why."""

from pathlib import Path

import pytest
from interpreted import interpreted

from course import build, grading
from course.notebooks import as_text, read
from course.units import Unit, units

SOLVED = [pytest.param(unit, marks=[interpreted] * (unit.topic == "kernels"), id=unit.stem) for unit in units() if unit.solution.exists()]
every_unit = pytest.mark.parametrize("unit", SOLVED)


@every_unit
def test_the_worked_solution_gets_full_score(unit: Unit):
    report = grading.grade(unit.solution, unit)
    assert [(outcome.grade_id, outcome.why) for outcome in report.outcomes if outcome.why] == []
    assert report.notes == [] and report.score == report.total > 0


@every_unit
def test_the_untouched_exercise_gets_none_and_is_told_so_politely(unit: Unit, tmp_path: Path):
    path = tmp_path / f"{unit.stem}.ipynb"
    path.write_text(as_text(build.exercise(read(unit.solution))))
    report = grading.grade(path, unit)
    assert report.score == 0 and report.notes == []
    for outcome in report.outcomes:
        assert outcome.why.startswith("nothing here yet"), f"{outcome.grade_id}: {outcome.why}"
