"""The process in which a learner's cells run for points. It observes and reports; it never judges.

``course check`` and nbgrader start it (``course/hearing.py``). It loads the unit's checks from disk before any of the learner's code is
there, and forks once for each exercise. The child runs the cells that belong to the exercise, takes the answer, is told a random seed
only then, and sends back what the check observes with it, as plain JSON. The judge runs the worked answer and the comparison itself, in a
process that none of this code enters. So whatever a notebook replaces here, be it the check, the judge's functions, ``print`` or a
module, the expected values stay what they are, and ``exit()``, a crash or an endless loop end one exercise. What observing needs (torch,
the course, the built-in functions) is put back as it was before observing and compared after it.

An answer that runs the worked one gets no points (:class:`Worked`), and files that hold worked answers can't be opened here (:func:`hide`).
It is no sandbox: code that rewrites this process's memory, or starts programs that read those files, can get points. It is in the cell to
be read. For a class, let an account do the grading that has nothing to lose.
"""

import builtins
import contextlib
import functools
import importlib
import inspect
import json
import os
import re
import signal
import socket
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import course.checks
from course import ROOT

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


class Worked:
    """The worked answers of one check, known by their code: while an answer is observed, none of it may run on the answer's behalf."""

    def __init__(self, check: Any) -> None:
        self.code = {
            _place(code) for answer in (getattr(check, "reference", None), getattr(check, "second", None)) for code in _code_of(answer)
        }
        self.judges = str(Path(course.checks.__file__).parent)
        self.ran = False

    def observed(self, function: Any, answer: Any, *arguments: Any) -> Any:
        """``function(answer, *arguments)``, watched; whether worked code ran is in ``ran``."""
        self.ran = any(_place(code) in self.code for code in _code_of(answer))
        sys.setprofile(self._see)
        threading.setprofile(self._see)
        try:
            return function(answer, *arguments)
        finally:
            self.ran = self.ran or sys.getprofile() != self._see  # whoever turns it off has a reason to
            sys.setprofile(None)
            threading.setprofile(None)

    def _see(self, frame: types.FrameType, event: str, _: Any) -> None:
        if event == "call" and _place(frame.f_code) in self.code:
            before = frame.f_back and frame.f_back.f_code
            # a judge may compare with the worked answer by itself; what it is given it calls through course/checking.py
            self.ran = self.ran or before is None or not (_place(before) in self.code or before.co_filename.startswith(self.judges))


def _place(code: types.CodeType) -> tuple[str, int]:
    """Where it is written: a copy under another name is still the same code."""
    return code.co_filename, code.co_firstlineno


def _code_of(answer: Any) -> Iterator[types.CodeType]:
    """Of a function, a partial of one, or a class with those of its bases that belong to the course: their code."""
    while isinstance(answer, functools.partial):
        answer = answer.func
    holders = (
        [vars(kind).values() for kind in answer.__mro__ if _RELIED_ON.fullmatch(kind.__module__)]
        if isinstance(answer, type)
        else [[answer]]
    )
    for each in (value for values in holders for value in values):
        each = getattr(each, "__func__", getattr(each, "fget", each))
        each = inspect.unwrap(each) if callable(each) else each
        # not all of ROOT: an environment in it holds torch, which any answer runs
        if isinstance(each, types.FunctionType) and any(Path(each.__code__.co_filename).is_relative_to(ROOT / own) for own in _OWN):
            yield each.__code__


_OWN = ("course", "reference")
_OPENS = {"open", "os.link", "os.symlink", "os.rename", "shutil.copyfile", "shutil.copytree", "shutil.move"}
_STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}


def hide(folders: list[Path]) -> None:
    """Let this process open nothing in ``folders`` any more. Python offers no way to take that back."""
    hidden = [os.path.realpath(folder) + os.sep for folder in folders]

    def hook(event: str, arguments: tuple) -> None:
        if event in _OPENS:
            paths = arguments[:1] if event == "open" else arguments[:2]  # what follows are modes and flags
            named = [os.path.realpath(each) for each in paths if isinstance(each, (str, bytes, os.PathLike))]
            if any(os.fsdecode(path).startswith(folder) for path in named for folder in hidden):
                raise PermissionError("worked answers can't be read while yours is judged")
        elif event in _STARTS and any(Path(folder).name in str(arguments) for folder in hidden):
            raise PermissionError("worked answers can't be read while yours is judged")

    sys.addaudithook(hook)


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
    check = getattr(checks, job["check"])
    worked, witness = Worked(check), check.witness
    hide([ROOT / "solutions", Path(checks.__file__).parent.parent])
    for index, source in job["cells"]:
        send(cell=index)
        send(ends=index, error=_run(shell, source))
    send(cell=job["at"])
    try:
        answer = eval(job["answer"], shell.user_ns)
        send(ready=True)
        for line in stream:
            kept.put_back()
            seen = json.dumps(worked.observed(witness, answer, json.loads(line)))
            if worked.ran:
                send(refused="your answer runs the worked one: write it yourself")
            elif replaced := kept.put_back():
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
