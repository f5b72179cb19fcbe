"""Is the quantized model as good as the original? Paired differences, an interval around them, and a rule that decides by the interval.

Two models are asked the *same* questions, so the difference is taken sequence by sequence (or question by question) before anything is
averaged: what makes a text hard is in both losses and drops out. What is left varies far less than either loss, and a few dozen sequences
say what thousands would have to say about two separate averages.

    compare_losses(baseline, candidate)      nats per token lost; .rise is the same as a share of perplexity, exp(Δ) − 1
    compare_answers(baseline, candidate)     share of questions lost, after McNemar's table: right before and wrong now, and the reverse
    recommend(...)                           the cheapest format that is shown to lose at most 2 %, or "not enough data"

"If the 4-bit model loses more than 2 %, use 8 bits" is a rule about the loss itself. A sample shows an estimate of it, so the rule has
three outcomes and not two: shown to be within, shown to be beyond, and not known yet.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from scipy.stats import norm, t
from torch import Tensor, nn
from torch.nn import functional as F

from course.lab.quantized import quantized_copy
from course.lab.world import World

FORMATS = {"4-bit": "NF4+DQ", "8-bit": "INT8"}  # cheapest first; 16 bits are what both are held against
FULL, UNKNOWN = "16-bit", "not enough data"
FEWEST = 8  # sequences: below, the spread itself is a guess


@dataclass(frozen=True)
class Interval:
    """An estimate of what is lost, and between which values it lies; above zero is worse than the baseline.

    Attributes:
        estimate, low, high: nats per token from :func:`compare_losses`, a share of the questions from :func:`compare_answers`.
        confidence: how often such an interval holds the true value, over repeated samples.
        count: sequences or questions.
    """

    estimate: float
    low: float
    high: float
    confidence: float
    count: int

    @property
    def rise(self) -> "Interval":
        """Of nats: the same as a share of the baseline's perplexity, exp(Δ) − 1. 0.02 nats are 2.02 %."""
        return Interval(*(math.expm1(x) for x in (self.estimate, self.low, self.high)), self.confidence, self.count)

    def verdict(self, tolerance: float) -> str:
        """ "within" or "beyond" ``tolerance``, where the whole interval is; else "unknown"."""
        return "within" if self.high <= tolerance else "beyond" if self.low > tolerance else "unknown"

    def needed(self, tolerance: float) -> int | None:
        """About how many sequences or questions would decide, if the estimate stays what it is.

        None where that can't be said: the estimate is at the tolerance itself, or nothing changed, and so nothing is known of the spread.
        """
        margin, half = abs(self.estimate - tolerance), (self.high - self.low) / 2
        return math.ceil(self.count * (half / margin) ** 2) if margin > 1e-9 and self.estimate else None

    def __str__(self) -> str:
        return f"{100 * self.estimate:+.2f} % ({100 * self.low:+.2f} to {100 * self.high:+.2f})"


def _check(baseline: Tensor, candidate: Tensor, confidence: float) -> None:
    if baseline.shape != candidate.shape or baseline.ndim != 1:
        raise ValueError(
            f"baseline and candidate must be two vectors over the same items, got {tuple(baseline.shape)} and {tuple(candidate.shape)}"
        )
    if len(baseline) < FEWEST:
        raise ValueError(f"need at least {FEWEST} sequences or questions to see how much they vary, got {len(baseline)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def compare_losses(
    baseline: Sequence[float] | Tensor,
    candidate: Sequence[float] | Tensor,
    tokens: Sequence[int] | Tensor | None = None,
    confidence: float = 0.95,
) -> Interval:
    """How many nats per token ``candidate`` loses, from the losses of the same sequences under both models.

    The sequences are the sample, not their tokens: neighbouring tokens are surprising together, and counting them as independent gives an
    interval that is too narrow. Student's t over the paired differences; with ``tokens`` of the total over the total (the ratio estimator).

    Args:
        baseline, candidate: mean nats per token of each sequence, (sequences,).
        tokens: how many of each sequence were predicted; None where all sequences are equally long.

    Raises:
        ValueError: other lengths than one another, fewer than 8 sequences, NaN or infinity, or a token count below one.
    """
    baseline, candidate = (torch.as_tensor(x, dtype=torch.float64) for x in (baseline, candidate))
    _check(baseline, candidate, confidence)
    if not (torch.isfinite(baseline).all() and torch.isfinite(candidate).all()):
        raise ValueError("losses hold NaN or infinity: a model that is broken needs no interval")
    weights = torch.ones_like(baseline) if tokens is None else torch.as_tensor(tokens, dtype=torch.float64)
    if weights.shape != baseline.shape or (weights < 1).any():
        raise ValueError(f"tokens must be one count of at least 1 for each of the {len(baseline)} sequences")
    lost, n = candidate - baseline, len(baseline)
    estimate = ((lost * weights).sum() / weights.sum()).item()
    residuals = (lost - estimate) * weights / weights.mean()  # (sequences,)
    half = t.ppf((1 + confidence) / 2, n - 1) * residuals.norm().item() / math.sqrt(n * (n - 1))
    return Interval(estimate, estimate - half, estimate + half, confidence, n)


def compare_answers(baseline: Sequence[bool] | Tensor, candidate: Sequence[bool] | Tensor, confidence: float = 0.95) -> Interval:
    """What share of the questions ``candidate`` loses: right under the baseline and wrong now, less the reverse.

    Only the questions whose answer changed tell the two models apart (McNemar 1947). The interval is the set of differences that a score
    test would not reject (Tango 1998). The usual one, estimate ± z standard errors, has no width where no answer changed: it would call 20
    questions certainty. This one then ends at z²/(n + z²), 16 points for 20 questions and 2 for 189.

    Raises:
        ValueError: other lengths than one another, or fewer than 8 questions.
    """
    baseline, candidate = (torch.as_tensor(x, dtype=torch.bool) for x in (baseline, candidate))
    _check(baseline, candidate, confidence)
    n, lost, gained = len(baseline), (baseline & ~candidate).sum().item(), (~baseline & candidate).sum().item()
    estimate, z = (lost - gained) / n, norm.ppf((1 + confidence) / 2)

    def score(difference: float) -> float:
        """How many standard errors the table is above ``difference``, with the share gained that is likeliest under it."""
        b, c = (2 * n - lost + gained) * difference - lost - gained, -gained * difference * (1 - difference)
        share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return (lost - gained - n * difference) / math.sqrt(variance) if variance > 0 else math.inf * (estimate - difference or 1)

    low = brentq(lambda x: score(x) - z, -1 + 1e-12, estimate - 1e-12) if estimate > -1 else -1.0
    high = brentq(lambda x: score(x) + z, estimate + 1e-12, 1 - 1e-12) if estimate < 1 else 1.0
    return Interval(estimate, low, high, confidence, n)


@dataclass(frozen=True)
class Verdict:
    """What :func:`recommend` says.

    Attributes:
        choice: "4-bit", "8-bit", "16-bit", or "not enough data", where a cheaper format than ``safe`` is neither within nor beyond.
        safe: the cheapest format that is shown to be within the tolerance; what to use meanwhile.
        found: format -> measure -> what is lost, as a share.
        tolerance: the largest share that may be lost.
    """

    choice: str
    safe: str
    found: Mapping[str, Mapping[str, Interval]]
    tolerance: float

    def __str__(self) -> str:
        lines = []
        for label, measures in self.found.items():
            for name, interval in measures.items():
                verdict = interval.verdict(self.tolerance)
                needed = interval.needed(self.tolerance) if verdict == "unknown" else None
                lines.append(f"{label:8}{name:14}{interval!s:34}{verdict}")
                if verdict == "unknown":  # on a line of its own: 80 columns hold it
                    lines.append(f"{'':22}{f'about {needed:,} items would decide' if needed else 'more items are needed'}")
        meanwhile = f" (meanwhile {self.safe})" * (self.choice == UNKNOWN)
        return "\n".join([*lines, f"→ {self.choice}{meanwhile}, for a tolerance of {100 * self.tolerance:g} %"])


def recommend(found: Mapping[str, Mapping[str, Interval]], tolerance: float = 0.02) -> Verdict:
    """The 2 % rule: the cheapest format that loses at most ``tolerance`` by every measure, judged by the intervals.

    A format is *within* if every interval ends at or below the tolerance, *beyond* if one begins above it, else unknown.

    Args:
        found: format -> measure -> share lost, the cheapest format first. Perplexity as ``Interval.rise``, accuracy in shares of all
            questions (points).

    Raises:
        ValueError: nothing was compared, or the tolerance is not a positive number.
    """
    if not found or not all(found.values()):
        raise ValueError("found must hold at least one measure for each format")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be a positive share such as 0.02, got {tolerance}")
    choice = None
    for label, measures in found.items():
        verdicts = {interval.verdict(tolerance) for interval in measures.values()}
        if "beyond" in verdicts:
            continue
        if verdicts == {"within"}:
            return Verdict(choice or label, label, found, tolerance)
        choice = UNKNOWN
    return Verdict(choice or FULL, FULL, found, tolerance)


def two_percent_rule(
    model: nn.Module,
    measures: Mapping[str, Callable[[nn.Module], Tensor]],
    tolerance: float = 0.02,
    formats: Mapping[str, str] = FORMATS,
    confidence: float = 0.95,
    block_size: int = 64,
) -> Verdict:
    """Quantize copies of ``model``, ask all of them the same questions, and recommend a format.

    With k measures a format that is good enough has k chances of looking bad, so each interval is made at 1 − (1 − confidence)/k
    (Bonferroni).

    Args:
        measures: name -> function of a model. It returns a float tensor, losses in nats per token of each sequence, or a bool tensor, which
            questions were answered rightly; always in the same order.
        formats: label -> kind (see ``course.lab.quantized``), the cheapest first.
    """
    if not measures:
        raise ValueError("measures is empty: name at least one, such as {'perplexity': lambda m: sequence_losses(m, ids)}")
    each = 1 - (1 - confidence) / len(measures)
    before = {name: measure(model) for name, measure in measures.items()}
    found = {}
    for label, kind in formats.items():
        candidate = quantized_copy(model, kind, block_size)
        found[label] = {name: share_lost(before[name], measure(candidate), each) for name, measure in measures.items()}
    return recommend(found, tolerance)


def share_lost(baseline: Tensor, candidate: Tensor, confidence: float = 0.95) -> Interval:
    """What ``recommend`` takes: of answers (bool) the share lost, of losses (float) the rise in perplexity."""
    if baseline.dtype == torch.bool:
        return compare_answers(baseline, candidate, confidence)
    return compare_losses(baseline, candidate, confidence=confidence).rise


@torch.no_grad()
def sequence_losses(model: nn.Module, ids: Tensor, rows_at_once: int = 64) -> Tensor:
    """Mean nats per predicted token of each row of ``ids`` (rows, length): float64, (rows,), on the CPU; the model's mode is kept."""
    was_training, where, found = model.training, next(model.parameters()).device, []
    model.eval()
    for part in ids.split(rows_at_once):
        part = part.to(where)
        logits = model(input_ids=part[:, :-1]).logits.float()  # (rows, length − 1, vocabulary)
        found.append(F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").double().mean(1).cpu())
    model.train(was_training)
    return torch.cat(found)


@torch.no_grad()
def sequence_divergence(model: nn.Module, baseline: nn.Module, ids: Tensor, rows_at_once: int = 64) -> Tensor:
    """Mean KL divergence of ``model``'s next-word distribution from ``baseline``'s, nats per token of each row: float64, (rows,).

    Never negative, and without the noise of which word came next: it orders formats whose losses can't be told apart. It says how *far* a
    model has moved, not that it got worse.
    """
    modes, where, found = [(m, m.training) for m in (model, baseline)], next(model.parameters()).device, []
    model.eval(), baseline.eval()
    for part in ids.split(rows_at_once):
        log_q, log_p = (m(input_ids=part[:, :-1].to(where)).logits.float().log_softmax(-1) for m in (model, baseline))
        found.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).double().sum(-1).mean(1).cpu())
    for m, was_training in modes:
        m.train(was_training)
    return torch.cat(found)


@torch.no_grad()
def words_right(model: nn.Module, ids: Tensor, asked: Tensor) -> Tensor:
    """For each row of ``ids`` (rows, length), whether the model's likeliest next word is right wherever it is asked: bool, (rows,).

    Args:
        asked: bool, (rows, length − 1): the places that count. ``world.log_probs(domain, ids) > -1e-9`` are those where only one word can
            follow: a fact, a sum, the number of a verb. So there are as many questions as one likes.
    """
    was_training = model.training
    model.eval()
    best = model(input_ids=ids[:, :-1].to(next(model.parameters()).device)).logits.argmax(-1).cpu()
    model.train(was_training)
    return ((best == ids[:, 1:]) | ~asked).all(1)


@torch.no_grad()
def facts_right(model: nn.Module, world: World) -> Tensor:
    """For each of the world's facts, whether the model's likeliest next word is the right one: bool, (facts,)."""
    was_training, where = model.training, next(model.parameters()).device
    model.eval()
    questions, answers = zip(*world.facts(), strict=True)
    ids = [world.tokenizer(question).input_ids for question in questions]
    wanted = torch.tensor([world.vocabulary.index(answer) for answer in answers])  # an id: a model may have more words than the world
    right = torch.zeros(len(ids), dtype=torch.bool)
    for length in {len(row) for row in ids}:  # equal lengths together: no padding, no mask
        chosen = [i for i, row in enumerate(ids) if len(row) == length]
        best = model(input_ids=torch.tensor([ids[i] for i in chosen], device=where)).logits[:, -1].argmax(-1).cpu()
        right[chosen] = best == wanted[chosen]
    model.train(was_training)
    return right
