"""A run's state on the disk: whole, or not there.

A checkpoint is a folder ``step-000050`` with tensors (safetensors: nothing is unpickled) and a JSON of the rest. It is written under
another name and renamed when all of it is on the disk, so a kill or a full disk leaves the one before. The JSON holds the hash of the
tensors' file: what was damaged later is seen, named and passed over.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from course.units import CourseError

TENSORS, STATE, KEPT = "tensors.safetensors", "state.json", 2


@dataclass(frozen=True)
class Checkpoint:
    step: int
    losses: list[float]
    tensors: dict[str, Tensor]
    run: dict


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into; it gets its name, in the place of an older one, when the block has ended without an error.

    Raises:
        CourseError: the disk is full, or may not be written. What was there is as it was.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if (words := _of_the_disk(error)) is not None:
            raise CourseError(f"{folder} was not written: {words}. What was there before is kept") from error
        raise


def _of_the_disk(error: Exception) -> str | None:
    """What an error of the disk means; safetensors wraps it in an error of its own."""
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full. Free some space and run the same command again: it goes on from the last checkpoint"
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return "the folder may not be written. Change its rights, or give another --out"
    if number in (errno.ENOTDIR, errno.EEXIST):
        return "there is a file of that name, or on the way to it. Give another --out"
    return None


def write(folder: Path, step: int, losses: list[float], tensors: Mapping[str, Tensor], run: dict) -> Path:
    """Write a checkpoint and delete all but the last two.

    Raises:
        CourseError: it can't be written; earlier ones are kept.
    """
    final = folder / f"step-{step:06d}"
    with whole_folder(final) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        state = {"step": step, "losses": losses, "run": run, "sha256": sha256(partial / TENSORS)}
        (partial / STATE).write_text(json.dumps(state))
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those that are not."""
    troubles = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            state = json.loads((path / STATE).read_text())
            if sha256(path / TENSORS) != state["sha256"]:
                raise ValueError("its tensors are not those that were written")
            return Checkpoint(state["step"], state["losses"], load_file(path / TENSORS), state["run"]), troubles
        except (OSError, ValueError, KeyError) as error:
            troubles.append(f"{path.name} is damaged ({error}) and is passed over")
    return None, troubles


def check_space(folder: Path, needed: float) -> None:
    """Raise unless the disk has room for what the run will write.

    Raises:
        CourseError: it has not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CourseError(f"{folder} has {free / 1e9:.2g} GB free, and the run will write {needed / 1e9:.2g} GB: give another --out")


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
