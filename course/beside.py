"""A benchmark's result beside the recorded cards: times, ratios to the peer and to the limit, and whether they are as expected.

A row of a result is told by its words and its sizes (what was done, with how many rows); its other numbers are what was measured.
Where it has the time of "ours", the others are read against it: a peer's time over ours, and the limit's time over ours.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course.lab import recorded
from course.lab.meters import show_bytes
from course.lab.tables import columns, short

PEERS = ("bitsandbytes", "peft", "torch")  # the first that a row has
LIMITS = ("floor", "limit")
SIZES = ("rows", "batch", "sequence", "tokens", "rank", "r", "seed", "size", "width", "layers", "segments", "positions", "block", "budget")
SIZES += ("threads", "streams")
SLOWER = 1.10  # than the record of the same card: still as expected
SHARE = 0.85  # of the lowest ratio on recorded cards: still as expected on another card
LINES = 24  # of a table that is read at a glance
DIFFERENCES = ("error", "apart")  # how far results are apart is no time


@dataclass(frozen=True)
class Row:
    """One row on one card.

    Attributes:
        numbers: what was measured, by name.
    """

    numbers: dict[str, float]

    @property
    def ours(self) -> float | None:
        return self.numbers.get("ours")

    @property
    def peer(self) -> float | None:
        """How many times as long the peer takes."""
        return self._over(PEERS)

    @property
    def limit(self) -> float | None:
        """The limit's time over ours: 1 is as fast as can be."""
        return self._over(LIMITS)

    def _over(self, names: tuple[str, ...]) -> float | None:
        found = next((self.numbers[name] for name in names if name in self.numbers), None)
        return found / self.ours if found is not None and self.ours else None


def cards(name: str, folder: Path = recorded.FOLDER) -> dict[str, dict]:
    """Device -> the recorded entry of the benchmark."""
    entries = [recorded.read(path) for path in sorted(Path(folder).glob(f"*/{name}.json"))]
    return {entry["device"]: entry for entry in entries}


def rows(entry: dict) -> dict[str, Row]:
    """Label -> row, of every table in the entry, and of dictionaries that hold numbers; what holds none is left out."""
    result = entry["result"]
    parts = result.items() if isinstance(result, dict) else [("", result)]  # what the run as a whole says of itself is no row
    return dict(pair for key, part in parts for pair in _found(part, () if isinstance(part, list) else (key,)))


def _found(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Row]]:
    if isinstance(value, list):
        for each in value:
            if isinstance(each, dict):
                yield from _found(each, path)
    elif isinstance(value, dict):
        numbers = {key: float(each) for key, each in value.items() if _is_number(each) and key not in SIZES}
        path = path + tuple(_words(value))
        if numbers and path:
            yield ", ".join(path), Row(numbers)
        for key, each in value.items():
            if key == "candidates":
                continue
            yield from _found(each, path if isinstance(each, list) else (*path, str(key)))


def _words(row: dict[str, Any]) -> list[str]:
    """What tells a row from the others: "linear", "16 rows"."""
    sizes = [f"{value:,} {key[:-1] if value == 1 and key.endswith('s') else key}" for key, value in row.items() if _is_size(key, value)]
    return [value for value in row.values() if isinstance(value, str)] + sizes


def _is_size(key: str, value: Any) -> bool:
    return key in SIZES and _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def table(entries: dict[str, dict]) -> str:
    """A line for each row of ours that two cards have: on each our time, or our bytes, and the peer's and the limit's over it.

    Empty if there is none, or if there are more than ``LINES``: then the cards' own tables are easier to read.
    """
    by_card = {card: {label: row for label, row in rows(entry).items() if row.ours is not None} for card, entry in entries.items()}
    cards = Counter(label for found in by_card.values() for label in found if not label.endswith(DIFFERENCES))
    labels = [label for label, count in cards.items() if count > 1 or len(entries) == 1]
    if not 0 < len(labels) <= LINES:
        return ""
    names = [label.removesuffix(", milliseconds").replace("_", " ") for label in labels]
    lines = [[name, *(_cell(label, found.get(label)) for found in by_card.values())] for name, label in zip(names, labels, strict=True)]
    shown = [found[label] for found in by_card.values() for label in labels if label in found]
    parts = ["our time in milliseconds" + " or our bytes" * any(label.endswith("bytes") for label in labels)]
    parts += ["the peer's over it (×)"] * any(row.peer is not None for row in shown)
    parts += ["the limit's over it (%)"] * any(row.limit is not None for row in shown)
    return "\n".join([columns(("", *entries), lines), "", " · ".join(parts)])


def _cell(label: str, row: Row | None) -> str:
    if row is None:
        return ""
    parts = [show_bytes(row.ours) if label.endswith("bytes") else short(row.ours)]
    parts += [f"{short(row.peer)}×"] if row.peer is not None else []
    parts += [f"{row.limit:.0%}"] if row.limit is not None else []
    return " · ".join(parts)


def check(entry: dict, known: dict[str, dict]) -> list[str]:
    """What is not as expected, in sentences; empty if all is. ``known``: the recorded cards, as :func:`cards` gives them.

    On a card that is recorded our times are held to its record. On another one times can't be: there the ratios to the peer and to the
    limit are held to the lowest on a recorded card.
    """
    card, found, said = entry["device"], rows(entry), []
    if card in known:
        before = rows(known[card])
        for label, row in found.items():
            then = before[label].ours if label in before else None
            if row.ours and then and row.ours > SLOWER * then:
                said.append(
                    f"{label}: {row.ours:.4g} here, {then:.4g} when it was recorded on this card, {row.ours / then - 1:.0%} longer."
                )
        return said
    for label, row in found.items():
        for what, name in (("peer", "the peer's time over ours"), ("limit", "the share of the limit")):
            here = getattr(row, what)
            there = [value for each in known.values() if (other := rows(each).get(label)) and (value := getattr(other, what)) is not None]
            if here is not None and there and here < SHARE * min(there):
                said.append(f"{label}: {name} is {here:.2f}, on recorded cards {min(there):.2f} or more.")
    return said


def comparable(entry: dict, known: dict[str, dict]) -> int:
    """How many rows :func:`check` can hold to something."""
    others = [known[entry["device"]]] if entry["device"] in known else list(known.values())
    labels = {label for other in others for label, row in rows(other).items() if row.ours}
    return sum(label in labels for label, row in rows(entry).items() if row.ours)


def verdict(entry: dict, known: dict[str, dict]) -> str:
    """The check in words."""
    card, count = entry["device"], comparable(entry, known)
    if not count:
        return f"Nothing recorded has the same rows as this result on {card}: there is nothing to hold it to."
    held = "its own record" if card in known else f"{', '.join(known)}, by ratios"
    said, quick = check(entry, known), faster(entry, known)
    counted = f"{count} row{'s' * (count > 1)} on {card}, held to {held}"
    first = f"Not as expected: {len(said)} figure{'s' * (len(said) > 1)} of {counted}." if said else f"As expected: {counted}."
    return "\n".join([first, *said, *quick])


def faster(entry: dict, known: dict[str, dict]) -> list[str]:
    """Where this run beats the card's own record by more than ``SLOWER`` allows the other way: then the record is of older code."""
    if entry["device"] not in known:
        return []
    before, found = rows(known[entry["device"]]), []
    for label, row in rows(entry).items():
        then = before[label].ours if label in before else None
        if row.ours and then and then > SLOWER * row.ours:
            found.append(f"Faster than the record, {label}: {row.ours:.4g} here, {then:.4g} there. Is the record of older code?")
    return found


def figure(entries: dict[str, dict]):
    """Our rows' share of the limit and the peer's time over ours, a bar a card; None if no row has either."""
    import matplotlib.pyplot as plt

    from course.lab import plotting

    plotting.use_style()
    by_card = {card: rows(entry) for card, entry in entries.items()}
    labels = list(dict.fromkeys(label for found in by_card.values() for label, row in found.items() if row.limit or row.peer))
    if not labels:
        return None
    drawn, axes = plt.subplots(1, 2, figsize=(9, 1 + 0.32 * len(labels)), sharey=True)
    for each, what, title in zip(axes, ("limit", "peer"), ("limit / our time", "peer's time / ours"), strict=True):
        for i, (card, found) in enumerate(by_card.items()):
            values = [(getattr(found[label], what) or 0) if label in found else 0 for label in labels]
            height = 0.8 / len(by_card)
            each.barh([y + i * height for y in range(len(labels))], values, height, label=card)
        each.axvline(1, color=plotting.BLACK, lw=1.2, ls=":")
        each.set(xlabel=title)
        each.grid(axis="y", visible=False)
    axes[0].set_yticks([y + 0.4 - 0.4 / len(by_card) for y in range(len(labels))], labels, fontsize=8)
    axes[0].invert_yaxis()
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    return drawn
