"""One frozen layer, many adapters: every row of a batch through its own.

    y_i = W·x_i + b + s_a·B_a·(A_a·x_i)        a: the adapter of row i, or none

The product with W is one for all rows, and it is the expensive one: a hundred fine-tuned models
cost one base and a hundred times two thin factors. So an adapter is not merged here. Merged, it
would be free, but W would belong to one customer: the next request would have to wait until it was
taken out again, and no two could be in one batch.

    layer = MultiLoRALinear(base)                 # nn.Linear, NF4Linear: whatever is linear
    layer.add("sql", Factors(A, B, scaling))
    layer.add("clinic", other)                    # of another rank
    layer.select("sql")                           # all rows: switching is this assignment
    layer.select(["sql", None, "clinic"])         # row by row; None is the base alone
    y = layer(x)                                  # x: (3, ..., in)

A selection holds the factors, not the names. ``replace`` gives a name to new factors; what was
selected before goes on with the old ones to its end, and the next ``select`` finds the new.

In a model, :class:`reference.multi_lora.MultiLoRA` does this for all layers. Batching rows of
different adapters: Chen et al. 2023, "Punica"; Sheng et al. 2023, "S-LoRA".
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.lora import generation
from reference.lora.base import Wrapper
from reference.lora.mixed import add_update
from reference.lora.weights import check_linear, check_weight, describe
from reference.multi_lora.factors import Factors, common_dtype
from reference.multi_lora.on_gpu import kernels, kernels_for
from reference.multi_lora.route import Route, chosen, known


class MultiLoRALinear(nn.Module):
    """y = base(x) + each row's own update. It serves; it does not train.

    Args:
        base: a linear layer; frozen here. Its weight may be packed: only its forward reads it.

    Attributes:
        adapters: name -> :class:`Factors`. They are no parameters, and not in the ``state_dict``.

    Raises:
        TypeError: ``base`` is not linear.
        ValueError: it is an adapter's layer itself, or its weight is computed or has no values.
    """

    def __init__(self, base: nn.Module):
        if isinstance(base, (Wrapper, MultiLoRALinear)):
            name = type(base).__name__
            raise ValueError(f"base is wrapped already, in a {name}: merge it first, or use it")
        check_linear(base, 1, "kaiming")
        check_weight(base)
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters: dict[str, Factors] = {}
        self.use(None, [])
        self.train(base.training)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # not its own, so the base's: its weight, its sizes
            if name == "base":
                raise
            return getattr(self.base, name)

    # ---- adapters come and go

    def add(self, name: str, factors: Factors) -> None:
        """Serve ``factors`` under a new name.

        Raises:
            ValueError: the name is taken, or the factors are of other sizes or on another device.
            TypeError: ``factors`` is something else.
        """
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r}: replace() it, or remove() it first")
        self.check(factors)
        self.adapters[name] = factors

    def replace(self, name: str, factors: Factors) -> None:
        """From the next selection on, ``name`` means these factors. Their rank may be another."""
        known(name, self.adapters)
        self.check(factors)
        self.adapters[name] = factors

    def remove(self, name: str) -> None:
        """Forget an adapter; what has selected it keeps it until its next selection."""
        del self.adapters[known(name, self.adapters)]

    def check(self, factors: Factors, anywhere: bool = False) -> None:
        """Raise unless the factors fit this layer.

        Args:
            anywhere: they may be on another device, from which they will be copied.
        """
        if not isinstance(factors, Factors):
            raise TypeError(f"factors must be Factors, got {type(factors).__name__}")
        sizes = self.out_features, self.in_features
        if factors.sizes != sizes:
            words = f"the factors are for a layer of sizes (out, in) = {factors.sizes}"
            raise ValueError(f"{words}; {describe(self.base)} has {sizes}")
        if not anywhere and factors.A.device != self.base.weight.device:
            devices = f"the factors are on {factors.A.device}, the base on"
            raise ValueError(f"{devices} {self.base.weight.device}: factors.to(device)")

    # ---- which one a row uses

    def select(self, rows: str | Sequence[str | None] | None) -> None:
        """Choose for the batches to come: a name for all rows, one name or None for each, or None.

        Raises:
            ValueError: a name is unknown. The selection is then as it was.
        """
        if rows is None:
            return self.use(None, [])
        if isinstance(rows, str):
            route = Route.same(self.adapters[known(rows, self.adapters)])
        else:
            route = Route(chosen(rows, self.adapters))
        self.use(route, route.distinct)

    def use(
        self, route: Route | None, factors: Sequence[Factors | None], table: object = None
    ) -> None:
        """The same with the groups at hand, and the factors of each; None leaves its rows alone.

        Args:
            table: what the kernels know of ``factors``, if it was made already.
        """
        there = [f for f in factors if f is not None]
        self._route = route if there else None
        self._factors, self._table = list(factors), table
        self._dtype = common_dtype(factors)

    def use_table(self, route: object, table: object) -> None:
        """The same for a CUDA graph: its kernels read adapters from a table and rows from a plan,
        whatever these hold at a replay (:mod:`reference.multi_lora.serving.graphs`)."""
        self._route, self._factors, self._table, self._dtype = route, [], table, table.dtype

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, ..., in), or of any shape where one adapter is selected for all."""
        if self._route is None:
            return self.base(x)
        self._route.check(len(x) if x.dim() > 1 else 1)
        f = self._factors[0] if self._route.whole and generation.plain(self.base, x) else None
        if f is not None and generation.takes_kernels(x, f.A, f.B):
            return generation.forward(self.base, x, f.A, f.B, f.scaling)
        y = self.base(x)
        if self._takes_kernels(x, y):
            return self._with_kernels(y, x)
        if self._route.whole:
            return updated(y, x, self._factors[0])
        for factors, rows in zip(self._factors, self._route.indices(x.device), strict=True):
            if factors is not None:
                y.index_copy_(0, rows, updated(y[rows], x[rows], factors))
        return y

    def _takes_kernels(self, x: Tensor, y: Tensor) -> bool:
        """Whether :mod:`reference.kernels.multi_lora` computes it: half types, on CUDA."""
        if not (kernels_for(x.device) and x.dtype in generation.HALF) or torch.is_grad_enabled():
            return False
        fits = y.dtype == x.dtype and self._dtype in (x.dtype, torch.float32)
        return fits and x.dim() > 1 and x.numel() > 0

    def _with_kernels(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.contiguous()
        if self._table is None:
            self._table = kernels().tables([self._factors], x.device)[0]
        flat = x.reshape(-1, self.in_features)  # (tokens, in)
        plan = self._route.plan(len(x), len(flat) // len(x), x.device)
        kernels().add_updates(y.view(-1, self.out_features), flat, self._table, plan)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MultiLoRALinear":
        """``to`` moves the factors along and leaves their dtype; a selection ends."""
        super()._apply(fn, recurse)
        device = self.base.weight.device
        self.adapters = {name: factors.to(device) for name, factors in self.adapters.items()}
        self.use(None, [])
        return self

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name} (r = {f.r})" for name, f in list(self.adapters.items())[:6])
        return f"{len(self.adapters)} adapters: {ranks or 'none'}"


def updated(y: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """y + s·B·(A·x), as one LoRA layer computes it: y (..., out), x (..., in)."""
    A, B, s = factors.A, factors.B, factors.scaling
    if x.dtype.itemsize < A.dtype.itemsize:
        return add_update(y, x, A, B, s)
    return (y + F.linear(F.linear(x.to(A.dtype), A), B) * s).to(y.dtype)
