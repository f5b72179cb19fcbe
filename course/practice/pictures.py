"""What notebook 15 draws: the bank, how memory fades, and the reader's progress."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from course.lab import plotting
from course.practice.bank import Item
from course.practice.choices import Progress
from course.practice.journal import RATINGS, Review
from course.practice.memory import Known, memory

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)  # of no meaning: only differences are shown


def draw_bank(items: Sequence[Item]) -> plt.Figure:
    """Questions by unit, from easy to hard."""
    units = sorted({item.unit for item in items})
    figure, axes = plt.subplots(figsize=(7.2, 3.2))
    bottom, shades = np.zeros(len(units)), plt.get_cmap(plotting.SEQUENTIAL)(np.linspace(0.9, 0.1, 5))
    for level in range(1, 6):
        count = np.array([sum(item.unit == unit and item.difficulty == level for item in items) for unit in units])
        axes.bar(units, count, bottom=bottom, color=shades[level - 1], label=str(level))
        bottom += count
    axes.set(xlabel="unit", ylabel="questions", title="The question bank by unit and difficulty")
    axes.grid(axis="x", visible=False)
    axes.legend(title="difficulty", ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    return figure


def rated(ratings: Sequence[int]) -> tuple[list[float], Known]:
    """Days between the times on which a question is due, if each time gets the next of ``ratings``, and what is known of it at the end."""
    now, reviews, waits = NOON, [], []
    for rating in ratings:
        reviews.append(Review("any", rating, at=now))
        known = memory(reviews)["any"]
        waits.append((known.due - now) / timedelta(days=1))
        now = known.due
    return waits, known


def draw_fading(days: int = 30) -> plt.Figure:
    """The chance of still knowing an answer, after one rating and after several good ones."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True)
    times = range(days + 1)  # the model counts whole days
    for number, colour in zip(RATINGS, plotting.COLOURS, strict=False):
        _, known = rated([number])
        chances = [100 * known.chance(NOON + timedelta(days=day)) for day in times]
        left.plot(times, chances, color=colour)
        left.text(days + 0.7, chances[-1], RATINGS[number][0], color=colour, va="center")
    left.set(xlabel="days since", ylabel="chance to know it, %", title="After the first answer", xlim=(0, 1.22 * days), ylim=(40, 101))
    left.axhline(90, color=plotting.BLACK, linewidth=0.8, linestyle=":")
    start, shown = 0.0, 0.0
    waits, _ = rated([3] * 6)
    for count, wait in enumerate(waits, 1):
        if start > 3 * days:
            break
        _, known = rated([3] * count)
        last = NOON + timedelta(days=start)
        stretch = range(round(wait) + 1)
        chances = [100 * known.chance(last + timedelta(days=day)) for day in stretch]
        right.plot([start + day for day in stretch], chances, color=plotting.GREEN)
        start += wait
        shown = start
    right.axhline(90, color=plotting.BLACK, linewidth=0.8, linestyle=":")
    right.set(xlabel="days since the first answer", title="Asked when due, and known", xlim=(0, shown))
    return figure


def draw_progress(progress: Sequence[Progress]) -> plt.Figure:
    """Unit by unit: what is held, what was asked, what is left; and the share of right choices."""
    units = [each.unit for each in progress]
    held, seen = (np.array([getattr(each, name) for each in progress]) for name in ("held", "seen"))
    all_of_them = np.array([each.questions for each in progress])
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 0.3 * len(units) + 1.4), sharey=True, width_ratios=(2, 1))
    left.barh(units, held, color=plotting.BLUE, label="held")
    left.barh(units, seen, left=held, color=plotting.SKY, label="asked")
    left.barh(units, all_of_them - held - seen, left=held + seen, color="#E3E3E3", label="not yet asked")
    left.invert_yaxis()
    left.set(xlabel="questions", ylabel="unit", title="Quiz and interview")
    share = [100 * each.right / each.chosen if each.chosen else 0 for each in progress]
    right.barh(units, share, color=plotting.GREEN)
    for place, each in enumerate(progress):
        right.text(share[place] + 2, place, f"{each.right}/{each.chosen}" if each.chosen else "–", va="center", fontsize=8)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(xlabel="right at first, %", title="Multiple choice", xlim=(0, 125), xticks=(0, 50, 100))
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
