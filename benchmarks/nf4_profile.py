"""What the hardware counters say of the NF4 kernels: how busy memory and the parts of a multiprocessor are while each one runs.

    python benchmarks/nf4_profile.py              # a CUDA device and Nsight Compute (ncu), a minute; saves "nf4_profile"

ncu runs this file again, in a process of its own, and each kernel several times over with cold caches. The clocks are left as they are.
All shares are of what the part could do at most: of DRAM during the whole launch, of the others while a multiprocessor has work.
"""

import argparse
import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

from course.lab import recorded

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


def work() -> None:
    """One launch of each kernel while the profiler looks, after one while it doesn't."""
    import torch

    from reference.kernels import nf4 as kernels

    torch.manual_seed(0)
    weight = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) * 0.02
    q = kernels.quantize_nf4(weight)
    row, rows = (torch.randn(count, SIDE, device="cuda", dtype=torch.bfloat16) for count in (1, 16))
    for look in (False, True):
        torch.cuda.synchronize()
        if look:
            torch.cuda.profiler.start()
        kernels.quantize_nf4(weight, check=False)
        kernels.dequantize_nf4(q)
        kernels.linear_nf4(row, q)
        kernels.linear_nf4(rows, q)
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
    run = subprocess.run([*look, sys.executable, __file__, "--work"], capture_output=True, text=True)
    return {"side": SIDE, "kernels": parse(run.stdout + run.stderr)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", action="store_true", help="only launch the kernels: for ncu")
    parser.add_argument("--out", type=Path, default=recorded.FOLDER, help="folder of the result (default: benchmarks/recorded)")
    options = parser.parse_args()
    if options.work:
        return work()
    result = measure()
    for name, row in result["kernels"].items():
        print(f"{name:12}" + "".join(f"{what} {value:,.1f}  " for what, value in row.items()))
    print(recorded.save("nf4_profile", result, options.out).name)


if __name__ == "__main__":
    main()
