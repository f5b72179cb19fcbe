"""Markdown on its way from a file of the course to a page: comments go, and links lead to pages."""

import html
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

_CODE = re.compile(r"(^(?P<fence>```+|~~~+).*?^(?P=fence)[^\n]*$|(?<!`)(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`))", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()#\s:]+)(?P<heading>#[^()\s]*)?\)")
BRANCH = "main"  # of the repository that links lead to
_AS_IT_IS = re.compile(r"\$[^$]*\$|^#.*$", re.MULTILINE)  # formulas, and headings, whose words become addresses
_UNIT = re.compile(r"(?<=\d)(\*{0,2}) (?=(?:[µm]?s|[kMGT]B|bits?|nats?|%|×(?! ?\d))(?![\w/]))")
_SPECIAL = re.compile(r"([\\\[\]*_`$<>{}|~#])")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """``change`` applied to Markdown, but not to blocks and spans of code in it."""
    kept: list[str] = []

    def keep(match: re.Match) -> str:
        kept.append(match[0])
        return f"\x00{len(kept) - 1}\x00"

    changed = change(_CODE.sub(keep, text))
    return re.sub(r"\x00(\d+)\x00", lambda match: kept[int(match[1])], changed)


def with_units(text: str) -> str:
    """Markdown in which a number and its unit stay on one line."""
    pieces, last = [], 0
    for each in _AS_IT_IS.finditer(text):
        pieces += [_UNIT.sub("\\1\u00a0", text[last : each.start()]), each[0]]
        last = each.end()
    return "".join([*pieces, _UNIT.sub("\\1\u00a0", text[last:])])


def escape(text: str) -> str:
    """Plain text as Markdown that shows it."""
    return _SPECIAL.sub(r"\\\1", text)


def raw(body: str) -> str:
    """HTML inside Markdown."""
    return f"``````{{raw}} html\n{body}\n``````" if body else ""


def table(heads: Iterable[str], rows: Iterable[str], kind: str, label: str) -> str:
    """An HTML table that sorts at a click on its heads and scrolls by itself. ``rows`` are HTML: ``<tr>…</tr>``."""
    head = "".join(f"<th>{name}</th>" for name in heads)
    opening = f'<div class="scroll"><table class="sortable {kind}" aria-label="{html.escape(label)}">'
    return f"{opening}<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


@dataclass
class Links:
    """Where links of the course's files lead on the site.

    Attributes:
        root: the course's folder.
        pages: file or folder of the course -> page's source under the site's sources, perhaps with a heading: ``reference/nf4.md#x``.
        repository: address of the course's repository, for files that have no page; "" if it is in none.
        pictures: pictures that pages show, to be copied; filled as texts are read.
    """

    root: Path
    pages: dict[Path, str]
    repository: str = ""
    pictures: set[Path] = field(default_factory=set)

    def page_text(self, text: str, source: Path) -> str:
        """The Markdown ``text`` of the file ``source`` as its page has it."""

        def change(text: str) -> str:
            return _LINK.sub(lambda match: self._link(match, source), with_units(_COMMENT.sub("", text)))

        return outside_code(text, change)

    def _link(self, match: re.Match, source: Path) -> str:
        target = Path(os.path.normpath(source.parent / match["target"]))
        text, heading = match["text"], match["heading"] or ""
        if match["picture"]:
            if target.is_file() and target.is_relative_to(self.root):
                self.pictures.add(target)
            return match[0]
        text = _LINK.sub(lambda inner: self._link(inner, source), text)
        if target in self.pages:
            page, _, there = self.pages[target].partition("#")
            here = PurePosixPath(self.pages.get(source, source.relative_to(self.root).as_posix())).parent
            return f"[{text}]({os.path.relpath(page, here)}{heading or (there and '#' + there)})"
        if not target.exists() or not target.is_relative_to(self.root):
            return match[0]
        if self.repository:
            return f"[{text}]({self.repository}/blob/{BRANCH}/{target.relative_to(self.root).as_posix()}{heading})"
        return text
