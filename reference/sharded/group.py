"""The processes that train together: how they meet, divide a batch, and learn that one is gone.

``torchrun --nproc-per-node R script.py`` starts R copies of a script, one for each GPU, and tells
each its number (its *rank*) in the environment. Without torchrun there is one, of rank 0.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from reference.arguments import check_number


@contextmanager
def processes(timeout_seconds: float = 60, device: str | None = None) -> Iterator[DeviceMesh]:
    """Join the processes that torchrun started, and leave them at the end: ``with processes() as``.

    Args:
        timeout_seconds: a message that is not answered for so long is an error. On GPUs the process
            then ends itself: an operation that waits there can't be called back.
        device: "cuda" (through NCCL) or "cpu" (through gloo); default: "cuda" where there is one.

    Yields:
        The ranks as a mesh of one axis; ``mesh.get_local_rank()`` is this one's, ``mesh.size()``
        how many there are. On GPUs each has its own, which is torch's current device.

    Raises:
        ValueError: more processes on this machine than it has GPUs.
        RuntimeError: inside: another rank ended or does not answer. Its own error says why.
    """
    check_number("timeout_seconds", timeout_seconds, 1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        local, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= cards:
            remedy = f"start at most {cards} processes a machine: torchrun --nproc-per-node {cards}"
            raise ValueError(f"there is no GPU {local} for rank {rank}; {remedy}")
        torch.cuda.set_device(local)
    how = {"backend": {"cuda": "nccl", "cpu": "gloo"}[device]}
    how["timeout"] = timedelta(seconds=timeout_seconds)
    if "RANK" not in os.environ:
        how |= {"store": dist.HashStore(), "rank": rank, "world_size": size}
    try:
        dist.init_process_group(**how)
        yield init_device_mesh(device, (size,))
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        words = f"did not answer within {timeout_seconds:g} s, or has ended"
        remedy = "look for the first error of another rank: that is the cause"
        raise RuntimeError(f"rank {rank} of {size}: another rank {words}; {remedy}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_lost(error: RuntimeError) -> bool:
    """Whether it comes from a connection; gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def on_first(work: Callable[[], Any]) -> Any:
    """Do ``work`` on rank 0 alone, while the others wait; its result, or its error, on all of them.

    An error that one rank keeps to itself leaves the others waiting for its next message. The
    result is pickled on its way: keep it small, and no tensor.
    """
    told = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except Exception as error:
            told[1] = error
    failed = told[1]
    told[1] = failed and (type(failed).__name__, str(failed))
    dist.broadcast_object_list(told, 0)
    if failed:
        raise failed
    if told[1]:
        raise RuntimeError("rank 0 failed: {}: {}".format(*told[1]))
    return told[0]


def share(rows: Tensor, mesh: DeviceMesh) -> tuple[Tensor, float]:
    """This rank's rows of a batch that all ranks know, and the factor of its mean loss.

    The engine takes the mean of the ranks' gradients. Where they have unequal numbers of rows that
    is not the mean over the batch; with this factor on each loss it is, if every row counts alike:

        1/R · Σ_ranks (R · mine/all) · mean over mine  =  mean over all

    Args:
        rows: (rows, ...), on every rank the same.

    Raises:
        ValueError: there are fewer rows than ranks.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    if len(rows) < size:
        problem = f"a batch of {len(rows)} rows leaves some of {size} ranks without one"
        raise ValueError(f"{problem}: give it at least {size}")
    mine = rows[rank::size]
    return mine, len(mine) * size / len(rows)
