"""Rows of numbers as text in columns: the first to the left, all others to the right, each as wide as it needs."""

import textwrap
from collections.abc import Iterable, Sequence


def columns(heads: Sequence[str], rows: Iterable[Sequence], form: str = ".2f") -> str:
    """A table as text, to be printed.

    Args:
        heads: a word or two for each column.
        rows: as many values each: text as it is, whole numbers with commas, other numbers (tensors, too) by ``form``, None as a dash.

    Raises:
        ValueError: a row has more or fewer values than there are heads.
    """

    def cell(value) -> str:
        if value is None:
            return "–"
        return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else format(float(value), form)

    lines = [list(heads), *([cell(value) for value in row] for row in rows)]
    if wrong := [line for line in lines if len(line) != len(heads)]:
        raise ValueError(f"each row must have {len(heads)} values, one for each of {list(heads)}, got {wrong[0]}")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines)


def short(value: float) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def wrapped(text: str) -> str:
    """A sentence beside a table, in lines of at most 80 characters."""
    return textwrap.fill(text, 80, subsequent_indent="    ", break_on_hyphens=False)
