"""QLoRA on a Llama over all GPUs of a machine, or over processes on a CPU.

    torchrun --nproc-per-node 2 examples/train_sharded.py --model path/to/llama --text notes.txt --out adapter
    torchrun --nproc-per-node 2 examples/train_sharded.py              # the course's tiny model on its clinic notes
    python examples/train_sharded.py                                   # one GPU, or the CPU alone

``--model`` is a folder with config.json and .safetensors files. Rank 0 reads them, one tensor at a time: no machine ever holds the model in
16 bits. The adapter in ``--out`` is in PEFT's format. With ``--state FILE`` the run goes on where that file ends, if there is one, on any
number of GPUs, and keeps it up to date.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from course.lab.models import TINY
from course.lab.world import World
from reference.llama import Llama
from reference.model_shapes import ModelShape
from reference.sharded import load_state, on_first, processes, quantize_and_shard, save_adapter, save_state, share


def llama(folder: Path) -> Llama:
    """The model of ``folder`` without values."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    rope = getattr(config, "rope_parameters", {})
    if config.model_type != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder} holds a {config.model_type} with rotary positions of type {rope}: only a plain Llama is trained here")
    with torch.device("meta"):
        model = Llama(ModelShape.from_config(config, folder.name), rope["rope_theta"], config.rms_norm_eps)
    return model.bfloat16()


def reader(folder: Path) -> Callable[[str], Tensor]:
    """A function from a parameter's name to its value, which reads that one from the files."""
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"] if index.is_file() else {}

    def read(name: str) -> Tensor:
        with safe_open(folder / places.get(name, "model.safetensors"), "pt") as file:
            return file.get_tensor(name)

    return read


def batches(folder: Path, text: Path | None, rows: int, length: int) -> Callable[[int], Tensor]:
    """Token ids of a step, (rows, length), the same on every rank: each takes its own rows of them."""
    if text is None:
        world = World()
        return lambda step: world.sample("clinic", rows, length, seed=step)
    from transformers import AutoTokenizer

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8")).input_ids)
    pieces = ids[: len(ids) // length * length].view(-1, length)
    if len(pieces) == 0:
        raise ValueError(f"--text {text} has {len(ids)} tokens, too few for one row of {length}: lower --length")

    def batch(step: int) -> Tensor:
        return pieces[torch.randint(len(pieces), (rows,), generator=torch.Generator().manual_seed(step))]

    return batch


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=TINY, help="folder with config.json and safetensors (default: the tiny model)")
    parser.add_argument("--text", type=Path, help="file to train on (default: the small world's clinic notes)")
    parser.add_argument("--out", type=Path, help="folder for the adapter")
    parser.add_argument("--state", type=Path, help="file to go on from and to keep")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch, all ranks together")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--timeout", type=float, default=60, help="seconds without an answer after which another rank counts as lost")
    parser.add_argument("--smoke", action="store_true", help="a dry run on the CPU: a few steps")
    return parser.parse_args()


def main() -> None:
    given = options()
    steps = 4 if given.smoke else given.steps
    with processes(given.timeout, "cpu" if given.smoke else None) as mesh:
        first, device = mesh.get_local_rank() == 0, mesh.device_type
        model = llama(given.model)
        batch = batches(given.model, given.text, given.rows, given.length)
        torch.manual_seed(0)
        quantize_and_shard(model, reader(given.model), mesh, given.rank, 2 * given.rank)
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=given.lr, weight_decay=0.0)
        begin = 0
        if given.state and on_first(given.state.is_file):
            begin = load_state(model, adam, given.state)
        for step in range(begin, steps):
            began = time.perf_counter()
            rows, factor = share(batch(step), mesh)
            loss = model.loss(rows.to(device)) * factor
            loss.backward()
            adam.step()
            adam.zero_grad(set_to_none=True)
            told = loss.detach() / mesh.size()
            dist.all_reduce(told)  # the mean over the whole batch
            if first:
                took = time.perf_counter() - began
                print(f"step {step + 1:4d}  loss {told.item():.4f}  {given.rows * given.length / took:,.0f} tokens/s", flush=True)
            if given.state and (step + 1 == steps or (step + 1) % 100 == 0):
                save_state(model, adam, given.state, step + 1)
        if given.out:
            save_adapter(model, given.out, str(given.model))
            if first:
                print(f"adapter in {given.out}")


if __name__ == "__main__":
    main()
