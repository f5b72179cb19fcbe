"""Speed of one LoRA layer: ours against peft's, against the frozen layer, and against training the layer in full.

    python -m benchmarks.lora_layer             # a CUDA device; saves the recorded result "lora_layer"
    python -m benchmarks.lora_layer --smoke     # small, also on a CPU; saves to a temporary folder

*Training*: forward and backward of one 4096×4096 bfloat16 linear layer, r = 16, over 4,096 rows that themselves need a gradient, as inside
a model. The frozen layer alone is the floor: its two products (y and the gradient of x) are the work that no adapter avoids. "Kept" is
what the forward leaves in memory for the backward, beyond the output. Every number is the median of rounds in which the contestants take
turns, so that a clock that changes with temperature changes for all. The time is the device's own, with all launches queued before it
starts, as in a training step whose launches run ahead; "alone" is the time from the first launch on, where a slow CPU leaves gaps.

*Generation*: forward of 1 and of 64 rows through a chain of eight such layers, time per layer. A chain, because a single layer's weight
(34 MB) would stay in the cache of a large GPU between calls, which no model's does. "One launch" is the same chain replayed from a CUDA
graph: what is left of an adapter's cost when nobody waits for launches.
"""

import copy
import statistics
import warnings
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

from benchmarks.cli import record
from course.lab import meters
from course.lab.devices import device
from course.lab.tables import columns
from reference.lora import LoRALinear

R = 16
CASES = {  # name -> dtype of the factors, α
    "bfloat16 factors, α/r = 2": (torch.bfloat16, 2 * R),
    "bfloat16 factors, α/r = 1.5": (torch.bfloat16, 1.5 * R),
    "float32 factors, α/r = 2": (torch.float32, 2 * R),  # float32 is what both sides choose by themselves
    "float32 factors, α/r = 1.5": (torch.float32, 1.5 * R),
}


def peft_layer(base: nn.Linear, dtype: torch.dtype, alpha: float) -> nn.Module:
    """peft's layer over a copy of ``base``."""
    config = peft.LoraConfig(r=R, lora_alpha=alpha, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config, autocast_adapter_dtype=dtype == torch.float32)
    return model.base_model.model[0]


def our_layer(base: nn.Linear, dtype: torch.dtype, alpha: float) -> LoRALinear:
    layer = LoRALinear(copy.deepcopy(base), R, alpha)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(dtype), layer.lora_B.data.to(dtype)
    return layer


def training_step(layer: nn.Module, x: Tensor, direction: Tensor) -> Callable[[], None]:
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(direction)

    return step


def in_turns(
    contestants: dict[str, Callable[[], object]], where: torch.device, rounds: int, repeats: int, queued: bool = False
) -> dict[str, float]:
    """Median milliseconds of each."""
    times = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            times[name].append(meters.milliseconds(work, repeats=repeats, warmup=3, where=where, queued=queued))
    return {name: statistics.median(values) for name, values in times.items()}


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """What the forward keeps for the backward and was not there before: tensors, counted once, without the input and the parameters."""
    known, kept = {x.untyped_storage().data_ptr()} | {p.untyped_storage().data_ptr() for p in layer.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    fresh = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for pointer, size in fresh.items() if pointer not in known)


def training(width: int, rows: int, where: torch.device, rounds: int, repeats: int) -> dict:
    base = nn.Linear(width, width, bias=False, device=where, dtype=torch.bfloat16)
    x = torch.randn(rows, width, device=where, dtype=torch.bfloat16, requires_grad=True)
    direction = torch.randn_like(x)
    full, frozen = copy.deepcopy(base), copy.deepcopy(base).requires_grad_(False)
    result = {}
    for name, (dtype, alpha) in CASES.items():
        layers = {
            "ours": our_layer(base, dtype, alpha),
            "peft": peft_layer(base, dtype, alpha),
            "frozen layer": frozen,
            "full training": full,
        }
        steps = {key: training_step(layer, x, direction) for key, layer in layers.items()}
        times, alone = (in_turns(steps, where, rounds, repeats, queued) for queued in (True, False))
        kept = {key: kept_bytes(layers[key], x) for key in ("ours", "peft")}
        result[name] = {"milliseconds": times, "milliseconds_alone": alone, "ratio": times["ours"] / times["peft"], "kept_bytes": kept}
    return result


def generation(width: int, depth: int, where: torch.device, rounds: int, repeats: int) -> dict:
    bases = [nn.Linear(width, width, bias=False, device=where, dtype=torch.bfloat16) for _ in range(depth)]
    result = {}
    for name, (dtype, alpha) in CASES.items():
        chains = {
            "base": nn.Sequential(*bases),
            "merged": nn.Sequential(*(our_layer(base, dtype, alpha) for base in bases)),
            "ours": nn.Sequential(*(our_layer(base, dtype, alpha) for base in bases)),
            "peft": nn.Sequential(*(peft_layer(base, dtype, alpha) for base in bases)),
        }
        for layer in chains["merged"]:
            layer.merge()
        result[name] = {}
        for rows in (1, 64):
            x = torch.randn(rows, width, device=where, dtype=torch.bfloat16)
            with torch.inference_mode():
                work = {key: (lambda chain=chain, x=x: chain(x)) for key, chain in chains.items()}
                graphs = {key: replayed(each, where) for key, each in work.items()}
                times, without_launches = (in_turns(each, where, rounds, repeats) for each in (work, graphs))
            label = f"{rows} row{'s' * (rows > 1)}"
            result[name][label] = {key: value / depth for key, value in times.items()}
            result[name][f"{label}, one launch"] = {key: value / depth for key, value in without_launches.items()}
    return result


def replayed(work: Callable[[], object], where: torch.device) -> Callable[[], object]:
    """``work`` from a CUDA graph, all its launches as one; on a CPU, where there are none, ``work`` itself."""
    if where.type != "cuda":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def measure(small: bool = False, where: torch.device | None = None) -> dict:
    """Both measurements; ``small`` for a machine without a GPU."""
    where = where or device()
    torch.manual_seed(0)
    width, rows, depth, rounds, repeats = (64, 32, 2, 2, 2) if small else (4096, 4096, 8, 7, 20)
    return {
        "width": width,
        "rows": rows,
        "r": R,
        "peft": peft.__version__,
        "training": training(width, rows, where, rounds, repeats),
        "generation": generation(width, depth, where, rounds, repeats),
    }


def table(result: dict) -> str:
    about = f"forward + backward, {result['width']}×{result['width']}, r = {result['r']}, {result['rows']} rows: milliseconds"
    rows, kept = [], []
    for name, row in result["training"].items():
        times, alone = row["milliseconds"], row["milliseconds_alone"]
        cells = (times["ours"], times["peft"], row["ratio"], times["frozen layer"], times["full training"], alone["ours"], alone["peft"])
        rows.append([name, *cells])
        kept.append([name, *(meters.show_bytes(row["kept_bytes"][who]) for who in ("ours", "peft"))])
    heads = ("", "ours", "peft", "ratio", "frozen", "full", "alone", "peft")
    chain = [
        (f"{name}, {rows}", *(times[key] for key in ("base", "merged", "ours", "peft")))
        for name, sizes in result["generation"].items()
        for rows, times in sizes.items()
    ]
    parts = [about, columns(heads, rows, ".3f"), "", columns(("kept for the backward pass", "ours", "peft"), kept), ""]
    parts += ["forward without gradients, a layer in a chain: milliseconds", columns(("", "base", "merged", "ours", "peft"), chain, ".4f")]
    return "\n".join(parts)


def main() -> None:
    record("lora_layer", __doc__, measure, table, small={"small": True})


if __name__ == "__main__":
    main()
