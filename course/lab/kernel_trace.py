"""What the programs of a Triton kernel touch, in Triton's interpreter: addresses read and written, by program.

    with Trace() as trace:
        my_kernel[(4,)](x, out, n)
    trace.outside      # ["program 3 writes 24 places outside of all tensors that it was given"]
    trace.conflicts    # ["programs 0 and 1 both write counts[7]"]

The interpreter runs program after program, so a race gives right results there. The addresses show it all the same. A place outside of
all tensors is not touched: reads give zero, writes are dropped, so that a wrong kernel does not end the process.

Triton reads TRITON_INTERPRET when it is loaded: call :func:`interpret` before anything that uses Triton is imported.
"""

import math
import os
import sys
from collections import defaultdict
from importlib import metadata
from typing import Any

import numpy as np
from torch import Tensor

from course.units import CourseError


def misfit() -> str:
    """Why no kernel can be interpreted here, or nothing: up to Triton 3.6 the interpreter makes integers of arrays with one number."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""
    if tuple(map(int, version.split(".")[:2])) >= (3, 7) or tuple(map(int, np.__version__.split(".")[:2])) < (2, 4):
        return ""
    return f"Triton {version} can't interpret kernels with NumPy {np.__version__}: pip install 'triton>=3.7', or 'numpy<2.4'"


def interpret() -> None:
    """Have Triton interpret kernels from now on.

    Raises:
        RuntimeError: Triton was loaded before, to compile them.
        CourseError: this Triton can't interpret with this NumPy.
    """
    if problem := misfit():
        raise CourseError(problem)
    if "triton.language" in sys.modules:
        import triton.language as tl
        from triton.runtime.jit import JITFunction

        if isinstance(tl.sum, JITFunction):
            raise RuntimeError("Triton was loaded to compile kernels: restart (Jupyter: its kernel), and import the checks before Triton")
    os.environ["TRITON_INTERPRET"] = "1"


def _addresses(tensor: Tensor) -> np.ndarray:
    """Of all its numbers."""
    places = np.zeros((), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + np.arange(size, dtype=np.int64) * stride
    return tensor.data_ptr() + places.reshape(-1) * tensor.element_size()


class Trace:
    """Notes what the kernels touch that are launched inside ``with``.

    Attributes:
        launches: how many kernels were launched.
        programs: the most programs of a launch.
        largest: the most numbers in one load or store.
        loads: how many numbers were read, all programs together.
        written: name of an argument -> places of it that some program wrote, flat.
        outside: what was touched outside of all tensors that the kernel was given, in words.
        conflicts: places that one program writes, not atomically or not it alone, and another touches, in words.
    """

    def __init__(self) -> None:
        self.launches = self.programs = self.largest = self.loads = 0
        self.outside: list[str] = []
        self.conflicts: list[str] = []
        self.written: dict[str, set[int]] = defaultdict(set)
        self._read: set[int] = set()  # addresses, of all launches
        self._changed: set[int] = set()

    def unread(self, tensor: Tensor) -> int:
        """How many numbers of a tensor on the CPU no kernel read in their own place, rather than in a copy."""
        return len(set(_addresses(tensor).tolist()) - self._read)

    def unwritten(self, tensor: Tensor) -> int:
        """How many numbers of a tensor on the CPU no kernel wrote."""
        return len(set(_addresses(tensor).tolist()) - self._changed)

    # ---- a launch

    def _begin(self, tensors: dict[str, Tensor]) -> None:
        self.launches += 1
        self._names, places = list(tensors), [_addresses(tensor) for tensor in tensors.values()]
        nothing = np.empty(0, dtype=np.int64)
        known = np.concatenate([nothing, *places])
        order = np.argsort(known, kind="stable")
        self._known = known[order]  # addresses; what is touched is noted by its index in here
        self._owner = np.repeat(np.arange(len(places)), [len(own) for own in places])[order]
        self._place = np.concatenate([nothing, *(np.arange(len(own)) for own in places)])[order]
        self._touched: dict[str, list[tuple]] = {kind: [] for kind in ("read", "write", "atomic")}  # program, indices
        self._lost: dict[tuple, int] = defaultdict(int)

    def _note(self, kind: str, pointers: Any, mask: Any) -> np.ndarray:
        """The mask of those places that exist."""
        from triton.runtime.interpreter import interpreter_builder

        allowed = np.ones((), bool) if mask is None else np.asarray(mask.data, bool)  # a block pointer's mask is a plain array
        addresses, live = np.broadcast_arrays(pointers.data.astype(np.int64), allowed)
        program, index = interpreter_builder.grid_idx, np.searchsorted(self._known, addresses)
        there = index < len(self._known)
        there[there] = self._known[index[there]] == addresses[there]
        self.largest = max(self.largest, addresses.size)
        if kind == "read":
            self.loads += int(live.sum())
        if lost := int((live & ~there).sum()):
            self._lost[program, "read" if kind == "read" else "write"] += lost
        self._touched[kind].append((program, index[live & there]))
        return live & there

    def _end(self) -> None:
        for (program, kind), count in self._lost.items():
            places = "a place" if count == 1 else f"{count} places"
            self.outside.append(f"program {_number(program)} {kind}s {places} outside of the tensors that the kernel was given")
        programs = sorted({program for notes in self._touched.values() for program, _ in notes})
        if not programs:
            return
        number = {program: i for i, program in enumerate(programs)}
        found = {}  # kind -> (index, program) without repetitions, in order
        for kind, notes in self._touched.items():
            joined = [index * len(programs) + number[program] for program, index in notes]
            found[kind] = np.divmod(np.unique(np.concatenate(joined)) if joined else np.empty(0, dtype=np.int64), len(programs))
        self._read.update(self._known[found["read"][0]].tolist())
        changed = np.unique(np.concatenate([found["write"][0], found["atomic"][0]]))
        self._changed.update(self._known[changed].tolist())
        for i, name in enumerate(self._names):
            if len(own := changed[self._owner[changed] == i]):
                self.written[name].update(self._place[own].tolist())
        self._find_conflicts(changed, found, programs)

    def _find_conflicts(self, changed: np.ndarray, found: dict[str, tuple], programs: list[tuple]) -> None:
        every = np.unique(np.concatenate([index * len(programs) + program for index, program in found.values()])) // len(programs)
        index, count = np.unique(every, return_counts=True)  # by how many programs
        for here in np.intersect1d(changed, index[count > 1]):
            reads, writes, atomics = ({programs[i] for i in found[kind][1][found[kind][0] == here]} for kind in ("read", "write", "atomic"))
            for one, others, verb in (
                (writes, writes, "both write"),
                (writes, reads, "write and read"),
                (writes, atomics, "write, one of them atomically,"),
                (atomics, reads, "change atomically and read plainly"),
            ):
                if pair := _two(one, others):
                    place = f"{self._names[self._owner[here]]}[{self._place[here]}]"
                    self.conflicts.append(f"programs {_number(pair[0])} and {_number(pair[1])} {verb} {place}")
                    break

    # ---- the interpreter, watched

    def __enter__(self) -> "Trace":
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        self._before = [
            (builder, name, getattr(builder, name)) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
        ]
        self._before += [(executor, name, getattr(executor, name)) for name in ("_init_args_hst", "__call__")]
        load, store, atomic, arguments, launch = (value for _, _, value in self._before)

        def there(mask: Any, kind: str, pointers: Any) -> Any:
            return interpreter.TensorHandle(self._note(kind, pointers, mask), interpreter.tl.int1)

        def masked_load(builder, pointers, mask, other, *rest):
            return load(builder, pointers, there(mask, "read", pointers), other, *rest)

        def masked_store(builder, pointers, value, mask, *rest):
            return store(builder, pointers, value, there(mask, "write", pointers), *rest)

        def atomic_rmw(builder, operation, pointers, value, mask, *rest):
            return atomic(builder, operation, pointers, value, there(mask, "atomic", pointers), *rest)

        def on_host(grid, given, named):
            here, named_here = arguments(grid, given, named)
            pairs = [*zip(grid.arg_names, here, strict=False), *named_here.items()]
            self._begin({name: value for name, value in pairs if isinstance(value, Tensor)})
            return here, named_here

        def launched(grid, *given, **named):
            launch(grid, *given, **named)
            self.programs = max(self.programs, math.prod(interpreter.interpreter_builder.grid_dim))
            self._end()

        for owner, name, value in zip(
            (builder,) * 3 + (executor,) * 2,
            (name for _, name, _ in self._before),
            (masked_load, masked_store, atomic_rmw, on_host, launched),
            strict=True,
        ):
            setattr(owner, name, value)
        return self

    def __exit__(self, *error) -> None:
        for owner, name, value in self._before:
            setattr(owner, name, value)


def _number(program: tuple[int, ...]) -> str:
    """The program's number, or its numbers where the grid has more than one axis."""
    return str(program[0]) if not any(program[1:]) else str(program)


def _two(one: set, other: set) -> tuple | None:
    """A program of ``one`` and another of ``other``, the lowest numbers there are."""
    pairs = ((a, b) for a in sorted(one) for b in sorted(other) if a != b)
    return next((tuple(sorted(pair)) for pair in pairs), None)
