"""For instructors: a class, its points, the decks."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from course.cli import shared


def class_init(
    students: Annotated[
        Path | None, typer.Option(help="A CSV file with a column id, and first_name, last_name, email if you like.")
    ] = None,
) -> None:
    """Set up nbgrader's folders, exchange and gradebook in classroom/."""
    from course import classroom

    for line in classroom.begin(shared.ROOT / "classroom", shared.ROOT, students):
        shared.console.print(escape(line))


def grade(
    folder: Annotated[Path, typer.Argument(help="Notebooks: STUDENT/NN_topic/NN_topic.ipynb, STUDENT/NN_topic.ipynb, or STUDENT.ipynb.")],
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the list there.", show_default=False)] = None,
    unit: Annotated[str | None, typer.Option(metavar="NN", help="Only this unit; it is that of STUDENT.ipynb.", show_default=False)] = None,
    processes: Annotated[int | None, typer.Option(help="Notebooks at a time; one for each core.", show_default=False, min=1)] = None,
    cell_seconds: Annotated[float, typer.Option(help="Stop a cell that takes longer.")] = 120.0,
    total_seconds: Annotated[float, typer.Option(help="Stop a notebook when this time is over.")] = 900.0,
    memory_gb: Annotated[float, typer.Option(help="Stop a notebook that holds more than this (in GB).")] = 4.0,
) -> None:
    """Judge a folder of notebooks as `course check` does, in processes side by side."""
    from course import marking
    from course.running import Limits

    limits = Limits(cell_seconds, total_seconds, int(memory_gb * 1e9))

    def say(number: int, count: int, mark: "marking.Mark") -> None:
        got = f"{mark.score:g} of {mark.total:g}" if mark.gradable else f"[red]not gradable[/red]: {escape(mark.why)}"
        shared.console.print(f"{number} of {count}  {escape(mark.student)}  {mark.unit}  {got}  ({mark.seconds:.0f} s)")

    marks = marking.grade_folder(folder, unit, limits, processes, say, shared.ROOT)
    if csv:
        csv.write_text(marking.as_csv(marks, folder), encoding="utf-8")
        shared.console.print(f"wrote {csv}")
    if lost := sum(not mark.gradable for mark in marks):
        shared.console.print(f"[red]{lost} of {len(marks)} could not be graded: they have no score.[/red]")
        raise typer.Exit(1)


def slides() -> None:
    """Make the decks in slides/, to be shown in a browser without network."""
    from course import slides as decks

    pages = decks.build()
    shared.console.print(f"{len(pages)} decks. Open {pages[0].relative_to(shared.ROOT)}; S shows the speaker's notes.")
