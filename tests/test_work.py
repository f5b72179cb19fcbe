"""A learner's work is kept apart from the course, is found first, and is never overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import miniature
import pytest
from rich.console import Console

from course import build, cli, grading, work
from course.notebooks import marks, read
from course.units import CourseError, Unit, find


@pytest.fixture
def unit(small_course: Unit) -> Unit:
    build.write(build.exercises(small_course.root))
    return small_course


def answer(path: Path, **answers: str) -> None:
    notebook = read(path)
    for cell in notebook.cells:
        if (name := marks(cell).get("grade_id")) in answers:
            cell.source = answers[name]
    miniature.save(notebook, path)


def report(*right: bool) -> grading.Report:
    """Of a check that found these exercises right, or not."""
    return grading.Report([grading.Outcome(f"e{i}", f"{i}. Task", 1.0, None if fine else "no") for i, fine in enumerate(right, 1)])


def test_starting_copies_and_starting_again_leaves_it_alone(unit: Unit):
    begun = work.start(unit)
    assert begun.new and begun.path == unit.work == unit.root / "work" / "00_squares.ipynb"
    assert unit.work.read_text() == unit.exercise.read_text()
    unit.work.write_text("mine")
    again = work.start(unit)
    assert not again.new and again.kept is None and unit.work.read_text() == "mine"


def test_a_fresh_start_keeps_every_earlier_one_and_takes_the_exercise_as_it_is_made(unit: Unit):
    answer(unit.exercise, square="def square(x):\n    return x ** 2")  # worked in where the course keeps it
    work.start(unit)
    assert "x ** 2" in unit.work.read_text(), "work that was done in exercises/ comes along"
    for number in (1, 2):
        unit.work.write_text(f"try {number}")
        begun = work.start(unit, fresh=True)
        assert begun.new and begun.kept == unit.work.with_stem(f"00_squares-{number}")
        assert "x ** 2" not in unit.work.read_text() and "raise NotImplementedError()" in unit.work.read_text()
    assert [unit.work.with_stem(f"00_squares-{number}").read_text() for number in (1, 2)] == ["try 1", "try 2"]
    assert "x ** 2" in unit.exercise.read_text()


def test_an_exercise_that_changed_since_is_said(unit: Unit):
    work.start(unit)
    answer(unit.work, square="def square(x):\n    return x * x")
    kept = json.loads(unit.work.read_text()) | {"metadata": json.loads(unit.exercise.read_text())["metadata"]}
    unit.work.write_text(json.dumps(kept))  # Jupyter keeps the notebook's metadata
    assert not work.start(unit).outdated
    solution = read(unit.solution)
    solution.cells[2].source += "\n\nA new hint."
    miniature.save(solution, unit.solution)
    build.write(build.exercises(unit.root))
    assert work.start(unit).outdated


def test_a_unit_without_exercises(unit: Unit):
    with pytest.raises(CourseError, match="unit 01 has no exercises"):
        work.start(find("cubes", unit.root))


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *settings, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_pull_brings_new_exercises_and_leaves_work_alone(unit: Unit, tmp_path_factory: pytest.TempPathFactory):
    (unit.root / ".gitignore").write_text("work/\n")
    git(unit.root, "init")
    git(unit.root, "add", ".")
    git(unit.root, "commit", "-m", "The course")
    here = tmp_path_factory.mktemp("learner") / "course"
    git(unit.root, "clone", ".", str(here))
    mine = find("squares", here)
    work.start(mine)
    mine.work.write_text("mine")
    unit.exercise.write_text("another edition")
    git(unit.root, "commit", "-am", "Another edition")
    git(here, "pull")
    assert mine.exercise.read_text() == "another edition" and mine.work.read_text() == "mine"
    assert git(here, "status", "--porcelain") == ""


def test_the_scores_of_the_last_check_are_kept(unit: Unit):
    work.remember(unit, report(False, True))
    (standing,) = work.progress(unit.root)
    assert (standing.score, standing.total, standing.open, standing.done) == (1, 2, ["1. Task"], False)
    assert work.what_next([standing]) == "Next: 1. Task, in 00_squares; then `course check 00`."
    work.remember(unit, report(True, True))
    (standing,) = work.progress(unit.root)
    assert standing.done and work.what_next([standing]) == "Every exercise is right."


def test_nothing_was_checked_yet(unit: Unit):
    (standing,) = work.progress(unit.root)
    assert (standing.score, standing.total, standing.started) == (0, 3, False)
    assert work.what_next([standing]) == "Next: `course start 00`, squares."
    work.start(unit)
    assert work.what_next(work.progress(unit.root)) == "Next: `course check 00`, squares."
    assert work.what_next([]) == "There are no exercises yet."


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"00_squares": 3}', '{"00_squares": {"score": "x"}}', "\xff"])
def test_scores_that_cannot_be_read_count_as_none_and_are_not_lost(unit: Unit, text: str):
    path = unit.root / "work" / work.SCORES
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    assert work.scores(unit.root) == {} and work.progress(unit.root)[0].when is None
    work.remember(unit, report(True))
    assert work.scores(unit.root)["00_squares"]["score"] == 1
    assert path.with_stem("scores-1").read_bytes() == text.encode("latin-1")


# the commands


@pytest.fixture
def course(unit: Unit, monkeypatch, capsys):
    """Run the command on the small course; returns (exit status, what it printed)."""
    monkeypatch.setattr(cli.shared, "ROOT", unit.root)
    monkeypatch.chdir(unit.root)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["course", *words])
        monkeypatch.setattr(cli.shared, "console", Console(width=160, highlight=False))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out + printed.err

    return run


def test_check_judges_the_copy_first_and_progress_tells(course, unit: Unit):
    assert course("start", "0") == (0, "wrote work/00_squares.ipynb. Open it in JupyterLab (`make lab`); `course check 00` judges it.\n")
    assert "is there already and stays as it is" in course("start", "0")[1]
    answer(unit.work, square="def square(x):\n    return x * x")
    status, printed = course("check", "0")
    assert status == 1 and "1 of 3 points" in printed
    printed = course("progress")[1]
    assert "1/3" in printed and "2. Double" in printed and "Next: 2. Double, in 00_squares" in printed
    assert course("check", "0", str(unit.solution))[0] == 0
    assert "1/3" in course("progress")[1], "only one's own work counts"
    assert "kept your earlier work as work/00_squares-1.ipynb" in course("start", "squares", "--fresh")[1]
