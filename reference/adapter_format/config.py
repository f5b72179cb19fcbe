"""``adapter_config.json``: the arguments of ``inject_lora`` in PEFT's words.

A config written by PEFT names every option that PEFT has. Those that change the result must be read
or refused: an option that is overlooked is another model, without an error.
"""

import json
import os
import re
from pathlib import Path

from torch import nn

from reference.lora import LoRALayer, LoRATransposed
from reference.lora.targets import plain_name

CONFIG = "adapter_config.json"
SETTINGS = ("r", "lora_alpha", "use_rslora", "init")  # what all layers of one adapter share

# init_lora_weights, PEFT's name of the start -> ours. Of "eva" and "orthogonal" nothing but the
# factors remains, and those are in the file.
INITS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian", "pissa": "pissa"}
INITS |= {"eva": "kaiming", "orthogonal": "kaiming"}
# Entries that this module reads; those that say nothing about the result; any other must be off.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules"}
READ |= {"use_rslora", "init_lora_weights", "fan_in_fan_out"}
WHOLE = {"modules_to_save": list, "trainable_token_indices": (list, dict)}
WHOLE |= {"ensure_weight_tying": bool}
READ |= set(WHOLE)
SILENT = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
SILENT |= {"peft_version", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config"}
SILENT |= {"eva_config", "corda_config", "lora_ga_config", "layers_pattern"}
OFF = ("null", "false", '""', '"none"', "[]", "{}")  # as JSON, where 0 is not false


def config_of(model: nn.Module, layers: dict[str, LoRALayer], base_name: str | None) -> dict:
    """What PEFT has to know to build ``layers``, which are all that are adapted in ``model``.

    Raises:
        ValueError: the layers differ in rank, alpha, scale or start.
    """
    first_name, first = next(iter(layers.items()))
    for name, layer in layers.items():
        if any(getattr(layer, key) != getattr(first, key) for key in SETTINGS):
            words = f"differ in {' or '.join(SETTINGS)}: one file holds one setting"
            raise ValueError(f"{name} and {first_name} {words}")
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer, LoRATransposed) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True if first.init == "kaiming" else first.init,
        "lora_alpha": first.lora_alpha,
        "lora_dropout": first.lora_dropout.p,
        "peft_type": "LORA",
        "r": first.r,
        "target_modules": targets_of(model, layers),
        "task_type": None,
        "use_rslora": first.use_rslora,
    }


def targets_of(model: nn.Module, layers: dict[str, LoRALayer]) -> list[str] | str:
    """``target_modules`` that choose exactly ``layers``: their names, wherever these do.

    Where a name ends that of another layer, a regular expression.
    """
    inside = {part for layer in layers.values() for part in layer.modules() if part is not layer}
    modules = [(plain_name(name), part) for name, part in model.named_modules()]
    others = [name for name, part in modules if part not in inside and name not in layers]
    if any(name.endswith(tuple(f".{target}" for target in layers)) for name in others):
        return "|".join(re.escape(name) for name in sorted(layers))
    return sorted(layers)


def write(config: dict) -> str:
    """The text of the file. numpy's numbers and paths become what JSON knows."""

    def plain(value: object) -> object:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if hasattr(value, "item"):  # a number of numpy's, or a tensor of one
            return value.item()
        raise TypeError(f"adapter_config.json has no place for {value!r}: give a number or text")

    return json.dumps(config, indent=2, default=plain) + "\n"


def load_config(directory: Path) -> dict:
    """The entries of the config in ``directory``.

    What trains whole is under "whole", as the config has it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or no table.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}: it is no adapter's directory")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a table with peft_type, got {type(config).__name__!r}")
    return config


def refuse_others(config: dict, known: set[str], path: Path) -> None:
    """Raise if ``config`` asks for something beside what is in ``known`` or says nothing.

    Raises:
        ValueError: it does; the entries are named.
    """
    others = {key: value for key, value in config.items() if key not in known | SILENT}
    asked = [f"{key}={value!r}" for key, value in others.items() if json.dumps(value) not in OFF]
    if asked:
        raise ValueError(f"{path} asks for what is not supported here: {', '.join(asked)}")


def read_config(directory: Path) -> dict:
    """The arguments of ``inject_lora`` from the config in ``directory``, and "fan_in_fan_out".

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, not of LoRA, lacks an entry, or asks for what is not done here.
    """
    return settings_of(load_config(directory), directory / CONFIG)


def settings_of(config: dict, path: Path) -> dict:
    """The same from the config's entries; ``path`` is for messages."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be 'LORA', got {config.get('peft_type')!r}")
    refuse_others(config, READ, path)
    start = config.get("init_lora_weights", True)
    if not isinstance(start, (bool, str)) or start not in INITS:
        words = "changed the base model in a way that can't be repeated from here; save it in peft"
        words += " with path_initial_model_for_weight_conversion, which makes it a plain adapter"
        raise ValueError(f"{path}: init_lora_weights={start!r} {words}")
    kinds = {"r": int, "lora_alpha": (int, float), "target_modules": (str, list)}
    kinds |= {key: kind for key, kind in WHOLE.items() if config.get(key) is not None}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{path}: {key} is {config.get(key)!r}, which can't be read")
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": config["target_modules"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "use_rslora": config.get("use_rslora", False),
        "init": INITS[start],
        "fan_in_fan_out": config.get("fan_in_fan_out", False),
        "whole": {key: config.get(key) for key in WHOLE},
    }


def check_settings(layers: dict[str, LoRALayer], settings: dict) -> None:
    """Raise unless an adapter with ``settings``, from :func:`read_config`, fits ``layers``.

    Raises:
        ValueError: a layer is merged, or has another rank, alpha, scale or kind of start.
    """
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: call unmerge() before loading into it")
        for key in ("r", "lora_alpha", "use_rslora"):
            mine, other = getattr(layer, key), settings[key]
            if mine != other:
                words = "load into a plain model"
                raise ValueError(f"{name} has {key}={mine!r}, the file {other!r}: {words}")
        if (layer.init == "pissa") != (settings["init"] == "pissa"):
            words = "they belong to different base weights"
            raise ValueError(
                f"{name} has init={layer.init!r}, the file {settings['init']!r}: {words}"
            )
