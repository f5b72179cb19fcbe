"""``course quiz``: spaced repetition in the terminal. :class:`Session` is what happens, :func:`run` how it looks."""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rich.console import Console

from course.practice import words
from course.practice.answers import Answers
from course.practice.bank import Item
from course.practice.journal import RATINGS, Journal, Review
from course.practice.memory import Known, end_of_today, first_time, in_words, memory
from course.units import CourseError


def order(items: Sequence[Item], known: dict[str, Known], now: datetime, new: int, shuffle: random.Random | None = None) -> list[Item]:
    """What to ask now: what is due, the least remembered first; then up to ``new`` questions that were never asked, in the bank's order.

    Args:
        shuffle: mixes both, each by itself.
    """
    tonight = end_of_today(now)
    due = [item for item in items if item.id in known and known[item.id].due <= (now if known[item.id].last < 3 else tonight)]
    fresh = [item for item in items if item.id not in known]
    due.sort(key=lambda item: known[item.id].chance(now))
    if shuffle:
        shuffle.shuffle(due)
        shuffle.shuffle(fresh)
    return due + fresh[: max(0, new)]


@dataclass
class Session:
    """A walk over questions, forwards and back; every rating is on the disk when :meth:`rate` returns.

    Attributes:
        queue: what is asked, in order; a question that was rated "again" is put at the end once more.
        at: the place in it.
        given: by place, the review that stands for it.
        skipped: places that were passed over.
    """

    queue: list[Item]
    journal: Journal
    by: str = "quiz"
    at: int = 0
    given: dict[int, Review] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)

    @property
    def item(self) -> Item | None:
        """The question now; None when all are done."""
        return self.queue[self.at] if self.at < len(self.queue) else None

    @property
    def coming(self) -> list[Item]:
        return self.queue[self.at + 1 : self.at + 3]

    def rate(self, rating: int, seconds: float | None = None) -> None:
        """A place that was rated before is rated anew: the earlier rating no longer counts."""
        before = self.given.get(self.at)
        review = Review(self.item.id, rating, self.by, seconds=seconds, instead_of=before.key if before else None)
        self.given[self.at] = self.journal.add(review)
        self.skipped.discard(self.at)
        if rating == 1 and self.item not in self.queue[self.at + 1 :]:
            self.queue.append(self.item)
        self.at += 1

    def skip(self) -> None:
        if self.at not in self.given:
            self.skipped.add(self.at)
        self.at += 1

    def back(self) -> None:
        """To the question before; at the first one stays."""
        self.at = max(0, self.at - 1)

    def count(self) -> Counter:
        """How many ratings of each kind."""
        return Counter(review.rating for review in self.given.values())


QUIT, BACK, SKIP = "q", "b", "s"
RATE = {"1–4": "rate", "s": "skip", "b": "back", "q": "quit"}


def read(console: Console, prompt: str) -> str:
    """One line, without spaces around it, small letters; the end of the input quits."""
    try:
        return console.input(prompt).strip().lower()
    except EOFError:
        console.print()
        return QUIT


def run(session: Session, answers: Answers, console: Console) -> None:
    """Ask until the questions or the user's patience end. Ctrl-C may come at any time."""
    known = memory(session.journal.reviews())
    while session.item is not None:
        answers.ask(session.item.id, *(item.id for item in session.coming))
        said = _ask(session, known, answers, console)
        if said == QUIT:
            break
        if said == BACK:
            session.back()
        elif said == SKIP:
            session.skip()
        elif said:
            rating, seconds = said
            session.rate(rating, seconds)
    close(session, console)


def answer(answers: Answers, item: Item, console: Console):
    """The question with its answer; a spinner while its numbers are computed. None, and why, where they can't be."""
    try:
        if answers.ready(item.id):
            return answers.get(item.id)
        with console.status("computing the numbers of this answer …"):
            return answers.get(item.id)
    except CourseError as error:
        console.print(f"[red]{error}[/red]")
        return None


def _ask(session: Session, known: dict[str, Known], answers: Answers, console: Console):
    """One question: QUIT, BACK, SKIP, or (rating, seconds)."""
    item, began = session.item, time.monotonic()
    if console.is_terminal:
        console.clear()
    state = "new" if item.id not in known else f"seen {known[item.id].times}×"
    repeated = " · once more" if item in session.queue[: session.at] else ""
    text = item.asked_at_once or getattr(answer(answers, item, console), "question", item.id)
    console.print(words.asked(item, text, f"{session.at + 1} of {len(session.queue)} · {state}{repeated}"))
    said = _command(console, words.keys(Enter="short answer", s="skip", b="back", q="quit"))
    if said in (QUIT, BACK, SKIP):
        return said
    seconds, shown = time.monotonic() - began, 0
    if item.answered_at_once and not answers.ready(item.id):  # nobody waits for the numbers of the long answer
        console.print(words.step(words.SHORT, item.answered_at_once))
        shown = 1
        said = _command(console, words.keys(Enter="more", **RATE), rated=True)
        if said:
            return said if said in (QUIT, BACK, SKIP) else (int(said), seconds)
    question = answer(answers, item, console)
    if question is None:
        return QUIT if read(console, words.keys(Enter="next question", q="quit")) == QUIT else SKIP
    parts = words.steps(question)
    for name, text in parts[shown:]:
        console.print(words.step(name, text))
        shown += 1
        if shown < len(parts):
            said = _command(console, words.keys(Enter=parts[shown][0].lower(), **RATE), rated=True)
            if said:
                return said if said in (QUIT, BACK, SKIP) else (int(said), seconds)
    return _rating(console, known.get(item.id), seconds)


def _rating(console: Console, known: Known | None, seconds: float):
    now = datetime.now(UTC)
    console.print("[bold]How was what you said?[/bold]")
    console.print(words.ratings({number: known.after(number, now) if known else first_time(number, now) for number in RATINGS}))
    while True:
        said = _command(console, words.keys(**RATE), rated=True)
        if said in (QUIT, BACK, SKIP):
            return said
        if said.isdecimal():
            return int(said), seconds


def _command(console: Console, prompt: str, rated: bool = False) -> str:
    """What was typed, once it is one of what can be: Enter, s, b, q or, if ``rated``, 1 to 4."""
    known = {"", QUIT, BACK, SKIP} | ({str(number) for number in RATINGS} if rated else set())
    names = {name: str(number) for number, (name, _) in RATINGS.items()} if rated else {}
    while (said := read(console, prompt)) not in known:
        if said in names:
            return names[said]
        console.print(f"[yellow]{said!r} is not one of the keys.[/yellow]" + ("" if rated else " A rating comes after the short answer."))
    return said


def close(session: Session, console: Console) -> None:
    """What was done, what comes next."""
    count, skipped = session.count(), len(session.skipped)
    if not count:
        console.print("Nothing was rated." + (f" {skipped} skipped." if skipped else ""))
        return
    said = ", ".join(f"{count[number]} {name}" for number, (name, _) in RATINGS.items() if count[number])
    console.print(f"[bold]{sum(count.values())} rated[/bold]: {said}." + (f" {skipped} skipped." if skipped else ""))
    weak = Counter(session.queue[place].unit for place, review in session.given.items() if review.rating <= 2)
    for unit, number in weak.most_common(2):
        console.print(f"Unit {unit}: {number} to revise; read its lesson again, then `course quiz {unit}`.")
    now = datetime.now(UTC)
    later = sorted(each.due for each in memory(session.journal.reviews()).values() if each.due > now)
    if later:
        console.print(f"The next question is due in {in_words(later[0] - now)}. Your ratings are in {session.journal.path}.")
