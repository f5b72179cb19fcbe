"""``course interview`` in the terminal: parts one after the other, a clock, the answer, a rating, and what is said at the end."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from course.practice import tasks, words
from course.practice.answers import Answers
from course.practice.journal import RATINGS
from course.practice.mock import Interview, Part, from_rubric, rubric, to_revise, verdict
from course.practice.quiz import BACK, QUIT, SKIP, answer, read

SHEETS = Path("interviews")  # where coding tasks are written to, from where the command is run


def clock(seconds: float) -> str:
    """12:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def agenda(interview: Interview) -> Table:
    """The parts and their minutes, without giving the questions away."""
    table = Table.grid(padding=(0, 2))
    for number, part in enumerate(interview.plan.parts, 1):
        table.add_row(f"{number}", part.name, f"{part.minutes:.0f} min", f"[dim]unit {part.unit}[/dim]")
    return table


def run(interview: Interview, answers: Answers, console: Console) -> None:
    """Go through the parts until they, or the user's patience, end; close with the rubric. Ctrl-C may come at any time."""
    for note in interview.plan.notes:
        console.print(f"[yellow]Note:[/yellow] {escape(note)}")
    console.print(f"[bold]A mock interview of {interview.minutes:.0f} minutes[/bold] (seed {interview.plan.seed})")
    console.print(Padding(agenda(interview), (0, 2)))
    console.print("Answer aloud, as if somebody sat there. The clock stands still while you read an answer.")
    answers.ask(*(part.item.id for part in interview.plan.parts if part.item))
    if read(console, words.keys(Enter="begin", q="quit")) != QUIT:
        while interview.part is not None:
            said = _part(interview, answers, console)
            if said == QUIT:
                break
            if said == BACK:
                interview.back()
            elif said == SKIP:
                interview.skip()
    console.print(closing(interview))


@contextmanager
def _ticking(interview: Interview, console: Console) -> Iterator[None]:
    """Count the time of an answer, and say when the part's is over."""
    part, before = interview.part, interview.seconds.get(interview.at, 0.0)
    began, left = time.monotonic(), 60 * part.minutes - before

    def over() -> None:
        console.print(f"\n[yellow]The {part.minutes:.0f} minutes of this part are over: come to an end.[/yellow]\a")

    timer = threading.Timer(max(0.0, left), over)
    timer.daemon = True
    if left > 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        interview.spend(time.monotonic() - began)


def _part(interview: Interview, answers: Answers, console: Console) -> str:
    """One part: QUIT, BACK, SKIP, or "" when it was rated."""
    part, count = interview.part, len(interview.plan.parts)
    if console.is_terminal:
        console.clear()
    used = f"{clock(interview.used)} of {interview.minutes:.0f}:00 used"
    title = f"Part {interview.at + 1} of {count} · {part.name} · {part.minutes:.0f} min · {used}"
    keys = words.keys(Enter="I have answered", s="skip", b="back", q="quit")
    allowed = RATINGS
    if part.task:
        sheet = interview.sheet(SHEETS)
        console.print(_sheet(part, sheet, title))
        with _ticking(interview, console):
            said = read(console, words.keys(Enter="judge it", s="skip", b="back", q="quit"))
        if said in (QUIT, BACK, SKIP):
            return said
        with console.status("judging …"):
            wrong = tasks.judged(part.task, sheet)
        console.print(Text("\n".join(f"✗ {line}" for line in wrong), style="red") if wrong else Text("✓ right", style="green"))
        allowed = {number: rating for number, rating in RATINGS.items() if number <= tasks.best_rating(wrong)}
    else:
        text = part.item.asked_at_once or getattr(answer(answers, part.item, console), "question", part.id)
        console.print(words.asked(part.item, text, title))
        with _ticking(interview, console):
            said = read(console, keys)
        if said in (QUIT, BACK, SKIP):
            return said
    if part.item:
        question = answer(answers, part.item, console)
        if question is None:
            return SKIP
        for name, shown in words.steps(question):
            console.print(words.step(name, shown))
        if question.rubric:
            return _by_rubric(interview, question.rubric, console)
    console.print(f"[bold]{_took(interview)} How was it?[/bold]")
    console.print(words.ratings(allowed=allowed))
    while True:
        said = read(console, words.keys(**{f"1–{len(allowed)}": "rate", "s": "skip", "b": "back", "q": "quit"}))
        if said in (QUIT, BACK, SKIP):
            return said
        if said.isdecimal() and int(said) in allowed:
            interview.rate(int(said))
            return ""
        console.print(f"[yellow]{escape(repr(said))} is not one of the keys.[/yellow]")


def _took(interview: Interview) -> str:
    return f"You took {clock(interview.seconds[interview.at])} of {interview.part.minutes:.0f}:00."


def _by_rubric(interview: Interview, lines: tuple[str, ...], console: Console) -> str:
    console.print(f"[bold]{_took(interview)} What of the rubric did you say?[/bold]")
    met = []
    for number, line in enumerate(lines, 1):
        console.print(words.markdown(f"{number}. {line}"))
        while (said := read(console, words.keys(y="yes", n="no", s="skip", b="back", q="quit"))) not in ("y", "n", QUIT, BACK, SKIP):
            console.print("[yellow]y or n.[/yellow]")
        if said in (QUIT, BACK, SKIP):
            return said
        met.append(said == "y")
    rating = from_rubric(met)
    interview.met[interview.at] = met
    interview.rate(rating)
    read(console, f"{sum(met)} of {len(met)}, hence {RATINGS[rating][0]!r}. " + words.keys(Enter="goes on"))
    return ""


def _sheet(part: Part, sheet: Path, title: str) -> Panel:
    """A coding task, and where to write the answer."""
    where = f"Write it in **{sheet}**, save, and come back. `course check {part.unit} {sheet}` judges it too."
    body = Group(words.markdown(f"**{part.asked or part.task.title}**\n\n{part.task.text}"), Text(), words.markdown(where))
    return words.frame(body, title, f"unit {part.unit} · coding · {words.stars(part.task.difficulty)} · no hints")


def closing(interview: Interview) -> Group:
    """The rubric, how each part went, and what to revise."""
    lines = Table("", "what is listened for", "here", box=None, header_style="bold", padding=(0, 1))
    for line in rubric(interview):
        colour = "dim" if line.share is None else "green" if line.share >= 0.75 else "yellow" if line.share >= 0.5 else "red"
        lines.add_row(f"[bold]{line.what}[/bold]", line.listened_for, f"[{colour}]{line.found}[/{colour}]")
    parts = Table("part", "", "time", "rated", box=None, header_style="bold", padding=(0, 1))
    for i, part in enumerate(interview.plan.parts):
        rated = RATINGS[interview.given[i].rating][0] if i in interview.given else "–"
        parts.add_row(f"{i + 1} {part.name}", part.id, f"{clock(interview.seconds.get(i, 0))} of {part.minutes:.0f}:00", rated)
    shown = [Text(), parts, Text(), lines, Text(), Text(verdict(interview), style="bold")]
    revise = {}
    for part, rating in to_revise(interview):
        command = f"course check {part.unit}" if part.task else part.item.command or f"course quiz {part.unit}"
        revise.setdefault(f"unit {part.unit}: lesson {part.unit}, then `{command}`", []).append(f"{part.id} ({rating})")
    if revise:
        shown.append(Text())
        shown.append(words.markdown("To revise:\n\n" + "\n".join(f"- {what}: {', '.join(names)}" for what, names in revise.items())))
    if interview.given:
        shown.append(Text())
        shown.append(Text(f"The ratings are in {interview.journal.path}; `course quiz` asks again what is due.", style="dim"))
    return Group(*shown)
