"""One layer's gradients of each row, from its input a and the gradient s of its output.

For a linear layer that sees one vector a row the square factorises,

    Σ_k (∂/∂W)² = (Σ_k s²) · (a²)ᵀ

and no gradient of W is ever formed (so does BackPACK, Dangel et al. 2020). Where a row passes the
layer at many positions, the gradient is a sum over them, whose square has a term for each pair:

    Σ_k (∂/∂W_oi)² = Σ_pq (Σ_k s_kpo s_kqo) a_pi a_qi

With many k and few positions that is far less work than forming every gradient, and less memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap


class Call(NamedTuple):
    """One call of a module that owns trained parameters."""

    module: nn.Module
    trained: dict[str, str]  # the parameter's name in the module -> its name in the model
    arguments: tuple[Tensor, ...]
    output: Tensor


def sum_of_squares(g: Tensor) -> Tensor:
    """Over the first two axes, in one pass."""
    return torch.linalg.vector_norm(g, dim=(0, 1)).square()


def _by_positions(call: Call, s: Tensor) -> tuple[Tensor, Tensor]:
    """s (k, rows, positions, out) and the input (rows, positions, in) of a linear layer."""
    a, (k, rows, *_, out) = call.arguments[0], s.shape
    return s.reshape(k, rows, -1, out), a.reshape(rows, -1, a.shape[-1])


def sums_of_linear(call: Call, s: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name -> Σ over k and rows of the gradient, which is never formed row by row."""
    s, a = _by_positions(call, s)
    for local, name in call.trained.items():
        yield name, s.sum((0, 1, 2)) if local == "bias" else torch.einsum("knpo,npi->oi", s, a)


def squares_of_linear(call: Call, s: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Name -> Σ over k and rows of the squared gradient."""
    s, a = _by_positions(call, s)
    k, positions, width = s.shape[0], a.shape[1], a.shape[2]
    for local, name in call.trained.items():
        if local == "bias":
            yield name, sum_of_squares(s.sum(2))
        elif positions == 1:
            over_k = s[0].square() if k == 1 else torch.linalg.vector_norm(s, dim=0).square()
            yield name, over_k.flatten(0, 1).T @ a.square().flatten(0, 1)
        elif positions * (k + width) < 2 * k * width:
            pairs = torch.einsum("knpo,knqo->nopq", s, s)
            yield name, torch.einsum("nopi,npi->oi", torch.matmul(pairs, a[:, None]), a)
        else:
            yield name, sum_of_squares(torch.einsum("knpo,npi->knoi", s, a))


def gradients_of(call: Call, s: Tensor) -> dict[str, Tensor]:
    """Local name -> gradients (k, rows, *shape), from s, (k, rows, ...): those of the output."""
    module = call.module
    if type(module) is nn.Linear:
        s, a = _by_positions(call, s)
        found = {"bias": s.sum(2), "weight": torch.einsum("knpo,npi->knoi", s, a)}
        return {local: found[local] for local in call.trained}
    own = {local: getattr(module, local).detach() for local in call.trained}

    def row(arguments: tuple[Tensor, ...], columns: Tensor) -> dict[str, Tensor]:
        alone = tuple(each[None] for each in arguments)
        _, back = vjp(lambda p: functional_call(module, p, alone)[0], own)
        return vmap(back)(columns)[0]

    return vmap(row, in_dims=(0, 1), out_dims=1)(call.arguments, s)
