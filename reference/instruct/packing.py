"""Short rows in one long one, with borders: nothing may look across.

Padding to the longest row wastes most of a batch of short conversations. Packing puts several into
one row. Two things must then restart at each border, the positions and the attention:

    position of token i = i − start of its sequence
    token i sees token j   if j ≤ i and both are of one sequence

Positions alone do not separate anything: attention does not read them. Some libraries *infer* the
borders from positions that restart, under conditions (no mask, no cache) that fail silently, so
:func:`leak` measures: change one sequence, and see whether another's logits move.

Source: best-fit decreasing as in TRL's ``pack_dataset``; Krell et al. 2021 for packing.
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.arguments import check_integer
from reference.instruct.masks import IGNORED, Example

BORDERS = ("mask", "positions", "none")


@dataclass(frozen=True)
class Packed:
    """Several sequences in one row: ``ids`` and ``labels`` (n,), and each sequence's length."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    lengths: tuple[int, ...]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which sequences share a row: the longest first, each into the fullest row that has room.

    Returns:
        Rows of indices into ``lengths``.

    Raises:
        ValueError: a length is below 1 or above ``capacity``.
    """
    check_integer("capacity", capacity, least=1)
    if wrong := [n for n in lengths if not 1 <= n <= capacity]:
        raise ValueError(f"lengths must be from 1 to capacity ({capacity}), got {wrong[0]}")
    rows: list[list[int]] = []
    rooms: list[int] = []  # free places of rows that have some, sorted, each once
    of_room: dict[int, deque] = defaultdict(deque)  # free places -> rows, the oldest first
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[index])
        if at < len(rooms):
            room = rooms[at]
            row = of_room[room].popleft()
            if not of_room[room]:
                rooms.pop(at)
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(index)
        if left := room - lengths[index]:
            if not of_room[left]:
                insort(rooms, left)
            of_room[left].append(row)
    return rows


def pack(examples: Sequence[Example], length: int) -> list[Packed]:
    """Rows of at most ``length`` tokens. The first token of a sequence is no target.

    It would be predicted from the last one of the sequence before.

    Raises:
        ValueError: there is no example, or one is longer than ``length``.
    """
    if not examples:
        raise ValueError("examples is empty: there is nothing to pack")
    packed = []
    for row in best_fit([len(example.ids) for example in examples], length):
        chosen = [examples[i] for i in row]
        ids = tuple(token for each in chosen for token in each.ids)
        labels = tuple(label for each in chosen for label in (IGNORED, *each.labels[1:]))
        packed.append(Packed(ids, labels, tuple(len(each.ids) for each in chosen)))
    return packed


def packed_batch(
    rows: Sequence[Packed], pad: int, borders: str = "mask", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | bool]:
    """What a model of transformers takes; padding is one more sequence at the end of a row.

    Args:
        borders: "mask" gives positions that restart and a mask of (rows, 1, n, n), to be added to
            the scores, which any attention honours. "positions" leaves the mask out, for models
            that infer borders from positions. "none" gives a plain mask of ones: sequences see
            each other. It is here to be measured.
        dtype: of the mask: the model's.

    Raises:
        ValueError: there is no row, or ``borders`` is none of these.
    """
    if not rows:
        raise ValueError("rows is empty: a batch needs a row")
    if borders not in BORDERS:
        raise ValueError(f"borders must be one of {', '.join(BORDERS)}, got {borders!r}")
    n = max(len(row.ids) for row in rows)
    ids, labels = torch.full((len(rows), n), pad), torch.full((len(rows), n), IGNORED)
    positions, owner = (torch.zeros(len(rows), n, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, : len(row.ids)] = torch.tensor(row.labels)
        lengths = (*row.lengths, n - len(row.ids))
        positions[i] = torch.cat([torch.arange(size) for size in lengths])
        owner[i] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    batch = {"input_ids": ids, "labels": labels, "use_cache": False}
    if borders == "none":
        return batch | {"attention_mask": torch.ones_like(ids)}
    if borders == "mask":
        batch["attention_mask"] = border_mask(owner, dtype)
    return batch | {"position_ids": positions}


def border_mask(owner: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 where token i may see token j, the lowest number elsewhere: owner (rows, n) of each token
    -> (rows, 1, n, n)."""
    same = owner[:, :, None] == owner[:, None, :]  # (rows, n, n)
    seen = same & torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[:, None]


@torch.no_grad()
def leak(model: torch.nn.Module, row: Packed, borders: str, pad: int = 0, **settings) -> float:
    """How far the logits of the last sequence move when all tokens before it change.

    0, or rounding, if the borders hold.

    Args:
        settings: given to the model instead of the batch's own, such as ``use_cache=True``.

    Raises:
        ValueError: the row holds fewer than two sequences.
    """
    if len(row.lengths) < 2:
        raise ValueError("row holds one sequence: a leak needs two")
    start = sum(row.lengths[:-1])
    vocabulary = model.get_input_embeddings().num_embeddings
    other = tuple((token + 1) % vocabulary for token in row.ids[:start]) + row.ids[start:]
    batches = [
        packed_batch([Packed(i, row.labels, row.lengths)], pad, borders) for i in (row.ids, other)
    ]
    where = next(model.parameters()).device
    logits = []
    for batch in batches:
        given = {key: v.to(where) if isinstance(v, Tensor) else v for key, v in batch.items()}
        given.pop("labels")
        logits.append(model(**given | settings).logits[0, start : len(row.ids)].float())
    return (logits[0] - logits[1]).abs().max().item()
