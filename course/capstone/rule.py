"""The 2 % rule over a model as it will be served: 16, 8 and 4 bits, the same items for each, and a verdict by the interval.

The rule itself is ``course.lab.evaluation.two_percent_rule``. Here are the items: what is at hand offline, and a file of one's own.
"""

import json
from pathlib import Path

import torch
from torch import nn

from course.capstone import base as bases
from course.capstone import data, evaluate, export, merge
from course.capstone.plan import Plan
from course.lab import harness, instructions, models, probes
from course.lab.evaluation import FEWEST, Verdict, sequence_losses, two_percent_rule, words_right
from course.units import CourseError
from reference.adapter_format import load_adapter
from reference.qlora import quantize_linears


def measures(base: bases.Base, plan: Plan, rows: int, items: list[harness.Item], tuned: bool) -> dict:
    """Name -> function of a model, for ``two_percent_rule``: old text, questions, and, of a tuned model, its instructions."""
    if base.in_the_world:
        world = instructions.world()
        old = world.sample("general", rows, data.OLD_LENGTH, 1_000_003)
        asked_of = world.log_probs("general", old) > -1e-9  # where only one word can follow: a fact, a sum, the number of a verb
        found = {"perplexity": lambda model: sequence_losses(model, old), "certain words": lambda model: words_right(model, old, asked_of)}
    else:
        old = data.old_text(plan, base)[1][:rows]
        found = {
            "perplexity": lambda model: sequence_losses(model, old, 8),
            "facts": lambda model: torch.tensor(probes.cloze_accuracy(model, base.tokenizer).correct),
            "grammar": lambda model: torch.tensor(probes.minimal_pair_accuracy(model, base.tokenizer).correct),
        }
    if tuned and base.in_the_world:
        asked = data.load(plan, base).asked

        def instructions_right(model: nn.Module) -> torch.Tensor:
            said = evaluate.answers(model, base.tokenizer, asked, plan.new_tokens)
            return torch.tensor([ended and words == each.answer for (words, ended), each in zip(said, asked, strict=True)])

        found["instructions"] = instructions_right
    if items:
        found["acc"] = lambda model: harness.evaluate(model, base.tokenizer, items).right
        found["acc_norm"] = lambda model: harness.evaluate(model, base.tokenizer, items).right_norm
    return found


def tuned(base_name: str, adapter: Path) -> bases.Base:
    """A base with an adapter merged into the weights that it was trained beside: dequantized ones after QLoRA.

    Raises:
        CourseError: one of them can't be loaded, or the adapter was trained on another base.
    """
    told = trained_on(adapter)
    hint = f"; the adapter was trained on {told['name']}: give --base {told['name']}" if told and told["name"] != base_name else ""
    try:
        base = bases.load(base_name, "float32")
    except CourseError as error:
        raise CourseError(f"{error}{hint}") from None
    if told and told["dtype"] == "float32" and bases.weights_hash(base.model) != told["sha256"]:
        raise CourseError(f"{base_name} is not what {adapter} was trained on: its weights have another hash than the record's{hint}")
    quantized = bool(told) and told["method"] == "qlora"
    if quantized:
        quantize_linears(base.model, compute_dtype=torch.float32)
    try:
        load_adapter(base.model, adapter)
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise CourseError(f"the adapter can't be loaded: {error}{hint}") from None
    merge.merge(base.model, "qlora" if quantized else "lora")
    return base


def trained_on(adapter: Path) -> dict | None:
    """What the run's record says of the base: name, hash, dtype, method; None where there is no record that can be read."""
    try:
        told = json.loads((adapter / export.RECORD).read_text(encoding="utf-8"))["base"]
        return told if {"name", "sha256", "dtype", "method"} <= told.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def rule(base_name: str, adapter: Path | None = None, items: Path | None = None, rows: int = 400, tolerance: float = 0.02) -> Verdict:
    """Judge a base, or a base with an adapter merged into it.

    Args:
        items: JSONL of multiple choice (context, choices, gold), asked besides.
        rows: of old text.

    Raises:
        CourseError: the base or the adapter can't be loaded, or the items can't be read.
    """
    if rows < FEWEST:
        raise CourseError(f"rows must be at least {FEWEST}, below which there is no interval, got {rows}")
    if not 0 < tolerance < 1:
        raise CourseError(f"tolerance must be a share above 0 and below 1, such as 0.02, got {tolerance:g}")
    plan = Plan(base=base_name)
    if adapter is None:
        try:
            model, tokenizer = models.load(base_name)
        except (FileNotFoundError, ImportError, ValueError) as error:
            raise CourseError(str(error)) from None
        base = bases.Base(base_name, model, tokenizer, (), ())
    else:
        base = tuned(base_name, adapter)
    try:
        chosen = harness.read(items) if items else []
    except (OSError, ValueError) as error:
        raise CourseError(str(error)) from None
    if items and len(chosen) < FEWEST:
        raise CourseError(f"{items} holds {len(chosen)} questions, and below {FEWEST} there is no interval: write more")
    return two_percent_rule(base.model, measures(base, plan, rows, chosen, adapter is not None), tolerance)
