"""LoRA adapters in PEFT's own files, so that either side reads what the other wrote.

A directory with two files:

    adapter_config.json         r, lora_alpha, target_modules, ...: how to build the layers
    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight   (r, in)
                                base_model.model.<layer>.lora_B.weight   (out, r)
                                base_model.model.<layer>.lora_embedding_A   (r, tokens)
                                base_model.model.<layer>.lora_embedding_B   (dim, r)
                                and what trained whole: reference.adapter_format.whole

The base model is not in them; that is why an adapter weighs megabytes. A PiSSA adapter belongs to
what PiSSA leaves of the base, so its config says "pissa", and whoever loads it on the original base
(peft or :func:`load_adapter`) takes the same singular triples out again.

The safetensors format holds tensors and nothing else. A pickle, which older adapters are, is a
program: reading one runs it, so none is read here.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reference.adapter_format import whole
from reference.adapter_format.config import CONFIG, check_settings, config_of, read_config, write
from reference.adapter_format.keys import check_keys, drop_copies_of_the_base, inner, keys_of
from reference.lora import (
    LoRALayer,
    LoRATransposed,
    find_targets,
    inject_lora,
    lora_layers,
    wrapper_of,
)
from reference.lora.targets import plain_name
from reference.lora.weights import check_values

WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    model: nn.Module, directory: str | Path, base_model_name_or_path: str | Path | None = None
) -> None:
    """Write the adapter of ``model`` into ``directory``, which is created.

    Older files of an adapter in it are replaced; a crash leaves no half of a file. The names are
    those of the plain model, also where it is compiled or wrapped for training in parallel.

    Args:
        base_model_name_or_path: what the adapter was trained on, for those who load it with
            ``AutoPeftModel``.

    Raises:
        ValueError: ``model`` holds no adapter, a merged one, one with NaN or infinity or on the
            meta device, or layers that differ in rank, alpha, scale or start; a parameter trains
            that would not be in the file. Nothing is written then.
    """
    model = inner(model)
    layers = {plain_name(name): layer for name, layer in lora_layers(model)}
    if not layers:
        raise ValueError("model holds no LoRA layer: call inject_lora(model, ...) first")
    if "" in layers:
        words = "so its keys would have no name: save a model that holds it"
        raise ValueError(f"model is itself a LoRA layer, {words}")
    for name, layer in layers.items():
        if layer.merged:
            words = "its update is in the base's weight now. Call unmerge() on every layer first"
            raise ValueError(f"{name} is merged: {words}")
    whole.check_all_saved(model)
    beside = whole.of_model(model)
    settings = config_of(model, layers, base_model_name_or_path)
    config = write(settings | whole.to_config(beside))
    _check_values(layers)
    factors = {}
    for name, layer in layers.items():
        both = (layer.lora_A, layer.lora_B)
        for key, factor in zip(keys_of(name, layer.base), both, strict=True):
            factors[key] = factor
    write_files(directory, factors | beside.states() | whole.rows_of(model), config)


def write_files(directory: str | Path, tensors: dict[str, Tensor], config: str) -> None:
    """Both files into ``directory``, which is created, or neither.

    Raises:
        ValueError: a tensor holds NaN or infinity. Nothing is written then.
    """
    check_finite(tensors, "model")
    for key, tensor in tensors.items():  # a file holds no views, and each of tied tensors
        tensors[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    new = {directory / f".{name}.new": directory / name for name in (WEIGHTS, CONFIG)}
    try:  # both beside the old ones, then renamed: a rename happens wholly or not at all
        weights_file, config_file = new
        save_file(tensors, weights_file, metadata={"format": "pt"})
        config_file.write_text(config)
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
        The names of the layers with factors. These are trainable and float32, as are rows, and so
        is what trained whole; everything else in a plain model is frozen.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file can't be read; the config asks for what this module does not do, by
            name; keys are missing or unexpected; shapes do not fit; a value is NaN or infinite;
            the model's layers are merged, on the meta device, or of another rank or scale.
            ``model`` is unchanged then.
    """
    directory, model = Path(directory), inner(model)
    settings, tensors = read_config(directory), read_weights(directory)
    present, target_modules = dict(lora_layers(model)), settings.pop("target_modules")
    turned, wanted = settings.pop("fan_in_fan_out"), settings.pop("whole")
    beside = whole.of_model(model) if present else whole.of_config(model, wanted)
    if present:
        check_settings(present, settings)
        beside.check_rows(wanted["trainable_token_indices"])
        _check_values(present)
        bases = {name: layer.base for name, layer in present.items()}
    else:
        bases = find_targets(model, target_modules)
        for name, base in bases.items():
            check_values(f"{name}.weight", base.weight)
    if turned and not any(wrapper_of(base) is LoRATransposed for base in bases.values()):
        words = "but none of the layers that it names keeps its weight as (in, out)"
        raise ValueError(f"{directory} asks for fan_in_fan_out=True, {words}")
    shapes = {}
    for name, base in bases.items():
        both = wrapper_of(base).factor_shapes(base, settings["r"])
        shapes |= dict(zip(keys_of(name, base), both, strict=True))
    shapes |= beside.shapes(model)
    tensors = drop_copies_of_the_base(model, tensors, shapes)
    check_keys(tensors, shapes, directory / WEIGHTS)
    check_finite(tensors, directory / WEIGHTS)
    if present or not beside.untied:
        beside.check_ties(tensors)
    if not present:
        with whole.untied(beside, model):
            more = {"modules_to_save": beside.modules, "trainable_token_indices": beside.rows}
            inject_lora(model, **settings, target_modules=target_modules, **more)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            key_A, key_B = keys_of(name, layer.base)
            layer.lora_A.copy_(tensors[key_A])
            layer.lora_B.copy_(tensors[key_B])
        for key, tensor in (beside.states() | whole.rows_of(model)).items():
            tensor.copy_(tensors[key])
    return list(bases)


def read_weights(directory: Path) -> dict[str, Tensor]:
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


def _check_values(layers: dict[str, LoRALayer]) -> None:
    for name, layer in layers.items():
        for factor in ("lora_A", "lora_B"):
            check_values(f"{name}.{factor}", getattr(layer, factor))


def check_finite(tensors: dict[str, Tensor], where: object) -> None:
    for key, tensor in tensors.items():  # in float32, as 8-bit floats have no isfinite
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise ValueError(
                f"{where}: {key} holds NaN, infinity or integers: the adapter is broken"
            )
