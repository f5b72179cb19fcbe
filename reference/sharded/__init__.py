"""QLoRA over several GPUs, by PyTorch's own engine: begin at :mod:`reference.sharded.shard`."""

from reference.sharded.files import load_state, save_adapter, save_state
from reference.sharded.group import on_first, processes, share
from reference.sharded.layer import RowwiseNF4Linear
from reference.sharded.shard import quantize_and_shard

__all__ = [
    "RowwiseNF4Linear",
    "load_state",
    "on_first",
    "processes",
    "quantize_and_shard",
    "save_adapter",
    "save_state",
    "share",
]
