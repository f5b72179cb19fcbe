"""Which parameters of an adapted model are the adapter's, which train, and how many."""

from torch import Tensor, nn

from reference.lora.targets import lora_layers
from reference.lora.trained import MARK, TrainedRows


def trained_parts(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, TrainedRows]]:
    """First name -> module of those that train whole, and of those with trained rows."""
    parts = list(model.named_modules())
    whole = {name: part for name, part in parts if MARK in vars(part)}
    return whole, {name: part for name, part in parts if isinstance(part, TrainedRows)}


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
    """What the adapter trains, detached, not copied, by names in ``model.state_dict()``.

    Returns:
        "<layer>.lora_A" and "<layer>.lora_B" -> factor, "<embedding>.rows" -> its trained rows,
        "<module>.<parameter>" -> a parameter of a module that trains whole.
    """
    return {name: tensor.detach() for name, tensor in adapter_parameters(model).items()}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the adapter trains, by names in ``model.state_dict()``; see ``lora_state_dict``."""
    saved, rows = trained_parts(model)
    found = {}
    for name, layer in lora_layers(model):
        prefix = f"{name}." if name else ""
        found |= {f"{prefix}{key}": getattr(layer, key) for key in layer.factor_names}
    for name, layer in rows.items():
        found[f"{name}.rows"] = layer.rows
    for name, module in saved.items():
        found |= {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}
    return found


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """``(trainable, all)`` numbers of parameters.

    A shared one counts once; a packed weight counts the elements that it stores.
    """
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
