"""Five tasks of permuted digits in a row: what eight methods still know at the end, over six seeds.

    python -m benchmarks.permuted_digits             # minutes on one core of a CPU; saves the recorded result "permuted_digits"
    python -m benchmarks.permuted_digits --smoke     # two tasks, two seeds

A method's setting is chosen with seed 0, which is not reported. EWC is also run over λ with all six seeds, and replay over the size of
its buffer.
"""

import statistics

import torch

from benchmarks.cli import record, rounded
from course.lab import permuted
from course.lab.tables import columns

GRIDS = {
    "L2 to the start": (0.003, 0.01, 0.03, 0.1, 0.3),
    "EWC": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    "replay": (20.0, 50.0, 100.0, 200.0, 500.0, 1000.0),
    "A-GEM": (200.0,),
    "DER++": (200.0,),
}


def last_mean(table: list[list[float]]) -> float:
    return statistics.fmean(table[-1])


def measure(seeds: int = 6, tasks: int = permuted.TASKS, epochs: int = permuted.EPOCHS, values: int = 99) -> dict:
    torch.set_num_threads(1)
    rows, chosen = [], {}
    for method, (setting, default) in permuted.SETTINGS.items():
        grid = GRIDS.get(method, (default,))[:values]
        found = {value: last_mean(permuted.run(method, 0, value, tasks, epochs)) for value in grid}
        best = chosen[method] = default if method in ("replay", "A-GEM", "DER++") else max(found, key=found.get)
        for value in grid:
            if value != best and method not in ("EWC", "replay", "L2 to the start"):
                continue
            tables = [permuted.run(method, seed, value, tasks, epochs) for seed in range(1, seeds + 1)]
            rows.append({"method": method, "setting": setting, "value": value, "chosen": value == best, "tables": tables})
            print(f"{method:20} {value:8g}  {statistics.fmean(map(last_mean, tables)):.3f}", flush=True)
    return {"tasks": tasks, "epochs": epochs, "seeds": seeds, "chosen": chosen, "runs": rounded(rows)}


def table(result: dict) -> str:
    rows = []
    for row in result["runs"]:
        ends = [t[-1] for t in row["tables"]]
        mean, first = statistics.fmean(map(statistics.fmean, ends)), statistics.fmean(end[0] for end in ends)
        rows.append((row["method"], f"{row['value']:g}", mean, first, "chosen" * row["chosen"]))
    return "\n".join(["share of right answers after the last task", columns(("", "value", "all tasks", "first task", ""), rows, ".3f")])


def main() -> None:
    record("permuted_digits", __doc__, measure, table, small={"seeds": 2, "tasks": 2, "epochs": 1, "values": 1}, where="cpu")


if __name__ == "__main__":
    main()
