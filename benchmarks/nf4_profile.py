"""What the hardware counters say of the NF4 kernels: how busy memory and the parts of a multiprocessor are while each one runs.

    python -m benchmarks.nf4_profile              # a CUDA device and Nsight Compute (ncu), a minute; saves "nf4_profile"
    python -m benchmarks.nf4_profile --smoke      # launches the kernels, small, without the profiler

ncu runs this module again, in a process of its own, and each kernel several times over with cold caches. The clocks are left as they are.
All shares are of what the part could do at most: of DRAM during the whole launch, of the others while a multiprocessor has work.
"""

import csv
import io
import os
import shutil
import subprocess
import sys

import torch

from benchmarks.cli import options
from course import ROOT
from course.lab import recorded
from course.lab.devices import device
from course.lab.tables import columns, wrapped

SIDE = 8192
METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",  # integers and logic: shift, mask, permute
    "fma": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "l1": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_active",  # loads, stores, shared memory and shuffles
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "instructions": "sm__inst_executed.sum",
    "alu instructions": "sm__inst_executed_pipe_alu.sum",
    "cycles": "sm__cycles_active.avg",
}
KERNELS = {"quantize": "_quantize", "dequantize": "_dequantize", "1 row": "_vector_kernel", "16 rows": "_rows_kernel"}
SCALES = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1, "us": 1, "msecond": 1e3, "ms": 1e3}  # to microseconds


def work(side: int = SIDE) -> None:
    """One launch of each kernel while the profiler looks, after one while it doesn't."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels then run on the CPU
    from reference.kernels import nf4 as kernels

    torch.manual_seed(0)
    where = device()
    weight = torch.randn(side, side, device=where, dtype=torch.bfloat16) * 0.02
    q = kernels.quantize_nf4(weight)
    row, rows = (torch.randn(count, side, device=where, dtype=torch.bfloat16) for count in (1, 16))

    def launch() -> None:
        kernels.quantize_nf4(weight, check=False)
        kernels.dequantize_nf4(q)
        kernels.linear_nf4(row, q)
        kernels.linear_nf4(rows, q)

    launch()
    if where.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        launch()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def parse(report: str) -> dict[str, dict[str, float]]:
    """Kernel -> metric -> value, from what ``ncu --csv --page raw`` prints: a line of names, a line of units, a line for each launch."""
    lines = report.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise RuntimeError("ncu measured nothing; its last lines: " + " | ".join(lines[-4:]))
    units, *launches = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    found = {}
    for name, begins in KERNELS.items():
        launch = next((row for row in launches if row["Kernel Name"].startswith(begins)), None)
        if launch is None:
            raise RuntimeError(f"ncu saw no kernel {begins}…, only {[row['Kernel Name'] for row in launches]}")
        found[name] = {what: float(launch[metric].replace(",", "")) for what, metric in METRICS.items()}
        found[name]["microseconds"] *= SCALES[units[METRICS["microseconds"]]]
    return found


def measure() -> dict:
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("ncu is not on the PATH: install Nsight Compute (it comes with the CUDA toolkit), or add its folder to PATH")
    look = [
        ncu,
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--csv",
        "--page",
        "raw",
        "--metrics",
        ",".join(METRICS.values()),
    ]
    run = subprocess.run([*look, sys.executable, "-m", "benchmarks.nf4_profile", "--work"], capture_output=True, text=True, cwd=ROOT)
    return {"side": SIDE, "kernels": parse(run.stdout + run.stderr)}


def table(result: dict) -> str:
    busy = "dram", "issue", "alu", "fma", "l1", "tensor"
    rows = [
        (name, row["microseconds"], *(row[what] for what in busy), row["instructions"] / 1e6, row["alu instructions"] / 1e6)
        for name, row in result["kernels"].items()
    ]
    about = "each part in % of the most that it can do; millions of instructions, of all and of the ALU"
    return "\n".join([wrapped(about), columns(("", "µs", *busy, "all, M", "ALU, M"), rows, ".1f")])


def main() -> None:
    given = options("nf4_profile", __doc__, work={"action": "store_true", "help": "only launch the kernels: for ncu"})
    if given.work:
        return work()
    if given.smoke:
        work(256)
    result = {"side": 256, "kernels": {}} if given.smoke else measure()
    print(table(result))
    print("saved to", recorded.save("nf4_profile", result, given.out))


if __name__ == "__main__":
    main()
