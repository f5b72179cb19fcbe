"""bitsandbytes' paged optimizer beside torch's and ours: order of decay, memory, a resume; and a step of LoRA's factors.

    python -m benchmarks.paged_library            # a CUDA device, half a minute; saves the recorded result "paged_library"
    python -m benchmarks.paged_library --smoke    # small shapes on the CPU, in seconds; saves to a temporary folder

- "decay": how far PagedAdamW32bit is from torch's AdamW after ten steps, with and without decay.
- "memory": what its state takes on the card by torch's counter and by the driver's, and what is left when the optimizer is gone.
- "factors": milliseconds of a step of the 448 factors of LoRA on Llama-2-7B, r = 16, all on the card.
- "resume": whether its state is still paged after it was saved, loaded on the CPU and given to a new optimizer. A step after that may end
  the process, so it is made in one of its own.
"""

import argparse
import gc
import io
import json
import subprocess
import sys

import torch
from torch import Tensor

from benchmarks.cli import options, rounded
from benchmarks.paged_adamw import RATE, SMALL, Setting, bitsandbytes, factors
from course import ROOT
from course.lab import recorded
from course.lab.meters import show_bytes
from course.lab.tables import columns, wrapped


def decay(s: Setting) -> dict:
    """How far it is from torch's AdamW after ten steps, without decay and with it."""
    found: dict = {}
    for wd in (0.0, 0.5):
        one, other = s.tensors([(400, 500)]), s.tensors([(400, 500)])
        theirs = bitsandbytes().PagedAdamW32bit(one, lr=1e-2, weight_decay=wd)
        torchs = torch.optim.AdamW(other, lr=1e-2, weight_decay=wd, foreach=False)
        for step in range(10):
            torch.manual_seed(step)
            one[0].grad = torch.randn_like(one[0])
            other[0].grad = one[0].grad.clone()
            theirs.step()
            torchs.step()
        s.wait()
        found[f"apart, decay {wd}"] = (one[0] - other[0]).abs().max().item()
    return found


def memory(s: Setting) -> dict:
    """Bytes on the card of a state of 512 MB, by torch's counter and by the driver's; before, with it, and when the optimizer is gone."""
    params, rows = s.tensors([(1 << 12 if s.smoke else 1 << 26,)]), {}

    def note(name: str) -> None:
        gc.collect()
        s.wait()
        free, total = torch.cuda.mem_get_info() if s.cuda else (0, 0)
        rows[name] = {"torch": torch.cuda.memory_allocated() if s.cuda else 0, "driver": total - free}

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
        [sys.executable, "-m", "benchmarks.paged_library", "--resume", where], capture_output=True, text=True, cwd=ROOT, timeout=60
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


def lora(s: Setting) -> dict:
    """Milliseconds of a step of LoRA's factors."""
    params = s.tensors(SMALL if s.smoke else factors())
    makers = {
        "torch, foreach": lambda p: torch.optim.AdamW(p, lr=RATE, foreach=True),
        "torch, fused": lambda p: torch.optim.AdamW(p, lr=RATE, fused=True),
        "paged": lambda p: s.paged(p, 1 << 34),
        "bitsandbytes, paged": lambda p: bitsandbytes().PagedAdamW32bit(p, lr=RATE),
    }
    found = {}
    for name, make in makers.items():
        optimizer = make(params)
        found[name] = s.ms(optimizer.step)
    return found


def table(result: dict) -> str:
    decay = ", ".join(f"{value:.1e} with {name.removeprefix('apart, ')}" for name, value in result["decay"].items())
    lines = [wrapped(f"numbers are apart from torch's by at most {decay}")]
    for name, row in result["memory"].items():
        lines.append(f"state of the optimizer, {name}: {show_bytes(row['torch'])} by torch, {show_bytes(row['driver'])} by the driver")
    again = result["resume"]
    paged = ", ".join(f"{name} {sum(again.get(name, []))} of {len(again.get(name, []))}" for name in ("before", "after"))
    end = "stepped" if again.get("stepped") else again.get("said") or "did not step"
    lines.append(wrapped(f"a state loaded on {again['loaded on']}: tensors that are paged {paged}; {end}"))
    return "\n".join([*lines, columns(("a step of LoRA's factors", "ms"), result["factors"].items())])


def main() -> None:
    if "--resume" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--resume")
        resume(parser.parse_args().resume)
        return
    given = options("paged_library", __doc__)
    s, result = Setting(given.device, given.smoke), {}
    for name, part in {"decay": decay, "memory": memory, "factors": lora, "resume": lambda s: resumed("cpu")}.items():
        result[name] = rounded(part(s))
        path = recorded.save("paged_library", result, given.out, given.device)
    print(table(result))
    print("saved to", path)


if __name__ == "__main__":
    main()
