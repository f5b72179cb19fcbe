"""A bank of one question of each kind, two concepts and no claims: what practice is tried on, beside the real bank."""

from pathlib import Path

import yaml

from course import interview

RUBRIC = ["Asks for the requirements.", "States the memory.", "Names what it gives up.", "Says what to measure."]


def entry(name: str, kind: str, unit: str = "02", **more) -> dict:
    given = {
        "id": name,
        "question": f"What about {name}?",
        "kind": kind,
        "frequency": "often",
        "role": ["applied"],
        "difficulty": 2,
        "minutes": 4,
        "unit": unit,
        "sources": ["S1.1"],
        "short": f"Short on {name}.",
        "deep": rf"Deep on {name}: $\sigma_{{{{r}}}} \le 1$.",
        "follow_ups": ["And then? (Then this.)"],
        "wrong": {"answer": "The wrong one.", "why": "Because it is."},
        "claims": {},
    }
    return given | more


ENTRIES = [
    entry("first-concept", "concept", frequency="rare", difficulty=1, unit="00"),
    entry("second-concept", "concept", role=["research"], difficulty=4),
    entry("a-derivation", "derivation", role=["research", "applied"]),
    entry("an-estimate", "estimate", minutes=5, frequency="sometimes"),
    entry("a-case", "debugging", minutes=5, case="01_alpha_forgotten"),
    entry("a-task", "coding", minutes=12, case="02.1"),
    entry("a-design", "design", minutes=12, rubric=RUBRIC, role=["infrastructure"]),
]


def write_bank(folder: Path, entries: list[dict] | None = None) -> Path:
    """Write the bank into ``folder``, a file for each unit and nothing else, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.yaml"):
        path.unlink()
    for unit in sorted({each["unit"] for each in entries or ENTRIES}):
        own = [each for each in entries or ENTRIES if each["unit"] == unit]
        (folder / f"{unit}_topic.yaml").write_text(yaml.safe_dump(own, allow_unicode=True, sort_keys=False))
    return folder


def use_bank(tmp_path: Path, monkeypatch, entries: list[dict] | None = None) -> Path:
    """The small bank in place of the course's, and a data folder of its own; returns that folder."""
    monkeypatch.setattr(interview, "FOLDER", write_bank(tmp_path / "bank", entries))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"
