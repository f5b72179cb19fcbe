"""Exercise 3: no target, or the wrong ones. A marker is searched for in tokens, and the template has no generation blocks."""

import random

from course.checking import Check, NotYet, Seen, but
from course.checks.instruction_tuning.tokens import Messages, conversation
from course.lab.chat import FORMS, chat_tokenizer
from reference.instruct import encode, render_ids, shared


def labels(
    tokenizer,
    messages: Messages,
    *,
    turns=lambda found: found,
    prompt=lambda tokenizer, before: render_ids(tokenizer, before, True),
    start=lambda prompt, ids: shared(prompt, ids),
    upto=lambda tokenizer, messages: render_ids(tokenizer, messages),
    end=lambda upto, ids, start: shared(upto, ids),
) -> list[int]:
    """The worked answer: a turn lies between two renderings that stop being equal to the whole one."""
    ids = render_ids(tokenizer, messages)
    found = [-100] * len(ids)
    for turn in turns([i for i, message in enumerate(messages) if message["role"] == "assistant"]):
        first = start(prompt(tokenizer, messages[:turn]), ids)
        last = end(upto(tokenizer, messages[: turn + 1]), ids, first)
        found[first:last] = ids[first:last]
    return found


def by_the_reference(tokenizer, messages: Messages) -> list[int]:
    return list(encode(tokenizer, messages).labels)


def marker_of(tokenizer, messages: Messages) -> str:
    """What the template writes in front of an answer."""
    plain = tokenizer.apply_chat_template(messages[:1], tokenize=False)
    return tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)[len(plain) :].strip() or "[/INST]"


def behind(tokenizer, messages: Messages, which: int) -> list[int]:
    """All behind the first or the last place where the marker's ids stand, found from the marker tokenized alone."""
    ids = render_ids(tokenizer, messages)
    piece = tokenizer(marker_of(tokenizer, messages), add_special_tokens=False)["input_ids"]
    places = [i for i in range(len(ids)) if ids[i : i + len(piece)] == piece]
    first = places[which] + len(piece) if places else len(ids)
    return [-100] * first + ids[first:]


def searched(tokenizer, messages: Messages) -> list[int]:
    return behind(tokenizer, messages, -1)


def searched_once(tokenizer, messages: Messages) -> list[int]:
    return behind(tokenizer, messages, 0)


def by_markers(tokenizer, messages: Messages) -> list[int]:
    mask = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return [token if on else -100 for token, on in zip(mask["input_ids"], mask["assistant_masks"], strict=True)]


def every_second(tokenizer, messages: Messages) -> list[int]:
    roles = [{**message, "role": "assistant" if i % 2 else "user"} for i, message in enumerate(messages)]
    turns = [i for i, message in enumerate(roles) if message["role"] == "assistant"]
    return labels(tokenizer, messages, turns=lambda found: turns)


def alone(tokenizer, before: Messages) -> list[int]:
    """The messages' texts as they are tokenized without the template."""
    return [0] * sum(len(tokenizer(message["content"], add_special_tokens=False)["input_ids"]) for message in before)


OPEN = """{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}\
{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
OPEN_FORM = "a prompt that ends with a space"  # which the whole conversation joins to the answer's first word


def rendering(form: str):
    """The tokenizer of a form; this one has no form of its own."""
    if form != OPEN_FORM:
        return chat_tokenizer(form)
    tokenizer = chat_tokenizer("ChatML")
    tokenizer.chat_template = OPEN
    return tokenizer


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    for form in (*rng.sample(FORMS, len(FORMS)), OPEN_FORM):
        tokenizer, messages = rendering(form), conversation(rng, rng.randint(2, 3))
        messages[-2]["content"] += " <|assistant|>\nno" if form == "Zephyr" else " ok"  # plain text that looks like a marker
        if form in ("ChatML", "Llama 3"):  # which know the system; the assistant's turns are then the even ones
            messages.insert(0, {"role": "system", "content": "be brief"})
        found = answer(tokenizer, messages)
        if not isinstance(found, list) or not all(isinstance(label, int) for label in found):
            raise NotYet(f"return a list of labels, one for each token of the rendered conversation, not {type(found).__name__}")
        yield f"how many labels, {form}", len(found)
        told = [tokenizer.convert_ids_to_tokens(label) if 0 <= label < len(tokenizer) else str(label) for label in found]
        yield f"the labels of {len(messages) // 2} exchanges, as tokens, {form}", told


check = Check(
    task="the assistant's turns as targets, for any template",
    observe=observe,
    reference=labels,
    second=by_the_reference,
    misconceptions={
        "the marker is tokenized alone and searched for: in its context it may be cut otherwise, users may write it too, and only one "
        "place is "
        "found; render the conversation up to each turn and compare": searched,
        "everything behind the first marker is a target, where it is found at all: a marker tokenized alone may be cut otherwise, and a "
        "conversation has several turns; render it up to each and compare": searched_once,
        "the template has no {% generation %} block, so the mask that it gives is all zeros: find the turns by rendering up to "
        "them": by_markers,
        "only the last turn is a target: every turn of the assistant is one": but(turns=lambda found: found[-1:]),
        "every second message is taken for the assistant's: a system message moves them; look at the role": every_second,
        "an answer's first word is lost where a tokenizer cuts the prompt alone otherwise than in the whole conversation: the turn begins "
        "at the first token that differs": but(start=lambda prompt, ids: len(prompt)),
        "the beginning of the answer that the template writes is a target too: render what is before a turn with "
        "add_generation_prompt=True": but(prompt=lambda tokenizer, before: render_ids(tokenizer, before)),
        "everything behind the first answer's beginning is a target, the user's later turns too: end a turn where the conversation up to "
        "it ends": but(end=lambda upto, ids, start: len(ids)),
        "the end of the turn is no target: the model would never learn to stop; take what the template writes behind the answer too": but(
            upto=lambda tokenizer, messages: render_ids(tokenizer, messages)[:-2]
        ),
        "the prompt's length is counted without the template: its marks are tokens too": but(
            prompt=alone, start=lambda prompt, ids: len(prompt)
        ),
        "all tokens are targets: the user's words and the marks are not the assistant's": lambda tokenizer, messages: render_ids(
            tokenizer, messages
        ),
    },
)
