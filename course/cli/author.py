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
    name: Annotated[str | None, typer.Argument(help="The measurement; lists them if not given.", show_default=False)] = None,
    only_recorded: Annotated[bool, typer.Option("--recorded", help="Measure nothing: show the recorded cards side by side.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Say whether this card's figures are as expected.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Also draw the ratios, and save them here.", show_default=False)] = None,
) -> None:
    """Measure something side by side with other libraries, record it, and show it beside the recorded cards.

    What follows the name and is no option of this command is passed on to the measurement.
    """
    from rich.table import Table

    from course import beside
    from course.bench import abouts, load
    from course.lab import recorded

    if name is None:
        listed = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
        listed.add_column(style="bold", no_wrap=True)
        listed.add_column()
        for known, about in abouts(shared.ROOT).items():
            listed.add_row(known, escape(about))
        shared.console.print(listed)
        return
    if check and only_recorded:
        raise CourseError("--check holds a new measurement to the recorded ones: leave --recorded out")
    module = load(name, shared.ROOT)
    before = beside.cards(name)  # read first: the record of this card may be replaced
    shown = dict(before)
    if not only_recorded:
        sys.argv = [f"course bench {name}", *context.args]  # it reads its options as if started by itself
        recorded.SAVED.clear()
        if shared.console.is_terminal:
            shared.console.print(f"measuring: {escape(abouts(shared.ROOT)[name])}")
        module.main()
        found = [entry for entry in map(recorded.read, recorded.SAVED) if entry["name"] == name]
        if not found or "--smoke" in context.args:
            return  # a dry run's times mean nothing
        shown |= {f"{found[-1]['device']}, now": found[-1]}
    if not shown:
        raise CourseError(f"nothing is recorded of {name} yet: run it without --recorded")
    _beside(shown, figure)
    if check:
        shared.console.print(escape(beside.verdict(found[-1], before)))
    if not only_recorded:
        _say_what_it_replaces(found[-1]["device"] in before, recorded)


def _say_what_it_replaces(was_there: bool, recorded) -> None:
    """Lessons and notebooks quote what is recorded in the checkout: how to have the old state again."""
    path = recorded.SAVED[-1]
    if recorded.FOLDER not in path.parents:
        return
    path = path.relative_to(shared.ROOT)
    if was_there:
        said = f"This replaces what lessons and notebooks quote. The old record again: git restore {path}"
    else:
        said = f"Lessons and notebooks may quote this record from now on. Without it again: rm {path}"
    shared.console.print(f"[yellow]Note:[/yellow] {said}", soft_wrap=not shared.console.is_terminal)


def _beside(entries: dict, figure: Path | None) -> None:
    """A table of the cards, and the figure if a path is given."""
    from rich.table import Table

    from course import beside

    heads, lines = beside.table(entries)
    shown = Table(*map(escape, heads), box=None, header_style="bold")
    for line in lines:
        shown.add_row(*map(escape, line))
    shared.console.print(shown)
    if words := beside.legend(entries):
        shared.console.print(f"\n{escape(words)}")
    if figure is not None:
        drawn = beside.figure(entries)
        if drawn is None:
            raise CourseError("this measurement has no ratio to draw: leave --figure out")
        drawn.savefig(figure, bbox_inches="tight")
        shared.console.print(f"drew {figure}")
