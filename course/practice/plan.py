"""``course plan``: what to do on each of the days before an interview.

Lessons first, and what interviewers ask often; then as much of the rest as the hours take. Questions come back by the same model as in
``course quiz``, as if each were answered well, so that a day's share of repetitions is known beforehand.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path

from course import reading
from course.practice.bank import Item
from course.practice.journal import Review
from course.practice.memory import Known, memory
from course.practice.tasks import Task
from course.units import CourseError, Unit

REPEAT_SHARE = 1 / 3  # of its minutes, to answer a question again
MOCK_MINUTES = 45
LONGEST = 365  # days
ESSENTIAL, USEFUL, REST = 1, 2, 3


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        rank: ESSENTIAL, USEFUL or REST: what goes first when the days don't take everything.
        question: its id, where it is to answer a new question.
    """

    unit: str
    what: str
    minutes: float
    rank: int
    question: str = ""


@dataclass
class Day:
    """One day.

    Attributes:
        again: questions that come back on it.
        again_minutes: what they take.
    """

    on: date
    steps: list[Step] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    again_minutes: float = 0.0

    @property
    def minutes(self) -> float:
        return self.again_minutes + sum(step.minutes for step in self.steps)

    def lines(self) -> list[str]:
        """What to do, in words; new questions of a unit together."""
        found: list[str] = []
        if self.again:
            found.append(f"{_count(len(self.again), 'question')} due: `course quiz --new 0` ({self.again_minutes:.0f} min)")
        asked: dict[str, list[Step]] = {}
        for step in self.steps:
            if step.question:
                asked.setdefault(step.unit, []).append(step)
            else:
                found.append(f"{step.what} ({step.minutes:.0f} min)")
        for unit, steps in asked.items():
            spent = sum(step.minutes for step in steps)
            found.append(f"{_count(len(steps), 'new question')}: `course quiz {unit} --new {len(steps)}` ({spent:.0f} min)")
        return found


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"


def steps(units: Sequence[Unit], items: Sequence[Item], tasks: Sequence[Task], known: dict[str, Known]) -> list[Step]:
    """All there is to do, in the order of the units; of a unit first the lesson, then its notebook, exercises and new questions."""
    found = []
    for unit in units:
        if unit.lesson.exists():
            lesson = unit.lesson.read_text(encoding="utf-8")
            title = lesson.partition("\n")[0].partition(" · ")[2] or unit.title  # "# 11 · Many adapters"
            found.append(Step(unit.number, f"read lesson {unit.number}, {title}", reading.minutes(lesson), ESSENTIAL))
        if unit.notebook.exists():
            found.append(Step(unit.number, f"run notebook {unit.number}", _notebook_minutes(unit), USEFUL))
        for task in tasks:
            if task.unit == unit.number and (task.id not in known or known[task.id].last <= 2):
                rank = {"often": ESSENTIAL, "sometimes": USEFUL}.get(task.frequency, REST)
                found.append(Step(unit.number, f"exercise {task.key}, {task.title}", task.minutes, rank))
        for item in items:
            if item.unit == unit.number and item.id not in known:
                rank = {"often": ESSENTIAL, "sometimes": USEFUL}.get(item.frequency, REST)
                found.append(Step(unit.number, item.id, item.minutes, rank, item.id))
    return found


def _notebook_minutes(unit: Unit) -> int:
    """As its first cell states them; half an hour where it does not."""
    first = json.loads(unit.notebook.read_text(encoding="utf-8"))["cells"][0]
    stated = reading.STATED.search("".join(first["source"]))
    return int(stated["number"]) if stated else 30


@dataclass(frozen=True)
class Plan:
    """The days, and what found no place in them."""

    days: tuple[Day, ...]
    left_out: tuple[Step, ...]
    minutes: int

    def left_out_words(self) -> str:
        """One sentence; empty where everything found its place."""
        if not self.left_out:
            return ""
        asked = sum(bool(step.question) for step in self.left_out)
        parts = [_count(asked, "question")] * bool(asked) + [_count(len(self.left_out) - asked, "other step")] * (
            asked < len(self.left_out)
        )
        hours = sum(step.minutes for step in self.left_out) / 60
        return f"{' and '.join(parts)} ({hours:.0f} h) found no place, the rarely asked first: take more days or more minutes a day."


def make(
    todo: Iterable[Step], items: Sequence[Item], reviews: Sequence[Review], days: int, minutes: int, first: date, mocks: bool = True
) -> Plan:
    """Spread ``todo`` over ``days`` of ``minutes`` each, from ``first`` on.

    Args:
        reviews: what was rated so far: what is due by them comes back, too.
        mocks: with mock interviews: one on the last day, and from a week on one in the middle.

    Raises:
        CourseError: ``days`` or ``minutes`` is out of range.
    """
    if not 1 <= days <= LONGEST:
        raise CourseError(f"--days {days} must be from 1 to {LONGEST}")
    if not 10 <= minutes <= 720:
        raise CourseError(f"--minutes {minutes} must be from 10 to 720")
    plan, took = [Day(first + timedelta(days=n)) for n in range(days)], {item.id: item.minutes for item in items}
    past = list(reviews)
    for place in ([days // 2] * (days >= 7) + [days - 1]) if mocks and minutes >= MOCK_MINUTES else []:
        plan[place].steps.append(Step("", f"mock interview: `course interview --minutes {MOCK_MINUTES}`", MOCK_MINUTES, ESSENTIAL))
    kept, left_out = _fitting(list(todo), days * minutes - sum(day.minutes for day in plan))
    for day in plan:
        evening = datetime.combine(day.on, time(20), UTC)
        due = sorted((each.due, name) for name, each in memory(past).items() if name in took and each.due.date() <= day.on)
        for _, name in due:
            cost = took[name] * REPEAT_SHARE
            if day.minutes + cost <= minutes or not day.again:
                day.again.append(name)
                day.again_minutes += cost
                past.append(Review(name, 3, "quiz", evening))
        while kept and (day.minutes + kept[0].minutes <= minutes * 1.1 or not (day.steps or day.again)):
            step = kept.pop(0)
            day.steps.append(step)
            if step.question:
                past.append(Review(step.question, 3, "quiz", evening))
    return Plan(tuple(plan), (*kept, *left_out), minutes)


def _fitting(todo: list[Step], room: float) -> tuple[list[Step], list[Step]]:
    """Those that fit, the higher ranks first and of each rank one a unit in turn, but in their old order; and the others. A new question
    costs its repetitions too."""
    chosen: set[int] = set()
    turns: Counter = Counter()
    turn = {place: turns.update([(step.unit, step.rank)]) or turns[step.unit, step.rank] for place, step in enumerate(todo)}
    for place in sorted(range(len(todo)), key=lambda place: (todo[place].rank, turn[place], place)):
        cost = todo[place].minutes * (1 + 2 * REPEAT_SHARE * bool(todo[place].question))
        if cost <= room:
            chosen.add(place)
            room -= cost
    return [step for place, step in enumerate(todo) if place in chosen], [step for place, step in enumerate(todo) if place not in chosen]


def markdown(plan: Plan) -> str:
    """As a page with boxes to tick."""
    lines = [f"# {_count(len(plan.days), 'day')} until the interview", ""]
    for number, day in enumerate(plan.days, 1):
        lines += [f"## Day {number}: {day.on:%A} {day.on.day} {day.on:%B} ({day.minutes:.0f} min)", ""]
        lines += [f"- [ ] {line}" for line in day.lines() or ["free"]]
        lines.append("")
    if words := plan.left_out_words():
        lines += [words, ""]
    return "\n".join(lines)


def calendar(plan: Plan, at: time = time(19)) -> str:
    """As an iCalendar file (RFC 5545): one event a day, at ``at`` wherever the reader is, with the steps in its description."""
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    lines = ["BEGIN:VCALENDAR", "VERSION:2.0", "PRODID:-//PEFT course//plan//EN", "CALSCALE:GREGORIAN"]
    for number, day in enumerate(plan.days, 1):
        if day.lines():
            start = datetime.combine(day.on, at)
            lines += [
                "BEGIN:VEVENT",
                f"UID:{day.on:%Y%m%d}-plan@peft-course",
                f"DTSTAMP:{stamp}",
                f"DTSTART:{start:%Y%m%dT%H%M%S}",
                f"DTEND:{start + timedelta(minutes=round(day.minutes)):%Y%m%dT%H%M%S}",
                f"SUMMARY:{_escaped(f'Interview practice, day {number} of {len(plan.days)}')}",
                f"DESCRIPTION:{_escaped(chr(10).join(day.lines()))}",
                "END:VEVENT",
            ]
    return "".join(_folded(line) + "\r\n" for line in [*lines, "END:VCALENDAR"])


def _escaped(text: str) -> str:
    for sign in ("\\", ";", ","):
        text = text.replace(sign, "\\" + sign)
    return text.replace("\n", "\\n")


def _folded(line: str) -> str:
    """Lines are at most 75 bytes long; a longer one goes on behind a space, and no letter is cut."""
    parts, size = [""], 0
    for letter in line:
        width = len(letter.encode())
        if size + width > 74:
            parts.append("")
            size = 0
        parts[-1] += letter
        size += width
    return "\r\n ".join(parts)


def save(plan: Plan, path: Path) -> None:
    """As a calendar or as Markdown, by the file's ending.

    Raises:
        CourseError: it is neither .ics nor .md.
    """
    made = {".ics": calendar, ".md": markdown}.get(path.suffix)
    if made is None:
        raise CourseError(f"{path} must end in .ics (a calendar) or .md (Markdown)")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made(plan), encoding="utf-8", newline="")
