"""LoRA in PEFT's files where it is more than one r and one α: DoRA, ranks and alphas by layer.

    use_dora        base_model.model.<layer>.lora_magnitude_vector   (out,), beside A and B
    rank_pattern    pattern -> r of the layers whose name it matches; the others have the config's r
    alpha_pattern   the same for α

A pattern is a regular expression for a name or for its end after a dot; the first that fits counts.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from reference.adapter_format import whole
from reference.adapter_format.config import CONFIG, settings_of, targets_of
from reference.adapter_format.files import WEIGHTS, check_finite, read_weights
from reference.adapter_format.keys import (
    PREFIX,
    check_keys,
    drop_copies_of_the_base,
    keys_of,
)
from reference.lora import LoRALayer, LoRATransposed, find_targets, lora_layers, wrapper_of
from reference.lora.base import check
from reference.lora.dora import KINDS, DoRALayer, check_target
from reference.lora.inject import inject_layers
from reference.lora.targets import plain_name
from reference.lora.trained import find_rows
from reference.lora.weights import check_values

OWN = ("use_dora", "rank_pattern", "alpha_pattern")


def is_variant(config: dict) -> bool:
    return any(config.get(entry) for entry in OWN)


def differs(layers: dict[str, LoRALayer]) -> bool:
    """Whether these need more than :mod:`reference.adapter_format.files` writes."""
    kinds = {(layer.r, layer.lora_alpha, isinstance(layer, DoRALayer)) for layer in layers.values()}
    return len(kinds) > 1 or any(dora for _, _, dora in kinds)


def contents(model: nn.Module, layers: dict[str, LoRALayer]) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config of ``layers``, which are all that are adapted in ``model``.

    Raises:
        ValueError: some are DoRA and some not, they differ in the kind of scale, start or dropout,
            one is merged, ``model`` is itself one, or a parameter trains that is not the adapter's.
    """
    if "" in layers:
        raise ValueError("model is itself a LoRA layer, so its keys would have no name")
    first, tensors = next(iter(layers.values())), {}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged: call unmerge() on every layer first")
        if _shared(layer) != _shared(first):
            words = "differ in DoRA, rsLoRA, start or dropout: one file holds one setting"
            raise ValueError(f"{name} and {next(iter(layers))} {words}")
        for key, factor in _parameters(name, layer).items():
            check_values(key, factor)
            tensors[key] = factor
    whole.check_all_saved(model)
    beside = whole.of_model(model)
    tensors |= beside.states() | whole.rows_of(model)
    common = {
        entry: Counter(getattr(layer, entry) for layer in layers.values()).most_common(1)[0][0]
        for entry in ("r", "lora_alpha")
    }
    patterns = {
        entry: {
            f"^{re.escape(name)}": getattr(layer, own)
            for name, layer in layers.items()
            if getattr(layer, own) != common[own]
        }
        for entry, own in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    }
    dora, rslora, init, dropout = _shared(first)
    config = common | patterns | whole.to_config(beside)
    config |= {"peft_type": "LORA", "bias": "none", "inference_mode": True, "task_type": None}
    config |= {"use_dora": dora, "use_rslora": rslora, "lora_dropout": dropout}
    config["init_lora_weights"] = True if init == "kaiming" else init
    config["target_modules"] = targets_of(model, layers)
    config["fan_in_fan_out"] = any(isinstance(part, LoRATransposed) for part in layers.values())
    return tensors, config


def _shared(layer: LoRALayer) -> tuple:
    return isinstance(layer, DoRALayer), layer.use_rslora, layer.init, layer.lora_dropout.p


def _parameters(name: str, layer: LoRALayer) -> dict[str, nn.Parameter]:
    """Key in a file -> parameter."""
    key_A, key_B = keys_of(name, layer.base)
    found = {key_A: layer.lora_A, key_B: layer.lora_B}
    if isinstance(layer, DoRALayer):
        key = f"{PREFIX}{plain_name(name)}.lora_magnitude_vector"
        found[key] = layer.lora_magnitude_vector
    return found


def load_variant(model: nn.Module, directory: Path, config: dict) -> list[str]:
    """Read such a file into a plain ``model``.

    Raises:
        ValueError: the config asks for what is not done here; the model is adapted already; keys
            or shapes do not fit; a value is not finite. The model is unchanged then.
    """
    path, dora = directory / CONFIG, bool(config.get("use_dora"))
    given = settings_of({key: value for key, value in config.items() if key not in OWN}, path)
    if any(True for _ in lora_layers(model)):
        raise ValueError("model holds LoRA layers already: load such a file into a plain model")
    targets = find_targets(model, given["target_modules"])
    beside = whole.of_config(model, given["whole"])
    plan, shapes = {}, beside.shapes(model)
    for name, base in targets.items():
        if dora:
            check_target(name, base)
        kind = KINDS[wrapper_of(base)] if dora else wrapper_of(base)
        r = _by_pattern(config.get("rank_pattern"), plain_name(name), given["r"], path)
        alpha = _by_pattern(
            config.get("alpha_pattern"), plain_name(name), given["lora_alpha"], path
        )
        settings = (r, alpha, given["lora_dropout"], given["use_rslora"], given["init"])
        check(kind, base, r, alpha, given["lora_dropout"], given["init"])
        check_values(f"{name}.weight", base.weight)
        plan.setdefault(settings, {})[name] = base
        shape_A, shape_B = kind.factor_shapes(base, r)
        shapes |= dict(zip(keys_of(name, base), (shape_A, shape_B), strict=True))
        if dora:
            shapes[f"{PREFIX}{plain_name(name)}.lora_magnitude_vector"] = (shape_B[0],)
    tensors = drop_copies_of_the_base(model, read_weights(directory), shapes)
    check_keys(tensors, shapes, directory / WEIGHTS)
    check_finite(tensors, directory / WEIGHTS)
    kind_of = (lambda layer: KINDS[wrapper_of(layer)]) if dora else wrapper_of
    if not beside.untied:
        beside.check_ties(tensors)
    with whole.untied(beside, model):
        rest = beside.modules, find_rows(model, beside.rows)
        for settings, group in plan.items():
            inject_layers(model, group, kind_of, settings, *rest)
            rest = ()
    with torch.no_grad():
        for name, layer in lora_layers(model):
            for key, parameter in _parameters(name, layer).items():
                parameter.copy_(tensors[key])
        for key, tensor in (beside.states() | whole.rows_of(model)).items():
            tensor.copy_(tensors[key])
    return list(targets)


def _by_pattern(patterns: dict | None, name: str, default: float, path: Path) -> float:
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise ValueError(f"{path}: {pattern!r} is not a regular expression: {error}") from None
    return default
