"""Checks of an adapter's own files: whole, unchanged, finite, and what was trained is what the config says."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from course.capstone import export
from course.capstone.checklist_subject import CONFIG, WEIGHTS, Broken, Subject
from course.capstone.checkpoint import sha256
from course.lab.meters import show_bytes

RECORDED = {"base": ("name", "sha256", "dtype", "method"), "adapter": ("r", "lora_alpha"), "tokenizer": ("sha256",), "files": ()}


def _holds(part: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(part, dict) and set(keys) <= part.keys()


def _json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise Broken(f"{file.name} is not JSON: {error}", "copy it again, or export again") from None
    if not isinstance(found, dict):
        raise Broken(f"{file.name} holds {type(found).__name__}, not an object of names and values", "copy it again, or export again")
    return found


def files(subject: Subject) -> str:
    folder = subject.folder
    if not (folder / CONFIG).is_file():
        raise Broken(f"there is no {CONFIG}", "copy the whole folder, or export again")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        words = "the weights are a pickle, which runs code when it is read" if pickled else f"there is no {WEIGHTS}"
        raise Broken(words, "save the adapter as safetensors")
    subject.config = _json(folder / CONFIG)
    try:
        with safe_open(folder / WEIGHTS, "pt") as opened:
            subject.shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118  not a dictionary
    except Exception as error:  # safetensors' own errors, of the file's header or size
        raise Broken(f"{WEIGHTS} is cut off or no safetensors file ({error})", "copy it again, or export again") from None
    if (record := folder / export.RECORD).is_file():
        subject.record = _json(record)
        told = {"base": None} | subject.record  # the others may be left out, and are unknown then
        if lacking := [part for part, keys in RECORDED.items() if part in told and not _holds(told[part], keys)]:
            words = f"{export.RECORD} lacks {', '.join(lacking)}, or a part of it"
            raise Broken(words, "copy the record again, export again, or delete it: what it told is then unknown")
    return f"{CONFIG}, {WEIGHTS}: {len(subject.shapes)} tensors, {show_bytes((folder / WEIGHTS).stat().st_size)}"


def unchanged(subject: Subject) -> str:
    written = subject.recorded("files")
    changed = [name for name, digest in written.items() if not (subject.folder / name).is_file() or sha256(subject.folder / name) != digest]
    if changed:
        raise Broken(f"{', '.join(changed)}: not as exported", "evaluate what you ship: export again, or copy again")
    return f"{len(written)} files are as they were exported"


def finite(subject: Subject) -> str:
    with safe_open(subject.folder / WEIGHTS, "pt") as opened:
        broken = [key for key in subject.shapes if not torch.isfinite(opened.get_tensor(key).float()).all()]
    if broken:
        raise Broken(f"{len(broken)} tensors hold NaN or infinity, the first {broken[0]}", "go back to an earlier checkpoint")
    return "all values are finite"


def trained(subject: Subject) -> str:
    with safe_open(subject.folder / WEIGHTS, "pt") as opened:
        second = [key for key in subject.shapes if "lora_B" in key or "lora_embedding_B" in key]
        zero = [key for key in second if not opened.get_tensor(key).any()]
    if not second:
        raise Broken("there is no B in the file", "this is no LoRA adapter")
    if zero:
        words = "all B are zero" if len(zero) == len(second) else f"{len(zero)} of {len(second)} B are zero, the first {zero[0]}"
        raise Broken(f"{words}: the adapter does nothing there", "it was saved before training, or those layers got no gradient")
    return f"{len(second)} layers, no B is zero"


def rank(subject: Subject) -> str:
    r, alpha = subject.config.get("r"), subject.config.get("lora_alpha")
    ranks = {shape[0] for key, shape in subject.shapes.items() if re.search(r"lora_A\.", key)}
    patterned = subject.config.get("rank_pattern") or {}
    if not isinstance(patterned, dict):
        raise Broken(f"rank_pattern is {patterned!r}", "it says a rank for names of layers: put the config of the run back")
    if not isinstance(r, int) or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise Broken(f"the config has r = {r!r} and lora_alpha = {alpha!r}", "both are positive numbers of the training run")
    if ranks - {r} - set(patterned.values()):
        raise Broken(
            f"the config says r = {r}, the factors have rank {', '.join(map(str, sorted(ranks)))}", "put the config of the run back"
        )
    if subject.record and (told := subject.recorded("adapter")) and (told["r"], told["lora_alpha"]) != (r, alpha):
        given = f"trained with r = {told['r']}, alpha = {told['lora_alpha']:g}, the config says r = {r}, alpha = {alpha:g}"
        raise Broken(f"{given}: every update is scaled wrongly", "put the config of the run back")
    root = subject.config.get("use_rslora")
    return f"r = {r}, alpha = {alpha:g}: scale {alpha / (r**0.5 if root else r):.3g}"


def targets(subject: Subject) -> str:
    wanted = subject.config.get("target_modules")
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in subject.shapes if ".lora_A." in key}

    if isinstance(wanted, str):
        try:
            re.compile(wanted)
        except re.error as error:
            words = f"target_modules is {wanted!r}, which is no regular expression ({error})"
            raise Broken(words, "one text is a regular expression: name layers in a list, or mend it") from None

    def chosen(name: str) -> bool:
        if isinstance(wanted, str):
            return wanted == "all-linear" or bool(re.fullmatch(wanted, name))
        return any(name == each or name.endswith(f".{each}") for each in wanted or ())

    if outside := sorted(name for name in names if not chosen(name)):
        raise Broken(
            f"{len(outside)} layers have factors and are no targets, such as {outside[0]}: they would not be loaded", "mend target_modules"
        )
    if isinstance(wanted, list) and (idle := [each for each in wanted if not any(n == each or n.endswith(f".{each}") for n in names)]):
        raise Broken(f"{', '.join(idle[:3])} are targets without factors: they would start at random or fail", "mend target_modules")
    return f"{len(names)} layers, each a target"
