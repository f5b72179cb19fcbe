"""Coding tasks for a mock interview: the exercises, one at a time and without their hints."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from course import ROOT
from course.units import CourseError, Unit, units

if TYPE_CHECKING:
    from nbformat import NotebookNode

_HEADING = re.compile(r"^## (?P<number>\d+)\. (?P<title>.+)$", re.MULTILINE)
_ABOUT = re.compile(
    r"\*\*Difficulty\*\* (?P<stars>[●○]+) · \*\*(?P<minutes>\d+) minutes\*\* · \*\*asked in interviews: (?P<often>\w+)\*\*[^\n]*\n"
)
_HINT = re.compile(r"<details>.*?</details>", re.DOTALL)
_FREQUENCY = {"often": "often", "sometimes": "sometimes", "rarely": "rare"}


@dataclass(frozen=True)
class Task:
    """One exercise.

    Attributes:
        key: unit and number, "02.1".
        text: what is asked, Markdown, without hints.
        check: grade ids of its checks.
    """

    key: str
    title: str
    text: str
    difficulty: int
    minutes: int
    frequency: str
    check: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        return self.key.partition(".")[0]

    @property
    def id(self) -> str:
        """What a rating of it is kept under."""
        return f"exercise:{self.key}"


def tasks(root: Path = ROOT) -> list[Task]:
    """All exercises that say how long they take."""
    found = []
    for unit in units(root):
        if unit.exercise.exists():
            for heading, cells in _parts(unit)[1:]:
                text = cells[0]["source"]
                if about := _ABOUT.search(text):
                    found.append(
                        Task(
                            key=f"{unit.number}.{heading['number']}",
                            title=heading["title"],
                            text=_HINT.sub("", text[about.end() :]).strip(),
                            difficulty=about["stars"].count("●"),
                            minutes=int(about["minutes"]),
                            frequency=_FREQUENCY[about["often"]],
                            check=tuple(mark["grade_id"] for cell in cells if (mark := cell["metadata"].get("nbgrader", {})).get("grade")),
                        )
                    )
    return found


def _parts(unit: Unit) -> list[tuple[re.Match | None, list[dict]]]:
    """What stands before the first exercise, then each exercise with its heading.

    Read as JSON: ``course build`` wrote the file, and to check all of them as notebooks takes seconds.
    """
    found: list[tuple[re.Match | None, list[dict]]] = [(None, [])]
    for cell in json.loads(unit.exercise.read_text(encoding="utf-8"))["cells"]:
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and (heading := _HEADING.match(cell["source"])):
            found.append((heading, []))
        found[-1][1].append(cell)
    return found


def sheet(task: Task, root: Path = ROOT) -> "NotebookNode":
    """A notebook of this exercise alone: what it imports, the task, the cells to write and the checks; no hints."""
    from nbformat import from_dict, v4

    from course.notebooks import tidy

    (unit,) = [unit for unit in units(root) if unit.number == task.unit]
    before, *exercises = _parts(unit)
    (own,) = [cells for heading, cells in exercises if heading["number"] == task.key.partition(".")[2]]
    opening = v4.new_markdown_cell(
        f"# Mock interview: {task.title}\n\n{task.minutes} minutes. No hints; say aloud what you think.", id="opening"
    )
    cells = [opening, *(from_dict(cell) for cell in before[1] if cell["cell_type"] == "code")]
    for cell in map(from_dict, own):
        if cell.cell_type == "markdown":
            cell.source = _HINT.sub("", cell.source).strip()
        if cell.source:
            cells.append(cell)
    made = tidy(v4.new_notebook(cells=cells))
    made.nbformat_minor = 5
    return made


def hand_out(task: Task, folder: Path, now: datetime, root: Path = ROOT) -> Path:
    """Write the sheet into ``folder``, under a name that is not taken yet."""
    from course.notebooks import as_text

    folder.mkdir(parents=True, exist_ok=True)
    words = "-".join(re.findall(r"[a-z0-9]+", task.title.lower())[:4])
    stem, count = f"{now:%Y-%m-%d}-{task.key.replace('.', '-')}-{words}", 1
    path = folder / f"{stem}.ipynb"
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.ipynb"
    path.write_text(as_text(sheet(task, root)), encoding="utf-8")
    return path


def judged(task: Task, path: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with the sheet in ``path``: a sentence for each check that does not pass; none if all do. Loads torch."""
    from course import grading

    (unit,) = [unit for unit in units(root) if unit.number == task.unit]
    try:
        report = grading.grade(path, unit)
    except CourseError as error:  # it was moved, or is no notebook any more
        return [str(error)]
    return [f"{outcome.exercise}: {outcome.why}" for outcome in report.outcomes if outcome.grade_id in task.check and outcome.why]


def best_rating(wrong: list[str]) -> int:
    """What does not pass its checks is hard at best."""
    return 2 if wrong else 4
