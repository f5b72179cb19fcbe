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
# in the order in which --help shows them
learning, practising, making = "Learn", "Practise for interviews", "Adapt and measure"
teaching, writing = "For instructors", "For authors"
for panel, commands in {
    learning: (learn.doctor, learn.demo, learn.run, learn.start, learn.check, learn.progress, practice.case, practice.claims, author.site),
    practising: (interviews.quiz, interviews.interview, interviews.plan, interviews.anki),
    making: (capstone.capstone, capstone.audit, capstone.rule),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command(rich_help_panel=making, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(author.bench)
app.command(name="train-tiny", rich_help_panel=making)(author.train_tiny)
for command in (teach.grade, teach.slides):
    app.command(rich_help_panel=teaching)(command)
for command in (author.build, author.new, author.figures):
    app.command(rich_help_panel=writing)(command)

classes = typer.Typer(help="A class with nbgrader.", no_args_is_help=True)
classes.command(name="init")(teach.class_init)
app.add_typer(classes, name="class", rich_help_panel=teaching)


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
