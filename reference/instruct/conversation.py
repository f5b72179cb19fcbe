"""Conversations as they are read: checked, numbered by their lines, and nothing lost silently.

A row is ``{"messages": [{"role": "user", "content": …}, {"role": "assistant", …}]}`` or
``{"instruction": …, "input": …, "output": …}``. What is wrong with a row is said with its line. It
is an error, or, if asked for, a row dropped: then it is in the report, with the reason.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Dropped:
    """A row that is not used: its line, the kind of reason, and what exactly is wrong."""

    line: int
    reason: str
    detail: str


@dataclass
class Report:
    """What became of all rows."""

    kept: int = 0
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> rows, the most frequent first."""
        return dict(Counter(each.reason for each in self.dropped).most_common())

    def __str__(self) -> str:
        lines = [f"{self.kept} rows kept, {len(self.dropped)} dropped"]
        for reason, count in self.counts.items():
            first = next(each for each in self.dropped if each.reason == reason)
            lines.append(f"  {count} × {reason}; line {first.line}: {first.detail}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Conversation:
    """Messages, and the line that they come from."""

    line: int
    messages: tuple[Message, ...]


def check_conversation(messages: Sequence[Message], reserved: Sequence[str] = ()) -> None:
    """Raise unless a model can learn from it: [system], then user and assistant in turn.

    Args:
        reserved: texts that no turn may hold, the template's special tokens.

    Raises:
        TypeError: it is no list of dictionaries with two texts.
        ValueError: it is empty, starts with the assistant, ends with the user, has two turns of
            one role in a row, an empty turn, an unknown role or a reserved text.
    """
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages must be a list, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty: give it a user's and an assistant's turn")
    expected = "user"
    for turn, message in enumerate(messages, 1):
        role, content = _role_and_content(message, turn)
        if role not in ROLES:
            raise ValueError(f"turn {turn}: unknown role {role!r}; use {', '.join(ROLES)}")
        if not content.strip():
            raise ValueError(f"turn {turn}: the {role}'s turn is empty: leave the row out")
        if found := [token for token in reserved if token in content]:
            raise ValueError(
                f"turn {turn}: the text holds the special token {found[0]!r}, which would be read "
                "as the template's own: take it out of the text"
            )
        if role == "system":
            if turn > 1:
                raise ValueError(f"turn {turn}: a system turn comes first or not at all")
            continue
        if role != expected:
            raise ValueError(
                f"turn {turn}: expected the {expected}, got the {role}: users and assistants take "
                "turns, and the user begins"
            )
        expected = "assistant" if role == "user" else "user"
    if expected != "user" or messages[-1]["role"] == "system":
        raise ValueError("the last turn is not the assistant's: there is nothing to learn from it")


def read_conversations(
    source: Path | Iterable[str], on_error: str = "raise", reserved: Sequence[str] = ()
) -> tuple[list[Conversation], Report]:
    """Conversations of a JSONL file, or of its lines; blank lines are allowed.

    Args:
        on_error: "raise" at the first row that is wrong, or "drop" it and say so in the report.
        reserved: see :func:`check_conversation`.

    Raises:
        ValueError: a line is not JSON or no conversation; the message says which and why. Or
            ``on_error`` is neither word.
    """
    if on_error not in ("raise", "drop"):
        raise ValueError(f"on_error must be 'raise' or 'drop', got {on_error!r}")
    lines = source.read_text(encoding="utf-8").split("\n") if isinstance(source, Path) else source
    kept, report = [], Report()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        reason = "not JSON"
        try:
            row = json.loads(line)
            reason = "no conversation"
            messages = as_messages(row)
            check_conversation(messages, reserved)
        except (ValueError, TypeError) as error:  # JSONDecodeError is a ValueError
            if on_error == "raise":
                raise ValueError(f"line {number}: {reason}: {error}") from error
            report.dropped.append(Dropped(number, reason, str(error)))
            continue
        kept.append(Conversation(number, tuple(messages)))
    report.kept = len(kept)
    return kept, report


def as_messages(row: Any) -> list[Message]:
    """Of a row in one of the two forms.

    Raises:
        TypeError: it is no dictionary, or holds something else than texts.
        ValueError: it has neither "messages" nor "instruction" and "output".
    """
    if not isinstance(row, dict):
        raise TypeError(f"a row must be a dictionary, got {type(row).__name__}")
    if "messages" in row:
        return row["messages"]
    if not {"instruction", "output"} <= set(row):
        raise ValueError(
            f"the row has the keys {', '.join(sorted(row)) or '(none)'}; it needs 'messages', or "
            "'instruction' and 'output'"
        )
    texts = {key: row.get(key) or "" for key in ("instruction", "input", "output")}
    if wrong := [key for key, text in texts.items() if not isinstance(text, str)]:
        raise TypeError(f"{wrong[0]!r} must be a text, got {texts[wrong[0]]!r}")
    parts = [texts["instruction"], texts["input"]]
    return [
        {"role": "user", "content": "\n\n".join(part for part in parts if part.strip())},
        {"role": "assistant", "content": texts["output"]},
    ]


def _role_and_content(message: Any, turn: int) -> tuple[str, str]:
    if not (isinstance(message, dict) and {"role", "content"} <= set(message)):
        raise TypeError(f"turn {turn}: a message is {{'role': …, 'content': …}}, got {message!r}")
    role, content = message["role"], message["content"]
    if not (isinstance(role, str) and isinstance(content, str)):
        raise TypeError(f"turn {turn}: role and content must be texts, got {role!r}, {content!r}")
    return role, content
