"""Figures of README and lessons: ``course figures`` draws them after a new measurement, or after a change of what they show.

A module of this folder draws a unit's figures and lists them in ``FIGURES``. What a figure shows is data first, a dictionary that JSON
could hold: recorded results, or numbers computed here. A picture carries the fingerprint of its data, so that a test sees when they have
moved on.
"""

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image

from course import ROOT
from course.lab import plotting

FOLDER = ROOT / "lessons" / "figures"


@dataclass(frozen=True)
class Figure:
    """One picture.

    Attributes:
        name: of the file, without its ending.
        page: that shows it, from the course's root: "lessons/04_nf4.md".
        data: what it shows; the same on every machine to six digits.
        draw: from that data to a figure.
    """

    name: str
    page: str
    data: Callable[[], dict[str, Any]]
    draw: Callable[[dict[str, Any]], plt.Figure]

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.png"


def figures() -> dict[str, Figure]:
    """All figures by name.

    Raises:
        ValueError: two have one name.
    """
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [figure for module in modules for figure in module.FIGURES]
    names = [figure.name for figure in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"figures must have names of their own: {', '.join(sorted(twice))}")
    return {figure.name: figure for figure in found}


def fingerprint(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_rounded(data), sort_keys=True).encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    """Six digits: sums in another order differ in the seventh."""
    if isinstance(value, dict):
        return {str(key): _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def save(figure: Figure, path: Path | None = None) -> Path:
    """Draw ``figure`` and save it, as ``path`` if one is given; returns the path."""
    path, data = path or figure.path, figure.data()
    plotting.use_style()
    drawn = figure.draw(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, bbox_inches="tight", metadata={"Source": fingerprint(data)})
    plt.close(drawn)
    return path


def is_fresh(figure: Figure) -> bool:
    """Whether the committed picture shows the data of now."""
    if not figure.path.exists():
        return False
    with Image.open(figure.path) as picture:
        return picture.text.get("Source") == fingerprint(figure.data())
