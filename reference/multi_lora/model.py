"""Many adapters in a whole model: a batch names its tenants once, and every layer knows.

    served = MultiLoRA(model)                          # wraps the linear layers, in place
    served.add("sql", read_factors("adapters/sql"))    # while it serves, too
    with served.rows(["sql", "clinic", None]):
        logits = model(ids)                            # ids: (3, tokens)

An adapter may cover some of the layers only, and its ranks may differ from layer to layer.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType

from torch import nn

from reference.lora.replace import carry_hooks, replace_layers
from reference.lora.targets import find_targets, lora_layers, wrapper_of
from reference.multi_lora.factors import Adapter, Factors, common_dtype
from reference.multi_lora.layer import MultiLoRALinear
from reference.multi_lora.on_gpu import kernels, kernels_for
from reference.multi_lora.route import Route, chosen, known


class MultiLoRA:
    """Adapters by name over one model, whose linear layers are wrapped here and frozen.

    Args:
        model: holds the layers; left as it was if an error is raised.
        target_modules: which layers, by the rules of :func:`reference.lora.inject_lora`. Adapters
            are served for these and no others.

    Attributes:
        layers: name -> :class:`MultiLoRALinear`.
        adapters: name -> layer's name -> factors, read-only.

    Raises:
        ValueError: nothing matches; the model is adapted already; and as for ``inject_lora``.
        TypeError: a match is not linear.
    """

    def __init__(self, model: nn.Module, target_modules: str | Iterable[str] = "all-linear"):
        served = (name for name, part in model.named_modules() if isinstance(part, MultiLoRALinear))
        for name in [*served, *(name for name, _ in lora_layers(model))]:
            raise ValueError(f"{name} is adapted already: merge_lora(model), or take a fresh model")
        targets = find_targets(model, target_modules)
        for name, layer in targets.items():
            if not hasattr(layer, "in_features") or wrapper_of(layer) is None:
                kind = type(layer).__name__
                raise TypeError(f"{name} is a {kind}: only linear layers hold many adapters")
        self.layers = {name: MultiLoRALinear(layer) for name, layer in targets.items()}
        replace_layers(model, {layer.base: layer for layer in self.layers.values()})
        model.requires_grad_(False)
        self.model = model
        self._adapters: dict[str, Adapter] = {}

    @property
    def adapters(self) -> MappingProxyType:
        return MappingProxyType(self._adapters)

    def add(self, name: str, adapter: Adapter) -> None:
        """Serve ``adapter``, layer's name -> factors, under a new name.

        Raises:
            ValueError: the name is taken; a layer is not served, or its sizes are others (each by
                name). Nothing is added then.
        """
        if name in self._adapters:
            raise ValueError(f"there is an adapter {name!r}: replace() it, or remove() it first")
        self._adapters[name] = self.check(adapter, name)

    def replace(self, name: str, adapter: Adapter) -> None:
        """A new version: rows selected from now on use it, those selected before do not."""
        known(name, self._adapters)
        self._adapters[name] = self.check(adapter, name)

    def remove(self, name: str) -> None:
        """Forget an adapter. What has selected it goes on with it."""
        del self._adapters[known(name, self._adapters)]

    def check(self, adapter: Adapter, name: str = "", anywhere: bool = False) -> MappingProxyType:
        """A copy of the table ``adapter`` that nobody changes, if all of it can be served.

        Args:
            anywhere: it may be on another device, from which it will be copied.
        """
        if missing := [layer for layer in adapter if layer not in self.layers]:
            words = "are not served: name them in target_modules"
            raise ValueError(f"adapter {name!r}: layers {missing[:4]} {words}")
        if not adapter:
            raise ValueError(f"adapter {name!r} holds no layer")
        for layer, factors in adapter.items():
            try:
                self.layers[layer].check(factors, anywhere)
            except (TypeError, ValueError) as error:
                raise type(error)(f"adapter {name!r}, {layer}: {error}") from None
        return MappingProxyType(dict(adapter))

    def select(self, rows: str | Sequence[str | None] | None) -> None:
        """Choose for the batches to come: a name for all rows, one name or None for each, or None.

        Raises:
            ValueError: a name is unknown. The selection is then as it was.
        """
        if rows is None:
            return self.use(None)
        if isinstance(rows, str):
            return self.use(Route.same(self._adapters[known(rows, self._adapters)]))
        self.use(Route(chosen(rows, self._adapters)))

    def use(self, route: Route | None) -> None:
        """The same by adapters themselves, which a request may have held since before a replace."""
        distinct = route.distinct if route is not None else []
        factors = {name: [adapter.get(name) for adapter in distinct] for name in self.layers}
        tables = self._tables_of(factors)
        for name, layer in self.layers.items():
            layer.use(route, factors[name], tables.get(name))

    def _tables_of(self, factors: dict[str, list[Factors | None]]) -> dict[str, object]:
        """What the kernels are told, for all layers that they take, by one copy to the device."""
        device = next(iter(self.layers.values())).base.weight.device
        taken = [name for name, found in factors.items() if common_dtype(found)]
        if not (taken and kernels_for(device)):
            return {}
        tables = kernels().tables([factors[name] for name in taken], device)
        return dict(zip(taken, tables, strict=True))

    @contextmanager
    def rows(self, rows: str | Sequence[str | None] | None) -> Iterator[None]:
        """``select`` for the block, and the base alone after it."""
        self.select(rows)
        try:
            yield
        finally:
            self.use(None)

    def unwrap(self) -> nn.Module:
        """The plain model again, in place."""
        for layer in self.layers.values():
            carry_hooks(layer, layer.base)
        replace_layers(self.model, {layer: layer.base for layer in self.layers.values()})
        self.layers = {}
        return self.model
