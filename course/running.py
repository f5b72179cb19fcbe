"""Run a notebook in a kernel of its own, and watch that kernel: its time, its memory, its end.

The kernel is a separate process. A thread here samples it and keeps the limits: a cell that takes too long is interrupted, as by the stop
button, and what doesn't stop then is killed; so is a kernel that holds too much memory or runs past the time for the whole notebook. Memory
is limited by watching it and not by ``RLIMIT_AS``, since CUDA reserves far more addresses than it uses.

Whether a cell failed is what the kernel replies. Its output says less: a cell may print so much that the error is cut off, or replace what
shows errors.
"""

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from types import MappingProxyType

import psutil
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from course import ENVIRONMENT

SAMPLE_SECONDS = 0.05
REPLY_SECONDS = 1.0  # between looks for a cell's reply
GRACE_SECONDS = 5.0  # between the interrupt and the kill
OUTPUT_CHARACTERS = 2_000_000  # of one cell; an endless loop that prints must not fill this process instead
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_LINE = re.compile(r"Cell In\s?\[\d+\], line (\d+)")


@dataclass(frozen=True)
class Limits:
    """What a notebook may use. None is no limit."""

    cell_seconds: float | None = 600.0
    total_seconds: float | None = None
    memory_bytes: int | None = None
    spent_seconds: float = 0.0  # of the total, by earlier runs

    @property
    def over(self) -> str:
        return f"the time for the whole notebook, {self.total_seconds:g} s, was over"


@dataclass(frozen=True)
class Trouble:
    """What went wrong in one cell.

    Attributes:
        cell: its index.
        kind: the error's type; "Stopped" or "KernelDied" where there was no Python error.
        message: the error's own words, or ours.
        line: of the cell, from 1, where that is known.
    """

    cell: int
    kind: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        return self.message if self.kind in ("Stopped", "KernelDied") else f"{self.kind}: {self.message}".rstrip(": ")


@dataclass
class Execution:
    """What running a notebook took and what went wrong, in the order of the cells."""

    seconds: float = 0.0
    peak_bytes: int = 0
    troubles: list[Trouble] = field(default_factory=list)
    died: bool = False  # the kernel ended before the notebook did


class Watch(threading.Thread):
    """Samples a process with all that it started, and ends what goes over a limit."""

    def __init__(self, pid: int, limits: Limits):
        super().__init__(daemon=True)
        self.process, self.limits = psutil.Process(pid), limits
        self.started: set[psutil.Process] = set()  # by it, ever; what left its process group or lost its parent too
        self.peak_bytes = 0
        self.reason: str | None = None  # why the present cell was stopped
        self.killed = False
        self._began = time.monotonic()
        self._cell_began: float | None = None
        self._interrupted_at: float | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()

    def cell_begins(self) -> None:
        with self._lock:
            self.reason, self._interrupted_at, self._cell_began = None, None, time.monotonic()

    def cell_ends(self) -> None:
        with self._lock:
            self._cell_began = None

    def end(self) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            try:
                held = self.process.memory_info().rss
                self.started |= set(self.process.children(recursive=True))
            except psutil.Error:  # the kernel is gone
                return
            for child in self.started:
                with contextlib.suppress(psutil.Error):
                    held += child.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, held)
            with self._lock:
                self._keep_limits(held)

    def _keep_limits(self, held: int) -> None:
        limits, now = self.limits, time.monotonic()
        if limits.memory_bytes is not None and held > limits.memory_bytes:
            self._kill(f"stopped: it used more than {limits.memory_bytes / 1e9:.1f} GB of memory")
        elif limits.total_seconds is not None and now - self._began > limits.total_seconds - limits.spent_seconds:
            self._kill(f"stopped: {limits.over}")
        elif self._interrupted_at is not None and self._cell_began is not None:
            if now - self._interrupted_at > GRACE_SECONDS:
                self._kill(self.reason)
        elif limits.cell_seconds is not None and self._cell_began is not None and now - self._cell_began > limits.cell_seconds:
            self.reason, self._interrupted_at = f"stopped after {limits.cell_seconds:g} s: is there an endless loop?", now
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)

    def _kill(self, reason: str) -> None:
        self.reason, self.killed = reason, True
        self.kill_all()

    def kill_all(self) -> None:
        """Kill the process, its group (it is the leader of one), and what it started that left the group."""
        with contextlib.suppress(psutil.Error):
            self.started |= set(self.process.children(recursive=True))
        for child in self.started:
            with contextlib.suppress(psutil.Error):
                self.started = self.started | set(child.children(recursive=True))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in self.started:
            with contextlib.suppress(psutil.Error):
                child.kill()  # psutil looks whether the number is still this process's


class _Client(NotebookClient):
    """nbclient's, on this Python, watched."""

    def __init__(self, notebook: NotebookNode, limits: Limits, before_cell: Callable[[int], None], **settings):
        silent = logging.getLogger("course.kernel")
        silent.addHandler(logging.NullHandler())
        silent.propagate = False  # what it would log we say ourselves, once
        super().__init__(notebook, log=silent, **settings)
        self.limits, self.before_cell = limits, before_cell
        self.watch: Watch | None = None
        self.process = None
        self.cell = 0
        self.printed = 0
        self.reasons: dict[int, str] = {}
        self.errors: dict[int, dict] = {}
        self.on_cell_execute = self._begins
        self.on_cell_executed = self._ends

    def create_kernel_manager(self) -> KernelManager:
        manager = super().create_kernel_manager()
        # a kernel called python3 in the user's own folder may be another Python: this environment's it must be
        manager.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return manager

    async def async_start_new_kernel(self, **settings) -> None:
        await super().async_start_new_kernel(**settings)
        self.process = self.km.provisioner.process
        self.watch = Watch(self.process.pid, self.limits)
        self.watch.start()

    async def async_start_new_kernel_client(self) -> AsyncKernelClient:
        client = await super().async_start_new_kernel_client()
        wait = client.shell_channel.get_msg

        async def look_again(timeout: float | None = None) -> dict:
            """Wait a second at a time. For a widget nbclient sends on the socket that it waits on. If the reply comes in at that moment,
            ZeroMQ wakes nobody up, and who waits without end waits for ever."""
            while timeout is None:
                with contextlib.suppress(Empty):
                    return await wait(REPLY_SECONDS)
            return await wait(timeout)

        client.shell_channel.get_msg = look_again
        return client

    def _begins(self, cell: NotebookNode, cell_index: int) -> None:
        self.cell, self.printed = cell_index, 0
        self.before_cell(cell_index)
        self.watch.cell_begins()

    def _ends(self, cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        self.watch.cell_ends()
        if execute_reply["content"]["status"] == "error":
            self.errors[cell_index] = execute_reply["content"]
            if self.watch.reason:
                self.reasons[cell_index] = self.watch.reason

    def output(self, outs: list, msg: dict, display_id: str | None, cell_index: int) -> NotebookNode | None:
        self.printed += len(msg["content"].get("text", ""))
        return super().output(outs, msg, display_id, cell_index) if self.printed <= OUTPUT_CHARACTERS else None


def execute(
    notebook: NotebookNode,
    folder: Path,
    limits: Limits = Limits(),
    allow_errors: bool = False,
    before_cell: Callable[[int], None] = lambda index: None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Execution:
    """Run ``notebook`` in place, its outputs included, in a fresh kernel whose working directory is ``folder``.

    Args:
        limits: of time and memory.
        allow_errors: go on after a cell that fails; else the first one ends the run.
        before_cell: called with the index of each code cell before it runs.
        environment: variables of the kernel, beside this process's.

    Returns:
        Seconds, peak memory and the troubles; an error in a cell is a trouble, not an exception.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = _Client(
        notebook,
        limits,
        before_cell,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        allow_errors=allow_errors,
        timeout=None,
        startup_timeout=120,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # its advice on transports is not for readers
        shutdown_kernel="immediate",
        skip_cells_with_tag="skip-execution",
    )
    result, began = Execution(), time.monotonic()
    try:
        _outside_main_thread(client, environment)
    except CellExecutionError:
        pass  # the cell's own output tells
    except DeadKernelError:
        result.died = True
        client.reasons[client.cell] = (client.watch.reason if client.watch.killed else None) or cause_of_death(client.process.poll())
    finally:
        if client.watch is not None:
            client.watch.end()
            client.watch.kill_all()  # a cell may have started processes that outlive the kernel
            result.peak_bytes = client.watch.peak_bytes
    result.seconds = time.monotonic() - began
    for index in sorted(client.reasons | client.errors):
        if index in client.reasons:
            dead = result.died and index == client.cell and not client.watch.killed
            result.troubles.append(Trouble(index, "KernelDied" if dead else "Stopped", client.reasons[index]))
        elif "raises-exception" not in notebook.cells[index].metadata.get("tags", []):
            error = client.errors[index]
            line = _LINE.search(_ANSI.sub("", "\n".join(error["traceback"])))
            result.troubles.append(Trouble(index, error["ename"], error["evalue"], int(line[1]) if line else None))
    return result


def _outside_main_thread(client: _Client, environment: Mapping[str, str]) -> None:
    """Run the client in a thread, where it installs no signal handlers: Ctrl-C ends the kernel and stays a KeyboardInterrupt."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.execute, env=ENVIRONMENT | os.environ | environment)
        try:
            running.result()
        except KeyboardInterrupt:
            if client.watch is not None:
                client.watch.kill_all()
            raise


def cause_of_death(status: int | None) -> str:
    if status is None or status == 0:
        return "the kernel ended"
    if status > 0:
        return f"the kernel ended with exit status {status}"
    name = signal.Signals(-status).name
    hint = {"SIGSEGV": " (a crash in compiled code)", "SIGKILL": " (often the system, when memory runs out)"}.get(name, "")
    return f"the kernel was ended by {name}{hint}"
