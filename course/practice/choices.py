"""Multiple choice: ``lessons/interview/choices/NN_topic.yaml``, by the id of the bank's question that each item asks about.

An item is one right and some wrong options, every one with the reason why. jupyterquiz shows them in a notebook; what is chosen first is
kept in the journal.
"""

import html
import json
import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from course import claimed, interview
from course.practice import bank
from course.practice.journal import Journal, Review
from course.practice.memory import Known, memory
from course.units import CourseError, find, units

FOLDER = interview.FOLDER / "choices"


@dataclass(frozen=True)
class Option:
    """One option; texts are plain, with formulas in Unicode."""

    say: str
    why: str
    right: bool = False


@dataclass(frozen=True)
class Multiple:
    """One item.

    Attributes:
        id: of the bank's question that has the long answer.
        options: the right one first.
        unit, difficulty: those of the bank's question.
    """

    id: str
    ask: str
    options: tuple[Option, ...]
    unit: str
    difficulty: int


def _read(name: str, entry: dict, item: bank.Item, source: str) -> Multiple:
    if set(entry) != {"ask", "right", "wrong", "claims"}:
        raise ValueError(f"{source}: {name!r} must have ask, right, wrong and claims, got {', '.join(sorted(entry))}")
    options = [entry["right"], *entry["wrong"]]
    texts = [entry["ask"], *(text for option in options for text in (option["say"], option["why"]))]
    if bare := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{source}: {name!r}: put quotes around {bare[0]!r}; YAML reads it as a number")
    used = set().union(*map(interview.placeholders, texts))
    if unknown := used - set(entry["claims"]):
        raise ValueError(f"{source}: {name!r} uses {', '.join(sorted(unknown))} without a claim")
    values = {number: claimed.value(call) for number, call in entry["claims"].items()}
    if idle := [number for number, value in values.items() if number not in used and value is not True]:
        raise ValueError(f"{source}: {name!r} never states {', '.join(idle)}")
    made = [Option(each["say"].format(**values), each["why"].format(**values), each is entry["right"]) for each in options]
    if len({option.say for option in made}) < len(made):
        raise ValueError(f"{source}: {name!r} has two options that read alike: {', '.join(option.say for option in made)}")
    return Multiple(name, entry["ask"].format(**values), tuple(made), item.unit, item.difficulty)


def load(unit: str | Sequence[str] = (), difficulty: str | None = None, folder: Path | None = None) -> list[Multiple]:
    """The items of some units, or of all, in file order; their numbers are computed.

    Args:
        unit: a number or a topic, or several.
        difficulty: a number from 1 to 5 or a range such as "2-4".

    Raises:
        CourseError: no item is chosen, or a unit or the difficulty is not known.
        ValueError: a file has an item that the bank lacks, or one that is not whole.
    """
    names = [unit] if isinstance(unit, str) else list(unit)
    choice = bank.choice([find(name).number for name in names], difficulty=difficulty)
    known = {item.id: item for item in bank.items()}
    found = []
    for path in sorted((folder or FOLDER).glob("*.yaml")):
        for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            if name not in known:
                raise ValueError(f"{path.name}: the bank has no question {name!r}")
            if choice.takes(known[name]):
                found.append(_read(name, entry, known[name], path.name))
    if not found:
        raise CourseError(f"there is no multiple choice for {choice.words()}")
    return found


def as_jupyterquiz(items: Iterable[Multiple]) -> list[dict]:
    """As jupyterquiz reads it."""
    return [
        {
            "question": html.escape(item.ask),
            "type": "multiple_choice",
            "answers": [
                {"answer": html.escape(option.say), "correct": option.right, "feedback": html.escape(option.why)} for option in item.options
            ],
        }
        for item in items
    ]


_COLOURS = {
    "--jq-multiple-choice-bg": "#0b3d5c",
    "--jq-mc-button-bg": "#f5f7f9",
    "--jq-mc-button-border": "#c5d0d9",
    "--jq-mc-button-inset-shadow": "#8899a6",
    "--jq-text-color": "#ffffff",
    "--jq-link-color": "#9abafa",
    "--jq-incorrect-color": "#c4322b",
    "--jq-correct-color": "#16803a",
}
_LISTEN = """
(function () {
  const first = {};
  document.getElementById("BOX").addEventListener("click", (event) => {
    const label = event.target.closest("label");
    if (!label) return;
    const number = label.closest(".Quiz").dataset.qnum;
    if (number in first) return;
    first[number] = label.dataset.correct === "true";
    const field = document.querySelector(".choices-BOX input");
    if (!field) return;
    field.value = JSON.stringify(first);
    field.dispatchEvent(new Event("input", {bubbles: true}));
    field.dispatchEvent(new Event("change", {bubbles: true}));
  }, true);
})();
"""


def ask(
    unit: str | Sequence[str] = (),
    difficulty: str | None = None,
    number: int | None = None,
    seed: int | None = None,
    journal: Journal | None = None,
) -> None:
    """Show multiple choice in a notebook. The first choice for each question is kept; one may go on choosing to read every explanation.

    Args:
        unit, difficulty: as :func:`load` takes them.
        number: at most so many, drawn at random; all, in the course's order, by default.
        seed: for the draw.
        journal: where choices are kept.
    """
    import ipywidgets
    from IPython.display import HTML, Javascript, display

    items = load(unit, difficulty)
    if number is not None and number < len(items):
        items = random.Random(seed).sample(items, number)
    box, page, script = _rendered(items)
    keep = _Kept(items, journal or Journal())
    field = ipywidgets.Text(layout=ipywidgets.Layout(display="none"))
    field.add_class(f"choices-{box}")
    field.observe(lambda change: keep(change["new"]), "value")
    display(HTML(page))
    display(field)  # a page can tell its kernel something through a widget alone
    display(Javascript(script))


def _rendered(items: Sequence[Multiple]) -> tuple[str, str, str]:
    """The box's id, and what jupyterquiz shows as HTML and JavaScript; without MathJax, which it would fetch and no text here needs."""
    from jupyterquiz.dynamic import loader, renderer

    box = "".join(random.choices(string.ascii_letters, k=12))
    before, static, address = loader.load_questions_script(as_jupyterquiz(items), box)
    page = renderer.render_div(box, False, True, False, len(items), 760, 10, "left") + renderer.build_styles(box, _COLOURS) + "</div>"
    script = renderer.build_script(before, static, address, box, True)
    script = re.sub(r"script\.src = 'https?://[^']*';", "", script.replace("typeof MathJax", "typeof undefined"))
    return box, page, script + _LISTEN.replace("BOX", box)


class _Kept:
    """Writes each question's first choice into the journal, once."""

    def __init__(self, items: Sequence[Multiple], journal: Journal) -> None:
        self.items, self.journal, self.done = items, journal, set()

    def __call__(self, said: str) -> None:
        for number, right in json.loads(said).items():
            if number not in self.done:
                self.done.add(number)
                self.journal.add(Review(self.items[int(number)].id, 3 if right else 1, "choice"))


@dataclass(frozen=True)
class Progress:
    """How far one unit has come.

    Attributes:
        questions: in the bank.
        seen: asked in a quiz or an interview, but not yet held.
        held: expected to be known three weeks from their last rating on.
        right, chosen: multiple choice: right the last time, and asked at all.
    """

    unit: str
    questions: int
    seen: int
    held: int
    right: int
    chosen: int


HELD_DAYS = 21.0


def progress(journal: Journal | None = None) -> list[Progress]:
    """Unit by unit, from the journal."""
    reviews = (journal or Journal()).reviews()
    known: dict[str, Known] = memory(reviews)
    last = {review.question: review.rating >= 3 for review in reviews if review.by == "choice"}
    found = []
    items = bank.items()
    for unit in units():
        names = [item.id for item in items if item.unit == unit.number]
        if names:
            held = sum(name in known and known[name].stability_days >= HELD_DAYS for name in names)
            seen = sum(name in known for name in names) - held
            chosen = [last[name] for name in names if name in last]
            found.append(Progress(unit.number, len(names), seen, held, sum(chosen), len(chosen)))
    return found


def aloud(*names: str) -> None:
    """Show questions of the bank in a notebook, each with its answer folded in steps: say yours first.

    Raises:
        CourseError: the bank has no such question.
    """
    from IPython.display import Markdown, display

    from course.practice import words

    entries = {entry["id"]: (source, entry) for source, entry in bank.written()}
    for name in names:
        if name not in entries:
            raise CourseError(f"the bank has no question {name!r}")
        question = interview.question(*entries[name])
        folds = "".join(f"<details><summary>{title}</summary>\n\n{text}\n\n</details>\n" for title, text in words.steps(question))
        display(Markdown(f"**{question.question}**\n\n{folds}"))
