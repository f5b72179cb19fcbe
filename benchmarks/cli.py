"""What every benchmark does at the command line: read its options, say why it cannot run here, save what it found."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from course.lab import recorded
from course.lab.devices import device
from course.lab.tables import wrapped
from course.units import CourseError


def options(name: str, about: str, gpu: bool = True, **more: dict[str, Any]) -> argparse.Namespace:
    """The command line of the benchmark ``name``: ``out`` (a folder), ``smoke``, ``device``, and ``more``.

    Args:
        about: the benchmark's docstring; its first line is shown.
        gpu: whether it is measured on a CUDA device only.
        more: further options, name -> what ``add_argument`` takes. One that is called ``only`` asks for a part of the measurement.

    Raises:
        CourseError: a CUDA device is needed and this machine has none.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: benchmarks/recorded; of a part or a dry run, a temporary one)"
    )
    parser.add_argument("--smoke", action="store_true", help="a dry run in seconds, on a CPU too: every path, no meaning")
    for option, settings in more.items():
        parser.add_argument(f"--{option}", **settings)
    given = parser.parse_args()
    if gpu and not (given.smoke or torch.cuda.is_available()):
        raise CourseError(
            f"{name} is measured on a CUDA device, and this machine has none. "
            f"What other cards gave: course bench {name} --recorded. A dry run: course bench {name} --smoke"
        )
    given.device = torch.device("cpu") if given.smoke else device()
    whole = not (given.smoke or getattr(given, "only", None))
    given.out = given.out or (recorded.FOLDER if whole else Path(tempfile.mkdtemp()))
    return given


def record(
    name: str, about: str, measure: Callable[..., dict], table: Callable[[dict], str], small: dict[str, Any], where: str | None = None
) -> None:
    """All that a benchmark does which measures in one go: read the options, measure, print a table, save.

    Args:
        small: arguments of ``measure`` in a dry run.
        where: the device that the result is of, if it is not the best one of the machine; "cpu" does without a GPU.
    """
    given = options(name, about, gpu=where is None)
    result = measure(**small) if given.smoke else measure()
    print(table(result))
    print("saved to", recorded.save(name, result, given.out, torch.device(where) if where else None))


def message(error: Exception) -> str:
    """What a row says that failed: one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def failed(what: str, error: str) -> str:
    """What a table says of a row that failed."""
    return wrapped(f"{what}: FAILED {error}")


def rounded(value: Any) -> Any:
    """Floats to six significant digits, through dictionaries, lists and tuples."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
