"""VeRA, LoHa, LoKr and OFT in a whole model; ``merge_adapters`` (:mod:`reference.wrapped`) merges.

Every function takes ``target_modules`` by LoRA's rules, freezes all but what the method trains, and
returns the names of the layers. A :class:`ValueError` or :class:`TypeError` leaves the model as it
was.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reference.arguments import check_integer, check_number
from reference.relatives.updates import OFT, LoHa, LoKr, VeRA
from reference.wrapped import linear_targets, sizes, wrap

Targets = str | Iterable[str]


def inject_vera(
    model: nn.Module,
    r: int = 256,
    target_modules: Targets = "all-linear",
    key: int = 0,
    d_initial: float = 0.1,
) -> list[str]:
    """VeRA. A and B are drawn from ``key`` as peft draws them, so a file need not hold them.

    They are as large as the widest layer asks for; a narrower one uses their first columns or rows.
    """
    check_integer("r", r, 1)
    check_number("d_initial", d_initial)
    check_integer("key", key)
    targets = linear_targets(model, target_modules)
    both = [sizes(layer) for layer in targets.values()]
    A, B = projections(r, max(n_in for n_in, _ in both), max(n_out for _, n_out in both), key)
    device = next(iter(targets.values())).weight.device
    A, B = A.to(device), B.to(device)  # one pair for all layers
    return wrap(model, targets, lambda name, layer: VeRA(layer, A, B, d_initial, key))


def projections(r: int, n_in: int, n_out: int, key: int) -> tuple[Tensor, Tensor]:
    """VeRA's A (r, in) and B (out, r): uniform within ±√(6/fan-in), A first."""
    generator = torch.Generator().manual_seed(key)
    bound_A, bound_B = (math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(fan) for fan in (n_in, r))
    A = torch.empty(r, n_in).uniform_(-bound_A, bound_A, generator=generator)
    B = torch.empty(n_out, r).uniform_(-bound_B, bound_B, generator=generator)
    return A, B


def inject_loha(
    model: nn.Module, r: int, alpha: float, target_modules: Targets = "all-linear"
) -> list[str]:
    """LoHa: ΔW of rank up to r² from 2r·(in + out) numbers."""
    _check(r, alpha)
    targets = linear_targets(model, target_modules)
    return wrap(model, targets, lambda name, layer: LoHa(layer, r, alpha))


def inject_lokr(
    model: nn.Module, r: int, alpha: float, target_modules: Targets = "all-linear"
) -> list[str]:
    """LoKr: ΔW is a Kronecker product, of full rank if its factors are."""
    _check(r, alpha)
    targets = linear_targets(model, target_modules)
    return wrap(model, targets, lambda name, layer: LoKr(layer, r, alpha))


def inject_oft(
    model: nn.Module,
    block_size: int = 32,
    target_modules: Targets = "all-linear",
    exact: bool = False,
) -> list[str]:
    """OFT: each layer's inputs are rotated, block by block; lengths and angles of W's rows stay."""
    targets = linear_targets(model, target_modules)
    return wrap(model, targets, lambda name, layer: OFT(layer, block_size, exact))


def _check(r: int, alpha: float) -> None:
    check_integer("r", r, 1)
    check_number("alpha", alpha)
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
