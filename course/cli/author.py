"""For authors: build, new units, pages, figures, measurements."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from course.cli import shared
from course.units import CourseError


def build(
    check_only: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a file is out of date.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also replace exercises that somebody has worked in.")] = False,
) -> None:
    """Exercises from solutions, claimed numbers into the pages, notebooks without times of day."""
    from course import build as building

    derived = [*building.notebooks(shared.ROOT), *building.exercises(shared.ROOT), *building.pages()]
    stale = [each for each in derived if not each.fresh]
    if check_only:
        for each in stale:
            shared.console.print(
                f"{each.path.relative_to(shared.ROOT)} is out of date" + (" (somebody has worked in it)" if each.worked_in else "")
            )
        if stale:
            raise CourseError("run `course build`")
    else:
        for path in building.write(derived, overwrite):
            shared.console.print(f"{'wrote' if path.exists() else 'removed'} {path.relative_to(shared.ROOT)}")
    shared.console.print(f"{len(derived)} files, all up to date")


def new(
    number: Annotated[str, typer.Argument(metavar="NN", help="The unit's number, 07.")],
    topic: Annotated[str, typer.Argument(help="Its topic, a Python name: paged_optimizers.")],
) -> None:
    """Lay out an empty unit, whole and working, to be filled."""
    from course.new import lay_out

    for path in lay_out(number, topic, shared.ROOT):
        shared.console.print(f"wrote {path.relative_to(shared.ROOT)}")
    shared.console.print("Next: name the module in reference/__init__.py, run `course build`, then see CONTRIBUTING.md.")


def site() -> None:
    """Make pages of the lessons, the exercises and the notebooks with their saved outputs, without running anything."""
    from course import website

    with shared.bars(transient=True) as progress:
        task = progress.add_task("pages", total=None)
        website.write(shared.ROOT, before_page=lambda path: progress.update(task, description=path.name))
    shared.show_index()


def figures(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME ...]", help="Figures; those out of date if none.", show_default=False)
    ] = None,
) -> None:
    """Draw the figures of README and lessons whose data have moved on, or those that are named."""
    from course import figures as drawing

    known = drawing.figures()
    if unknown := set(names or ()) - set(known):
        raise CourseError(f"there is no figure {', '.join(sorted(unknown))}. There are: {', '.join(known)}")
    for name, figure in known.items():
        if name in names if names else not drawing.is_fresh(figure):
            shared.console.print(f"drew {drawing.save(figure).relative_to(shared.ROOT)}")
    shared.console.print(f"{len(known)} figures, all up to date")


def train_tiny() -> None:
    """Train the tiny model that ships with the course again, from nothing: a few minutes on two cores."""
    from course.lab.pretrain import main as train

    train()


def bench(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="The measurement; lists them if not given.", show_default=False)
    ] = None,
    only_recorded: Annotated[
        bool,
        typer.Option("--recorded", help="Measure nothing: the table of each recorded card. NAME may be a recorded result, too."),
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Say whether this card's figures are as expected.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Also draw the ratios, and save them here.", show_default=False)] = None,
) -> None:
    """Measure something side by side with other libraries, record it, and show it beside the recorded cards.

    What follows the name and is no option of this command is passed on to the measurement. `course bench NAME --help` shows this text,
    `python -m benchmarks.NAME --help` the options of the measurement.
    """
    from course import bench as benchmarks
    from course import beside
    from course.lab import recorded

    folder = shared.ROOT / "benchmarks" / "recorded"
    if name is None:
        _list_benchmarks()
        return
    if check and only_recorded:
        raise CourseError("--check holds a new measurement to the recorded ones: leave --recorded out")
    if only_recorded:
        for result, measurement in benchmarks.recorded_by(name, shared.ROOT).items():
            cards = beside.cards(result, folder)
            for entry in cards.values():
                shared.console.print(f"[bold]{escape(result)} on {escape(entry['device'])}[/bold]")
                shared.console.print(escape(recorded.described(entry)))
                _print(benchmarks.load(measurement, shared.ROOT).table(entry["result"]) + "\n")
            if len(cards) > 1 or figure:
                _beside(cards, figure)
        return
    module = benchmarks.load(name, shared.ROOT)
    before = {each: beside.cards(each, folder) for each, by in benchmarks.results(shared.ROOT).items() if by == name}  # may be replaced
    sys.argv = [f"course bench {name}", *context.args]  # it reads its options as if started by itself
    recorded.SAVED.clear()
    if shared.console.is_terminal:
        shared.console.print(f"measuring: {escape(benchmarks.abouts(shared.ROOT)[name])}")
    module.main()
    if "--smoke" in context.args:
        return  # a dry run's times mean nothing
    for path in dict.fromkeys(recorded.SAVED):
        entry = recorded.read(path)
        known = before.get(entry["name"], {})
        if known or figure:
            _beside(known | {f"{entry['device']}, now": entry}, figure)
            shared.console.print(f"The tables of the recorded cards: course bench {escape(entry['name'])} --recorded")
        if check:
            shared.console.print(escape(beside.verdict(entry, known)))
        if folder in path.parents:
            _say_what_it_replaces(path.relative_to(shared.ROOT), entry["device"] in known)


def _say_what_it_replaces(path: Path, was_there: bool) -> None:
    """Lessons and notebooks quote what is recorded in the checkout: how to have the old state again."""
    if was_there:
        said = f"This replaces what lessons and notebooks quote. The old record again: git restore {path}"
    else:
        said = f"Lessons and notebooks may quote this record from now on. Without it again: rm {path}"
    shared.console.print(f"[yellow]Note:[/yellow] {said}", soft_wrap=not shared.console.is_terminal)


def _list_benchmarks() -> None:
    """Each measurement, what it is, and names of results that are not its own."""
    from rich.table import Table

    from course.bench import abouts, results

    by, listed = results(shared.ROOT), Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    listed.add_column(style="bold", no_wrap=True)
    listed.add_column()
    for known, about in abouts(shared.ROOT).items():
        others = [each for each, measurement in by.items() if measurement == known and each != known]
        listed.add_row(known, escape(about) + (f" [dim]Records {', '.join(others)}.[/dim]" if others else ""))
    shared.console.print(listed)


def _print(text: str) -> None:
    """As it is: its lines are not wrapped."""
    shared.console.print(escape(text), soft_wrap=True)


def _beside(entries: dict, figure: Path | None) -> None:
    """The cards side by side where that is short and fits the terminal, and the figure if a path is given."""
    from course import beside

    table = beside.table(entries)
    if table and max(map(len, table.splitlines())) <= shared.console.width:
        _print(table + "\n")
    if figure is not None:
        drawn = beside.figure(entries)
        if drawn is None:
            raise CourseError("this measurement has no ratio to draw: leave --figure out")
        drawn.savefig(figure, bbox_inches="tight")
        shared.console.print(f"drew {figure}")
