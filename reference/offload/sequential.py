"""A stack of layers whose frozen weights live elsewhere and visit the device one layer at a time.

The device has two slots, each as large as the largest layer. While one layer computes in one slot,
the next layer's weights are copied into the other:

    compute   | layer 0 | layer 1 | layer 2 |
    copy      | layer 1 | layer 2 | layer 3 |

If copying a layer takes longer than computing it, copying is all that counts. A layer of n weights
in b bytes each takes n·b/BW seconds to copy and 2·n·T/FLOPS to compute for T tokens, so below

    T* = b · FLOPS / (2 · BW)

tokens the computation is free. Going backwards every layer is needed again, in reverse: the layers
that were last are still there.

Autograd must not keep what lies in a slot, since the next layer overwrites it. So with gradients
each layer is checkpointed: the backward fetches its weights again, computes its forward a second
time, and only then its gradients.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from reference.offload.stores import STORES, Slot
from reference.paging.lanes import Lane, Packed, now, wait_here


class OffloadedSequential(nn.Module):
    """``nn.Sequential`` with its frozen parameters on the host or on disk.

    Parameters that require a gradient, such as adapters, and buffers stay on ``device``: a layer
    may write to them. Outside of their layer's turn the frozen parameters are ordinary CPU tensors
    with their values, so ``state_dict()`` is what it always is.

    Args:
        layers: their frozen parameters are packed and taken over; further arguments of a call go to
            every layer.
        device: where the layers compute.
        store: "cpu" (pinned memory) or "disk" (a memory-mapped safetensors file for each layer).
        folder: of the files; by default a temporary one, which goes with this module.

    Raises:
        ValueError: no layers, an unknown store, a parameter on the meta device or in two layers; at
            a call: a frozen parameter was replaced, or is to be trained.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        device: torch.device | str,
        store: str = "cpu",
        folder: str | Path | None = None,
    ):
        super().__init__()
        if store not in STORES:
            raise ValueError(f"store must be one of {', '.join(STORES)}, got {store!r}")
        self.layers, self.device = nn.ModuleList(layers), torch.device(device)
        frozen = [_frozen(layer) for layer in self.layers]
        _check(frozen)
        self._packed = [Packed(parameters) for parameters in frozen]
        self._store = STORES[store](frozen, self._packed, self.device, folder)
        self._homes = [
            {name: (p, p.data_ptr()) for name, p in parameters.items()} for parameters in frozen
        ]
        for layer, parameters in zip(self.layers, frozen, strict=True):
            _move_rest(layer, set(parameters), self.device)
        largest = max(packed.bytes for packed in self._packed)
        self._slots = [Slot(largest, self.device) for _ in range(min(2, len(self.layers)))]
        self._lane, self._ahead = Lane(self.device), 1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._ahead = 1
        trained = any(p.requires_grad for p in self.parameters())
        learns = torch.is_grad_enabled() and (trained or x.requires_grad)
        for number in range(len(self.layers)):
            self._check_homes(number)
            if learns:
                x = checkpoint(self._run, number, x, *args, use_reentrant=False, **kwargs)
            else:
                x = self._run(number, x, *args, **kwargs)
        if learns:
            self._ahead = -1  # what comes next is the backward
        else:
            self._fetch(0, keep=len(self.layers) - 1)
        return x

    def _run(self, number: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        slot = self._fetch(number)
        following = number + self._ahead
        if 0 <= following < len(self.layers):
            self._fetch(following, keep=number)
        wait_here(slot.ready(), self.device)
        weights = self._packed[number].views(slot.bytes)
        return functional_call(self.layers[number], weights, (x, *args), kwargs)

    def _fetch(self, number: int, keep: int | None = None) -> Slot:
        """The slot with this layer, or to which it is on its way; never that of ``keep``."""
        versions = [p._version for p, _ in self._homes[number].values()]
        for slot in self._slots:
            if slot.holds == (number, versions):
                return slot
        slot = next(slot for slot in self._slots if slot.holds is None or slot.holds[0] != keep)
        slot.holds = None  # after an error it holds nothing
        # All work that reads the slot has been given to the stream by now.
        slot.ready = self._store.send(number, slot.bytes, self._lane, now(self.device))
        slot.holds = number, versions
        return slot

    def _check_homes(self, number: int) -> None:
        for name, (parameter, address) in self._homes[number].items():
            here = self.layers[number].get_parameter(name)
            if here is not parameter or here.data_ptr() != address:
                remedy = "change it in place, or build the stack again"
                raise ValueError(f"parameter {name} of layer {number} was replaced: {remedy}")
            if here.requires_grad:
                remedy = "it would get no gradient: let it require one before the stack is built"
                raise ValueError(f"parameter {name} of layer {number} is offloaded: {remedy}")

    def _apply(self, fn, recurse: bool = True) -> "OffloadedSequential":
        """``to`` and the like: everything is where it belongs already, and stays there."""
        if fn(torch.zeros(1)).dtype != torch.float32:
            raise ValueError("convert the layers to another dtype before the stack is built")
        return self


def _frozen(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if not p.requires_grad and p.numel()}


def _check(frozen: list[dict[str, nn.Parameter]]) -> None:
    if not frozen:
        raise ValueError("layers is empty: give at least one layer")
    seen: dict[int, int] = {}
    for number, parameters in enumerate(frozen):
        for name, parameter in parameters.items():
            if parameter.is_meta:
                raise ValueError(f"parameter {name} of layer {number} is on the meta device")
            if (other := seen.setdefault(id(parameter), number)) != number:
                whose = f"parameter {name} belongs to layers {other} and {number}"
                raise ValueError(f"{whose}: give each layer its own")


def _move_rest(layer: nn.Module, offloaded: set[str], device: torch.device) -> None:
    """Trained parameters and buffers to the device."""
    for name, parameter in layer.named_parameters():
        if name not in offloaded:
            parameter.data = parameter.data.to(device)
    for module in layer.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
