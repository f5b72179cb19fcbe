"""NF4 on a CPU: quantize and dequantize a 4096×4096 tensor, ours against bitsandbytes', with one thread and with two.

    python -m benchmarks.nf4_cpu           # about a minute; saves the recorded result "nf4_cpu"

bitsandbytes' quantization is a torch program, as ours is; its dequantization is native code (AVX-512 where the CPU has it). Both give the
same bytes, scales and values, which every run checks first. The two take turns, and the ratio is the median of the ratios of neighbours in
time, so that other programs on the machine, which slow down both, hardly move it. Each number of threads gets a process of its own: OpenMP
libraries read it when they are loaded, and the two sides don't share one. Output goes to fresh memory, as in use.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cli import options
from course import ENVIRONMENT, ROOT
from course.lab import recorded
from course.lab.tables import columns, wrapped

SIDE, ROUNDS, THREADS, BLOCK = 4096, 15, (1, 2), 64
SMOKE = {"side": 256, "rounds": 2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def contestants(side: int, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], object]]]:
    """work -> who -> a call, after a check that both give the same."""
    import bitsandbytes.functional as bnb

    from reference.nf4 import dequantize_nf4, quantize_nf4

    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    q = quantize_nf4(weight, BLOCK)
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    assert torch.equal(q.packed, packed) and torch.equal(q.absmax, state.absmax)
    assert torch.equal(dequantize_nf4(q), bnb.dequantize_4bit(packed, state))
    return {
        "quantize": {
            "ours": lambda: quantize_nf4(weight, BLOCK),
            "bitsandbytes": lambda: bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4"),
        },
        "dequantize": {"ours": lambda: dequantize_nf4(q), "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state)},
    }


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, and the median of ours / theirs over the rounds; the first round is not counted."""
    times = {who: [] for who in calls}
    for _ in range(rounds + 1):
        for who, call in calls.items():
            start = time.perf_counter()
            call()
            times[who].append(1e3 * (time.perf_counter() - start))
    ratios = [ours / theirs for ours, theirs in zip(*(values[1:] for values in times.values()), strict=True)]
    return {who: statistics.median(values[1:]) for who, values in times.items()} | {"ratio": statistics.median(ratios)}


def measure_here(side: int = SIDE, rounds: int = ROUNDS) -> dict:
    """work -> dtype -> milliseconds and ratio, in this process."""
    result = {"quantize": {}, "dequantize": {}}
    for name, dtype in DTYPES.items():
        for work, calls in contestants(side, dtype).items():
            result[work][name] = in_turns(calls, rounds)
    return result


def measure_with(threads: int, smoke: bool) -> dict:
    """:func:`measure_here` in a process that has ``threads`` threads."""
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.nf4_cpu", "--here", *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor()


def measure(smoke: bool = False) -> dict:
    import bitsandbytes

    settings = {"side": SIDE, "block_size": BLOCK, "rounds": ROUNDS} | (SMOKE if smoke else {})
    host = {"cpu": cpu_name(), "capability": torch.backends.cpu.get_cpu_capability(), "bitsandbytes": bitsandbytes.__version__}
    return host | settings | {"threads": {str(threads): measure_with(threads, smoke) for threads in THREADS}}


def table(result: dict) -> str:
    about = f"{result['cpu']} ({result['capability']}), {result['side']}×{result['side']}, block {result['block_size']}: milliseconds"
    rows = [
        (f"{work}, {dtype}, {threads} thread{'s' * (threads != '1')}", row["ours"], row["bitsandbytes"], f"{row['ratio']:.2f}")
        for work in ("quantize", "dequantize")
        for dtype in DTYPES
        for threads, measured in result["threads"].items()
        for row in [measured[work][dtype]]
    ]
    return "\n".join([wrapped(about), columns(("", "ours", "bitsandbytes", "ours / theirs"), rows, ".1f")])


def main() -> None:
    given = options("nf4_cpu", __doc__, gpu=False, here={"action": "store_true", "help": "measure in this process and print JSON"})
    if given.here:
        print(json.dumps(measure_here(**SMOKE if given.smoke else {})))
        return
    result = measure(given.smoke)
    print(table(result))
    torch.set_num_threads(max(THREADS))  # part of the device's name
    print("saved to", recorded.save("nf4_cpu", result, given.out, torch.device("cpu")))


if __name__ == "__main__":
    main()
