"""Master weights: the model computes in 16 bits, the optimizer adds in 32.

    master ← master − η·(…)      float32: small steps add up
    w      ← round(master)       16 bits: what forward and backward use

An update is often a thousandth of its weight or less, and 16 bits round it away. The rounding
of the copy is harmless: nothing builds on it. The price is 4 bytes per trained weight. Micikevicius
et al. 2017, "Mixed precision training".
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

HALVES = torch.float16, torch.bfloat16


class MasterWeights:
    """An optimizer over float32 copies of 16-bit parameters.

        optimizer = MasterWeights(model.parameters(), torch.optim.AdamW, lr=1e-4)
        loss.backward(); optimizer.step(); optimizer.zero_grad()

    With a scaler or with clipping the masters need their gradients before the step:

        optimizer.gather(); scaler.unscale_(optimizer); clip(optimizer.masters)
        scaler.step(optimizer); scaler.update()

    The steps are those of the same optimizer on float32 parameters with these gradients, bit for
    bit; the 16-bit parameters are the masters, rounded to nearest.

    Args:
        params: float16 or bfloat16 parameters, or float32 ones, which are their own masters.
        kind: the optimizer's class, and its ``settings``.

    Attributes:
        optimizer: over the masters; a scheduler takes it.
        masters: in the order of ``params``.

    Raises:
        TypeError: a parameter has another dtype.
        ValueError: there are none.
    """

    def __init__(
        self, params: Iterable[Tensor], kind: Callable[..., torch.optim.Optimizer], **settings: Any
    ):
        self.params = list(params)
        if not self.params:
            raise ValueError("params is empty: give at least one parameter")
        for p in self.params:
            if p.dtype not in (*HALVES, torch.float32):
                raise TypeError(f"parameters must be float16, bfloat16 or float32, got {p.dtype}")
        self.masters = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for p in self.params
        ]
        self.optimizer = kind(self.masters, **settings)
        self._gathered = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the masters: what a scaler unscales."""
        return self.optimizer.param_groups

    def gather(self) -> None:
        """Give the masters their gradients, in float32."""
        for p, master in self._pairs():
            master.grad = None if p.grad is None else p.grad.float()
        self._gathered = True

    def step(self) -> None:
        """Gather, unless that was done; step; spread."""
        if not self._gathered:
            self.gather()
        self.optimizer.step()
        self.spread()
        self._gathered = False

    @torch.no_grad()
    def spread(self) -> None:
        """Round the masters into the parameters."""
        for p, master in self._pairs():
            p.copy_(master)

    def zero_grad(self) -> None:
        for tensor in (*self.params, *self.masters):
            tensor.grad = None
        self._gathered = False

    def state_dict(self) -> dict[str, Any]:
        """Masters and the optimizer's state. The rounded parameters can't stand in for masters."""
        masters = [master.detach().clone() for master in self.masters]
        return {"masters": masters, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another left off; the parameters follow.

        Raises:
            ValueError: shapes or their number differ; nothing is changed then.
        """
        here, there = ([tuple(m.shape) for m in ms] for ms in (self.masters, state["masters"]))
        if here != there:
            raise ValueError(f"the masters have shapes {here}, the state's have {there}")
        self.optimizer.load_state_dict(state["optimizer"])
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self.spread()

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        pairs = zip(self.params, self.masters, strict=True)
        return [(p, master) for p, master in pairs if p is not master]
