"""PyTorch's ``fully_shard``, for integer parameters in torch 2.11 and 2.12 too."""

from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh

SHARES_KEEP_THEIR_FLAG = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


class _Namespace:
    """``torch.nn``, whose ``Parameter`` asks for gradients only of what can have them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)

    @staticmethod
    def Parameter(data: torch.Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        wanted = data.is_floating_point() if requires_grad is None else requires_grad
        return nn.Parameter(data, wanted)


def fully_shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """``torch.distributed.fsdp.fully_shard``.

    Older versions make each share a parameter that asks for gradients, and give it the flag of the
    whole one afterwards. Integers can't ask, so there they would refuse a model in four bits.
    """
    if SHARES_KEEP_THEIR_FLAG:
        return fsdp.fully_shard(module, mesh=mesh)
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    with patch.object(_fsdp_param, "nn", _Namespace()):
        return fsdp.fully_shard(module, mesh=mesh)
