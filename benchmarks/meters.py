"""How benchmarks measure: milliseconds of a call, bytes now and their peak, the phases of a training step."""

import contextlib
import gc
import itertools
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from course.lab.live import LiveBytes
from course.lab.meters import milliseconds

T = TypeVar("T")


def cold_milliseconds(work: Callable, *columns: list, repeats: int = 24) -> float:
    """Median milliseconds of ``work`` over the rows of ``columns`` in turn, none of which waits in the cache, after two rounds of warm-up.

    On CUDA of the device alone, by events: the launches of a call are queued before it begins.
    """
    rows = list(zip(*columns, strict=True))
    turn = itertools.cycle(rows)
    return milliseconds(lambda: work(*next(turn)), repeats=repeats, warmup=2 * len(rows), queued=True)


def timed(work: Callable[[], T], cuda: bool) -> tuple[float, T]:
    """Seconds of one call, on CUDA by events, and what it returned."""
    if not cuda:
        began = time.perf_counter()
        result = work()
        return time.perf_counter() - began, result
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


def take_step(
    model: nn.Module,
    adam: torch.optim.Optimizer,
    ids: Tensor,
    note: Callable[[str], None] = lambda phase: None,
    precision: contextlib.AbstractContextManager | None = None,
) -> float:
    """One training step of a model of the library; returns the loss.

    Args:
        ids: (batch, tokens).
        note: called as each part of it ends, with "forward", "backward", "step".
        precision: the context of the forward pass, such as autocast.
    """
    with precision or contextlib.nullcontext():
        loss = model(input_ids=ids, labels=ids).loss
    note("forward")
    loss.backward()
    value = loss.item()
    del loss
    note("backward")
    adam.step()
    note("step")
    adam.zero_grad(set_to_none=True)
    return value


def free() -> None:
    """Give back what nobody uses, and forget the peak."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def held_by_libraries() -> int:
    """Bytes that matrix products leave allocated, forward and backward thread, in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 64, 256, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(128, 256, device="cuda", dtype=dtype, requires_grad=True)
        nn.functional.linear(x, weight).float().sum().backward()
    x = weight = None
    free()
    return torch.cuda.memory_allocated()


class Meter:
    """Bytes now and their peak: the allocator's on CUDA, storages that torch's operations hand out on a CPU.

    On a CPU only what happens inside ``with meter:`` is counted. On CUDA ``libraries`` is what the matrix library's workspaces take: they
    belong to the process, and are not counted.
    """

    def __init__(self, device: torch.device):
        self.cuda, self.live, self.base = device.type == "cuda", LiveBytes(), 0
        self.libraries = held_by_libraries() if self.cuda else 0  # from now on they are there

    def start(self) -> None:
        """Free what nobody uses; what is left is not counted."""
        gc.collect()
        if self.cuda:
            free()
        self.base = 0
        self.base = self.now
        self.reset()

    def reset(self) -> None:
        self.live.peak = self.live.bytes
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    @property
    def now(self) -> int:
        return (torch.cuda.memory_allocated() if self.cuda else self.live.bytes) - self.base

    @property
    def peak(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.cuda else self.live.peak) - self.base

    def __enter__(self) -> "Meter":
        if not self.cuda:
            self.live.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if not self.cuda:
            self.live.__exit__(*error)


class Extra:
    """The most bytes that were there while one weight was worked on, beyond what was there before it."""

    def __init__(self, meter: Meter):
        self.meter, self.bytes = meter, 0
        self.start()

    def start(self) -> None:
        self.meter.reset()
        self.before = self.meter.now

    def stop(self) -> None:
        self.bytes = max(self.bytes, self.meter.peak - self.before)

    def watched(self, weights: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        def give(name: str) -> Tensor:
            self.stop()
            self.start()
            return weights(name)

        return give
