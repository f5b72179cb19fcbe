"""The ``course`` command. Everything heavy is imported inside the commands, so that ``course --help`` answers at once."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from course import ENVIRONMENT, ROOT
from course.capstone import commands as capstone
from course.practice import commands as practice
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
        Path | None,
        typer.Argument(help="Your notebook; by default yours in work/, else the one in exercises/.", show_default=False),
    ] = None,
    cell_seconds: Annotated[float, typer.Option(help="Stop a cell that takes longer.")] = 120.0,
    total_seconds: Annotated[float, typer.Option(help="Stop the notebook when this time is over.")] = 900.0,
    memory_gb: Annotated[float, typer.Option(help="Stop the notebook when it holds more than this (in GB); 0 is no limit.")] = 6.0,
) -> None:
    """Judge your answers: what passed, what did not and why, and the score."""
    from course import grading, running, work

    chosen = find(unit, ROOT)
    path = notebook or work.own_notebook(chosen)
    limits = running.Limits(cell_seconds, total_seconds, int(memory_gb * 1e9) or None)
    with _progress(transient=True) as progress:
        task = progress.add_task(path.name, total=None)
        report = grading.grade(path, chosen, limits, lambda index, count: progress.update(task, completed=index, total=count))
    if path.resolve() in (chosen.work.resolve(), chosen.exercise.resolve()):
        work.remember(chosen, report)
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
    only_recorded: Annotated[bool, typer.Option("--recorded", help="Measure nothing: show the recorded cards side by side.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Say whether this card's figures are as expected.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Also draw the ratios, and save them here.", show_default=False)] = None,
) -> None:
    """Measure something side by side with other libraries, record it, and show it beside the recorded cards.

    What follows the name and is no option of this command is passed on to the measurement.
    """
    from course import beside
    from course.bench import abouts, load
    from course.lab import recorded

    if name is None:
        for known, about in abouts(ROOT).items():
            console.print(f"[bold]{known}[/bold]  {escape(about)}")
        return
    if check and only_recorded:
        raise CourseError("--check holds a new measurement to the recorded ones: leave --recorded out")
    module = load(name, ROOT)
    before = beside.cards(name)  # read first: the record of this card may be replaced
    shown = dict(before)
    if not only_recorded:
        sys.argv = [f"course bench {name}", *context.args]  # it reads its options as if started by itself
        recorded.SAVED.clear()
        module.main()
        found = [entry for entry in map(recorded.read, recorded.SAVED) if entry["name"] == name]
        if not found or "--smoke" in context.args:
            return  # a dry run's times mean nothing
        shown |= {f"{found[-1]['device']}, now": found[-1]}
    if not shown:
        raise CourseError(f"nothing is recorded of {name} yet: run it without --recorded")
    _beside(shown, figure)
    if check:
        console.print(escape(beside.verdict(found[-1], before)))


def _beside(entries: dict, figure: Path | None) -> None:
    """A table of the cards, and the figure if a path is given."""
    from rich.table import Table

    from course import beside

    heads, lines = beside.table(entries)
    shown = Table(*map(escape, heads), box=None, header_style="bold")
    for line in lines:
        shown.add_row(*map(escape, line))
    console.print(shown)
    if figure is not None:
        drawn = beside.figure(entries)
        if drawn is None:
            raise CourseError("this measurement has no ratio to draw: leave --figure out")
        drawn.savefig(figure, bbox_inches="tight")
        console.print(f"drew {figure}")


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


# practice for interviews
for _command in (practice.quiz, practice.interview, practice.plan, practice.anki):
    app.command()(_command)


# debugging cases and claims


@app.command()
def case(
    name: Annotated[str | None, typer.Argument(help="The case; lists them if not given.", show_default=False)] = None,
    check: Annotated[Path | None, typer.Option("--check", help="Judge this mended copy of the script.", show_default=False)] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Show why it fails, and the script mended.")] = False,
    save: Annotated[Path | None, typer.Option("--save", help="Write the script to this file, to be mended.", show_default=False)] = None,
) -> None:
    """A script with a real bug: what it shows, the script, and a judge for your repair."""
    from course.casebook import command

    if not command(name, check, fix, save, console.print):
        raise typer.Exit(1)


@app.command()
def claims(
    unit: Annotated[
        str | None, typer.Option("--unit", metavar="NN", help="The unit; all of them if not given.", show_default=False)
    ] = None,
) -> None:
    """What one commonly hears about fine-tuning, what was computed of it, and whether it holds."""
    from course.statements import command

    number = find(unit, ROOT).number if unit else None
    with _progress(transient=True) as progress:
        progress.add_task("recomputing", total=None)
        command(number, progress.console.print)


# the capstone
for _command in (capstone.capstone, capstone.audit, capstone.rule):
    app.command()(_command)


# a learner's own work


@app.command()
def start(
    unit: Annotated[str, typer.Argument(metavar="NN", help="The unit.")],
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; what is there is kept under another name.")] = False,
) -> None:
    """Copy a unit's exercises to work/, where they are yours."""
    from course import work

    chosen = find(unit, ROOT)
    begun = work.start(chosen, fresh)
    name = begun.path.relative_to(ROOT)
    if begun.kept:
        console.print(f"kept your earlier work as {begun.kept.relative_to(ROOT)}")
    if begun.new:
        console.print(f"wrote {name}. Open it in JupyterLab; `course check {chosen.number}` judges it.")
    else:
        console.print(f"{name} is there already and stays as it is; `course start {chosen.number} --fresh` begins again and keeps it.")
    if begun.outdated:
        console.print("The exercise has changed since you started. Your copy is judged by the checks of today.")


@app.command()
def progress() -> None:
    """Show the points of your last checks, and what is next."""
    from rich.table import Table

    from course import work

    standings = work.progress(ROOT)
    table = Table("", "unit", "points", "last check", "not right yet", box=None, header_style="bold", padding=(0, 1))
    table.columns[2].justify = "right"
    for each in standings:
        mark = "[green]✓[/green]" if each.done else "[yellow]–[/yellow]" if each.started or each.when else ""
        state = each.when.replace("T", " ") if each.when else "[dim]started[/dim]" if each.started else ""
        table.add_row(mark, each.unit.stem, f"{each.score:g}/{each.total:g}", state, escape(", ".join(each.open)))
    console.print(table)
    total, most = sum(each.score for each in standings), sum(each.total for each in standings)
    console.print(f"[bold]{total:g} of {most:g} points[/bold]. {escape(work.what_next(standings))}")


# a class

classes = typer.Typer(help="For instructors: a class with nbgrader.", no_args_is_help=True)
app.add_typer(classes, name="class")


@classes.command(name="init")
def class_init(
    students: Annotated[
        Path | None, typer.Option(help="A CSV file with a column id, and first_name, last_name, email if you like.")
    ] = None,
) -> None:
    """Set up nbgrader's folders, exchange and gradebook in classroom/."""
    from course import classroom

    for line in classroom.begin(ROOT / "classroom", ROOT, students):
        console.print(escape(line))


@app.command()
def grade(
    folder: Annotated[Path, typer.Argument(help="Notebooks: STUDENT/NN_topic/NN_topic.ipynb, STUDENT/NN_topic.ipynb, or STUDENT.ipynb.")],
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the list there.", show_default=False)] = None,
    unit: Annotated[str | None, typer.Option(metavar="NN", help="Only this unit; it is that of STUDENT.ipynb.", show_default=False)] = None,
    processes: Annotated[int | None, typer.Option(help="Notebooks at a time; one for each core.", show_default=False, min=1)] = None,
    cell_seconds: Annotated[float, typer.Option(help="Stop a cell that takes longer.")] = 120.0,
    total_seconds: Annotated[float, typer.Option(help="Stop a notebook when this time is over.")] = 900.0,
    memory_gb: Annotated[float, typer.Option(help="Stop a notebook that holds more than this (in GB).")] = 4.0,
) -> None:
    """For instructors: judge a folder of notebooks as `course check` does, in processes side by side."""
    from course import marking
    from course.running import Limits

    limits = Limits(cell_seconds, total_seconds, int(memory_gb * 1e9))

    def say(number: int, count: int, mark: "marking.Mark") -> None:
        got = f"{mark.score:g} of {mark.total:g}" if mark.gradable else f"[red]not gradable[/red]: {escape(mark.why)}"
        console.print(f"{number} of {count}  {escape(mark.student)}  {mark.unit}  {got}  ({mark.seconds:.0f} s)")

    marks = marking.grade_folder(folder, unit, limits, processes, say, ROOT)
    if csv:
        csv.write_text(marking.as_csv(marks, folder), encoding="utf-8")
        console.print(f"wrote {csv}")
    if lost := sum(not mark.gradable for mark in marks):
        console.print(f"[red]{lost} of {len(marks)} could not be graded: they have no score.[/red]")
        raise typer.Exit(1)


@app.command()
def slides() -> None:
    """For instructors: make the decks in slides/, to be shown in a browser without network."""
    from course import slides as decks

    pages = decks.build()
    console.print(f"{len(pages)} decks. Open {pages[0].relative_to(ROOT)}; S shows the speaker's notes.")
