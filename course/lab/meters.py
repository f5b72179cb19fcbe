"""Time and peak memory of a piece of work, on CPU and on CUDA, measured the way that can be compared."""

import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from course.lab.devices import device


@dataclass
class Peak:
    """Filled in when the ``with`` block ends. All in bytes."""

    bytes: int = 0  # highest use above what was held before the block
    before: int = 0  # held when the block began

    @property
    def total(self) -> int:
        return self.before + self.bytes


@contextmanager
def peak_memory(where: torch.device | None = None, interval: float = 0.002) -> Iterator[Peak]:
    """Peak memory of the block: exact on CUDA (the allocator's own count), sampled every ``interval`` seconds on a CPU (resident set)."""
    where, peak = where or device(), Peak()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        peak.before = torch.cuda.memory_allocated(where)
        try:
            yield peak
        finally:
            torch.cuda.synchronize(where)
            peak.bytes = torch.cuda.max_memory_allocated(where) - peak.before
        return
    process, stop = psutil.Process(), threading.Event()
    peak.before = highest = process.memory_info().rss

    def sample() -> None:
        nonlocal highest
        while not stop.wait(interval):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.bytes = max(highest, process.memory_info().rss) - peak.before


def process_peak() -> int:
    """Highest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def milliseconds(
    work: Callable[[], object], repeats: int = 20, warmup: int = 5, where: torch.device | None = None, queued: bool = False
) -> float:
    """Median time of ``work()`` in milliseconds: CUDA events on a GPU, a monotonic clock on a CPU, after ``warmup`` untimed calls.

    Args:
        queued: on a GPU, let it pause before each timed call until all launches of the call are waiting. The time is then that of the
            device alone, as in a training step, where the launches run ahead; without it, gaps between launches count.
    """
    where = where or device()
    for _ in range(warmup):
        work()
    times = []
    if where.type == "cuda":
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if queued:
                torch.cuda.synchronize(where)
                torch.cuda._sleep(6_000_000)  # clock cycles: about 3 ms
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    else:
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def show_bytes(count: float) -> str:
    """Decimal units, as memory is sold and papers state it: 14_000_000_000 -> "14.0 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
