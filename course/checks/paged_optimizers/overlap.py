"""Exercise 4: when a step is done whose copies run beside its updates."""

import functools
import random

from course.checking import Check, but


def step_time(
    pages: int,
    frames: int,
    load: float,
    update: float,
    store: float,
    *,
    frame_free=lambda i, frames, done, stored: stored[i - frames] if i >= frames else 0.0,
    out_lane=lambda i, loaded, stored: stored[i - 1] if i else 0.0,
    in_lane=lambda i, loaded, done, stored: loaded[i - 1] if i else 0.0,
    needs=lambda i, loaded: loaded[i],
    end=lambda loaded, done, stored: stored[-1],
) -> float:
    """The worked answer: each event is the later of two earlier ones, and its own duration."""
    loaded, done, stored = [], [], []
    for i in range(pages):
        loaded.append(max(in_lane(i, loaded, done, stored), frame_free(i, frames, done, stored)) + load)
        done.append(max(needs(i, loaded), done[-1] if done else 0.0) + update)
        stored.append(max(done[i], out_lane(i, loaded, stored)) + store)
    return end(loaded, done, stored)


def backwards(pages, frames, load, update, store):
    """From the last event back to what it waits for."""

    @functools.cache
    def stored(i):
        return 0.0 if i < 0 else max(done(i), stored(i - 1)) + store

    @functools.cache
    def done(i):
        return 0.0 if i < 0 else max(loaded(i), done(i - 1)) + update

    @functools.cache
    def loaded(i):
        return 0.0 if i < 0 else max(loaded(i - 1), stored(i - frames)) + load

    return stored(pages - 1)


def in_series(pages, frames, load, update, store):
    return pages * (load + update + store)


def longest(pages, frames, load, update, store):
    return pages * max(load, update, store)


def observe(answer, seed: int) -> dict:
    draw = random.Random(seed)

    def time(least: float, most: float) -> float:
        return round(draw.uniform(least, most), 3)

    cases = {
        "one page": (1, 1, time(1, 2), time(1, 2), time(1, 2)),
        "one frame, three pages": (3, 1, time(1, 2), time(1, 2), time(1, 2)),
        "two pages, two frames": (2, 2, time(3, 4), time(1, 2), time(1, 2)),
        "twelve pages, twelve frames, stores take longest": (12, 12, time(1, 2), time(0.2, 0.5), time(3, 4)),
        "twelve pages, two frames": (12, 2, time(2, 3), time(1, 1.5), time(2, 3)),
        "twelve pages, three frames, copies take as long": (12, 3, time(2, 2.2), time(0.5, 0.9), time(2.3, 2.5)),
        "twenty pages, four frames, updates take longest": (20, 4, time(1, 2), time(3, 4), time(1, 2)),
    }
    return {f"{name}: load {c[2]:g}, update {c[3]:g}, store {c[4]:g}": answer(*c) for name, c in cases.items()}


check = Check(
    task="when a step with overlapping copies is done",
    observe=observe,
    reference=step_time,
    second=backwards,
    misconceptions={
        "nothing overlaps: while a page is updated the next one is loaded and the one before is stored": in_series,
        "the lanes are filled and emptied in no time: the first page is loaded before anything else can happen, the last one stored after "
        "all else": longest,
        "that is the time with as many frames as pages: a page can only be loaded once its frame is empty": but(frame_free=lambda *_: 0.0),
        "the frame counts as empty once its page is updated: the page must also be stored, or the load overwrites it": but(
            frame_free=lambda i, frames, done, stored: done[i - frames] if i >= frames else 0.0
        ),
        "the step ends with the last update: its page must still be stored": but(end=lambda loaded, done, stored: done[-1]),
        "there is one frame too many: page i takes the frame of page i − frames": but(
            frame_free=lambda i, frames, done, stored: stored[i - frames - 1] if i > frames else 0.0
        ),
        "the next page is loaded only when the last one is updated: the lane that loads waits for its frame, and for nothing else": but(
            in_lane=lambda i, loaded, done, stored: max(loaded[i - 1], done[i - 1]) if i else 0.0
        ),
        "stores run side by side: the lane stores one page at a time, in order": but(out_lane=lambda *_: 0.0),
        "loads run side by side: the lane loads one page at a time, in order": but(in_lane=lambda *_: 0.0),
        "a page is updated before it is loaded: the update waits for its own load": but(needs=lambda i, loaded: 0.0),
    },
)
