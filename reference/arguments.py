"""Guards that many modules share: each names the argument, its value and what would be right."""

import math
from numbers import Real


def check_integer(name: str, value: object, least: int | None = None, most: int | None = None) -> None:
    """Raise unless ``value`` is an integer from ``least`` to ``most``, both included.

    Raises:
        TypeError: it is no integer; True and False are none.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{name} must be {_range(least, most)}, got {value}")


def check_number(name: str, value: object, least: float | None = None, most: float | None = None) -> None:
    """Raise unless ``value`` is a finite number from ``least`` to ``most``, both included.

    Raises:
        TypeError: it is no number; True and False are none.
        ValueError: it is NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be {_range(least, most)}, got {value}")


def _range(least: float | None, most: float | None) -> str:
    if least is None and most is None:
        return "finite"
    if most is None:
        return f"at least {least}"
    return f"at most {most}" if least is None else f"from {least} to {most}"
