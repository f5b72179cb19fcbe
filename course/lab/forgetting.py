"""What was forgotten when as much was learned: the one fair question about methods against forgetting, and intervals around its answers.

A method that learns less forgets less, whatever else it does. So runs are compared where they have learned equally much: the loss on the
new task is followed along the run, and the loss on the old one is read where the new one first reaches a level.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import t


def at_equal_learning(new: Sequence[float], old: Sequence[float], level: float) -> float | None:
    """The loss on the old task where that on the new one first reaches ``level``, linearly between two measurements; None if it never does.

    Args:
        new, old: losses along a run, at the same moments; the first before training.
        level: what the loss on the new task has to come down to.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(new) != len(old) or not new:
        raise ValueError(f"new and old must be of one length and not empty, got {len(new)} and {len(old)}")
    if new[0] <= level:
        return old[0]
    for i in range(1, len(new)):
        if new[i] <= level:
            share = (new[i - 1] - level) / (new[i - 1] - new[i])
            return old[i - 1] + share * (old[i] - old[i - 1])
    return None


class Mean(NamedTuple):
    """A mean over seeds and the ends of its 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float


def mean_of(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Of at least two values.

    Raises:
        ValueError: there are fewer.
    """
    if len(values) < 2:
        raise ValueError(f"values must be at least two, for a spread; got {len(values)}")
    middle = statistics.fmean(values)
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Mean(middle, middle - half, middle + half)
