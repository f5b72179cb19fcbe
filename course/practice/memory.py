"""When a question is due again.

The model is FSRS (free spaced repetition scheduler): from the ratings so far it estimates how long an answer stays in memory, and asks
again on the day on which the chance of still knowing it falls to 90 %. Nothing of it is stored.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache

from course.practice.journal import Review


@cache
def _scheduler():
    import fsrs

    # one step: what was known the first time is not asked again on the same day; without fuzz the same journal gives the same dates
    return fsrs.Scheduler(desired_retention=0.9, learning_steps=(timedelta(minutes=10),), enable_fuzzing=False)


@dataclass(frozen=True)
class Known:
    """What is known of one question's place in memory.

    Attributes:
        due: when to ask again.
        stability_days: after how many days the chance to know it falls to 90 %.
        times: how often it was rated.
        last: the last rating.
        card: FSRS's own.
    """

    due: datetime
    stability_days: float
    times: int
    last: int
    card: object

    def chance(self, now: datetime) -> float:
        """Of still knowing the answer, 0 to 1."""
        return _scheduler().get_card_retrievability(self.card, now)

    def after(self, rating: int, now: datetime) -> timedelta:
        """How long until it is asked again, if ``rating`` is given now."""
        return _after(self.card, rating, now).due - now


def _after(card, rating: int, at: datetime):
    import fsrs

    return _scheduler().review_card(card, fsrs.Rating(rating), at)[0]


def _new_card(at: datetime):
    import fsrs

    return fsrs.Card(card_id=0, due=at)  # an id of its own would cost a millisecond's sleep, and nothing reads it


def memory(reviews: Iterable[Review]) -> dict[str, Known]:
    """By question; multiple choice does not count: to recognise an answer is easier than to give it."""
    cards, found = {}, {}
    for review in sorted(reviews, key=lambda review: review.at):
        if review.by == "choice":
            continue
        name = review.question
        cards[name] = _after(cards.get(name) or _new_card(review.at), review.rating, review.at)
        times = found[name].times + 1 if name in found else 1
        found[name] = Known(cards[name].due, cards[name].stability or 0.0, times, review.rating, cards[name])
    return found


def first_time(rating: int, now: datetime) -> timedelta:
    """How long until a new question is asked again, if ``rating`` is given now."""
    return _after(_new_card(now), rating, now).due - now


def in_words(wait: timedelta) -> str:
    """ "10 min", "3 h", "8 days", "2 months"."""
    minutes = wait / timedelta(minutes=1)
    if minutes < 60:
        return f"{max(1, round(minutes))} min"
    if minutes < 60 * 24:
        return f"{round(minutes / 60)} h"
    days = round(minutes / 60 / 24)
    if days < 60:
        return "1 day" if days == 1 else f"{days} days"
    return f"{round(days / 30.4)} months" if days < 730 else f"{days / 365.25:.0f} years"


def end_of_today(now: datetime | None = None) -> datetime:
    """Midnight where the user is: what is due in the course of a day is asked on that day."""
    local = (now or datetime.now(UTC)).astimezone()
    return local.replace(hour=23, minute=59, second=59, microsecond=0).astimezone(UTC)
