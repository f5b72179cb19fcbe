"""nbgrader's autograder with the course's own judge, in place of running the notebook and looking at its outputs.

``course check`` and nbgrader thus give the same points, whatever a notebook prints, replaces or ends. The folders that nbgrader needs are
laid out here too.
"""

import os
from pathlib import Path

from nbformat import NotebookNode, v4
from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute, NbGraderPreprocessor
from traitlets import Unicode
from traitlets.config import Config

from course import ROOT, build, grading
from course.notebooks import is_check, marks
from course.units import find


class Judge(NbGraderPreprocessor):
    """Judges a submission and writes what each check says into its cell, where nbgrader reads the points."""

    root = Unicode(str(ROOT), help="The folder that holds solutions/ and course/checks/.").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        """Raises CourseError where the notebook is another one's."""
        unit = find(resources["nbgrader"]["assignment"], Path(self.root))
        folder = Path(resources["metadata"]["path"])
        said = {outcome.grade_id: outcome for outcome in grading.judge(nb, folder, unit).outcomes}
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


def lay_out(folder: Path, root: Path = ROOT) -> None:
    """Write ``folder/source/NN_topic/NN_topic.ipynb`` for every unit with a solution, and the exchange that nbgrader's lists look into."""
    build.lay_out_classroom(folder, root)
    exchange = folder / "exchange"
    exchange.mkdir(parents=True, exist_ok=True)
    os.chmod(exchange, 0o777)  # nbgrader asks for it: every student's account hands in there
