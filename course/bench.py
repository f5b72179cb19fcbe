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
