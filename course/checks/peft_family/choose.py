"""Exercise 6: which method for which need. The recorded table is the judge.

A choice is right if it meets every need and no method that does is better beyond the seeds: the ranges of the three seeds overlap.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from course.checking import Check, Seen
from course.lab.family import FULL, METHODS, measured


@dataclass(frozen=True)
class Scenario:
    """A need, in the words of the exercise.

    Attributes:
        needs: words for what is broken -> whether a row keeps it.
        score: the column that decides; accuracy is better where it is high, nats where they are low.
    """

    needs: dict[str, Callable[[dict], bool]]
    score: str

    def worst_and_best(self, row: dict) -> tuple[float, float]:
        """Of the seeds, as numbers of which the lowest is best."""
        sign = -1 if self.score.startswith("few") else 1
        values = [sign * value for value in row["seeds"][self.score]]
        return max(values), min(values)

    def broken(self, row: dict) -> list[str]:
        return [words for words, kept in self.needs.items() if not kept(row)]


SCENARIOS = {
    "hospital": Scenario({"it leaves no plain model": lambda row: row["merges"]}, "clinic"),
    "tenants": Scenario({"its file is larger than 12 kB": lambda row: row["file_kb"] <= 12}, "sql"),
    "sixteen notes": Scenario({"it trains every weight": lambda row: row["method"] != FULL}, "few_16"),
    "mixed batch": Scenario({"it puts something inside the model": lambda row: row["kind"] == "prompt"}, "clinic"),
    "keep the old": Scenario({"it learns too little: above 1 nat on clinic": lambda row: row["clinic"] <= 1}, "forgotten"),
}


@functools.cache
def table() -> dict[str, dict]:
    return {row["method"]: row for row in measured()}


def ranked(scenario: str) -> list[str]:
    """The methods that meet the needs, best mean first."""
    need = SCENARIOS[scenario]
    fit = [row for row in table().values() if not need.broken(row)]
    sign = -1 if need.score.startswith("few") else 1
    return [row["method"] for row in sorted(fit, key=lambda row: sign * row[need.score])]


def choose(scenario: str) -> str:
    """The worked answer: of the methods that meet the needs, the best."""
    return ranked(scenario)[0]


def another(scenario: str) -> str:
    """The last of those that the table can't tell from the best."""
    return [name for name in ranked(scenario) if verdict(scenario, name) == FITS][-1]


FITS = "a good choice"


def verdict(scenario: str, name: object) -> str:
    if name not in table():
        return f"{name!r}, which is no method of the table"
    need, row = SCENARIOS[scenario], table()[name]
    if broken := need.broken(row):
        return f"{name}, but {broken[0]}"
    best = table()[ranked(scenario)[0]]
    if need.worst_and_best(row)[1] > need.worst_and_best(best)[0]:
        return f"{name} with {row[need.score]:.2f} ({need.score}); another that meets the needs is better in every seed"
    return FITS


def observe(answer, seed: int) -> Seen:
    for scenario in SCENARIOS:
        yield f'your choice for "{scenario}"', verdict(scenario, answer(scenario))


def always(name: str) -> Callable[[str], str]:
    assert name in METHODS

    def answer(scenario: str) -> str:
        return name

    return answer


check = Check(
    task="a method for each need, by the table",
    observe=observe,
    reference=choose,
    second=another,
    misconceptions={
        "LoRA for everything: it is a good default, but its file is too large for the tenants, and it stands inside the model; read each "
        "scenario's needs first": always("LoRA"),
        "IA³ for everything because it is smallest: small is a need of one scenario; elsewhere what it learns decides": always("IA³"),
        "full fine-tuning for everything: where it learns most, look at what the scenario forbids: the file, and what is forgotten": always(
            FULL
        ),
        "a soft prompt for everything: it can't be merged, and at this size it learns least": always("prompt, text"),
        "DoRA for everything because it is newer: the table decides, and where it ties with LoRA the needs do": always("DoRA"),
    },
)
