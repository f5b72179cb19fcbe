"""Exercise 5: the 2 % rule."""

import math
import random

import torch
from scipy.stats import norm, t
from torch import Tensor

from course.checking import Check, Seen, but
from course.checks.qlora.shared import entries


def at_both_ends(low: float, high: float, tolerance: float, estimate: float = 0.0) -> str:
    return "within" if high <= tolerance else "beyond" if low > tolerance else "unknown"


def two_percent_rule(
    baseline: Tensor,
    candidate: Tensor,
    tolerance: float,
    confidence: float,
    *,
    differences=lambda b, c: c.mean(1) - b.mean(1),
    spread=lambda lost, *samples: lost.std() / math.sqrt(len(lost)),
    quantile=t.ppf,
    probability=lambda confidence: (1 + confidence) / 2,
    degrees=lambda n: n - 1,
    share=lambda nats, b: math.expm1(nats),
    interval=lambda nats, half, share: (share(nats - half), share(nats + half)),
    returned=lambda value: value,
    verdict=at_both_ends,
) -> dict[str, float | str]:
    """The worked answer: a paired interval in nats, its ends and the mean as shares of perplexity, and the verdict."""
    b, c = baseline.double(), candidate.double()
    lost = differences(b, c)  # (sequences,)
    half = quantile(probability(confidence), degrees(len(lost))) * float(spread(lost, b, c))
    nats = lost.mean().item()
    estimate, (low, high) = share(nats, b), interval(nats, half, lambda end: share(end, b))
    shares = {"estimate": returned(estimate), "low": returned(low), "high": returned(high)}
    return shares | {"verdict": verdict(low, high, tolerance, estimate)}


def by_scipys_interval(baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> dict:
    """On lists."""
    pairs = [(sum(c) - sum(b)) / len(b) for b, c in zip(baseline.tolist(), candidate.tolist(), strict=True)]
    n = len(pairs)
    mean = sum(pairs) / n
    error = (sum((p - mean) ** 2 for p in pairs) / (n - 1) / n) ** 0.5
    low, high = (math.exp(end) - 1 for end in t.interval(confidence, n - 1, mean, error))
    verdict = "beyond" if low > tolerance else "within" if high <= tolerance else "unknown"
    return {"estimate": math.exp(mean) - 1, "low": low, "high": high, "verdict": verdict}


def of_two_samples(lost: Tensor, *samples: Tensor) -> Tensor:
    return torch.sqrt(sum(losses.mean(1).var() / len(losses) for losses in samples))


def at_the_lower_end(answer, g: torch.Generator) -> Seen:
    """The verdict where the interval begins at the tolerance: at the low end that the answer itself gave.

    A right answer that compares in nats may be off by the last bit, and say "beyond" now and then. A wrong one says so every time.
    """
    verdicts = []
    for _ in range(20):
        baseline = torch.rand(8, 4, generator=g)
        candidate = baseline + 0.1 + 0.05 * torch.randn(8, 1, generator=g)
        try:
            low = float(answer(baseline, candidate, 0.02, 0.95)["low"])
            verdicts.append(answer(baseline, candidate, low, 0.95)["verdict"])
        except (KeyError, TypeError, ValueError, RuntimeError):
            return  # what it returns is no such dictionary, which was seen above
    yield "the verdict where the interval begins at the tolerance", "beyond" if all(said == "beyond" for said in verdicts) else "unknown"


def observe(answer, seed: int) -> Seen:
    g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    # In units of the tolerance: how much is lost, and how much that varies between sequences; exactly, so that the verdict is sure.
    cases = (
        ("12 sequences lose about 0.8 times the tolerance", 0.8, 0.1, 12),
        ("10 sequences lose about 1.25 times the tolerance", 1.25, 0.1, 10),
        ("9 sequences lose 1.2 times the tolerance on average, and vary a lot", 1.2, 1.5, 9),
        ("8 sequences lose 0.8 times the tolerance on average, and vary a lot", 0.8, 1.5, 8),
        ("9 sequences gain about 1.5 times the tolerance", -1.5, 0.1, 9),
        ("10 sequences lose nearly the tolerance in nats, and more than the tolerance as a share", 0.995, 0.001, 10),
    )

    def see(name: str, baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> tuple[str, object]:
        found = answer(baseline.float(), candidate.float(), tolerance, confidence)
        return f"{name} (tolerance {tolerance:g}, confidence {confidence:g})", entries(found, "estimate", "low", "high", "verdict")

    for tolerance, confidence in ((0.02, rng.choice([0.9, 0.98])), (0.05, 0.95)):
        for name, shift, noise, rows in cases:
            lost = torch.randn(rows, 1, generator=g, dtype=torch.float64)
            lost = (shift + noise * (lost - lost.mean()) / lost.std()) * tolerance
            words = torch.randn(rows, 25, generator=g, dtype=torch.float64)
            hard = torch.linspace(1, 3, rows, dtype=torch.float64)[torch.randperm(rows, generator=g)][:, None]
            baseline = hard + torch.rand(rows, 25, generator=g, dtype=torch.float64)
            candidate = baseline + lost + 0.3 * (words - words.mean(1, keepdim=True))
            yield see(name, baseline, candidate, tolerance, confidence)
    # Both ends at the tolerance: at zero, the one place where no order of sums and no exp rounds. (1 + 1e-18)/2 is ½, whose quantile is 0.
    lost = torch.tensor([1, -1, 2, -2, 3, -3, 4, -4])[torch.randperm(8, generator=g)][:, None]
    baseline = torch.randint(64, 256, (8, 32), generator=g)
    yield see("8 sequences lose nothing on average, and the interval has no width", baseline / 64, (baseline + lost) / 64, 0.0, 1e-18)
    yield from at_the_lower_end(answer, g)


check = Check(
    task="the 2 % rule: a paired interval, and three verdicts",
    observe=observe,
    reference=two_percent_rule,
    second=by_scipys_interval,
    misconceptions={
        "the interval is that of two separate samples: both models saw the same sequences, so take the difference of each sequence first; "
        "what makes a text hard then drops out": but(spread=of_two_samples, degrees=lambda n: 2 * n - 2),
        "tokens are counted as the sample: neighbours in a text are surprising together; average each sequence, and let sequences be the "
        "sample": but(differences=lambda b, c: (c - b).flatten()),
        "the width is the spread of the sequences: the spread of their mean is smaller by √n": but(spread=lambda lost, *_: lost.std()),
        "the standard deviation divides by n: the mean was estimated from the same numbers, divide by n − 1": but(
            spread=lambda lost, *_: lost.std(correction=0) / math.sqrt(len(lost))
        ),
        "the quantile is the normal one: with few sequences the spread itself is a guess; use Student's t with n − 1 degrees": but(
            quantile=lambda probability, degrees: norm.ppf(probability)
        ),
        "Student's t has n degrees of freedom here: one is spent on the mean, n − 1 are left": but(degrees=lambda n: n),
        "the interval is one-sided: for two sides the quantile is at (1 + confidence)/2": but(probability=lambda confidence: confidence),
        "the verdict looks at the estimate alone: it must hold at both ends of the interval": but(
            verdict=lambda low, high, tolerance, estimate: "within" if estimate <= tolerance else "beyond"
        ),
        "what is not shown to be within counts as beyond: if the tolerance lies inside the interval, say 'unknown'": but(
            verdict=lambda low, high, tolerance, _: "within" if high <= tolerance else "beyond"
        ),
        "what is not shown to be beyond counts as within: if the tolerance lies inside the interval, say 'unknown'": but(
            verdict=lambda low, high, tolerance, _: "beyond" if low > tolerance else "within"
        ),
        "the verdict compares nats with the tolerance: compare the shares, exp(Δ) − 1": but(
            verdict=lambda low, high, tolerance, _: at_both_ends(math.log1p(low), math.log1p(high), tolerance)
        ),
        "a model that is better by more than the tolerance is within it too: only a loss is limited": but(
            verdict=lambda low, high, tolerance, _: (
                "within" if -tolerance <= low and high <= tolerance else "beyond" if low > tolerance else "unknown"
            )
        ),
        "an interval that ends at the tolerance is within it: compare its upper end with <=": but(
            verdict=lambda low, high, tolerance, _: "within" if high < tolerance else "beyond" if low > tolerance else "unknown"
        ),
        "an interval at the tolerance itself is not beyond it: compare its lower end with >, not with >=": but(
            verdict=lambda low, high, tolerance, _: "beyond" if low >= tolerance else "within" if high <= tolerance else "unknown"
        ),
        "an interval that begins at the tolerance is not beyond it: all of it must be above, so compare its lower end with >": but(
            verdict=lambda low, high, tolerance, _: "within" if high <= tolerance else "beyond" if low >= tolerance else "unknown"
        ),
        "the verdict asks whether anything is lost at all: compare the interval with the tolerance, not with 0": but(
            verdict=lambda low, high, tolerance, _: "beyond" if low > 0 else "within"
        ),
        "the shares are in per cent: return exp(Δ) − 1 as it is": but(returned=lambda value: 100 * value),
        "the shares are in per cent, and the tolerance is not: 0.02 stands for 2 %; return exp(Δ) − 1 as it is": but(
            share=lambda nats, b: 100 * math.expm1(nats)
        ),
        "the ends of the interval are still in nats: take exp(…) − 1 of low and high too, as of the estimate": but(
            interval=lambda nats, half, share: (nats - half, nats + half)
        ),
        "n stands for n − 1 twice, in the standard deviation and in Student's t: one degree of freedom is spent on the mean": but(
            spread=lambda lost, *_: lost.std(correction=0) / math.sqrt(len(lost)), degrees=lambda n: n
        ),
        "half the width of the interval, in nats, was added to the estimate, a share: take the ends in nats, then exp(…) − 1 of each": but(
            interval=lambda nats, half, share: (share(nats) - half, share(nats) + half)
        ),
        "each sequence's loss was made a share before the mean: take the mean and the interval in nats, then exp(…) − 1 of all three": but(
            differences=lambda b, c: (c - b).mean(1).expm1(), share=lambda nats, b: nats
        ),
        "the interval is laid around the estimate as a share: take its ends in nats, then exp(…) − 1 of each": but(
            interval=lambda nats, half, share: tuple(share(nats) + side * math.exp(nats) * half for side in (-1, 1))
        ),
        "the variance stands where the standard deviation belongs: take its root": but(spread=lambda x, *_: x.var() / math.sqrt(len(x))),
        "the sample are the columns: average over the tokens, the second axis": but(differences=lambda b, c: (c - b).mean(0)),
        "the tolerance is always 2 %: use the argument": but(verdict=lambda low, high, *_: at_both_ends(low, high, 0.02)),
        "the confidence is always 95 %: use the argument": but(probability=lambda confidence: 0.975),
        "these are nats per token, not a share of perplexity: a loss of Δ nats is a rise of exp(Δ) − 1": but(share=lambda nats, b: nats),
        "the share is taken of the loss: 2 % of the nats is not 2 % of the perplexity; a loss of Δ nats is a rise of exp(Δ) − 1, whatever "
        "the loss": but(share=lambda nats, b: nats / b.mean().item()),
        "these are points of perplexity: divide by the baseline's perplexity, or take exp(Δ) − 1": but(
            share=lambda nats, b: b.mean().exp().item() * math.expm1(nats)
        ),
        "the share is taken of the quantized model's perplexity: the baseline is what 2 % refers to, exp(Δ) − 1": but(
            share=lambda nats, b: 1 - math.exp(-nats)
        ),
        "the sign is turned around: what is lost is candidate − baseline, positive where quantizing made the loss higher": but(
            differences=lambda b, c: b.mean(1) - c.mean(1)
        ),
    },
    rtol=1e-3,  # means of float32 losses, of which the difference is a thousandth
    atol=2e-6,
)
