"""IA³, VeRA, LoHa, LoKr and OFT in PEFT's files: types that, like LoRA, sit at linear layers.

Their parameters have PEFT's names and shapes (``OFT`` aside, whose file says ``oft_R.weight``), so
what a type needs here is what its config says, and how it is injected again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reference.adapter_format.config import CONFIG, refuse_others, targets_of
from reference.adapter_format.files import WEIGHTS, check_finite, read_weights
from reference.adapter_format.keys import PREFIX, check_keys
from reference.ia3 import IA3Layer, inject_ia3
from reference.lora.replace import replace_layers
from reference.lora.targets import plain_name
from reference.lora.weights import is_transposed
from reference.relatives.inject import (
    inject_loha,
    inject_lokr,
    inject_oft,
    inject_vera,
    projections,
)
from reference.relatives.updates import OFT, LoHa, LoKr, VeRA
from reference.wrapped import Adapter, adapters

SHARED = ("base_model.vera_A", "base_model.vera_B")  # which PEFT may save, and a seed gives


@dataclass(frozen=True)
class Type:
    """One of PEFT's types.

    Attributes:
        layer: the class of its layers here.
        settings: what all layers of a file share: entry of the config -> attribute of a layer.
        fixed: entries with the only value that is done here.
        inject: ``inject(model, config)``.
    """

    layer: type[Adapter]
    settings: dict[str, str]
    fixed: dict[str, object]
    inject: Callable[[nn.Module, dict], list[str]]


RANKED = {"r": "r", "alpha": "alpha"}
TYPES = {
    "IA3": Type(
        IA3Layer,
        {},
        {"init_ia3_weights": True},
        lambda m, c: inject_ia3(m, c["target_modules"], c.get("feedforward_modules") or ()),
    ),
    "VERA": Type(
        VeRA,
        {"projection_prng_key": "key"},
        {"init_weights": True, "vera_dropout": 0.0},
        lambda m, c: inject_vera(m, c["r"], c["target_modules"], c["projection_prng_key"]),
    ),
    "LOHA": Type(
        LoHa,
        RANKED,
        {"init_weights": True, "rank_dropout": 0.0, "module_dropout": 0.0},
        lambda m, c: inject_loha(m, c["r"], c["alpha"], c["target_modules"]),
    ),
    "LOKR": Type(
        LoKr,
        RANKED,
        {"init_weights": True, "rank_dropout": 0.0, "module_dropout": 0.0, "decompose_factor": -1},
        lambda m, c: inject_lokr(m, c["r"], c["alpha"], c["target_modules"]),
    ),
    "OFT": Type(
        OFT,
        {"oft_block_size": "block_size"},
        {"init_weights": True, "module_dropout": 0.0, "num_cayley_neumann_terms": 5, "r": 0},
        lambda m, c: inject_oft(
            m, c["oft_block_size"], c["target_modules"], not c.get("use_cayley_neumann", True)
        ),
    ),
}
KNOWN = {"peft_type", "target_modules", "fan_in_fan_out"}
OWN = {"IA3": {"feedforward_modules"}, "VERA": {"r", "d_initial", "save_projection"}}
OWN |= {"OFT": {"use_cayley_neumann", "eps"}}


def layers_of(model: nn.Module) -> dict[str, Adapter]:
    """Plain name -> layer, of those that a type here knows."""
    known = tuple(kind.layer for kind in TYPES.values())
    return {plain_name(name): part for name, part in adapters(model) if isinstance(part, known)}


def contents(model: nn.Module, layers: dict[str, Adapter]) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config of ``layers``, which are all that are adapted in ``model``.

    Raises:
        ValueError: they are of two types, or differ in a setting; ``model`` is itself one.
    """
    first = next(iter(layers.values()))
    if "" in layers:
        raise ValueError("model is itself an adapter, so its keys would have no name")
    (name_of_type,) = (name for name, kind in TYPES.items() if kind.layer is type(first))
    kind, config = TYPES[name_of_type], {"peft_type": name_of_type, "inference_mode": True}
    for name, layer in layers.items():
        for attribute in (*kind.settings.values(), "exact"):
            mine, other = (getattr(each, attribute, None) for each in (layer, first))
            if type(layer) is not type(first) or mine != other:
                words = f"differ in type or {attribute}: one file holds one setting"
                raise ValueError(f"{name} and {next(iter(layers))} {words}")
    config |= {entry: getattr(first, attribute) for entry, attribute in kind.settings.items()}
    config |= kind.fixed | {"target_modules": targets_of(model, layers)}
    if name_of_type not in ("LOHA", "LOKR"):  # which have no such entry
        config["fan_in_fan_out"] = any(is_transposed(layer.base) for layer in layers.values())
    if name_of_type == "IA3":
        chosen = {name: layer for name, layer in layers.items() if layer.feedforward}
        config["feedforward_modules"] = targets_of(model, chosen) if chosen else []
    elif name_of_type == "VERA":
        config |= {"r": len(first.vera_lambda_d), "save_projection": False}
    elif name_of_type == "OFT":
        # the series is that of peft since this version, which asks for it
        config |= {"use_cayley_neumann": not first.exact, "peft_version": "0.18.0"}
    keys = {key: parameter.detach().clone() for key, parameter in parameters(layers).items()}
    return keys, config


def parameters(layers: dict[str, Adapter]) -> dict[str, nn.Parameter]:
    """Key in a file -> parameter."""
    found = {}
    for name, layer in layers.items():
        for own in layer.trained:
            suffix = ".weight" if own == "oft_R" else ""
            found[f"{PREFIX}{name}.{own}{suffix}"] = getattr(layer, own)
    return found


def load_layers(model: nn.Module, directory: Path, config: dict) -> list[str]:
    """Read a file of one of ``TYPES`` into a plain ``model``, or one that is adapted alike."""
    kind, path = TYPES[config["peft_type"]], directory / CONFIG
    known = KNOWN | set(kind.settings) | set(kind.fixed) | OWN.get(config["peft_type"], set())
    refuse_others(config, known, path)
    for entry, value in kind.fixed.items():
        if config.get(entry, value) != value:
            words = f"only {value!r} is done here"
            raise ValueError(f"{path} asks for {entry}={config[entry]!r}: {words}")
    if missing := [entry for entry in ("target_modules", *kind.settings) if entry not in config]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    tensors = read_weights(directory)
    check_finite(tensors, directory / WEIGHTS)
    present = layers_of(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    names = list(present) or kind.inject(model, config)
    layers = {plain_name(name): model.get_submodule(name) for name in names}
    try:
        for name, layer in layers.items():
            if type(layer) is not kind.layer:
                raise ValueError(f"{name} is a {type(layer).__name__}: load into a plain model")
        shared = {key: tensors.pop(key) for key in SHARED if key in tensors}
        _check_shared(shared, config, path)
        shapes = {key: tuple(p.shape) for key, p in parameters(layers).items()}
        check_keys(tensors, shapes, directory / WEIGHTS)
    except ValueError:
        if not present:
            replace_layers(model, {layer: layer.base for layer in layers.values()})
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        raise
    with torch.no_grad():
        for key, parameter in parameters(layers).items():
            parameter.copy_(tensors[key])
    return names


def _check_shared(shared: dict[str, Tensor], config: dict, path: Path) -> None:
    """VeRA's random matrices, where a file holds them, must be those that its seed gives."""
    if len(shared) == 2:
        A, B = (shared[key] for key in SHARED)
        again = projections(len(A), A.shape[1], len(B), config["projection_prng_key"])
        if not all(map(torch.equal, (A, B), again)):
            words = "are not those of its projection_prng_key, and none other are used here"
            raise ValueError(f"{path}: the file's vera_A and vera_B {words}")
