"""Judge a learner's notebook: what passed, what failed and why, and the score.

The checks come from the solution and are found by their grade ids, so that a check cell that was edited or deleted counts as it was
written. Each exercise is run in a process of its own (``course/witness.py``) and judged here, where none of the learner's code runs. Its
process runs the cells above its check, but of the other exercises' answers only those whose names it uses. So what is wrong in one
exercise costs its own points and no others.
"""

import ast
import symtable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from course import build, siblings
from course.hearing import Hearing, Witness
from course.notebooks import is_answer, is_check, marks, read, title_above
from course.running import Limits, Trouble
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
    """Judge the learner's notebook, a file, as :func:`judge` does."""
    _must_have_exercises(unit)
    notebook, folder = read(learner), learner.resolve().parent
    report = judge(notebook, folder, unit, limits, before_cell)
    for name in siblings.in_the_way(folder):
        report.notes.append(
            f"{name} beside your notebook hides a module of that name; `course grade` leaves it behind: give it another name"
        )
    return report


def judge(learner: NotebookNode, folder: Path, unit: Unit, limits: Limits = LIMITS, before_cell=lambda index, count: None) -> Report:
    """Judge a notebook against the checks of ``unit``.

    Args:
        learner: the notebook; it is not changed.
        folder: where its cells run.
        limits: a cell over its time is stopped; an exercise over its memory, or over the time for the whole, ends.
        before_cell: called before each code cell with its index and the number of cells.

    Raises:
        CourseError: the unit has no exercises, or the notebook is another one's.
    """
    _must_have_exercises(unit)
    released = build.exercise(read(unit.solution))
    notebook, notes = assemble(learner, released)
    report, count = Report([], notes), len(notebook.cells)
    fatal: dict[int, Trouble] = {}  # cells that ended the process of an exercise which is not their own
    with Witness(unit) as witness:
        from course import checking  # torch: loaded here while the witness loads it too
        from course import witness as loading

        checks = loading.load(unit.checks.parent, unit.topic)
        for name, place in _exercises(released, notebook).items():
            check = getattr(checks, place.called)
            hearing = Hearing()
            while limits.total_seconds is None or report.seconds < limits.total_seconds:
                cells = _cells(notebook, place, fatal.keys())
                hearing = witness.hear(
                    folder,
                    [(index, notebook.cells[index].source) for index in cells],
                    place.called,
                    place.argument,
                    place.check,
                    check.verdict,
                    [checking.fresh_seed() for _ in range(check.rounds)],
                    Limits(limits.cell_seconds, limits.total_seconds, limits.memory_bytes, report.seconds),
                    lambda index: before_cell(index, count),
                )
                report.seconds += hearing.seconds
                if hearing.ended_in in (None, place.check, *place.answers.values()) or len(fatal) >= RESTARTS:
                    break
                fatal[hearing.ended_in] = hearing.troubles[hearing.ended_in]
            if not hearing.passed and not hearing.troubles:
                hearing.troubles[place.check] = Trouble(place.check, "Stopped", f"not run: {limits.over}")
            report.outcomes.append(_outcome(name, place, notebook, hearing, fatal))
    return report


def _must_have_exercises(unit: Unit) -> None:
    if not unit.solution.exists():
        raise CourseError(f"unit {unit.number} has no exercises")


@dataclass(frozen=True)
class _Place:
    """Where an exercise stands in the notebook that was put together."""

    title: str
    points: float
    check: int
    called: str  # the check's name
    argument: str  # the expression that it is called with
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
            found[name] = _Place(title or title_above(released, index) or name, points, where[name], *called(name, cell.source), answers)
            following = index + 1 < len(released.cells) and is_check(released.cells[index + 1])
            answers = answers if following else {}  # several checks may stand behind one answer
    return found


def called(name: str, source: str) -> tuple[str, str]:
    """Of ``check.forward(LoRALinear)``: forward and LoRALinear.

    Raises:
        CourseError: it is no such call.
    """
    try:
        call = ast.parse(source.strip(), mode="eval").body
        (argument,) = call.args
        return call.func.attr, ast.unparse(argument)
    except (SyntaxError, AttributeError, ValueError):
        raise CourseError(f"the check cell {name!r} must be one call such as check.forward(LoRALinear), not {source!r}") from None


def _cells(notebook: NotebookNode, place: _Place, without: object) -> list[int]:
    """The cells that an exercise's process runs, without those that have ended one."""
    above = [
        index
        for index, cell in enumerate(notebook.cells[: place.check])
        if cell.cell_type == "code"
        and not is_check(cell)
        and index not in without
        and "skip-execution" not in cell.metadata.get("tags", [])
    ]
    own = [index for index in above if index in place.answers.values()]
    names = {index: _names(notebook.cells[index].source) for index in above}
    kept, wanted = set(own), _names(place.argument)[1].union(*(names[index][1] for index in own))
    while more := [index for index in above if index not in kept and names[index][0] & wanted]:
        kept |= set(more)
        wanted = wanted.union(*(names[index][1] for index in more))
    others = [index for index in above if is_answer(notebook.cells[index]) and index not in kept]
    absent = set().union(*(names[index][0] for index in others)) - set().union(*(names[index][0] for index in kept))
    run = []
    for index in above:
        if index in kept or not (index in others or names[index][1] & absent):
            run.append(index)
        elif index not in others:
            absent |= names[index][0]  # it tries what is not there
    return run


def _names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell binds, and those that it uses and does not bind itself; none where it is no Python."""
    try:
        table = symtable.symtable(TransformerManager().transform_cell(source), "cell", "exec")
    except SyntaxError:
        return set(), set()
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
    tables = table.get_children()
    while tables:
        inner = tables.pop()
        used |= {symbol.get_name() for symbol in inner.get_symbols() if symbol.is_global() and symbol.is_referenced()}
        tables += inner.get_children()
    return bound, used - bound


def _outcome(name: str, place: _Place, notebook: NotebookNode, hearing: Hearing, fatal: dict[int, Trouble]) -> Outcome:
    why, troubles = None, hearing.troubles
    own = troubles.get(place.check)
    if missing := [answer for answer, index in place.answers.items() if index is None]:
        why = f"the answer cell {missing[0]!r} is missing: copy it from a fresh exercise"
    elif broken := [troubles[index] for index in place.answers.values() if index in troubles]:
        line = f" (line {broken[0].line})" if broken[0].line else ""
        why = f"the answer's own cell failed: {broken[0]}{line}"
    elif own is not None:
        why = own.message if own.kind == "NotYet" else str(own)
        if own.kind == "NameError":
            failed = [
                trouble for index, trouble in sorted((troubles | fatal).items()) if index < place.check and not marks(notebook.cells[index])
            ]
            why += f". An earlier cell failed: {failed[0]}" if failed else ". The cell that defines it is missing or stands below"
    elif not hearing.passed:
        why = f"not run: the notebook ended before it, in another cell: {troubles[hearing.ended_in]}"
    return Outcome(name, place.title, place.points, why)
