"""AdamW whose step is made by the CPU: gradients travel out, weights travel back, moments stay.

Paging moves 8 bytes per float32 parameter in and 8 out at every step. The update itself is a few
operations per number, which a CPU can make too. Then the moments need not move at all: what moves
is the gradient, 4 bytes out, and the new weight, 4 bytes in. The price is that the CPU must read
and write 28 bytes per parameter at the rate of *its* memory, a tenth of the GPU's or less.

    backward    each gradient is copied out as soon as it is there, beside the rest of the backward
    step        bucket by bucket: wait for its gradients, AdamW on the CPU, copy the weights in
                while the next bucket is worked on

**Clipping.** A gradient that is scaled after it was copied is scaled on the GPU only, and the step
would not see it. Every tensor counts how often it was changed in place. So the step compares the
count with that at the time of the copy, and copies again what has changed: right, but no longer
beside the backward. ``max_norm`` clips inside the step and copies nothing twice.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW
from torch.optim.adamw import adamw

from reference.arguments import check_integer, check_number
from reference.paging.buckets import Bucket, buckets_of
from reference.paging.lanes import Lane, now, wait_here
from reference.paging.state import (
    MOMENTS,
    check_group,
    check_parameters,
    gradients_of,
    split_state,
)


class OffloadedAdamW(AdamW):
    """``torch.optim.AdamW(fused=True)`` on the CPU, for parameters on a GPU.

    The numbers are those that torch's fused AdamW gives on a CPU, bit for bit.

    Args:
        params, lr, betas, eps, weight_decay: as for torch; parameters as for
            :class:`~reference.paging.PagedAdamW`.
        max_norm: clip all gradients together to this norm, as ``clip_grad_norm_`` does; ``.grad``
            stays as it is.
        bucket_bytes: weights that are stepped and copied at a time.

    Raises:
        ValueError, TypeError: as PagedAdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_norm: float | None = None,
        bucket_bytes: int = 1 << 26,
    ):
        check_integer("bucket_bytes", bucket_bytes, 1)
        if max_norm is not None:
            check_number("max_norm", max_norm, 0)
        self.max_norm, self.bucket_bytes = max_norm, bucket_bytes
        self._parameters: list[nn.Parameter] = []  # of all groups, in order
        self._buckets: list[tuple[int, Bucket]] = []  # group, bucket
        self._copied: dict[int, tuple] = {}  # number -> gradient that was copied, version, event
        self._written: dict[int, tuple] = {}  # number -> the value that the host knows
        super().__init__(params, lr, betas, eps, weight_decay)
        if not self._parameters:
            raise ValueError("params has groups, but no parameter: give at least one")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Also makes the new parameters' host copies; torch calls it for the first groups too."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            check_parameters(group["params"], self._parameters)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if not self._parameters and group["params"]:
            self.device = group["params"][0].device
            self.out, self.back = Lane(self.device), Lane(self.device)
        first = len(self._parameters)
        for bucket in buckets_of(group["params"], first, self.bucket_bytes):
            self._buckets.append((len(self.param_groups) - 1, bucket))
        for number, parameter in enumerate(group["params"], first):
            self._parameters.append(parameter)
            if parameter.requires_grad:
                self._hook(number, parameter)
        self._home = {k: bucket for _, bucket in self._buckets for k in bucket.numbers}

    def _hook(self, number: int, parameter: nn.Parameter) -> None:
        """Let the backward begin the copy. The hook does not keep this optimizer alive."""
        weak = weakref.ref(self)

        def send(parameter: nn.Parameter) -> None:
            if (optimizer := weak()) is not None:
                optimizer._send(number, parameter.grad)

        handle = parameter.register_post_accumulate_grad_hook(send)
        weakref.finalize(self, handle.remove)

    def _send(self, number: int, gradient: Tensor) -> None:
        """Begin to copy a gradient out; a sparse one is refused later, in the step."""
        if gradient.layout == torch.strided:
            event = self.out.copy(self._home[number].gradients[number], gradient, now(self.device))
            self._copied[number] = weakref.ref(gradient), gradient._version, event

    def _is_copied(self, number: int, gradient: Tensor) -> bool:
        """Whether the host has this gradient, unchanged since."""
        reference, version, _ = self._copied.get(number, (lambda: None, None, None))
        return reference() is gradient and version == gradient._version

    @torch.no_grad()
    def step(self, closure=None) -> float | None:
        """One step. The CPU works in it; the copies back go on when it returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = gradients_of(self._parameters, self.device)
        for number, gradient in gradients.items():
            if not self._is_copied(number, gradient):
                self._send(number, gradient)
        scale = self._scale(gradients)
        event = None
        for index, bucket in reversed(self._buckets):  # gradients of the last layers come first
            numbers = [k for k in bucket.numbers if k in gradients]
            if numbers:
                self._update(bucket, numbers, self.param_groups[index], scale)
                for number in numbers:
                    parameter = self._parameters[number]
                    event = self.back.copy(parameter, bucket.values[number], now(self.device))
                    self._written[number] = _mark(parameter)
        wait_here(event, self.device)
        return loss

    def _scale(self, gradients: dict[int, Tensor]) -> float:
        """What gradients are multiplied by: 1 unless their norm is above ``max_norm``."""
        if self.max_norm is None or not gradients:
            return 1.0
        norm = get_total_norm(gradients.values())
        return (self.max_norm / (norm + 1e-6)).clamp(max=1).item()

    def _update(self, bucket: Bucket, numbers: list[int], group: dict, scale: float) -> None:
        values = [bucket.values[k] for k in numbers]
        gradients = [bucket.gradients[k] for k in numbers]
        for number, value in zip(numbers, values, strict=True):
            parameter = self._parameters[number]
            if self._written.get(number) != _mark(parameter):  # new, or changed by somebody else
                value.copy_(parameter)
            *_, event = self._copied.pop(number)
            if event is not None:
                event.synchronize()
        if scale != 1:
            torch._foreach_mul_(gradients, scale)
        states = [self._state(number) for number in numbers]
        m, v = ([state[key] for state in states] for key in MOMENTS)
        beta1, beta2 = group["betas"]
        options = {key: group[key] for key in ("lr", "weight_decay", "eps")}
        adamw(
            values, gradients, m, v, [], [state["step"] for state in states], fused=True,
            amsgrad=False, beta1=beta1, beta2=beta2, maximize=False, **options,
        )  # fmt: skip

    def _state(self, number: int) -> dict[str, Tensor]:
        parameter = self._parameters[number]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            for key in MOMENTS:
                state[key] = torch.zeros_like(parameter, device="cpu")
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of torch's AdamW or one of this package's; the moments stay on the CPU."""
        rest, moments = split_state(state_dict, self._parameters)
        super().load_state_dict(rest)
        for number, values in moments.items():
            parameter = self._parameters[number]
            copies = [value.to("cpu", parameter.dtype, copy=True) for value in values]
            self.state[parameter].update(zip(MOMENTS, copies, strict=True))


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Another one once the values are replaced, or changed in place."""
    return tensor.data_ptr(), tensor._version
