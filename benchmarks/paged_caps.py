"""AdamW under a cap on the card's memory, plain and paged; and what bitsandbytes' paged optimizer does with decay, memory and a resume.

    python -m benchmarks.paged_caps               # a CUDA device with 16 GB free, half a minute; saves the recorded result "paged_caps"
    python -m benchmarks.paged_caps --smoke       # small shapes on the CPU, in seconds; saves to a temporary folder

- "cap": ten steps of the same training without a cap with torch's AdamW, then under a cap with torch's and with the paged one.
- "library": how far bitsandbytes' PagedAdamW32bit is from torch's AdamW after ten steps, with and without decay; what its state takes on
  the card, by torch's counter and by the driver's, and what is left of that when the optimizer is gone; and whether its state is still
  paged after a resume. A step after that resume may end the process, so it is made in one of its own.
"""

import argparse
import gc
import io
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cli import message, options, rounded
from benchmarks.paged_adamw import RATE, Setting, bitsandbytes, deep
from course import ROOT
from course.lab import recorded


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


def library(s: Setting) -> dict:
    found: dict = {}
    for decay in (0.0, 0.5):
        one, other = s.tensors([(400, 500)]), s.tensors([(400, 500)])
        theirs = bitsandbytes().PagedAdamW32bit(one, lr=1e-2, weight_decay=decay)
        torchs = torch.optim.AdamW(other, lr=1e-2, weight_decay=decay, foreach=False)
        for step in range(10):
            torch.manual_seed(step)
            one[0].grad = torch.randn_like(one[0])
            other[0].grad = one[0].grad.clone()
            theirs.step()
            torchs.step()
        s.wait()
        found[f"apart, decay {decay}"] = (one[0] - other[0]).abs().max().item()
    if s.cuda:
        found["memory"] = memory(s)
    return found | {"resume": [resumed(where) for where in ("cpu", "cuda" if s.cuda else "cpu")]}


def memory(s: Setting) -> dict:
    """Bytes on the card of a state of 512 MB, by torch's counter and by the driver's; before, with it, and when the optimizer is gone."""
    params, rows = s.tensors([(1 << 26,)]), {}

    def note(name: str) -> None:
        gc.collect()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        rows[name] = {"torch": torch.cuda.memory_allocated(), "driver": total - free}

    note("before")
    optimizer = bitsandbytes().PagedAdamW32bit(params, lr=RATE)
    optimizer.step()
    note("with it")
    del optimizer
    note("gone")
    return {name: {who: count - rows["before"][who] for who, count in row.items()} for name, row in rows.items() if name != "before"}


def resumed(where: str) -> dict:
    """What a process says that loads a saved state onto a device and makes a step."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.paged_caps", "--resume", where], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    said = [line for line in (run.stdout + run.stderr).splitlines() if "rror" in line]
    return {
        "loaded on": where,
        "exit": run.returncode,
        "said": said[-1][:200] if said else "",
        **{k: v for d in lines for k, v in d.items()},
    }


def resume(where: str) -> None:
    """In the process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    params = Setting(device, True).tensors([(400, 500)])

    def paged(optimizer) -> list[bool]:
        return [bool(getattr(v, "is_paged", False)) for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]

    first = bitsandbytes().PagedAdamW32bit(params, lr=RATE)
    first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = bitsandbytes().PagedAdamW32bit(params, lr=RATE)
    again.load_state_dict(torch.load(file, map_location=where, weights_only=False))
    moments = [v for state in again.state.values() for v in state.values() if isinstance(v, Tensor)]
    print(json.dumps({"before": paged(first), "after": paged(again), "devices": [v.device.type for v in moments]}), flush=True)
    again.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"stepped": True}), flush=True)


def main() -> None:
    if "--resume" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--resume")
        resume(parser.parse_args().resume)
        return
    given = options("paged_caps", __doc__)
    s, result = Setting(given.device, given.smoke), {}
    for part in (cap, library):
        result[part.__name__] = rounded(part(s))
        print(json.dumps(result[part.__name__], indent=1), flush=True)
        path = recorded.save("paged_caps", result, given.out, given.device)
    print("saved to", path)


if __name__ == "__main__":
    main()
