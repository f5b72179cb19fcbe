"""What a learner does: run, start, check, look back."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from course.cli import shared
from course.units import CourseError, find, select

if TYPE_CHECKING:
    from course.running import Execution

SECONDS, BYTES = 90, 3e9  # what a notebook should stay below on two cores without a GPU


def run(
    names: shared.Names = None,
    save: Annotated[bool, typer.Option("--save", help="Write the new outputs into the notebooks.")] = False,
    cell_seconds: Annotated[float, typer.Option(help="Stop a cell that takes longer.")] = 600.0,
) -> None:
    """Run notebooks from top to bottom, each in a kernel of its own, and make pages of them."""
    from course import notebooks, running, website

    chosen = [unit for unit in select(names, shared.ROOT) if unit.notebook.exists()]
    if not chosen:
        raise CourseError("there is no notebook to run")
    limits, executed, results, stopped = running.Limits(cell_seconds=cell_seconds), {}, {}, False
    # without it the author's own answers and dates would stand in what everybody reads
    nobodys = {"COURSE_DATA": tempfile.mkdtemp()} if save else {}
    with shared.bars() as progress:
        overall = progress.add_task("notebooks", total=len(chosen))
        try:
            for number, unit in enumerate(chosen):
                progress.update(overall, completed=number)
                try:
                    notebook = notebooks.read(unit.notebook)
                except CourseError:  # its page says why, and so does the end of this run
                    continue
                task = progress.add_task(unit.stem, total=len(notebook.cells))
                result = running.execute(
                    notebook,
                    unit.notebook.parent,
                    limits,
                    before_cell=lambda index, task=task: progress.update(task, completed=index),
                    environment=nobodys,
                )
                results[unit], executed[unit.notebook] = result, notebook
                progress.update(task, completed=len(notebook.cells), visible=len(chosen) == 1)
                progress.console.print(f"{unit.stem}: {_verdict(result)}, {result.seconds:.0f} s, {result.peak_bytes / 1e9:.1f} GB")
                if save and not result.troubles:
                    unit.notebook.write_text(notebooks.as_text(notebooks.tidy(notebook)), encoding="utf-8")
        except KeyboardInterrupt:  # what has run is not lost
            stopped = True
        progress.update(overall, completed=len(executed))
        task = progress.add_task("pages", total=None)
        summary = {unit.number: f"{_verdict(result)}, {result.seconds:.0f} s" for unit, result in results.items()}
        unreadable = None
        try:
            website.write(shared.ROOT, executed=executed, summary=summary)
        except CourseError as error:
            unreadable = error
        progress.update(task, total=1, completed=1)
    for unit, result in results.items():
        for trouble in result.troubles:
            _show_trouble(unit.notebook, executed[unit.notebook].cells[trouble.cell].source, trouble)
    shared.console.print(_run_table(results))
    if stopped:
        shared.console.print(f"{len(results)} of {len(chosen)} notebooks had run; their pages are written.")
        raise KeyboardInterrupt
    if unreadable:
        raise unreadable
    shared.show_index()
    if any(result.troubles for result in results.values()):
        raise typer.Exit(1)


def _verdict(result: "Execution") -> str:
    return f"failed in cell {result.troubles[0].cell + 1}" if result.troubles else "passed"


def _run_table(results: dict):
    from rich.table import Table

    table = Table("notebook", "seconds", "peak memory", "result", box=None, header_style="bold")
    table.columns[1].justify = table.columns[2].justify = "right"
    for unit, result in results.items():
        slow, big = result.seconds > SECONDS, result.peak_bytes > BYTES
        colour = "red" if result.troubles else "yellow" if slow or big else "green"
        over = " and ".join([f"over {SECONDS} s"] * slow + [f"over {BYTES / 1e9:.0f} GB"] * big)
        verdict = _verdict(result) + (f", but {over}" if over and not result.troubles else "")
        table.add_row(unit.stem, f"{result.seconds:.1f}", f"{result.peak_bytes / 1e9:.2f} GB", f"[{colour}]{verdict}[/{colour}]")
    return table


def _show_trouble(path: Path, source: str, trouble) -> None:
    from rich.console import Group
    from rich.panel import Panel
    from rich.syntax import Syntax

    lines = source.splitlines()
    first = max(0, (trouble.line or len(lines)) - 12)
    shown = Syntax(
        "\n".join(lines[first : first + 15]),
        "python",
        line_numbers=True,
        start_line=first + 1,
        highlight_lines={trouble.line} if trouble.line else None,
    )
    shared.console.print(
        Panel(Group(shown, f"[red]{escape(str(trouble))}[/red]"), title=f"{path.name}, cell {trouble.cell + 1}", border_style="red")
    )


def start(
    unit: Annotated[str, typer.Argument(metavar="NN", help="The unit.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; what is there is kept under another name.")] = False,
) -> None:
    """Copy a unit's exercises to work/, where they are yours."""
    from course import work

    chosen = find(unit, shared.ROOT)
    begun = work.start(chosen, fresh)
    name = begun.path.relative_to(shared.ROOT)
    if begun.kept:
        shared.console.print(f"kept your earlier work as {begun.kept.relative_to(shared.ROOT)}")
    if begun.new:
        shared.console.print(f"wrote {name}. Open it in JupyterLab (`make lab`); `course check {chosen.number}` judges it.")
    else:
        shared.console.print(
            f"{name} is there already and stays as it is; `course start {chosen.number} --fresh` begins again and keeps it."
        )
    if begun.outdated:
        shared.console.print("The exercise has changed since you started. Your copy is judged by the checks of today.")


def check(
    unit: Annotated[str, typer.Argument(metavar="NN", help="The unit.")],
    notebook: Annotated[
        Path | None,
        typer.Argument(help="Your notebook; by default yours in work/, else the one in exercises/.", show_default=False),
    ] = None,
    cell_seconds: Annotated[float, typer.Option(help="Stop a cell that takes longer.")] = 120.0,
    total_seconds: Annotated[float, typer.Option(help="Stop the notebook when this time is over.")] = 900.0,
    memory_gb: Annotated[float, typer.Option(help="Stop the notebook when it holds more than this (in GB); 0 is no limit.")] = 6.0,
) -> None:
    """Judge your answers: what passed, what did not and why, and the score."""
    from course import grading, running, work

    chosen = find(unit, shared.ROOT)
    path = notebook or work.own_notebook(chosen)
    limits = running.Limits(cell_seconds, total_seconds, int(memory_gb * 1e9) or None)
    with shared.bars(transient=True) as progress:
        task = progress.add_task(path.name, total=None)
        report = grading.grade(path, chosen, limits, lambda index, count: progress.update(task, completed=index, total=count))
    if path.resolve() in (chosen.work.resolve(), chosen.exercise.resolve()):
        work.remember(chosen, report)
    for note in report.notes:
        shared.console.print(f"[yellow]Note:[/yellow] {escape(note)}")
    shared.console.print(_check_table(report))
    shared.console.print(f"[bold]{report.score:g} of {report.total:g} points[/bold]  ({report.seconds:.0f} s)")
    if not report.full:
        raise typer.Exit(1)


def _check_table(report):
    from rich.table import Table

    table = Table("", "exercise", "points", "", box=None, header_style="bold", padding=(0, 1))
    table.columns[2].justify = "right"
    for outcome in report.outcomes:
        mark, why = ("[green]✓[/green]", "[green]right[/green]") if outcome.why is None else ("[red]✗[/red]", escape(outcome.why))
        table.add_row(mark, escape(outcome.exercise), f"{outcome.earned:g}/{outcome.points:g}", why)
    return table


def progress() -> None:
    """Show the points of your last checks, and what is next."""
    from rich.table import Table

    from course import work

    standings = work.progress(shared.ROOT)
    table = Table("", "unit", "points", "last check", "not right yet", box=None, header_style="bold", padding=(0, 1))
    table.columns[1].no_wrap, table.columns[1].overflow = True, "fold"  # names whole, in 80 columns too
    table.columns[2].justify = "right"
    for each in standings:
        mark = "[green]✓[/green]" if each.done else "[yellow]–[/yellow]" if each.started or each.when else ""
        state = each.when.replace("T", " ") if each.when else "[dim]started[/dim]" if each.started else ""
        table.add_row(mark, each.unit.stem, f"{each.score:g}/{each.total:g}", state, escape(", ".join(each.open)))
    shared.console.print(table)
    total, most = sum(each.score for each in standings), sum(each.total for each in standings)
    shared.console.print(f"[bold]{total:g} of {most:g} points[/bold]. {escape(work.what_next(standings))}")


def doctor(hub: Annotated[bool, typer.Option("--hub", help="Also ask whether the Hugging Face hub can be reached.")] = False) -> None:
    """Find out what this machine can do, by doing it, and how to mend what is missing."""
    from rich.table import Table

    from course import doctor as examination

    with shared.bars(transient=True) as progress:
        task = progress.add_task("examining", total=None)
        findings = examination.examine(hub, lambda name: progress.update(task, description=name))
    marks = {examination.OK: "[green]✓[/green]", examination.NOTE: "[yellow]–[/yellow]", examination.BROKEN: "[red]✗[/red]"}
    table = Table("", "", "found", "what to do", box=None, header_style="bold")
    for finding in findings:
        table.add_row(marks[finding.state], finding.what, escape(finding.found), escape(finding.mend))
    shared.console.print(table)
    if any(finding.state == examination.BROKEN for finding in findings):
        shared.console.print("[red]Something that the course needs is broken: see ✗ above.[/red]")
        raise typer.Exit(1)
    shared.console.print("[green]The course runs here.[/green]")


def demo(figure: Annotated[Path | None, typer.Option(help="Where to save the figure.", show_default=False)] = None) -> None:
    """See in under a minute what the course is about; also saved as one figure."""
    from course.demo import main as play

    play(figure)
