"""AdamW under a cap on the card's memory, plain and paged.

    python -m benchmarks.paged_caps               # a CUDA device with 16 GB free, in seconds; saves the recorded result "paged_caps"
    python -m benchmarks.paged_caps --smoke       # small shapes on the CPU, in seconds; saves to a temporary folder

Ten steps of the same training: without a cap with torch's AdamW, then under a cap with torch's and with the paged one. The weights must be
the same.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cli import failed, message, options, rounded
from benchmarks.paged_adamw import RATE, Setting, deep
from course.lab import recorded
from course.lab.meters import show_bytes


def cap(s: Setting) -> dict:
    """Ten steps of training with and without a cap: what fits, and whether the weights are the same."""
    width, depth, rows, steps = (16, 4, 8, 3) if s.smoke else (4096, 32, 64, 10)

    def train(make: Callable) -> tuple[list[Tensor] | None, dict]:
        model = optimizer = None
        try:
            model = deep(s, width, depth)
            optimizer = make(list(model.parameters()))
            for step in range(steps):
                torch.manual_seed(step)
                model(torch.randn(rows, width, device=s.device)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            s.wait()
            peak = torch.cuda.max_memory_allocated() if s.cuda else 0
            return [p.detach().cpu() for p in model.parameters()], {"peak": peak}
        except torch.OutOfMemoryError as error:
            return None, {"error": message(error)}

    def torchs(params):
        return torch.optim.AdamW(params, lr=RATE, foreach=False)

    makers = {"torch": torchs, "paged": lambda p: s.paged(p, 4 * s.page)}
    weights = {}
    result = {"numbers": depth * (width * width + width), "steps": steps}
    s.free()
    weights["uncapped"], result["uncapped"] = train(torchs)
    s.free()
    need = 4 * result["numbers"]  # bytes of the weights
    result["cap"] = int(2 * need + 6 * s.page)  # weights, gradients, and little more
    s.free()
    if s.cuda:
        torch.cuda.set_per_process_memory_fraction(result["cap"] / torch.cuda.mem_get_info()[1])
    try:
        for name, make in makers.items():
            if s.cuda:
                torch.cuda.reset_peak_memory_stats()
            weights[name], result[name] = train(make)
            s.free()
    finally:
        if s.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
    same = weights["paged"] is not None and all(map(torch.equal, weights["paged"], weights["uncapped"]))
    return result | {"equal": same}


def table(result: dict) -> str:
    found = result["cap"]
    lines = [f"{found['steps']} steps of {found['numbers']:,} numbers; the cap is {show_bytes(found['cap'])}"]
    for name, label in (("uncapped", "torch, no cap"), ("torch", "torch"), ("paged", "paged")):
        row = found[name]
        lines.append(failed(label, row["error"]) if "error" in row else f"{label}: {show_bytes(row['peak'])} at the peak")
    return "\n".join([*lines, f"the paged weights are {'' if found['equal'] else 'NOT '}those without a cap"])


def main() -> None:
    given = options("paged_caps", __doc__)
    result = {"cap": rounded(cap(Setting(given.device, given.smoke)))}
    print(table(result))
    print("saved to", recorded.save("paged_caps", result, given.out, given.device))


if __name__ == "__main__":
    main()
