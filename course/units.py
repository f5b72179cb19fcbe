"""A unit is one number and one stem, the same in every folder: which units there are, and where their parts lie."""

import re
from dataclasses import dataclass
from pathlib import Path

from course import ROOT

_STEM = re.compile(r"(?P<number>\d\d)_(?P<topic>[a-z0-9_]+)")
_FOLDERS = {"lessons": ".md", "notebooks": ".ipynb", "solutions": ".ipynb"}  # a unit exists where one of these does


class CourseError(Exception):
    """Something the user can mend; the command line prints the message alone, without a traceback."""


@dataclass(frozen=True, order=True)
class Unit:
    """One unit of the course.

    Attributes:
        number: two digits, "02".
        topic: the rest of the stem, "lora".
        root: the folder that holds ``lessons/``, ``notebooks/`` and the others.
    """

    number: str
    topic: str
    root: Path = ROOT

    @property
    def stem(self) -> str:
        return f"{self.number}_{self.topic}"

    @property
    def title(self) -> str:
        return self.topic.replace("_", " ")

    @property
    def lesson(self) -> Path:
        return self.root / "lessons" / f"{self.stem}.md"

    @property
    def appendices(self) -> list[Path]:
        """Pages beside the lesson: ``lessons/appendix/NN_*.md``."""
        return sorted((self.root / "lessons" / "appendix").glob(f"{self.number}_*.md"))

    @property
    def notebook(self) -> Path:
        return self.root / "notebooks" / f"{self.stem}.ipynb"

    @property
    def exercise(self) -> Path:
        return self.root / "exercises" / f"{self.stem}.ipynb"

    @property
    def work(self) -> Path:
        """The learner's copy of the exercise."""
        return self.root / "work" / f"{self.stem}.ipynb"

    @property
    def solution(self) -> Path:
        return self.root / "solutions" / f"{self.stem}.ipynb"

    @property
    def checks(self) -> Path:
        return self.root / "course" / "checks" / self.topic

    @property
    def interview(self) -> Path:
        return self.root / "lessons" / "interview" / f"{self.stem}.yaml"


def units(root: Path = ROOT) -> list[Unit]:
    """All units under ``root``, in order."""
    stems = {path.stem for folder, suffix in _FOLDERS.items() for path in (root / folder).glob(f"*{suffix}")}
    return sorted(Unit(match["number"], match["topic"], root) for stem in stems if (match := _STEM.fullmatch(stem)))


def find(name: str, root: Path = ROOT) -> Unit:
    """The unit called ``name``: "02", "2", "lora" or "02_lora".

    Raises:
        CourseError: there is none; the message lists those there are.
    """
    known = units(root)
    for unit in known:
        if name in (unit.number, unit.topic, unit.stem) or (name.isdecimal() and int(name) == int(unit.number)):
            return unit
    listed = ", ".join(f"{unit.number} ({unit.title})" for unit in known) or "none yet"
    raise CourseError(f"there is no unit {name!r}. Units: {listed}")


def select(names: list[str] | None, root: Path = ROOT) -> list[Unit]:
    """The units called ``names``, in the course's order, each once; all of them if no name is given."""
    return sorted({find(name, root) for name in names}) if names else units(root)
