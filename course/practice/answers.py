"""Answers with every number computed, by a process of its own.

An answer's numbers come from claims, which load torch and take seconds. So the first question is on the screen while they are computed
elsewhere, and nothing that a library prints or warns of reaches the terminal. What was computed is kept as long as neither the bank nor the
code behind its numbers changes. ``python -m course.practice.answers`` is that process: it reads ids of questions, a line each, and writes
each question as a line of JSON. It ends when its input ends, hence with its parent.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from course import ENVIRONMENT, ROOT, interview
from course.interview import Question
from course.practice import bank
from course.practice.journal import cache_folder, write
from course.units import CourseError

_BEHIND = ("course/**/*.py", "reference/**/*.py", "benchmarks/recorded/**/*.json")  # what an answer's numbers depend on


def fingerprint(folder: Path) -> str:
    """Of the bank in ``folder`` and of all that its numbers are computed from; the same as long as none of it changes."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.yaml"), *(path for pattern in _BEHIND for path in ROOT.glob(pattern))]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Answers:
    """What is computed and what was; a context manager. The process starts when it is first needed.

    Args:
        folder: the bank's; that of the course by default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or interview.FOLDER
        self._kept = cache_folder() / "answers" / fingerprint(self._folder)
        self._process: subprocess.Popen | None = None
        self._asked: set[str] = set()
        self._found: dict[str, Question | CourseError] = {}
        self._news, self._ended = threading.Condition(), False

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it is computing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def ask(self, *names: str) -> None:
        """Begin to compute the answers of these questions; returns at once."""
        for name in names:
            if name in self._asked:
                continue
            self._asked.add(name)
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # not kept yet, or damaged: it is computed
                self._found[name] = _question(json.loads((self._kept / f"{name}.json").read_text(encoding="utf-8")))
                continue
            if self._process is None:
                self._start()
            with contextlib.suppress(OSError):  # it has ended, which `get` says
                self._process.stdin.write(name + "\n")
                self._process.stdin.flush()

    def ready(self, name: str) -> bool:
        """Whether :meth:`get` returns at once."""
        return name in self._found

    def get(self, name: str) -> Question:
        """The question with its answer; waits until it is computed.

        Raises:
            CourseError: its numbers could not be computed; the message says why.
        """
        self.ask(name)
        with self._news:
            self._news.wait_for(lambda: name in self._found or self._ended)
        found = self._found.get(name) or CourseError(
            f"the answer to {name!r} could not be computed: its process ended. Run `course doctor`"
        )
        if isinstance(found, CourseError):
            raise found
        return found

    def _start(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "course.practice.answers", str(self._folder)],
            cwd=ROOT,
            env=ENVIRONMENT | os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the one who asks, not for the one who computes
            text=True,
            encoding="utf-8",
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            for line in self._process.stdout:
                said = json.loads(line)
                found = CourseError(said["error"]) if "error" in said else _question(said["question"])
                if "question" in said:
                    self._keep(said)
                with self._news:
                    self._found[said["id"]] = found
                    self._news.notify_all()
        finally:
            with self._news:
                self._ended = True
                self._news.notify_all()

    def _keep(self, said: dict) -> None:
        with contextlib.suppress(OSError):  # a full disk costs the seconds of computing it again, no more
            if not self._kept.exists() and self._kept.parent.exists():
                shutil.rmtree(self._kept.parent)  # what an earlier state of the course gave
            write(self._kept / f"{said['id']}.json", json.dumps(said["question"], ensure_ascii=False).encode())


def _question(said: dict) -> Question:
    return Question(**{name: tuple(value) if isinstance(value, list) else value for name, value in said.items()})


def _answer(entries: dict[str, tuple[str, dict]], name: str) -> dict:
    try:
        return {"id": name, "question": asdict(interview.question(*entries[name]))}
    except Exception as error:  # a claim can fail in any way, and the one who asks goes on with the next question
        why = "the bank has no such question" if name not in entries else f"{type(error).__name__}: {error}"
        return {"id": name, "error": f"the answer to {name!r} could not be computed: {why}"}


def main(folder: Path) -> None:
    """Answer what is asked on the standard input until it ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes elsewhere
    entries = {entry["id"]: (source, entry) for source, entry in bank.written(folder)}
    for line in sys.stdin:
        channel.write(json.dumps(_answer(entries, line.strip()), ensure_ascii=False) + "\n")
        channel.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(Path(sys.argv[1]))
