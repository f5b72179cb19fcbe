"""Exercise 1: a batch in which each row has an adapter of its own, or none."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from course.checking import Check, Seen, but, raised

Adapters = dict[str, tuple[Tensor, Tensor, float]]


def places(rows: list[str | None], name: str) -> list[int]:
    return [i for i, each in enumerate(rows) if each == name]


def mixed_batch(
    x: Tensor,
    weight: Tensor,
    adapters: Adapters,
    rows: list[str | None],
    *,
    names=lambda rows, adapters: [name for name in dict.fromkeys(rows) if name is not None],
    at=places,
    where=places,
    scale=lambda s: s,
    join=torch.add,
    read=lambda x, y, chosen: x[chosen],
    bare=lambda y, rows, adapters, x: y,
    known=lambda name, adapters: adapters[name],
) -> Tensor:
    """The worked answer: one product with the base for all rows, then group by group."""
    y = x @ weight.T
    for name in names(rows, adapters):
        A, B, s = known(name, adapters)
        update = read(x, y, at(rows, name)) @ A.T @ B.T
        there = where(rows, name)
        y[there] = join(y[there], scale(s) * update)
    return bare(y, rows, adapters, x)


def by_updates(x: Tensor, weight: Tensor, adapters: Adapters, rows: list[str | None]) -> Tensor:
    """One product with the base, then each row's update by itself."""
    none = torch.zeros(1, x.shape[1]), torch.zeros(len(weight), 1), 0.0
    chosen = [none if name is None else adapters[name] for name in rows]
    updates = [s * (B @ (A @ row)) for (A, B, s), row in zip(chosen, x, strict=True)]
    return torch.nn.functional.linear(x, weight) + torch.stack(updates)


def by_groups(x: Tensor, weight: Tensor, adapters: Adapters, rows: list[str | None]) -> Tensor:
    """A layer's whole output, adapter by adapter."""
    y = x.new_empty(len(x), len(weight))
    for name in dict.fromkeys(rows):
        chosen = places(rows, name)
        y[chosen] = x[chosen] @ weight.T
        if name is not None:
            A, B, s = adapters[name]
            y[chosen] += s * (x[chosen] @ A.T @ B.T)
    return y


def by_rows(x: Tensor, weight: Tensor, adapters: Adapters, rows: list[str | None]) -> Tensor:
    """Each row by itself, its weight merged."""
    found = []
    for row, name in zip(x, rows, strict=True):
        W = weight
        if name is not None:
            A, B, s = adapters[name]
            W = weight + s * (B @ A)
        found.append(W @ row)
    return torch.stack(found)


def first_adapter(y: Tensor, rows: list[str | None], adapters: Adapters, x: Tensor) -> Tensor:
    """What an index of −1 or a default does: None becomes some adapter."""
    A, B, s = list(adapters.values())[-1]
    none = [i for i, name in enumerate(rows) if name is None]
    y[none] += s * (x[none] @ A.T @ B.T)
    return y


def in_sorted_order(y: Tensor, rows: list[str | None], adapters: Adapters, x: Tensor) -> Tensor:
    order = sorted(range(len(rows)), key=lambda i: (rows[i] is None, list(adapters).index(rows[i]) if rows[i] else 0))
    return y[order]


def everybody(x: Tensor, weight: Tensor, adapters: Adapters, rows: list[str | None]) -> Tensor:
    return x @ weight.T + sum(s * (x @ A.T @ B.T) for A, B, s in adapters.values())


def of_the_first(x: Tensor, weight: Tensor, adapters: Adapters, rows: list[str | None]) -> Tensor:
    name = next((name for name in rows if name is not None), None)
    if name is None:
        return x @ weight.T
    A, B, s = adapters[name]
    return x @ weight.T + s * (x @ A.T @ B.T)


def silently(name: str, adapters: Adapters) -> tuple[Tensor, Tensor, float]:
    A, B, _ = next(iter(adapters.values()))
    return adapters.get(name, (A, B, 0.0))


class Products(TorchDispatchMode):
    """Counts the operations that compute with a weight; copies and comparisons don't."""

    computing = frozenset("mm addmm mv addmv bmm baddbmm dot linear add sub mul".split())

    def __init__(self, weight: Tensor):
        super().__init__()
        self.place, self.count = weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.removeprefix("aten::") in self.computing:
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            self.count += any(each.untyped_storage().data_ptr() == self.place for each in given)
        return function(*args, **(kwargs or {}))


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    n_out, n_in = 6, 9
    weight = drawn(n_out, n_in)
    adapters = {name: (drawn(r, n_in), drawn(n_out, r), s) for name, r, s in (("sql", 2, 1.5), ("clinic", 4, 0.75), ("legal", 3, 2.0))}
    batches = (["clinic"] * 3, ["clinic", "sql", "legal", "sql", "clinic"], ["legal", None, "sql", None, None, "legal"])
    for rows in batches:
        x = drawn(len(rows), n_in)
        with Products(weight) as products:
            y = answer(x, weight, adapters, rows)
        yield f"the output for the rows {', '.join(map(str, rows))}", y
        yield f"products with the base's weight for the rows {', '.join(map(str, rows))}", max(1, products.count)  # 0: with a copy of it
    x = drawn(2, n_in)
    yield "the output for two rows without an adapter", answer(x, weight, adapters, [None, None])
    yield "a name that no adapter has", raised(answer, x, weight, adapters, ["sql", "nobody"]) or "was accepted"


check = Check(
    task="a mixed batch: every row through its own adapter, over one product with the base",
    observe=observe,
    reference=mixed_batch,
    second=by_updates,
    misconceptions={
        "every row went through the first row's adapter: the batch is mixed, so take the rows of each name for themselves": of_the_first,
        "every row got the updates of all adapters: only its own belongs to it": everybody,
        "the scale is missing: an update is s·B·(A·x)": but(scale=lambda s: 1.0),
        "the update took the place of the base's output: add it to W·x": but(join=lambda y, update: update),
        "rows of None went through an adapter (an index of −1 is the last one): they are the base alone": but(bare=first_adapter),
        "the rows come back sorted by adapter: each answer must be at the place of its request, or customers get each other's": but(
            bare=in_sorted_order
        ),
        "A was fed with the base's output: both ways read the same x": but(
            read=lambda x, y, chosen: torch.nn.functional.pad(y[chosen], (0, x.shape[1] - y.shape[1]))
        ),
        "only the first row of each adapter got its update: several rows may have one": but(
            at=lambda rows, name: places(rows, name)[:1], where=lambda rows, name: places(rows, name)[:1]
        ),
        "the base was multiplied adapter by adapter: each product reads all of W again; compute x @ weight.T once, for all rows": by_groups,
        "the base was multiplied row by row: each product reads all of W again; compute x @ weight.T once, for all rows": by_rows,
        "an unknown name was served as if it had no adapter: that hides a mistake from the customer; raise an error": but(known=silently),
    },
)
