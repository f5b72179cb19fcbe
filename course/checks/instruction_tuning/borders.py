"""Exercise 5: the loss is too good. Packed sequences see each other."""

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from course.checking import Check, NotYet, Seen, but
from reference.instruct import Example, Packed, packed_batch


def pack_rows(
    rows: list[list[int]],
    *,
    positions=lambda lengths: [i for n in lengths for i in range(n)],
    same=lambda owner: owner[:, None] == owner[None, :],
    seen=lambda n: torch.ones(n, n, dtype=torch.bool).tril(),
    first=lambda ids: [-100, *ids[1:]],
    put=lambda ids: ids,
    placed=lambda labels: labels,
) -> dict[str, Tensor]:
    """The worked answer: positions restart, a token sees those before it in its own sequence, and no first token is a target."""
    rows = [put(ids) for ids in rows]
    lengths = [len(ids) for ids in rows]
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    return {
        "input_ids": torch.tensor([token for ids in rows for token in ids]),
        "position_ids": torch.tensor(positions(lengths)),
        "labels": torch.tensor(placed([label for ids in rows for label in first(ids)])),
        "mask": same(owner) & seen(sum(lengths)),
    }


def by_the_reference(rows: list[list[int]]) -> dict[str, Tensor]:
    ids = tuple(token for row in rows for token in row)
    labels = tuple(label for row in rows for label in (-100, *Example(tuple(row), tuple(row)).labels[1:]))
    batch = packed_batch([Packed(ids, labels, tuple(map(len, rows)))], pad=0)
    found = {name: batch[name][0] for name in ("input_ids", "position_ids", "labels")}
    return found | {"mask": batch["attention_mask"][0, 0] == 0}


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    rows = [[rng.randrange(5, 99) for _ in range(n)] for n in rng.sample(range(2, 8), 4)]
    batch = answer(rows)
    if not isinstance(batch, Mapping):
        raise NotYet(f"return a dictionary of four tensors, not {type(batch).__name__}")
    lengths = ", ".join(str(len(row)) for row in rows)
    yield "the entries", dict.fromkeys(batch, "there")
    for name in ("input_ids", "position_ids", "mask", "labels"):
        yield f"{name}, sequences of {lengths} tokens", batch.get(name)


check = Check(
    task="a packed row whose sequences don't see each other",
    observe=observe,
    reference=pack_rows,
    second=by_the_reference,
    misconceptions={
        "the mask has no borders: every token sees all before it, other conversations too; allow only its own sequence": but(
            same=lambda owner: torch.ones(len(owner), len(owner), dtype=torch.bool)
        ),
        "that is the row of the script: neither positions nor mask know of borders, and the first token of a sequence is predicted from "
        "another's last": but(
            positions=lambda lengths: list(range(sum(lengths))),
            same=lambda owner: torch.ones(len(owner), len(owner), dtype=torch.bool),
            first=lambda ids: ids,
        ),
        "the borders are there, but a token sees what comes after it in its sequence: keep the mask causal": but(
            seen=lambda n: torch.ones(n, n, dtype=torch.bool)
        ),
        "the positions run on over the borders: each sequence starts at 0 again": but(positions=lambda lengths: list(range(sum(lengths)))),
        "the first token of a sequence is a target: it would be predicted from the last token of another conversation; give it −100": but(
            first=lambda ids: ids
        ),
        "the last token of a sequence is no target, and the first one is: labels are not shifted, so it is the first that nothing in its "
        "sequence predicts": but(first=lambda ids: [*ids[:-1], -100]),
        "the labels are shifted: the loss does that; a token's label stands at its own place": but(first=lambda ids: [*ids[1:], -100]),
        "the labels are shifted, over the borders too: the loss shifts; a token's label stands at its own place, and a first token has "
        "none": but(first=lambda ids: ids, placed=lambda labels: [*labels[1:], -100]),
        "a token does not see itself: the diagonal belongs to the mask": but(seen=lambda n: torch.ones(n, n, dtype=torch.bool).tril(-1)),
        "a separator is put between the sequences: attention reads across it as across any token; give the mask borders": but(
            put=lambda ids: [0, *ids], same=lambda owner: torch.ones(len(owner), len(owner), dtype=torch.bool)
        ),
        "the mask says what is hidden: True is for what a token may see": but(
            same=lambda owner: torch.ones(len(owner), len(owner), dtype=torch.bool),
            seen=lambda n: torch.ones(n, n, dtype=torch.bool).triu(1),
        ),
        "positions start at 1: the first token of a sequence has position 0": but(
            positions=lambda lengths: [i + 1 for n in lengths for i in range(n)]
        ),
    },
)
