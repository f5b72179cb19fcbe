"""What a model does with the held-out rows and with old text, and what changed between two models on the *same* items.

Losses are in nats per target token, a row at a time, so that two models are compared row by row. Answers are greedy, and right means equal
and ended. Forgetting is asked three ways: loss on old text, questions it knew, and grammar, where the base speaks English.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course.capstone.base import Base
from course.capstone.data import Question, Rows
from course.lab import instructions, probes
from course.lab.evaluation import Interval, compare_answers, compare_losses, facts_right, sequence_losses
from reference.instruct import IGNORED, Example, pad_batch, render_ids

TOKENS_AT_ONCE, LOGITS_AT_ONCE, ROWS_AT_ONCE = 4096, 2**29, 128  # in a forward pass; logits are 4 bytes each


@dataclass
class Measured:
    """One model on all items.

    Attributes:
        losses, targets: of each held-out row: nats per target, and how many targets.
        said: greedy answers, and whether each ended.
        right: of each held-out row.
        old: nats per token of each row of old text.
        known: name of a set of questions -> which were answered rightly.
    """

    losses: Tensor
    targets: Tensor
    said: list[tuple[str, bool]]
    right: Tensor
    old: Tensor
    known: dict[str, Tensor] = field(default_factory=dict)


def measure(model: nn.Module, base: Base, rows: Rows, new_tokens: int) -> Measured:
    losses, targets = row_losses(model, [each.example for each in rows.asked], base.tokenizer.pad_token_id)
    said = answers(model, base.tokenizer, rows.asked, new_tokens)
    right = torch.tensor([ended and words == each.answer.strip() for (words, ended), each in zip(said, rows.asked, strict=True)])
    if base.in_the_world:
        known = {"facts": facts_right(model, instructions.world())}
    else:
        known = {
            "facts": torch.tensor(probes.cloze_accuracy(model, base.tokenizer).correct),
            "grammar": torch.tensor(probes.minimal_pair_accuracy(model, base.tokenizer).correct),
        }
    return Measured(losses, targets, said, right, sequence_losses(model, rows.old, 16), known)


@torch.no_grad()
def row_losses(model: nn.Module, examples: list, pad: int) -> tuple[Tensor, Tensor]:
    """Of each row: mean nats per target, float64, and how many targets."""
    was_training, where = model.training, next(model.parameters()).device
    model.eval()
    losses, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.long)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    at_once = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // model.config.vocab_size)
    while order:
        longest = len(examples[order[-1]].ids)
        part = [order.pop() for _ in range(min(len(order), max(1, at_once // longest)))]
        given = {name: tensor.to(where) for name, tensor in pad_batch([examples[i] for i in part], pad).items()}
        labels = given.pop("labels")[:, 1:]
        logits = model(**given, use_cache=False).logits[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").double().sum(1).cpu()
        counts[part] = (labels != IGNORED).sum(1).cpu()
        losses[part] = each / counts[part]
    model.train(was_training)
    return losses, counts


@torch.no_grad()
def answers(model: nn.Module, tokenizer, asked: list[Question], new_tokens: int) -> list[tuple[str, bool]]:
    """Greedy answers, many prompts at a time: padded on the left, where a mask keeps the padding out of attention and of the positions."""
    was_training, where = model.training, next(model.parameters()).device
    model.eval()
    end, prompts, said = tokenizer.eos_token_id, [render_ids(tokenizer, each.messages, True) for each in asked], {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for places in (order[i : i + ROWS_AT_ONCE] for i in range(0, len(order), ROWS_AT_ONCE)):
        given = pad_batch([Example(tuple(prompts[i]), tuple(prompts[i])) for i in places], tokenizer.pad_token_id, "left")
        length = given["input_ids"].shape[1]
        out = model.generate(
            input_ids=given["input_ids"].to(where),
            attention_mask=given["attention_mask"].to(where),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, row in zip(places, out[:, length:].tolist(), strict=True):
            ended = end in row
            words = tokenizer.decode(row[: row.index(end)] if ended else row, skip_special_tokens=True)
            said[i] = (words.strip(), ended)
    model.train(was_training)
    return [said[i] for i in range(len(asked))]


@dataclass(frozen=True)
class Change:
    """A measure before and after, and the paired difference; above zero is better where ``better`` says so.

    Attributes:
        unit: "nats" or "share".
        lost: what ``compare_losses`` or ``compare_answers`` gives: above zero is worse after than before.
    """

    name: str
    before: float
    after: float
    unit: str
    lost: Interval

    @property
    def verdict(self) -> str:
        """By the interval: "better", "worse", or "no difference shown"."""
        return "better" if self.lost.high < 0 else "worse" if self.lost.low > 0 else "no difference shown"

    def as_dict(self) -> dict:
        interval = {"estimate": self.lost.estimate, "low": self.lost.low, "high": self.lost.high}
        rest = {"before": self.before, "after": self.after, "unit": self.unit, "items": self.lost.count, "verdict": self.verdict}
        return {"name": self.name, **rest, "lost": {key: value if math.isfinite(value) else None for key, value in interval.items()}}


def learned(before: Measured, after: Measured) -> list[Change]:
    """What the run is for."""
    tokens = before.targets
    return [
        _losses("held-out loss", before.losses, after.losses, tokens),
        _answers("right answers", before.right, after.right),
        _answers("answers that end", *(torch.tensor([ended for _, ended in each.said]) for each in (before, after))),
    ]


def forgotten(before: Measured, after: Measured) -> list[Change]:
    """What it cost."""
    return [
        _losses("loss on old text", before.old, after.old),
        *(_answers(f"{name} known", before.known[name], after.known[name]) for name in before.known),
    ]


def _losses(name: str, before: Tensor, after: Tensor, tokens: Tensor | None = None) -> Change:
    weights = torch.ones_like(before) if tokens is None else tokens.double()
    means = ((each * weights).sum().item() / weights.sum().item() for each in (before, after))
    return Change(name, *means, "nats", compare_losses(before, after, tokens))


def _answers(name: str, before: Tensor, after: Tensor) -> Change:
    return Change(name, before.double().mean().item(), after.double().mean().item(), "share", compare_answers(before, after))
