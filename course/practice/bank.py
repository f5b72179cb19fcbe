"""The questions as they can be chosen: what is written in the bank, before a single number is computed."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from course import interview
from course.units import CourseError

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast
COMMANDS = {"debugging": "course case {}", "coding": "course check {}"}


@dataclass(frozen=True)
class Item:
    """One question without its answer; fields as in :class:`course.interview.Question`.

    Attributes:
        text: the question; if a number stands in it, its name in braces.
        short: the short answer, in the same way.
    """

    id: str
    text: str
    unit: str
    kind: str
    difficulty: int
    frequency: str
    role: tuple[str, ...]
    minutes: int
    case: str = ""
    short: str = field(default="", repr=False)

    @property
    def asked_at_once(self) -> str | None:
        """The question, where no computed number stands in it."""
        return _plain(self.text)

    @property
    def answered_at_once(self) -> str | None:
        """The short answer, where no computed number stands in it."""
        return _plain(self.short)

    @property
    def command(self) -> str:
        """What to type to work on its script or its exercise; empty where it has none."""
        if not self.case:
            return ""
        name = self.case.partition(".")[0] if self.kind == "coding" else self.case
        return COMMANDS.get(self.kind, "course case {}").format(name)

    @property
    def how(self) -> str:
        """A sentence that says what to do with ``command``; empty where there is none."""
        if not self.case:
            return ""
        if self.kind == "coding":
            unit, _, exercise = self.case.partition(".")
            return f"Write it: exercise {exercise} in exercises/{unit}_….ipynb, then `{self.command}` judges it."
        return f"Try it: `{self.command}` prints the symptom and the script, `{self.command} --check FILE` judges your fix."


def _plain(text: str) -> str | None:
    return None if interview.placeholders(text) else text.format()


@dataclass(frozen=True)
class Choice:
    """What to choose by; an empty tuple, or None, takes all."""

    units: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    frequencies: tuple[str, ...] = ()
    difficulty: tuple[int, int] | None = None

    def takes(self, item: Item) -> bool:
        return (
            (not self.units or item.unit in self.units)
            and (not self.kinds or item.kind in self.kinds)
            and (not self.frequencies or item.frequency in self.frequencies)
            and (not self.roles or bool(set(self.roles) & set(item.role)))
            and (self.difficulty is None or self.difficulty[0] <= item.difficulty <= self.difficulty[1])
        )

    def words(self) -> str:
        """As somebody would say it: "unit 02, kind estimate"; empty where everything is taken."""
        parts = [("unit", self.units), ("kind", self.kinds), ("role", self.roles), ("frequency", self.frequencies)]
        said = [f"{name} {' or '.join(values)}" for name, values in parts if values]
        if self.difficulty:
            low, high = self.difficulty
            said.append(f"difficulty {low}" if low == high else f"difficulty {low} to {high}")
        return ", ".join(said)


def choice(
    units: Sequence[str] = (),
    kinds: Sequence[str] = (),
    roles: Sequence[str] = (),
    frequencies: Sequence[str] = (),
    difficulty: str | None = None,
) -> Choice:
    """A choice from what was typed.

    Raises:
        CourseError: a word is not one of the bank's, or the difficulty is neither a number from 1 to 5 nor a range such as 2-4.
    """
    for name, given, known in (
        ("kind", kinds, interview.KINDS),
        ("role", roles, interview.ROLES),
        ("frequency", frequencies, interview.FREQUENCIES),
    ):
        if unknown := [word for word in given if word not in known]:
            raise CourseError(f"--{name} {unknown[0]!r} is not known; take one of {', '.join(known)}")
    return Choice(tuple(units), tuple(kinds), tuple(roles), tuple(frequencies), _range(difficulty))


def _range(difficulty: str | None) -> tuple[int, int] | None:
    if difficulty is None:
        return None
    match = re.fullmatch(r"([1-5])(?:-([1-5]))?", difficulty.strip())
    if match is None or (match[2] and match[2] < match[1]):
        raise CourseError(f"--difficulty {difficulty!r} must be a number from 1 to 5 or a range such as 2-4")
    return int(match[1]), int(match[2] or match[1])


def written(folder: Path | None = None) -> list[tuple[str, dict]]:
    """File name and entry of every question, as they stand there; nothing is computed."""
    found = []
    for path in sorted((folder or interview.FOLDER).glob("*.yaml")):
        found += [(path.name, entry) for entry in yaml.load(path.read_text(encoding="utf-8"), _Loader)]
    return found


def items() -> list[Item]:
    """All questions of the bank, in file order."""
    return [
        Item(
            id=entry["id"],
            text=entry["question"].strip(),
            unit=entry["unit"],
            kind=entry.get("kind", "concept"),
            difficulty=entry["difficulty"],
            frequency=entry.get("frequency", "sometimes"),
            role=tuple(entry.get("role", ("applied",))),
            minutes=entry["minutes"],
            case=entry.get("case", ""),
            short=entry["short"].strip(),
        )
        for _, entry in written()
    ]


def chosen(choice: Choice, among: Iterable[Item] | None = None) -> list[Item]:
    """Those that ``choice`` takes.

    Raises:
        CourseError: it takes none; the message says what the bank lacks.
    """
    found = [item for item in (items() if among is None else among) if choice.takes(item)]
    if not found:
        raise CourseError(f"the bank has no questions yet for {choice.words()}" if choice.words() else "the bank has no questions yet")
    return found
