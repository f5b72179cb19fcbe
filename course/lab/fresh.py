"""A notebook's function in a new process, where Triton compiles kernels: in the notebook's own it interprets them.

in_fresh_process(own_ms, 1 << 28)      # own_ms, and all of the notebook that it uses, is written to a file and run there
"""

import dis
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from course import ROOT

PLAIN = (bool, int, float, str, type(None), tuple)


def in_fresh_process(function: Callable, *arguments: Any, seconds: float = 300) -> Any:
    """``function(*arguments)``, computed by a new process; with a GPU, Triton compiles there.

    Args:
        arguments: numbers and texts.
        seconds: how long it may take.

    Returns:
        What the function returns, through JSON.

    Raises:
        ValueError: it uses something that can't be written down: a tensor, say.
        RuntimeError: it failed there; the message ends as the process did.
    """
    text = f"{source(function)}\nimport json as _json\nprint(_json.dumps({function.__name__}(*{arguments!r})))\n"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cells.py")
        file.write_text(text)
        done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{function.__name__} failed in its process: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def source(function: Callable) -> str:
    """A file that holds ``function`` and what it uses of the module, or notebook, in which it was written.

    Raises:
        ValueError: it uses a name whose value can't be written down.
    """
    home = function.__module__
    heads, bodies, seen, left = [], [], set(), [(function.__name__, function)]
    while left:
        name, value = left.pop()
        if name in seen:
            continue
        seen.add(name)
        inner = getattr(value, "fn", value)  # of a kernel
        if isinstance(value, types.ModuleType):
            heads.append(f"import {value.__name__} as {name}")
        elif isinstance(value, PLAIN):
            heads.append(f"{name} = {value!r}")
        elif isinstance(inner, types.FunctionType) and inner.__module__ == home:
            text = textwrap.dedent(inspect.getsource(inner))
            bodies.append(text if inner.__name__ == name else f"{text}\n{name} = {inner.__name__}\n")
            used = _globals(compile(text, name, "exec"))
            left += [(other, inner.__globals__[other]) for other in sorted(used) if other in inner.__globals__]
        elif getattr(value, "__module__", home) != home and hasattr(value, "__qualname__"):
            heads.append(f"from {value.__module__} import {value.__qualname__} as {name}")
        else:
            raise ValueError(f"{name} is a {type(value).__name__}, which can't be taken along: make it inside {function.__name__}")
    return "\n".join([*sorted(heads), "", *bodies])


def _globals(code: types.CodeType) -> set[str]:
    """Names that ``code``, and functions in it, look up outside of themselves: decorators and annotations too, locals not."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_globals(part) for part in code.co_consts if isinstance(part, types.CodeType)))
