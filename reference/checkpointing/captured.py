"""Which trained tensors a function uses that are not among its arguments.

Autograd must be told, or their gradients are lost: the trap of a checkpoint behind a frozen input.
A module's are its parameters. A function may hold more in its closure, its defaults, its globals,
the object that it is a method of, or the arguments of a partial.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def trained_by(function: Callable) -> list[Tensor]:
    """Parameters and other leaves that require a gradient, each once, in the order found.

    Raises:
        ValueError: a tensor is no leaf: the backward would run through its past a second time.
    """
    found = captured(function)
    for tensor in found:
        if not tensor.is_leaf:
            raise ValueError(
                f"the function captures a tensor of shape {tuple(tensor.shape)} that is computed "
                "from trained ones: pass it as an argument"
            )
    return found


def captured(function: Callable) -> list[Tensor]:
    """All tensors that ``function`` holds and that require a gradient."""
    found: dict[int, Tensor] = {}
    _collect(function, found, set())
    return list(found.values())


def _collect(value: Any, found: dict[int, Tensor], met: set[int]) -> None:
    if id(value) in met:
        return
    met.add(id(value))
    if isinstance(value, Tensor):
        if value.requires_grad:
            found[id(value)] = value
        return
    for inner in value.parameters() if isinstance(value, nn.Module) else _held_by(value):
        _collect(inner, found, met)


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if inspect.ismethod(value):
        return value.__self__, value.__func__
    if inspect.isfunction(value):
        used = inspect.getclosurevars(value)
        # A global function would lead on to all that its file imports.
        named = [each for each in used.globals.values() if not inspect.isfunction(each)]
        return (
            *used.nonlocals.values(),
            *named,
            value.__defaults__ or (),
            value.__kwdefaults__ or (),
        )
    return ()


def unseen(outputs: Iterable[Tensor], known: Iterable[Tensor]) -> Tensor | None:
    """A leaf that ``outputs`` depend on and that is not in ``known``; None if there is none."""
    names, met = {id(tensor) for tensor in known}, set()
    waiting = [output.grad_fn for output in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in names:
            return node.variable
        waiting += [following for following, _ in node.next_functions]
    return None
