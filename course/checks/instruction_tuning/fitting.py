"""Exercise 4: the loss is NaN. Rows are cut before their answer begins, and nothing is left to learn."""

import random

from course.checking import Check, NotYet, Seen, but, unpacked
from reference.instruct import Example, fit

Row = tuple[list[int], list[int]]


def fit_rows(
    rows: list[Row],
    max_length: int,
    *,
    cut=lambda values, n: values[:n],
    cut_labels=lambda labels, n: labels[:n],
    lost=lambda labels, ids, n: all(label == -100 for label in labels[1:]),
    told=lambda dropped: dropped,
    instead=None,
) -> tuple[list[Row], list[int]]:
    """The worked answer: cut at the end, and leave out, by name, what has no target left."""
    kept, dropped = [], []
    for i, (ids, labels) in enumerate(rows):
        row = cut(ids, max_length), cut_labels(labels, max_length)
        if not lost(row[1], ids, max_length):
            kept.append(row)
        elif instead:
            kept.append(instead(row))
        else:
            dropped.append(i)
    return kept, told(dropped)


def by_the_reference(rows: list[Row], max_length: int) -> tuple[list[Row], list[int]]:
    fitted = [fit(Example(tuple(ids), tuple(labels)), max_length, "keep_start") for ids, labels in rows]
    kept = [(list(example.ids), list(example.labels)) for example in fitted if example]
    return kept, [i for i, example in enumerate(fitted) if example is None]


def with_a_target(row: Row) -> Row:
    ids, labels = row
    return ids, [*labels[:-1], ids[-1]]


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    n = rng.randint(12, 16)
    rows = []
    for prompt, said in ((5, 4), (n - 3, 6), (n, 3), (n + 4, 5), (3, n + 5), (n - 1, 4), (n + 2, 2)):
        ids = [rng.randrange(10, 90) for _ in range(prompt + said)]
        rows.append((ids, [-100] * prompt + ids[prompt:]))
    one = [rng.randrange(10, 90) for _ in range(n + 3)]
    rows.append((one, one[:1] + [-100] * (n + 2)))  # its one label is the first, which nothing predicts
    two = [rng.randrange(10, 90) for _ in range(2 * n)]  # of two exchanges: the cut falls into the second question
    rows.append((two, [-100] * 4 + two[4 : n - 3] + [-100] * 6 + two[n + 3 :]))
    order = rng.sample(range(len(rows)), len(rows))
    kept, dropped = unpacked(
        answer([rows[i] for i in order], n), "two lists, the rows that are kept and the places of those dropped", object, object
    )
    if not isinstance(kept, (list, tuple)) or not all(isinstance(row, (list, tuple)) and len(row) == 2 for row in kept):
        raise NotYet("the first list has to hold the rows that are kept, each a pair of its ids and its labels")
    if not all(isinstance(part, (list, tuple)) for row in kept for part in row):
        raise NotYet("a row is a pair of two lists, its ids and its labels")
    yield f"how many of {len(rows)} rows are kept within {n} tokens", len(kept)
    yield "the ids of the rows that are kept", [list(row[0]) for row in kept]
    yield "their labels", [list(row[1]) for row in kept]
    yield "the places of the rows dropped", dropped


check = Check(
    task="rows within the context, none without a target, and every loss of a row told",
    observe=observe,
    reference=fit_rows,
    second=by_the_reference,
    misconceptions={
        "rows without a target are kept: the mean over no target is NaN, and turning NaN into 0 hides that nothing is learned; leave them "
        "out": but(lost=lambda labels, ids, n: False),
        "the first label counts as a target: nothing comes before it, so nothing predicts it; look at labels[1:]": but(
            lost=lambda labels, ids, n: all(label == -100 for label in labels)
        ),
        "only the last label was looked at: a row that is cut within a later question still has the answers before it": but(
            lost=lambda labels, ids, n: labels[-1] == -100
        ),
        "every row that is too long is left out: one that still has targets after the cut can be learned from": but(
            lost=lambda labels, ids, n: len(ids) > n or all(label == -100 for label in labels[1:])
        ),
        "the rows are cut at the start: the conversation then begins in the middle of the question; cut the end": but(
            cut=lambda values, n: values[-n:], cut_labels=lambda labels, n: labels[-n:]
        ),
        "the labels are not cut with the ids: both must have one length": but(cut_labels=lambda labels, n: labels),
        "a row without a target gets its last token as one: that is a piece of the question, and hides the symptom; leave the row out": but(
            instead=with_a_target
        ),
        "the rows left out are counted, not named: return their places, so that somebody can look at them": but(told=len),
        "nothing is told of the rows left out: return their places": but(told=lambda dropped: []),
    },
)
