"""What all commands share: where the course is, how they print, how they show that something is going on."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from course import ROOT

console = Console(highlight=False)
Names = Annotated[list[str] | None, typer.Argument(metavar="[NN ...]", help="Units; all of them if none is named.", show_default=False)]


def say(what: object) -> None:
    """One sentence to stderr; broken between words in a terminal, in one piece elsewhere."""
    errors = Console(stderr=True, highlight=False)
    errors.print(f"[red]course:[/red] {escape(str(what))}", soft_wrap=not errors.is_terminal)


def show_index() -> None:
    """Where the pages are."""
    index = ROOT / "site" / "index.html"
    console.print(f"Pages: {index.relative_to(Path.cwd()) if index.is_relative_to(Path.cwd()) else index}")


def bars(transient: bool = False):
    """A progress bar for each task; none where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal or os.environ.get("TERM") == "dumb",
    )
