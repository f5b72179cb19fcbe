"""The commands of practice as the command line declares them. What they do is imported inside: ``course --help`` answers at once."""

import random
import sys
from pathlib import Path
from typing import Annotated

import typer

from course.units import CourseError, find

Kind = Annotated[list[str] | None, typer.Option(help="concept, derivation, estimate, debugging, coding or design; may be repeated.")]
Role = Annotated[list[str] | None, typer.Option(help="research, applied or infrastructure; may be repeated.")]
Difficulty = Annotated[str | None, typer.Option(help="1 (warm-up) to 5 (research), or a range: 2-4.")]
Frequency = Annotated[list[str] | None, typer.Option(help="often, sometimes or rare; may be repeated.")]
Units = Annotated[list[str] | None, typer.Option("--unit", help="Of this unit; may be repeated.")]
Shuffle = Annotated[bool, typer.Option("--shuffle", help="In a random order.")]
Seed = Annotated[int | None, typer.Option(help="The same number gives the same order.", show_default=False)]


def _choice(units: list[str] | None, kind, role, frequency, difficulty):
    from course.practice import bank

    return bank.choice([find(name).number for name in units or ()], kind or (), role or (), frequency or (), difficulty)


def _notices(journal, console) -> None:
    for sentence in journal.noticed:
        console.print(f"[yellow]Note:[/yellow] {sentence}")


def quiz(
    units: Annotated[
        list[str] | None, typer.Argument(metavar="[NN ...]", help="Units; all of them if none is named.", show_default=False)
    ] = None,
    kind: Kind = None,
    role: Role = None,
    difficulty: Difficulty = None,
    frequency: Frequency = None,
    shuffle: Shuffle = False,
    seed: Seed = None,
    new: Annotated[int, typer.Option(min=0, help="At most so many questions that you have never been asked.")] = 10,
    everything: Annotated[bool, typer.Option("--all", help="All that is chosen, due or not.")] = False,
    answers: Annotated[bool, typer.Option("--answers", help="Print questions and answers at once, without asking.")] = False,
) -> None:
    """Ask interview questions, those that are due first; the answer comes in steps, and you rate yours."""
    from course.practice import bank, words
    from course.practice import quiz as asking
    from course.practice.answers import Answers
    from course.practice.journal import Journal
    from course.practice.memory import in_words, memory

    console, journal = words.console(), Journal()
    chosen = bank.chosen(_choice(units, kind, role, frequency, difficulty))
    if answers or not sys.stdin.isatty():
        _print(chosen, answers, console)
        return
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    known = memory(journal.reviews())
    mixed = random.Random(seed) if shuffle else None
    if everything:
        queue = list(chosen)
        if mixed:
            mixed.shuffle(queue)
    else:
        queue = asking.order(chosen, known, now, new, mixed)
    if not queue:
        next_due = min((known[item.id].due for item in chosen if item.id in known), default=None)
        console.print(
            "Nothing is due now"
            + (f"; the next question in {in_words(next_due - now)}" if next_due else "")
            + ". `--all` asks all the same."
        )
        return
    with Answers() as computed:
        computed.ask(queue[0].id)
        asking.run(asking.Session(queue, journal), computed, console)
    _notices(journal, console)


def interview(
    minutes: Annotated[int, typer.Option(help="How long it takes.")] = 45,
    unit: Units = None,
    kind: Kind = None,
    role: Role = None,
    difficulty: Difficulty = None,
    frequency: Frequency = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="The sections in a random order.")] = False,
    seed: Annotated[int | None, typer.Option(help="The same number gives the same interview.", show_default=False)] = None,
    screen: Annotated[bool, typer.Option("--screen", help="On the whole screen, with a running clock.")] = False,
) -> None:
    """Sit a mock interview: concepts, an estimate, a debugging case, a coding task, a design; then a rubric and what to revise."""
    from course.practice import bank, mock, tasks, words
    from course.practice.answers import Answers
    from course.practice.journal import Journal
    from course.practice.memory import memory

    console, journal = words.console(), Journal()
    choice = _choice(unit, kind, role, frequency, difficulty)
    seed = random.SystemRandom().randrange(1000) if seed is None else seed
    plan = mock.compose(bank.items(), tasks.tasks(), minutes, choice, memory(journal.reviews()), seed, shuffle)
    if not sys.stdin.isatty():
        raise CourseError("an interview needs a terminal; `course quiz --answers` prints questions and answers")
    with Answers() as computed:
        sitting = mock.Interview(plan, journal)
        if screen:
            from course.practice import screen as full

            full.Screen(sitting, computed).run()
        from course.practice import sitting as talk

        if screen:
            console.print(talk.closing(sitting))
        else:
            talk.run(sitting, computed, console)
    _notices(journal, console)


def plan(
    days: Annotated[int, typer.Option(help="Until the interview, today included.")] = 14,
    minutes: Annotated[int, typer.Option(help="A day.")] = 60,
    unit: Units = None,
    kind: Kind = None,
    role: Role = None,
    difficulty: Difficulty = None,
    frequency: Frequency = None,
    save: Annotated[Path | None, typer.Option(help="Also write it to a file: .ics (a calendar) or .md.", show_default=False)] = None,
) -> None:
    """Say what to do on each day until an interview: lessons, exercises, new questions, those that are due, mock interviews."""
    from datetime import date

    from rich.table import Table

    from course.practice import bank, tasks, words
    from course.practice import plan as planning
    from course.practice.journal import Journal
    from course.practice.memory import memory
    from course.units import select

    console, journal = words.console(), Journal()
    reviews, items = journal.reviews(), bank.chosen(_choice(unit, kind, role, frequency, difficulty))
    todo = planning.steps(select(unit), items, tasks.tasks(), memory(reviews))
    made = planning.make(todo, items, reviews, days, minutes, date.today())
    if save:
        planning.save(made, save)
    table = Table("day", "", "what", "min", box=None, header_style="bold", padding=(0, 1), collapse_padding=True)
    table.columns[3].justify = "right"
    for number, day in enumerate(made.days, 1):
        lines = "\n".join(f"- {line}" for line in day.lines()) or "free"
        table.add_row(f"{number}", f"{day.on:%a} {day.on.day} {day.on:%b}", words.markdown(lines), f"{day.minutes:.0f}")
    console.print(table)
    if left_out := made.left_out_words():
        console.print(f"[yellow]{left_out}[/yellow]")
    if save:
        console.print(f"wrote {save}")
    _notices(journal, console)


def anki(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write the deck.")] = Path("peft-course.apkg"),
    unit: Units = None,
    kind: Kind = None,
    role: Role = None,
    difficulty: Difficulty = None,
    frequency: Frequency = None,
) -> None:
    """Write the questions as an Anki deck; importing a later one updates the notes and keeps what you have learned."""
    from rich.progress import track

    from course.practice import bank, deck, words
    from course.practice.answers import Answers
    from course.units import units

    console = words.console()
    if file.suffix != ".apkg":
        raise CourseError(f"{file} must end in .apkg, which is what Anki imports")
    chosen = bank.chosen(_choice(unit, kind, role, frequency, difficulty))
    with Answers() as computed:
        computed.ask(*(item.id for item in chosen))
        for item in track(chosen, "computing the numbers", console=console, transient=True, disable=not console.is_terminal):
            computed.get(item.id)
        count = deck.write(file, chosen, units(), computed)
    console.print(f"wrote {count} {'note' if count == 1 else 'notes'} to {file}; Anki's File > Import takes it, also over an earlier one")


def _print(chosen, answers: bool, console) -> None:
    """Questions, with their answers if asked for, to read or to pipe."""
    from course.practice import words
    from course.practice.answers import Answers

    with Answers() as computed:
        if answers:
            computed.ask(*(item.id for item in chosen))
        for number, item in enumerate(chosen, 1):
            full = None if item.asked_at_once and not answers else computed.get(item.id)
            console.print(words.asked(item, full.question if full else item.asked_at_once, f"{number} of {len(chosen)}"))
            for name, text in words.steps(full) if answers else ():
                console.print(words.step(name, text))
