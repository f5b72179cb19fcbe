"""The capstone by several plans: what each learns, forgets, and loses in its merge and exports; and what the 2 % rule says.

    python -m benchmarks.gemma_capstone --model gemma-3-270m     # one GPU: "capstone_gemma-3-270m"
    python -m benchmarks.gemma_capstone --model tiny             # a CPU, about ten minutes: "capstone_tiny"
    python -m benchmarks.gemma_capstone --resume a.json          # what a result still lacks
    python -m benchmarks.gemma_capstone --smoke                  # the tiny model, a few steps: every path, no meaning

It is ``course capstone`` itself, called once for each plan and seed. The tiny model answers instructions about its small world; a real
model those of ``benchmarks.gemma_instructions``, whose answers are known from Python's own library; its test asks for other modules in
other words. Only the first seed is exported.

Each method gets its own learning rate before any plan is run, by a search at seed 0: train on three quarters of the training rows, split by
prompt, and take the rate with the lowest loss on the last quarter. No question of the held-out rows is in either part. The search starts
with three rates around a default and goes on outwards while the best is at an end. Plans of one method share its rate.
"""

import gc
import json
import math
import shutil
import tempfile
import time
import traceback
from pathlib import Path

import torch

from benchmarks.cli import message, options, rounded
from course.capstone import audit, base, data, evaluate, plan, rule, train
from course.capstone.run import run
from course.lab import models, recorded
from course.units import CourseError
from reference.instruct import read_conversations

SEEDS = (0, 1, 2)
PLANS = {  # name -> changes; rates follow the method
    "LoRA r = 16, 10 % replay": {"method": "lora"},
    "LoRA r = 16, no replay": {"method": "lora", "replay": 0.0},
    "LoRA r = 4, 10 % replay": {"method": "lora", "r": 4, "lora_alpha": 8.0},
    "QLoRA r = 16, 10 % replay": {"method": "qlora"},
    "full fine-tuning, 10 % replay": {"method": "full"},
}
METHODS = ("lora", "qlora", "full")
FACTORS, WIDEST, VALIDATION = (1 / 3, 1.0, 3.0), 5, 0.25  # of the search: around the default, rates at most, share of the prompts
TINY = {"rates": {"lora": 1e-3, "qlora": 1e-3, "full": 1e-3}, "settings": {}}
REAL = {
    "rates": {"lora": 5e-4, "qlora": 5e-4, "full": 3e-5},
    "settings": {"steps": 120, "max_length": 192, "new_tokens": 40, "ask": 120, "checkpoint_every": 60},
}
QUICK = {"steps": 2, "ask": 8, "new_tokens": 4, "batch": 4}


def decoded(model: str, folder: Path) -> str:
    """The model in a folder of its own in 32 bits: every run reads it from there, where decoding a GGUF file takes most of a minute."""
    whole, tokenizer = models.load(model, where=torch.device("cpu"))
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def data_files(folder: Path) -> dict[str, str]:
    """The real model's rows, as anybody would bring theirs: two JSONL files."""
    from benchmarks import gemma_instructions as made

    files = {}
    for field, modules, count, seed, test in (("data", made.TRAIN, 150, 0, False), ("held_out", made.TEST, 24, 1, True)):
        pairs, _ = made.generated(modules, count, seed, test)
        lines = [
            json.dumps({"messages": list(task.messages)}) for kind, task in pairs if kind != "summary"
        ]  # which has no one right answer
        files[field] = str(folder / f"{field}.jsonl")
        Path(files[field]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def search(model: str, folder: Path, settings: dict, defaults: dict[str, float], seed: int = 0) -> dict:
    """The rate of each method: what was tried, [rate, validation loss] each with None for a loss that became NaN, and what is chosen."""
    own = Path(settings["data"]) if "data" in settings else data.write_course(folder / "course.jsonl", seed)
    tests = read_conversations(Path(settings["held_out"]))[0] if "held_out" in settings else data.asked_of_the_course(plan.Plan().ask)
    asked = {data.prompt(row) for row in tests}
    rows = [row for row in read_conversations(own)[0] if data.prompt(row) not in asked]
    parts = dict(zip(("data", "held_out"), data.split(rows, seed, VALIDATION), strict=True))
    files = {name: str(folder / f"search_{name}.jsonl") for name in parts}
    for name, rows in parts.items():
        Path(files[name]).write_text("".join(json.dumps({"messages": list(row.messages)}) + "\n" for row in rows), encoding="utf-8")
    found = {"prompts": {name: len({data.prompt(row) for row in rows}) for name, rows in parts.items()}, "tried": {}, "chosen": {}}
    for method in METHODS:
        tried = {}
        waiting = [defaults[method] * factor for factor in FACTORS]
        while waiting:
            for rate in waiting:
                given = {"base": model, "seed": seed, "method": method, "lr": float(f"{rate:.2g}"), **settings, **files}
                tried[given["lr"]] = validation_loss(plan.Plan(out=str(folder / f"search-{method}-{rate:.2g}"), **given))
                print(f"search: {method} at {rate:.2g}: validation loss {tried[given['lr']]:.4f}", flush=True)
            best, ends = min(tried, key=tried.get), (min(tried), max(tried))
            outwards = {ends[0]: best / 3, ends[1]: 3 * best}
            waiting = [outwards[best]] if best in outwards and len(tried) < WIDEST else []
        found["tried"][method] = [[rate, loss if math.isfinite(loss) else None] for rate, loss in sorted(tried.items())]
        found["chosen"][method] = best
    return found


def validation_loss(given: plan.Plan) -> float:
    """Nats per target of the plan's held-out rows after training; infinite if it diverged. Nothing is exported."""
    start = base.load(given.base, given.dtype, given.path("out"), given.seed)
    rows = data.load(given, start)
    model = base.adapt(start, given)
    try:
        train.train(model, given, rows, given.path("out") / "checkpoints", "search", start.tokenizer.pad_token_id, False)
    except CourseError:  # the loss is NaN
        return math.inf
    losses, targets = evaluate.row_losses(model, [each.example for each in rows.asked], start.tokenizer.pad_token_id)
    return ((losses * targets).sum() / targets.sum()).item()


def one(model: str, name: str, seed: int, folder: Path, settings: dict, rates: dict) -> dict:
    """A run by one plan; the report without what is long."""
    changes = PLANS[name]
    out = folder / f"{list(PLANS).index(name)}-{seed}"
    exports = ("adapter", "merged", "gguf") if seed == 0 else ()
    given = {"base": model, "out": str(out), "seed": seed, "licence": "other", "exports": exports} | settings | changes
    given["lr"] = rates[changes["method"]]
    result = run(plan.Plan(**given), lambda words: print("  ", words, flush=True), False)
    row = {"plan": name, "seed": seed, "method": changes["method"], "lr": given["lr"], "loss": result["training"]["losses"][-1]}
    row |= {key: result[key] for key in ("learned", "forgotten", "merge", "peak", "seconds")}
    row |= {"predicted": result["memory"]["peak"], "trained": result["training"]["trained"], "train_seconds": result["training"]["seconds"]}
    return row | {"exports": [{key: each[key] for key in ("kind", "bytes", "logits", "changed", "lost")} for each in result["exports"]]}


def checked(model: str, folder: Path, rows: int) -> dict:
    """The audit and the 2 % rule of the first plan's adapter."""
    adapter = folder / "0-0" / "adapter"
    served_on = json.loads((adapter / "course_adapter.json").read_text())["base"]["name"]
    found = audit.audit(adapter, served_on)
    verdict = rule.rule(served_on, adapter, rows=rows)
    measures = {label: {name: vars(interval) for name, interval in of.items()} for label, of in verdict.found.items()}
    return {"audit": found.as_dict()["counts"], "rule": {"choice": verdict.choice, "safe": verdict.safe, "found": measures}}


def main() -> None:
    given = options(
        "gemma_capstone", __doc__, gpu=False, model={"default": "tiny"}, minutes={"type": float, "default": 12.0}, resume={"type": Path}
    )
    deadline = time.monotonic() + 60 * given.minutes
    scale = TINY if given.model == "tiny" else REAL
    result: dict = {"model": given.model, "rows": [], "seeds": 1 if given.smoke else len(SEEDS)}
    if given.resume:
        result = json.loads(given.resume.read_text())["result"]
    folder = Path(tempfile.mkdtemp())
    try:
        settings = scale["settings"] | ({} if given.model == "tiny" else data_files(folder)) | (QUICK if given.smoke else {})
        start = given.model if given.model == "tiny" else decoded(given.model, folder / "start")
        if "search" not in result:
            result["search"] = search(start, folder, settings, scale["rates"])
        rates = result["search"]["chosen"]
        result["rows"] = [row for row in result["rows"] if row.get("lr") == rates[PLANS[row["plan"]]["method"]]]
        done = {(row["plan"], row["seed"]) for row in result["rows"]}
        for seed in SEEDS[: result["seeds"]]:
            for name in PLANS:
                if (name, seed) in done or (result["rows"] and time.monotonic() > deadline):
                    continue
                print(f"{name}, seed {seed}", flush=True)
                try:
                    result["rows"].append(one(start, name, seed, folder, settings, rates))
                except Exception as error:  # the other plans go on
                    traceback.print_exc()
                    result["rows"].append({"plan": name, "seed": seed, "error": message(error)})
                gc.collect()
                torch.cuda.empty_cache()
                if name == next(iter(PLANS)) and seed == 0:
                    result |= checked(start, folder, 16 if given.smoke else 400)
                recorded.save(f"capstone_{given.model}", rounded(result), given.out, given.device)
        print("saved to", recorded.save(f"capstone_{given.model}", rounded(result), given.out, given.device))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
