"""Judge a learner's notebook in a process of its own: what passed, what failed and why, and the score.

The check cells come from the solution and are found by their grade ids, so that a check cell that was edited or deleted counts as it was
written. A cell that never ends, crashes the kernel or takes too much memory costs its own points and no others: the kernel is started again
and the notebook run without that cell.
"""

from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course import build
from course.notebooks import is_answer, is_check, marks, read, title_above
from course.running import Limits, Trouble, execute
from course.units import CourseError, Unit

RESTARTS = 6
LIMITS = Limits(cell_seconds=120.0, total_seconds=900.0, memory_bytes=6_000_000_000)


@dataclass(frozen=True)
class Outcome:
    """One check: its exercise, and why it did not pass (None: it did)."""

    grade_id: str
    exercise: str
    points: float
    why: str | None

    @property
    def earned(self) -> float:
        return 0.0 if self.why else self.points


@dataclass
class Report:
    """What judging one notebook gave.

    Attributes:
        notes: what was mended or noticed on the way, in words for the learner.
    """

    outcomes: list[Outcome]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def score(self) -> float:
        return sum(outcome.earned for outcome in self.outcomes)

    @property
    def total(self) -> float:
        return sum(outcome.points for outcome in self.outcomes)

    @property
    def full(self) -> bool:
        return all(outcome.why is None for outcome in self.outcomes)


def assemble(learner: NotebookNode, released: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """The learner's notebook with the cells that are not theirs as they were released.

    Returns:
        The notebook to run, and notes on what was put back.

    Raises:
        CourseError: not one cell of the exercise is in the learner's notebook.
    """
    notebook, notes = nbformat.from_dict(learner), []
    official = {marks(cell)["grade_id"]: cell for cell in released.cells if marks(cell).get("grade_id")}
    where: dict[str, int] = {}
    for index, cell in enumerate(notebook.cells):
        name = marks(cell).get("grade_id")
        if name in official:
            if name in where:
                notes.append(f"the cell {name!r} is there more than once: the last one counts")
            where[name] = index
    if not where:
        raise CourseError("none of the exercise's cells are in this notebook: is it the notebook of another unit?")
    last = -1  # where the previous cell of the exercise stands
    for name, cell in official.items():
        if name in where:
            last = where[name]
            if not is_answer(cell):
                if notebook.cells[last].source != cell.source:
                    notes.append(f"the cell {name!r} had been changed: the original was used")
                notebook.cells[last] = nbformat.from_dict(cell)
        elif is_answer(cell):
            notes.append(f"the answer cell {name!r} is missing")
        else:
            notes.append(f"the cell {name!r} was missing: the original was put back")
            last += 1
            notebook.cells.insert(last, nbformat.from_dict(cell))
            where = {other: index + (index >= last) for other, index in where.items()} | {name: last}
    return notebook, notes


def grade(learner: Path, unit: Unit, limits: Limits = LIMITS, before_cell=lambda index, count: None) -> Report:
    """Run the learner's notebook against the checks of ``unit``.

    Args:
        learner: the notebook; it is not changed.
        limits: a cell over its time is stopped; the whole over its time, or over its memory, ends.
        before_cell: called before each code cell with its index and the number of cells.

    Raises:
        CourseError: there is no such notebook, or the unit has no exercises, or the notebook is another one's.
    """
    if not unit.solution.exists():
        raise CourseError(f"unit {unit.number} has no exercises")
    worked = read(unit.solution)
    released = build.exercise(worked)
    notebook, notes = assemble(read(learner), released)
    report = Report([], notes)
    fatal: dict[int, Trouble] = {}
    while True:
        for index in fatal:
            notebook.cells[index].metadata["tags"] = ["skip-execution"]
        left = None if limits.total_seconds is None else limits.total_seconds - report.seconds
        run = execute(
            notebook,
            learner.resolve().parent,
            Limits(limits.cell_seconds, left, limits.memory_bytes),
            allow_errors=True,
            before_cell=lambda index: before_cell(index, len(notebook.cells)),
        )
        report.seconds += run.seconds
        over = limits.total_seconds is not None and report.seconds >= limits.total_seconds
        if not run.died:
            break
        fatal[run.troubles[-1].cell] = run.troubles[-1]
        if over or len(fatal) > RESTARTS:
            break
    troubles = {trouble.cell: trouble for trouble in run.troubles} | fatal
    reached = run.troubles[-1].cell if run.died else len(notebook.cells)
    report.outcomes = [_outcome(name, cells, notebook, troubles, reached) for name, cells in _exercises(released, notebook).items()]
    return report


@dataclass(frozen=True)
class _Place:
    """Where an exercise stands in the notebook that was run."""

    title: str
    points: float
    check: int
    answers: dict[str, int | None]  # grade id -> index; None: missing


def _exercises(released: NotebookNode, notebook: NotebookNode) -> dict[str, _Place]:
    where = {marks(cell)["grade_id"]: index for index, cell in enumerate(notebook.cells) if marks(cell).get("grade_id")}
    found, answers, title = {}, {}, None
    for index, cell in enumerate(released.cells):
        name = marks(cell).get("grade_id")
        if is_answer(cell):
            if not answers:
                title = title_above(released, index)
            answers[name] = where.get(name)
        elif is_check(cell):
            points = float(marks(cell).get("points", 0))
            found[name] = _Place(title or title_above(released, index) or name, points, where[name], answers)
            following = index + 1 < len(released.cells) and is_check(released.cells[index + 1])
            answers = answers if following else {}  # several checks may stand behind one answer
    return found


def _outcome(name: str, place: _Place, notebook: NotebookNode, troubles: dict[int, Trouble], reached: int) -> Outcome:
    why = None
    own = troubles.get(place.check)
    if missing := [answer for answer, index in place.answers.items() if index is None]:
        why = f"the answer cell {missing[0]!r} is missing: copy it from a fresh exercise"
    elif broken := [troubles[index] for index in place.answers.values() if index in troubles]:
        line = f" (line {broken[0].line})" if broken[0].line else ""
        why = f"the answer's own cell failed: {broken[0]}{line}"
    elif own is not None:
        why = own.message if own.kind == "NotYet" else str(own)
        if own.kind == "NameError":
            failed = [trouble for index, trouble in sorted(troubles.items()) if index < place.check and not marks(notebook.cells[index])]
            why += f". An earlier cell failed: {failed[0]}" if failed else ". The cell that defines it is missing or stands below"
    elif place.check > reached:
        why = "not run: the notebook ended before it"
    return Outcome(name, place.title, place.points, why)
