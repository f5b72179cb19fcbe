"""The judge's side of ``course/witness.py``: start it, put the questions, keep the limits, and pass the verdict here."""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from course import ENVIRONMENT, ROOT
from course.running import Limits, Trouble, Watch, cause_of_death
from course.units import Unit

WAIT_SECONDS = 60.0  # for a process to say how it ended; then it is given up
LONGEST = 256 << 20  # characters of what was observed


@dataclass
class Hearing:
    """What judging one exercise gave.

    Attributes:
        troubles: by cell; that of the check's own cell says why the answer does not pass.
        passed: the check was answered, and every answer was right.
        ended_in: the cell in which the process ended, if it did before the check was answered.
    """

    troubles: dict[int, Trouble] = field(default_factory=dict)
    passed: bool = False
    ended_in: int | None = None
    seconds: float = 0.0


class Witness:
    """The process that runs learners' cells for one unit; a context manager. It is started again if a learner's code has ended it."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self._process: subprocess.Popen | None = None
        self._start()

    def __enter__(self) -> "Witness":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        # fonts and figures need no window; macOS lets a program with loaded frameworks fork only if told so
        environment = ENVIRONMENT | os.environ | {"MPLBACKEND": "agg", "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"}
        command = [sys.executable, "-m", "course.witness", str(self.unit.checks.parent), self.unit.topic, str(theirs.fileno())]
        silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], start_new_session=True, **silent)
        theirs.close()

    def _end(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()

    def hear(
        self,
        folder: Path,
        cells: list[tuple[int, str]],
        check: str,
        answer: str,
        at: int,
        judge: Callable[[object, int], None],
        seeds: list[int],
        limits: Limits,
        before_cell: Callable[[int], None] = lambda index: None,
    ) -> Hearing:
        """Run one exercise.

        Args:
            folder: the working directory.
            cells: index and source of what is run, in order.
            check: the name of the check among the unit's checks; its ``witness`` is called there.
            answer: the expression that gives the learner's answer, evaluated after the cells.
            at: index of the check's own cell.
            judge: called with what was observed and the seed; raises an error with words for the learner where that is not right.
            seeds: one for each round.
        """
        if self._process.poll() is not None:
            self._end()
            self._start()
        ours, theirs = socket.socketpair()
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(self._control, [b"x"], [theirs.fileno()])
        theirs.close()
        job = {"folder": str(folder), "cells": cells, "check": check, "answer": answer, "at": at}
        talk, hearing, began = _Talk(ours, self._control), Hearing(), time.monotonic()
        try:
            self._listen(talk, job, hearing, judge, seeds, limits, before_cell)
        finally:
            if talk.watch is not None:
                talk.watch.end()
                talk.watch.kill_all()
            ours.close()
            if talk.status is None and not talk.await_status():  # it hangs, or a learner's code has ended it
                self._process.kill()
                self._process.wait()
        if talk.watch is None:
            raise RuntimeError(f"no process could be started for the checks of unit {self.unit.number}: python -m course.witness failed")
        hearing.seconds = time.monotonic() - began
        if hearing.ended_in is not None:
            killed = talk.watch.killed
            reason = talk.watch.reason if killed else _ended(talk.status)
            hearing.troubles[hearing.ended_in] = Trouble(hearing.ended_in, "Stopped" if killed else "KernelDied", reason)
        return hearing

    def _listen(self, talk: "_Talk", job: dict, hearing: Hearing, judge, seeds: list[int], limits: Limits, before_cell) -> None:
        at = cell = job["at"]
        known = {at, *dict(job["cells"])}
        for message in talk.messages():
            if talk.watch is None:  # it says its number before anything of the learner's runs
                talk.watch = Watch(message["pid"], limits)
                talk.watch.start()
                talk.send(job)
            elif "cell" in message:
                cell = message["cell"] if message["cell"] in known else cell
                before_cell(cell)
                talk.watch.cell_begins()
            else:
                talk.watch.cell_ends()
                if message.get("error"):
                    hearing.troubles[cell] = talk.trouble(cell, **message["error"])
                elif "refused" in message:
                    hearing.troubles[at] = talk.trouble(at, "NotYet", message["refused"])
                elif "seen" in message:
                    try:
                        judge(message["seen"], seeds[0])
                    except AssertionError as refusal:
                        hearing.troubles[at] = Trouble(at, "NotYet", str(refusal))
                    seeds = seeds[1:]
                hearing.passed = not seeds and at not in hearing.troubles
                if hearing.passed or at in hearing.troubles:
                    return
                if "ends" not in message:
                    talk.watch.cell_begins()
                    talk.send(seeds[0])
        hearing.ended_in = cell


class _Talk:
    """The connection to one exercise's process, whose end is told on the control connection."""

    def __init__(self, connection: socket.socket, control: socket.socket) -> None:
        self.connection, self.control = connection, control
        self.watch: Watch | None = None
        self.status: int | None = None

    def send(self, what: object) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.sendall((json.dumps(what) + "\n").encode())

    def trouble(self, cell: int, kind: str, message: str, line: int | None = None) -> Trouble:
        return Trouble(cell, "Stopped", self.watch.reason) if self.watch.reason else Trouble(cell, kind, message, line)

    def messages(self) -> Iterator[dict]:
        """What the process says, line by line, until it ends, hangs up or says what no witness says."""
        held = b""
        while len(held) < LONGEST:
            readable, _, _ = select.select([self.connection, self.control], [], [])
            if self.connection not in readable:  # something that it started may keep the connection open
                self.await_status()
                return
            with contextlib.suppress(ConnectionResetError):
                if piece := self.connection.recv(1 << 20):
                    *lines, held = (held + piece).split(b"\n")
                    for line in lines:
                        if not _is_message(line):
                            return
                        yield json.loads(line)
                    continue
            return

    def await_status(self) -> bool:
        """Whether the process has said, in time, how the exercise's one ended."""
        if not select.select([self.control], [], [], WAIT_SECONDS)[0]:
            return False
        line = b""
        while not line.endswith(b"\n"):
            if not (piece := self.control.recv(1)):
                return False
            line += piece
        self.status = int(line)
        return True


_MESSAGES = {"pid": int, "cell": int, "ends": int, "ready": bool, "refused": str, "error": dict | None, "seen": object}
_ERROR = {"kind": str, "message": str, "line": int | None}


def _is_message(line: bytes) -> bool:
    try:
        message = json.loads(line)
        error = message.get("error") or dict.fromkeys(_ERROR)
        return bool(message) and all(isinstance(value, _MESSAGES[name]) for name, value in message.items()) and set(error) == set(_ERROR)
    except (ValueError, AttributeError, KeyError, RecursionError):
        return False


def _ended(status: int | None) -> str:
    return "the notebook ended itself here: is there an exit() or a quit()?" if status == 0 else cause_of_death(status)
