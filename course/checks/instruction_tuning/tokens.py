"""Exercise 2: two <bos>. A rendered conversation is tokenized like any text."""

import random
from collections.abc import Mapping

from course.checking import Check, NotYet, Seen, but
from course.lab.chat import FORMS, chat_tokenizer
from reference.instruct import render_ids

Messages = list[dict[str, str]]
WORDS = "why does the river carry stones after a storm and the old harbour sleep in winter".split()


def to_ids(
    tokenizer,
    messages: Messages,
    *,
    text=lambda tokenizer, messages: tokenizer.apply_chat_template(messages, tokenize=False),
    special=False,
    ids=lambda ids, tokenizer: ids,
) -> list[int]:
    """The worked answer: the template has written every special token, so the tokenizer adds none."""
    return ids(list(tokenizer(text(tokenizer, messages), add_special_tokens=special)["input_ids"]), tokenizer)


def as_one(tokenizer, messages: Messages) -> list[int]:
    return render_ids(tokenizer, messages)


def without_template(tokenizer, messages: Messages) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def with_prompt(tokenizer, messages: Messages) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def without_double(ids: list[int], tokenizer) -> list[int]:
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def each_exchange_alone(tokenizer, messages: Messages) -> list[int]:
    pairs = [messages[i : i + 2] for i in range(0, len(messages), 2)]
    return [token for pair in pairs for token in render_ids(tokenizer, pair)]


def no_bos_any_more(tokenizer, messages: Messages) -> list[int]:
    tokenizer.backend_tokenizer.post_processor = None
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]


def conversation(rng: random.Random, exchanges: int) -> Messages:
    said = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(2 * exchanges)]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    for form in rng.sample(FORMS, len(FORMS)):
        tokenizer, messages = chat_tokenizer(form), conversation(rng, rng.randint(2, 3))
        plain = list(tokenizer("a storm")["input_ids"])
        ids = answer(tokenizer, messages)
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            more = ': of what the tokenizer gives take ["input_ids"]' if isinstance(ids, Mapping) else ""
            raise NotYet(f"return a list of ids, of one conversation, not {type(ids).__name__}{more}")
        yield f"the first tokens, {form}", tokenizer.convert_ids_to_tokens(ids[:3])
        yield f"the ids, {form}", ids
        yield f"{form}: the tokenizer still does with plain text what it did", list(tokenizer("a storm")["input_ids"]) == plain


check = Check(
    task="a conversation in tokens, with the special ones once",
    observe=observe,
    reference=to_ids,
    second=as_one,
    misconceptions={
        "the template writes <bos>, and the tokenizer puts another one in front: render to tokens in one call, or tokenize the text with "
        "add_special_tokens=False": but(special=True),
        "the first token is always cut off: some templates write no <bos>, and lose their first token then; add none instead of taking "
        "one off": but(ids=lambda ids, tokenizer: ids[1:]),
        "one of two <bos> is taken off: where the template writes none, the tokenizer's own stays in front; have it add none": but(
            special=True, ids=without_double
        ),
        "all <bos> are taken out: the model was trained with one in front, where its template writes it": but(
            ids=lambda ids, tokenizer: [token for token in ids if token != tokenizer.bos_token_id]
        ),
        "the tokenizer itself was changed: <bos> is now missing from plain text too; leave it as it is": no_bos_any_more,
        "the template is not used: roles in plain words are no marks that the model knows": but(text=without_template),
        "the prompt for one more answer is at the end: it belongs there to generate, not behind a finished conversation": but(
            text=with_prompt
        ),
        "each exchange is rendered by itself: what the template writes once per conversation then comes several times; render the "
        "whole": each_exchange_alone,
    },
)
