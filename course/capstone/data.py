"""Rows in: read, checked, split. Nothing is dropped without a word, and nothing that is asked later is trained on.

The order matters. Repetitions go first, then the split is taken by prompt and not by row, and then rows of the training part whose prompt
is asked go: the other way round a question that stands twice in the file ends up on both sides.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from course.capstone.base import Base
from course.capstone.plan import Plan
from course.lab import instructions, text
from course.units import CourseError
from reference.instruct import Conversation, Example, encode, fit, prepare, read_conversations

SHARE, FEWEST = 0.1, 8  # of the prompts is held out, where no file is; below 8 items there is no interval
COURSE_ROWS, OLD_ROWS, OLD_LENGTH = 240, 64, 48


@dataclass(frozen=True)
class Question:
    """What is asked of a model: the turns before the last, and the answer that would be right."""

    line: int
    messages: tuple[dict[str, str], ...]
    answer: str
    example: Example


@dataclass
class Rows:
    """What a run learns from, what it is asked, and what it must not forget.

    Attributes:
        train: encoded rows.
        asked: the held-out questions.
        replay, old: old text, (rows, length) ids each: what is mixed in, and what is measured.
        words: what became of the rows, in sentences.
        digest: of all of it.
    """

    train: list[Example]
    asked: list[Question]
    replay: Tensor
    old: Tensor
    words: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        content = [[row.ids, row.labels] for row in self.train], [q.example.ids for q in self.asked], self.replay.tolist()
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load(plan: Plan, base: Base) -> Rows:
    """All rows of a plan.

    Raises:
        CourseError: a file is missing; a line of it is not JSON, no conversation, or longer than is allowed where that is an error (each
        with
            file and line); too little is left to train on or to ask.
    """
    longest = getattr(base.model.config, "max_position_embeddings", plan.max_length)
    if plan.max_length > longest:
        raise CourseError(f"max_length is {plan.max_length}, and the base reads {longest} tokens at most")
    words: list[str] = []
    if plan.data == "course":
        if not base.in_the_world:
            raise CourseError('data = "course" is for the tiny model, whose world it is about: give a JSONL file')
        rows, held = of_the_course(plan.seed, 0), asked_of_the_course(plan.ask)
    else:
        rows, held = _read(plan.path("data")), None
    if plan.held_out:
        held = _read(plan.path("held_out"))
    rows = _once(rows, words)
    if held is None:
        prompts = {prompt(row) for row in rows}
        if len(prompts) <= FEWEST:
            words = f"{plan.data} asks {len(prompts)} different prompts, and {FEWEST} at least are held out: nothing is left to train on"
            raise CourseError(f"{words}. Give more rows, or --held-out")
        rows, held = split(rows, plan.seed, never={prompt(row) for row in rows if not _fits(row, plan, base)})
        words.append(f"{len(held)} rows are held out: a tenth of the prompts, chosen by their hash")
    held = _once(held, [])[: plan.ask]
    asked_for = {prompt(each) for each in held}
    clean = [each for each in rows if prompt(each) not in asked_for]
    if len(clean) < len(rows):
        words.append(f"{len(rows) - len(clean)} rows of training are asked in the test too, and are left out")
    train = _encoded(clean, plan, base, words)
    asked = _questions(held, plan, base, words)
    if len(train) < plan.batch:
        raise CourseError(f"{len(train)} rows are left to train on, fewer than one batch of {plan.batch}: {'; '.join(words)}")
    if len(asked) < FEWEST:
        left = f"{len(asked)} rows are left to ask, and below {FEWEST} there is no interval: {'; '.join(words)}"
        raise CourseError(f"{left}. Give --held-out, or more data")
    _unknown_words(base.tokenizer, train + [each.example for each in asked], words)
    replay, old = old_text(plan, base)
    words.append(f"{len(train)} rows to train on, {len(asked)} to ask, {len(old)} of old text")
    return Rows(train, asked, replay, old, words)


def prompt(row: Conversation) -> str:
    """What a row asks, spaces and case aside."""
    return " ".join(" ".join(each["content"].split()).casefold() for each in row.messages[:-1])


def split(
    rows: list[Conversation], seed: int, share: float = SHARE, never: Collection[str] = ()
) -> tuple[list[Conversation], list[Conversation]]:
    """A share of the *prompts* apart, at least 8, by their hash: the same whatever the rows' order, all rows of one prompt on one side.

    Args:
        never: prompts that stay in training, such as those of rows that are too long to be asked.
    """
    prompts = sorted({prompt(row) for row in rows} - set(never), key=lambda each: hashlib.sha256(f"{seed} {each}".encode()).hexdigest())
    held = set(prompts[: max(FEWEST, round(share * len(prompts)))])
    return [row for row in rows if prompt(row) not in held], [row for row in rows if prompt(row) in held]


def of_the_course(seed: int, held_out: int, count: int = COURSE_ROWS) -> list[Conversation]:
    made = instructions.tasks(count, seed, held_out=bool(held_out))
    return [Conversation(line, tuple(each.messages)) for line, each in enumerate(made, 1)]


def asked_of_the_course(ask: int) -> list[Conversation]:
    """What every run on the course's rows is asked: twice as many as are needed, since some repeat others."""
    return of_the_course(10_000, 1, 2 * ask)


def write_course(file: Path, seed: int = 0, count: int = COURSE_ROWS) -> Path:
    """The course's instructions as a JSONL file, to be looked at and changed."""
    lines = [json.dumps({"messages": list(row.messages)}) for row in of_the_course(seed, 0, count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _fits(row: Conversation, plan: Plan, base: Base) -> bool:
    """Whether it can be asked; a row that can't be encoded at all is named later, with its line."""
    try:
        return fit(encode(base.tokenizer, row.messages, "last"), plan.max_length) is not None
    except ValueError:
        return True


def check_files(plan: Plan) -> None:
    """Read what a plan names, before a large base is loaded.

    Raises:
        CourseError: a file is missing, or a line of it is no conversation.
    """
    for name in ("data", "held_out"):
        if (given := getattr(plan, name)) and given != "course" and not _read(plan.path(name)):
            raise CourseError(f"{given} holds no row: write a conversation a line")


def _unknown_words(tokenizer, examples: list[Example], words: list[str]) -> None:
    """Say how many rows hold words that the base has no token for: it learns them as one and the same."""
    unknown = tokenizer.unk_token_id
    if unknown is not None and (rows := sum(unknown in each.ids for each in examples)):
        words.append(f"{rows} of {len(examples)} rows hold words that the base has no token for, and reads as {tokenizer.unk_token}")


def _read(file: Path) -> list[Conversation]:
    if not file.is_file():
        raise CourseError(f"no file {file}: data is JSONL, a conversation a line")
    try:
        return read_conversations(file)[0]
    except UnicodeDecodeError as error:
        raise CourseError(f"{file} is not UTF-8: {error}") from None
    except ValueError as error:
        raise CourseError(f"{file}, {error}") from None


def _once(rows: list[Conversation], words: list[str]) -> list[Conversation]:
    """Without exact repetitions; says where one prompt has several answers."""
    first = {json.dumps(row.messages, sort_keys=True): row for row in reversed(rows)}
    kept = [row for row in rows if first[json.dumps(row.messages, sort_keys=True)] is row]
    if len(kept) < len(rows):
        words.append(f"{len(rows) - len(kept)} rows repeat an earlier one, and are left out")
    prompts = Counter(prompt(row) for row in kept)
    if several := [key for key, count in prompts.items() if count > 1]:
        line = next(row.line for row in kept if prompt(row) == several[0])
        words.append(f"{len(several)} prompts have several answers, the first in line {line}: is each of them right?")
    return kept


def _encoded(rows: list[Conversation], plan: Plan, base: Base, words: list[str]) -> list[Example]:
    overflow = "drop" if plan.overflow == "raise" else plan.overflow
    try:
        train, report = prepare(base.tokenizer, rows, plan.max_length, overflow=overflow)
    except ValueError as error:
        raise CourseError(f"{plan.data}, {error}") from None
    if report.dropped and plan.overflow == "raise":
        first = report.dropped[0]
        raise CourseError(
            f"{plan.data}, line {first.line}: {first.reason}, {first.detail}; max_length is {plan.max_length}. "
            'Raise it, shorten the row, or say overflow = "drop"'
        )
    words += [f"line {each.line} is left out: {each.reason}, {each.detail}" for each in report.dropped[:5]]
    if more := report.dropped[5:]:
        words.append(f"and {len(more)} rows more, such as line {more[0].line}: {more[0].reason}")
    return train


def _questions(rows: list[Conversation], plan: Plan, base: Base, words: list[str]) -> list[Question]:
    found = []
    for row in rows:
        try:
            whole = encode(base.tokenizer, row.messages, "last")
        except ValueError as error:
            raise CourseError(f"held-out rows, line {row.line}: {error}") from None
        if (example := fit(whole, plan.max_length)) is None:
            words.append(f"held-out line {row.line} is left out: {len(whole.ids)} tokens")
            continue
        found.append(Question(row.line, row.messages[:-1], row.messages[-1]["content"], example))
    return found


def old_text(plan: Plan, base: Base) -> tuple[Tensor, Tensor]:
    """Rows of old text to mix in, and others to measure."""
    if plan.old:
        file = plan.path("old")
        if not file.is_file():
            raise CourseError(f"no file {file}: old is a text file, a document a line")
        documents = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        halves = documents[::2], documents[1::2]
        rows = [text.pack(base.tokenizer, dict(enumerate(half)), plan.max_length) for half in halves if half]
        rows += [torch.zeros(0, plan.max_length, dtype=torch.long)] * (2 - len(rows))
        if min(map(len, rows)) < 8:
            raise CourseError(f"{file} makes {len(rows[0])} and {len(rows[1])} rows of {plan.max_length} tokens; 8 of each are needed")
        return rows[0], rows[1][:OLD_ROWS]
    if base.in_the_world:
        world = instructions.world()
        return world.sample("general", 128, OLD_LENGTH, plan.seed + 77), world.sample("general", OLD_ROWS, OLD_LENGTH, 1_000_003)
    return tuple(text.prose_corpus(base.tokenizer, plan.max_length, which, OLD_ROWS) for which in ("manual", "passages"))
