"""Squares of per-row gradients, without a pass for each row.

A row's gradient of a layer's parameters needs only what went into the layer and the gradient of
what came out. One forward pass keeps the inputs. One backward pass, vectorised over the k
gradients that are asked of every row, gives the others, of shape (k, rows, ...): rows do not mix,
so all rows go at once. What a layer makes of the two is in :mod:`reference.ewc.layers`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from reference.ewc.layers import (
    Call,
    gradients_of,
    squares_of_linear,
    sum_of_squares,
    sums_of_linear,
)


class Squares:
    """Adds up squared per-row gradients of ``trained``, the parameters of ``model``, by name.

    ``check``: compare the first batch's gradient with autograd's own, one more backward pass.
    """

    def __init__(
        self, model: nn.Module, trained: Mapping[str, nn.Parameter], check: bool = True
    ) -> None:
        self.trained = dict(trained)
        of = {id(p): name for name, p in trained.items()}
        owned = {
            module: {
                local: of[id(p)]
                for local, p in module.named_parameters(recurse=False)
                if id(p) in of
            }
            for module in model.modules()
        }
        self.owners = {module: names for module, names in owned.items() if names}
        self.calls: list[Call] = []
        self.proven = not check

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what goes in and out of the modules that own trained parameters."""
        self.calls = []

        def note(module: nn.Module, arguments: tuple, settings: dict, output: object) -> None:
            if (
                not isinstance(output, Tensor)
                or settings
                or not all(isinstance(a, Tensor) for a in arguments)
            ):
                kind = type(module).__name__
                raise ValueError(f"model: a {kind} with trained parameters must map tensors to one")
            kept = tuple(each.detach() for each in arguments)
            self.calls.append(Call(module, self.owners[module], kept, output))

        hooks = [m.register_forward_hook(note, with_kwargs=True) for m in self.owners]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no vectorised backward
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, total: dict[str, Tensor], outputs: Tensor, columns: Tensor) -> None:
        """total += Σ over k and rows of (∂⟨outputs, column⟩ / ∂θ)²; columns (k, *outputs.shape)."""
        if not self.proven:
            self._prove(outputs)
        into = [call.output for call in self.calls]
        back = partial(torch.autograd.grad, outputs, into, retain_graph=True, allow_unused=True)
        alone = len(columns) == 1  # nothing to vectorise over
        signals = _one(back(columns[0])) if alone else _vectorised(back, columns)
        self._each(signals, len(outputs), lambda name, g: total[name].add_(g), squared=True)

    def add_whole(
        self, total: dict[str, Tensor], outputs: Tensor, column: Tensor, times: int
    ) -> None:
        """total += times · (∂⟨outputs, column⟩ / ∂θ)², of all rows together."""
        found = torch.autograd.grad(outputs, list(self.trained.values()), column, allow_unused=True)
        for name, g in zip(self.trained, found, strict=True):
            if g is not None:
                total[name] += times * g.square()

    def _each(
        self,
        signals: tuple[Tensor | None, ...],
        rows: int,
        take: Callable[[str, Tensor], object],
        squared: bool,
    ) -> None:
        """Hand on, by parameter, the sum over k and rows of the gradients or of their squares.

        ``signals``: the gradients of every call's output, each (k, rows, ...).
        """
        uses = Counter(name for call in self.calls for name in call.trained.values())
        left = uses.copy()
        waiting: dict[str, Tensor] = {}
        for call, s in zip(self.calls, signals, strict=True):  # s: (k, rows, ...)
            if s is not None and s.shape[1] != rows:
                kind, seen = type(call.module).__name__, s.shape[1]
                raise ValueError(
                    f"model: a {kind} sees {seen} rows where the batch has {rows}, so that a row's "
                    "gradient can't be told apart: pass batches of one row"
                )
            alone = all(uses[name] == 1 for name in call.trained.values())
            if s is not None and alone and type(call.module) is nn.Linear:
                for name, value in (squares_of_linear if squared else sums_of_linear)(call, s):
                    take(name, value)
                continue
            gradients = {} if s is None else gradients_of(call, s)
            for local, name in call.trained.items():
                left[name] -= 1
                if local in gradients:  # tied weights add up before the square
                    waiting[name] = gradients[local] + waiting.get(name, 0)
                if name in waiting and left[name] == 0:
                    g = waiting.pop(name)  # (k, rows, *shape)
                    take(name, sum_of_squares(g) if squared else g.sum((0, 1)))

    def _prove(self, outputs: Tensor) -> None:
        """Once: what the layers' gradients add up to must be autograd's own gradient."""
        column, into = torch.randn_like(outputs), [call.output for call in self.calls]
        both = torch.autograd.grad(
            outputs,
            into + list(self.trained.values()),
            column,
            retain_graph=True,
            allow_unused=True,
        )
        signals, own = both[: len(into)], both[len(into) :]
        found: dict[str, Tensor] = {}
        self._each(_one(signals), len(outputs), found.__setitem__, squared=False)
        all_of_it = torch.stack([g.norm() for g in own if g is not None]).norm()
        for name, g in zip(self.trained, own, strict=True):
            g = torch.zeros_like(self.trained[name]) if g is None else g
            apart = (found.get(name, torch.zeros_like(g)) - g).norm()
            if apart > 1e-2 * g.norm() + 1e-5 * all_of_it:  # some gradients are zero but for noise
                raise ValueError(
                    f"model: the gradient of {name!r} comes from outside of its module's forward"
                )
        self.proven = True


def _one(signals: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients (rows, ...) as (1, rows, ...)."""
    return tuple(None if s is None else s[None] for s in signals)


def _vectorised(
    back: Callable[[Tensor], tuple[Tensor | None, ...]], columns: Tensor
) -> tuple[Tensor | None, ...]:
    """``back`` of all columns at once.

    ``is_grads_batched`` does the same through an older vmap, which goes through softmax's and
    SiLU's backward column by column.
    """
    there: list[bool] = []

    def known(column: Tensor) -> tuple[Tensor, ...]:  # vmap takes tensors only
        found = back(column)
        there[:] = [each is not None for each in found]
        return tuple(each for each in found if each is not None)

    found = iter(vmap(known)(columns))
    return tuple(next(found) if is_there else None for is_there in there)
