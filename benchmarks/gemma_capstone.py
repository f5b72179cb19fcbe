"""The capstone by several plans: what each learns, forgets, and loses in its merge and exports; and what the 2 % rule says.

    python -m benchmarks.gemma_capstone --model gemma-3-270m     # one GPU, about six minutes: "capstone_gemma-3-270m"
    python -m benchmarks.gemma_capstone --model tiny             # a CPU, about ten minutes: "capstone_tiny"
    python -m benchmarks.gemma_capstone --resume a.json          # what a result still lacks
    python -m benchmarks.gemma_capstone --smoke                  # the tiny model, a few steps: every path, no meaning

It is ``course capstone`` itself, called once for each plan and seed. The tiny model answers instructions about its small world; a real
model those of ``benchmarks.gemma_instructions``, whose answers are known from Python's own library; its test asks for other modules in
other words. Rates are those that units 02 and 12 chose for each method. Only the first seed is exported.
"""

import gc
import json
import shutil
import tempfile
import time
import traceback
from pathlib import Path

import torch

from benchmarks.cli import message, options, rounded
from course.capstone import audit, plan, rule
from course.capstone.run import run
from course.lab import recorded

SEEDS = (0, 1, 2)
PLANS = {  # name -> changes; rates follow the method
    "LoRA r = 16, 10 % replay": {"method": "lora"},
    "LoRA r = 16, no replay": {"method": "lora", "replay": 0.0},
    "LoRA r = 4, 10 % replay": {"method": "lora", "r": 4, "lora_alpha": 8.0},
    "QLoRA r = 16, 10 % replay": {"method": "qlora"},
    "full fine-tuning, 10 % replay": {"method": "full"},
}
TINY = {"rates": {"full": 1e-3}, "settings": {}}
REAL = {
    "rates": {"lora": 5e-4, "qlora": 5e-4, "full": 3e-5},
    "settings": {"steps": 120, "max_length": 192, "new_tokens": 40, "ask": 120, "checkpoint_every": 60},
}
QUICK = {"steps": 2, "ask": 8, "new_tokens": 4, "batch": 4}


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


def one(model: str, name: str, seed: int, folder: Path, settings: dict, rates: dict) -> dict:
    """A run by one plan; the report without what is long."""
    changes = PLANS[name]
    out = folder / f"{list(PLANS).index(name)}-{seed}"
    exports = ("adapter", "merged", "gguf") if seed == 0 else ()
    given = {"base": model, "out": str(out), "seed": seed, "licence": "other", "exports": exports} | settings | changes
    if changes["method"] in rates:
        given["lr"] = rates[changes["method"]]
    result = run(plan.Plan(**given), lambda words: print("  ", words, flush=True), False)
    row = {"plan": name, "seed": seed, "method": changes["method"], "loss": result["training"]["losses"][-1]}
    row |= {key: result[key] for key in ("learned", "forgotten", "merge", "peak", "seconds")}
    row |= {"predicted": result["memory"]["peak"], "trained": result["training"]["trained"], "train_seconds": result["training"]["seconds"]}
    return row | {"exports": [{key: each[key] for key in ("kind", "bytes", "logits", "changed", "lost")} for each in result["exports"]]}


def checked(model: str, folder: Path, rows: int) -> dict:
    """The audit and the 2 % rule of the first plan's adapter."""
    adapter = folder / "0-0" / "adapter"
    base = json.loads((adapter / "course_adapter.json").read_text())["base"]["name"]
    found = audit.audit(adapter, base)
    verdict = rule.rule(base, adapter, rows=rows)
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
    done = {(row["plan"], row["seed"]) for row in result["rows"] if "error" not in row}
    result["rows"] = [row for row in result["rows"] if "error" not in row]
    folder = Path(tempfile.mkdtemp())
    try:
        settings = scale["settings"] | ({} if given.model == "tiny" else data_files(folder)) | (QUICK if given.smoke else {})
        for seed in SEEDS[: result["seeds"]]:
            for name in PLANS:
                if (name, seed) in done or (result["rows"] and time.monotonic() > deadline):
                    continue
                print(f"{name}, seed {seed}", flush=True)
                try:
                    result["rows"].append(one(given.model, name, seed, folder, settings, scale["rates"]))
                except Exception as error:  # the other plans go on
                    traceback.print_exc()
                    result["rows"].append({"plan": name, "seed": seed, "error": message(error)})
                gc.collect()
                torch.cuda.empty_cache()
                if name == next(iter(PLANS)) and seed == 0:
                    result |= checked(given.model, folder, 16 if given.smoke else 400)
                recorded.save(f"capstone_{given.model}", rounded(result), given.out, given.device)
        print("saved to", recorded.save(f"capstone_{given.model}", rounded(result), given.out, given.device))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
