"""LoRA adapters in PEFT's own files, so that either side reads what the other wrote.

A directory with two files:

    adapter_config.json         r, lora_alpha, target_modules, ...: how to build the layers
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight   (r, in)
                                base_model.model.<layer>.lora_B.weight   (out, r)
                                base_model.model.<layer>.lora_embedding_A   (r, tokens)
                                base_model.model.<layer>.lora_embedding_B   (dim, r)

The base model is not in them; that is why an adapter weighs megabytes. A PiSSA adapter belongs to
what PiSSA leaves of the base, so its config says "pissa", and whoever loads it on the original base
(peft or :func:`load_adapter`) takes the same singular triples out again.

The safetensors format holds tensors and nothing else. A pickle, which older adapters are, is a
program: reading one runs it, so none is read here.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference.adapter_format.config import CONFIG, check_settings, config_of, read_config
from reference.lora import LoRAEmbedding, find_targets, inject_lora, lora_layers, wrapper_of

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(
    model: nn.Module, directory: str | Path, base_model_name_or_path: str | None = None
) -> None:
    """Write the adapter of ``model`` into ``directory``, which is created.

    Older files of an adapter in it are replaced; a crash leaves no half of a file.

    Args:
        base_model_name_or_path: what the adapter was trained on, for those who load it with
            ``AutoPeftModel``.

    Raises:
        ValueError: ``model`` holds no adapter, a merged one, one with NaN or infinity, or layers
            that differ in rank, alpha, scale or start. Nothing is written then.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model holds no LoRA layer: call inject_lora(model, ...) first")
    if "" in layers:
        words = "so its keys would have no name: save a model that holds it"
        raise ValueError(f"model is itself a LoRA layer, {words}")
    for name, layer in layers.items():
        if layer.merged:
            words = "its update is in the base's weight now. Call unmerge() on every layer first"
            raise ValueError(f"{name} is merged: {words}")
    config = config_of(model, layers, base_model_name_or_path)
    factors = {}
    for name, layer in layers.items():
        both = (layer.lora_A, layer.lora_B)
        for key, factor in zip(_keys(name, layer.base), both, strict=True):
            factors[key] = factor.detach().clone(memory_format=torch.contiguous_format)  # no view
    _check_finite(factors, "model")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    new = {directory / f".{name}.new": directory / name for name in (WEIGHTS, CONFIG)}
    try:  # both beside the old ones, then renamed: a rename happens wholly or not at all
        weights_file, config_file = new
        save_file(factors, weights_file, metadata={"format": "pt"})
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        for temporary, final in new.items():
            os.replace(temporary, final)
    finally:
        for temporary in new:
            temporary.unlink(missing_ok=True)


def load_adapter(model: nn.Module, directory: str | Path) -> list[str]:
    """Read the adapter in ``directory`` into ``model``.

    Args:
        model: a plain model, which is injected, or one that is injected alike.

    Returns:
        The names of the layers. Their factors are trainable and float32; everything else in a
        plain model is frozen.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file can't be read; the config asks for what this module does not do, by
            name; keys are missing or unexpected; shapes do not fit; a value is NaN or infinite;
            the model's layers are merged or of another rank or scale. ``model`` is unchanged then.
    """
    directory = Path(directory)
    settings, tensors = read_config(directory), _read_weights(directory)
    present, target_modules = dict(lora_layers(model)), settings.pop("target_modules")
    if present:
        check_settings(present, settings)
        bases = {name: layer.base for name, layer in present.items()}
    else:
        bases = find_targets(model, target_modules)
    shapes = {}
    for name, base in bases.items():
        both = wrapper_of(base).factor_shapes(base, settings["r"])
        shapes |= dict(zip(_keys(name, base), both, strict=True))
    tensors = _drop_copies_of_the_base(model, tensors, shapes)
    _check_keys(tensors, shapes, directory / WEIGHTS)
    _check_finite(tensors, directory / WEIGHTS)
    if not present:
        inject_lora(model, **settings, target_modules=target_modules)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            key_A, key_B = _keys(name, layer.base)
            layer.lora_A.copy_(tensors[key_A])
            layer.lora_B.copy_(tensors[key_B])
    return list(bases)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    file = directory / WEIGHTS
    if not file.is_file():
        if (directory / "adapter_model.bin").exists():
            words = "reading it can run any code. Save the adapter again as safetensors"
            raise ValueError(f"{directory} holds adapter_model.bin, a pickle: {words}")
        raise FileNotFoundError(f"{directory} holds no {WEIGHTS}")
    try:
        return load_file(file)
    except SafetensorError as error:
        words = "is cut off, or not a safetensors file: copy it again, or save the adapter again"
        raise ValueError(f"{file} {words} ({error})") from None


def _keys(name: str, base: nn.Module) -> tuple[str, str]:
    """The names of A and B in the file, for the layer ``name``."""
    infix, suffix = ("embedding_", "") if wrapper_of(base) is LoRAEmbedding else ("", ".weight")
    return f"{PREFIX}{name}.lora_{infix}A{suffix}", f"{PREFIX}{name}.lora_{infix}B{suffix}"


def _drop_copies_of_the_base(model: nn.Module, tensors: dict, shapes: dict) -> dict[str, Tensor]:
    """peft adds the table of an adapted embedding. Where it is the model's own, it says nothing."""

    def is_copy(key: str, tensor: Tensor) -> bool:
        path, _, name = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
        try:
            own = getattr(model.get_submodule(path), name).detach().cpu()
        except AttributeError:
            return False
        return own.shape == tensor.shape and torch.equal(own, tensor.to(own.dtype))

    return {
        key: value for key, value in tensors.items() if key in shapes or not is_copy(key, value)
    }


def _check_keys(tensors: dict[str, Tensor], shapes: dict[str, tuple], file: Path) -> None:
    found = {key: tuple(tensors[key].shape) for key in shapes if key in tensors}
    wrong = {key: shape for key, shape in found.items() if shape != shapes[key]}
    problems = {
        "missing": sorted(set(shapes) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(shapes)),
        "of another shape": [f"{key} {shape}, not {shapes[key]}" for key, shape in wrong.items()],
    }
    words = []
    for kind, keys in problems.items():
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        words += [f"{kind}: {', '.join(keys[:4])}{more}"] if keys else []
    if words:
        raise ValueError(f"{file} does not fit the model; {'; '.join(words)}")


def _check_finite(tensors: dict[str, Tensor], where: object) -> None:
    for key, tensor in tensors.items():  # in float32, as 8-bit floats have no isfinite
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise ValueError(
                f"{where}: {key} holds NaN, infinity or integers: the adapter is broken"
            )
