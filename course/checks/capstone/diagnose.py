"""Exercise 3: a symptom: the served model is worse than the evaluated one. Where is it lost, and what is done first?"""

import torch
from scipy.stats import t
from torch import Tensor

from course.checking import Check, but
from course.lab.evaluation import Interval, compare_losses

STAGES = {  # stage -> which measurement before it and after it, what to do where it loses too much
    "merge": ("trained", "merged", "merge again"),
    "serving": ("merged", "served", "look at the server"),
    "forgetting": ("old before", "old after", "replay"),
}


def paired(before: Tensor, after: Tensor) -> Interval:
    return compare_losses(before, after).rise


def estimate_alone(before: Tensor, after: Tensor) -> Interval:
    found = paired(before, after)
    return Interval(found.estimate, found.estimate, found.estimate, found.confidence, found.count)


def unpaired(before: Tensor, after: Tensor) -> Interval:
    n = len(before)
    half = t.ppf(0.975, 2 * n - 2) * ((before.double().var() + after.double().var()) / n).sqrt().item()
    middle = (after.double().mean() - before.double().mean()).item()
    return Interval(middle, middle - half, middle + half, 0.95, n).rise


def in_nats(before: Tensor, after: Tensor) -> Interval:
    return compare_losses(before, after)


def share_of_loss(before: Tensor, after: Tensor) -> Interval:
    found, level = compare_losses(before, after), before.double().mean().item()
    return Interval(found.estimate / level, found.low / level, found.high / level, 0.95, found.count)


def against_trained(stage: str) -> tuple[str, str, str]:
    return ("trained", *STAGES[stage][1:]) if stage == "serving" else STAGES[stage]


def diagnose(
    measured: dict[str, Tensor],
    tolerance: float,
    *,
    compare=paired,
    pair=STAGES.get,
    learned=lambda found: found.high < 0,
    unknown="ask more",
    hasty=False,
    order=("merge", "serving", "forgetting"),
) -> dict:
    """The worked answer: the first stage that is shown to lose too much; what is not known is asked, and only then it ships."""
    if not learned(compare(measured["before"], measured["trained"])):
        return {"do": "train again"}
    found = {stage: compare(*(measured[name] for name in pair(stage)[:2])) for stage in order}
    verdicts = {stage: interval.verdict(tolerance) for stage, interval in found.items()}
    for stage, verdict in verdicts.items():
        if verdict == "beyond":
            return {"do": STAGES[stage][2], "upper": found[stage].high}
        if verdict == "unknown" and hasty:
            break
    if "unknown" in verdicts.values():
        return {"do": unknown, "upper": max(interval.high for interval in found.values())}
    return {"do": "ship", "upper": max(interval.high for interval in found.values())}


def by_hand(measured: dict[str, Tensor], tolerance: float) -> dict:
    """The interval from its formula."""

    def ends(before: Tensor, after: Tensor) -> tuple[float, float]:
        lost = (after - before).double()
        half = t.ppf(0.975, len(lost) - 1) * lost.std().item() / len(lost) ** 0.5
        low, high = torch.tensor([lost.mean().item() - half, lost.mean().item() + half], dtype=torch.float64).expm1().tolist()
        return low, high

    if ends(measured["before"], measured["trained"])[1] >= 0:
        return {"do": "train again"}
    uppers = []
    for before, after, what in STAGES.values():
        low, high = ends(measured[before], measured[after])
        if low > tolerance:
            return {"do": what, "upper": high}
        uppers.append(high)
    return {"do": "ship" if max(uppers) <= tolerance else "ask more", "upper": max(uppers)}


def case(rng: torch.Generator, rises: dict[str, float], rows: int = 64, spread: float = 0.002) -> dict[str, Tensor]:
    """Losses of the same rows along the way; each stage adds its rise, and a little that differs from row to row."""

    def after(before: Tensor, rise: float) -> Tensor:
        return before + rise + spread * torch.randn(rows, generator=rng, dtype=torch.float64)

    level = 1.5 + 0.8 * torch.rand(rows, generator=rng, dtype=torch.float64)  # rows differ far more than models
    trained = after(level, -rises.get("learned", 0.4))
    merged = after(trained, rises.get("merge", 0.0))
    old = 1.5 + 0.8 * torch.rand(rows, generator=rng, dtype=torch.float64)
    served, later = after(merged, rises.get("serving", 0.0)), after(old, rises.get("forgetting", 0.0))
    return {"before": level, "trained": trained, "merged": merged, "served": served, "old before": old, "old after": later}


def observe(answer, seed: int) -> dict:
    rng = torch.Generator().manual_seed(seed)
    share = torch.empty(4, dtype=torch.float64).uniform_(0.05, 0.12, generator=rng).tolist()
    cases = {
        "all is well": case(rng, {}),
        "the merge loses": case(rng, {"merge": share[0]}),
        "the server loses": case(rng, {"serving": share[1]}),
        "old text is lost": case(rng, {"forgetting": share[2]}),
        "merge and old text both lose": case(rng, {"merge": share[0], "forgetting": share[1]}),
        "nothing was learned": case(rng, {"learned": 0.0, "merge": share[3]}, spread=0.01),
        "a loss just above the tolerance, of rows that hardly differ": case(rng, {"merge": 0.024}),
        "a few rows that differ much": case(rng, {"merge": 0.015, "serving": 0.0}, rows=10, spread=0.04),
        "of few rows the merge is not known, and old text is lost": case(rng, {"merge": 0.02, "forgetting": 0.5}, rows=10, spread=0.04),
    }
    return {label: answer({name: losses.clone() for name, losses in measured.items()}, 0.02) for label, measured in cases.items()}


check = Check(
    task="where it is lost, and what to do first",
    observe=observe,
    reference=diagnose,
    second=by_hand,
    misconceptions={
        "the two models were compared as if each had been asked other rows: take the differences row by row first": but(compare=unpaired),
        "you decided by the estimate alone: of ten rows it may be chance, judge by the interval": but(compare=estimate_alone),
        "the tolerance is a share of perplexity, exp(Δ) − 1, not a share of the loss": but(compare=share_of_loss),
        "the server was compared with the trained model and is blamed for the merge as well: compare it with the merged one": but(
            pair=against_trained, order=("serving", "merge", "forgetting")
        ),
        "you did not look whether anything was learned: a run that learned nothing is trained again, however well it was merged": but(
            learned=lambda found: True
        ),
        "what is not known is not within: ask more rows before you ship": but(unknown="ship"),
        "you asked for more rows at the first stage that is not known, and a later one is shown to lose too much: look at all three": but(
            hasty=True
        ),
        "forgetting was looked at first: what is lost after training is mended without training again": but(
            order=("forgetting", "merge", "serving")
        ),
        "the tolerance is a share of perplexity, and your interval is in nats: `.rise` takes it from one to the other": but(
            compare=in_nats
        ),
    },
    rtol=1e-6,
    atol=1e-9,
)
