"""The ``course`` command. Everything heavy is imported inside the commands, so that ``course --help`` answers at once."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from course import ENVIRONMENT, ROOT
from course.units import CourseError, find, select

if TYPE_CHECKING:
    from course.running import Execution

app = typer.Typer(
    help="A hands-on course in parameter-efficient fine-tuning. Units are named by number or topic: 02, 2, lora.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(highlight=False)
Names = Annotated[list[str] | None, typer.Argument(metavar="[NN ...]", help="Units; all of them if none is named.", show_default=False)]
SECONDS, BYTES = 90, 3e9  # what a notebook should stay below on two cores without a GPU


def main() -> None:
    """Run the command line; a mistake that the user can mend ends in one sentence, not in a traceback."""
    os.environ |= ENVIRONMENT | os.environ  # read when torch is loaded
    try:
        app()
    except CourseError as error:
        _say(error)
        sys.exit(2)
    except SystemExit as end:  # typer makes this of Ctrl-C, and says nothing
        if end.code == 130:
            _say("stopped")
        raise


def _say(what: object) -> None:
    """One sentence to stderr."""
    Console(stderr=True, highlight=False).print(f"[red]course:[/red] {escape(str(what))}", soft_wrap=True)


@app.command()
def run(
    names: Names = None,
    save: Annotated[bool, typer.Option("--save", help="Write the new outputs into the notebooks.")] = False,
    cell_seconds: Annotated[float, typer.Option(help="Stop a cell that takes longer.")] = 600.0,
) -> None:
    """Run notebooks from top to bottom, each in a kernel of its own, and make pages of them."""
    from course import notebooks, running, website

    chosen = [unit for unit in select(names, ROOT) if unit.notebook.exists()]
    if not chosen:
        raise CourseError("there is no notebook to run")
    limits, executed, results, stopped = running.Limits(cell_seconds=cell_seconds), {}, {}, False
    with _progress() as progress:
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
                    notebook, unit.notebook.parent, limits, before_cell=lambda index, task=task: progress.update(task, completed=index)
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
            website.write(ROOT, executed=executed, summary=summary)
        except CourseError as error:
            unreadable = error
        progress.update(task, total=1, completed=1)
    for unit, result in results.items():
        for trouble in result.troubles:
            _show_trouble(unit.notebook, executed[unit.notebook].cells[trouble.cell].source, trouble)
    console.print(_run_table(results))
    if stopped:
        console.print(f"{len(results)} of {len(chosen)} notebooks had run; their pages are written.")
        raise KeyboardInterrupt
    if unreadable:
        raise unreadable
    _show_index()
    if any(result.troubles for result in results.values()):
        raise typer.Exit(1)


def _show_index() -> None:
    index = ROOT / "site" / "index.html"
    console.print(f"Pages: {index.relative_to(Path.cwd()) if index.is_relative_to(Path.cwd()) else index}")


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
    console.print(
        Panel(Group(shown, f"[red]{escape(str(trouble))}[/red]"), title=f"{path.name}, cell {trouble.cell + 1}", border_style="red")
    )


@app.command()
def check(
    unit: Annotated[str, typer.Argument(metavar="NN", help="The unit.")],
    notebook: Annotated[
        Path | None, typer.Argument(help="Your notebook; exercises/NN_topic.ipynb if not given.", show_default=False)
    ] = None,
    cell_seconds: Annotated[float, typer.Option(help="Stop a cell that takes longer.")] = 120.0,
    total_seconds: Annotated[float, typer.Option(help="Stop the notebook when this time is over.")] = 900.0,
    memory_gb: Annotated[float, typer.Option(help="Stop the notebook when it holds more than this (in GB); 0 is no limit.")] = 6.0,
) -> None:
    """Judge your answers: what passed, what did not and why, and the score."""
    from course import grading, running

    chosen = find(unit, ROOT)
    path = notebook or chosen.exercise
    limits = running.Limits(cell_seconds, total_seconds, int(memory_gb * 1e9) or None)
    with _progress(transient=True) as progress:
        task = progress.add_task(path.name, total=None)
        report = grading.grade(path, chosen, limits, lambda index, count: progress.update(task, completed=index, total=count))
    for note in report.notes:
        console.print(f"[yellow]Note:[/yellow] {escape(note)}")
    console.print(_check_table(report))
    console.print(f"[bold]{report.score:g} of {report.total:g} points[/bold]  ({report.seconds:.0f} s)")
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


@app.command()
def build(
    check_only: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a file is out of date.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also replace exercises that somebody has worked in.")] = False,
) -> None:
    """For authors: exercises from solutions, claimed numbers into the pages, notebooks without times of day."""
    from course import build as building

    derived = [*building.notebooks(ROOT), *building.exercises(ROOT), *building.pages()]
    stale = [each for each in derived if not each.fresh]
    if check_only:
        for each in stale:
            console.print(f"{each.path.relative_to(ROOT)} is out of date" + (" (somebody has worked in it)" if each.worked_in else ""))
        if stale:
            raise CourseError("run `course build`")
    else:
        for path in building.write(derived, overwrite):
            console.print(f"{'wrote' if path.exists() else 'removed'} {path.relative_to(ROOT)}")
    console.print(f"{len(derived)} files, all up to date")


@app.command()
def new(
    number: Annotated[str, typer.Argument(metavar="NN", help="The unit's number, 07.")],
    topic: Annotated[str, typer.Argument(help="Its topic, a Python name: paged_optimizers.")],
) -> None:
    """For authors: lay out an empty unit, whole and working, to be filled."""
    from course.new import lay_out

    for path in lay_out(number, topic, ROOT):
        console.print(f"wrote {path.relative_to(ROOT)}")
    console.print("Next: name the module in reference/__init__.py, run `course build`, then see CONTRIBUTING.md.")


@app.command()
def site() -> None:
    """Make pages of the lessons, the exercises and the notebooks with their saved outputs, without running anything."""
    from course import website

    with _progress(transient=True) as progress:
        task = progress.add_task("pages", total=None)
        website.write(ROOT, before_page=lambda path: progress.update(task, description=path.name))
    _show_index()


@app.command()
def doctor(hub: Annotated[bool, typer.Option("--hub", help="Also ask whether the Hugging Face hub can be reached.")] = False) -> None:
    """Find out what this machine can do, by doing it, and how to mend what is missing."""
    from rich.table import Table

    from course import doctor as examination

    with _progress(transient=True) as progress:
        task = progress.add_task("examining", total=None)
        findings = examination.examine(hub, lambda name: progress.update(task, description=name))
    marks = {examination.OK: "[green]✓[/green]", examination.NOTE: "[yellow]–[/yellow]", examination.BROKEN: "[red]✗[/red]"}
    table = Table("", "", "found", "what to do", box=None, header_style="bold")
    for finding in findings:
        table.add_row(marks[finding.state], finding.what, escape(finding.found), escape(finding.mend))
    console.print(table)
    if any(finding.state == examination.BROKEN for finding in findings):
        console.print("[red]Something that the course needs is broken: see ✗ above.[/red]")
        raise typer.Exit(1)
    console.print("[green]The course runs here.[/green]")


@app.command()
def interview(
    unit: Annotated[str | None, typer.Argument(metavar="[NN]", help="The unit; all of them if not given.", show_default=False)] = None,
    answers: Annotated[bool, typer.Option("--answers", help="Show the answers at once, without waiting.")] = False,
) -> None:
    """Ask the interview questions; the answer comes after Enter."""
    from rich.markdown import Markdown
    from rich.panel import Panel

    from course.interview import in_terminal, questions

    asked = questions(find(unit, ROOT).number if unit else None)
    if not asked:
        raise CourseError("there are no questions for this unit yet" if unit else "there are no questions yet")
    waits = not answers and sys.stdin.isatty()
    for number, question in enumerate(asked, 1):
        level = "●" * question.difficulty + "○" * (5 - question.difficulty)
        title = f"{number} of {len(asked)}  ·  unit {question.unit}  ·  {level}  ·  {question.minutes} min"
        console.print(Panel(Markdown(in_terminal(question.question)), title=title, title_align="left", border_style="blue"))
        if waits and input("Enter shows the answer, q stops. ").strip().lower() == "q":
            return
        if answers or waits:
            parts = {
                "In 30 seconds": question.short,
                "More": question.deep,
                "Often said": f"{question.wrong_answer}\n\n{question.wrong_why}",
            }
            if question.follow_ups:
                parts["They may go on"] = "\n".join(f"- {follow_up}" for follow_up in question.follow_ups)
            for name, text in parts.items():
                console.print(f"[bold]{name}[/bold]")
                console.print(Markdown(in_terminal(text)))
                console.print()


@app.command()
def figures(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Figures; those out of date if none.", show_default=False)
    ] = None,
) -> None:
    """For authors: draw the figures of README and lessons whose data have moved on, or those that are named."""
    from course import figures as drawing

    known = drawing.figures()
    if unknown := set(names or ()) - set(known):
        raise CourseError(f"there is no figure {', '.join(sorted(unknown))}. There are: {', '.join(known)}")
    for name, figure in known.items():
        if name in names if names else not drawing.is_fresh(figure):
            console.print(f"drew {drawing.save(figure).relative_to(ROOT)}")
    console.print(f"{len(known)} figures, all up to date")


@app.command()
def demo(figure: Annotated[Path | None, typer.Option(help="Where to save the figure.", show_default=False)] = None) -> None:
    """See in under a minute what the course is about; also saved as one figure."""
    from course.demo import main as play

    play(figure)


@app.command(name="train-tiny")
def train_tiny() -> None:
    """Train the tiny model that ships with the course again, from nothing: a few minutes on two cores."""
    from course.lab.pretrain import main as train

    train()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="The measurement; lists them if not given.", show_default=False)] = None,
) -> None:
    """Measure something side by side with other libraries, and record the result. What follows the name is passed on to it."""
    from course.bench import abouts, load

    if name is None:
        for known, about in abouts(ROOT).items():
            console.print(f"[bold]{known}[/bold]  {escape(about)}")
        return
    module = load(name, ROOT)
    sys.argv = [f"course bench {name}", *context.args]  # it reads its options as if started by itself
    module.main()


def _progress(transient: bool = False):
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
