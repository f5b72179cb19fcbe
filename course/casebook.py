"""Debugging cases, for ``course case`` and for questions of kind debugging: scripts in ``course/cases``, each with one real bug.

A script's docstring says what was seen and what is to be mended, a function or a class. Its ``main`` prints the symptoms, of that one or
of another that it is given. The judge of each case, with the worked answer, is the check of the same name in ``course.checks.cases``.
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from course.units import CourseError

if TYPE_CHECKING:
    from course.checking import Check

FOLDER = Path(__file__).parent / "cases"


def _paragraphs(text: str) -> str:
    """A docstring with each paragraph in one line, for a terminal of any width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


@dataclass(frozen=True)
class Case:
    """One case; ``name`` is that of its script and of its check."""

    name: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.py"

    @property
    def text(self) -> str:
        """The script."""
        return self.path.read_text(encoding="utf-8")

    @property
    def symptoms(self) -> str:
        """What was seen, and what is to be mended: the script's docstring. Its first paragraph is one line."""
        return _paragraphs(ast.get_docstring(ast.parse(self.text)))

    @property
    def check(self) -> "Check":
        return getattr(importlib.import_module("course.checks.cases"), self.name)

    @property
    def mended(self) -> str:
        """The name of what is to be mended."""
        return self.check.reference.__name__

    @property
    def cause(self) -> str:
        """Why the script fails: the docstring of the judge's module."""
        return _paragraphs(inspect.getdoc(sys.modules[self.check.reference.__module__]))

    @property
    def fix(self) -> str:
        """The source of the worked answer."""
        return inspect.getsource(self.check.reference)

    def shows(self, answer: Any = None) -> str:
        """What the script prints, as it is, or with ``answer`` in the place of what is to be mended."""
        script, printed = importlib.import_module(f"course.cases.{self.name}"), io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            script.main(*() if answer is None else (answer,))
        return printed.getvalue()

    def answer(self, path: Path) -> Any:
        """What ``path``, a mended copy of the script, defines in the place of what is to be mended.

        Raises:
            CourseError: there is no such file, it can't be run, or it defines no such name.
        """
        if not path.is_file():
            raise CourseError(f"there is no file {path}")
        spec = importlib.util.spec_from_file_location(f"mended_{self.name}", path)
        if spec is None:
            raise CourseError(f"{path} is no Python file: its name must end with .py")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise CourseError(f"{path} can't be run: {type(error).__name__}: {error}{line}") from error
        if not hasattr(module, self.mended):
            raise CourseError(f"{path} defines no {self.mended}, which is what this case mends")
        return getattr(module, self.mended)


def cases() -> list[Case]:
    """All cases, by name."""
    return [Case(path.stem) for path in sorted(FOLDER.glob("[a-z]*.py"))]


def find(name: str) -> Case:
    """The case called ``name``; hyphens will do for underscores.

    Raises:
        CourseError: there is none; the message lists those there are.
    """
    for case in cases():
        if case.name == name.replace("-", "_"):
            return case
    raise CourseError(f"there is no case {name!r}. Cases: {', '.join(case.name for case in cases())}")


def command(name: str | None, check: Path | None, fix: bool, save: Path | None, show: Callable[..., None]) -> bool:
    """What ``course case`` does; ``show`` prints. False if a file was judged and is not right."""
    from rich.syntax import Syntax
    from rich.table import Table

    if name is None:
        table = Table("case", "what is seen", box=None, header_style="bold", padding=(0, 2, 0, 0))
        for case in cases():
            table.add_row(case.name, case.symptoms.splitlines()[0])
        show(table)
        show("\n`course case NAME` shows one: what is seen, and the script.")
        return True
    case = find(name)
    if check is not None:
        return _judged(case, check, show)
    if save is not None:
        if save.exists():
            raise CourseError(f"{save} is there already; name another file")
        save.write_text(case.text, encoding="utf-8")
        show(
            f"wrote {save}. Mend {case.mended} there, then: course case {case.name} --check {save}",
            markup=False,
            soft_wrap=True,
        )
        return True
    if fix:
        show(f"[bold]Why[/bold]\n{escape(case.cause)}\n\n[bold]Mended[/bold]")
        show(Syntax(case.fix.rstrip(), "python", background_color="default", word_wrap=True))
        show(f"\n[bold]It printed[/bold]\n{escape(case.shows())}\n[bold]It prints[/bold]\n{escape(case.shows(case.check.reference))}")
        return True
    show(f"{escape(case.symptoms)}\n\n[bold]The script prints[/bold]\n{escape(case.shows())}")
    body = case.text.split('"""', 2)[2].strip()
    show(
        Syntax(
            body,
            "python",
            background_color="default",
            word_wrap=True,
            line_numbers=True,
            start_line=case.text.count("\n") - body.count("\n"),
        )
    )
    show(
        f"\nTry: course case {case.name} --save mine.py, mend it, course case {case.name} --check mine.py; --fix shows ours.",
        markup=False,
    )
    return True


def _judged(case: Case, path: Path, show: Callable[..., None]) -> bool:
    from course.checking import NotYet

    answer = case.answer(path)
    with contextlib.suppress(Exception):  # if it fails here, the judge says where
        show(f"[bold]The script prints with it[/bold]\n{escape(case.shows(answer))}")
    try:
        case.check(answer)
    except NotYet as error:
        show(f"[yellow]Not yet:[/yellow] {escape(str(error))}")
        return False
    return True
