"""What instructors need of the units: minutes of their parts, and the mistakes that their judges know by name.

The pages in ``teaching/`` hold a list of these mistakes between two comments; ``course build`` writes it and a test holds it, so that it
says what the judge says. Judges are loaded in a process of their own, ``python -m course.teaching``, where Triton interprets kernels: one
that compiles them, as a claim may have made this one do, can't load unit 13's.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache

from course import ROOT
from course.notebooks import is_answer, is_check, read, title_above
from course.reading import STATED, minutes, refresh_notebook
from course.units import CourseError, Unit, find, units

NAMED = 4  # mistakes of each exercise
_SECTION = re.compile(r"^## (?P<number>\d+) · ", re.MULTILINE)
_EXERCISE = re.compile(r"^## (?P<number>\d+)\. .*?\*\*(?P<minutes>\d+) minutes\*\*", re.MULTILINE | re.DOTALL)
_MISTAKES = re.compile(r"(<!--mistakes-->\n).*?(<!--/mistakes-->)", re.DOTALL)


def lesson_minutes(unit: Unit) -> int:
    """To read the lesson."""
    return minutes(unit.lesson.read_text(encoding="utf-8"))


def notebook_minutes(unit: Unit) -> dict[int, int]:
    """Section -> minutes as its heading states them after ``course build``; 0 is the whole notebook."""
    found = {}
    for cell in refresh_notebook(read(unit.notebook)).cells:
        if cell.cell_type == "markdown" and (stated := STATED.search(cell.source)):
            section = _SECTION.search(cell.source)
            found.setdefault(int(section["number"]) if section else 0, int(stated["number"]))  # the first cell states the sum
    return found


def exercise_minutes(unit: Unit) -> dict[int, int]:
    """Exercise -> minutes as it states them."""
    texts = (cell.source for cell in read(unit.solution).cells if cell.cell_type == "markdown")
    return {int(match["number"]): int(match["minutes"]) for text in texts for match in _EXERCISE.finditer(text)}


def mistakes(unit: Unit) -> str:
    """The exercises of ``unit``, each with the first mistakes that its judge knows by name, as Markdown."""
    from course import witness
    from course.grading import called

    checks, lines, title = witness.load(unit.checks.parent, unit.topic), [], None
    solution = read(unit.solution)
    for index, cell in enumerate(solution.cells):
        if is_answer(cell):
            title = title_above(solution, index)
        elif is_check(cell):
            check = getattr(checks, called("", cell.source)[0])
            known = list(check.misconceptions)
            lines += [f"**{title}** · The judge knows {len(known)} mistakes by name, among them:", ""]
            lines += [f"- {message}" for message in known[:NAMED]] + [""]
    return "\n".join(lines)


def refresh(text: str, stem: str) -> str:
    """A page of ``teaching/`` with the mistakes as the judges of unit ``stem`` name them.

    Raises:
        CourseError: the page has no place for them.
    """
    if not _MISTAKES.search(text):
        raise CourseError("a page of teaching/ needs a line <!--mistakes--> and below it a line <!--/mistakes-->")
    listed = _mistakes_of_all()[find(stem).stem]
    return _MISTAKES.sub(lambda match: f"{match[1]}\n{listed}\n{match[2]}", text)


@cache
def _mistakes_of_all() -> dict[str, str]:
    """Stem -> its mistakes, of all units that have exercises."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run([sys.executable, "-m", "course.teaching"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CourseError(f"the judges could not be loaded: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps({unit.stem: mistakes(unit) for unit in units() if unit.solution.exists()}))
