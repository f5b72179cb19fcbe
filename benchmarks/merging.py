"""Two adapters made into one: what the sum, its copy of a smaller rank, TIES, DARE and pruning keep of each, and of the general text.

    python -m benchmarks.merging            # a CPU, about a minute; saves the recorded result "merging"
    python -m benchmarks.merging --smoke

For each of three seeds two adapters learn one kind of text each, from the same tiny model. All methods then merge the same two. "Both" is
one adapter of twice the rank that saw both kinds, as many rows of each: what a merge is measured against. The line from one adapter to the
other is the weighted sum w · sql + (1 − w) · clinic; "scale" multiplies the plain sum.
"""

import torch

from benchmarks import cli
from course.lab import merging
from course.lab.merging import METHODS, Method, adapter_for, merged, scores, update_of
from course.lab.tables import columns

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)


def measure(steps: int = merging.STEPS, seeds: int = 3, rows: int = 64, points: int | None = None) -> dict:
    torch.set_num_threads(1)
    found = []

    def note(seed: int, kind: str, name: str | float, update: dict) -> None:
        found.append({"seed": seed, "kind": kind, "name": name, **scores(update, rows)})
        print(found[-1], flush=True)

    before = scores({}, rows)
    for seed in range(seeds):
        pair = tuple(adapter_for(task, seed, steps) for task in merging.TASKS)
        for task, adapter in zip(merging.TASKS, pair, strict=True):
            note(seed, "alone", task, update_of(adapter))
        note(seed, "alone", "both", update_of(adapter_for("both", seed, steps)))
        for name, method in METHODS.items():
            note(seed, "method", name, merged(pair, method, seed))
        for w in WEIGHTS[:points]:
            note(seed, "weight", w, merged(pair, Method((w, 1 - w))))
        for scale in SCALES[:points]:
            note(seed, "scale", scale, merged(pair, Method((scale, scale))))
    return cli.rounded({"steps": steps, "r": merging.R, "lr": merging.RATE, "before": before, "rows": found})


def table(result: dict) -> str:
    rows = [("untouched", *(result["before"][domain] for domain in merging.ASKED))]
    for key in dict.fromkeys((row["kind"], row["name"]) for row in result["rows"]):
        runs = [row for row in result["rows"] if (row["kind"], row["name"]) == key]
        rows.append((f"{key[0]} {key[1]}", *(sum(run[domain] for run in runs) / len(runs) for domain in merging.ASKED)))
    return "\n".join(["nats above the floor, means of the seeds", columns(("", *merging.ASKED), rows)])


def main() -> None:
    cli.record("merging", __doc__, measure, table, {"steps": 2, "seeds": 1, "rows": 4, "points": 1}, "cpu")


if __name__ == "__main__":
    main()
