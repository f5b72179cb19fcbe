"""``course claims``: what one commonly hears, beside what was computed of it."""

from collections.abc import Callable

from rich.markup import escape
from rich.table import Table

from course.interview import Statement, in_terminal, questions

COLOURS = {"yes": "green", "partly": "yellow", "no": "red"}


def stated(unit: str | None = None) -> list[tuple[str, Statement]]:
    """The unit of each statement with it, in the bank's order; every claim behind them is recomputed."""
    return [(question.unit, statement) for question in questions(unit) for statement in question.statements]


def command(unit: str | None, show: Callable[..., None]) -> None:
    """Print the table, of one unit or of all."""
    found = stated(unit)
    if not found:
        show(f"The questions of unit {unit} examine no such statement. `course claims` shows those of all units.")
        return
    table = Table("unit", "one hears", "computed or measured", "holds", header_style="bold", show_lines=True)
    for number, statement in found:
        verdict = f"[{COLOURS[statement.holds]}]{statement.holds}[/{COLOURS[statement.holds]}]"
        table.add_row(number, escape(statement.said), escape(in_terminal(statement.found)), verdict)
    show(table)
    hold, partly, wrong = (sum(statement.holds == verdict for _, statement in found) for verdict in COLOURS)
    of = f"Of {len(found)} statement{'s' * (len(found) != 1)}"
    show(f"{of}: {hold} hold{'s' * (hold == 1)}, {partly} under conditions, {wrong} {'is' if wrong == 1 else 'are'} wrong.")
