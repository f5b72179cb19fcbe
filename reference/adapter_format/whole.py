"""What an adapter file holds beside factors: modules that trained whole, and rows of an embedding.

    base_model.model.<module>.<parameter>                                all of its values
    base_model.model.<embedding>.token_adapter.trainable_tokens_delta    (rows, width)

The second name says delta; the file holds the rows themselves. Rows that tied layers share stand
there once, a weight that they share under the names of both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.adapter_format.keys import PREFIX
from reference.lora import adapter_parameters, trained_parts
from reference.lora.targets import plain_name
from reference.lora.trained import find_rows, find_saved

ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass
class Whole:
    """What trains whole in one model.

    Attributes:
        modules: name -> module, all of whose values are in the file.
        rows: name -> tokens; of tied layers the first.
        untied: the modules have weights of their own, also where the model ties them.
    """

    modules: dict[str, nn.Module]
    rows: dict[str, list[int]]
    untied: bool

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Key in the file -> shape."""
        found = {}
        for name, tokens in self.rows.items():
            width = model.get_submodule(name).weight.shape[1]
            found[f"{PREFIX}{plain_name(name)}{ROWS}"] = (len(tokens), width)
        for key, tensor in self.states().items():
            found[key] = tuple(tensor.shape)
        return found

    def states(self) -> dict[str, Tensor]:
        """Key in the file -> the model's own tensor, of the modules."""
        return {
            f"{PREFIX}{plain_name(name)}.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in module.state_dict().items()
        }

    def check_rows(self, wanted: list[int] | dict | None) -> None:
        """Raise unless the tokens are those of the config's ``trainable_token_indices``.

        Raises:
            ValueError: they are others.
        """
        wanted = list(wanted.values()) if isinstance(wanted, dict) else [wanted] if wanted else []
        if sorted(wanted) != sorted(self.rows.values()):
            mine = list(self.rows.values())
            words = f"the file is for {wanted}: load into a plain model"
            raise ValueError(f"model has trained rows for the tokens {mine}, {words}")

    def check_ties(self, tensors: dict[str, Tensor]) -> None:
        """Raise if ``tensors`` gives different values to one parameter of the model.

        Raises:
            ValueError: it does.
        """
        first = {}
        for key, own in self.states().items():
            other = first.setdefault(own.data_ptr(), key)
            if not torch.equal(tensors[key], tensors[other]):
                words = "which are one weight in this model: load into a plain model"
                raise ValueError(f"the file holds two values for {other} and {key}, {words}")


def of_model(model: nn.Module) -> Whole:
    """What trains whole in an adapted ``model``."""
    modules, layers = trained_parts(model)
    first = {id(layer.rows): name for name, layer in reversed(list(layers.items()))}
    rows = {first[id(layer.rows)]: layer.index.tolist() for layer in layers.values()}
    tied = any(_shared(model, module) for module in modules.values())
    return Whole(modules, rows, untied=not tied)


def of_config(model: nn.Module, config: dict) -> Whole:
    """What the config of a file wants to train whole in a plain ``model``.

    Raises:
        TypeError, ValueError: see ``find_saved`` and ``find_rows``.
    """
    ends = tuple(config["modules_to_save"] or ())  # of names, without a dot: PEFT's rule
    names = [n for n, _ in model.named_modules() if ends and n.endswith(ends)]
    chosen = find_saved(model, names)  # with what is tied to them
    untied = not config["ensure_weight_tying"]
    layers, rows, weights = find_rows(model, config["trainable_token_indices"] or ()), {}, set()
    for name, module in model.named_modules():
        if module in layers and module.weight not in weights:
            rows[name] = layers[module]
            weights.add(module.weight)
    modules = {n: m for n, m in chosen.items() if n in names} if untied else chosen
    return Whole(modules, rows, untied)


def to_config(whole: Whole) -> dict:
    """The entries about it in ``adapter_config.json``."""
    rows = {plain_name(name): tokens for name, tokens in whole.rows.items()}
    return {
        "ensure_weight_tying": bool(whole.modules) and not whole.untied,
        "modules_to_save": [plain_name(name) for name in whole.modules] or None,
        "trainable_token_indices": rows or None,
    }


@contextmanager
def untied(whole: Whole, model: nn.Module) -> Iterator[None]:
    """Give the modules, if they are to be untied, copies of what they share; after an error not."""
    before = []
    try:
        for module in whole.modules.values() if whole.untied else ():
            for part in _shared(model, module):
                before.append((part, part.weight))
                part.weight = nn.Parameter(part.weight.detach().clone())
        yield
    except BaseException:
        for part, weight in before:
            part.weight = weight
        raise


def rows_of(model: nn.Module) -> dict[str, Tensor]:
    """Key in the file -> the trained rows of an adapted model; of tied layers the first."""
    layers = {}
    for name, layer in trained_parts(model)[1].items():
        layers.setdefault(layer.rows, f"{PREFIX}{plain_name(name)}{ROWS}")
    return {key: rows for rows, key in layers.items()}


def check_all_saved(model: nn.Module) -> None:
    """Raise if a parameter trains in ``model`` that the adapter's file would not hold.

    Raises:
        ValueError: there is one.
    """
    held = {id(parameter) for parameter in adapter_parameters(model).values()}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if lost:
        words = "and would be lost: name their modules in modules_to_save, or freeze them"
        raise ValueError(f"{', '.join(lost[:4])} train outside the adapter, {words}")


def _shared(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The parts of ``module`` whose weight another part of ``model`` has too."""
    own = set(module.modules())
    elsewhere = {p._parameters.get("weight") for p in model.modules() if p not in own} - {None}
    return [part for part in own if part._parameters.get("weight") in elsewhere]
