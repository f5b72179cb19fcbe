"""What each method costs on the tiny model: numbers, bytes of its file, time and memory of a training step, latency of one row.

    python -m benchmarks.peft_costs            # one thread, a minute; saves the recorded result "peft_costs"
    python -m benchmarks.peft_costs --smoke    # two methods; saves to a temporary folder

A step is forward, backward and AdamW of 8 × 32 tokens. Memory is the most that tensors hold in it, beyond model and optimizer states.
Latency is the forward of one row of 32 tokens, unmerged. Times are those that the processor spent on the process, so that others on the
machine matter little; methods take turns, and medians are kept. They are times of a small model, where calls weigh more than usual.
"""

import statistics
import time
from collections.abc import Callable

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from benchmarks.cli import record
from benchmarks.meters import Meter
from benchmarks.peft_family import WORLD, Run, adapted, base
from course.lab.family import METHODS, stored_tensors
from course.lab.tables import columns
from course.lab.training import next_token_loss

CPU = torch.device("cpu")


def costs(name: str, model: nn.Module, rounds: int) -> dict:
    """Numbers, bytes, milliseconds of one method, on its own."""
    model.train()
    optimizer, meter, ids = METHODS[name].optimizer(model, 1e-6), Meter(CPU), WORLD.sample("clinic", 8, 32, 5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        next_token_loss(model, ids).backward()
        optimizer.step()

    with meter:
        step()
        optimizer.zero_grad(set_to_none=True)
        meter.start()
        step()
        peak = meter.peak
    steps = [processor_ms(step) for _ in range(rounds)]
    model.eval()
    return {"step_ms": statistics.median(steps), "peak_bytes": peak, "latency_ms": forward_ms(model, rounds)}


def processor_ms(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began)


def forward_ms(model: nn.Module, rounds: int) -> float:
    row = WORLD.sample("clinic", 8, 32, 5)[:1]
    with torch.inference_mode():
        return statistics.median(processor_ms(lambda: model(input_ids=row)) for _ in range(3 * rounds))


def measure(methods: tuple[str, ...] = tuple(METHODS), turns: int = 5, rounds: int = 6) -> dict:
    torch.set_num_threads(1)
    models = {name: adapted(Run(name, "clinic", METHODS[name].rate, 0)) for name in methods}
    found: dict[str, list[dict]] = {name: [] for name in methods}
    plain = []
    for _ in range(turns):
        for name, model in models.items():
            found[name].append(costs(name, model, rounds))
        plain.append(forward_ms(base(), rounds))
    rows = []
    for name, model in models.items():
        tensors = stored_tensors(model)
        rows.append(
            {
                "method": name,
                "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
                "stored": sum(tensor.numel() for tensor in tensors.values()),
                "file_bytes": len(to_safetensors(tensors)),
            }
            | {key: statistics.median(turn[key] for turn in found[name]) for key in found[name][0]}
        )
    return {"parameters": sum(p.numel() for p in base().parameters()), "latency_ms": statistics.median(plain), "methods": rows}


def table(result: dict) -> str:
    rows = [
        (
            row["method"],
            row["parameters"],
            row["stored"],
            f"{row['file_bytes'] / 1e3:,.1f}",
            f"{row['step_ms']:.1f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            row["latency_ms"],
        )
        for row in result["methods"]
    ]
    rows.insert(0, ("without a method", *[""] * 5, result["latency_ms"]))
    return columns(("", "trained", "stored", "file kB", "ms/step", "peak MB", "ms/row"), rows)


def main() -> None:
    record("peft_costs", __doc__, measure, table, small={"methods": ("LoRA", "prompt, text"), "turns": 1, "rounds": 2}, where="cpu")


if __name__ == "__main__":
    main()
