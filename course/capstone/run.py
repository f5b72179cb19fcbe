"""A whole run in order: plan, memory, data, baseline, training, evaluation, merge, exports, report."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable

import psutil
import torch

from course.capstone import base as bases
from course.capstone import checkpoint, data, evaluate, export, merge, report, train
from course.capstone.plan import Plan, choose, shape_of
from course.lab.devices import device, device_name
from course.lab.meters import process_peak
from course.units import CourseError
from reference.instruct import render_ids
from reference.lora import trainable_parameters

SAMPLES, FINGERPRINTS = 4, 4


@dataclasses.dataclass
class Start:
    """What several runs of one base on the same rows may share. ``base.model`` is changed by the run: a copy for each."""

    base: bases.Base
    rows: data.Rows
    base_hash: str
    before: evaluate.Measured


def run(plan: Plan, say: Callable[[str], None] = print, progress: bool = True, start: Start | None = None) -> dict:
    """Do all of it; the report is also in ``out/report.json`` and ``out/report.html``.

    Args:
        say: told what happens, a sentence at a time.
        start: what was loaded, prepared and measured before, for this plan's base, rows and questions; None does it here.

    Raises:
        CourseError: whatever the user can mend: a plan that does not fit, data that are wrong, a disk that is full, a loss that is NaN.
            What was written before stays, and the same command goes on from there.
    """
    began, out = time.perf_counter(), plan.path("out")
    data.check_files(plan)
    train.check_plan(plan, out / "checkpoints")
    base = start.base if start else bases.load(plan.base, plan.dtype, out, plan.seed)
    plan, memory = choose(plan, shape_of(base.model.config, plan.base), free_memory())
    say(f"plan: {memory.title}: {memory.peak / 1e9:.3g} GB at the fullest moment ({memory.moment})")
    for words in base.words:
        say(f"base: {words}")
    rows = start.rows if start else data.load(plan, base)
    for words in rows.words:
        say(f"data: {words}")
    base_hash = start.base_hash if start else bases.weights_hash(base.model)
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    before = start.before if start else evaluate.measure(base.model, base, rows, plan.new_tokens)
    check_finite(before, rows)
    say(f"before: {100 * before.right.double().mean():.0f} % of {len(rows.asked)} answers right")
    original = {name: tensor.clone() for name, tensor in base.model.state_dict().items()} if plan.method == "qlora" else None
    model = bases.adapt(base, plan)
    trained, _ = trainable_parameters(model)
    wide = 4 if plan.dtype == "float32" else 2
    checkpoint.check_space(out, (checkpoint.KEPT + 1) * 12 * trained + 4 * trained + 2 * wide * parameters)
    started = time.perf_counter()
    losses, words = train.train(model, plan, rows, out / "checkpoints", base_hash, base.tokenizer.pad_token_id, progress)
    seconds = time.perf_counter() - started
    for each in words:
        say(f"training: {each}")
    say(f"training: loss {losses[0]:.3f} → {losses[-1]:.3f} in {plan.steps} steps, {seconds:.0f} s")
    after = evaluate.measure(model, base, rows, plan.new_tokens)
    learned, forgotten = evaluate.learned(before, after), evaluate.forgotten(before, after)
    for change in learned + forgotten:
        say(f"after: {report.sentence(change.as_dict())}")
    result = {
        "plan": plan.settings(),
        "device": device_name(),
        "memory": {"title": memory.title, "peak": memory.peak, "moment": memory.moment, "there": memory.moments[memory.moment]},
        "base": {"name": base.name, "sha256": base_hash, "parameters": parameters, "words": list(base.words)},
        "data": {"words": rows.words, "train": len(rows.train), "asked": len(rows.asked)},
        "training": {"losses": losses, "seconds": seconds, "trained": trained, "words": words},
        "learned": [change.as_dict() for change in learned],
        "forgotten": [change.as_dict() for change in forgotten],
        "samples": samples(rows, before, after),
    }
    merged, exports = deliver(model, base, plan, rows, result, original, after, say)
    result |= {"merge": dataclasses.asdict(merged), "exports": [each.as_dict() for each in exports]}
    peak = torch.cuda.max_memory_allocated() if device().type == "cuda" else process_peak()
    result |= {"peak": peak, "seconds": time.perf_counter() - began}
    result["verdict"] = verdict(result, exports, plan)
    report.write(result, out)
    return result


def check_finite(before: evaluate.Measured, rows: data.Rows) -> None:
    """Refuse a base whose losses are not numbers: no learning rate mends it.

    Raises:
        CourseError: with the first row.
    """
    if broken := [i for i, loss in enumerate(before.losses.tolist()) if not math.isfinite(loss)]:
        loss, line = before.losses[broken[0]].item(), rows.asked[broken[0]].line
        raise CourseError(
            f"before any training the base's loss is {loss} on {len(broken)} of {len(rows.asked)} held-out rows, the first on line {line}: "
            "its weights hold NaN or infinity, or it overflows in this dtype"
        )


def free_memory() -> float:
    """Bytes that are free on the device."""
    return float(torch.cuda.mem_get_info()[0] if device().type == "cuda" else psutil.virtual_memory().available)


def samples(rows: data.Rows, before: evaluate.Measured, after: evaluate.Measured) -> list[dict]:
    """A few questions with what both models said: numbers alone convince nobody."""
    some = range(0, len(rows.asked), max(1, len(rows.asked) // SAMPLES))
    return [
        {
            "asked": rows.asked[i].messages[-1]["content"],
            "right": rows.asked[i].answer,
            "before": before.said[i][0],
            "after": after.said[i][0],
        }
        for i in some
    ]


def deliver(
    model, base: bases.Base, plan: Plan, rows: data.Rows, result: dict, original, after: evaluate.Measured, say: Callable[[str], None]
) -> tuple[merge.Merge, list[export.Export]]:
    """Write what was asked for, merge between, and load each again."""
    out, card = plan.path("out"), report.card(result)
    wanted = export.trained(model, base, rows, plan.new_tokens, after)
    exports: list[export.Export] = []

    def add(kind: str, make: Callable[[], export.Export]) -> None:
        exports.append(export.attempt(kind, make))
        say(f"export: {report.export_sentence(exports[-1].as_dict())}")

    adapter = plan.method != "full" and "adapter" in plan.exports
    if adapter:
        folder = export.write_adapter(model, base, out / "adapter", record(plan, base, rows, result, wanted), card)
        add("adapter", lambda: export.check_adapter(folder, base, plan, rows, wanted))
        add("adapter in peft", lambda: export.check_in_peft(folder, base, plan, rows, wanted))
        add("served", lambda: export.check_served(folder, base, plan, rows, wanted))
    merged = merge.merge(model, plan.method, original)
    if adapter:
        file = folder / export.RECORD
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(json.loads(file.read_text()) | {"merge": dataclasses.asdict(merged)}, indent=1) + "\n")
        os.replace(partial, file)
    say(f"merge: {report.merge_sentence(dataclasses.asdict(merged))}")
    if "merged" in plan.exports:
        add("merged", lambda: export.check_merged(export.write_merged(model, base, out / "merged", card), base, plan, rows, wanted))
    if "gguf" in plan.exports:
        add("gguf", lambda: export.gguf(model, base, out / "gguf", plan, rows, wanted))
    return merged, exports


def record(plan: Plan, base: bases.Base, rows: data.Rows, result: dict, wanted: export.Trained) -> dict:
    """What ``course audit`` holds an adapter against: what it was trained on, how it renders, and what it gave."""
    return {
        "base": {"name": base.name, "sha256": result["base"]["sha256"], "dtype": plan.dtype, "method": plan.method},
        "adapter": {"r": plan.r, "lora_alpha": plan.lora_alpha, "targets": plan.settings()["targets"]},
        "tokenizer": {"sha256": bases.vocabulary_hash(base.tokenizer), "eos": base.tokenizer.eos_token_id},
        "rendered": [
            {"messages": list(each.messages), "ids": render_ids(base.tokenizer, each.messages, True)} for each in rows.asked[:FINGERPRINTS]
        ],
        "rows": [
            {"ids": list(each.example.ids), "labels": list(each.example.labels), "loss": loss}
            for each, loss in zip(rows.asked[:FINGERPRINTS], wanted.losses.tolist(), strict=False)
        ],
        "licence": plan.licence,
        "learned": result["learned"],
        "forgotten": result["forgotten"],
    }


def verdict(result: dict, exports: list[export.Export], plan: Plan) -> dict:
    """Whether it may be deployed, what speaks against it, and what somebody has to decide: a price is no fault."""
    against, decide = [], []
    if not any(change["verdict"] == "better" for change in result["learned"][:2]):
        against.append("nothing was shown to be learned: neither the held-out loss nor the answers are better beyond their intervals")
    if result["learned"][1]["after"] == 0:
        against.append("not one held-out answer is the expected one, word for word: read what it says before you ship it")
    for change in result["forgotten"]:
        if change["verdict"] == "worse":
            decide.append(f"{report.sentence(change)}. Too much? More replay or a lower rate costs less")
    if far := [each.kind for each in exports if not each.within(plan.tolerance)]:
        against.append(f"{', '.join(far)}: more than {100 * plan.tolerance:g} % of perplexity may be lost against the trained model")
    if not plan.licence:
        against.append("the plan names no licence (--licence): an adapter inherits its base's terms, and those of its data")
    return {"ready": not against, "against": against, "decide": decide}
