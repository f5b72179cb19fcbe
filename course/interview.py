"""The question bank: ``lessons/interview/NN_topic.yaml``, read, checked and filled in."""

import functools
import re
import string
from dataclasses import dataclass

import unicodeit
import yaml

from course import ROOT, claimed

FOLDER = ROOT / "lessons" / "interview"
FIELDS = {"id", "question", "difficulty", "minutes", "unit", "sources", "short", "deep", "follow_ups", "wrong", "claims"}
SORTING = {"kind", "frequency", "role"}  # what a question can be chosen by, besides unit and difficulty
KINDS = ("concept", "derivation", "estimate", "debugging", "coding", "design")
FREQUENCIES = ("often", "sometimes", "rare")
ROLES = ("research", "applied", "infrastructure")


@dataclass(frozen=True)
class Question:
    """One question with its answers; texts are Markdown, numbers already filled in.

    Attributes:
        id: unique in the course, words joined by hyphens.
        difficulty: 1 (warm-up) to 5 (research).
        minutes: what a good answer takes.
        unit: two digits.
        sources: ids of the notes that it answers, such as S1.6.
        short: what to say in 30 seconds.
        follow_ups: each a question with its answer in parentheses.
        wrong_answer, wrong_why: what is commonly said, and why it is wrong.
        claims: name in the text -> module:function.
        kind: one of KINDS: what the candidate has to do.
        frequency: one of FREQUENCIES: how often it is asked.
        role: some of ROLES: in interviews for which work.
        rubric: for a design, what a good answer contains, a line each; the first is what must not be missing.
        case: for debugging, the name of the script under ``course/cases``; for coding, the exercise, such as "02.1"; else "".
    """

    id: str
    question: str
    difficulty: int
    minutes: int
    unit: str
    sources: tuple[str, ...]
    short: str
    deep: str
    follow_ups: tuple[str, ...]
    wrong_answer: str
    wrong_why: str
    claims: dict[str, str]
    kind: str = "concept"
    frequency: str = "sometimes"
    role: tuple[str, ...] = ("applied",)
    rubric: tuple[str, ...] = ()
    case: str = ""


def placeholders(text: str) -> set[str]:
    """The names in braces in ``text``. Write a literal brace, as in LaTeX, twice: ``{{`` and ``}}``."""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def _read(entry: dict, source: str) -> Question:
    if missing := FIELDS - set(entry):
        raise ValueError(f"{source}: question {entry.get('id', '?')!r} lacks {', '.join(sorted(missing))}")
    if extra := set(entry) - FIELDS - SORTING - {"rubric", "case"}:
        raise ValueError(f"{source}: question {entry['id']!r} has unknown fields {', '.join(sorted(extra))}")
    for field, known in (("kind", KINDS), ("frequency", FREQUENCIES), ("role", ROLES)):
        given = entry.get(field, known[0])
        if unknown := set(given if isinstance(given, list) else [given]) - set(known):
            raise ValueError(f"{source}: question {entry['id']!r}: {field} must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    wrong, rubric = entry["wrong"], entry.get("rubric", [])
    texts = [entry["question"], entry["short"], entry["deep"], *entry["follow_ups"], wrong["answer"], wrong["why"], *rubric]
    used = set().union(*map(placeholders, texts))
    if unknown := used - set(entry["claims"]):
        raise ValueError(f"{source}: question {entry['id']!r} uses {', '.join(sorted(unknown))} without a claim")
    values = {name: claimed.value(claim) for name, claim in entry["claims"].items()}  # claims that no text uses are sentences: they run too
    if idle := [name for name in entry["claims"] if name not in used and values[name] is not True]:
        raise ValueError(f"{source}: question {entry['id']!r} never states {', '.join(idle)}")

    def fill(text: str) -> str:
        return text.format(**values).strip()

    return Question(
        id=entry["id"],
        question=fill(entry["question"]),
        difficulty=entry["difficulty"],
        minutes=entry["minutes"],
        unit=entry["unit"],
        sources=tuple(entry["sources"]),
        short=fill(entry["short"]),
        deep=fill(entry["deep"]),
        follow_ups=tuple(map(fill, entry["follow_ups"])),
        wrong_answer=fill(entry["wrong"]["answer"]),
        wrong_why=fill(entry["wrong"]["why"]),
        claims=dict(entry["claims"]),
        rubric=tuple(map(fill, rubric)),
        role=tuple(entry.get("role", Question.role)),
        **{field: entry[field] for field in ("kind", "frequency", "case") if field in entry},
    )


_FORMULA = re.compile(r"(?<!\\)\$([^$\n]+)\$")
_BRACED = re.compile(r"\\(sqrt|text|mathrm|operatorname)\{([^{}]*)\}")


def in_terminal(text: str) -> str:
    """``text`` with its formulas, LaTeX between dollar signs, in Unicode: ``$\\sigma_{r+1}$`` as σᵣ₊₁."""

    def put(match: re.Match) -> str:
        formula = _BRACED.sub(lambda part: f"√({part[2]})" if part[1] == "sqrt" else part[2], match[1])
        return unicodeit.replace(formula.replace(r"^\top", "ᵀ"))

    return _FORMULA.sub(put, text)


@functools.cache
def questions(unit: str | None = None) -> tuple[Question, ...]:
    """All questions, or those of one unit ("02"), in file order; every claim is recomputed.

    Raises:
        ValueError: a question lacks a field, uses a number without a claim, or repeats an id.
    """
    found = []
    for path in sorted(FOLDER.glob(f"{unit or ''}*.yaml")):
        found += [_read(entry, path.name) for entry in yaml.safe_load(path.read_text())]
    ids = [question.id for question in found]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise ValueError(f"question ids must be unique: {', '.join(sorted(twice))}")
    return tuple(found)
