"""nbgrader's autograder with the course's own judge, in place of running the notebook and looking at its outputs.

``course check`` and nbgrader thus give the same points, whatever a notebook prints, replaces or ends. The folders that nbgrader needs are
laid out here too.
"""

import csv
import os
import sys
import tempfile
from pathlib import Path

from nbformat import NotebookNode, v4
from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute, NbGraderPreprocessor
from traitlets import Unicode
from traitlets.config import Config

from course import ROOT, build, grading, siblings
from course.notebooks import is_check, marks
from course.units import CourseError, find, units


class Judge(NbGraderPreprocessor):
    """Judges a submission and writes what each check says into its cell, where nbgrader reads the points."""

    root = Unicode(str(ROOT), help="The folder that holds solutions/ and course/checks/.").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        """Raises CourseError where the notebook is another one's."""
        unit = find(resources["nbgrader"]["assignment"], Path(self.root))
        path = Path(resources["metadata"]["path"]) / f"{resources['metadata'].get('name', unit.stem)}.ipynb"
        with tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True) as scratch:  # as in `course grade`
            siblings.bring(path, {"timestamp.txt"}, Path(scratch))
            said = {outcome.grade_id: outcome for outcome in grading.judge(nb, Path(scratch), unit).outcomes}
        for cell in nb.cells:
            if is_check(cell) and marks(cell)["grade_id"] in said:
                why = said[marks(cell)["grade_id"]].why
                right = v4.new_output("stream", text="✓ right\n")
                cell.outputs = [right if why is None else v4.new_output("error", ename="NotYet", evalue=why, traceback=[f"Not yet: {why}"])]
        return nb, resources


def configure(config: Config, folder: Path, root: Path = ROOT) -> None:
    """Set nbgrader up for the course in ``root``, with its classroom in ``folder``; writes nothing."""
    config.CourseDirectory.root = str(folder)
    config.CourseDirectory.course_id = "peft-course"
    config.ClearSolutions.code_stub = {"python": build.STUB}
    config.Exchange.root = str(folder / "exchange")
    config.Judge.root = str(root)
    steps = Autograde.autograde_preprocessors.default()
    config.Autograde.autograde_preprocessors = [Judge if step is Execute else step for step in steps]


def own_programs_first() -> None:
    """nbgrader calls alembic by its name: this environment's it must be, also where the environment is not activated."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def lay_out(folder: Path, root: Path = ROOT) -> None:
    """Write ``folder/source/NN_topic/NN_topic.ipynb`` for every unit with a solution, and the exchange that nbgrader's lists look into."""
    build.lay_out_classroom(folder, root)
    exchange = folder / "exchange"
    exchange.mkdir(parents=True, exist_ok=True)
    os.chmod(exchange, 0o777)  # nbgrader asks for it: every student's account hands in there


def begin(folder: Path, root: Path = ROOT, students: Path | None = None) -> list[str]:
    """Lay the classroom out, put units and students into nbgrader's gradebook, and return what was done and what comes next.

    What is in the gradebook stays; units and students that are there already are left as they are.

    Args:
        students: a CSV file with the column ``id`` and, if known, ``first_name``, ``last_name`` and ``email``.

    Raises:
        CourseError: there is no such file, or it has no column ``id``.
    """
    from nbgrader.api import Gradebook

    roll = _roll(students) if students else []
    own_programs_first()
    lay_out(folder, root)
    assignments = [unit.stem for unit in units(root) if unit.solution.exists()]
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as book:
        there = {assignment.name for assignment in book.assignments}
        for name in assignments:
            if name not in there:
                book.add_assignment(name)
        enrolled = {student.id for student in book.students}
        for student in roll:
            if student["id"] not in enrolled:
                book.add_student(student.pop("id"), **student)
        count = len(book.students)
    first = assignments[0] if assignments else "NN_topic"
    return [
        f"{len(assignments)} assignments and {count} students are in {folder / 'gradebook.db'}",
        f"students hand in through {folder / 'exchange'}, or you put notebooks into {folder / 'submitted'}/STUDENT/{first}/{first}.ipynb",
        f"Next: nbgrader generate_assignment {first} && nbgrader release_assignment {first}",
        f"Later: nbgrader collect {first}, then nbgrader autograde {first}, or course grade {folder / 'submitted'} --csv grades.csv",
    ]


_ABOUT = ("first_name", "last_name", "email")


def _roll(path: Path) -> list[dict[str, str]]:
    """The students of a CSV file, each once."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise CourseError(f"there is no file {path}") from None
    if rows and "id" not in rows[0]:
        raise CourseError(f"{path} has no column id: its first line must name the columns, such as id,first_name,last_name,email")
    found = {}
    for row in rows:
        if name := (row["id"] or "").strip():
            found[name] = {"id": name} | {key: row[key].strip() for key in _ABOUT if row.get(key)}
    return list(found.values())
