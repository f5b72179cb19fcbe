"""Numbers in prose are held by code: a claim is the name of a function that recomputes or measures it.

``svd:rank_of_update`` names ``course.claims.svd.rank_of_update()``. It returns a number, which the text states, or True, where the claim is
a sentence. Questions (YAML) put the number in by name, ``{rank:.0f}``. Pages (Markdown) state it and carry the claim behind it in a
comment that readers don't see,

    it saves **0.373** <!--claim double_quantization:saved_bits .3f--> bits

where the number right before the comment (bold or not, with thousands separators or not) is what ``course build`` keeps right and a
test holds.
"""

import functools
import importlib
import re
from pathlib import Path

from course import ROOT

_IN_PAGE = re.compile(
    r"(?P<number>[−-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?P<between>[*%]*\s*)<!--claim (?P<name>[\w:]+) (?P<format>[^\s>]+)-->"
)
_ANY_CLAIM = re.compile(r"<!--claim\b")


@functools.cache
def value(name: str) -> float | bool:
    """Call the claim ``module:function`` and return what it gives.

    Raises:
        ValueError: the name is not of that form, or there is no such module or function.
        TypeError: it returned neither a number nor True.
    """
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"claim {name!r} must read module:function")
    try:
        call = getattr(importlib.import_module(f"course.claims.{module}"), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"claim {name!r}: {error}") from error
    result = call()
    if result is True or (isinstance(result, (int, float)) and not isinstance(result, bool)):
        return result
    raise TypeError(f"claim {name!r} returned {result!r}; a claim gives a number, or True where it is a sentence that holds")


def pages() -> list[Path]:
    """The Markdown pages that may carry claims: the README and the lessons."""
    return [ROOT / "README.md", *sorted((ROOT / "lessons").glob("*.md"))]


def refresh(text: str) -> str:
    """``text`` with every claimed number as its function gives it.

    Raises:
        ValueError: a claim comment has no number right before it.
    """

    def put(match: re.Match) -> str:
        number = format(value(match["name"]), match["format"])
        return f"{number}{match['between']}<!--claim {match['name']} {match['format']}-->"

    refreshed, count = _IN_PAGE.subn(put, text)
    if count != len(_ANY_CLAIM.findall(text)):
        raise ValueError("a claim comment must follow a number directly and read <!--claim module:function format-->")
    return refreshed
