"""Exercise 2: a data sample, row by row: what is kept, and why the rest is not."""

import random

from course.checking import Check, NotYet, but
from course.lab.world import CITIES, NAMES, PETS

REASONS = ("no answer", "too long", "asked in the test", "repeated", "contradicts an earlier row", "keep")


def plain(text: str) -> str:
    """Spaces and case aside."""
    return " ".join(text.split()).casefold()


def words(row: dict) -> int:
    return len(row["instruction"].split()) + len(row["output"].split())


def in_test(row: dict, held_out: list[dict], same) -> bool:
    return same(row["instruction"]) in {same(each["instruction"]) for each in held_out}


def pair_in_test(row: dict, held_out: list[dict], same) -> bool:
    return (same(row["instruction"]), same(row["output"])) in {(same(each["instruction"]), same(each["output"])) for each in held_out}


def judged(row: dict, earlier: dict[str, str], same) -> str:
    before = earlier.get(same(row["instruction"]))
    if before is None:
        return "keep"
    return "repeated" if before == same(row["output"]) else "contradicts an earlier row"


def triage(
    rows: list[dict],
    held_out: list[dict],
    longest: int,
    *,
    same=plain,
    tested=in_test,
    judge=judged,
    empty=lambda row: not row["output"].strip(),
    long=lambda row, longest: words(row) > longest,
    remembered=("keep",),
) -> list[str]:
    """The worked answer: the first reason that holds; rows are compared with those that are kept."""
    earlier: dict[str, str] = {}
    found = []
    for row in rows:
        if empty(row):
            reason = "no answer"
        elif long(row, longest):
            reason = "too long"
        elif tested(row, held_out, same):
            reason = "asked in the test"
        else:
            reason = judge(row, earlier, same)
        if reason in remembered:
            earlier.setdefault(same(row["instruction"]), same(row["output"]))
        found.append(reason)
    return found


def by_passes(rows: list[dict], held_out: list[dict], longest: int) -> list[str]:
    """Each reason in a pass of its own."""

    def norm(text: str) -> str:
        return " ".join(text.lower().split())

    found: list[str | None] = [None] * len(rows)
    asked = {norm(each["instruction"]) for each in held_out}
    for i, row in enumerate(rows):
        if not row["output"].split():
            found[i] = "no answer"
        elif len((row["instruction"] + " " + row["output"]).split()) > longest:
            found[i] = "too long"
        elif norm(row["instruction"]) in asked:
            found[i] = "asked in the test"
    for i, row in enumerate(rows):
        if found[i] is None:
            before = [j for j in range(i) if found[j] == "keep" and norm(rows[j]["instruction"]) == norm(row["instruction"])]
            if not before:
                found[i] = "keep"
            else:
                equal = norm(rows[before[0]]["output"]) == norm(row["output"])
                found[i] = "repeated" if equal else "contradicts an earlier row"
    return found


def by_prompt(row: dict, earlier: dict[str, str], same) -> str:
    return "repeated" if same(row["instruction"]) in earlier else "keep"


def by_pair(row: dict, earlier: dict[str, str], same) -> str:
    return "repeated" if earlier.get(same(row["instruction"])) == same(row["output"]) else "keep"


def sample(seed: int) -> tuple[list[dict], list[dict], int]:
    """Rows with every trouble in it, in a random order, the original before what repeats it."""
    rng = random.Random(seed)
    names = rng.sample(NAMES, 12)

    def row(name: str, kind: str = "city") -> dict:
        if kind == "city":
            return {"instruction": f"where does {name} live ?", "output": rng.choice(list(CITIES))}
        return {"instruction": f"what pet does {name} own ?", "output": rng.choice(PETS)}

    def other(word: str) -> str:
        return rng.choice([each for each in (*CITIES, *PETS) if each != word])

    good = [row(name, rng.choice(("city", "pet"))) for name in names[:6]]
    held_out = [row(name) for name in names[6:9]]
    longest = rng.randint(12, 16)
    trouble = [
        {"instruction": good[0]["instruction"], "output": good[0]["output"]},
        {"instruction": f" {good[1]['instruction'].upper()} ", "output": good[1]["output"].title()},
        {"instruction": good[2]["instruction"], "output": other(good[2]["output"])},
        dict(held_out[0]),
        {"instruction": held_out[1]["instruction"], "output": other(held_out[1]["output"])},
        {"instruction": held_out[2]["instruction"].replace(" ", "  ").title(), "output": held_out[2]["output"]},
        {"instruction": f"where does {names[9]} live ?", "output": rng.choice((" ", "\n"))},
        {"instruction": f"what pet does {names[9]} own ?", "output": ""},
        {"instruction": f"tell me about {names[10]}", "output": " ".join(rng.choices(NAMES, k=longest - 3))},  # one word too long
        {"instruction": f"tell all about {names[10]}", "output": " ".join(rng.choices(NAMES, k=2 * longest))},
        {"instruction": f"tell me about {names[11]}", "output": " ".join(rng.choices(NAMES, k=longest - 4))},  # just not
    ]
    rng.shuffle(trouble)
    return good + trouble, held_out, longest


def observe(answer, seed: int) -> dict:
    rows, held_out, longest = sample(seed)
    found = answer([dict(row) for row in rows], [dict(row) for row in held_out], longest)
    whole = [{"instruction": "say a", "output": ""}] + [{"instruction": "say a", "output": "a"}] * 2
    return {"a sample": by_row(found, rows), "a row that repeats one without an answer": answer(whole, [], 9)}


def by_row(found, rows: list[dict]):
    """Reasons under the rows that they are about, so that a learner reads which row it is.

    Raises:
        NotYet: it is no list, or one of another length.
    """
    if not isinstance(found, (list, tuple)) or len(found) != len(rows):
        got = f"{len(found)} values" if isinstance(found, (list, tuple)) else type(found).__name__
        raise NotYet(f"return a list with one text for each row, kept or not: {len(rows)} here, got {got}")
    texts = (f"{row['instruction']!r} → {row['output'][:20]!r}" for row in rows)
    return {f"row {i}, {text}": reason for i, (text, reason) in enumerate(zip(texts, found, strict=True))}


check = Check(
    task="rows to train on, and reasons for the others",
    observe=observe,
    reference=triage,
    second=by_passes,
    misconceptions={
        "rows are compared letter by letter: the same question with other spaces or capitals is the same question": but(
            same=lambda text: text
        ),
        "a row of the test with another answer is a row of the test: compare questions, not pairs": but(tested=pair_in_test),
        "nothing is compared with the test: what is trained on can't be asked": but(tested=lambda row, held_out, same: False),
        "two answers to one question are no repetition: one of them is wrong, and somebody has to look": but(judge=by_prompt),
        "two answers to one question are both kept: the model learns to guess between them": but(judge=by_pair),
        "rows are compared with those that were dropped, too: only what was kept is there to be repeated": but(remembered=REASONS),
        "rows without an answer are kept: there is nothing to learn from in them": but(empty=lambda row: False),
        "an answer of spaces is no answer": but(empty=lambda row: not row["output"]),
        "rows that are too long are kept: cut, they would lose the end of their answer": but(long=lambda row, longest: False),
        "a row of exactly the largest length fits": but(long=lambda row, longest: words(row) >= longest),
        "the length of a row is that of question and answer together": but(long=lambda row, longest: len(row["output"].split()) > longest),
    },
)
