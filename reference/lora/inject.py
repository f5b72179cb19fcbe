"""LoRA in a whole model: adapted layers take the places of plain ones, and give them back.

    names = inject_lora(model, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ...                  # train the parameters that require a gradient: only A and B do
    merge_lora(model)    # the plain model again, with W' for W

Any tree of modules will do: a layer is replaced wherever it is a child, so that a layer with two
names stays one. The layers are those of :mod:`reference.lora.layer`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from reference.lora.base import check
from reference.lora.layer import LoRALayer
from reference.lora.replace import carry_hooks, replace_layers
from reference.lora.targets import find_targets, lora_layers, wrapper_of


def inject_lora(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    target_modules: str | Iterable[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init: str = "kaiming",
) -> list[str]:
    """Wrap the chosen layers of ``model`` in place and freeze all else but factors that it has.

    Args:
        model: any tree of modules; the layers to adapt lie inside it.
        target_modules: which layers, by peft's rules. A list: full names ("encoder.0.query") or
            ends of names after a dot ("query"). One string: a regular expression that must match
            the full name. "all-linear": every linear layer except the output head that a model
            names in ``get_output_embeddings()``, and those that can't be adapted, which
            ``find_targets(model, "all-linear").skipped`` names with reasons.
        r, lora_alpha, lora_dropout, use_rslora, init: see :class:`reference.lora.LoRALayer`.

    Returns:
        The names of the wrapped layers, in the order of ``model.named_modules()``. A layer with
        two names is wrapped once, for both, and returned under the first.

    Raises:
        ValueError: nothing matches; a match is wrapped already or can't be: it is never called, its
            forward is its own, its weight is computed or on the meta device; ``model`` itself is
            the layer to wrap; an argument is out of range.
        TypeError: PiSSA on a packed weight, or an argument of the wrong type. In every case the
            model is left as it was.
    """
    settings = (r, lora_alpha, lora_dropout, use_rslora, init)
    return inject_layers(model, find_targets(model, target_modules), wrapper_of, settings)


def inject_layers(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    kind_of: Callable[[nn.Module], type[LoRALayer]],
    settings: tuple,
) -> list[str]:
    """Wrap each of ``targets`` in ``kind_of(layer)(layer, *settings)``, as :func:`inject_lora`."""
    r, lora_alpha, lora_dropout, _, init = settings
    for name, layer in targets.items():
        try:
            check(kind_of(layer), layer, r, lora_alpha, lora_dropout, init)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    with _undone_on_error(model, targets.values()):
        adapted = {layer: kind_of(layer)(layer, *settings) for layer in targets.values()}
    present = [layer for _, layer in lora_layers(model)]
    factors = {id(getattr(layer, name)) for layer in present for name in layer.factor_names}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in factors)
    replace_layers(model, adapted)
    return list(targets)


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
    stay frozen; :func:`thaw` makes them trainable. No old weight is kept: beside the model, the
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
    for layer in unmerged.values():
        layer.merge(keep=False)
    for layer in layers.values():
        carry_hooks(layer, layer.base)
    replace_layers(model, {layer: layer.base for layer in layers.values()})
    return model


def thaw(model: nn.Module) -> list[str]:
    """Let every parameter of ``model`` be trained, after merging or injecting.

    Returns:
        The names of those that can't be: weights that are packed, which hold no real numbers.
    """
    packed = []
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
        else:
            packed.append(name)
    return packed


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The factors alone, detached, not copied, by their names in ``model.state_dict()``.

    Returns:
        "<layer>.lora_A" and "<layer>.lora_B" -> factor.
    """
    factors = {}
    for name, layer in lora_layers(model):
        prefix = f"{name}." if name else ""
        factors |= {f"{prefix}{key}": getattr(layer, key).detach() for key in layer.factor_names}
    return factors


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, all)`` numbers of parameters.

    A shared one counts once; a packed weight counts the elements that it stores.
    """
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
