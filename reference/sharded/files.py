"""What sharded training leaves behind: adapters in PEFT's files, and a state to go on from.

Both hold whole tensors, put together from all ranks' shares, so nothing in a file knows how many
ranks there were. Rank 0 writes; every rank has to call, for each has a share to send. What is
trained is small, and it is gathered one tensor at a time.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from reference.adapter_format.config import config_of, write
from reference.adapter_format.files import write_files
from reference.adapter_format.keys import keys_of
from reference.lora import lora_layers
from reference.sharded.group import on_first

STEP = "step"


def save_adapter(
    model: nn.Module, directory: str | Path, base_model_name_or_path: str | Path | None = None
) -> None:
    """Write the adapters of a sharded model as :func:`reference.adapter_format.save_adapter` would.

    Called on every rank; written by rank 0. Any model of the kind loads them, sharded or not.

    Raises:
        ValueError, OSError: on rank 0, and on the others RuntimeError: no adapters; a value is NaN
            or infinite; the directory can't be written. No file is left half-written.
    """
    layers = dict(lora_layers(model))
    tensors = {}
    for name, layer in layers.items():
        both = layer.lora_A, layer.lora_B
        for key, factor in zip(keys_of(name, layer.base), both, strict=True):
            tensors[key] = _whole(factor)

    def written() -> None:
        if not layers:
            raise ValueError("model holds no LoRA layer: call quantize_and_shard first")
        config = write(config_of(model, layers, base_model_name_or_path))
        write_files(directory, tensors, config)

    on_first(written)


def save_state(model: nn.Module, optimizer: Optimizer, file: str | Path, step: int) -> None:
    """Write what is trained, and the optimizer's state of it, after ``step`` steps: one file.

    A crash leaves the old file or the new one, never half of one.

    Raises:
        OSError: on rank 0, and on the others RuntimeError: it can't be written.
    """
    tensors = {name: _whole(tensor) for name, tensor in _trained(model, optimizer)}

    def written() -> None:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        save_file(tensors, new, metadata={STEP: str(step)})
        os.replace(new, path)

    on_first(written)


@torch.no_grad()
def load_state(model: nn.Module, optimizer: Optimizer, file: str | Path) -> int:
    """Go on from what :func:`save_state` wrote, on however many ranks; returns the step.

    Args:
        optimizer: new, of the same kind and over the same parameters; it keeps its own rates.

    Raises:
        FileNotFoundError, ValueError: on rank 0, and on the others RuntimeError: there is no such
            file; it is cut off, or of another model. Nothing is changed then.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    read: dict[str, Tensor] = {}

    def opened() -> tuple[int, dict[str, list[str]]]:
        step, found = _read(Path(file))
        read.update(found)
        kept: dict[str, list[str]] = {name: [] for name in parameters}
        for key, tensor in found.items():
            name, _, kind = key.partition("|")
            like = parameters.get(name)
            if like is None or (tensor.shape != like.shape and tensor.ndim):
                got = f"{name} {tuple(tensor.shape)}"
                raise ValueError(f"{file} is of another model: it holds {got}")
            kept[name].append(kind)
        if lacking := [name for name, kinds in kept.items() if "" not in kinds]:
            raise ValueError(f"{file} is of another model: it lacks {lacking[0]}")
        return step, kept

    step, kept = on_first(opened)
    numbers = {p: i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        parameter.copy_(_dealt(read.get(name), parameter))
        for kind in filter(None, kept[name]):
            value = read.get(f"{name}|{kind}")
            if kind == STEP:  # a number: each rank has it
                value = torch.tensor(float(on_first(lambda value=value: value.item())))
            else:
                value = _dealt(value, parameter)
            state.setdefault(numbers[parameter], {})[kind] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step


def _trained(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Name -> value of each trained parameter, and name|kind -> each tensor of its state."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
            for kind, tensor in optimizer.state.get(parameter, {}).items():
                yield f"{name}|{kind}", tensor


def _whole(tensor: Tensor) -> Tensor:
    """All of it, on the CPU; every rank has to ask."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _dealt(value: Tensor | None, like: DTensor) -> DTensor:
    """Rank 0's ``value`` over the ranks as ``like`` is; the others have none."""
    if value is None:
        value = torch.empty(like.shape, dtype=like.dtype)
    value = value.to(like.device_mesh.device_type)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=0)


def _read(file: Path) -> tuple[int, dict[str, Tensor]]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file} to go on from")
    try:
        with safe_open(file, "pt") as opened:
            step = (opened.metadata() or {}).get(STEP)
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off, or not a safetensors file ({error})") from None
    if step is None:
        raise ValueError(f"{file} says no step: it is not a state that save_state wrote")
    return int(step), tensors
