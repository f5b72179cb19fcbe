"""The update is (α/r)·B·A; the merge added B·A.

A test with α = r, where the scale is 1, does not see it. Merged and unmerged outputs must be compared at another scale, with B not zero.
"""

import copy
import random

import torch
from torch import Tensor, nn

from course.cases import merged_is_worse as script
from course.cases.merged_is_worse import LoRALinear
from course.checking import Check, NotYet, Seen


def merged(layer: LoRALinear) -> nn.Linear:
    """The worked answer."""
    linear = copy.deepcopy(layer.base)
    with torch.no_grad():
        linear.weight += layer.scale * (layer.B @ layer.A)
    return linear


def by_unit_vectors(layer: LoRALinear) -> nn.Linear:
    """The weight read off from what the layer does with each unit vector."""
    base = layer.base
    linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
    with torch.no_grad():
        constant = layer(torch.zeros(1, base.in_features))
        linear.weight.copy_((layer(torch.eye(base.in_features)) - constant).T)
        if base.bias is not None:
            linear.bias.copy_(constant[0])
    return linear


def scale_taken_away(layer: LoRALinear) -> nn.Linear:
    layer.scale = 1.0
    return script.merged(layer)


def scaled_twice(layer: LoRALinear) -> nn.Linear:
    linear = copy.deepcopy(layer.base)
    linear.weight.data += (layer.scale * layer.B.detach()) @ (layer.scale * layer.A.detach())
    return linear


def into_the_base(layer: LoRALinear) -> nn.Linear:
    layer.base.weight.data += layer.scale * (layer.B.detach() @ layer.A.detach())
    return layer.base


def not_merged(layer: LoRALinear) -> nn.Module:
    return layer


def output_scaled(layer: LoRALinear) -> nn.Linear:
    linear = script.merged(layer)
    linear.weight.data *= layer.scale
    return linear


def observe(answer, seed: int) -> Seen:
    g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    for bias in (True, False):
        torch.manual_seed(seed)
        n, m, r = rng.randrange(5, 9), rng.randrange(5, 9), rng.randrange(1, 4)
        layer, x = LoRALinear(nn.Linear(n, m, bias=bias), r=r, alpha=r * rng.choice((0.5, 2.0, 4.0))), torch.randn(7, n, generator=g)
        nn.init.normal_(layer.B)
        before: Tensor = layer(x).detach()
        found = answer(layer)
        if not isinstance(found, nn.Module):
            raise NotYet(f"return a linear layer, not {type(found).__name__}")
        yield f"what is returned, {bias=}", type(found).__name__
        yield f"what it gives for x, {bias=}", found(x).detach()
        yield f"what the unmerged layer gives afterwards, {bias=}", layer(x).detach()
        yield f"the unmerged layer gives what it gave before, {bias=}", torch.allclose(layer(x), before)


check = Check(
    task="a merged layer that computes what the unmerged one does",
    observe=observe,
    reference=merged,
    second=by_unit_vectors,
    misconceptions={
        "the scale is missing: the layer adds (α/r)·B·A, so the merged weight is W + (α/r)·B·A": script.merged,
        "the scale was set to 1 so that both sides agree: now the unmerged layer is wrong as well; leave it as it was trained and scale "
        "the update": scale_taken_away,
        "the scale is in both factors, so the update has it squared: once is enough": scaled_twice,
        "the update went into the layer's own weight, so the unmerged layer now adds it a second time: work on a copy": into_the_base,
        "nothing is merged: the same layer came back, and its two products are what merging was to save": not_merged,
        "the whole weight was scaled, the base's share too: only the update has a scale": output_scaled,
    },
)
