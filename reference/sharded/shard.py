"""QLoRA on a model that no single GPU holds: every rank keeps a share of each layer.

    before layer k runs      gather its shares from all ranks: codes and scales, in four bits
    while it runs            dequantize, multiply, add the adapter, as on one GPU
    after it                 forget the others' shares
    in the backward pass     gather once more; give each rank its share of the adapters' gradients

This is *fully sharded data parallelism* (FSDP; ZeRO-3 in Rajbhandari et al. 2020): memory is
divided by the number of ranks, and paid for with messages. Each rank trains on rows of its own.
The engine is PyTorch's ``fully_shard``. It deals out any parameter along its first axis, integers
too, and gathers it bit for bit; so nothing is needed here but a layer whose four-bit weight *is*
such parameters (:mod:`reference.sharded.layer`), and a way to load it. Weights are dequantized
after the gathering: what travels has four bits, a quarter of what a 16-bit model would send.

    with processes() as mesh:                                  # reference.sharded.group
        with torch.device("meta"):
            model = Llama(shape).bfloat16()                    # shapes, no values
        quantize_and_shard(model, weights, mesh, r=16, lora_alpha=32)
        rows, factor = share(batch, mesh)
        (model.loss(rows) * factor).backward()                 # then optimizer.step(), as ever
        save_adapter(model, "adapter")                         # PEFT's files, from any number

No rank ever holds more than its shares and one whole layer, in four bits. Rank 0 alone reads
weights, one tensor at a time. Zhao et al. 2023, "PyTorch FSDP".
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from reference.lora import inject_lora, replace_layers
from reference.sharded.engine import fully_shard
from reference.sharded.group import on_first
from reference.sharded.layer import RowwiseNF4Linear

Weights = Callable[[str], Tensor]


def quantize_and_shard(
    model: nn.Module,
    weights: Weights,
    mesh: DeviceMesh,
    r: int,
    lora_alpha: float,
    target_modules: str | Iterable[str] = "all-linear",
    layers: str = "model.layers",
    lora_dropout: float = 0.0,
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """Load ``model`` over all ranks: its layers' linears in NF4 with adapters, all of it sharded.

    Layer by layer: rank 0 reads and quantizes, all get a copy, adapt it, and keep their share. The
    rest (embedding, last norm, head) is one group, which stays whole from the forward pass to the
    end of the backward. The numbers are those of ``quantize_linears`` and ``inject_lora`` on rank
    0, to the bit, where ``block_size`` divides the rows.

    Args:
        model: built under ``torch.device("meta")``, in the dtype that what is not quantized has:
            :class:`reference.llama.Llama`, or another whose layers are a list, called in turn.
        weights: as in :func:`reference.qlora.quantize_linears`: a parameter's value by its full
            name. Called on rank 0 alone.
        mesh: from :func:`reference.sharded.processes`.
        r, lora_alpha, target_modules, lora_dropout: of the adapters inside each layer; names begin
            inside it ("self_attn.q_proj", or the end of that).
        layers: full name of the list of layers.
        block_size, double_quant, compute_dtype: see :class:`RowwiseNF4Linear`.

    Returns:
        The names of the adapted layers.

    Raises:
        ValueError: the model is not on the meta device; ``block_size`` does not divide a row. On
            all ranks, and before anything is read.
        RuntimeError: ``weights`` failed on rank 0, or gave another shape; raised on every rank
            (there, in its own class).
    """
    here = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    if here:
        remedy = 'build the model under torch.device("meta")'
        raise ValueError(f"{here[0]} has values already, on {mesh.size()} ranks: {remedy}")
    model.requires_grad_(False)
    stack, names = model.get_submodule(layers), []
    _make_rowwise(stack, block_size, double_quant, compute_dtype)
    for number, layer in enumerate(stack):
        prefix = f"{layers}.{number}"
        _fill(model, prefix, weights, mesh)
        adapted = inject_lora(layer, r, lora_alpha, target_modules, lora_dropout)
        names += [f"{prefix}.{name}" for name in adapted]
        _send([*layer.parameters(), *layer.buffers()])
        fully_shard(layer, mesh)
    _send(_fill(model, "", weights, mesh))
    fully_shard(model, mesh)
    return names


def _make_rowwise(stack: nn.Module, *options) -> None:
    """Put a :class:`RowwiseNF4Linear` without values in the place of every ``nn.Linear``."""
    new = {}
    for linear in [part for part in stack.modules() if type(part) is nn.Linear]:
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        new[linear] = RowwiseNF4Linear(*sizes, *options, linear.weight.dtype, "meta")
    replace_layers(stack, new)


def _fill(model: nn.Module, prefix: str, weights: Weights, mesh: DeviceMesh) -> list[Tensor]:
    """Make room for all that has no values yet below ``prefix``; on rank 0 with values.

    Returns:
        What was made, each tensor once.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # id -> old, so that its id stays taken, and new
    for part in model.get_submodule(prefix).modules():
        for table in (part._parameters, part._buffers):
            for key, old in table.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in made:  # tied parameters stay one
                    new = torch.empty_like(old, device=mesh.device_type)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=False)
                    made[id(old)] = old, new
                table[key] = made[id(old)][1]
    new = [tensor for _, tensor in made.values()]
    on_first(lambda: _read(model, new, weights))
    return new


def _read(model: nn.Module, empty: list[Tensor], weights: Weights) -> None:
    """Ask for the values of those parameters that are among ``empty``."""
    wanted = {id(tensor) for tensor in empty}
    for name, parameter in model.named_parameters():
        if id(parameter) in wanted:
            _take(model, name, parameter, weights)


@torch.no_grad()
def _take(model: nn.Module, name: str, parameter: nn.Parameter, weights: Weights) -> None:
    """One value; when this returns, nothing here refers to what ``weights`` gave."""
    owner, _, key = name.rpartition(".")
    layer = model.get_submodule(owner)
    packed = isinstance(layer, RowwiseNF4Linear) and key != "bias"
    if packed and key != "weight":
        return  # its scales come with it
    value, shape = weights(name), layer.shape if packed else parameter.shape
    if not isinstance(value, Tensor) or value.shape != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"weights({name!r}) must have shape {tuple(shape)}, got {got}")
    if packed:
        layer.quantize(value.detach().to(parameter.device))
    else:
        parameter.copy_(value)


def _send(tensors: list[Tensor]) -> None:
    """Rank 0's values for all."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), 0)
