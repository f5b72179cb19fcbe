"""Observations as plain JSON, on their way from the process that runs a learner's code to the process that judges it.

Reading them runs nobody's code. What no check can take for right, such as an object of a class of the learner's own, arrives as a stand-in
with the same type name and the same text, so that the words about it stay the same.
"""

import base64
import builtins
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TENSOR_BYTES = 16 << 20  # of a larger one only shape and dtype go: no right answer has one
TEXT = 2000  # characters of a stand-in


def pack(value: Any) -> Any:
    """``value`` as JSON takes it."""
    if value is None or type(value) in (bool, str, int, float):
        return value
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real):  # numpy's numbers are
        return float(value)
    for name, kind in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [pack(each) for each in value]}
    if isinstance(value, Mapping):
        return {"map": [[pack(key), pack(each)] for key, each in value.items()]}
    return _stand_in(value)


def unpack(value: Any) -> Any:
    """What :func:`pack` made ``value`` of.

    Raises:
        ValueError: it is nothing that ``pack`` makes.
    """
    if not isinstance(value, (dict, list)):
        return value
    try:
        ((name, content),) = value.items()
        if name in ("list", "tuple", "set", "frozenset"):
            return getattr(builtins, name)(map(unpack, content))
        if name == "map":
            return {unpack(key): unpack(each) for key, each in content}
        if name == "tensor":
            return _from_bytes(*content)
        if name == "other":
            kind, text = map(str, content)
            return type(kind, (), {"__repr__": lambda self: text})()
    except (AttributeError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"these are no observations: {error}") from error
    raise ValueError(f"these are no observations: {name}")


def _tensor(tensor: Tensor) -> Any:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() * tensor.element_size() > TENSOR_BYTES:
        return {"tensor": [dtype, list(tensor.shape), None]}
    try:
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().as_subclass(Tensor).contiguous().flatten()
        content = flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
    except (RuntimeError, NotImplementedError, TypeError):  # sparse, quantized, on no device
        return _stand_in(tensor)
    return {"tensor": [dtype, list(tensor.shape), base64.b64encode(content).decode()]}


def _from_bytes(dtype: str, shape: list[int], content: str | None) -> Tensor:
    dtype = getattr(torch, dtype)
    if content is None:
        return torch.zeros((), dtype=dtype).expand(shape)
    content = bytearray(base64.b64decode(content))
    return (torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)).reshape(shape)


def _stand_in(value: Any) -> Any:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return {"other": [type(value).__name__, str(text)[:TEXT]]}
