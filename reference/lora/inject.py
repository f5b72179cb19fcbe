"""LoRA in a whole model: adapted layers take the places of plain ones, and give them back.

    names = inject_lora(model, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ...                  # train the parameters that require a gradient: only A and B do
    merge_lora(model)    # the plain model again, with W' for W

Any tree of modules will do: a layer is replaced wherever it is a child, so that a layer with two
names stays one. The layers are those of :mod:`reference.lora.layer`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from reference.lora.base import check
from reference.lora.layer import LoRALayer
from reference.lora.parameters import adapter_parameters, trained_parts
from reference.lora.replace import carry_hooks, replace_layers
from reference.lora.targets import find_targets, lora_layers, wrapper_of
from reference.lora.trained import MARK, find_rows, find_saved, with_rows
from reference.lora.weights import unstored


def inject_lora(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    target_modules: str | Iterable[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init: str = "kaiming",
    modules_to_save: Iterable[str] = (),
    trainable_token_indices: Iterable[int] | Mapping[str, Iterable[int]] = (),
) -> list[str]:
    """Wrap the chosen layers of ``model`` in place and freeze what no adapter trains.

    Args:
        model: any tree of modules; the layers to adapt lie inside it.
        target_modules: which layers, by peft's rules. A list: full names ("encoder.0.query") or
            ends of names after a dot ("query"). One string: a regular expression that must match
            the full name. "all-linear": every linear layer except the output head that a model
            names in ``get_output_embeddings()``, and those that can't be adapted, which
            ``find_targets(model, "all-linear").skipped`` names with reasons.
        r, lora_alpha, lora_dropout, use_rslora, init: see :class:`reference.lora.LoRALayer`.
        modules_to_save: modules that train whole, by names or ends of names after a dot, and with
            them those that are tied to them. "all-linear" leaves out the layers inside.
        trainable_token_indices: rows of the input embeddings that train, or name of a layer ->
            rows. A head that is tied to it trains the same rows.

    Returns:
        The names of the layers that got factors, in the order of ``model.named_modules()``. A layer
        with two names is wrapped once, for both, and returned under the first.

    Raises:
        ValueError: nothing matches; a match is wrapped already or can't be: it is never called, its
            forward is its own, its weight is computed or on the meta device; ``model`` itself is
            the layer to wrap; one weight is to train in two ways; an argument is out of range.
        TypeError: PiSSA on a packed weight, or an argument of the wrong type. In every case the
            model is left as it was.
    """
    saved, rows = find_saved(model, modules_to_save), find_rows(model, trainable_token_indices)
    targets = find_targets(model, target_modules)
    if target_modules == "all-linear":
        whole = {part for module in saved.values() for part in module.modules()}
        targets = {name: layer for name, layer in targets.items() if layer not in whole}
    settings = (r, lora_alpha, lora_dropout, use_rslora, init)
    return inject_layers(model, targets, wrapper_of, settings, saved, rows)


def inject_layers(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    kind_of: Callable[[nn.Module], type[LoRALayer]],
    settings: tuple,
    saved: Mapping[str, nn.Module] | None = None,
    rows: Mapping[nn.Module, list[int]] | None = None,
) -> list[str]:
    """Wrap each of ``targets`` in ``kind_of(layer)(layer, *settings)``, as :func:`inject_lora`.

    Args:
        saved, rows: what trains whole, from ``find_saved`` and ``find_rows``.
    """
    r, lora_alpha, lora_dropout, _, init = settings
    saved, rows = saved or {}, rows or {}
    _check_apart(targets, saved, rows)
    for name, layer in targets.items():
        try:
            check(kind_of(layer), layer, r, lora_alpha, lora_dropout, init)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    with _undone_on_error(model, targets.values()):
        adapted = {layer: kind_of(layer)(layer, *settings) for layer in targets.values()}
        adapted |= with_rows(rows)
    present = {id(parameter) for parameter in adapter_parameters(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in present)
    for module in saved.values():
        setattr(module, MARK, True)
        module.requires_grad_(True)
    replace_layers(model, adapted)
    return list(targets)


def _check_apart(targets: dict, saved: dict, rows: dict) -> None:
    """Raise if a weight would train in two ways."""
    whole = {p: name for name, module in saved.items() for p in module.parameters()}
    by_rows = {layer.weight for layer in rows}
    for name, layer in targets.items():
        weight = None if unstored(layer) else layer.weight
        if weight in whole or weight in by_rows:
            other = f"modules_to_save ({whole[weight]})" if weight in whole else "trained rows"
            raise ValueError(f"{name} is to be adapted, and its weight is in {other}: choose one")
    for weight in by_rows & set(whole):
        words = "train whole already: leave out trainable_token_indices"
        raise ValueError(f"the rows of {whole[weight]} {words}")


@contextmanager
def _undone_on_error(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """What no check foresees, a lack of memory or an SVD that does not converge, changes nothing.

    Wrapping freezes a layer, and PiSSA gives it a new weight: both are taken back.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = [(layer, layer.weight) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, weight in weights:
            layer.weight = weight
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise


def merge_lora(model: nn.Module) -> nn.Module:
    """Merge every adapted layer and put the plain layers back, in place.

    A weight shared with a layer that is not adapted (an output head tied to the embedding) is
    shared no longer: each keeps its own values, and a transformer's config says so. All parameters
    are frozen then; :func:`thaw` makes them trainable. No old weight is kept: beside the model, the
    sums of one layer at a time need memory.

    Returns:
        ``model``, which holds no trace of LoRA any more.

    Raises:
        ValueError: ``model`` holds no adapted layer, is one itself, or a merged weight would hold
            NaN or infinity.
        TypeError: a weight is packed and its layer has no ``merge_delta``. In every case the model
            is left as it was.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("model holds no LoRA layer: there is nothing to merge")
    if model in layers.values():
        words = "call its merge() and take its base"
        raise ValueError(f"model is itself a LoRA layer and can't be replaced in place: {words}")
    unmerged = {name: layer for name, layer in layers.items() if not layer.merged}
    for name, layer in unmerged.items():
        try:
            layer.check_merge()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    saved, rows = trained_parts(model)
    for name, layer in rows.items():
        if not torch.isfinite(layer.rows).all():
            raise ValueError(f"{name}: the trained rows hold NaN or infinity")
    for layer in unmerged.values():
        layer.merge(keep=False)
    for layer in rows.values():
        layer.merge()
    for module in saved.values():
        delattr(module, MARK)
        module.requires_grad_(False)
    wrapped = [*layers.values(), *rows.values()]
    for layer in wrapped:
        carry_hooks(layer, layer.base)
    replace_layers(model, {layer: layer.base for layer in wrapped})
    return model
