"""A mock interview: what it is made of, how it goes, and what is said at its end."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from course.practice import tasks
from course.practice.bank import Choice, Item
from course.practice.journal import RATINGS, Journal, Review
from course.practice.memory import Known
from course.practice.tasks import Task
from course.units import CourseError

SHORTEST, LONGEST = 10, 240  # minutes


@dataclass(frozen=True)
class Section:
    """One stretch of an interview: questions of these kinds, and its share of the time."""

    name: str
    kinds: tuple[str, ...]
    share: float
    many: bool = False


SECTIONS = (
    Section("concepts", ("concept", "derivation"), 0.18, many=True),
    Section("an estimate", ("estimate",), 0.09),
    Section("a debugging case", ("debugging",), 0.12),
    Section("a coding task", ("coding",), 0.27),
    Section("a design", ("design",), 0.34),
)
TIGHT = 1.3  # a question may be asked in so many times less than its minutes, but not faster
AMPLE = 1.25  # times its minutes: more helps nobody
WEIGHTS = {"often": 4.0, "sometimes": 2.0, "rare": 1.0}


@dataclass(frozen=True)
class Part:
    """One question of the interview and the minutes for it: from the bank, an exercise, or a question that asks for an exercise."""

    section: str
    minutes: float
    item: Item | None = None
    task: Task | None = None

    @property
    def id(self) -> str:
        return self.item.id if self.item else self.task.id

    @property
    def unit(self) -> str:
        return (self.item or self.task).unit

    @property
    def asked(self) -> str | None:
        """The question, where no computed number stands in it."""
        return self.item.asked_at_once if self.item else self.task.title

    @property
    def name(self) -> str:
        return self.item.kind if self.item else "coding"


@dataclass(frozen=True)
class Plan:
    """The parts in order, and sentences on what is not among them."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...]
    seed: int


def compose(
    items: Sequence[Item],
    exercises: Sequence[Task],
    minutes: int,
    choice: Choice,
    known: dict[str, Known],
    seed: int,
    shuffle: bool = False,
) -> Plan:
    """An interview of ``minutes``.

    What is asked often is likelier, and so are what was never asked or not known the last time, and bugs in a script that one can run.

    Args:
        items: the bank; those that ``choice`` takes are used.
        exercises: for the coding task; they have no role, and all else of ``choice`` holds for them too.
        seed: the same gives the same interview, as long as bank and ratings are the same.
        shuffle: the sections in a random order.

    Raises:
        CourseError: ``minutes`` is out of range, or nothing is left to ask.
    """
    if not SHORTEST <= minutes <= LONGEST:
        raise CourseError(f"--minutes {minutes} must be from {SHORTEST} to {LONGEST}")
    dice, sheets = random.Random(seed), {task.key: task for task in exercises}
    pools = {section.name: _pool(section, items, exercises, choice) for section in SECTIONS}
    wanted = [section for section in SECTIONS if not choice.kinds or set(section.kinds) & set(choice.kinds)]
    scope = f" for {choice.words()}" if choice.words() else " yet"
    notes = [f"The bank has no {_one(section)}{scope}; its time goes to the others." for section in wanted if not pools[section.name]]
    kept = [section for section in wanted if pools[section.name]]
    if not kept:
        raise CourseError(f"there is nothing to ask for {choice.words() or 'this choice'}")
    while True:
        spare = minutes / sum(section.share for section in kept)
        hurry = {section: min(each.minutes for each in pools[section.name]) / (section.share * spare) for section in kept}
        worst = max(kept, key=hurry.get)
        if hurry[worst] <= TIGHT or len(kept) == 1:
            break
        notes.append(f"{minutes} minutes are too short for {worst.name} as well.")
        kept.remove(worst)
    picked, left = {}, float(minutes)
    *first, last = sorted(kept, key=lambda section: section.many)  # what single questions leave goes to the section of many
    for section in (*first, last):
        room = left if section is last else section.share * spare
        picked[section.name] = _picked(section, pools[section.name], room, known, dice, section is last, sheets)
        left -= sum(part.minutes for part in picked[section.name])
    order = dice.sample(kept, len(kept)) if shuffle else kept
    return Plan(tuple(part for section in order for part in picked[section.name]), tuple(notes), seed)


def _one(section: Section) -> str:
    return section.name.removeprefix("an ").removeprefix("a ")


def _pool(section: Section, items: Sequence[Item], exercises: Sequence[Task], choice: Choice) -> list[Item | Task]:
    kinds = set(section.kinds) & set(choice.kinds or section.kinds)
    found: list[Item | Task] = [item for item in items if choice.takes(item) and item.kind in kinds]
    if "coding" in kinds:
        asked = {item.case for item in found}
        found += [
            task
            for task in exercises
            if task.key not in asked
            and (not choice.units or task.unit in choice.units)
            and (not choice.frequencies or task.frequency in choice.frequencies)
            and (choice.difficulty is None or choice.difficulty[0] <= task.difficulty <= choice.difficulty[1])
        ]
    return found


def _weight(each: Item | Task, known: dict[str, Known]) -> float:
    past, runs = known.get(each.id), isinstance(each, Item) and each.kind == "debugging" and each.case
    return WEIGHTS[each.frequency] * (2.0 if past is None or past.last <= 2 else 1.0) * (4.0 if runs else 1.0)


def _picked(
    section: Section,
    pool: Sequence[Item | Task],
    minutes: float,
    known: dict[str, Known],
    dice: random.Random,
    stretch: bool,
    sheets: dict[str, Task],
) -> list[Part]:
    """One question that fits, or as many as fit. Together they take ``minutes``, or less where that is much more than they need."""
    left, room, found = list(pool), minutes * TIGHT, []
    while fitting := [each for each in left if each.minutes <= room] or ([] if found else [min(left, key=lambda each: each.minutes)]):
        (one,) = dice.choices(fitting, [_weight(each, known) for each in fitting])
        found.append(one)
        left.remove(one)
        room = minutes - sum(each.minutes for each in found)
        if not section.many:
            break
    scale = minutes / sum(each.minutes for each in found)
    scale = scale if stretch else min(scale, AMPLE)
    parts = []
    for each in sorted(found, key=lambda each: each.difficulty):
        item, task = (None, each) if isinstance(each, Task) else (each, sheets.get(each.case) if each.kind == "coding" else None)
        parts.append(Part(section.name, each.minutes * scale, item, task))
    return parts


def from_rubric(met: Sequence[bool]) -> int:
    """The rating of a design: without the first line, which must not be missing, 1; else by the share of lines that were said."""
    if not met:
        raise ValueError("met is empty: a design without a rubric is rated by hand")
    share = sum(met) / len(met)
    return 1 if not met[0] else 2 if share < 0.5 else 3 if share < 0.85 else 4


@dataclass
class Interview:
    """How it goes. A rating is on the disk when :meth:`rate` returns; time is that of answering, not of reading the answer afterwards.

    Attributes:
        at: the part now; ``len(plan.parts)`` when it is over.
        seconds: by part, spent on the answer so far.
        given: by part, the review that stands for it.
        met: by part, which lines of the rubric were said.
        sheets: by part, where its coding task was written to.
    """

    plan: Plan
    journal: Journal
    at: int = 0
    seconds: dict[int, float] = field(default_factory=dict)
    given: dict[int, Review] = field(default_factory=dict)
    met: dict[int, list[bool]] = field(default_factory=dict)
    sheets: dict[int, Path] = field(default_factory=dict)

    @property
    def part(self) -> Part | None:
        return self.plan.parts[self.at] if self.at < len(self.plan.parts) else None

    @property
    def minutes(self) -> float:
        return sum(part.minutes for part in self.plan.parts)

    @property
    def used(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())

    def sheet(self, folder: Path) -> Path:
        """The coding task's notebook, written into ``folder`` when it is first asked for: who comes back finds what they wrote."""
        if self.at not in self.sheets:
            self.sheets[self.at] = tasks.hand_out(self.part.task, folder, datetime.now())
        return self.sheets[self.at]

    def spend(self, seconds: float) -> None:
        self.seconds[self.at] = self.seconds.get(self.at, 0.0) + seconds

    def rate(self, rating: int) -> None:
        """A part that was rated before is rated anew."""
        before = self.given.get(self.at)
        seconds = self.seconds.get(self.at)
        review = Review(self.part.id, rating, "interview", seconds=seconds, instead_of=before.key if before else None)
        self.given[self.at] = self.journal.add(review)
        self.at += 1

    def skip(self) -> None:
        self.at += 1

    def back(self) -> None:
        self.at = max(0, self.at - 1)


@dataclass(frozen=True)
class Line:
    """One line of the closing rubric: what is looked for, how much of it was there (None: it was not asked), in words."""

    what: str
    listened_for: str
    share: float | None
    found: str


def rubric(interview: Interview) -> list[Line]:
    """What an interviewer would write down, from the ratings, the rubrics and the clock."""
    parts, given = interview.plan.parts, interview.given

    def good(names: tuple[str, ...]) -> tuple[float | None, str]:
        rated = [given[i].rating for i, part in enumerate(parts) if i in given and part.name in names]
        fine = sum(rating >= 3 for rating in rated)
        return (fine / len(rated), f"{fine} of {len(rated)} good or easy") if rated else (None, "not asked")

    lines = [line for met in interview.met.values() for line in met]
    structure = (sum(lines) / len(lines), f"{sum(lines)} of {len(lines)} points of the rubric") if lines else good(("design",))
    timed = [i for i in given if i in interview.seconds]
    within = sum(interview.seconds[i] <= 60 * parts[i].minutes * 1.1 for i in timed)
    time = (within / len(timed), f"{within} of {len(timed)} parts in time") if timed else (None, "not asked")
    return [
        Line("Knowledge", "right at once, and why; says what it does not know", *good(("concept", "derivation"))),
        Line("Numbers", "an estimate with its assumptions, checked against one known figure", *good(("estimate",))),
        Line("Practice", "finds the cause, not the symptom; tests what it writes", *good(("debugging", "coding"))),
        Line("Design", "asks for the requirements first, names what it gives up", *structure),
        Line("Time", "the short answer first, depth when asked", *time),
    ]


def verdict(interview: Interview) -> str:
    """One sentence, by a rule of thumb that the sentence states."""
    rated = [review.rating for review in interview.given.values()]
    if not rated:
        return "Nothing was rated."
    mean, again = sum(rated) / len(rated), rated.count(1)
    done = f"{len(rated)} of {len(interview.plan.parts)} parts rated, {mean:.1f} of 4 on average"
    if len(rated) < len(interview.plan.parts) / 2:
        return f"{done}: too few to say more."
    if mean >= 3.3 and not again:
        return f"{done}, none failed: you are ready."
    if mean >= 2.5 and again <= 1:
        return f"{done}: it would do; revise what stands below."
    return f"{done}: not yet. Revise what stands below, and sit another one in some days."


def to_revise(interview: Interview) -> list[tuple[Part, str]]:
    """The parts that were rated again or hard, worst first, with the rating's name."""
    weak = sorted((review.rating, i) for i, review in interview.given.items() if review.rating <= 2)
    return [(interview.plan.parts[i], RATINGS[rating][0]) for rating, i in weak]
