"""The capstone by several plans: what each learns, forgets, and loses in its merge and exports; and what the 2 % rule says.

    python -m benchmarks.gemma_capstone --model gemma-3-270m     # one GPU, six processes: "capstone_gemma-3-270m"
    python -m benchmarks.gemma_capstone --model tiny             # a CPU, about ten minutes: "capstone_tiny"
    python -m benchmarks.gemma_capstone --resume a.json          # what a result still lacks
    python -m benchmarks.gemma_capstone --smoke                  # the tiny model, a few steps: every path, no meaning

It is ``course capstone`` itself, called once for each plan and seed. The tiny model answers instructions about its small world; a real
model those of ``benchmarks.gemma_instructions``, whose answers are known from Python's own library; its test asks for other modules in
other words. Only the first seed is exported.

Each method gets its own learning rate before any plan is run, by a search at seed 0: train on three quarters of the training rows, split by
prompt, and take the rate with the lowest loss on the last quarter. No question of the held-out rows is in either part. The search starts
with three rates around a default and goes on outwards while the best is at an end. Plans of one method share its rate.

On a GPU several processes share it (``--workers``), since one run alone leaves it idle most of the time: a run's seconds are then those of
a run among others. Each process loads and prepares once what runs have in common. The results are those of one process.
"""

import copy
import dataclasses
import functools
import gc
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.cli import failed, options, rounded
from benchmarks.spread import Spread
from course.capstone import audit, base, data, evaluate, plan, rule, train
from course.capstone.run import Start, run
from course.lab import models, recorded
from course.lab.devices import device
from course.lab.meters import show_bytes
from course.lab.tables import columns, wrapped
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
    "settings": {"steps": 120, "max_length": 192, "new_tokens": 40, "ask": 120, "checkpoint_every": 120},
}
SHARE = 0.95  # of the GPU's memory, for all processes together
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


# What the runs of a process have in common


@functools.cache
def kept(name: str, dtype: str) -> tuple[base.Base, str]:
    """A base on the CPU, and its hash; it is copied and never changed."""
    found = base.load(name, dtype)
    digest = base.weights_hash(found.model)
    found.model.to("cpu")
    return found, digest


def copied(found: base.Base) -> base.Base:
    return dataclasses.replace(found, model=copy.deepcopy(found.model).to(device()))


@functools.cache
def prepared(shared: plan.Plan) -> tuple[data.Rows, evaluate.Measured | None]:
    """Rows, and what the base does with them, of a plan that ``alike`` made equal for many runs."""
    found = copied(kept(shared.base, shared.dtype)[0])
    rows = data.load(shared, found)
    return rows, evaluate.measure(found.model, found, rows, shared.new_tokens) if shared.exports else None


def alike(given: plan.Plan, measured: bool) -> plan.Plan | None:
    """What ``prepared`` is called with. None if runs share nothing: the tiny base's marks depend on the seed, and so do drawn questions."""
    if given.base == "tiny" or not given.held_out:
        return None
    names = ("base", "dtype", "data", "held_out", "old", "batch", "max_length", "overflow", "ask", "new_tokens", "folder")
    seed = given.seed if kept(given.base, given.dtype)[0].in_the_world else 0  # whose old text is drawn
    return plan.Plan(**{name: getattr(given, name) for name in names}, seed=seed, exports=("merged",) if measured else ())


def start_of(given: plan.Plan) -> Start | None:
    if (shared := alike(given, True)) is None:
        return None
    rows, before = prepared(shared)
    found, digest = kept(given.base, given.dtype)
    return Start(copied(found), rows, digest, before)


# The search


def search(
    model: str,
    folder: Path,
    settings: dict,
    defaults: dict[str, float],
    seed: int = 0,
    spread: Spread | None = None,
    settled: Callable[[str], None] = lambda method: None,
) -> dict:
    """The rate of each method: what was tried, [rate, validation loss] each with None for a loss that became NaN, and what is chosen.

    Args:
        spread: where the runs go; what is returned is filled when it is drained. None runs them here.
        settled: called with a method whose rate is chosen.
    """
    own = Path(settings["data"]) if "data" in settings else data.write_course(folder / "course.jsonl", seed)
    tests = read_conversations(Path(settings["held_out"]))[0] if "held_out" in settings else data.asked_of_the_course(plan.Plan().ask)
    asked = {data.prompt(row) for row in tests}
    rows = [row for row in read_conversations(own)[0] if data.prompt(row) not in asked]
    parts = dict(zip(("data", "held_out"), data.split(rows, seed, VALIDATION), strict=True))
    files = {name: str(folder / f"search_{name}.jsonl") for name in parts}
    for name, rows in parts.items():
        Path(files[name]).write_text("".join(json.dumps({"messages": list(row.messages)}) + "\n" for row in rows), encoding="utf-8")
    found = {"prompts": {name: len({data.prompt(row) for row in rows}) for name, rows in parts.items()}, "tried": {}, "chosen": {}}
    runs, tried, asked_for = spread or Spread(), {method: {} for method in METHODS}, dict.fromkeys(METHODS, 0)

    def ask(method: str, rates: list[float]) -> None:
        for rate in rates:
            given = {"base": model, "seed": seed, "method": method, "lr": float(f"{rate:.2g}"), **settings, **files}
            each = plan.Plan(out=str(folder / f"search-{method}-{rate:.2g}"), **given)
            asked_for[method] += 1
            runs.submit(validation_loss, each, then=functools.partial(answered, method, given["lr"]))

    def answered(method: str, rate: float, loss: float | None, error: str | None) -> None:
        if error:
            found.setdefault("errors", []).append({"method": method, "lr": rate, "error": error})
        tried[method][rate] = math.inf if error else loss
        print(f"search: {method} at {rate:.2g}: " + (error or f"validation loss {loss:.4f}"), flush=True)
        found["tried"][method] = [[each, loss if math.isfinite(loss) else None] for each, loss in sorted(tried[method].items())]
        if len(tried[method]) < asked_for[method]:
            return
        best = min(tried[method], key=lambda each: (tried[method][each], each))
        outwards = {min(tried[method]): best / 3, max(tried[method]): 3 * best}
        if best in outwards and len(tried[method]) < WIDEST:
            ask(method, [outwards[best]])
        else:
            found["chosen"][method] = best
            settled(method)

    for method in METHODS:
        ask(method, [defaults[method] * factor for factor in FACTORS])
    if spread is None:
        runs.drain()
    return found


def validation_loss(given: plan.Plan) -> float:
    """Nats per target of the plan's held-out rows after training; infinite if it diverged. Nothing is exported or kept."""
    release()  # of a run that failed
    given = within_share(given)
    if shared := alike(given, False):
        start, rows = copied(kept(given.base, given.dtype)[0]), prepared(shared)[0]
    else:
        start = base.load(given.base, given.dtype, given.path("out"), given.seed)
        rows = data.load(given, start)
    model = base.adapt(start, given)
    try:
        train.train(model, given, rows, None, "search", start.tokenizer.pad_token_id, False)
        losses, targets = evaluate.row_losses(model, [each.example for each in rows.asked], start.tokenizer.pad_token_id)
    except CourseError:  # the loss is NaN
        return math.inf
    finally:
        shutil.rmtree(given.path("out"), ignore_errors=True)
        model = start = None
        release()
    return ((losses * targets).sum() / targets.sum()).item()


# The runs


def one(model: str, name: str, seed: int, folder: Path, settings: dict, rates: dict) -> dict:
    """A run by one plan; the report without what is long."""
    changes = PLANS[name]
    out = folder / f"{list(PLANS).index(name)}-{seed}"
    exports = ("adapter", "merged", "gguf") if seed == 0 else ()
    given = {"base": model, "out": str(out), "seed": seed, "licence": "other", "exports": exports} | settings | changes
    given["lr"] = rates[changes["method"]]
    release()  # of a run that failed
    whole = within_share(plan.Plan(**given))
    start = start_of(whole)
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        result = run(whole, lambda words: print(f"  {name}, seed {seed}: {words}", flush=True), False, start)
    finally:
        start = None
        shutil.rmtree(out / "checkpoints" if list(PLANS).index(name) == seed == 0 else out, ignore_errors=True)
        release()
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


def release() -> None:
    """Give back to the device what a run held: the others need it."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


# The processes

_share = 1.0


def begin(threads: int, share: float | None) -> None:
    """In each process: its threads, and its share of the GPU's memory, so that one that wants more fails alone."""
    global _share
    torch.set_num_threads(threads)
    if share is not None:
        _share = share
        torch.cuda.set_per_process_memory_fraction(share)
        torch.zeros(1, device="cuda")  # the context, while the base is decoded elsewhere


def within_share(given: plan.Plan) -> plan.Plan:
    """The process's share as the plan's budget: what is free at the moment is what the others happen to leave."""
    if _share == 1.0:
        return given
    return dataclasses.replace(given, memory_gb=_share * torch.cuda.get_device_properties(0).total_memory / 1e9)


def table(result: dict) -> str:
    good, rows = [row for row in result["rows"] if "error" not in row], []
    names = list(dict.fromkeys(each["name"] for row in good for part in ("learned", "forgotten") for each in row[part]))
    for name in dict.fromkeys(row["plan"] for row in good):
        runs = [row for row in good if row["plan"] == name]
        after = [{each["name"]: each["after"] for part in ("learned", "forgotten") for each in row[part]} for row in runs]
        measures = (f"{statistics.fmean(each[measure] for each in after):.3f}" for measure in names)
        rows.append((name, f"{runs[0]['lr']:g}", *measures))
    before = {each["name"]: each["before"] for part in ("learned", "forgotten") for each in good[0][part]} if good else {}
    rows.insert(0, ("before", "", *(f"{before[measure]:.3f}" for measure in names)))
    units = {each["name"]: each["unit"] for row in good for part in ("learned", "forgotten") for each in row[part]}
    said = ", ".join(f"{key}: {measure} ({units[measure]})" for key, measure in zip("ABCDEF", names, strict=False))
    parts = [wrapped(f"{result['model']}, means of the seeds; {said}") + "\n" + columns(("", "rate", *"ABCDEF"[: len(names)]), rows)]
    costs, exports = [], []
    for name in dict.fromkeys(row["plan"] for row in good):
        runs = [row for row in good if row["plan"] == name]
        seconds = statistics.fmean(row["train_seconds"] for row in runs)
        merge = max((row["merge"]["error"] for row in runs if row["merge"]), default=None)
        peak = show_bytes(max(row["peak"] for row in runs)), show_bytes(runs[0]["predicted"])
        costs.append((name, runs[0]["trained"], f"{seconds:.1f}", *peak, "" if merge is None else f"{merge:.0e}", len(runs)))
        for each in runs[0]["exports"]:
            differ = (None if each[key] is None else f"{each[key]:{form}}" for key, form in (("logits", ".1e"), ("changed", ".1%")))
            exports.append((f"{name}: {each['kind']}", show_bytes(each["bytes"]) if each["bytes"] else None, *differ))
    parts.append(columns(("", "trained", "s", "peak", "planned", "merge", "runs"), costs))
    parts.append(columns(("exports: logits and answers that differ", "file", "logits", "answers"), exports))
    parts += [failed(f"{row['plan']}, seed {row['seed']}", row["error"]) for row in result["rows"] if "error" in row]
    if "choice" in (rule := result.get("rule", {})):
        audit = ", ".join(f"{count} {what}" for what, count in result["audit"].items())
        parts.append(f"audit: {audit}\nthe 2 % rule: {rule['choice']} (meanwhile {rule['safe']})")
    return "\n\n".join(parts)


def main() -> None:
    given = options(
        "gemma_capstone",
        __doc__,
        gpu=False,
        model={"default": "tiny"},
        minutes={"type": float, "default": 12.0, "help": "no run starts after so many (default 12)"},
        resume={"type": Path, "help": "a result: what it lacks or failed is run"},
        workers={"type": int, "help": "processes that share the device (default: 6 on a GPU, 1 on a CPU)"},
    )
    deadline = time.monotonic() + 60 * given.minutes
    gpu = given.device.type == "cuda"
    workers = (6 if gpu else 1) if given.workers is None else given.workers
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    threads = min(4, max(1, (os.cpu_count() or 1) // workers)) if workers > 1 else torch.get_num_threads()
    scale = TINY if given.model == "tiny" else REAL
    result: dict = {"model": given.model, "rows": [], "seeds": 1 if given.smoke else len(SEEDS)}
    if given.resume:
        result = json.loads(given.resume.read_text())["result"]
    result |= {"workers": workers, "threads": threads, "timing": "each run alone" if workers == 1 else "runs share the device"}
    folder = Path(tempfile.mkdtemp())
    spread = Spread(workers, begin, (threads, SHARE / workers if gpu else None), deadline)
    try:
        measure(result, given, scale, folder, spread)
        print(table(result))
    finally:
        spread.close()
        shutil.rmtree(folder, ignore_errors=True)


def measure(result: dict, given: Any, scale: dict, folder: Path, spread: Spread) -> None:
    """Fill ``result``, and save it after each run."""
    settings = scale["settings"] | ({} if given.model == "tiny" else data_files(folder)) | (QUICK if given.smoke else {})
    start = given.model if given.model == "tiny" else decoded(given.model, folder / "start")

    def save() -> Path:
        result["rows"].sort(key=lambda row: (row["seed"], list(PLANS).index(row["plan"])))
        return recorded.save(f"capstone_{given.model}", rounded(result), given.out, given.device)

    def finished(name: str, seed: int, row: dict | None, error: str | None) -> None:
        print(f"{name}, seed {seed}: {error or 'done'}", flush=True)
        result["rows"].append(row or {"plan": name, "seed": seed, "error": error})
        save()
        if row and seed == 0 and name == next(iter(PLANS)):
            spread.submit(checked, start, folder, 16 if given.smoke else 400, then=judged, turn=1)

    def judged(found: dict | None, error: str | None) -> None:
        result.update(found or {"audit": {"error": error}})
        save()

    def settled(method: str) -> None:
        """Its plans may begin, after what is left of the search; the first seed, which is exported and takes longest, before the others."""
        rates = result["search"]["chosen"]
        result["rows"] = [row for row in result["rows"] if PLANS[row["plan"]]["method"] != method or row.get("lr") == rates[method]]
        first = next(iter(PLANS))
        if method == PLANS[first]["method"] and "choice" not in result.get("rule", {}):  # the audit needs the files of that run
            result["rows"] = [row for row in result["rows"] if (row["plan"], row["seed"]) != (first, 0)]
        done = {(row["plan"], row["seed"]) for row in result["rows"]}
        for seed in SEEDS[: result["seeds"]]:
            for name, changes in PLANS.items():
                if changes["method"] == method and (name, seed) not in done:
                    arguments = start, name, seed, folder, settings, {method: rates[method]}
                    spread.submit(one, *arguments, then=functools.partial(finished, name, seed), turn=1 + seed)

    if set(result.get("search", {}).get("chosen", ())) == set(METHODS):
        for method in METHODS:
            settled(method)
    else:
        result["search"] = search(start, folder, settings, scale["rates"], 0, spread, settled)
    if left := spread.drain():
        print(f"{left} runs did not start before the deadline: --resume the result for them", flush=True)
    print("saved to", save())


if __name__ == "__main__":
    main()
