"""The process in which a learner's cells run for points. It observes and reports; it never judges.

``course check`` and nbgrader start it (``course/hearing.py``). It loads the unit's checks from disk before any of the learner's code is
there, and forks once for each exercise. The child runs the cells that belong to the exercise, takes the answer, is told a random seed
only then, and sends back what the check observes with it, as plain JSON. The judge runs the worked answer and the comparison itself, in a
process that none of this code enters. So whatever a notebook replaces here, be it the check, the judge's functions, ``print`` or a
module, the expected values stay what they are, and ``exit()``, a crash or an endless loop end one exercise. What observing needs (torch,
the course, the built-in functions) is put back as it was before observing and compared after it.

It is no sandbox: an answer that imports the worked one, or rewrites this process's memory, can get points. Both are in its cell to be read.
"""

import builtins
import contextlib
import importlib
import json
import os
import re
import signal
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import course.checks

# Of torch only what observing uses: other parts of it fill in their classes when they are first used.
_RELIED_ON = re.compile(r"(course|reference)(\..*)?|torch(\.(_tensor|functional|random|linalg|special|nn|autograd)(\..*)?)?")
_PARTS = (types.FunctionType, staticmethod, classmethod, property)


def load(folder: Path, topic: str) -> types.ModuleType:
    """The checks of one unit, in ``folder/topic``."""
    if str(folder) not in course.checks.__path__:
        course.checks.__path__.append(str(folder))
    return importlib.import_module(f"course.checks.{topic}")


class Kept:
    """What observing needs, as it was before the learner's code ran: modules, and what torch, the course and builtins hold."""

    def __init__(self) -> None:
        self.modules = {name: module for name, module in sys.modules.items() if _RELIED_ON.fullmatch(name)}
        self.held = {}  # id -> owner, what it holds, all its names; the owner is there so that the id stays its own
        for module in [*self.modules.values(), builtins]:
            self._keep(module)
            for value in list(vars(module).values()):
                if (isinstance(value, type) and _RELIED_ON.fullmatch(value.__module__ or "")) or hasattr(value, "witness"):
                    self._keep(value)
        functions = {value for _, held, _ in self.held.values() for value in held.values() if isinstance(value, types.FunctionType)}
        self.code = {function: _code(function) for function in functions}

    def _keep(self, owner: Any) -> None:
        data = not isinstance(owner, type) and not getattr(owner, "__name__", "").startswith(("torch", "builtins"))  # our constants too
        held = {name: value for name, value in vars(owner).items() if data or callable(value) or isinstance(value, _PARTS)}
        if owner is sys.modules.get("torch"):
            held.pop("manual_seed")  # torch wraps it itself when its compiler is first loaded
        self.held[id(owner)] = owner, held, frozenset(vars(owner))

    def put_back(self) -> list[str]:
        """Undo what has been replaced since; returns its names."""
        replaced = [name for name, module in self.modules.items() if sys.modules.get(name) is not module]
        sys.modules.update(self.modules)
        for owner, held, names in self.held.values():
            now = dict(vars(owner))
            for name, value in held.items():
                if now.get(name) is not value:
                    _set(owner, name, value)
                    if callable(value) or isinstance(value, _PARTS):  # not what a module remembers
                        replaced.append(f"{_name(owner)}.{name}")
            for name in now.keys() - names:
                if _hides(owner, name, now[name]):
                    type.__delattr__(owner, name) if isinstance(owner, type) else delattr(owner, name)
                    replaced.append(f"{_name(owner)}.{name}")
        for function, code in self.code.items():
            if any(now is not before for now, before in zip(_code(function), code, strict=True)):
                function.__code__, function.__defaults__, function.__kwdefaults__ = code
                replaced.append(f"{function.__module__}.{function.__qualname__}")
        return replaced


def _code(function: types.FunctionType) -> tuple:
    return function.__code__, function.__defaults__, function.__kwdefaults__


def _name(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__name__)


def _set(owner: Any, name: str, value: Any) -> None:
    type.__setattr__(owner, name, value) if isinstance(owner, type) else vars(owner).__setitem__(name, value)


def _hides(owner: Any, name: str, value: Any) -> bool:
    """Whether something new in a module or class takes the place of what a lookup would find otherwise."""
    if not isinstance(owner, types.ModuleType):
        return callable(value) or isinstance(value, _PARTS)
    return owner is not builtins and hasattr(builtins, name)


class _Shell(InteractiveShell):
    """IPython without a terminal."""

    def ask_exit(self) -> None:
        os._exit(0)

    def enable_gui(self, gui: str | None = None) -> None:
        """There is none; ``%matplotlib`` asks for it."""


def _shell() -> InteractiveShell:
    return _Shell.instance(config=Config({"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "nocolor"}}))


class _Silence:
    """Where a learner's prints go: nowhere, so that no amount of them fills anything."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def _error(error: BaseException, line: int | None = None) -> dict:
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:
        message = ""
    return {"kind": type(error).__name__, "message": str(message)[:5000], "line": line}


def _line(error: BaseException, names: dict) -> int | None:
    """The line of the cell itself that raised ``error``."""
    if isinstance(error, SyntaxError):
        return error.lineno
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals is names and trace.tb_frame.f_code.co_name == "<module>":
            return trace.tb_lineno
        trace = trace.tb_next
    return None


def _run(shell: InteractiveShell, source: str) -> dict | None:
    """Run one cell; its error, if it has one."""
    try:
        result = shell.run_cell(source, store_history=True)
    except BaseException as error:  # of a shell that the learner has changed
        return _error(error)
    error = result.error_before_exec or result.error_in_exec
    return None if error is None else _error(error, _line(error, shell.user_ns))


def testify(connection: socket.socket, checks: types.ModuleType, kept: Kept, shell: InteractiveShell) -> None:
    """Run one exercise and answer the judge's questions; in a process of its own."""
    stream = connection.makefile("rw", encoding="utf-8")

    def send(**message: Any) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    send(pid=os.getpid())
    job = json.loads(stream.readline())
    os.chdir(job["folder"])
    sys.path.insert(0, job["folder"])
    witness = getattr(checks, job["check"]).witness
    for index, source in job["cells"]:
        send(cell=index)
        send(ends=index, error=_run(shell, source))
    send(cell=job["at"])
    try:
        answer = eval(job["answer"], shell.user_ns)
        send(ready=True)
        for line in stream:
            kept.put_back()
            seen = json.dumps(witness(answer, json.loads(line)))
            if replaced := kept.put_back():
                send(refused=f"your code replaces {replaced[0]}, which the judge needs as it is")
            else:
                send(seen=json.loads(seen))
    except BaseException as error:
        send(error=_error(error))


def requests(control: socket.socket) -> Iterator[socket.socket]:
    """A connection for each exercise."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        yield socket.socket(fileno=descriptors[0])


def main(folder: str, topic: str, descriptor: str) -> None:
    """Serve one exercise after the other, each in a fork, until the judge hangs up."""
    control = socket.socket(fileno=int(descriptor))
    checks, shell = load(Path(folder), topic), _shell()
    kept = Kept()
    for connection in requests(control):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.setsid()
                control.close()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = _Silence()
                testify(connection, checks, kept, shell)
            os._exit(0)
        connection.close()
        _, status = os.waitpid(child, 0)
        control.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
