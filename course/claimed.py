"""Numbers in prose are held by code: a claim is a call that recomputes or measures the number.

``svd:rank_of_update`` calls ``course.claims.svd.rank_of_update()``, and ``qlora:linear('ours', rows=2048)`` one that takes arguments, which
are literals. The result is a number, which the text states, or True, where the claim is a sentence. Questions (YAML) put the number in by
name, ``{rank:.0f}``. Pages (Markdown) state it and carry the claim behind it in a comment that readers don't see,

    it saves **0.373** <!--claim double_quantization:saved_bits .3f--> bits

where the number right before the comment (bold or not, with thousands separators or not) is what ``course build`` keeps right and a
test holds.
"""

import ast
import contextlib
import functools
import importlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from course import ROOT

_CALL = r"\w+:\w+(?:\([^<>]*?\))?"
_IN_PAGE = re.compile(
    rf"(?P<number>[−-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?P<between>[*%]*\s*)<!--claim (?P<call>{_CALL}) (?P<format>[^\s>]+)-->"
)
_ANY_CLAIM = re.compile(r"<!--claim\b")


def parse(call: str) -> tuple[str, str, tuple, dict[str, Any]]:
    """``module:function(1, rows=2)`` as module, function, arguments and keyword arguments; without brackets there are none.

    Raises:
        ValueError: it is not of that form, or an argument is not a literal.
    """
    module, colon, rest = call.partition(":")
    try:
        node = ast.parse(rest, mode="eval").body
        function = node.func if isinstance(node, ast.Call) else node
        if not (colon and module.isidentifier() and isinstance(function, ast.Name)):
            raise SyntaxError("module:function or module:function(arguments) was expected")
        arguments, keywords = ([], []) if function is node else (node.args, node.keywords)
        return module, function.id, tuple(map(ast.literal_eval, arguments)), {k.arg: ast.literal_eval(k.value) for k in keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"claim {call!r} must read module:function or module:function(literals): {error}") from None


@functools.cache
def value(call: str) -> float | bool:
    """Carry out the claim ``module:function(arguments)`` and return what it gives.

    Raises:
        ValueError: it is not of that form, or there is no such module or function.
        TypeError: the function takes other arguments, or returned neither a number nor True.
    """
    module, function, arguments, keywords = parse(call)
    try:
        found = getattr(importlib.import_module(f"course.claims.{module}"), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"claim {call!r}: {error}") from error
    with _without_advice():
        result = found(*arguments, **keywords)
    if result is True or (isinstance(result, (int, float)) and not isinstance(result, bool)):
        return result
    raise TypeError(f"claim {call!r} returned {result!r}; a claim gives a number, or True where it is a sentence that holds")


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """What libraries log or warn of while a claim is recomputed is not for those who read it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def pages() -> list[Path]:
    """The Markdown pages that may carry claims: the README, the lessons and their appendices, the slides, and what instructors read."""
    folders = ("lessons", "slides", "teaching")
    return [ROOT / "README.md", ROOT / "TEACHING.md", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.md")))]


def in_page(text: str) -> list[str]:
    """The claims that a page carries, as they are written."""
    return [match["call"] for match in _IN_PAGE.finditer(text)]


def refresh(text: str) -> str:
    """``text`` with every claimed number as its function gives it.

    Raises:
        ValueError: a claim comment has no number right before it.
    """

    def put(match: re.Match) -> str:
        number = format(value(match["call"]), match["format"])
        return f"{number}{match['between']}<!--claim {match['call']} {match['format']}-->"

    refreshed, count = _IN_PAGE.subn(put, text)
    if count != len(_ANY_CLAIM.findall(text)):
        raise ValueError("a claim comment must follow a number directly and read <!--claim module:function(arguments) format-->")
    return refreshed
