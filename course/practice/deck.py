"""The bank as an Anki deck.

A note's identity comes from its question's id alone, so that importing a later deck updates the notes and keeps what Anki knows of them.
The deck's and the note type's come from their names.
"""

import hashlib
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from course.interview import Question
from course.practice.answers import Answers
from course.practice.bank import Item
from course.practice.words import stars
from course.units import Unit

NAME = "PEFT course"
FIELDS = ("Question", "Short", "Deep", "Rubric", "FollowUps", "Wrong", "Why", "About", "Id")
_FRONT = '<div class="about">{{About}}</div><div class="question">{{Question}}</div>'
_BACK = """{{FrontSide}}<hr id="answer">
<h3>In 30 seconds</h3>{{Short}}
<details open><summary>More</summary>{{Deep}}</details>
{{#Rubric}}<details><summary>A good answer contains</summary>{{Rubric}}</details>{{/Rubric}}
{{#FollowUps}}<details><summary>They may go on</summary>{{FollowUps}}</details>{{/FollowUps}}
<details><summary>Often said, and wrong</summary>{{Wrong}}<p><b>But:</b></p>{{Why}}</details>"""
_CSS = """.card { font: 18px/1.45 system-ui, sans-serif; max-width: 42em; margin: 0 auto; padding: 0 1em; text-align: left; }
.about { font-size: 13px; opacity: .7; margin: .6em 0; }
.question { font-size: 20px; font-weight: 600; }
h3, summary { font-size: 15px; font-weight: 600; color: #2b6cb0; margin: 1em 0 .3em; cursor: pointer; }
.nightMode h3, .nightMode summary { color: #90cdf4; }
code { font-size: .9em; }
table { border-collapse: collapse; } td, th { border: 1px solid #8888; padding: .2em .6em; }"""

_FORMULA = re.compile(r"(?<!\\)\$\$(?P<block>.+?)(?<!\\)\$\$|(?<![\\$])\$(?P<inline>[^$\n]+?)(?<!\\)\$(?!\d)", re.DOTALL)


def _number(name: str) -> int:
    """The same for the same name, in the range that Anki takes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % (1 << 30) + (1 << 30)


def html(markdown: str) -> str:
    """Markdown as HTML, with formulas as Anki's MathJax reads them: ``\\( \\)`` within a line and ``\\[ \\]`` on lines of their own."""
    from markdown_it import MarkdownIt

    kept: list[str] = []

    def keep(match: re.Match) -> str:
        tex = escape(match["block"] or match["inline"], quote=False)
        kept.append(rf"\[{tex}\]" if match["block"] else rf"\({tex}\)")
        return f"\x02{len(kept) - 1}\x03"

    made = MarkdownIt("commonmark", {"html": False}).enable("table").render(_FORMULA.sub(keep, markdown).replace("\\$", "$"))
    return re.sub("\x02(\\d+)\x03", lambda match: kept[int(match[1])], made).strip()


def write(path: Path, items: Sequence[Item], units: Sequence[Unit], answers: Answers) -> int:
    """Write the deck and return how many notes it has.

    Args:
        items: the questions, in order.
        units: for the names of the sub-decks, one a unit.
        answers: computes the numbers.

    Raises:
        CourseError: an answer's numbers could not be computed.
    """
    import genanki

    model = genanki.Model(
        _number(f"{NAME}: question"),
        f"{NAME}: question",
        fields=[{"name": name} for name in FIELDS],
        templates=[{"name": "Question", "qfmt": _FRONT, "afmt": _BACK}],
        css=_CSS,
        sort_field_index=FIELDS.index("Id"),
    )
    stems = {unit.number: unit.title for unit in units}
    decks: dict[str, genanki.Deck] = {}
    answers.ask(*(item.id for item in items))
    for item in items:
        name = f"{NAME}::{item.unit} {stems.get(item.unit, '')}".strip()
        deck = decks.setdefault(item.unit, genanki.Deck(_number(f"{NAME}: unit {item.unit}"), name))
        deck.add_note(genanki.Note(model, _fields(item, answers.get(item.id)), guid=genanki.guid_for(NAME, item.id), tags=tags(item)))
    path.parent.mkdir(parents=True, exist_ok=True)
    genanki.Package(list(decks.values())).write_to_file(str(path))
    return len(items)


def tags(item: Item) -> list[str]:
    """What to filter by in Anki's browser: ``unit::02``, ``kind::estimate``, ``role::research``, ``difficulty::3``, ``asked::often``."""
    roles = [f"role::{role}" for role in item.role]
    return [f"unit::{item.unit}", f"kind::{item.kind}", *roles, f"difficulty::{item.difficulty}", f"asked::{item.frequency}"]


def _fields(item: Item, question: Question) -> list[str]:
    lists = ["\n".join(f"- {line}" for line in lines) for lines in (question.rubric, question.follow_ups)]
    shown = f"{question.question}\n\n{item.how}" if item.how else question.question
    texts = [shown, question.short, question.deep, *lists, question.wrong_answer, question.wrong_why]
    about = f"unit {item.unit} · {item.kind} · {stars(item.difficulty)} · {item.minutes} min"
    return [*map(html, texts), about, item.id]
