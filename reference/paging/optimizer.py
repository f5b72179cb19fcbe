"""AdamW whose state lives in host memory and visits the GPU a page at a time.

AdamW keeps two numbers for every trained one: m (``exp_avg``) and v (``exp_avg_sq``). In float32
that is 8 bytes per parameter, needed for some milliseconds of each training step. Here they are in
host memory, cut into pages of equal size. A step goes through the pages: fetch, update, next. A
fixed number of frames on the GPU holds the pages of the moment; while one is updated the next is
copied in and an earlier one is copied out.

    p ← p · (1 − η·wd)
    m ← m + (1 − β₁)·(g − m)          v ← β₂·v + (1 − β₂)·g²
    p ← p − η/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

The update is element-wise: neither the size of a page nor the order of the pages changes a bit of
it. The numbers are those of ``torch.optim.AdamW(foreach=False, fused=False)``, bit for bit.

bitsandbytes (Dettmers et al. 2023, QLoRA) does the same with managed memory, whose pages the driver
moves when a kernel touches them.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from reference.arguments import check_integer
from reference.capability import has_bfloat16
from reference.paging.layout import Layout
from reference.paging.pool import POLICIES, PageEvent, Pool
from reference.paging.state import (
    MOMENTS,
    check_group,
    check_parameters,
    gradients_of,
    split_state,
)
from reference.paging.update import Numbers, plain_update


class PagedAdamW(AdamW):
    """``torch.optim.AdamW`` with its moments in pinned host memory.

    Args:
        params: contiguous floating tensors of one device, or groups, as for torch. Without a GPU
            the same code pages between two pools of host memory.
        lr, betas, eps, weight_decay: as for torch.
        resident_bytes: what pages may take on the device: ``resident_bytes // page_bytes`` frames.
        page_bytes: a power of two. Small pages are launches and events, large ones are coarse.
        policy: which page has to go, see :mod:`reference.paging.pool`.

    Attributes:
        trace: page events, newest last: (step, "hit" | "in" | "out", page).

    Raises:
        ValueError: the budget is below a page, ``page_bytes`` is no power of two, an unknown
            policy, parameters on two devices, not floating or not contiguous; at a step: a sparse
            gradient. A step that raises this has changed nothing.
    """

    kernels = True  # update pages by reference.kernels.adamw where it can run

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        resident_bytes: int = 1 << 30,
        page_bytes: int = 1 << 26,
        policy: str = "alternate",
    ):
        check_integer("resident_bytes", resident_bytes)
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        self._arguments = resident_bytes, page_bytes, policy
        self._parameters: list[nn.Parameter] = []  # of all groups, in order
        self._tables = None  # of the kernel
        self.pool: Pool | None = None
        super().__init__(params, lr, betas, eps, weight_decay)
        if self.pool is None:
            raise ValueError("params has groups, but no parameter: give at least one")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Also lays out the new parameters' pages; torch calls it for the first groups too."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            check_parameters(group["params"], self._parameters)
            if self.pool is None and group["params"]:
                self._open(group["params"][0].device)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._tables = None
        for parameter in group["params"]:
            self._parameters.append(parameter)
            self.layout.add(parameter)

    def _open(self, device: torch.device) -> None:
        resident_bytes, page_bytes, policy = self._arguments
        self.layout = Layout(page_bytes, pinned=device.type == "cuda")
        if resident_bytes < page_bytes:
            remedy = "give room for one page, or make pages smaller"
            raise ValueError(
                f"resident_bytes {resident_bytes} is below page_bytes {page_bytes}: {remedy}"
            )
        frames = resident_bytes // page_bytes
        self.pool = Pool(self.layout.pages, frames, page_bytes, device, policy)

    @property
    def trace(self) -> Iterable[PageEvent]:
        return self.pool.trace

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. Nothing waits: the copies go on while the caller goes on.

        An error between two pages leaves the table true, and every page, with its numbers of p,
        either as it was or updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = gradients_of(self._parameters, self.pool.device)
        numbers = self._count(gradients)
        update = self._updater(gradients, numbers)
        self.pool.step += 1
        for page in self.pool.order():
            if any(piece.parameter in gradients for piece in self.layout.pages[page].pieces):
                with self.pool.use(page) as moments:
                    update(page, moments)
        return loss

    def _count(self, gradients: dict[int, Tensor]) -> dict[int, Numbers]:
        """One step more for each parameter that has a gradient, and the scalars of its update."""
        groups = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        states = [self.state[self._parameters[number]] for number in gradients]
        for state in states:
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        kinds = [(groups[number], t.item()) for number, t in zip(gradients, steps, strict=True)]
        scalars = {(i, t): Numbers.of(self.param_groups[i], t) for i, t in set(kinds)}
        return {number: scalars[kind] for number, kind in zip(gradients, kinds, strict=True)}

    def _updater(self, gradients: dict[int, Tensor], numbers: dict[int, Numbers]) -> Callable:
        """``update(page, moments)``: by the kernel where there is one, else as torch's loop."""
        pages, parameters = self.layout.pages, self._parameters
        device = self.pool.device
        on_gpu = device.type == "cuda" and find_spec("triton") and has_bfloat16(device)
        if self.kernels and on_gpu:
            from reference.kernels import adamw

            if pages and all(page.host.dtype in adamw.DTYPES for page in pages):
                if self._tables is None:
                    self._tables = adamw.Tables.of(pages, device)
                return adamw.PageUpdates(self._tables, pages, parameters, gradients, numbers)

        def update(page: int, moments: Tensor) -> None:
            for number, start, offset, length in pages[page].pieces:
                if number in gradients:
                    p, g = parameters[number].view(-1), gradients[number].view(-1)
                    m, v = moments[:, offset : offset + length]
                    here = slice(start, start + length)
                    plain_update(p[here], g[here], m, v, numbers[number])

        return update

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the moments as ordinary tensors on the CPU."""
        self.pool.flush()
        found = super().state_dict()
        for number, entry in found["state"].items():
            shape = self._parameters[number].shape
            moments = {key: self.layout.read(number, i, shape) for i, key in enumerate(MOMENTS)}
            found["state"][number] = entry | moments
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class or of ``torch.optim.AdamW``. The moments go into the pages.

        Raises:
            ValueError: it is no state of AdamW for these parameters. Nothing has changed then.
        """
        rest, moments = split_state(state_dict, self._parameters)
        super().load_state_dict(rest)
        self.pool.forget()
        for number in range(len(self._parameters)):
            for i, values in enumerate(moments.get(number, (None, None))):
                self.layout.write(number, i, values)

    def __getstate__(self) -> dict[str, Any]:
        what = "pinned memory and streams, which can't be copied or pickled"
        raise TypeError(f"a PagedAdamW holds {what}: save its state_dict()")
