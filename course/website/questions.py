"""Pages of the interview questions: one a unit, answers folded, and one with all of them to choose from."""

import dataclasses
import hashlib
import html
import json
from pathlib import Path

from course import interview
from course.interview import Question
from course.units import Unit
from course.website.texts import Links, raw, table

LEVELS = ("", "warm-up", "basic", "solid", "hard", "research")
_WORDS = {
    "kind": ("any kind", *interview.KINDS),
    "difficulty": ("any difficulty", *"12345"),
    "role": ("any role", *interview.ROLES),
    "frequency": ("any frequency", *interview.FREQUENCIES),
}
FILTERS = '<form class="filters" aria-label="Choose questions">' + "".join(
    f'<label>{name} <select name="{name}"><option value="">{words[0]}</option>'
    + "".join(f'<option value="{word}">{word}{f" · {LEVELS[int(word)]}" if name == "difficulty" else ""}</option>' for word in words[1:])
    + "</select></label>"
    for name, words in _WORDS.items()
)
FILTERS += '<output aria-live="polite"></output></form>'


def of(unit: Unit, memory: Path) -> tuple[Question, ...]:
    """The questions of ``unit``, their numbers filled in.

    To compute every number anew takes half a minute for all units, so what was filled in is kept in the folder ``memory`` until something
    that it could depend on has changed.
    """
    kept = memory / f"{unit.stem}.json"
    parts = ("course/interview.py", "course/claimed.py", "course/claims", "course/lab", "reference", "benchmarks/recorded")
    depends_on = [unit.interview, *(path for part in parts for path in _files(unit.root / part))]
    state = hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in depends_on)).hexdigest()
    if kept.exists() and (found := json.loads(kept.read_text(encoding="utf-8")))["state"] == state:
        return tuple(
            Question(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
            for entry in found["questions"]
        )
    questions = interview.questions(unit.number)
    memory.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"state": state, "questions": [dataclasses.asdict(question) for question in questions]}), encoding="utf-8")
    return questions


def _files(path: Path) -> list[Path]:
    """``path`` if it is a file, else what lies under it and can change a number."""
    return [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in (".py", ".json", ".safetensors"))


def page(unit: Unit, questions: tuple[Question, ...], links: Links) -> str:
    """The page of one unit."""
    head = f"# {unit.number} · Interview questions\n\nSay your answer aloud, then unfold. On paper everything is unfolded.\n\n{FILTERS}"
    return "\n\n".join([head, *(_question(question, unit, links) for question in questions)]) + "\n"


def _question(question: Question, unit: Unit, links: Links) -> str:
    def text(markdown: str) -> str:
        return links.page_text(markdown, unit.interview)

    first, *more = question.question.split("\n\n", 1)
    short = len(first) <= 200 and "\n\n" not in first and "```" not in first
    title = " ".join(first.split()) if short else question.id.replace("-", " ").capitalize()
    asked = "\n\n".join(more) if short else question.question
    parts = [f"({question.id})=\n## {text(title)}", _marks(question), text(asked)]
    if question.case:
        parts.append(f"Work on it: `{question.case}`.")
    parts.append(_folded("In 30 seconds", text(question.short)))
    parts.append(_folded("More", text(question.deep)))
    if question.rubric:
        parts.append(_folded("What a good answer contains", "\n".join(f"- {text(line)}" for line in question.rubric)))
    parts.append(_folded("Often said, and wrong", f"{text(question.wrong_answer)}\n\n{text(question.wrong_why)}"))
    if question.follow_ups:
        parts.append(_folded("They may go on", "\n".join(f"- {' '.join(text(follow_up).split())}" for follow_up in question.follow_ups)))
    return "\n\n".join(part for part in parts if part)


def _folded(name: str, body: str) -> str:
    return f'<details class="answer"><summary>{name}</summary>\n\n{body}\n\n</details>'


def _data(question: Question) -> str:
    values = {"kind": question.kind, "difficulty": question.difficulty, "role": " ".join(question.role), "frequency": question.frequency}
    return "data-question " + " ".join(f'data-{name}="{value}"' for name, value in values.items())


def _dots(difficulty: int) -> str:
    dots = "●" * difficulty + "○" * (5 - difficulty)
    said = f'<span class="visually-hidden">difficulty {difficulty} of 5</span>'
    return f'<span class="dots" title="{LEVELS[difficulty]}"><span aria-hidden="true">{dots}</span>{said}</span>'


def _marks(question: Question) -> str:
    words = [
        question.kind,
        f"asked {'rarely' if question.frequency == 'rare' else question.frequency}",
        *question.role,
        f"{question.minutes} min",
    ]
    return f'<p class="marks" {_data(question)}>{_dots(question.difficulty)}' + "".join(f"<span>{word}</span>" for word in words) + "</p>"


def overview(asked: dict[Unit, tuple[Question, ...]]) -> str:
    """The page with all questions; those of one unit are a page that it leads to."""
    rows = []
    for unit, questions in asked.items():
        for question in questions:
            title = html.escape(" ".join(interview.in_terminal(question.question).replace("`", "").replace("*", "").split()))
            title = title if len(title) <= 160 else title[:158].rpartition(" ")[0] + " …"
            cells = (
                f'<a href="lessons/interview/{unit.stem}.html#{question.id}">{title}</a>',
                unit.number,
                f'<span data-value="{question.difficulty}"></span>{_dots(question.difficulty)}',
                question.kind,
                question.frequency,
                ", ".join(question.role),
                str(question.minutes),
            )
            rows.append(f"<tr {_data(question)}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    heads = ("question", "unit", "difficulty", "kind", "asked", "role", "minutes")
    listed = raw(FILTERS + table(heads, rows, "questions", "All questions"))
    said = "Every number in an answer is computed by a function that a test calls. In the terminal: `course quiz`."
    return f"# All questions\n\n{said}\n\n{listed}\n"
