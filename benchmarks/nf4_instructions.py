"""What the compiler makes of the NF4 linear kernels for an H100: instructions per weight in the loop over the weight.

    python -m benchmarks.nf4_instructions         # no GPU, Triton on Linux; seconds; saves the recorded result "nf4_instructions"

A scheduler starts one instruction of a warp in each clock, and an SM has four of them. So the count gives a time that no schedule can beat,
as the bytes over the memory's rate give another; which of the two is longer says what a faster kernel would have to save.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.cli import record
from course.lab.tables import wrapped

SIDE, BLOCK, LANES = 8192, 64, 32
SMS, SCHEDULERS, CLOCK = 132, 4, 1.98e9  # of an H100 SXM, at its highest clock
POINTERS = {"x_ptr": "*bf16", "packed_ptr": "*i32", "nested_ptr": "*fp32", "offset_ptr": "*fp32", "dynamic_ptr": "*fp32"}
POINTERS |= {
    "levels_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "table_ptr": "*i32",
    "pairs_ptr": "*i32",
    "parts_ptr": "*fp32",
    "arrived_ptr": "*i32",
    "out_ptr": "*bf16",
}
SIZES = "M", "N", "K_BLOCKS", "K_PAIRS"


def loop(listing: str) -> list[str]:
    """Names of the instructions ("FFMA", "SHFL") in the longest loop of a listing by nvdisasm."""
    instructions, labels, longest = [], {}, []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*);", line):
            instructions.append(code[1])
            target = re.search(r"`\((\.L_\w+)\)", code[2])
            if code[1] == "BRA" and target and labels.get(target[1], len(instructions)) < len(instructions) - len(longest):
                longest = instructions[labels[target[1]] :]
    return longest


def compiled(kernel, double: bool, options: dict, constants: dict, capability: int = 90):
    """The kernel as Triton compiles it for a compute capability, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | {"BLOCK": BLOCK, "NESTED": 256 if double else 1, "DOUBLE": double}
    kinds = POINTERS | {"absmax_ptr": "*u8" if double else "*fp32"} | dict.fromkeys(SIZES, "i32")
    signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants and name != "M"}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, LANES), options=options)


def listing(binary: bytes) -> str:
    """By nvdisasm, which comes with Triton."""
    from triton.backends.nvidia import compiler

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(compiler.__file__).parent / "bin" / "nvdisasm"
        return subprocess.run([tool, file.name], check=True, capture_output=True, text=True).stdout


def measure() -> dict:
    import triton

    from reference.kernels.nf4 import rows as nf4_rows
    from reference.kernels.nf4 import vector as nf4_vector

    found = {"triton": triton.__version__, "side": SIDE, "clock": CLOCK}
    row = {"BIAS": False, "PTX": True, "ODD": 0, "EVEN": True, "W": nf4_vector.WARPS}
    tile, warps, _ = nf4_rows.SIZES[16]
    rows = {"BIAS": False, "PTX": True, "ROWS_X": 16, "ROWS": tile, "W": warps}
    few = {"num_warps": warps, "num_stages": 1}
    kernels = {  # and how many weights a program decodes in one turn of the loop
        "1 row": (nf4_vector._vector_kernel, row, nf4_vector.OPTIONS, nf4_vector.ROWS * nf4_vector.FEATURES * nf4_vector.WARPS),
        "16 rows": (nf4_rows._rows_kernel, rows, few, tile * BLOCK),
    }
    for name, (kernel, constants, options, weights) in kernels.items():
        for double in (False, True):
            names = loop(listing(compiled(kernel, double, options, constants).asm["cubin"]))
            a_lane = weights / (LANES * options["num_warps"])
            each = len(names) / a_lane
            found[name + ", double quantization" * double] = {
                "instructions": each,
                "kinds": {kind: count / a_lane for kind, count in Counter(names).most_common(12)},
                "milliseconds": 1e3 * each * SIDE**2 / (SMS * SCHEDULERS * LANES * CLOCK),
            }
    return found


def table(result: dict) -> str:
    lines = []
    for name, row in result.items():
        if isinstance(row, dict):
            lines.append(wrapped(f"{name}: {row['instructions']:.2f} instructions a weight, {row['milliseconds']:.4f} ms to start them"))
            lines.append(wrapped("    " + ", ".join(f"{kind}\N{NO-BREAK SPACE}{count:.2f}" for kind, count in row["kinds"].items())))
    return "\n".join(lines)


def main() -> None:
    record("nf4_instructions", __doc__, measure, table, small={}, where="cpu")  # it takes seconds anyway


if __name__ == "__main__":
    main()
