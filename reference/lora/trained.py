"""What no low-rank update gives: modules that train whole, and some rows of an embedding.

A new head starts at random, and so does the row of a new token: they have far to go, and a small
s·B·A does not take them there. So an adapter may hold, beside its factors,

    modules_to_save           whole modules, trained where they are
    trainable_token_indices   rows of an embedding: W'[i] = rows[i] for the tokens i, W elsewhere

In many models the output head is the embedding's own matrix: they are *tied*. Here they stay so.
A module that is tied to one that trains is trained with it, and a row is one row for both.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.arguments import check_integer
from reference.lora.weights import check_values, check_weight, describe

MARK = "trained_with_adapter"  # an attribute of modules that train whole


class TrainedRows(nn.Module):
    """An embedding, or a head that is tied to one, some of whose rows are trained.

    Args:
        base: an ``nn.Embedding`` or ``nn.Linear``; frozen here.
        indices: which rows of its weight.
        rows: (len(indices), width), float32 or wider: the parameter of a tied layer. Left out, it
            starts as a copy of the base's.

    Raises:
        TypeError: ``base`` is another kind of layer, or an index is no integer.
        ValueError: there is no such row, or it is named twice, or the weight can't be read.
    """

    def __init__(self, base: nn.Module, indices: list[int], rows: nn.Parameter | None = None):
        check_rows(base, indices)
        super().__init__()
        self.base, weight = base.requires_grad_(False), base.weight
        index = torch.tensor(indices, device=weight.device)
        if rows is None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            rows = nn.Parameter(weight.detach()[index].to(wide))
        self.rows = rows
        place = torch.full((len(weight),), -1, device=weight.device)  # token -> its place in rows
        place[index] = torch.arange(len(indices), device=weight.device)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if isinstance(self.base, nn.Embedding):
            return self._look_up(x, y)
        bias = None if self.base.bias is None else self.base.bias[self.index].to(self.rows.dtype)
        scores = F.linear(x.to(self.rows.dtype), self.rows, bias)  # (..., n)
        return y.index_copy(-1, self.index, scores.to(y.dtype))

    def _look_up(self, ids: Tensor, y: Tensor) -> Tensor:
        place, padding = self.place[ids], self.base.padding_idx
        if padding is not None:  # whose row gets no gradient, as in the base
            padding = int(self.place[padding])
        padding = None if padding == -1 else padding
        new = F.embedding(place.clamp(min=0), self.rows, padding)  # (..., width)
        new = new * getattr(self.base, "embed_scale", 1)  # Gemma multiplies what it looks up
        return torch.where((place >= 0)[..., None], new.to(y.dtype), y)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # the base's, as in every wrapper here
            if name == "base":
                raise
            return getattr(self.base, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A weight that is set on the wrapper, as tying embeddings does, becomes the base's."""
        if name != "weight":
            return super().register_parameter(name, param)
        if param.shape != self.base.weight.shape:
            words = f"a weight of shape {tuple(param.shape)} does not fit its trained rows"
            raise ValueError(f"{describe(self.base)}: {words}; merge_lora(model) first")
        self.base.weight = param

    @torch.no_grad()
    def merge(self) -> None:
        """Write the rows into the base's weight, also where others share it."""
        self.base.weight[self.index] = self.rows.to(self.base.weight.dtype)

    def extra_repr(self) -> str:
        return f"rows={self.index.tolist()}"


def check_rows(base: nn.Module, indices: list[int]) -> None:
    """Raise unless ``indices`` are rows of ``base``, each once."""
    if not isinstance(base, (nn.Embedding, nn.Linear)):
        words = "only rows of an nn.Embedding or nn.Linear can be trained"
        raise TypeError(f"{describe(base)}: {words}")
    check_weight(base)
    if not base.weight.is_floating_point():
        raise TypeError(f"{describe(base)} keeps its weight as {base.weight.dtype}: not trainable")
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"trainable_token_indices must be tokens, each once, got {indices}")
    for token in indices:
        check_integer("trainable_token_indices", token, 0, len(base.weight) - 1)


def find_saved(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """First name -> module, of those that ``modules_to_save`` names and those tied to them.

    Args:
        names: full names, or ends of names after a dot ("lm_head", "score").

    Raises:
        ValueError: a name matches nothing, or ``model`` itself; a parameter can't be trained, or is
            inside an adapted layer.
    """
    if isinstance(names, str):
        raise ValueError(f"modules_to_save must be a list of names, got {names!r}: [{names!r}]")
    chosen = {}
    for wanted in names:
        ends = f".{wanted}"
        found = {n: m for n, m in model.named_modules() if n and f".{n}".endswith(ends)}
        if not found:
            known = [name for name, _ in model.named_children()]
            raise ValueError(f"modules_to_save: {wanted!r} names no module; some are {known[:8]}")
        chosen |= found
    weights = {id(p) for module in chosen.values() for p in module.parameters()}
    for name, module in model.named_modules():
        tied = any(id(p) in weights for p in module._parameters.values())
        if tied and not any(module in set(part.modules()) for part in chosen.values()):
            chosen[name] = module
    for name, module in chosen.items():
        for part in module.modules():
            if hasattr(part, "lora_A") or isinstance(part, TrainedRows):
                raise ValueError(f"modules_to_save: {name} holds an adapter: merge_lora first")
        for key, parameter in module.named_parameters():
            check_values(f"{name}.{key}", parameter)
            if not parameter.is_floating_point():
                words = "which can't be trained: leave it out of what is quantized"
                raise ValueError(f"modules_to_save: {name}.{key} is {parameter.dtype}, {words}")
    return chosen


def find_rows(model: nn.Module, tokens: Iterable[int] | Mapping) -> dict[nn.Module, list[int]]:
    """Layer -> the rows of it that train, tied layers one after the other.

    Args:
        tokens: ids, of the model's input embeddings; or name of a layer -> ids.

    Raises:
        ValueError: a name matches nothing, or tied layers are to train other rows; an id does not
            fit, or the model does not say which its input embeddings are.
        TypeError: a layer is of another kind.
    """
    if not isinstance(tokens, Mapping):
        if not (tokens := list(tokens)):
            return {}
        if not hasattr(model, "get_input_embeddings"):
            words = "give {name of the embedding: ids}, as model has no get_input_embeddings()"
            raise ValueError(f"trainable_token_indices={tokens}: {words}")
        embedding = model.get_input_embeddings()
        tokens = {next(n for n, m in model.named_modules() if m is embedding): tokens}
    found = {}
    for wanted, indices in tokens.items():
        named = [m for n, m in model.named_modules() if f".{n}".endswith(f".{wanted}")]
        if not named:
            raise ValueError(f"trainable_token_indices: {wanted!r} names no layer")
        for layer in named:
            check_rows(layer, indices := list(indices))
            for part in model.modules():  # the layer, and those that share its weight
                if part._parameters.get("weight") is layer.weight:
                    check_rows(part, indices)
                    if found.setdefault(part, indices) != indices:
                        words = "shares its weight with another layer: give both the same rows"
                        raise ValueError(f"trainable_token_indices: {wanted!r} {words}")
    return found


def with_rows(layers: dict[nn.Module, list[int]]) -> dict[nn.Module, TrainedRows]:
    """Each layer -> the same with trained rows, which tied layers share."""
    shared, wrapped = {}, {}
    for layer, indices in layers.items():
        wrapped[layer] = TrainedRows(layer, indices, shared.get(layer.weight))
        shared[layer.weight] = wrapped[layer].rows
    return wrapped
