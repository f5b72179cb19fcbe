"""Exercise 2: which page has to go, and how often the one that is needed is there."""

import random
from collections import Counter, OrderedDict

from course.checking import Check, but, unpacked

VICTIM = {"lru": 0, "mru": -1}  # place in a list whose last entry was used last


def replace(
    accesses: list[int],
    frames: int,
    policy: str,
    *,
    victim=VICTIM,
    room=lambda there, frames: len(there) < frames,
    used=lambda there, page: there.append(there.pop(there.index(page))),  # a hit: the page was used last
    enters=lambda there, page: there.append(page),
    counted=lambda hits, misses: hits,
    gone=lambda page, out: out,
) -> tuple[int, list[int]]:
    """The worked answer: ``there`` lists the pages in frames, the one used last at the end."""
    there, hits, evicted = [], 0, []
    for page in accesses:
        if page in there:
            hits += 1
            used(there, page)
            continue
        if not room(there, frames):
            evicted.append(gone(page, there.pop(victim[policy])))
        enters(there, page)
    return counted(hits, len(accesses) - hits), evicted


def by_times(accesses, frames, policy):
    """The time of each page's last use, and the least or the greatest of them."""
    last, evicted, hits = {}, [], 0
    choose = {"lru": min, "mru": max}[policy]
    for time, page in enumerate(accesses):
        if page in last:
            hits += 1
        elif len(last) == frames:
            evicted.append(choose(last, key=last.get))
            del last[evicted[-1]]
        last[page] = time
    return hits, evicted


def least_often(accesses, frames, policy):
    there, counts, hits, evicted = OrderedDict(), Counter(), 0, []
    for page in accesses:
        counts[page] += 1
        if page in there:
            hits += 1
            continue
        if len(there) == frames:
            out = (min if policy == "lru" else max)(there, key=counts.__getitem__)
            evicted.append(out)
            del there[out]
        there[page] = True
    return hits, evicted


def observe(answer, seed: int):
    draw = random.Random(seed)
    pages, frames = draw.randrange(6, 10), draw.randrange(3, 5)
    orders = {
        "the same four pages again": [0, 1, 2, 3, 0, 1, 2, 3],
        "with all pages in the same order in every step": [*range(pages)] * 4,
        "with every other step backwards": [*range(pages), *reversed(range(pages))] * 2,
        "with pages in any order": draw.choices(range(pages), k=60),
    }
    for name, accesses in orders.items():
        count = 4 if name.startswith("the same") else frames
        for policy in VICTIM:
            found = unpacked(
                answer(list(accesses), count, policy), "a pair: the number of hits, and the list of evicted pages", object, (list, tuple)
            )
            label = f"{policy} with {count} frames, {name}"
            yield f"{label}: hits", found[0]
            yield f"{label}: evicted pages", found[1]


check = Check(
    task="which page has to go",
    observe=observe,
    reference=replace,
    second=by_times,
    misconceptions={
        "a hit does not count as a use: the page that came in first goes out first, which is FIFO. A page that is hit was used last": but(
            used=lambda there, page: None
        ),
        "lru and mru have changed places: lru evicts the page whose last use is longest ago": but(victim={"lru": -1, "mru": 0}),
        "both policies evict the page whose last use is longest ago: mru evicts the one that was used last": but(
            victim={"lru": 0, "mru": 0}
        ),
        "a page is evicted while a frame is still free: evict only when all frames are taken": but(
            room=lambda there, frames: len(there) < frames - 1
        ),
        "there is one page too many: at most `frames` pages are there at a time": but(room=lambda there, frames: len(there) <= frames),
        "the page that comes in counts as the one used longest ago: it has just been used": but(
            enters=lambda there, page: there.insert(0, page)
        ),
        "those are the misses: count how often the page was there": but(counted=lambda hits, misses: misses),
        "the list holds the pages that came in: it holds those that had to go": but(gone=lambda page, out: page),
        "pages go by how often they were used: what counts is when they were used last": least_often,
        "a hit moves the page to the end of those to be kept least: after a hit it is the one used last": but(
            used=lambda there, page: there.insert(0, there.pop(there.index(page)))
        ),
    },
)
