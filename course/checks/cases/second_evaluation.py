"""`merge` adds the update whether it is in the weight or not. The flag is set, and nobody asks it.

What changes a state must ask first which state it is in, and the other way round must ask too: taking out what is not there is the same
mistake.
"""

import torch
from torch import Tensor, nn

from course.cases import second_evaluation as script
from course.checking import Check, NotYet, Seen, but


class Adapted(script.Adapted):
    """The worked answer: both ways ask first."""

    def merge(self) -> None:
        if not self.merged:
            super().merge()

    def unmerge(self) -> None:
        if self.merged:
            super().unmerge()


class FromACopy(nn.Module):
    """The weight is always made from an untouched copy, so that merging twice gives what merging once gives."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.base, self.A, self.B, self.scale = base, A, B, scale
        self.plain, self.merged = base.weight.detach().clone(), False

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.merged else y + self.scale * (x @ self.A.T @ self.B.T)

    def merge(self) -> None:
        self.base.weight.data, self.merged = self.plain + self.scale * self.B @ self.A, True

    def unmerge(self) -> None:
        self.base.weight.data, self.merged = self.plain.clone(), False


def nothing(self) -> None:
    """No state is ever changed."""


def flag_alone(self) -> None:
    self.merged = True


@torch.no_grad()
def half_each_time(self) -> None:
    self.base.weight += self.scale * (self.B @ self.A) / (2 if self.merged else 1)
    self.merged = True


def once_for_ever(self) -> None:
    if not hasattr(self, "_done"):
        self._done = True
        script.Adapted.merge(self)


def unmerge_unasked(self) -> None:
    script.Adapted.unmerge(self)


def observe(answer, seed: int) -> Seen:
    if not isinstance(answer, type):
        raise NotYet("Adapted must be a class")
    g = torch.Generator().manual_seed(seed)
    base, A, B = nn.Linear(6, 5), torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g)
    layer, x = answer(base, A, B, 1.5), torch.randn(4, 6, generator=g)
    for number, step in enumerate("merge merge merge unmerge unmerge merge".split(), 1):
        getattr(layer, step)()
        there = "merged" if step == "merge" else "not merged"
        yield f"the output after step {number}, {step}", layer(x).detach()
        yield f"the weight after step {number}, which is to be {there}", layer.base.weight.detach().clone()


check = Check(
    task="merging and unmerging, however often it is asked for",
    observe=observe,
    reference=Adapted,
    second=FromACopy,
    misconceptions={
        "merge adds the update again if it is already in the weight: ask the flag first, in unmerge too": script.Adapted,
        "merge does nothing, so the weight never holds the update: the outputs are right, and the speed is that of the unmerged layer": but(
            merge=nothing, unmerge=nothing
        ),
        "merge only sets the flag: forward then leaves the update out, and nothing has put it into the weight": but(merge=flag_alone),
        "the second merge adds half of it: a smaller error is still one; add nothing if it is there": but(merge=half_each_time),
        "merge works a single time: after unmerge it must work again; ask whether it is merged now, not whether it ever was": but(
            merge=once_for_ever
        ),
        "unmerge does not ask: called twice it takes out what is not there": but(unmerge=unmerge_unasked),
    },
)
