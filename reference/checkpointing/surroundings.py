"""What a computation reads beside its arguments: random numbers and autocast.

A dropout draws its mask from the generator's state, and autocast chooses the dtype of a product.
A second run that is to be the first one again needs both as they were. The rest of the program must
not notice: after the second run the generators stand where they stood before it.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


class Surroundings:
    """Generator states and autocast settings as they are now, for the devices of ``tensors``.

    Args:
        rng: keep the generators' states, the CPU's too. A state is a few kB and lies on the CPU.
    """

    def __init__(self, tensors: Iterable[Tensor], rng: bool = True):
        devices = {tensor.device for tensor in tensors}
        self.gpus = sorted(device.index for device in devices if device.type == "cuda")
        kinds = sorted({"cpu", *(device.type for device in devices)} - {"meta"})
        self.autocast = {kind: _autocast(kind) for kind in kinds}
        self.rng = rng
        if rng:
            self.cpu_state = torch.get_rng_state()
            self.gpu_states = [torch.cuda.get_rng_state(gpu) for gpu in self.gpus]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, all is as it was; afterwards, as it was before."""
        with ExitStack() as stack:
            if self.rng:
                stack.enter_context(torch.random.fork_rng(self.gpus))
                torch.set_rng_state(self.cpu_state)
                for gpu, state in zip(self.gpus, self.gpu_states, strict=True):
                    torch.cuda.set_rng_state(state, gpu)
            for kind, settings in self.autocast.items():
                stack.enter_context(torch.autocast(kind, **settings))
            yield


def _autocast(kind: str) -> dict[str, object]:
    return {
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
