"""Exercise 1: the model never stops. Padding has the id of the end of text, and labels are masked by id."""

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from course.checking import Check, NotYet, Seen, but
from reference.instruct import Example, pad_batch

Row = tuple[list[int], list[int]]


def collate(
    rows: list[Row],
    pad: int,
    *,
    masked=lambda labels, ids, pad: labels,
    filler=lambda pad: -100,
    shown=lambda mask, ids, pad: mask,
    left=False,
    padded_with=lambda pad: pad,
    before=lambda ids, labels, pad: (ids, labels),
    wide=lambda rows: max(len(ids) for ids, _ in rows),
) -> dict[str, Tensor]:
    """The worked answer: labels as they were given, −100 at the places that were filled."""
    rows = [before(ids, labels, pad) for ids, labels in rows]
    longest = wide(rows)
    found: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in rows:
        more = longest - len(ids)
        put = (lambda own, fill, more=more: [fill] * more + own) if left else (lambda own, fill, more=more: own + [fill] * more)
        found["input_ids"].append(put(ids, padded_with(pad)))
        found["attention_mask"].append(put([1] * len(ids), 0))
        found["labels"].append(put(labels, filler(pad)))
    batch = {name: torch.tensor(values) for name, values in found.items()}
    batch["labels"] = masked(batch["labels"], batch["input_ids"], pad)
    batch["attention_mask"] = shown(batch["attention_mask"], batch["input_ids"], pad)
    return batch


def by_the_reference(rows: list[Row], pad: int) -> dict[str, Tensor]:
    return pad_batch([Example(tuple(ids), tuple(labels)) for ids, labels in rows], pad)


def by_id(labels: Tensor, ids: Tensor, pad: int) -> Tensor:
    return labels.masked_fill(ids == pad, -100)


def by_id_but_the_first(labels: Tensor, ids: Tensor, pad: int) -> Tensor:
    ends = labels == pad
    return labels.masked_fill(ends & (ends.long().cumsum(1) > 1), -100)


def by_id_but_the_last(labels: Tensor, ids: Tensor, pad: int) -> Tensor:
    ends = labels == pad
    return labels.masked_fill(ends & (ends.long().flip(1).cumsum(1).flip(1) > 1), -100)


def drawn(rng: random.Random, end: int) -> list[Row]:
    """Conversations of one to three exchanges, each answer of which ends with ``end``; lengths differ."""
    rows = []
    for exchanges in rng.sample([1, 2, 3], 3):
        ids, labels = [], []
        for _ in range(exchanges):
            asked, said = ([rng.randrange(10, 90) for _ in range(rng.randint(2, 5))] for _ in range(2))
            ids += [*asked, end, *said, end]  # the user's turn ends so too
            labels += [-100] * (len(asked) + 1) + [*said, end]
        rows.append((ids, labels))
    return rows


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    for name, end, pad in (("padding is the end of text", 7, 7), ("padding has an id of its own", 7, 0)):
        rows = drawn(rng, end)
        batch = answer(rows, pad)
        if not isinstance(batch, Mapping):
            raise NotYet(f"return a dictionary of three tensors, not {type(batch).__name__}")
        yield f"the entries, {name}", dict.fromkeys(batch, "there")
        for key in ("input_ids", "labels", "attention_mask"):
            yield f"{key}, {name}", batch.get(key)


check = Check(
    task="a batch that teaches the model to stop",
    observe=observe,
    reference=collate,
    second=by_the_reference,
    misconceptions={
        "labels are masked by the padding's id, and the end of text has the same one: every end of turn is lost as a target; mask the "
        "places that you filled": but(masked=by_id),
        "labels and attention mask are both made of ids, as in the script: neither then knows padding from an end of turn; go by the "
        "places that you filled": but(masked=by_id, shown=lambda mask, ids, pad: (ids != pad).long()),
        "the first end of text of a row is kept and all later ones are masked: a conversation has several ends of turn, and all are "
        "targets; mask by place": but(masked=by_id_but_the_first),
        "the filled places are targets: the model is trained to say the padding; give them −100": but(filler=lambda pad: pad),
        "the attention mask is made of ids, so real ends of text are hidden too: 1 for each given token, 0 for each filled one": but(
            shown=lambda mask, ids, pad: (ids != pad).long()
        ),
        "another id is used for padding: that hides the symptom for as long as nobody sets it back; use the pad that was given, and "
        "mask by place": but(padded_with=lambda pad: pad + 1),
        "the labels are the ids: the prompts became targets; keep the labels that you were given": but(
            masked=lambda labels, ids, pad: torch.where(labels == -100, ids, labels)
        ),
        "one more end of text is put behind each row: the turns' own ends are the targets, and two in a row are never seen at "
        "inference": but(before=lambda ids, labels, pad: ([*ids, pad], [*labels, pad])),
        "the rows are padded on the left: to train, pad on the right": but(left=True),
        "labels are shifted by one place already: the model's loss shifts them itself": but(
            masked=lambda labels, ids, pad: torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], 1)
        ),
        "the last end of text of a row is kept and all earlier ones are masked: a conversation has several ends of turn, and all are "
        "targets; mask by place": but(masked=by_id_but_the_last),
    },
)
