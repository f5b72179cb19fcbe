"""The other way to checkpoint: let autograd build its graph, and keep the tensors from it.

An operation that needs a tensor in its backward *packs* it in the forward and *unpacks* it later.
Both can be hooked. Here packing drops the tensor and keeps a number, its place in the order. The
first unpacking runs the function again and collects what is packed this time, in the same order.

    pack(tensor)     ->  i               forward
    unpack(i)        ->  tensors[i]      backward; the first one computes all of them again

The graph is the ordinary one. So whatever a function captures gets its gradient without being
named, and a second derivative works. And the second run can stop as soon as the last tensor is
there: what comes after that in a block, such as the product of its last linear, no backward needs.
This is how ``torch.utils.checkpoint(use_reentrant=False)`` works.

What is compared between the two runs is how many tensors there are, their shapes, dtypes and
devices. Values are compared only if ``check_values`` asks for it; torch never compares them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from reference.checkpointing.call import Call, as_leaves
from reference.checkpointing.captured import captured
from reference.checkpointing.surroundings import Surroundings


class _Enough(Exception):
    """All that was dropped is there again."""


class _Keep(torch.autograd.Function):
    """Keeps tensors the way an operation does, so that hooks around it apply to them."""

    @staticmethod
    def forward(ctx, token: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return token.clone()


def checkpoint_by_hooks(
    function: Callable, *args: Any,
    preserve_rng_state: bool = True, check_values: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """``function(*args, **kwargs)``; of its inside nothing is kept, it is computed again.

    Args:
        preserve_rng_state: draw the same random numbers again.
        check_values: keep the sum of each tensor, and compare. On a GPU that waits for the device.

    Raises:
        RuntimeError: in the backward, if the second run was not the first one again.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    call = Call(function, args, kwargs)
    before = Surroundings(call.tensors or captured(function), preserve_rng_state)
    kept = _Keep.apply(torch.zeros((), requires_grad=True), *call.tensors)
    region = _Region(call.without_tensors(), kept, before, check_values)
    with saved_tensors_hooks(region.pack, region.unpack):
        return function(*args, **kwargs)


class _Region:
    """What is kept of a checkpointed call: how to run it again, and how its tensors looked."""

    def __init__(self, call: Call, kept: Tensor, before: Surroundings, check_values: bool):
        self.call, self.kept, self.before, self.check_values = call, kept, before, check_values
        self.looks: list[tuple] = []
        self.tensors: dict[int, Tensor] = {}  # computed again, until they are asked for

    def look(self, tensor: Tensor) -> tuple:
        seen = tuple(tensor.shape), tensor.dtype, tensor.device
        return (*seen, tensor.detach().double().sum().item()) if self.check_values else seen

    def pack(self, tensor: Tensor) -> int:
        self.looks.append(self.look(tensor))
        return len(self.looks) - 1

    def unpack(self, place: int) -> Tensor:
        if place not in self.tensors:  # the first that is asked for, or one for a second backward
            self.tensors = self.recompute()
        return self.tensors.pop(place)  # from here on it is the operation's

    def recompute(self) -> dict[int, Tensor]:
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            looks = self.look(tensor)
            if looks != self.looks[len(found)]:
                raise RuntimeError(
                    f"tensor {len(found)} was {self.looks[len(found)]} in the forward and is "
                    f"{looks} when computed again: the function must do the same twice"
                )
            found.append(tensor.detach())
            if len(found) == len(self.looks):
                raise _Enough
            return found[-1]

        given = as_leaves(self.kept.grad_fn.saved_tensors)
        try:
            hooks = saved_tensors_hooks(collect, lambda tensor: tensor)
            with self.before.restored(), torch.enable_grad(), hooks:
                self.call.run(given)
        except _Enough:
            return dict(enumerate(found))
        raise RuntimeError(
            f"{len(self.looks)} tensors were kept in the forward, {len(found)} when computed "
            "again: the function must do the same twice"
        )
