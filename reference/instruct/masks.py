"""Which tokens of a conversation a model is trained to say: its own turns, and the end of them.

A chat template writes a conversation as one text, with marks for who speaks. The model then sees
ids t₁ … t_n and is trained on the targets only:

    L = (1 / |I|) Σ_{i ∈ I} −log p(t_i | t_<i),    I = the places of the assistant's turns

A label of −100 takes a token out of I. Everything depends on finding I *in the tokens*. So each
boundary is found by rendering twice: the conversation up to a turn with the template's own prompt
for an answer, and the whole of it. Where the two stop being equal the answer begins. Nothing is
searched for, no piece is tokenized apart from its context, and no id decides by itself: an end of
turn stays a target though padding may have the same id.

The tokenizer is any that has ``apply_chat_template`` as those of transformers do.

Source: the rule of TRL's SFTTrainer for prompt and completion; Ouyang et al. 2022 for the idea.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reference.instruct.conversation import Message, check_conversation

IGNORED = -100  # the label that cross-entropy leaves out
TRAIN_ON = ("assistant", "last", "all")
BOUNDARIES = ("rendered", "markers")


@dataclass(frozen=True)
class Example:
    """One row to train on.

    Attributes:
        ids: token ids, (n,).
        labels: the id where it is a target, ``IGNORED`` elsewhere, (n,); not shifted.
        seam: tokens of the prompt alone that are cut otherwise once the answer follows. The model
            never trains on them, and at inference it will see them.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    seam: int = 0

    @property
    def targets(self) -> int:
        """How many tokens can be learned from; the first of a row has nothing before it."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    tokenizer,
    messages: Sequence[Message],
    train_on: str = "assistant",
    boundaries: str = "rendered",
    reserved: Sequence[str] | None = None,
) -> Example:
    """A conversation as ids and labels.

    Args:
        messages: {"role": …, "content": …} each; see :func:`check_conversation`.
        train_on: the tokens of every turn of the "assistant", of the "last" one, or "all" tokens.
        boundaries: "rendered" finds turns by rendering the conversation up to them; "markers"
            trusts the template's {% generation %} blocks.
        reserved: texts that no turn may hold; None asks the tokenizer, once for every call.

    Raises:
        ValueError: the conversation is malformed, the template does not render it, writes its
            beginning otherwise once more follows, starts it with two <bos>, or has no markers.
    """
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on!r}")
    if boundaries not in BOUNDARIES:
        raise ValueError(f"boundaries must be one of {', '.join(BOUNDARIES)}, got {boundaries!r}")
    check_conversation(messages, special_tokens(tokenizer) if reserved is None else reserved)
    ids = render_ids(tokenizer, messages)  # (n,)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise ValueError("the template starts with two <bos>: take one out of it")
    if train_on == "all":
        return Example(tuple(ids), tuple(ids))
    if boundaries == "markers":
        spans, seam = marked_spans(tokenizer, messages, len(ids)), 0
    else:
        spans, seam = rendered_spans(tokenizer, messages, ids, train_on == "last")
    if train_on == "last":
        spans = spans[-1:]
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return Example(tuple(ids), tuple(labels), seam)


def rendered_spans(
    tokenizer, messages: Sequence[Message], ids: list[int], last_only: bool = False
) -> tuple[list[tuple[int, int]], int]:
    """Where each turn of the assistant begins and ends in ``ids``; and the longest seam."""
    text, spans, seam = render(tokenizer, messages), [], 0
    for turn, message in enumerate(messages):
        last = turn + 1 == len(messages)
        if message["role"] != "assistant" or (last_only and not last):
            continue
        before = messages[:turn]
        prompt = render_ids(tokenizer, before, True)
        start = shared(prompt, ids)
        end = len(ids) if last else shared(render_ids(tokenizer, messages[: turn + 1]), ids)
        if end <= start or not text.startswith(render(tokenizer, before, True)):
            raise ValueError(
                f"turn {turn + 1}: the template writes it, or what is before it, otherwise once "
                "more follows, so its place is not defined: cut each conversation at the turn to "
                "train on (train_on='last'), or use a template that only appends"
            )
        spans.append((start, end))
        seam = max(seam, len(prompt) - start)
    return spans, seam


def marked_spans(tokenizer, messages: Sequence[Message], length: int) -> list[tuple[int, int]]:
    """The runs of tokens inside {% generation %} blocks."""
    if not has_markers(tokenizer.chat_template):
        raise ValueError(
            "the chat template has no {% generation %} block, so nothing would be a target: put "
            "one around what the assistant says, its end of turn included, or use "
            "boundaries='rendered'"
        )
    mask = _applied(tokenizer, messages, tokenize=True, return_assistant_tokens_mask=True)
    mask = [0, *mask["assistant_masks"], 0]
    changes = [i for i in range(length + 1) if mask[i] != mask[i + 1]]
    spans = list(zip(changes[::2], changes[1::2], strict=True))
    if not spans:
        raise ValueError("the template's {% generation %} blocks hold no token here")
    return spans


def has_markers(template: str | None) -> bool:
    """Whether a template says what the assistant's words are."""
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template or ""))


def render(tokenizer, messages: Sequence[Message], prompt: bool = False) -> str:
    """The template's text; with ``prompt`` also the beginning of an answer.

    Raises:
        ValueError: the template fails; the message holds what it says.
    """
    return _applied(tokenizer, messages, tokenize=False, add_generation_prompt=prompt)


def render_ids(tokenizer, messages: Sequence[Message], prompt: bool = False) -> list[int]:
    """The same in tokens, with the special ones that the template writes and no others."""
    found = _applied(tokenizer, messages, tokenize=True, add_generation_prompt=prompt)
    return list(found["input_ids"])


def special_tokens(tokenizer) -> tuple[str, ...]:
    """Texts that a template alone may write: in a turn they would end it, or begin another's."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return tuple(token.content for token in added.values() if token.special)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _applied(tokenizer, messages: Sequence[Message], **settings) -> str | Mapping:
    try:
        return tokenizer.apply_chat_template(list(messages), return_dict=True, **settings)
    except Exception as error:  # a template's own errors are of many types
        raise ValueError(
            f"the chat template does not render this conversation: {error}. Change the "
            "conversation or the template"
        ) from error
