"""The NF4 kernels beside bitsandbytes, plain torch, torch.compile and the time in which their bytes cross the memory bus.

    python benchmarks/nf4_kernels.py              # a CUDA device, about half a minute; saves the recorded result "nf4_kernels"

One run, one card: a weight of 8192 × 8192 in bfloat16, blocks of 64. Each call takes the next of four weights, so that none waits in the
cache. Times are medians by CUDA events after warm-up, of the device alone: the launches of a call are queued before it begins. "Floor" is
the bytes that must move, each once, over the rate that a device-to-device copy reaches here.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from course.lab import recorded
from course.lab.meters import milliseconds
from reference import nf4 as plain
from reference.double_quant import dequantize_scales, quantize_scales
from reference.kernels import nf4 as kernels
from reference.nf4 import NF4Tensor

SIDE, BLOCK, COPIES = 8192, 64, 4
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)


def time(work: Callable, *columns: list, repeats: int = 24) -> float:
    """Median milliseconds of ``work`` over the rows of ``columns`` in turn."""
    rows = itertools.cycle(list(zip(*columns, strict=True)))
    return milliseconds(lambda: work(*next(rows)), repeats=repeats, warmup=2 * COPIES, queued=True)


def measure() -> dict:
    import bitsandbytes
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    weights = [torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(COPIES)]
    target = torch.empty_like(weights[0])
    n = SIDE * SIDE
    rate = 4 * n / time(target.copy_, weights)  # bytes in a millisecond, read and written
    ours = [kernels.quantize_nf4(w) for w in weights]
    scales = [quantize_scales(q.absmax) for q in ours]
    single = [bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4") for w in weights]
    double = [bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4", compress_statistics=True) for w in weights]
    packed_bytes, double_bytes = n / 2 + 4 * n / BLOCK, n / 2 + n / BLOCK + 4 * n / BLOCK / 256
    compiled = torch.compile(lambda packed, absmax: decode(packed, absmax))

    rows = [
        {
            "work": "quantize",
            "ours": time(lambda w: kernels.quantize_nf4(w, check=False), weights),
            "bitsandbytes": time(lambda w: bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4"), weights),
            "torch": time(plain.quantize_nf4, weights, repeats=4),
            "floor": (2 * n + packed_bytes) / rate,
        },
        {
            "work": "dequantize",
            "ours": time(kernels.dequantize_nf4, ours),
            "bitsandbytes": time(bnb.dequantize_4bit, *zip(*single, strict=True)),
            "torch": time(plain.dequantize_nf4, ours),
            "torch.compile": time(compiled, [q.packed for q in ours], [q.absmax for q in ours]),
            "floor": (2 * n + packed_bytes) / rate,
        },
        {
            "work": "dequantize, double quantization",
            "ours": time(lambda q, s: kernels.dequantize_nf4(q, None, s), ours, scales),
            "bitsandbytes": time(bnb.dequantize_4bit, *zip(*double, strict=True)),
            "floor": (2 * n + double_bytes) / rate,
        },
    ]
    flops = 2 * SIDE**3 / time(lambda w: w @ w, weights, repeats=8)  # in a millisecond
    for count in ROWS:
        x = torch.randn(count, SIDE, device="cuda", dtype=torch.bfloat16)
        rows.append(
            {
                "work": "linear",
                "rows": count,
                "ours": time(lambda q, x=x: kernels.linear_nf4(x, q), ours),
                "ours, double quantization": time(lambda q, s, x=x: kernels.linear_nf4(x, q, None, s), ours, scales),
                "bitsandbytes": time(lambda p, s, x=x: bitsandbytes.matmul_4bit(x, p.t(), quant_state=s), *zip(*single, strict=True)),
                "bf16 weights": time(lambda w, x=x: linear(x, w), weights),
                "floor": max((packed_bytes + 4 * count * SIDE) / rate, 2 * count * n / flops),
            }
        )
    return {"side": SIDE, "block_size": BLOCK, "copy_gigabytes_per_second": rate / 1e6, "rows": rows, "equal": equal(ours, scales, double)}


def decode(packed: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """What torch.compile is given: the same decoding as one expression."""
    codes = torch.stack([packed >> 4, packed & 15], -1).int().view(-1, BLOCK)  # (blocks, BLOCK)
    return (plain.NF4_CODEBOOK.to(packed.device)[codes] * absmax[:, None]).bfloat16().view(SIDE, SIDE)


def equal(ours: list[NF4Tensor], scales: list, double: list) -> dict[str, bool]:
    """Whether what was timed computes the same."""
    import bitsandbytes.functional as bnb

    packed, state = double[0]
    q, s = ours[0], scales[0]
    restored = NF4Tensor(q.packed, dequantize_scales(s), q.shape, q.dtype, q.block_size)
    return {
        "codes": torch.equal(q.packed.view(-1), packed.view(-1)),
        "dequantized": torch.equal(kernels.dequantize_nf4(q), plain.dequantize_nf4(q)),
        "double": torch.equal(kernels.dequantize_nf4(q, None, s), plain.dequantize_nf4(restored)),
        "double, bitsandbytes": torch.equal(kernels.dequantize_nf4(q, None, s), bnb.dequantize_4bit(packed, state)),
        "compiled": torch.equal(torch.compile(decode)(q.packed, q.absmax), plain.dequantize_nf4(q)),
    }


def table(result: dict) -> str:
    lines = [f"copy: {result['copy_gigabytes_per_second']:.0f} GB/s; milliseconds; × is bitsandbytes' time over ours"]
    for row in result["rows"]:
        name = f"{row['work']} {row.get('rows', '')}"
        others = "".join(f"{key} {row[key]:.4f}  " for key in row if key not in ("work", "rows", "ours", "bitsandbytes"))
        lines.append(
            f"{name:34}{row['ours']:8.4f}  bitsandbytes {row['bitsandbytes']:.4f} ({row['bitsandbytes'] / row['ours']:.2f}×)  {others}"
        )
    return "\n".join([*lines, f"equal: {result['equal']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=recorded.FOLDER, help="folder of the result (default: benchmarks/recorded)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise RuntimeError("the kernels are timed on a CUDA device, and this machine has none")
    result = measure()
    print(table(result))
    print(recorded.save("nf4_kernels", result, arguments.out).name)


if __name__ == "__main__":
    main()
