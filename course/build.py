"""Write what is derived: ``exercises/`` from ``solutions/``, claimed numbers in the README and the lessons, and tidy notebooks.

An exercise is the solution after nbgrader's own steps for a release, without its database, so that ``nbgrader generate_assignment`` gives
the same cells. Before these steps, cells tagged ``solution-only`` (the discussions) are left out.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.converters import GenerateAssignment
from nbgrader.preprocessors import SaveCells
from traitlets.config import Config

from course import ROOT, claimed, reading, teaching
from course.notebooks import as_text, marks, read, tidy
from course.units import CourseError, Unit, units

STUB = "# your answer here\nraise NotImplementedError()"
SOLUTION_ONLY = "solution-only"
TEACHING = ROOT / "teaching"  # notes for instructors, with the mistakes that the judges know


def source(solution: NotebookNode) -> NotebookNode:
    """The worked notebook as nbgrader gets it: without the cells that learners and graders don't need, and without outputs' leftovers."""
    kept = nbformat.from_dict(solution)
    kept.cells = [cell for cell in kept.cells if SOLUTION_ONLY not in cell.metadata.get("tags", [])]
    return tidy(kept)


def exercise(solution: NotebookNode) -> NotebookNode:
    """The exercise that ``solution`` becomes; the same for every run.

    Raises:
        CourseError: the notebook doesn't follow nbgrader's format; the message says where.
    """
    notebook, resources = source(solution), {}
    config = Config({"ClearSolutions": {"code_stub": {"python": STUB}}})
    try:
        for step in GenerateAssignment.preprocessors.default():
            if step is not SaveCells:  # needs nbgrader's database
                notebook, resources = step(config=config)(notebook, resources)
    except Exception as error:  # nbgrader raises RuntimeError, ValidationError and others
        raise CourseError(f"nbgrader refuses the notebook: {error}") from error
    used: set[str] = set()
    for cell in notebook.cells:
        cell.id = _cell_id(cell, used)
    notebook.nbformat_minor = 5
    notebook.metadata["course"] = {"note": "Generated from solutions/ by `course build`.", "content": fingerprint(notebook)}
    return notebook


def _cell_id(cell: NotebookNode, used: set[str]) -> str:
    """The grade id, else a hash of the text: the same however often and wherever the notebook is converted."""
    name = marks(cell).get("grade_id") or hashlib.sha256(f"{cell.cell_type}:{cell.source}".encode()).hexdigest()[:12]
    name = "".join(letter if (letter.isalnum() and letter.isascii()) or letter in "-_" else "-" for letter in name)[:60]
    candidate, count = name, 1
    while candidate in used:
        count += 1
        candidate = f"{name}-{count}"
    used.add(candidate)
    return candidate


def fingerprint(notebook: NotebookNode) -> str:
    """Of what a learner would edit: the cells' kinds and texts, not their outputs."""
    content = "\0".join(f"{cell.cell_type}:{cell.source}" for cell in notebook.cells if cell.source)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def worked_in(path: Path) -> bool:
    """Whether somebody has changed the exercise in ``path`` since it was generated."""
    notebook = read(path)
    return notebook.metadata.get("course", {}).get("content") != fingerprint(notebook)


@dataclass(frozen=True)
class Derived:
    """One derived file: what it holds and what it should hold.

    Attributes:
        now: the text of the file; None where it doesn't exist, or should not exist.
        right: the text that it should hold; None where it should not exist.
        worked_in: it is an exercise that somebody has worked in.
    """

    path: Path
    now: str | None
    right: str | None
    worked_in: bool = False

    @property
    def fresh(self) -> bool:
        return self.now == self.right


def exercises(root: Path = ROOT) -> list[Derived]:
    """Every exercise, and every file in ``exercises/`` that has no solution any more."""
    found = []
    for unit in units(root):
        if unit.solution.exists():
            found.append(_exercise_file(unit))
    expected = {derived.path for derived in found}
    for path in sorted((root / "exercises").glob("*.ipynb")):
        if path not in expected:
            found.append(Derived(path, path.read_text(encoding="utf-8"), None))
    return found


def _exercise_file(unit: Unit) -> Derived:
    try:
        right = as_text(exercise(read(unit.solution)))
    except CourseError as error:
        raise CourseError(f"{unit.solution.relative_to(unit.root)}: {error}") from error
    if not unit.exercise.exists():
        return Derived(unit.exercise, None, right)
    return Derived(unit.exercise, unit.exercise.read_text(encoding="utf-8"), right, worked_in(unit.exercise))


def notebooks(root: Path = ROOT) -> list[Derived]:
    """The notebooks and solutions, each without what differs between two equal runs, and with its minutes."""
    paths = [path for unit in units(root) for path in (unit.notebook, unit.solution) if path.exists()]
    return [Derived(path, path.read_text(encoding="utf-8"), as_text(reading.refresh_notebook(tidy(read(path))))) for path in paths]


def pages(paths: list[Path] | None = None) -> list[Derived]:
    """The pages that carry claims (or ``paths``), each with its numbers, and with the judges' mistakes, as they are now."""
    found = []
    for path in claimed.pages() if paths is None else paths:
        if path.exists():
            text = path.read_text(encoding="utf-8")
            try:
                right = reading.refresh(claimed.refresh(text))
                found.append(Derived(path, text, teaching.refresh(right, path.stem) if path.parent == TEACHING else right))
            except (ValueError, TypeError) as error:
                raise CourseError(f"{path.name}: {error}") from error
    return found


def write(derived: list[Derived], overwrite: bool = False) -> list[Path]:
    """Bring the files up to date and return those that changed; all of them or, after an error, none.

    Raises:
        CourseError: an exercise that has been worked in would be lost, and ``overwrite`` is False.
    """
    stale = [each for each in derived if not each.fresh]
    if not overwrite and (lost := [each.path.name for each in stale if each.worked_in and each.now is not None]):
        names = ", ".join(lost)
        raise CourseError(f"somebody has worked in {names}: keep the work under another name, or pass --overwrite to lose it")
    for each in stale:
        if each.right is None:
            each.path.unlink()
        else:
            each.path.parent.mkdir(parents=True, exist_ok=True)
            each.path.write_text(each.right, encoding="utf-8")
    return [each.path for each in stale]


def lay_out_classroom(folder: Path, root: Path = ROOT) -> None:
    """Write ``folder/source/NN_topic/NN_topic.ipynb``, the layout that nbgrader's commands need, for every unit with a solution."""
    for unit in units(root):
        if unit.solution.exists():
            text = as_text(source(read(unit.solution)))
            path = folder / "source" / unit.stem / f"{unit.stem}.ipynb"
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
