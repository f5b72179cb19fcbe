"""Exercise 5: which recipes give a stated figure."""

import math
import operator
import random

from course.checking import Check, but


def matching_recipes(
    parameters: int,
    gigabytes: float,
    recipes: dict[str, float],
    tolerance: float,
    *,
    unit: float = 1,
    billions=lambda parameters: parameters / 10**9,
    rounded=lambda total: total,
    distance=lambda total, stated: abs(total - stated),
    within=operator.le,
    share_of=lambda total, stated: stated,
    chosen=lambda names, off: names,  # off: name -> distance
) -> list[str]:
    """The worked answer: |total − stated| ≤ tolerance · stated, in GB."""
    stated = gigabytes * unit
    totals = {name: rounded(billions(parameters) * each) for name, each in recipes.items()}
    off = {name: distance(total, stated) for name, total in totals.items()}
    return chosen([name for name in recipes if within(off[name], tolerance * share_of(totals[name], stated))], off)


def by_parameter(parameters: int, gigabytes: float, recipes: dict[str, float], tolerance: float) -> list[str]:
    """A right answer that compares bytes per parameter."""
    stated = gigabytes * 1e9 / parameters
    return [name for name, each in recipes.items() if (1 - tolerance) * stated <= each <= (1 + tolerance) * stated]


FINE = {f"{total} GB": total / 1.3 for total in (4.66, 4.69, 5.25, 5.71, 5.73)}  # 4.68 to 5.72 GB are within a tenth


def observe(answer, seed: int) -> dict:
    """Figures with recipes just inside, just outside and at the edge on both sides, two recipes alike, and a figure that none gives."""
    rng = random.Random(seed)
    parameters, tolerance = rng.randint(10**9, 10**11), rng.choice([0.1, 0.15])
    each = rng.uniform(6, 9)
    recipes = {  # in an order that sorting would change
        "well below": each / 2.1,
        "nearest too": each * 1.01,
        "below by too much": each * (1 - 1.04 * tolerance),
        "nearest": each * 1.01,
        "within reach of a figure in GiB": each * (1 + 1.5 * tolerance),
        "a little below": each * (1 - 0.96 * tolerance),
        "above by too much": each * (1 + 1.04 * tolerance),
        "a little above": each * (1 + 0.96 * tolerance),
        "well above": each * 2.1,
    }
    stated = parameters * each / 1e9
    # powers of two, so that the edge is met exactly in whatever order and unit one calculates
    billions, edges = 2 ** rng.randint(0, 7), {"too low": 5.5, "lower edge": 6, "equal": 8, "upper edge": 10, "too high": 10.5}
    return {
        "recipes on both sides of the stated figure": answer(parameters, stated, dict(recipes), tolerance),
        "a figure that no recipe gives": answer(parameters, stated * 4, dict(recipes), tolerance),
        f"{billions}B parameters, {8 * billions} GB, recipes {edges}, tolerance 0.25": answer(
            billions * 10**9, 8.0 * billions, dict(edges), 0.25
        ),
        f"1.3B parameters, 5.2 GB, recipes {FINE}, tolerance 0.1": answer(13 * 10**8, 5.2, dict(FINE), 0.1),
    }


check = Check(
    task="which recipes give a stated figure",
    observe=observe,
    reference=matching_recipes,
    second=by_parameter,
    misconceptions={
        "you read the stated figure as GiB: it is in GB, 10⁹ bytes": but(unit=2**30 / 10**9),
        "the total is rounded to whole GB before it is compared: compare it as it is": but(rounded=round),
        "the total is rounded to tenths of a GB before it is compared: compare it as it is": but(rounded=lambda total: round(total, 1)),
        "the list is always empty: append each name that fits, and return the list at the end": but(chosen=lambda *_: []),
        "the parameters are cut to whole billions: divide by 10**9 with / and not with //": but(billions=lambda n: n // 10**9),
        "you return the nearest recipe even where none is near: an empty list is an answer": but(
            chosen=lambda names, off: [min(off, key=off.get)]
        ),
        "several recipes can give the same figure: return all within the tolerance, not the nearest alone": but(
            chosen=lambda names, off: sorted(names, key=off.get)[:1]
        ),
        "a recipe may need less or more than the stated figure; yours must not exceed it": but(
            distance=lambda total, stated: stated - total if total <= stated else math.inf
        ),
        "every recipe that needs no more than the figure is in your list: it must come near the figure, not fit under it": but(
            distance=operator.sub
        ),
        "the tolerance is a share already, 0.1 for a tenth: don't divide it by 100": but(share_of=lambda total, stated: stated / 100),
        "the tolerance is a share of the stated figure; you took it as so many GB": but(share_of=lambda total, stated: 1),
        "the tolerance is a share of the stated figure; you took it of what the recipe gives": but(share_of=lambda total, stated: total),
        "math.isclose takes rel_tol as a share of the larger of its two numbers: a recipe above the figure may then be too far from it; "
        "the tolerance is a share of the stated figure, |total − stated| ≤ tolerance · stated": but(share_of=max),
        "a recipe exactly at the tolerance is within it: at most `tolerance` · stated (≤), not less": but(within=operator.lt),
        "you sorted the names: keep the order of `recipes`": but(chosen=lambda names, off: sorted(names)),
    },
)
