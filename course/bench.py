"""Benchmarks by name. They are run, not installed: their folder is on no path, and a module of theirs is found in the checkout."""

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType

from course import ROOT
from course.units import CourseError


def abouts(root: Path = ROOT) -> dict[str, str]:
    """Name -> first line of the docstring, of every module in ``benchmarks/`` that has a ``main()``; the others are what these share."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((root / "benchmarks").glob("*.py"))}
    runs = [name for name, tree in trees.items() if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)]
    return {name: (ast.get_docstring(trees[name]) or "").partition("\n")[0].replace("``", "") for name in runs}


def results(root: Path = ROOT) -> dict[str, str]:
    """Name -> the measurement that records it, of everything recorded on any device: that of the same name, one that writes the name, or
    the one whose name it begins with; "" if there is none."""
    known = {name: (root / "benchmarks" / f"{name}.py").read_text(encoding="utf-8") for name in abouts(root)}

    def measurement(name: str) -> str:
        if name in known:
            return name
        written = (each for each, text in known.items() if f'"{name}"' in text)
        return next(written, max((each for each in known if name.startswith(f"{each}_")), key=len, default=""))

    return {name: measurement(name) for name in sorted({path.stem for path in (root / "benchmarks" / "recorded").glob("*/*.json")})}


def recorded_by(name: str, root: Path = ROOT) -> dict[str, str]:
    """The part of :func:`results` that ``name`` means: one recorded result, or all that the measurement of that name records.

    Raises:
        CourseError: nothing is recorded under that name; the message lists the names that there are.
    """
    known = results(root)
    if found := {each: by for each, by in known.items() if each == name} or {each: by for each, by in known.items() if by == name}:
        return found
    why = f"nothing is recorded of {name} yet" if name in abouts(root) else f"there is no recorded result {name!r}"
    raise CourseError(f"{why}. There are: {', '.join(known) or 'none yet'}")


def load(name: str, root: Path = ROOT) -> ModuleType:
    """The module ``benchmarks.<name>`` of the checkout ``root``.

    Raises:
        CourseError: there is none of that name; the message lists those that there are.
    """
    if name not in (known := abouts(root)):
        raise CourseError(f"there is no measurement {name!r}. There are: {', '.join(known) or 'none yet'}")
    package = sys.modules["benchmarks"] = ModuleType("benchmarks")  # this checkout's, whatever else is on the path
    package.__path__ = [str(root / "benchmarks")]
    return importlib.import_module(f"benchmarks.{name}")
