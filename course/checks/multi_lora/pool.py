"""Exercise 4: a pool of adapters counted in bytes, least recently used first, that throws out nothing in use."""

import random
from collections import Counter, OrderedDict

from course.checking import Check, Seen, but, raised


class Pool:
    """The worked answer; a mistake replaces a method."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        self.users: Counter[str] = Counter()

    def acquire(self, name: str, size: int) -> list[str] | None:
        if size > self.capacity:
            raise ValueError(f"{name} has {size} bytes, the pool {self.capacity}")
        if name in self.sizes:
            self.touch(name)
            self.pin(name)
            return []
        victims = self.victims(size)
        if victims is None:
            return None
        for victim in victims:
            del self.sizes[victim]
        self.sizes[name], self.users[name] = size, 1
        return victims

    def touch(self, name: str) -> None:
        self.sizes.move_to_end(name)

    def pin(self, name: str) -> None:
        self.users[name] += 1

    def free(self) -> int:
        return self.capacity - sum(self.sizes.values())

    def candidates(self) -> list[str]:
        return [name for name in self.sizes if not self.users[name]]

    def victims(self, size: int) -> list[str] | None:
        """Who has to go; None if that is not enough."""
        free, found = self.free(), []
        for name in self.candidates():
            if free >= size:
                break
            found.append(name)
            free += self.sizes[name]
        return found if free >= size else None

    def release(self, name: str) -> None:
        self.users[name] -= 1


class ByList:
    """A right answer written differently: entries [name, size, users] in a list."""

    def __init__(self, capacity: int):
        self.capacity, self.entries = capacity, []

    def acquire(self, name: str, size: int) -> list[str] | None:
        if size > self.capacity:
            raise ValueError("larger than the pool")
        entry = next((each for each in self.entries if each[0] == name), None)
        if entry:
            self.entries.remove(entry)
            self.entries.append(entry)
            entry[2] += 1
            return []
        kept, gone = list(self.entries), []
        for each in self.entries:
            if sum(other[1] for other in kept) + size <= self.capacity:
                break
            if each[2] == 0:
                kept.remove(each)
                gone.append(each[0])
        if sum(other[1] for other in kept) + size > self.capacity:
            return None
        self.entries = [*kept, [name, size, 1]]
        return gone

    def release(self, name: str) -> None:
        next(each for each in self.entries if each[0] == name)[2] -= 1


def in_use_too(self: Pool) -> list[str]:
    return list(self.sizes)


def newest_first(self: Pool) -> list[str]:
    return [name for name in reversed(self.sizes) if not self.users[name]]


def only_one(self: Pool, size: int) -> list[str] | None:
    if self.free() >= size:
        return []
    return self.candidates()[:1] or None


def at_once(self: Pool, size: int) -> list[str] | None:
    """Lets go while it looks, and then finds that it was not enough."""
    found = []
    while self.free() < size and self.candidates():
        found.append(self.candidates()[0])
        del self.sizes[found[-1]]
    if self.free() < size:
        return None
    for name in found:  # the caller deletes them again
        self.sizes[name] = 0
    return found


def as_flag(self: Pool, name: str) -> None:
    """One release frees it, however many use it."""
    self.users[name] = 0


def out_at_release(self: Pool, name: str) -> None:
    self.users[name] -= 1
    if not self.users[name]:
        del self.sizes[name]


def touched_at_release(self: Pool, name: str) -> None:
    self.users[name] -= 1
    self.sizes.move_to_end(name)


def too_strict(self: Pool, name: str, size: int) -> list[str] | None:
    if size == self.capacity:
        raise ValueError("no room")
    return Pool.acquire(self, name, size)


def too_late(self: Pool, name: str, size: int) -> list[str] | None:
    """Makes room first, and looks then whether there can be enough."""
    if size > self.capacity:
        for each in self.candidates():
            del self.sizes[each]
    return Pool.acquire(self, name, size)


def three_places(self: Pool, size: int) -> list[str] | None:
    """A pool of places, whatever the sizes."""
    if len(self.sizes) < 3:
        return []
    return self.candidates()[:1] or None


Event = tuple[str, str, int]
STORIES: dict[str, tuple[int, list[Event]]] = {
    "two adapters that fit": (100, [("+", "a", 40), ("+", "b", 60), ("-", "a", 0), ("-", "b", 0), ("+", "a", 40)]),
    "a third one, after the first was used again": (
        100,
        [("+", "a", 40), ("-", "a", 0), ("+", "b", 40), ("-", "b", 0), ("+", "a", 40), ("-", "a", 0), ("+", "c", 40)],
    ),
    "one whose request still runs": (100, [("+", "a", 50), ("+", "b", 50), ("-", "b", 0), ("+", "c", 50)]),
    "one that two requests use": (100, [("+", "a", 60), ("+", "a", 60), ("-", "a", 0), ("+", "b", 60), ("-", "a", 0), ("+", "b", 60)]),
    "a large one after four small": (
        100,
        [("+", name, 25) for name in "abcd"] + [("-", name, 0) for name in "abcd"] + [("+", "e", 70)],
    ),
    "one that has to wait, and then another one": (
        100,
        [("+", "a", 60), ("+", "b", 20), ("-", "b", 0), ("+", "c", 70), ("+", "d", 40)],
    ),
    "requests that end in another order than they began": (
        100,
        [("+", "a", 50), ("+", "b", 50), ("-", "b", 0), ("-", "a", 0), ("+", "c", 50)],
    ),
}


def played(pool, events: list[Event]) -> list:
    """What every acquire returned. What a pool says it doesn't hold is not released: an error there would hide who went wrongly."""
    found, held = [], []
    for kind, name, size in events:
        if kind == "+":
            gone = pool.acquire(name, size)
            found.append("wait" if gone is None else list(gone) if isinstance(gone, (list, tuple)) else gone)
            if isinstance(found[-1], list):
                held = [each for each in held if each not in found[-1]] + [name]
        elif name in held:
            pool.release(name)
    return found


def drawn(seed: int) -> list[Event]:
    """A long story, from a right pool: nothing is released that was not acquired."""
    rng, pool, running, events = random.Random(seed), Pool(100), [], []
    sizes = {name: rng.choice((10, 20, 30, 45)) for name in "abcdefgh"}
    for _ in range(60):
        if running and rng.random() < 0.5:
            name = running.pop(rng.randrange(len(running)))
            pool.release(name)
            events.append(("-", name, 0))
        else:
            name = rng.choice(sorted(sizes))
            events.append(("+", name, sizes[name]))
            if pool.acquire(name, sizes[name]) is not None:
                running.append(name)
    return events


def told(events: list[Event], found: list) -> list[str]:
    """What every acquire did, in words."""
    names = [name for kind, name, _ in events if kind == "+"]
    return [f"{name}: {_words(returned)}" for name, returned in zip(names, found, strict=True)]


def _words(returned) -> str:
    if isinstance(returned, list):
        return f"{', '.join(map(str, returned))} went" if returned else "nobody went"
    return "None, it waits" if returned == "wait" else f"{returned!r} was returned"


def observe(answer, seed: int) -> Seen:
    for story, (capacity, events) in STORIES.items():
        steps = " ".join(f"{kind}{name}{size or ''}" for kind, name, size in events)
        yield f"{story} ({steps}; capacity {capacity}), who went at each acquire", told(events, played(answer(capacity), events))
    pool = answer(10)
    yield "an adapter as large as the pool", "was accepted" if raised(pool.acquire, "a", 10) is None else "was refused"
    yield "an adapter larger than the pool", raised(pool.acquire, "b", 11) or "was accepted"
    pool = answer(10)
    pool.acquire("a", 6)
    pool.release("a")
    raised(pool.acquire, "b", 11)
    yield "who goes for the next one (+a6 -a +b11 +c5; capacity 10) after that error", told([("+", "c", 5)], played(pool, [("+", "c", 5)]))
    events = drawn(seed)
    yield "a long day, who went at each acquire", told(events, played(answer(100), events))


check = Check(
    task="a pool in bytes: the least recently used goes, and nothing in use",
    observe=observe,
    reference=Pool,
    second=ByList,
    misconceptions={
        "the oldest arrival goes, not the least recently used: a hit must move its adapter to the end of the queue": but(
            touch=lambda self, name: None
        ),
        "an adapter in use was thrown out: a request would go on with memory that belongs to somebody else; skip what is pinned": but(
            candidates=in_use_too
        ),
        "the most recently used went first: it is the one that is likeliest to be asked for again": but(candidates=newest_first),
        "one went, whatever its size: a large adapter may need the room of several; count bytes": but(victims=only_one),
        "the pool counts places: adapters differ in size, so count bytes": but(victims=three_places),
        "adapters were thrown out although the new one had to wait all the same: look first whether it is enough, then let go": but(
            victims=at_once
        ),
        "an adapter as large as the pool fits: only a larger one is an error": but(acquire=too_strict),
        "adapters were thrown out for one that is larger than the pool: look at its size first, and change nothing": but(acquire=too_late),
        "one release freed an adapter that another request still uses: count the users": but(release=as_flag),
        "a hit is not pinned: the second request uses the adapter as much as the first": but(pin=lambda self, name: None),
        "a release threw the adapter out: keep it as long as nobody needs its room; its tenant may ask again": but(release=out_at_release),
        "a release counts as a use: here the order is that of the acquires": but(release=touched_at_release),
    },
)
