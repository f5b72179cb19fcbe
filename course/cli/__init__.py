"""The ``course`` command. Everything heavy is imported inside the commands, so that ``course --help`` answers at once.

The commands by who gives them: ``learn``, ``practice``, ``teach``, ``author``; those of interviews and of the capstone are beside what they
call, in ``course/practice`` and ``course/capstone``.
"""

import os
import sys

import typer

from course import ENVIRONMENT
from course.capstone import commands as capstone
from course.cli import author, learn, practice, shared, teach
from course.practice import commands as interviews
from course.units import CourseError

app = typer.Typer(
    help="A hands-on course in parameter-efficient fine-tuning. Units are named by number or topic: 02, 2, lora.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (learn.run, learn.check, author.build, author.new, author.site, learn.doctor, author.figures, learn.demo):
    app.command()(command)
app.command(name="train-tiny")(author.train_tiny)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(author.bench)
for command in (interviews.quiz, interviews.interview, interviews.plan, interviews.anki, practice.case, practice.claims):
    app.command()(command)
for command in (capstone.capstone, capstone.audit, capstone.rule, learn.start, learn.progress, teach.grade, teach.slides):
    app.command()(command)

classes = typer.Typer(help="For instructors: a class with nbgrader.", no_args_is_help=True)
classes.command(name="init")(teach.class_init)
app.add_typer(classes, name="class")


def main() -> None:
    """Run the command line; a mistake that the user can mend ends in one sentence, not in a traceback."""
    os.environ |= ENVIRONMENT | os.environ  # read when torch is loaded
    try:
        app()
    except CourseError as error:
        shared.say(error)
        sys.exit(2)
    except SystemExit as end:  # typer makes this of Ctrl-C, and says nothing
        if end.code == 130:
            shared.say("stopped")
        raise
