"""What a chain of operators moves through memory: each reads its arguments there and writes its result there.

A GPU's kernel can do no better than move its inputs and outputs once. Code that is made of many operators also moves everything in between,
and nothing in its numbers shows it. Counted here by operators, so that it is the same on every device; what a cache saves is not seen.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MovedBytes(TorchDispatchMode):
    """``with MovedBytes() as moved: ...``; then ``moved.bytes`` were read and written."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kind = function.overloadpacket
        if not function.is_view and kind not in (torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like):
            read = args[1:] if kind is torch.ops.aten.copy_ else args  # a copy's target is only written
            self.bytes += sum(tensor.nbytes for tensor in tree_iter((read, kwargs, result)) if isinstance(tensor, Tensor))
        return result
