"""What one of several processes does in the tests of sharded training: ``python -m tests.sharded_worker FOLDER SCENARIO``."""

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reference.llama import Llama
from reference.model_shapes import ModelShape
from reference.sharded import load_state, on_first, processes, quantize_and_shard, save_adapter, save_state, share

# 331 words are odd, 96 rows are no multiple of 64, and the 3 rows of A divide by neither 2 nor 4 processes.
SHAPE = ModelShape("odd", hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=331)
RANK, ALPHA, BLOCK, RATE = 3, 8, 32, 1e-2
ROWS, TOKENS, BEFORE, AFTER = 5, 16, 4, 2
STATE, GATHERED = "state.safetensors", "codes.safetensors"


with torch.device("meta"):
    SHAPES = {name: p.shape for name, p in Llama(SHAPE).named_parameters()}


def weights(name: str) -> Tensor:
    """A parameter's value, the same in every process."""
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(sum(name.encode()))) / 8


def batch(step: int) -> Tensor:
    """Two batches in turn, so that there is something to learn."""
    return torch.randint(SHAPE.vocab, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step % 2))


class OddLayer(nn.Module):
    """33 rows and a bias."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 33)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.pad(self.up(x), (0, 31))


class OddModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(OddLayer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def odd_weights(name: str) -> Tensor:
    shape = (33, 64) if name.endswith("weight") else (33,)
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def sharded_llama(mesh, read=weights) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(mesh.get_local_rank())  # only what rank 0 draws counts
    with torch.device("meta"):
        model = Llama(SHAPE)
    quantize_and_shard(model, read, mesh, RANK, ALPHA, block_size=BLOCK, compute_dtype=torch.float32)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def train(model: nn.Module, adam: torch.optim.Optimizer, mesh, steps: range) -> list[float]:
    """The loss over the whole batch of each step."""
    losses = []
    for step in steps:
        rows, factor = share(batch(step), mesh)
        loss = model.loss(rows) * factor
        loss.backward()
        adam.step()
        adam.zero_grad()
        value = loss.detach().clone()
        dist.all_reduce(value)
        losses.append(value.item() / mesh.size())
    return losses


def live_bytes() -> int:
    """Of all storages that Python can reach."""
    found = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter) and not each.is_meta:
            storage = each.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


class Received:
    """Bytes that come from other processes while the engine gathers and scatters."""

    def __init__(self):
        self.bytes = 0
        self.gather, self.scatter = dist.all_gather_single, dist.reduce_scatter_single
        dist.all_gather_single, dist.reduce_scatter_single = self._gathered, self._scattered

    def _gathered(self, output: Tensor, part: Tensor, **options):
        self.bytes += output.nbytes - part.nbytes
        return self.gather(output, part, **options)

    def _scattered(self, output: Tensor, input: Tensor, **options):
        self.bytes += input.nbytes - output.nbytes
        return self.scatter(output, input, **options)


def error_of(work) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def odd_rows(mesh) -> dict:
    """Gradients of an adapter of rank 1, so that all processes but one hold nothing of A, over float32 scales."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = OddModel()
    how = {"layers": "layers", "double_quant": False, "compute_dtype": torch.float32}
    names = quantize_and_shard(model, odd_weights, mesh, 1, 4, ["up"], **how)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.fill_(0.5)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(7))
    rows, factor = share(x, mesh)
    (model(rows).square().mean() * factor).backward()
    grads = {name: p.grad.full_tensor().tolist() for name, p in model.named_parameters() if p.requires_grad}
    rows_here = [p.to_local().shape[0] for name, p in model.named_parameters() if name.endswith("up.base.weight")]
    return {"names": names, "grads": grads, "rows_here": rows_here}


def two(mesh, folder: Path) -> None:
    """Load, train, save; fail on rank 0."""
    first, seen = mesh.get_local_rank() == 0, {}
    base = live_bytes()

    def read(name: str) -> Tensor:
        value = weights(name)
        seen[name] = live_bytes() - base if "down_proj" in name else 0  # the last and largest of a layer; looking takes time
        return value

    model, adam = sharded_llama(mesh, read)
    held = live_bytes() - base
    result = {"reads": len(seen), "most_in_layers": max(seen.values(), default=0)}
    whole = {name: p.full_tensor() for name, p in model.named_parameters() if p.dtype == torch.uint8 and isinstance(p, DTensor)}
    if first:
        save_file(whole, folder / GATHERED)
    del whole
    result["shares"] = {name: p.to_local().nbytes for name, p in model.named_parameters()}
    inside = []
    hook = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: inside.append(live_bytes() - base))
    model.loss(share(batch(0), mesh)[0][:, :2]).backward()  # few tokens, so that little else is there
    hook.remove()
    adam.zero_grad()
    result["inside_a_layer"] = inside[0] - held
    received = Received()
    result["losses"] = train(model, adam, mesh, range(1))
    result["received"] = received.bytes
    result["losses"] += train(model, adam, mesh, range(1, BEFORE))
    save_adapter(model, folder / "adapter", "a base")
    save_state(model, adam, folder / STATE, BEFORE)
    result["more"] = train(model, adam, mesh, range(BEFORE, BEFORE + AFTER))
    save_adapter(model, folder / "after")
    result["odd"] = odd_rows(mesh)
    result["errors"] = {
        "weights": error_of(lambda: sharded_llama(mesh, lambda name: weights(name)[1:])),
        "disk": error_of(lambda: save_adapter(model, folder / STATE / "adapter")),
        "state": error_of(lambda: load_state(model, adam, folder / "none")),
        "batch": error_of(lambda: share(torch.zeros(1, 8), mesh)),
        "values": error_of(lambda: quantize_and_shard(Llama(SHAPE), weights, mesh, RANK, ALPHA)),
    }
    (folder / f"two.{mesh.get_local_rank()}.json").write_text(json.dumps(result))


def hang(mesh, folder: Path) -> None:
    if mesh.get_local_rank() == 1:
        time.sleep(120)
    dist.all_reduce(torch.zeros(1))


def three(mesh, folder: Path) -> None:
    """Go on from the state that two processes left; then one dies."""
    model, adam = sharded_llama(mesh)
    step = load_state(model, adam, folder / STATE)
    losses = train(model, adam, mesh, range(step, step + AFTER))
    save_adapter(model, folder / "after_three")
    other = {"a": torch.zeros(3)}
    on_first(lambda: save_file(other, folder / "other.safetensors", metadata={"step": "1"}))
    error = error_of(lambda: load_state(model, adam, folder / "other.safetensors"))
    result = {"step": step, "losses": losses, "error": error}
    (folder / f"three.{mesh.get_local_rank()}.json").write_text(json.dumps(result))
    if mesh.get_local_rank() == 1:
        os._exit(7)
    train(model, adam, mesh, range(1))


if __name__ == "__main__":
    folder, *scenarios = sys.argv[1:]
    torch.set_num_threads(1)
    for scenario in scenarios:
        with processes(10 if scenario == "hang" else 120, "cpu") as found:
            {"two": two, "hang": hang, "three": three}[scenario](found, Path(folder))
