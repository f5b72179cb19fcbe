"""BitFit and LN tuning: no new numbers at all, a few of the model's own are trained.

A model gets exactly as many as it has. BERT has a bias in every layer; Llama has none, and BitFit
has nothing to train there. Nothing is added at inference, and there is nothing to merge.

Ben Zaken et al. 2021 (2106.10199); Zhao et al. 2023 (2312.11420).
"""

from torch import nn


def train_biases(model: nn.Module) -> list[str]:
    """BitFit: every parameter called ``bias`` trains, all else is frozen. Returns their names.

    Raises:
        ValueError: the model has no bias. It is as it was then.
    """
    return _train_only(
        model, lambda name, part: name == "bias", "bias: nothing to train for BitFit"
    )


def train_norms(model: nn.Module) -> list[str]:
    """LN tuning: all of every norm trains, all else is frozen. Returns the parameters' names.

    A norm is a module whose class is called something with "Norm".

    Raises:
        ValueError: the model has no norm with parameters. It is as it was then.
    """
    return _train_only(model, lambda name, part: "Norm" in type(part).__name__, "norm to train")


def _train_only(model: nn.Module, chosen, what: str) -> list[str]:
    found = {
        f"{path}.{name}".lstrip("."): parameter
        for path, part in model.named_modules()
        for name, parameter in part.named_parameters(recurse=False)
        if chosen(name, part)
    }
    if not found:
        raise ValueError(f"model has no {what}")
    model.requires_grad_(False)
    for parameter in found.values():
        parameter.requires_grad_(True)
    return list(found)
