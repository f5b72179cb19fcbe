"""``course grade``: judge a folder of learners' notebooks side by side, so that none of them can harm another or the list.

For each notebook this process forks one that judges it with :func:`course.grading.judge`, as ``course check`` does, in a folder of its own,
with copies of what its learner handed in beside it (``course/siblings.py``). The learner's code runs one process further on
(``course/hearing.py``), with its limits of time and memory; what it prints goes nowhere, and no file it writes may grow beyond a limit.
Here the judging process is watched in turn: one that takes too long or holds too much is ended with all that it started. A notebook that
could not be judged has no score, which is not the score 0.
"""

import contextlib
import csv
import ctypes
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import psutil

from course import ROOT
from course.running import Limits
from course.units import CourseError, Unit, find, units

LARGEST_FILE = 300 << 20  # bytes of a notebook; saved outputs may be large
LARGEST_WRITTEN = 1 << 30  # bytes of one file that a learner's code writes
SLACK_SECONDS = 120.0  # beyond a notebook's own time: to load torch, and to compare
SLACK_BYTES = 3_000_000_000  # beyond a notebook's own memory: of the judge
POLL_SECONDS = 0.05
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Mark:
    """What one notebook got.

    Attributes:
        score, total: points; None where it could not be judged.
        why: the reason, if it could not be judged.
        wrong: "exercise: why", for each that is not right.
        notes: what was mended on the way, and which files beside the notebook came along or did not.
    """

    student: str
    unit: str
    notebook: Path
    score: float | None = None
    total: float | None = None
    why: str = ""
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def gradable(self) -> bool:
        return self.score is not None


@dataclass(frozen=True)
class Submission:
    """One notebook that was handed in.

    Attributes:
        unit: None where neither its name nor its folder says which.
        own_folder: what lies beside it is this student's and nobody else's.
    """

    student: str
    unit: Unit | None
    notebook: Path
    own_folder: bool = False


def submissions(folder: Path, unit: Unit | None = None, root: Path = ROOT) -> list[Submission]:
    """The notebooks under ``folder``: ``STUDENT/NN_topic/NN_topic.ipynb`` as nbgrader collects them, or ``STUDENT/NN_topic.ipynb``, or
    ``STUDENT.ipynb`` if ``unit`` is given.

    Raises:
        CourseError: there is no such folder, or no notebook in it.
    """
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder}")
    known, found = {each.stem: each for each in units(root)}, []
    for path in sorted(folder.rglob("*.ipynb")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts):  # .ipynb_checkpoints, and what systems leave behind
            continue
        named = known.get(path.stem) or next((known[part] for part in reversed(inside.parts[:-1]) if part in known), None)
        if unit is not None and named not in (None, unit):
            continue
        folders = [part for part in inside.parts[:-1] if part not in known]
        found.append(Submission(folders[0] if folders else path.stem, named or unit, path, bool(folders)))
    together = Counter((each.notebook.parent, each.unit) for each in found)  # several notebooks of a unit are of several students
    found = [replace(each, own_folder=each.own_folder and together[each.notebook.parent, each.unit] == 1) for each in found]
    if not found:
        raise CourseError(f"there is no notebook in {folder}" + (f" for unit {unit.number}" if unit else ""))
    return found


@dataclass
class _Job:
    submission: Submission
    pid: int
    answer: IO[bytes]
    scratch: tempfile.TemporaryDirectory
    began: float
    ended_for: str = ""


def mark_all(
    handed_in: Iterable[Submission], limits: Limits, processes: int | None = None, after_each: Callable[[Mark], None] = lambda mark: None
) -> list[Mark]:
    """Judge them, ``processes`` at a time (as many as there are cores), in the order given."""
    from course import checking, grading  # noqa: F401 (torch, loaded once, for all that are forked from here)

    order = list(handed_in)
    waiting, running, marks = list(reversed(order)), [], {}
    most = processes or os.cpu_count() or 1
    others = set(psutil.Process().children())
    _adopt_orphans(True)
    try:
        while waiting or running:
            while waiting and len(running) < most:
                running.append(_start(waiting.pop(), limits))
            for job in list(running):
                if (status := _status(job, limits)) is not None:
                    running.remove(job)
                    mark = _collect(job, status)
                    marks[job.submission.notebook] = mark
                    after_each(mark)
            _end_strays(others, {job.pid for job in running})
            time.sleep(POLL_SECONDS)
    finally:
        for job in running:
            _kill(job.pid)
            job.scratch.cleanup()
        _end_strays(others, set())
        _adopt_orphans(False)
    return [marks[submission.notebook] for submission in order]


def _start(submission: Submission, limits: Limits) -> _Job:
    answer = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it has been read)
    scratch = tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True)
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _silence()
            answer.write(json.dumps(_judge(submission, Path(scratch.name), limits)).encode())
            answer.flush()
            status = 0
        os._exit(status)
    return _Job(submission, pid, answer, scratch, time.monotonic())


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_WRITTEN, LARGEST_WRITTEN))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _judge(submission: Submission, scratch: Path, limits: Limits) -> dict:
    """In the process of one notebook: what :class:`Mark` holds of it."""
    from course import grading, siblings
    from course.notebooks import read

    unit, path = submission.unit, submission.notebook
    try:
        if unit is None:
            raise CourseError("neither its name nor its folder says which unit it is of: name it 02_lora.ipynb, or give --unit")
        if path.is_symlink() or not path.is_file():
            raise CourseError("it is not a file")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise CourseError(f"it has {size / 1e6:,.0f} MB, above {LARGEST_FILE / 1e6:,.0f}: its outputs have to be cleared")
        notebook, beside = read(path), []
        if submission.own_folder:
            beside = siblings.bring(path, {each.stem for each in units(unit.root)} | {"timestamp.txt"}, scratch)  # nbgrader writes that
        report = grading.judge(notebook, scratch, unit, limits)
    except CourseError as error:
        return {"why": str(error)}
    except Exception as error:  # of a notebook that the judge was not made for: somebody has to look
        return {"why": f"the judge failed: {type(error).__name__}: {str(error)[:500]}"}
    wrong = [f"{outcome.exercise}: {outcome.why}" for outcome in report.outcomes if outcome.why is not None]
    return {"score": report.score, "total": report.total, "wrong": wrong, "notes": [*report.notes, *beside]}


def _status(job: _Job, limits: Limits) -> int | None:
    """How the judging process ended; None while it runs. One that is over its limits is ended."""
    pid, status = os.waitpid(job.pid, os.WNOHANG)
    if pid:
        return os.waitstatus_to_exitcode(status)
    held = 0
    with contextlib.suppress(psutil.Error):
        held = psutil.Process(job.pid).memory_info().rss
    if limits.total_seconds is not None and time.monotonic() - job.began > limits.total_seconds + SLACK_SECONDS:
        job.ended_for = "judging it took too long"
    elif limits.memory_bytes is not None and held > limits.memory_bytes + SLACK_BYTES:
        job.ended_for = "judging it took too much memory"
    else:
        return None
    _kill(job.pid)
    return -signal.SIGKILL


def _kill(pid: int) -> None:
    """The process, its group, and all that it started."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # it leads one, or the number is nobody's group
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    for process in started:
        with contextlib.suppress(psutil.Error):
            process.kill()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _adopt_orphans(adopt: bool) -> None:
    """Whether processes that lose their parent below this one become its children (on Linux), so that none gets away."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def _end_strays(others: set[psutil.Process], judging: set[int]) -> None:
    """End what a notebook left behind when the process that judged it was killed."""
    for process in psutil.Process().children():
        if process not in others and process.pid not in judging:
            _kill(process.pid)


def _collect(job: _Job, status: int) -> Mark:
    job.answer.seek(0)
    text = job.answer.read()
    job.answer.close()
    job.scratch.cleanup()
    try:
        found = json.loads(text) if status == 0 else {}
    except ValueError:
        found = {}
    if not found:
        found = {"why": job.ended_for or "the process that judged it was ended from outside, perhaps by the notebook itself: look at it"}
    unit = job.submission.unit
    return Mark(job.submission.student, unit.stem if unit else "", job.submission.notebook, seconds=time.monotonic() - job.began, **found)


COLUMNS = ("student", "unit", "score", "of", "state", "why", "notes", "seconds", "notebook")


def as_csv(marks: list[Mark], folder: Path) -> str:
    """A line for each notebook. Where it could not be judged, ``score`` is empty and ``state`` says "not gradable"."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for mark in marks:
        score, most = (f"{mark.score:g}", f"{mark.total:g}") if mark.gradable else ("", "")
        state, why = ("graded", " | ".join(mark.wrong)) if mark.gradable else ("not gradable", mark.why)
        row = (
            mark.student,
            mark.unit,
            score,
            most,
            state,
            why,
            " | ".join(mark.notes),
            f"{mark.seconds:.1f}",
            mark.notebook.relative_to(folder),
        )
        table.writerow([_plain(str(value)) for value in row])
    return out.getvalue()


def _plain(text: str) -> str:
    """A spreadsheet takes what begins like this for a formula, and the words are a learner's."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def grade_folder(
    folder: Path, name: str | None, limits: Limits, processes: int | None, after_each: Callable[[int, int, Mark], None], root: Path = ROOT
) -> list[Mark]:
    """Judge every notebook under ``folder``; of one unit only, if it is named."""
    handed_in, done = submissions(folder, find(name, root) if name else None, root), []

    def count(mark: Mark) -> None:
        done.append(mark)
        after_each(len(done), len(handed_in), mark)

    return mark_all(handed_in, limits, processes, count)
