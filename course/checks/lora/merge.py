"""Merging the update into the weight, and taking it back."""

import functools

import torch
from torch import Tensor, nn

from course.checking import Check, Seen, but, raised
from course.checks.lora.forward import LoRALinear
from course.checks.lora.shared import fill, nothing, trainable
from course.checks.svd import nearest


class Mergeable(LoRALinear):
    """The worked answer: one rounding, in the weight's dtype, and the very same bits back."""

    merged = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else super().forward(x)

    def delta(self) -> Tensor:
        return self.scale() * (self.lora_B.detach().float() @ self.lora_A.detach().float())  # (out, in)

    def total(self) -> Tensor:
        return self.base.weight.float() + self.delta()

    def write(self, weight: Tensor) -> None:
        self.base.weight.data.copy_(weight)  # copy_ rounds to the weight's dtype, once

    def backup(self) -> Tensor:
        return self.base.weight.detach().clone()

    def undo(self) -> None:
        self.write(self.original)
        self.original = None

    def mark(self, merged: bool) -> None:
        self.merged = merged

    def refuse_merged(self) -> None:
        if self.merged:
            raise ValueError("already merged: unmerge() first, else the update is added twice")

    def refuse_unmerged(self) -> None:
        if not self.merged:
            raise ValueError("not merged: there is nothing to take out")

    def merge(self) -> None:
        self.refuse_merged()
        self.original = self.backup()
        self.write(self.total())
        self.mark(True)

    def unmerge(self) -> None:
        self.refuse_unmerged()
        self.undo()
        self.mark(False)


class BySwapping(Mergeable):
    """Computed in float64; the base layer gets a new parameter instead of new values."""

    def total(self) -> Tensor:
        update = torch.einsum("or,ri->oi", self.lora_B.double(), self.lora_A.double())
        return self.base.weight.double() + self.scale() * update.detach()

    def write(self, weight: Tensor) -> None:
        self.base.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    r, alpha, n = 3, 7, 12  # square, so that a transposed update has the right shape too

    def weight() -> Tensor:
        return layer.base.weight.detach().clone()

    def state(when: str) -> Seen:
        return (f"the base weight {when}", weight()), (f"layer.merged {when}", layer.merged), (f"the output {when}", layer(x))

    layer = answer(nn.Linear(n, n), r, alpha)
    fill(layer, g, 1 / 4)
    x, kept, factor = torch.randn(4, n, generator=g), weight(), layer.lora_B.detach().clone()
    yield "the output before merging", layer(x)
    layer.merge()
    yield from state("after merge()")
    yield "a second merge()", raised(layer.merge)
    yield from state("after the second merge()")
    yield "lora_B after merge()", layer.lora_B.detach().clone()
    yield "what trains while merged, besides lora_A and lora_B", trainable(layer, besides=("lora_A", "lora_B"))
    yield "unmerge() of a merged layer", raised(layer.unmerge)
    yield from state("after unmerge()")
    yield "a second unmerge()", raised(layer.unmerge)
    yield from state("after the second unmerge()")
    yield "lora_B after unmerge()", torch.equal(layer.lora_B, factor)
    yield "what trains after unmerge()", trainable(layer)
    layer.lora_B.data.mul_(1.5)  # trained on
    yield "merging again after unmerge() and more training", raised(layer.merge)
    yield "the base weight after merging again", weight()
    yield "float32 gives exactly the old weight back", raised(layer.unmerge) is None and torch.equal(weight(), kept)
    layer.base.weight.data.add_(0.5)  # another checkpoint
    kept = weight()
    yield "merging into other base weights", raised(layer.merge)
    yield "other base weights after merging", weight()
    yield "other base weights come back exactly", raised(layer.unmerge) is None and torch.equal(weight(), kept)

    layer = answer(nn.Linear(48, 48).to(torch.bfloat16), r, alpha)
    fill(layer, g, 1 / 4)
    kept = weight()
    exact = kept.double() + alpha / r * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
    layer.merge()
    yield "the bfloat16 weight's dtype after merge()", str(weight().dtype)
    yield "merged in bfloat16: every weight is the bfloat16 number nearest to W + s·B·A", nearest(weight(), exact)
    if layer.merged:
        layer.unmerge()
    yield "unmerged in bfloat16: every weight is exactly what it was", torch.equal(weight(), kept)


def refuse_too_late(layer: Mergeable) -> None:
    if layer.merged:
        layer.write(layer.total())
    Mergeable.refuse_merged(layer)


def subtract(layer: Mergeable, factor: float = 1.0) -> None:
    layer.write(layer.base.weight.float() - factor * layer.delta())


def round_twice(layer: Mergeable) -> Tensor:
    return layer.base.weight.detach() + layer.scale() * (layer.lora_B.detach() @ layer.lora_A.detach())


def back_as_parameter(layer: Mergeable) -> None:
    layer.base.weight, layer.original = nn.Parameter(layer.original), None


def merge_and_wipe(layer: Mergeable) -> None:
    Mergeable.merge(layer)
    layer.lora_B.data.zero_()


check = Check(
    task="merge and unmerge: scaled, rounded once, never twice, and exactly undone",
    observe=observe,
    reference=Mergeable,
    second=BySwapping,
    misconceptions={
        "merged without the scale: the update is (α/r)·B·A": but(delta=lambda s: Mergeable.delta(s) / s.scale()),
        "the merged update is transposed: a weight is (out, in), so the update is lora_B @ lora_A": but(
            delta=lambda s: Mergeable.delta(s).T
        ),
        "merging replaced the weight by the update: add it to the weight": but(total=lambda s: s.delta()),
        "a second merge() added the update again: raise a ValueError when the layer is already merged": but(
            refuse_merged=nothing, backup=lambda s: s.original if s.merged else Mergeable.backup(s)
        ),
        "a second merge() was silently ignored: raise a ValueError, since a caller who merges twice has lost count": but(
            merge=lambda s: None if s.merged else Mergeable.merge(s)
        ),
        "a second merge() changed the weight before it was refused: check first, then change": but(refuse_merged=refuse_too_late),
        "merge() does not set the flag: the layer goes on adding the update to a weight that holds it already": but(
            mark=nothing, refuse_unmerged=nothing
        ),
        "the merged layer still adds the adapter's output: forward must give base(x) alone while merged": but(forward=LoRALinear.forward),
        "unmerge() forgets to clear the flag: the layer has lost its update": but(mark=lambda s, merged: setattr(s, "merged", True)),
        "unmerge() of a layer that is not merged took the update out anyway: raise a ValueError": but(
            refuse_unmerged=nothing, undo=lambda s: Mergeable.undo(s) if s.merged else subtract(s)
        ),
        "unmerge() of a layer that is not merged was silently ignored: raise a ValueError": but(
            unmerge=lambda s: Mergeable.unmerge(s) if s.merged else None
        ),
        "unmerge() takes out the update without its scale: the weight does not come back": but(undo=lambda s: subtract(s, 1 / s.scale())),
        "unmerge() adds the update once more instead of taking it out": but(undo=lambda s: subtract(s, -1)),
        "unmerge() subtracts the update: rounding does not cancel (bfloat16 keeps 8 bits), so the old weight does not come back; keep it "
        "aside in merge()": but(undo=subtract),
        "merged in 16 bits: s·B·A was rounded to bfloat16 before it was added, and the sum once more; add in float32, round once": but(
            total=round_twice
        ),
        "the update is computed once and kept: after more training merge() must use the factors as they are then": but(
            delta=functools.cache(Mergeable.delta)
        ),
        "unmerge() put the old weight back as a new nn.Parameter, which trains: give it requires_grad=False, or copy_ into the old "
        "one": but(undo=back_as_parameter),
        "the weight kept aside is no copy: it changed with the merge, so nothing is left to put back; keep a clone()": but(
            backup=lambda s: s.base.weight.data
        ),
        "the weight kept aside is that of the first merge(): the base may have changed since; keep it anew in every merge()": but(
            backup=functools.cache(Mergeable.backup)
        ),
        "merge() wiped lora_B: the factors must stay, else nothing can be unmerged or saved": but(merge=merge_and_wipe),
    },
)
