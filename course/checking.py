"""The judge behind every exercise: find the first difference, and say which known mistake makes exactly that difference.

A check never guesses. It runs the learner's answer and the right one on the same fresh random inputs and compares what was observed, in
order: type, shape, dtype, value. On a difference it runs the *known wrong answers* on the same inputs too; where one of them gives what
the learner's answer gave, the learner reads that mistake's own words. So does who made two mistakes: if no known one gives all of it, the
one counts that gives the longest beginning, if two or more wrong observations are in it. Otherwise the first difference is named.
An answer that fails on its way, as with a wrong axis that a square matrix forgives, is known by all that was seen until then.

In Jupyter all this happens where the learner's code is. For points (``course check``, nbgrader) :meth:`Check.witness` is called there,
which only observes, and :meth:`Check.verdict` in a process that the learner's code never enters: see ``course/witness.py``.
"""

import builtins
import contextlib
import copy
import functools
import inspect
import itertools
import linecache
import math
import numbers
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from course.observations import pack, unpack

Observations = Mapping[str, Any]  # label, written for the learner -> what was observed
Seen = Iterable[tuple[str, Any]]  # the same, as pairs: what a generator yields while it looks


class NotYet(AssertionError):
    """The answer is not right yet; the message is written for the learner."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the message alone, since a traceback through the judge teaches nothing."""
        return [f"Not yet: {self}"]


@dataclass(frozen=True)
class Raised:
    """An observation: the call raised this type of error."""

    kind: type[Exception]


@dataclass(frozen=True)
class Changed:
    """An observation: which of the things that the answer was given it changed in place."""

    names: tuple[str, ...] = ()


def unwritten(error: Exception) -> bool:
    """Whether the error is a stub's. torch raises the same kind, with words, where it has no operation for a dtype."""
    return isinstance(error, NotImplementedError) and not error.args


def raised(function: Callable, *args, **kwargs) -> Raised | None:
    """The error that ``function(*args, **kwargs)`` raises, as an observation; None if it raises nothing."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        if unwritten(error):
            raise
        return Raised(type(error))
    return None


def unpacked(result: Any, what: str, *kinds: type | tuple[type, ...]) -> Any:
    """``result``, if it is a tuple of these kinds; a list will do.

    Raises:
        NotYet: it is something else; the learner reads to return ``what``.
    """
    if isinstance(result, (tuple, list)) and len(result) == len(kinds) and all(map(isinstance, result, kinds)):
        return result
    if result is None:
        raise NotYet(f"your function returned nothing: is the `return` missing? It has to return {what}")
    got = f"{len(result)} value{'s' * (len(result) != 1)}" if isinstance(result, (tuple, list)) else type(result).__name__
    if isinstance(result, (tuple, list)) and len(result) == len(kinds):
        place = next(i for i, (value, kind) in enumerate(zip(result, kinds, strict=True)) if not isinstance(value, kind))
        got += f", and number {place + 1} of them is of type {type(result[place]).__name__}"
    raise NotYet(f"your function returned {got}: return {what}")


def first_difference(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-6) -> str | None:
    """What differs first, in words for a learner: type, shape, dtype, then value. None if nothing does."""
    if isinstance(expected, Raised):
        if not isinstance(actual, Raised):
            return f"expected a {expected.kind.__name__}, but the call was accepted"
        return None if issubclass(actual.kind, expected.kind) else f"expected a {expected.kind.__name__}, got a {actual.kind.__name__}"
    if isinstance(expected, Changed):
        extra = [name for name in actual.names if name not in expected.names]
        missing = [name for name in expected.names if name not in actual.names]
        if missing:
            return f"{missing[0]} is as it was: change it in place"
        return f"{extra[0]} was changed in place; work on a copy" if extra else None
    if isinstance(expected, Tensor):
        return _tensor_difference(actual, expected, rtol, atol)
    if isinstance(expected, bool) or expected is None or isinstance(expected, (str, set, frozenset)):
        return None if type(actual) is type(expected) and actual == expected else f"expected {expected!r}, got {actual!r}"
    if isinstance(expected, (int, float)):
        if isinstance(actual, Tensor) and actual.numel() == 1:
            actual = actual.item()
        if isinstance(actual, bool) or not isinstance(actual, numbers.Real):  # numpy's numbers are Real, and not all are float or int
            return f"expected a number, got {type(actual).__name__}"
        if isinstance(actual, int) and actual.bit_length() > 1000:
            return f"expected {expected:.6g}, got a number of {actual.bit_length()} bits"
        both_nan = math.isnan(actual) and math.isnan(expected)
        return None if both_nan or math.isclose(actual, expected, rel_tol=rtol, abs_tol=atol) else _two_numbers(actual, expected)
    if isinstance(expected, (list, tuple)):
        if not isinstance(actual, (list, tuple)):
            return f"expected {len(expected)} values, got {type(actual).__name__}"
        if len(actual) != len(expected):
            return f"expected {len(expected)} values, got {len(actual)}"
        pairs = {f"item {i}": pair for i, pair in enumerate(zip(actual, expected, strict=True))}
    elif isinstance(expected, Mapping):
        if not isinstance(actual, Mapping):
            return f"expected a dictionary, got {type(actual).__name__}"
        if set(actual) != set(expected):
            missing, extra = sorted(map(str, set(expected) - set(actual))), sorted(map(str, set(actual) - set(expected)))
            return "; ".join(
                part for part in (f"missing: {', '.join(missing)}" * bool(missing), f"too many: {', '.join(extra)}" * bool(extra)) if part
            )
        pairs = {str(key): (actual[key], expected[key]) for key in expected}
    else:
        raise TypeError(f"no comparison for {type(expected).__name__}: give the check a tensor, number, string, list or dictionary")
    for label, (one, other) in pairs.items():
        if (difference := first_difference(one, other, rtol, atol)) is not None:
            return f"{label}: {difference}"
    return None


def _two_numbers(actual: float, expected: float) -> str:
    """Whole numbers in full, others with as many digits as it takes to tell them apart."""
    if isinstance(expected, int) and abs(actual) < 1e15 and actual == int(actual):
        return f"expected {expected}, got {int(actual)}"
    for digits in (6, 9, 12, 17):
        one, other = f"{actual:.{digits}g}", f"{expected:.{digits}g}"
        if one != other:
            break
    return f"expected {other}, got {one}"


def _tensor_difference(actual: Any, expected: Tensor, rtol: float, atol: float) -> str | None:
    if not isinstance(actual, Tensor):
        return f"expected a tensor, got {type(actual).__name__}"
    if actual.shape != expected.shape:
        return f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    if actual.dtype != expected.dtype:
        return f"expected {expected.dtype}, got {actual.dtype}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if not (expected.is_floating_point() or expected.is_complex()):
        wrong = actual != expected
        return f"{int(wrong.sum())} of {expected.numel()} values differ, {_at(wrong, actual, expected)}" if wrong.any() else None
    if torch.allclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True):
        return None
    if not torch.isfinite(actual).all() and torch.isfinite(expected).all():
        return "the result holds NaN or infinity"
    largest = (actual.double() - expected.double()).abs().max().item()
    wrong = ~torch.isclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    return f"values differ by up to {largest:.3g}, {_at(wrong, actual, expected)}"


def _at(wrong: Tensor, actual: Tensor, expected: Tensor) -> str:
    """The first place where ``wrong`` is true, and what is there."""
    place = tuple(wrong.nonzero()[0].tolist())
    one, other = actual[place].item(), expected[place].item()
    words = _two_numbers(one, other) if isinstance(other, float) else f"expected {other}, got {one}"
    return f"first at {list(place)}: {words}"


def _watched(answer: Any, changed: list[str]) -> Any:
    """A function, noting what it changes in place: tensors, lists, sets, dictionaries. A class is left alone: it may train itself."""
    if not inspect.isfunction(answer):
        return answer

    @functools.wraps(answer)
    def watched(*arguments, **settings):
        given = {f"argument {i}": value for i, value in enumerate(arguments, 1)} | settings
        tensors = [(name, tensor, tensor.detach().clone()) for name, value in given.items() for tensor in _tensors(value)]
        plain = [
            (name, value, copy.deepcopy(value)) for name, value in given.items() if isinstance(value, (list, dict, set)) and _plain(value)
        ]
        others = [
            (name, value, _held(value)) for name, value in given.items() if isinstance(value, (list, dict, set)) and not _plain(value)
        ]
        result = answer(*arguments, **settings)
        changed.extend(name for name, value, before in plain if value != before or _order(value) != _order(before))
        changed.extend(name for name, value, before in others if list(map(id, _held(value))) != list(map(id, before)))
        changed.extend(name for name, tensor, before in tensors if first_difference(tensor.detach(), before, 0, 0) is not None)
        return result

    return watched


def _order(value: list | dict | set) -> list:
    """Of the items of a list, of the keys of a dictionary; a set has none."""
    return [] if isinstance(value, set) else list(value)


def _held(value: list | dict | set) -> list:
    """The things themselves that are in it; of a dictionary the keys too."""
    return [each for pair in value.items() for each in pair] if isinstance(value, dict) else list(value)


def _plain(value: Any) -> bool:
    """A number or a name, or a list, tuple, set or dictionary of nothing else."""
    if isinstance(value, (list, tuple, set, dict)):
        return all(map(_plain, (*value, *value.values()) if isinstance(value, dict) else value))
    return isinstance(value, (numbers.Number, str))


def _tensors(value: Any) -> list[Tensor]:
    """Those that ``value`` is, or holds as a list, a tuple, a dictionary or a dataclass."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, each.name) for each in fields(value)]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []


GIVEN = "what your code was given"
FAILED = "your code failed"  # the observation of an error after others: its words
CLOSER = 10.0  # times, than two right answers: what is to name a mistake by a beginning alone
LIMIT_SECONDS = 60.0  # for one run of an answer; the worked ones take less than a tenth of a second


class _TooLong(BaseException):
    """Not an ``Exception``, which an answer or an observation may catch."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises ``_TooLong`` in what runs longer. No limit without SIGALRM, outside of the main thread, or where the alarm is in use."""
    main = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not main or signal.getitimer(signal.ITIMER_REAL)[0] or signal.getsignal(signal.SIGALRM) is None:
        yield
        return

    def stop(*_) -> None:
        if sys.gettrace() is None:  # somebody who looks around in a debugger may take as long as it takes
            raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and every second from then on, since a bare `except` catches everything
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mistaken(answer: Any, **parts: Any) -> Any:
    """``answer`` with parts replaced: a function's keyword-only arguments, or a class's methods and attributes (in a subclass).

    Raises:
        TypeError: the answer has no such part.
    """
    if isinstance(answer, type):
        there = set(dir(answer))
    else:
        there = {p.name for p in inspect.signature(answer).parameters.values() if p.kind is p.KEYWORD_ONLY}
    if unknown := set(parts) - there:
        raise TypeError(f"{answer.__name__} has no part {', '.join(sorted(unknown))}; its parts are {', '.join(sorted(there))}")
    if isinstance(answer, type):
        return type(answer.__name__, (answer,), parts)

    @functools.wraps(answer)
    def wrong(*arguments, **settings):
        return answer(*arguments, **settings, **parts)

    return wrong


def but(**parts: Any) -> dict[str, Any]:
    """What a known mistake is: the worked answer, but with these parts, as :func:`mistaken` takes them."""
    return parts


def _holds_value(observed: Any) -> bool:
    """Whether it can say which mistake was made: a tensor or a fraction can. A shape, a count, a "no" or an error has many causes."""
    if isinstance(observed, Mapping):
        observed = tuple(observed.values())
    if isinstance(observed, (list, tuple)):
        return any(_holds_value(each) for each in observed if not isinstance(each, int))
    return isinstance(observed, (Tensor, float))


def _where(error: Exception) -> str:
    """The line of the learner's cell that raised it, the innermost one; empty where no cell is to blame."""
    found, trace = "", error.__traceback__
    while trace is not None:
        code, number = trace.tb_frame.f_code, trace.tb_lineno
        if trace.tb_frame.f_globals.get("__name__") == "__main__" and (line := linecache.getline(code.co_filename, number).strip()):
            found = f" (line {number} of your cell: `{line}`)"
        trace = trace.tb_next
    return found


_RAISED, _CHANGED = "raised", "changed in place"


def _named(value: Any) -> Any:
    """An observed error as its type's name with the built-in type that it is a kind of, a change by names; anything else as it is."""
    if isinstance(value, Changed):
        return {_CHANGED: list(value.names)}
    if not isinstance(value, Raised):
        return value
    return {_RAISED: (value.kind.__name__, next(kind.__name__ for kind in value.kind.__mro__ if kind.__module__ == "builtins"))}


def _raised_of(value: Any) -> Any:
    """What :func:`_named` made ``value`` of."""
    if isinstance(value, dict) and set(value) == {_CHANGED}:
        return Changed(tuple(map(str, value[_CHANGED])))
    if not (isinstance(value, dict) and set(value) == {_RAISED}):
        return value
    name, base = value[_RAISED]
    kind = getattr(builtins, base)
    return Raised(kind if name == base else type(name, (kind,), {}))


def fresh_seed() -> int:
    """Not one that the learner knows or sets: nothing can be tuned to it."""
    return random.SystemRandom().randrange(2**31)


@dataclass(frozen=True)
class Check:
    """Judges one exercise; call it with the learner's answer.

    Attributes:
        task: what was asked, in a few words; printed when the answer passes.
        observe: ``observe(answer, seed)`` runs the answer on inputs drawn from ``seed`` and returns what was seen, labelled, in the order
            in which a learner should hear of it (forward before training): a dictionary, or a generator of (label, value), which ends
            early where nothing more can be said. It must not depend on anything but its arguments.
        reference: the worked answer.
        second: a right answer written differently; the test of the checks runs it.
        misconceptions: what the learner is told -> the wrong answer that behaves so: the worked answer :func:`but` for some parts,
            or a whole answer where no part of the worked one is to blame. Four or more.
        rtol, atol: how far two right answers may differ, from the order of their sums and the dtype.
        rounds: how many seeds.
    """

    task: str
    observe: Callable[[Any, int], Observations | Seen]
    reference: Any
    second: Any
    misconceptions: Mapping[str, Any] = field(default_factory=dict)
    rtol: float = 1e-4
    atol: float = 1e-6
    rounds: int = 2

    def __call__(self, answer: Any) -> None:
        """Raise ``NotYet`` with words for the learner, or print that the answer is right."""
        for _ in range(self.rounds):
            self._judge(answer, fresh_seed())
        print(f"✓ {self.task}")

    def wrong(self, message: str) -> Any:
        """The wrong answer behind ``message``."""
        return self._wrong[message]

    @functools.cached_property
    def _wrong(self) -> dict[str, Any]:
        """Each made once: a class that is made anew for every run would be another class every time."""
        return {
            message: mistaken(self.reference, **parts) if isinstance(parts, Mapping) else parts
            for message, parts in self.misconceptions.items()
        }

    def witness(self, answer: Any, seed: int) -> Any:
        """What ``answer`` does, as plain data that JSON takes.

        Raises:
            NotYet: it fails, takes too long, or is refused by what observes it.
        """
        seen = self._observed(answer, seed)
        return {"changed": list(seen[GIVEN].names), "seen": pack({label: _named(value) for label, value in seen.items() if label != GIVEN})}

    def verdict(self, plain: Any, seed: int) -> None:
        """Raise ``NotYet`` if :meth:`witness` did not give ``plain`` of a right answer. Runs nothing but the course's own code."""
        try:
            changed = Changed(tuple(map(str, plain["changed"])))
            seen = {str(label): _raised_of(value) for label, value in unpack(plain["seen"]).items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise NotYet("your code got between the judge and what it observes") from None
        self._compare({GIVEN: changed, **seen}, seed)

    def _judge(self, answer: Any, seed: int) -> None:
        self._compare(self._observed(answer, seed), seed)

    def _observed(self, answer: Any, seed: int) -> Observations:
        seen: dict[str, Any] = {}
        try:
            with _time_limit(LIMIT_SECONDS):
                return self._run(answer, seed, seen)
        except NotYet:
            raise
        except _TooLong:
            raise NotYet(f"your answer was still running after {LIMIT_SECONDS:g} s: is there a loop that never ends?") from None
        except Exception as error:
            if unwritten(error):
                raise NotYet("nothing here yet: replace the NotImplementedError with your answer") from None
            words = f"your code raised {type(error).__name__}: {error}{_where(error)}"
            if len(seen) < 2:  # nothing but what was given
                raise NotYet(words) from error
            return seen | {FAILED: words}

    def _compare(self, actual: Observations, seed: int) -> None:
        """Raise ``NotYet`` unless ``actual`` is what the worked answer gives."""
        expected = self._run(self.reference, seed)
        if FAILED in actual:
            raise NotYet(self._known_until_it_failed(actual, expected, seed) or str(actual[FAILED]))
        if (first := self._first(actual, expected)) is None:
            return
        beginnings: dict[str, int] = {}  # known mistakes that give a beginning of it -> how many observations
        for message in self.misconceptions:
            try:
                known = self._run(self.wrong(message), seed)
                full = self._first(actual, known) is None
                alike = list(itertools.takewhile(lambda label, known=known: self._alike(actual, known, label, CLOSER), known))
            except Exception:  # this mistake fails on these inputs, so it is not the learner's
                continue
            if full:
                raise NotYet(message)
            wrong = [label for label in alike if not self._alike(actual, expected, label)]
            if first[0] in wrong and len(wrong) > 1 and any(_holds_value(actual[label]) for label in wrong):
                beginnings[message] = len(alike)
        longest = [message for message, count in beginnings.items() if count == max(beginnings.values())]
        if len(longest) == 1:  # of two that fit alike neither is named
            raise NotYet(longest[0])
        raise NotYet(f"{first[0]}: {first[1]}")

    def _known_until_it_failed(self, actual: Observations, expected: Observations, seed: int) -> str | None:
        """The one known mistake that gives all that was seen before the error, if something in it is wrong."""
        labels = [label for label in actual if label != FAILED]
        if not any(_holds_value(actual[label]) for label in labels if not self._alike(actual, expected, label)):
            return None
        found = []
        for message in self.misconceptions:
            known: dict[str, Any] = {}
            with contextlib.suppress(Exception):  # it may fail in the same place
                self._run(self.wrong(message), seed, known)
            if all(self._alike(actual, known, label, CLOSER) for label in labels):
                found.append(message)
        return found[0] if len(found) == 1 else None

    def _run(self, answer: Any, seed: int, seen: dict[str, Any] | None = None) -> Observations:
        """What is seen; where ``seen`` is given it also holds what was seen before an error."""
        # A check leaves the notebook's random numbers as they were. A warning is no mistake, but nbgrader takes points for it.
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            changed: list[str] = []
            seen = {} if seen is None else seen
            seen[GIVEN] = Changed()  # first: a changed input makes all else hard to read
            try:
                observed = self.observe(_watched(answer, changed), seed)
                for label, value in observed.items() if isinstance(observed, Mapping) else observed:
                    seen[label] = value
            finally:
                seen[GIVEN] = Changed(tuple(dict.fromkeys(changed)))
            return seen

    def _first(self, actual: Observations, expected: Observations) -> tuple[str, str] | None:
        for label, value in expected.items():
            if label not in actual:
                return label, "nothing was observed"
            if (difference := first_difference(actual[label], value, self.rtol, self.atol)) is not None:
                return label, difference
        return None

    def _alike(self, actual: Observations, other: Observations, label: str, closer: float = 1.0) -> bool:
        if label not in actual or label not in other:
            return False
        return first_difference(actual[label], other[label], self.rtol / closer, self.atol / closer) is None
