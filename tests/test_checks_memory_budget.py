"""Answers about memory that nobody listed: right ones in other dress pass, sly wrong ones are refused."""

import math

import numpy as np
import pytest

from course.checking import NotYet
from course.checks import memory_budget as check


def in_whole_blocks(parameters, recipe):
    scales = 2 * 4 * math.ceil(parameters / 256) if recipe == "8-bit Adam" else 0
    return (parameters * {"fp32": 16, "mixed": 16, "bf16": 8, "8-bit Adam": 6}[recipe] + scales) / 1e9


def names_within(within):
    """Which recipes ``within(parameters, bytes of the recipe, stated GB, tolerance)`` takes."""

    def answer(parameters, gigabytes, recipes, tolerance):
        return [name for name, each in recipes.items() if within(parameters, each, gigabytes, tolerance)]

    return answer


def batch_by_trying(capacity, held, kept_per_token, sequence, vocab):
    row, rows = sequence * (kept_per_token + 3 * vocab * 4), 0
    while held + (rows + 1) * row <= capacity:
        rows += 1
    return rows


def batch_with_numpy(capacity, held, kept_per_token, sequence, vocab):
    return np.floor_divide(np.int64(max(capacity - held, 0)), np.dot([kept_per_token, vocab], [1, 12]) * sequence)


RIGHT = {
    "row by row": (check.batch, batch_by_trying),
    "in numpy": (check.batch, batch_with_numpy),
    "by math.isclose": (check.matching, names_within(lambda n, each, gb, t: math.isclose(n * each / 1e9, gb, rel_tol=0, abs_tol=t * gb))),
    "by np.isclose": (check.matching, names_within(lambda n, each, gb, t: np.isclose(n * each / 1e9, gb, rtol=t, atol=0))),
    "scales of whole blocks": (check.full, in_whole_blocks),
    "in GB": (check.matching, names_within(lambda n, each, gb, t: abs(n * each * 1e-9 - gb) <= t * gb)),
    "as a ratio": (check.matching, names_within(lambda n, each, gb, t: abs(n / 1e9 * each / gb - 1) <= t)),
    "bytes a parameter": (check.matching, names_within(lambda n, each, gb, t: abs(each - gb * 1e9 / n) / (gb * 1e9 / n) <= t)),
    "two ends": (check.matching, names_within(lambda n, each, gb, t: gb * (1 - t) <= n * each / 1e9 <= gb * (1 + t))),
}


@pytest.mark.parametrize("name", RIGHT)
def test_other_right_answers_pass(name):
    judge, answer = RIGHT[name]
    for seed in range(10):
        judge._judge(answer, seed)


def keeps_x_for(which):
    def answer(tokens, hidden, mlp, number_bytes, trained, adapted):
        return tokens * number_bytes * (3 * mlp + hidden * (trained or which in adapted) + mlp * (trained or "down_proj" in adapted))

    return answer


def empties_the_set(*numbers_and_names):
    *numbers, adapted = numbers_and_names
    kept = check.mlp.reference(*numbers, adapted)
    adapted.clear()
    return kept


def adds_to_the_set(tokens, hidden, mlp, number_bytes, trained, adapted):
    if trained:
        adapted |= {"gate_proj", "up_proj", "down_proj"}
    return check.mlp.reference(tokens, hidden, mlp, number_bytes, False, adapted)


def all_of_attention_square(sizes, rank, targets):
    wide = {"gate_proj", "up_proj", "down_proj"}
    trained = rank * sizes.layers * sum(sizes.hidden + (sizes.mlp if name in wide else sizes.hidden) for name in targets)
    return {"trained": trained, "gradient bytes": 4 * trained, "optimizer bytes": 8 * trained}


SLY = {
    "attention square": (check.lora, all_of_attention_square, "counted as hidden × hidden"),
    "isclose": (check.matching, names_within(lambda n, each, gb, t: math.isclose(gb * 1e9, n * each, rel_tol=t)), "the larger of its two"),
    "isclose, either number": (
        check.matching,
        names_within(lambda n, each, gb, t: np.isclose(gb, n * each / 1e9, rtol=t)),
        "what the recipe gives",
    ),
    "3 · vocab": (check.batch, lambda c, h, kept, s, vocab: max(0, (c - h) // (s * (kept + 3 * vocab))), "in numbers and not in bytes"),
    "a loss a row": (check.batch, lambda c, h, kept, s, vocab: max(0, (c - h) // (s * kept + 12 * vocab)), "for one token of a row"),
    "a tuple": (check.lora, lambda sizes, r, targets: tuple(check.lora.reference(sizes, r, targets).values()), "expected a dictionary"),
    "one number": (check.lora, lambda sizes, r, targets: {"trained": check.lora.reference(sizes, r, targets)["trained"]}, "missing: grad"),
    "gate_proj alone": (check.mlp, keeps_x_for("gate_proj"), "adapter on up_proj keeps it too"),
    "up_proj alone": (check.mlp, keeps_x_for("up_proj"), "adapter on gate_proj keeps it too"),
    "2 bytes": (check.mlp, lambda t, h, m, number_bytes, *rest: check.mlp.reference(t, h, m, 2, *rest), "expected .*, got"),
    "tolerance in percent": (
        check.matching,
        names_within(lambda n, each, gb, t: abs(n * each / 1e9 - gb) <= t / 100 * gb),
        "don't divide it by 100",
    ),
    "never a name": (check.matching, lambda *_: [], "the list is always empty"),
    "the set emptied": (check.mlp, empties_the_set, "argument 6 was changed in place"),
    "a name added to the set": (check.mlp, adds_to_the_set, "argument 6 was changed in place"),
    "less than": (check.matching, names_within(lambda n, each, gb, t: abs(n * each / 1e9 - gb) < t * gb), "exactly at the tolerance"),
    "less than, above": (check.matching, names_within(lambda n, each, gb, t: gb * (1 - t) <= n * each / 1e9 < gb * (1 + t)), "upper edge"),
}


@pytest.mark.parametrize("name", SLY)
def test_sly_answers_are_refused(name):
    judge, answer, words = SLY[name]
    for seed in range(5):
        with pytest.raises(NotYet, match=words):
            judge._judge(answer, seed)
