"""Instruction tuning in the small world: pre-training against instruction data, masks, few good rows against many bad ones.

    python -m benchmarks.instruction_tuning            # a CPU, about ten minutes
    python -m benchmarks.instruction_tuning --smoke

Every run starts from the same pre-trained tiny model, with LoRA on its linears and rows of its own for the template's three marks, and
takes the same number of steps at the same rate. What differs is the data. The test asks for people whom no training row names, so what is
right was known before. Each setting has three seeds, of the data, of the factors and of the order.
"""

import time

import torch

from benchmarks import cli
from course.lab import instructions, training
from course.lab.tables import columns, wrapped
from reference.instruct import IGNORED, Example

LR, STEPS, ASKED, WRONG = 1e-3, 150, 120, 0.4
SIZES = (12, 48, 192, 768)


def plain(rows: list[Example], seed: int) -> list[Example]:
    """As many tokens of pre-training text, in rows of the same lengths, all of it targets."""
    texts = instructions.plain_rows(sum(len(row.ids) for row in rows), max(len(row.ids) for row in rows), seed).tolist()
    cut = [ids[: len(row.ids)] for ids, row in zip(texts * 2, rows, strict=False)]
    return [Example(tuple(ids), tuple(ids)) for ids in cut]


def unstopped(rows: list[Example]) -> list[Example]:
    """The end of turn is no target: what masking labels by the padding's id does where that is the end of text."""
    end = instructions.tokenizer().eos_token_id
    return [Example(row.ids, tuple(IGNORED if label == end else label for label in row.labels)) for row in rows]


def plan() -> list[dict]:
    settings = [{"data": "good", "rows": n} for n in SIZES]
    settings += [{"data": f"{WRONG:.0%} wrong", "rows": n} for n in SIZES[2:]]
    return settings + [{"data": name, "rows": 192} for name in ("all tokens", "pre-training text", "no end of turn")]


def rows_of(setting: dict, seed: int) -> list[Example]:
    wrong = WRONG if "wrong" in setting["data"] else 0.0
    tasks = instructions.tasks(setting["rows"], seed, wrong=wrong)
    rows = instructions.encoded(tasks, "all" if setting["data"] == "all tokens" else "assistant")
    change = {"pre-training text": lambda rows: plain(rows, seed), "no end of turn": unstopped}
    return change.get(setting["data"], lambda rows: rows)(rows)


def measure(steps: int = STEPS, asked: int = ASKED, seeds: int = 3, settings: int | None = None) -> dict:
    torch.set_num_threads(1)
    world, test, found = instructions.world(), instructions.tasks(asked, 10_000, held_out=True), []
    base = instructions.model()
    before = instructions.scores(base, test) | {"general": training.above_floor(base, world, "general", rows=32)}
    for setting in plan()[:settings]:
        for seed in range(seeds):
            began = time.perf_counter()
            rows, net = rows_of(setting, seed), instructions.adaptable(seed)
            losses = instructions.tune(net, rows, steps, seed, LR)
            scores = instructions.scores(net, test)
            general = training.above_floor(net, world, "general", rows=32)
            tokens = sum(len(row.ids) for row in rows)
            found.append(setting | {"seed": seed, "tokens": tokens, "loss": losses[-1], **scores, "general": general})
            print(f"{found[-1]}  {time.perf_counter() - began:.1f} s", flush=True)
    return cli.rounded({"steps": steps, "lr": LR, "asked": asked, "before": before, "rows": found})


def table(result: dict) -> str:
    rows = []
    for key in dict.fromkeys((row["data"], row["rows"]) for row in result["rows"]):
        runs = [row for row in result["rows"] if (row["data"], row["rows"]) == key]
        mean = {name: sum(run[name] for run in runs) / len(runs) for name in ("right", "stops", "general")}
        rows.append((*key, f"{mean['right']:.2f}", f"{mean['stops']:.2f}", f"{mean['general']:.3f}"))
    about = "means of the seeds: shares of answers that are right and that stop; nats above the floor, general text"
    return "\n".join([wrapped(about), columns(("", "rows", "right", "stops", "general"), rows)])


def main() -> None:
    cli.record("instruction_tuning", __doc__, measure, table, {"steps": 2, "asked": 6, "seeds": 1, "settings": 1}, "cpu")


if __name__ == "__main__":
    main()
