"""What a learner hands in beside a notebook, data files and modules of their own, on its way into the folder in which it is judged.

Only copies go there, and only of plain files: never one that Python would find in the place of a module that the judge, the course or a
library needs, never one that nobody can read (compiled code), never what a link leads to. What is left behind is named, with the reason.
"""

import functools
import os
import sys
from collections.abc import Iterator
from importlib.machinery import BYTECODE_SUFFIXES, EXTENSION_SUFFIXES, SOURCE_SUFFIXES, PathFinder
from pathlib import Path

from course import ROOT

LARGEST_BYTES = 50_000_000  # of all of them together
MOST_FILES = 200
MOST_SEEN = 2000  # files and folders that are looked at
DEPTH = 4
_COMPILED = (*BYTECODE_SUFFIXES, *EXTENSION_SUFFIXES, ".so", ".pyd", ".dll", ".dylib")
_SETTINGS = frozenset(
    "sitecustomize usercustomize conftest course reference benchmarks tests ipython_config jupyter_config nbgrader_config".split()
)


def bring(notebook: Path, others: set[str], folder: Path) -> list[str]:
    """Copy what lies beside ``notebook`` into ``folder``; returns what to say of it: names that came along, and names that did not.

    Args:
        others: names in the notebook's folder that belong to other work and are not looked at, such as the folders of other units.
    """
    came, left, held = [], [], 0
    for seen, path in enumerate(_files(notebook.parent, others)):
        name = path.relative_to(notebook.parent).as_posix()
        if seen >= MOST_SEEN:
            left.append(f"all that follows {name} (more than {MOST_SEEN} files)")
            break
        why = _refused(path, notebook.parent)
        if not why and len(came) >= MOST_FILES:
            why = f"more than {MOST_FILES} files"
        if not why:
            copied = _copy(path, folder / name, LARGEST_BYTES - held)
            why = f"more than {LARGEST_BYTES // 10**6} MB in all" if copied is None else ""
        if why:
            left.append(f"{name} ({why})")
        else:
            held += copied
            came.append(name)
    notes = [f"brought along: {_list(came)}"] if came else []
    return notes + ([f"left behind: {_list(left)}"] if left else [])


def in_the_way(folder: Path) -> list[str]:
    """Names of the modules right in ``folder`` that :func:`bring` would leave behind for their names."""
    return sorted(path.name for path in folder.glob("*.py") if is_taken(path.stem.partition(".")[0]))


def _files(folder: Path, others: set[str], depth: int = 0) -> Iterator[Path]:
    """Everything below ``folder`` that is no folder, in the order of its name, without notebooks and what is hidden."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        hidden = entry.name.startswith(".") or entry.name == "__pycache__" or (not depth and entry.name in others)
        if hidden or entry.name.endswith(".ipynb"):
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth < DEPTH:
                yield from _files(Path(entry.path), others, depth + 1)
        else:
            yield Path(entry.path)


def _refused(path: Path, folder: Path) -> str:
    """Why this file does not come along; "" if it does."""
    if path.is_symlink() or not path.is_file():
        return "not a file"
    if path.name.lower().endswith(_COMPILED):
        return "compiled code"
    if path.name.lower().endswith((*SOURCE_SUFFIXES, ".pth")):
        module = path.relative_to(folder).parts[0].partition(".")[0]
        if is_taken(module):
            return f"Python would find it in the place of {module}"
    return ""


@functools.cache
def is_taken(module: str) -> bool:
    """Whether ``module`` names something that Python already has, here or in the standard library; imports nothing."""
    name = module.lower()
    if name in _SETTINGS or name in sys.stdlib_module_names or module in sys.stdlib_module_names or module in sys.modules:
        return True
    places = [place for place in sys.path if place and Path(place).resolve() not in (Path.cwd(), ROOT)]
    return any(PathFinder.find_spec(each, places) is not None for each in {name, module})


def _copy(path: Path, to: Path, most: int) -> int | None:
    """Copy at most ``most`` bytes; returns how many there were, None where they are too many or can't be read."""
    try:
        source = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(source, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            return None
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(content)
    except OSError:
        return None
    return len(content)


def _list(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
