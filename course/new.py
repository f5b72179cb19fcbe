"""``course new NN topic``: an empty unit, whole and working, to be filled.

Each part holds a small idea from end to end (a mean square), so that what is laid out builds, is judged and is tested before a word of it
is replaced. The texts are in ``course/template``; notebooks are written there as percent scripts.
"""

import re
from pathlib import Path

from nbformat import NotebookNode, v4

from course import ROOT
from course.notebooks import as_text, tidy
from course.units import CourseError, Unit, units

TEMPLATE = Path(__file__).parent / "template"
_CELL = re.compile(r"^# %%(?P<marks>.*)$", re.MULTILINE)


def parts(unit: Unit) -> dict[str, Path]:
    """Template -> the file that is made of it."""
    root = unit.root
    return {
        "lesson.md": unit.lesson,
        "slides.md": root / "slides" / f"{unit.stem}.md",
        "teaching.md": root / "teaching" / f"{unit.stem}.md",
        "questions.yaml": unit.interview,
        "notebook.py": unit.notebook,
        "solution.py": unit.solution,
        "checks.py": unit.checks / "__init__.py",
        "check.py": unit.checks / "first.py",
        "claims.py": root / "course" / "claims" / f"{unit.topic}.py",
        "reference.py": root / "reference" / f"{unit.topic}.py",
        "test.py": root / "tests" / f"test_{unit.topic}.py",
    }


def lay_out(number: str, topic: str, root: Path = ROOT) -> list[Path]:
    """Write the parts of unit ``number`` ("07", or 7) about ``topic`` and return their paths; all of them or, after an error, none.

    Raises:
        CourseError: the number or the topic is malformed or taken, or a file is there already.
    """
    if not re.fullmatch(r"\d{1,2}", number):
        raise CourseError(f"NN must be a number of one or two digits such as 07, got {number!r}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", topic):
        raise CourseError(f"the topic must be a Python name in small letters such as paged_optimizers, got {topic!r}")
    unit = Unit(f"{int(number):02d}", topic, root)
    for other in units(root):
        if unit.number == other.number or unit.topic == other.topic:
            raise CourseError(f"there is a unit {other.stem} already: choose another number and topic")
    files = parts(unit)
    if there := [str(path.relative_to(root)) for path in files.values() if path.exists()]:
        raise CourseError(f"{', '.join(there)} would be overwritten: choose another topic, or move what is there")
    texts = {path: _filled(name, unit) for name, path in files.items()}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _filled(name: str, unit: Unit) -> str:
    text = (TEMPLATE / f"{name}.txt").read_text(encoding="utf-8")
    words = {
        "STEM": unit.stem,
        "TITLE": unit.title,
        "TOPIC": unit.topic,
        "SLUG": unit.topic.replace("_", "-"),
        "NUMBER": str(int(unit.number)),
    }
    for word, value in {**words, "NN": unit.number}.items():
        text = re.sub(rf"\b{word}\b", value, text)
    return as_text(tidy(from_percent(text))) if name in ("notebook.py", "solution.py") else text


def from_percent(script: str) -> NotebookNode:
    """A notebook from a percent script. What follows ``# %%`` marks a cell: ``[markdown]``, ``answer ID``, ``check ID POINTS``, or tags."""
    _, *pieces = _CELL.split(script)
    cells = []
    for number, (marks, source) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
        words, source = marks.split(), source.strip("\n")
        if words[:1] == ["[markdown]"]:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.splitlines())
            cell, words = v4.new_markdown_cell(text), words[1:]
        else:
            cell = v4.new_code_cell(source)
        if words[:1] in (["answer"], ["check"]):
            cell.metadata["nbgrader"] = _marks(*words)
        elif words:
            cell.metadata["tags"] = words
        cell.id = f"cell-{number}"
        cells.append(cell)
    return v4.new_notebook(cells=cells)


def _marks(kind: str, grade_id: str, points: str | None = None) -> dict:
    check = kind == "check"
    marks = {"grade": check, "grade_id": grade_id, "locked": check, "schema_version": 3, "solution": not check, "task": False}
    return marks | {"cell_type": "code"} | ({"points": int(points)} if points else {})
