"""Dynamic loss scaling: lift the gradients of a float16 model out of what float16 takes for zero.

The smallest float16 number is 6·10⁻⁸, and gradients are often smaller. Multiply the loss by S and,
by the chain rule, every gradient of the backward pass is multiplied by S too. Divide by S in
float32 before the step. The best S is the largest without an overflow, and it is found by trying:

    a gradient is infinite or NaN      no step, S ← S / 2
    n good steps in a row              S ← 2·S                 n = 2000

Micikevicius et al. 2017, "Mixed precision training". The numbers are those of torch.amp.GradScaler.
"""

from typing import Any

import torch
from torch import Tensor

from reference.arguments import check_integer, check_number

READY, UNSCALED, STEPPED = "ready", "unscaled", "stepped"


class LossScaler:
    """``scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()``.

    With several optimizers each decides by its own gradients whether it steps, and ``update`` backs
    off if any of them met an infinity. To clip, call ``unscale_(optimizer)`` first.

    Args:
        init_scale: S at the beginning.
        growth_factor, backoff_factor: above 1; from 0 to below 1.
        growth_interval: how many good steps in a row it takes to grow.

    Raises:
        ValueError, TypeError: an argument is no number, or out of range.
    """

    def __init__(
        self, init_scale: float = 2.0**16, growth_factor: float = 2.0,
        backoff_factor: float = 0.5, growth_interval: int = 2000,
    ):  # fmt: skip
        check_number("init_scale", init_scale)
        check_number("growth_factor", growth_factor)
        check_number("backoff_factor", backoff_factor)
        check_integer("growth_interval", growth_interval, 1)
        if init_scale <= 0 or growth_factor <= 1 or not 0 < backoff_factor < 1:
            raise ValueError(
                "init_scale must be above 0, growth_factor above 1 and backoff_factor between 0 "
                f"and 1, got {init_scale}, {growth_factor}, {backoff_factor}"
            )
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval, self.good_steps = growth_interval, 0
        self._scale = torch.tensor(float(init_scale))  # float32, as all arithmetic here
        self._stages: dict[int, str] = {}  # of optimizers, since the last update
        self._infinite: dict[int, Tensor] = {}  # read when it must be: reading waits for a GPU

    def get_scale(self) -> float:
        return self._scale.item()

    def scale(self, loss: Tensor) -> Tensor:
        """S · loss."""
        return loss * self._scale.to(loss.device)

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of ``optimizer`` by S in place, and note whether one is not finite.

        Raises:
            RuntimeError: it was called already since the last update, or the step was made.
            ValueError: a gradient is float16: divided by S it would vanish again; or is sparse.
        """
        stage = self._stages.get(id(optimizer), READY)
        if stage != READY:
            raise RuntimeError(f"this optimizer is already {stage}: call update() in between")
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        grads = [grad for grad in grads if grad is not None]
        for grad in grads:
            if grad.dtype == torch.float16:
                raise ValueError("gradients are float16: keep float32 parameters, use autocast")
            if grad.is_sparse:
                raise ValueError("gradients are sparse: make the embedding's dense")
        inverse, infinite = self._scale.double().reciprocal().float(), torch.zeros((), dtype=bool)
        for grad in grads:
            infinite = infinite.to(grad.device) | ~grad.isfinite().all()
            grad.mul_(inverse.to(grad.device))
        self._stages[id(optimizer)], self._infinite[id(optimizer)] = UNSCALED, infinite

    def step(self, optimizer: torch.optim.Optimizer) -> Any:
        """Unscale, if that was not done, and step if all gradients are finite.

        Raises:
            RuntimeError: the step was made already since the last update.
        """
        if self._stages.get(id(optimizer)) == STEPPED:
            raise RuntimeError("this optimizer is already stepped: call update() in between")
        if id(optimizer) not in self._stages:
            self.unscale_(optimizer)
        self._stages[id(optimizer)] = STEPPED
        return None if self._infinite[id(optimizer)] else optimizer.step()

    def update(self) -> None:
        """Change S by what the optimizers met since the last update.

        Raises:
            RuntimeError: no optimizer was unscaled or stepped.
        """
        if not self._stages:
            raise RuntimeError("no optimizer was unscaled or stepped since the last update()")
        if any(self._infinite.values()):
            self._scale, self.good_steps = self._scale * self.backoff_factor, 0
        else:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                grown = self._scale * self.growth_factor
                self._scale = grown if grown.isfinite() else self._scale
                self.good_steps = 0
        self._stages, self._infinite = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """As GradScaler's: either's state loads into the other."""
        return {
            "scale": self.get_scale(),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self.good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval = state["growth_interval"]
        self.good_steps, self._scale = state["_growth_tracker"], torch.tensor(state["scale"])
