"""Results measured on other machines: ``benchmarks/recorded/<device>/<name>.json``, each with the device, the day and the versions.

A notebook calls :func:`live_or_recorded`: with a GPU the function runs there and then; without one the recorded result is shown, under a
line that says where and when it was measured.
"""

import datetime
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from course import ROOT
from course.lab.devices import device, device_name

FOLDER = ROOT / "benchmarks" / "recorded"
SAVED: list[Path] = []  # by this process, in order


def slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(name: str, result: Any, folder: Path = FOLDER, where: torch.device | None = None) -> Path:
    """Write ``result`` (anything JSON holds) as measured on ``where`` (default: the device of this machine) today; returns the file."""
    import transformers

    entry = {
        "name": name,
        "device": device_name(where),
        "day": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "result": result,
    }
    path = Path(folder) / slug(entry["device"]) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(entry, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)  # never half a file
    SAVED.append(path)
    return path


def read(path: Path) -> dict:
    """The entry in a file that :func:`save` wrote."""
    return json.loads(Path(path).read_text())


def load(name: str, device: str | None = None, folder: Path = FOLDER) -> dict:
    """The recorded entry called ``name``: keys ``device``, ``day``, ``versions``, ``result``.

    Args:
        device: a part of the device's folder name ("h100", "cpu"); None takes the only or the newest one.

    Raises:
        FileNotFoundError: nothing is recorded under that name; the message lists what is.
    """
    found = [path for path in Path(folder).glob(f"*/{name}.json") if device is None or device in path.parent.name]
    if not found:
        known = sorted(f"{path.parent.name}/{path.stem}" for path in Path(folder).glob("*/*.json"))
        raise FileNotFoundError(f"no recorded result {name!r} (device {device!r}); recorded are: {', '.join(known) or 'none'}")
    return max((json.loads(path.read_text()) for path in found), key=lambda entry: entry["day"])


def row(name: str, /, device: str | None = None, folder: Path = FOLDER, **where: Any) -> dict:
    """The one row of a recorded table in which every key of ``where`` has that value: ``row("nf4_kernels", work="linear", rows=16)``.

    The table is the result, where that is a list, or the only list of rows in it.

    Raises:
        LookupError: no row or several are so; the message says which values the keys have.
        ValueError: the result holds no table, or several.
    """
    result = load(name, device, folder)["result"]
    tables = [result] if isinstance(result, list) else [t for t in result.values() if isinstance(t, list) and t and isinstance(t[0], dict)]
    if len(tables) != 1:
        raise ValueError(f"recorded result {name!r} holds {len(tables)} tables: its keys are {sorted(result)}")
    found = [each for each in tables[0] if all(each.get(key) == value for key, value in where.items())]
    if len(found) != 1:
        there = {key: sorted({str(each.get(key)) for each in tables[0]}) for key in where}
        raise LookupError(f"{len(found)} rows of {name!r} have {where}; there are {there}")
    return found[0]


def provenance(entry: dict) -> str:
    """One line for readers: where and when."""
    return f"Recorded on {entry['device']}, {entry['day']} (torch {entry['versions']['torch']})."


def described(entry: dict) -> str:
    """The day and all versions, for whom the device is said already."""
    return f"Recorded {entry['day']}: {', '.join(f'{package} {version}' for package, version in entry['versions'].items())}"


def live_or_recorded(name: str, measure: Callable[[], Any], needs_gpu: bool = True, recorded_on: str | None = None) -> Any:
    """Run ``measure()`` where a GPU is present (or none is needed); else return the recorded result and print where it is from.

    Args:
        recorded_on: which card's record, as :func:`load` takes it.
    """
    if not needs_gpu or device().type == "cuda":
        print(f"Measured now on {device_name()}.")
        return measure()
    entry = load(name, recorded_on)
    print(provenance(entry))
    return entry["result"]
