"""LoRA adapters in PEFT's own files, so that either side reads what the other wrote.

A directory with two files:

    adapter_config.json         r, lora_alpha, target_modules, ...: how to build the layers
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight   (r, in)      .lora_B.weight   (out, r)
                                base_model.model.<layer>.lora_embedding_A (r, tokens)  .lora_embedding_B (dim, r)

The base model is not in them; that is why an adapter weighs megabytes. A PiSSA adapter belongs to what PiSSA leaves of the base, so its
config says "pissa", and whoever loads it on the original base (peft or :func:`load_adapter`) takes the same singular triples out again.
"""

import json
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from reference.lora import LoRAEmbedding, LoRALayer, find_targets, inject_lora, lora_layers, wrapper_of
from reference.tensor_file import read_tensors, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SETTINGS = ("r", "lora_alpha", "use_rslora", "init")  # what all layers of one adapter have in common

# init_lora_weights, peft's name of the start -> ours. Of "eva" and "orthogonal" nothing but the factors remains, and those are in the file.
INITS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian", "pissa": "pissa", "eva": "kaiming", "orthogonal": "kaiming"}
# Entries of adapter_config.json that this module reads; those that say nothing about the result; any other must be off.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights"}
SILENT = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "megatron_core"}
SILENT |= {"qalora_group_size", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "layers_pattern"}


def save_adapter(model: nn.Module, directory: str | Path, base_model_name_or_path: str | None = None) -> None:
    """Write the adapter of ``model`` into ``directory``, which is created; older files of an adapter in it are replaced.

    Args:
        base_model_name_or_path: what the adapter was trained on, for those who load it with ``AutoPeftModel``.

    Raises:
        ValueError: ``model`` holds no adapter, a merged one, one with NaN or infinity, or layers that differ in rank, alpha, scale or
            start. Nothing is written then.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model holds no LoRA layer: call inject_lora(model, ...) first")
    if "" in layers:
        raise ValueError("model is itself a LoRA layer, so its keys would have no name: save a model that holds it")
    first_name, first = next(iter(layers.items()))
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: its update is in the base's weight now. Call unmerge() on every layer before saving")
        if any(getattr(layer, key) != getattr(first, key) for key in SETTINGS):
            raise ValueError(f"{name} and {first_name} differ in {' or '.join(SETTINGS)}: one file holds one setting")
    factors = {key: tensor.detach() for name, layer in layers.items() for key, tensor in _keys(name, layer).items()}
    _check_finite(factors, "model")
    config = {
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if first.init == "kaiming" else first.init,
        "lora_alpha": first.lora_alpha,
        "lora_dropout": first.lora_dropout.p,
        "peft_type": "LORA",
        "r": first.r,
        "target_modules": _name_targets(model, layers),
        "task_type": None,
        "use_rslora": first.use_rslora,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    new = {directory / f".{name}.new": directory / name for name in (WEIGHTS, CONFIG)}
    try:  # write both beside the old ones, then rename: a crash leaves no half of a file
        weights_file, config_file = new
        write_tensors(weights_file, factors, metadata={"format": "pt"})
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        for temporary, final in new.items():
            os.replace(temporary, final)
    finally:
        for temporary in new:
            temporary.unlink(missing_ok=True)


def load_adapter(model: nn.Module, directory: str | Path) -> list[str]:
    """Read the adapter in ``directory`` into ``model``: into a plain model, which is injected, or into one that is injected alike.

    Returns:
        The names of the layers. Their factors are trainable and float32; everything else in a plain model is frozen.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file can't be read; the config asks for what this module does not do, by name; keys are missing or unexpected; shapes
            do not fit; a value is NaN or infinite; the model's layers are merged or of another rank or scale. ``model`` is unchanged then.
    """
    directory = Path(directory)
    settings = _read_config(directory)
    file = directory / WEIGHTS
    if not file.exists() and (directory / "adapter_model.bin").exists():
        raise ValueError(
            f"{directory} holds adapter_model.bin, a pickle: reading it can run any code. Save the adapter again as safetensors"
        )
    if not file.exists():
        raise FileNotFoundError(f"{directory} holds no {WEIGHTS}")
    tensors = read_tensors(file)
    present = dict(lora_layers(model))
    target_modules = settings.pop("target_modules")
    if present:
        _check_same_settings(present, settings)
        bases = {name: layer.base for name, layer in present.items()}
    else:
        bases = find_targets(model, target_modules)
    shapes = {}
    for name, base in bases.items():
        names, both = _key_names(name, base), wrapper_of(base).factor_shapes(base, settings["r"])
        shapes |= dict(zip(names, both, strict=True))
    tensors = _drop_copies_of_the_base(model, tensors, shapes)
    _check_keys(tensors, shapes, file)
    _check_finite(tensors, file)
    if not present:
        inject_lora(model, **settings, target_modules=target_modules)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            for key, factor in _keys(name, layer).items():
                factor.copy_(tensors[key])
    return list(bases)


def _key_names(name: str, base: nn.Module) -> tuple[str, str]:
    infix, suffix = ("embedding_", "") if wrapper_of(base) is LoRAEmbedding else ("", ".weight")
    return f"{PREFIX}{name}.lora_{infix}A{suffix}", f"{PREFIX}{name}.lora_{infix}B{suffix}"


def _keys(name: str, layer: LoRALayer) -> dict[str, nn.Parameter]:
    """Keys of the file -> the layer's factors."""
    return dict(zip(_key_names(name, layer.base), (layer.lora_A, layer.lora_B), strict=True))


def _name_targets(model: nn.Module, layers: dict[str, LoRALayer]) -> list[str] | str:
    """``target_modules`` that choose exactly ``layers``: their names; or a regular expression, where a name ends that of another layer."""
    inside = {part for layer in layers.values() for part in layer.modules() if part is not layer}
    others = [name for name, module in model.named_modules() if module not in inside and name not in layers]
    if any(name.endswith(tuple(f".{target}" for target in layers)) for name in others):
        return "|".join(re.escape(name) for name in sorted(layers))
    return sorted(layers)


def _read_config(directory: Path) -> dict:
    """The arguments of ``inject_lora``."""
    path = directory / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}: it is not the directory of an adapter")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path}: peft_type must be 'LORA', got {kind!r}")
    off = ("null", "false", '""', '"none"', "[]", "{}")  # as JSON, where 0 is not false: layers_to_transform may be 0
    asked = {key: value for key, value in config.items() if key not in READ | SILENT and json.dumps(value) not in off}
    if asked:
        raise ValueError(f"{path} asks for what is not supported here: {', '.join(f'{key}={value!r}' for key, value in asked.items())}")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, (bool, str)) or start not in INITS:
        raise ValueError(
            f"{path}: init_lora_weights={start!r} changed the base model in a way that can't be repeated from here; "
            "save it in peft with path_initial_model_for_weight_conversion, which makes it a plain adapter"
        )
    kinds = {"r": int, "lora_alpha": (int, float), "target_modules": (str, list)}
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
    }


def _check_same_settings(present: dict[str, LoRALayer], settings: dict) -> None:
    for name, layer in present.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: call unmerge() before loading into it")
        for key in ("r", "lora_alpha", "use_rslora"):
            if getattr(layer, key) != settings[key]:
                raise ValueError(f"{name} has {key}={getattr(layer, key)!r}, the file {settings[key]!r}: load into a plain model")
        if (layer.init == "pissa") != (settings["init"] == "pissa"):
            raise ValueError(f"{name} has init={layer.init!r}, the file {settings['init']!r}: they belong to different base weights")


def _drop_copies_of_the_base(model: nn.Module, tensors: dict[str, Tensor], shapes: dict) -> dict[str, Tensor]:
    """peft adds the table of an adapted embedding to the file. Where it is the model's own, it says nothing new."""

    def is_copy(key: str, tensor: Tensor) -> bool:
        path, _, name = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
        try:
            own = getattr(model.get_submodule(path), name).detach().cpu()
        except AttributeError:
            return False
        return own.shape == tensor.shape and torch.equal(own, tensor.to(own.dtype))

    return {key: tensor for key, tensor in tensors.items() if key in shapes or not is_copy(key, tensor)}


def _check_keys(tensors: dict[str, Tensor], shapes: dict[str, tuple], file: Path) -> None:
    problems = {
        "missing": sorted(set(shapes) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(shapes)),
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)}, not {shape}"
            for key, shape in shapes.items()
            if key in tensors and tensors[key].shape != shape
        ],
    }
    found = [f"{kind}: {', '.join(keys[:4])}{f' and {len(keys) - 4} more' * (len(keys) > 4)}" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{file} does not fit the model; {'; '.join(found)}")


def _check_finite(tensors: dict[str, Tensor], where: object) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {key} holds NaN, infinity or integers: the adapter is broken")
