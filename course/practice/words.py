"""How questions and answers look in a terminal, for the quiz and for the mock interview."""

from collections.abc import Collection, Mapping
from datetime import timedelta

from rich.console import Console, Group, RenderableType
from rich.markdown import Markdown
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from course.interview import Question, in_terminal
from course.practice.bank import Item
from course.practice.journal import RATINGS
from course.practice.memory import in_words

WIDTH = 100  # longer lines are hard to read
SHORT, RUBRIC = "In 30 seconds", "A good answer contains"


def markdown(text: str) -> Markdown:
    return Markdown(in_terminal(text))


def stars(difficulty: int) -> str:
    return "●" * difficulty + "○" * (5 - difficulty)


def about(item: Item) -> str:
    """What one knows of a question before its answer."""
    often = {"often": "asked often", "sometimes": "asked sometimes", "rare": "asked rarely"}[item.frequency]
    return f"unit {item.unit} · {item.kind} · {stars(item.difficulty)} · {item.minutes} min · {often}"


def frame(body: RenderableType, title: str, subtitle: str) -> Panel:
    return Panel(
        body,
        title=f"[bold]{escape(title)}[/bold]",
        subtitle=escape(subtitle),
        title_align="left",
        subtitle_align="left",
        border_style="blue",
        padding=(1, 2),
    )


def asked(item: Item, text: str, title: str) -> Panel:
    """The question in its frame, and what to type where it has a script or an exercise."""
    parts: list[RenderableType] = [markdown(text)]
    if item.how:
        parts += [Text(), markdown(item.how)]
    return frame(Group(*parts), title, about(item))


def steps(question: Question) -> list[tuple[str, str]]:
    """Name and Markdown of what is shown one after the other."""
    found = [(SHORT, question.short), ("More", question.deep)]
    if question.rubric:
        found.append((RUBRIC, "\n".join(f"- {line}" for line in question.rubric)))
    if question.follow_ups:
        found.append(("They may go on", "\n".join(f"- {follow_up}" for follow_up in question.follow_ups)))
    return [*found, ("Often said, and wrong", f"{question.wrong_answer}\n\n**But:** {question.wrong_why}")]


def step(name: str, text: str) -> RenderableType:
    return Group(Text(name, style="bold green" if "wrong" not in name else "bold red"), Padding(markdown(text), (0, 0, 1, 2)))


def ratings(waits: Mapping[int, timedelta] | None = None, allowed: Collection[int] = RATINGS) -> Table:
    """The four ratings with what each means, and when the question would come again."""
    table = Table.grid(padding=(0, 2))
    for number, (name, meaning) in RATINGS.items():
        if number in allowed:
            table.add_row(f"[bold]{number}[/bold] {name}", meaning, f"[dim]again in {in_words(waits[number])}[/dim]" if waits else "")
    return table


def console() -> Console:
    found = Console(highlight=False)
    return Console(highlight=False, width=min(found.width, WIDTH)) if found.width > WIDTH else found


def keys(**named: str) -> str:
    """What can be typed: ``keys(Enter="short answer", q="quit")``. Colons, or "Enter short answer" reads as an order to type one."""
    return " · ".join(f"[bold]{key}[/bold]: {meaning}" for key, meaning in named.items()) + " > "
