"""The production checklist as code: does this adapter fit this base, this tokenizer, this server, and is it what was evaluated?

Each check answers one question whose "no" raises no error, or raises it late, and says what to do. A check that needs what earlier ones
found broken is skipped and says so. ``course capstone`` writes a record beside the adapter (``course_adapter.json``): the base's hash, how
conversations were rendered, and losses of a few rows. For an adapter without it, those checks are "unknown", not "passed".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from course.capstone.checklist_base import base_fits, base_hash, end, template, tokenizer
from course.capstone.checklist_files import files, finite, rank, targets, trained, unchanged
from course.capstone.checklist_model import cost, licence, merged, reload, served
from course.capstone.checklist_subject import CONFIG, WEIGHTS, Broken, NotKnown, Server, Subject
from course.units import CourseError

PASSED, FAILED, UNKNOWN, SKIPPED = "passed", "failed", "unknown", "skipped"
__all__ = ["CHECKS", "CONFIG", "WEIGHTS", "Audit", "Finding", "Server", "audit"]


@dataclass(frozen=True)
class Finding:
    name: str
    state: str
    found: str
    remedy: str = ""


@dataclass
class Audit:
    """All findings of one adapter."""

    adapter: str
    base: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> list[Finding]:
        return [each for each in self.findings if each.state == FAILED]

    def as_dict(self) -> dict:
        states = {state: sum(each.state == state for each in self.findings) for state in (PASSED, FAILED, UNKNOWN, SKIPPED)}
        return {"adapter": self.adapter, "base": self.base, "counts": states, "findings": [vars(each) for each in self.findings]}


def audit(folder: Path, base: str, server: Server | None = None, tolerance: float = 0.02) -> Audit:
    """Every check over the adapter in ``folder``.

    Args:
        base: what it will be served on: a name that ``course.lab.models.load`` takes.
        tolerance: share of perplexity that merging may cost.

    Raises:
        CourseError: there is no such folder.
    """
    if not folder.is_dir():
        raise CourseError(f"no folder {folder}: name an adapter's, with {CONFIG} in it")
    subject, done = Subject(folder, base, server or Server(), tolerance), Audit(str(folder), base)
    states: dict[str, str] = {}
    for name, (needs, check) in CHECKS.items():
        if missing := [need for need in needs if states[need] in (FAILED, SKIPPED)]:
            finding = Finding(name, SKIPPED, f"needs: {', '.join(missing)}")
        else:
            finding = _asked(name, check, subject)
        states[name] = finding.state
        done.findings.append(finding)
    return done


def _asked(name: str, check: Callable[[Subject], str], subject: Subject) -> Finding:
    try:
        return Finding(name, PASSED, check(subject))
    except Broken as broken:
        return Finding(name, FAILED, broken.found, broken.remedy)
    except NotKnown as error:
        return Finding(name, UNKNOWN, str(error))
    except Exception as error:  # what a check can't read is no reason to pass, nor to leave the other checks out
        return Finding(name, FAILED, f"it can't be checked: {type(error).__name__}: {error}", "mend that file, or export again")


CHECKS: Mapping[str, tuple[tuple[str, ...], Callable[[Subject], str]]] = {
    "files": ((), files),
    "unchanged since export": (("files",), unchanged),
    "finite values": (("files",), finite),
    "trained": (("files",), trained),
    "rank and alpha": (("files",), rank),
    "targets": (("files",), targets),
    "base fits": (("files",), base_fits),
    "base's weights": (("base fits",), base_hash),
    "tokenizer": (("base fits",), tokenizer),
    "template": (("tokenizer",), template),
    "end of turn": (("tokenizer", "template"), end),
    "server's limits": (("files",), served),
    "licence": (("files",), licence),
    "reloaded answers": (("finite values", "rank and alpha", "targets", "base fits", "tokenizer"), reload),
    "memory and latency": (("reloaded answers",), cost),
    "merge": (("reloaded answers",), merged),
}
