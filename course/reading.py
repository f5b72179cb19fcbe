"""How long a page takes, computed and stated: never "ten minutes" for half an hour of reading.

A lesson states its minutes before the comment ``<!--minutes-->``, a notebook the sum in its first cell and each section's own in its
heading (``## 2 · What scales look like · 4<!--minutes--> min``). ``course build`` puts the numbers in, and a test holds them.
"""

import itertools
import math
import re

from nbformat import NotebookNode

WORDS_A_MINUTE = 150
FORMULA_SECONDS, FIGURE_SECONDS = 20, 20
CODE_LINE_SECONDS = 4  # read and run
WRITE_SECONDS = 180  # a cell that the reader writes
STATED = re.compile(r"(?P<number>\d+)(?P<mark>\s*<!--minutes-->)")
HIDDEN, WRITE = "hide-input", "write"  # tags of cells: folded, and to be written by the reader
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FORMULA = re.compile(r"\$\$.*?\$\$", re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_TARGET = re.compile(r"\]\([^)]*\)")


def seconds(text: str) -> float:
    """To read Markdown: words at 150 a minute, and 20 seconds for each displayed formula. Alt texts and addresses are not read."""
    text = _PICTURE.sub(" ", _COMMENT.sub(" ", text))
    formulas = len(_FORMULA.findall(text))
    words = [word for word in _TARGET.sub("]", _FORMULA.sub(" ", text)).split() if re.search(r"\w", word)]
    return 60 * len(words) / WORDS_A_MINUTE + FORMULA_SECONDS * formulas


def minutes(text: str) -> int:
    """Of a page, rounded up."""
    return math.ceil(seconds(text) / 60)


def refresh(text: str) -> str:
    """A page with its minutes as they are."""
    return STATED.sub(lambda match: f"{minutes(text)}{match['mark']}", text)


def cell_seconds(cell: NotebookNode) -> float:
    """Of one cell of a notebook: text is read, code is read and run, figures are looked at, and some code is written."""
    if cell.cell_type != "code":
        return seconds(cell.source)
    tags = cell.metadata.get("tags", [])
    figures = sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
    lines = 0 if HIDDEN in tags else sum(bool(line.strip()) for line in cell.source.splitlines())
    return FIGURE_SECONDS * figures + CODE_LINE_SECONDS * lines + WRITE_SECONDS * (WRITE in tags)


def refresh_notebook(notebook: NotebookNode) -> NotebookNode:
    """Put the minutes into the headings of sections and into the first cell, in place."""
    starts = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "markdown" and STATED.search(cell.source)]
    for start, stop in itertools.pairwise([*starts, len(notebook.cells)]):
        inside = notebook.cells if start == 0 else notebook.cells[start:stop]
        count = math.ceil(sum(map(cell_seconds, inside)) / 60)
        notebook.cells[start].source = STATED.sub(lambda match, count=count: f"{count}{match['mark']}", notebook.cells[start].source)
    return notebook
