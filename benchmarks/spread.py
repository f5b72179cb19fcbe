"""Jobs on several processes that share a device: one that breaks down, or is killed, costs its own job and no other.

``multiprocessing.Pool`` waits for ever for a job whose process was killed, and ``concurrent.futures`` gives up all jobs then. So each
process has a pipe of its own here, and one that ends is replaced.
"""

import contextlib
import heapq
import itertools
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.cli import message


class Spread:
    """Jobs in order, each with what is done with its result.

    Args:
        workers: processes; with 1, jobs run here.
        begin, given: called first in each process.
        deadline: of ``time.monotonic``; no job starts after it.
    """

    def __init__(self, workers: int = 1, begin: Callable[..., None] | None = None, given: tuple = (), deadline: float = float("inf")):
        self.begin, self.given, self.deadline = begin, given, deadline
        self.waiting: list[tuple[int, int, Callable, tuple, Callable]] = []  # a heap: turn, number, and the job
        self.number = itertools.count()
        # Not forked: libraries may have started CUDA here, and a fork of such a process can't use it.
        self.context = multiprocessing.get_context("spawn")
        self.idle = [self._started() for _ in range(workers)] if workers > 1 else []
        self.busy: dict[Connection, tuple[Any, Callable]] = {}
        self.here = workers < 2

    def submit(self, function: Callable, *arguments: Any, then: Callable[[Any, str | None], None], turn: int = 0) -> None:
        """``then(result, None)``, or ``then(None, words)`` if it failed; both are called here, and may submit more.

        Args:
            turn: those of a lower one go before it, those of the same in order.
        """
        heapq.heappush(self.waiting, (turn, next(self.number), function, arguments, then))

    def drain(self) -> int:
        """Until nothing runs and nothing may start; returns how many jobs the deadline left out."""
        while self.waiting or self.busy:
            late = time.monotonic() > self.deadline
            if late and not self.busy:
                break
            if self.here:
                *_, function, arguments, then = heapq.heappop(self.waiting)
                then(*_outcome(function, arguments))
                continue
            while self.waiting and self.idle and not late:
                *_, function, arguments, then = heapq.heappop(self.waiting)
                process, pipe = self.idle.pop(0)
                self.busy[pipe] = process, then
                with contextlib.suppress(OSError):  # it has ended; its end is read below
                    pipe.send((function, arguments))
            for pipe in wait(list(self.busy)):
                process, then = self.busy.pop(pipe)
                try:
                    outcome = pipe.recv()
                    self.idle.append((process, pipe))
                except (EOFError, OSError):
                    process.join()
                    outcome = None, f"the process ended with {process.exitcode}" + " (killed: out of memory?)" * (process.exitcode == -9)
                    self.idle.append(self._started())
                then(*outcome)
        return len(self.waiting)

    def close(self) -> None:
        for process, pipe in self.idle + [(process, pipe) for pipe, (process, _) in self.busy.items()]:
            pipe.close()
            process.terminate()
        self.idle, self.busy = [], {}

    def _started(self) -> tuple[Any, Connection]:
        own, its = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(its, self.begin, self.given), daemon=True)
        process.start()
        its.close()  # so that its end is seen here
        return process, own


def _serve(pipe: Connection, begin: Callable[..., None] | None, given: tuple) -> None:
    if begin:
        begin(*given)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(function, arguments))


def _outcome(function: Callable, arguments: tuple) -> tuple[Any, str | None]:
    try:
        return function(*arguments), None
    except Exception as error:  # the others go on
        traceback.print_exc()
        return None, message(error)
