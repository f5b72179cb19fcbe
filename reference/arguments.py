"""Guards that many modules share: each names the argument, its value and what would be right."""

import math
from numbers import Real


def check_integer(
    name: str, value: object, least: int | None = None, most: int | None = None
) -> None:
    """Raise unless ``value`` is an integer from ``least`` to ``most``, both included.

    Raises:
        TypeError: it is not an integer; True and False are none.
        ValueError: it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    _check_range(name, value, least, most)


def check_number(
    name: str, value: object, least: float | None = None, most: float | None = None
) -> None:
    """Raise unless ``value`` is a finite number from ``least`` to ``most``, both included.

    Raises:
        TypeError: it is not a real number; True and False are none.
        ValueError: it is NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    _check_range(name, value, least, most)


def _check_range(name: str, value: Real, least: float | None, most: float | None) -> None:
    if (least is None or value >= least) and (most is None or value <= most):
        return
    wanted = f"from {least} to {most}"
    if most is None:
        wanted = f"at least {least}"
    elif least is None:
        wanted = f"at most {most}"
    raise ValueError(f"{name} must be {wanted}, got {value}")
