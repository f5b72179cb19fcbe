"""A training step that does not wait for launches: recorded in a CUDA graph, and compiled layers.

Every operation on a GPU is a launch, and the CPU needs some microseconds for each: Python,
dispatch, the driver. A QLoRA step of a 7B model makes some tens of thousands of them. With many
tokens the GPU is busy with one while the CPU prepares the next, and nothing is lost; with few
tokens the GPU is done first and waits, and the step takes as long as the launches, however fast the
kernels are.

:class:`GraphedStep` records forward, backward and optimizer once, as a CUDA graph, and then replays
all launches with a single one. The recording holds addresses, not values. So it needs

- static shapes: as many rows and tokens every time;
- static addresses: the ids are copied into a tensor that stays, and parameters, gradients and
  Adam's state stay where they are;
- no waiting: nothing may ask the GPU for a number (``.item()``, a boolean mask as an index) or copy
  from ordinary CPU memory;
- an optimizer that keeps its step count and rate on the GPU: ``capturable=True``.

It costs a pool of memory that stays reserved for the graph: what the step needs at its peak, which
nobody else can use between steps.

:func:`compile_layers` makes fewer launches instead of cheaper ones: torch.compile joins the
element-wise operations of a layer into few kernels, which then also move fewer bytes. Both go
together.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

WARMUP = 3
Loss = Callable[[nn.Module, Tensor], Tensor]


def capturable_adamw(parameters: Iterable[nn.Parameter], lr: float, **options) -> AdamW:
    """AdamW that a CUDA graph can record: one fused kernel, its step count and rate on the device.

    ``optimizer.param_groups[0]["lr"].fill_(...)`` changes the rate of a step that is recorded
    already; assigning another number does not. On a CPU it is the ordinary AdamW.
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("parameters is empty: nothing would be trained")
    if not parameters[0].is_cuda:
        return AdamW(parameters, lr=lr, **options)
    rate = torch.tensor(lr, device=parameters[0].device)
    return AdamW(parameters, lr=rate, fused=True, capturable=True, **options)


class GraphedStep:
    """A step of training, ``step(ids) -> loss``: on CUDA replayed from a graph, else as usual.

    Args:
        model: its parameters must stay where they are as long as this is used; loading values into
            them in place is fine.
        optimizer: of the trained parameters. On CUDA ``capturable``: see :func:`capturable_adamw`.
        loss: from the model and ids to a number, such as ``Llama.loss``.
        example_ids: a batch like those to come: shape, dtype and device count. Nothing is learned
            from it.

    Attributes:
        graph: the recording; None on a CPU.

    Raises:
        ValueError: on CUDA, an optimizer that can't be recorded.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, loss: Loss, example_ids: Tensor):
        self.model, self.optimizer, self.loss, self.graph = model, optimizer, loss, None
        self.ids = example_ids.clone()  # the address that the graph reads
        if not example_ids.is_cuda:
            return
        if not all(group.get("capturable") for group in optimizer.param_groups):
            remedy = "which a graph can't record: make it with capturable=True"
            raise ValueError(f"the optimizer keeps numbers on the CPU, {remedy}")
        device = example_ids.device
        stream = torch.cuda.Stream(device)  # recording is not allowed on the default stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._warm_up()
            # So that gradients are made, and have their address, in the graph's own pool.
            optimizer.zero_grad(set_to_none=True)
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self._result = self._run()
        torch.cuda.current_stream(device).wait_stream(stream)

    def step(self, ids: Tensor) -> Tensor:
        """Train on ``ids``, (rows, length) as in the example.

        Returns:
            The loss before the update, without waiting for it. ``parameter.grad`` then holds this
            step's gradients.

        Raises:
            ValueError: another shape or dtype than the example's.
        """
        if ids.shape != self.ids.shape or ids.dtype != self.ids.dtype:
            wanted = f"{tuple(self.ids.shape)} of {self.ids.dtype}, as the step was recorded with"
            raise ValueError(f"ids must be {wanted}, got {tuple(ids.shape)} of {ids.dtype}")
        self.ids.copy_(ids, non_blocking=True)
        if self.graph is None:
            self.optimizer.zero_grad(set_to_none=True)
            return self._run()
        self.graph.replay()
        return self._result.clone()  # the next replay writes into the old one

    def _run(self) -> Tensor:
        loss = self.loss(self.model, self.ids)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _warm_up(self) -> None:
        """Steps that let kernels be compiled, libraries take their workspaces, Adam make its state.

        Then all is as before.
        """
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        values = [p.detach().cpu() for p in trained]  # put aside where it adds nothing to the peak
        state = {
            p: {k: v.cpu() for k, v in self.optimizer.state[p].items() if isinstance(v, Tensor)}
            for p in trained
        }
        for _ in range(WARMUP):
            self.optimizer.zero_grad(set_to_none=True)
            self._run()
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)
                old = state[parameter]
                for key, tensor in self.optimizer.state[parameter].items():
                    if isinstance(tensor, Tensor):  # in place: the graph will know this address
                        tensor.copy_(old[key]) if key in old else tensor.zero_()  # new: from zero


def compile_layers(model: nn.Module, backend: str | Callable = "inductor") -> int:
    """torch.compile each decoder layer of a :class:`reference.llama.Llama`, in place.

    Layers share their compiled code: it is made twice, for the first, whose input needs no
    gradient, and for all others. What is between the layers, checkpointing and the loss, stays as
    it is. For every new shape of the batch the code is made again.

    Returns:
        How many layers there are.
    """
    layers = model.model.layers
    for layer in layers:
        layer.compile(backend=backend, fullgraph=True, dynamic=False)
    return len(layers)
