"""Practice beyond the exercises: debugging cases, and what one commonly hears. (Interviews: course/practice/commands.py.)"""

from pathlib import Path
from typing import Annotated

import typer

from course.cli import shared
from course.units import find


def case(
    name: Annotated[str | None, typer.Argument(help="The case; lists them if not given.", show_default=False)] = None,
    check: Annotated[Path | None, typer.Option("--check", help="Judge this mended copy of the script.", show_default=False)] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Show why it fails, and the script mended.")] = False,
    save: Annotated[Path | None, typer.Option("--save", help="Write the script to this file, to be mended.", show_default=False)] = None,
) -> None:
    """A script with a real bug: what it shows, the script, and a judge for your repair."""
    from course.casebook import command

    if not command(name, check, fix, save, shared.console.print):
        raise typer.Exit(1)


def claims(
    unit: Annotated[
        str | None, typer.Option("--unit", metavar="NN", help="The unit; all of them if not given.", show_default=False)
    ] = None,
) -> None:
    """What one commonly hears about fine-tuning, what was computed of it, and whether it holds."""
    from course.statements import command

    number = find(unit, shared.ROOT).number if unit else None
    with shared.bars(transient=True) as progress:
        progress.add_task("recomputing", total=None)
        command(number, progress.console.print)
