"""A call whose tensors can be put in anew: the same function and arguments, with other tensors."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class Call:
    """``function(*args, **kwargs)`` without the tensors of its arguments, which are in ``tensors``.

    Tensors in tuples, lists and dictionaries are found too.
    """

    def __init__(self, function: Callable, args: tuple, kwargs: dict):
        leaves, self.form = tree_flatten((args, kwargs))
        self.function = function
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.others = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        self.tensors: list[Tensor] = [leaves[i] for i in self.places]

    def without_tensors(self) -> "Call":
        """The call as it is kept: who keeps the tensors gives them to :meth:`run`."""
        self.tensors = []
        return self

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """What the function returns for these tensors in place of the first ones."""
        leaves = self.others | dict(zip(self.places, tensors, strict=True))
        args, kwargs = tree_unflatten([leaves[i] for i in range(len(leaves))], self.form)
        return self.function(*args, **kwargs)

    def run_flat(self, tensors: Sequence[Tensor]) -> tuple[list, TreeSpec]:
        """The same as a list, and the form to put it back into."""
        return tree_flatten(self.run(tensors))


def as_leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views that begin a graph of their own: a backward ends at them."""
    return [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
