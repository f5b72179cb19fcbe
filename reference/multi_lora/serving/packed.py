"""An adapter in one run of bytes: a swap is one copy, and a tensor is made when a layer wants it.

An adapter of a large model has a thousand factors. To check them and to make their tensors takes
longer than the copy. So both are taken out of the swap:

    Layout          where each factor lies, found once, when the adapter arrives and is checked
    PackedAdapter   a layout over memory: layer's name -> factors, made at the first look

Tensors that were handed out keep their memory. It is used again when the last of them has gone.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from reference.multi_lora.factors import Adapter, Factors
from reference.paging.lanes import Packed


class Layout:
    """Which bytes are which factor of ``adapter``, wherever it lies.

    Attributes:
        bytes: of all factors, each at a multiple of 256.
        layers: layer's name -> dtype, r, (out, in), where A and B begin (in numbers, not bytes), s.
    """

    def __init__(self, adapter: Adapter):
        self._packed = Packed(_tensors(adapter))
        self.bytes = self._packed.bytes
        begin = {key: place[0] for key, place in self._packed.places.items()}
        self.layers = {}
        for name, f in adapter.items():
            dtype = f.A.dtype
            a, b = (begin[f"{name}.{side}"] // dtype.itemsize for side in "AB")
            self.layers[name] = dtype, f.r, f.sizes, a, b, f.scaling

    def write(self, adapter: Adapter, memory: Tensor) -> None:
        """Put an adapter of this layout into ``memory``."""
        tensors = _tensors(adapter)
        for key, view in self._packed.views(memory).items():
            view.copy_(tensors[key])


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {f"{name}.{side}": getattr(f, side) for name, f in adapter.items() for side in "AB"}


class PackedAdapter(Mapping):
    """Layer's name -> factors, as they lie in ``memory``; read-only.

    Args:
        memory: (layout.bytes,) uint8, the beginning of its storage.
    """

    def __init__(self, layout: Layout, memory: Tensor):
        self._layout, self._memory = layout, memory
        self._typed: dict[torch.dtype, Tensor] = {}
        self._made: dict[str, Factors] = {}

    def __getitem__(self, name: str) -> Factors:
        if (found := self._made.get(name)) is None:
            found = self._made[name] = self._make(*self._layout.layers[name])
        return found

    def _make(self, dtype: torch.dtype, r: int, sizes: tuple, a: int, b: int, s: float) -> Factors:
        if dtype not in self._typed:
            self._typed[dtype] = self._memory.view(dtype)
        numbers, (n_out, n_in) = self._typed[dtype], sizes
        # One call a factor: slice, view and reshape would be four.
        A = numbers.as_strided((r, n_in), (n_in, 1), a)
        return Factors.unchecked(A, numbers.as_strided((n_out, r), (r, 1), b), s)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.layers)

    def __len__(self) -> int:
        return len(self._layout.layers)
