"""lm-evaluation-harness's measures of multiple choice, from their definitions: a number here is the number there.

    acc         the choice with the largest log-probability is the right one
    acc_norm    the same after dividing by the choice's length in *characters*, not tokens: a score that no tokenizer changes
    stderr      √(s² / n) with the sample variance, s² = Σ (x − mean)² / (n − 1)

A tie goes to the first choice, as numpy's argmax has it; ``course.lab.probes`` counts it as wrong. A choice follows its context after one
space, which is no part of its length. EleutherAI's lm-evaluation-harness 0.4.13, ``multiple_choice``.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from course.lab.probes import continuations_log_prob


class Item(NamedTuple):
    """One question: what stands before, the choices, and the place of the right one."""

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Score:
    """Of a task: shares and their standard errors, and which items were right."""

    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    right: Tensor
    right_norm: Tensor


def score(log_probs: Sequence[Sequence[float]], items: Sequence[Item]) -> Score:
    """From the log-probability of each choice of each item.

    Raises:
        ValueError: the two differ in length, an item has no choice or an empty one, its right one does not exist, or there are fewer than
        two
            items.
    """
    if len(log_probs) != len(items) or len(items) < 2:
        raise ValueError(f"need log-probabilities for at least 2 items, got {len(log_probs)} for {len(items)}")
    right, normed = [], []
    for number, (values, item) in enumerate(zip(log_probs, items, strict=True)):
        if len(values) != len(item.choices) or not 0 <= item.gold < len(item.choices) or not all(item.choices):
            raise ValueError(f"item {number}: {len(values)} values for the choices {item.choices}, gold {item.gold}: one each, none empty")
        right.append(_first_largest(values) == item.gold)
        per_character = [value / len(choice) for value, choice in zip(values, item.choices, strict=True)]
        normed.append(_first_largest(per_character) == item.gold)
    return Score(*_mean(right), *_mean(normed), torch.tensor(right), torch.tensor(normed))


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], batch_tokens: int = 2048) -> Score:
    """Ask a model. The tokenizer's <bos> stands in front, as with the harness's ``add_bos_token=True``."""
    contexts, choices = [item.context for item in items], [[f" {choice}" for choice in item.choices] for item in items]
    found = continuations_log_prob(model, tokenizer, contexts, choices, batch_tokens=batch_tokens)
    return score([[each.log_prob for each in of_item] for of_item in found], items)


def read(file: Path) -> list[Item]:
    """Items of a JSONL file with the keys context, choices and gold.

    Raises:
        ValueError: a line is something else; the message says which.
    """
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            item = Item(row["context"], tuple(row["choices"]), row["gold"])
            if not 0 <= item.gold < len(item.choices):
                raise ValueError(f"gold is {item.gold} for {len(item.choices)} choices")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: needs context, choices and gold ({error})") from None
        items.append(item)
    return items


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))


def _mean(right: Sequence[bool]) -> tuple[float, float]:
    values = [float(each) for each in right]
    return statistics.fmean(values), math.sqrt(statistics.variance(values) / len(values))
