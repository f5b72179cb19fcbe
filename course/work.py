"""A learner's own copies of the exercises, in ``work/``, and what their last checks gave.

``exercises/`` belongs to the course: it is generated, tracked by git, and brought up to date by ``git pull``. ``work/`` belongs to the
learner: git ignores it, and nothing here replaces a file in it. What would be in the way is kept under another name.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from course import ROOT
from course.units import CourseError, Unit, units

if TYPE_CHECKING:
    from course.grading import Report

SCORES = "scores.json"


@dataclass(frozen=True)
class Started:
    """What ``course start`` found and did.

    Attributes:
        path: the copy to work in.
        new: it was made now; otherwise it is as it was.
        kept: where an older copy went.
        outdated: the exercise has changed since this copy was made.
    """

    path: Path
    new: bool
    kept: Path | None = None
    outdated: bool = False


def start(unit: Unit, fresh: bool = False) -> Started:
    """Copy the unit's exercise to ``work/``; a copy that is there stays, and with ``fresh`` it stays under another name.

    Raises:
        CourseError: the unit has no exercises.
    """
    if not unit.exercise.exists():
        raise CourseError(f"unit {unit.number} has no exercises" if not unit.solution.exists() else "run `course build` first")
    if unit.work.exists() and not fresh:
        return Started(unit.work, new=False, outdated=_version(unit.work) not in (None, _version(unit.exercise)))
    kept = set_aside(unit.work)
    text = _untouched(unit) if fresh else unit.exercise.read_text(encoding="utf-8")
    unit.work.parent.mkdir(exist_ok=True)
    with unit.work.open("x", encoding="utf-8") as file:  # "x" never opens what is there
        file.write(text)
    return Started(unit.work, new=True, kept=kept)


def _untouched(unit: Unit) -> str:
    """The exercise as it is made; the file in ``exercises/`` may have been worked in."""
    from course import build
    from course.notebooks import as_text, read

    return as_text(build.exercise(read(unit.solution)))


def _version(path: Path) -> str | None:
    """Of the exercise that a notebook was copied from; None where the notebook doesn't say."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("course", {}).get("content")
    return None


def set_aside(path: Path) -> Path | None:
    """Give a file another name that is free, 02_lora-1.ipynb, and return it; None if there is no such file."""
    if not path.exists():
        return None
    number = 1
    while (other := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    return path.rename(other)


def own_notebook(unit: Unit) -> Path:
    """What ``course check`` judges: the copy in ``work/`` if there is one, else the exercise itself."""
    return unit.work if unit.work.exists() else unit.exercise


def scores(root: Path = ROOT) -> dict[str, dict]:
    """Of each unit that was checked, by its stem: ``score``, ``total``, ``when``, and ``open``, the exercises that are not right yet.

    What cannot be read counts as not checked.
    """
    try:
        found = json.loads((root / "work" / SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {stem: entry for stem, entry in found.items() if _is_score(entry)} if isinstance(found, dict) else {}


_KINDS = {"score": (int, float), "total": (int, float), "when": str, "open": list}


def _is_score(entry: object) -> bool:
    if not (isinstance(entry, dict) and entry.keys() == _KINDS.keys() and all(map(isinstance, entry.values(), map(_KINDS.get, entry)))):
        return False
    return all(isinstance(exercise, str) for exercise in entry["open"])


def remember(unit: Unit, report: "Report") -> None:
    """Keep what a check gave. The file is replaced as a whole, so that a crash leaves the old one; an unreadable one is set aside."""
    path = unit.root / "work" / SCORES
    path.parent.mkdir(exist_ok=True)
    known = scores(unit.root)
    if path.exists() and not known:
        set_aside(path)
    known[unit.stem] = {
        "score": report.score,
        "total": report.total,
        "when": datetime.now().isoformat(timespec="minutes"),
        "open": [outcome.exercise for outcome in report.outcomes if outcome.why is not None],
    }
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(known, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(beside, path)


@dataclass(frozen=True)
class Standing:
    """Where a learner stands in one unit; ``when`` is None if it was never checked."""

    unit: Unit
    score: float
    total: float
    when: str | None
    open: list[str]
    started: bool

    @property
    def done(self) -> bool:
        return self.when is not None and self.score >= self.total


def progress(root: Path = ROOT) -> list[Standing]:
    """For every unit with exercises, in the course's order."""
    known, found = scores(root), []
    for unit in units(root):
        if unit.exercise.exists():
            entry = known.get(unit.stem) or {"score": 0, "total": _points(unit.exercise), "when": None, "open": []}
            found.append(Standing(unit, **entry, started=unit.work.exists()))
    return found


def _points(exercise: Path) -> float:
    """That an exercise can give."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        cells = json.loads(exercise.read_text(encoding="utf-8"))["cells"]
        return sum(cell["metadata"].get("nbgrader", {}).get("points", 0) for cell in cells)
    return 0


def what_next(standings: list[Standing]) -> str:
    """One sentence: the unit that was checked last if points are left there, else the first that is not done."""
    unfinished = [each for each in standings if not each.done]
    if not unfinished:
        return "Every exercise is right." if standings else "There are no exercises yet."
    begun = [each for each in unfinished if each.when is not None]
    each = max(begun, key=lambda each: each.when) if begun else next((each for each in unfinished if each.started), unfinished[0])
    if each.open:
        return f"Next: {each.open[0]}, in {each.unit.stem}; then `course check {each.unit.number}`."
    return f"Next: `course {'check' if each.started else 'start'} {each.unit.number}`, {each.unit.title}."
