"""The NF4 kernels beside bitsandbytes, plain torch, torch.compile and the time in which their bytes cross the memory bus.

    python -m benchmarks.nf4_kernels              # a CUDA device, about half a minute; saves the recorded result "nf4_kernels"

One run, one card: a weight of 8192 × 8192 in bfloat16, blocks of 64. Each call takes the next of sixteen weights, so that none waits in
the cache. (Of four weights in four bits, a part would still be there: more of it if a kernel asks the cache to forget its weight first.)
Times are medians by CUDA events after warm-up, of the device alone: the launches of a call are queued before it begins. "Floor" is the
bytes that must move, each once, over the rate that a device-to-device copy reaches here; for the layer, if that is longer, the time of its
products at the rate that bf16 weights reach with the most rows. "Reading" is a launch that reads the codes and scales of the layer's
weight, adds them up and does nothing else, in the fastest of a few ways to share them out.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear

from benchmarks.cli import record
from benchmarks.meters import cold_milliseconds
from course.lab.devices import device
from course.lab.tables import columns, short, wrapped

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels then run on the CPU
from reference import nf4 as plain
from reference.double_quant import double_quantize
from reference.nf4 import NF4Tensor

SIDE, BLOCK, COPIES = 8192, 64, 16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)


def measure(side: int = SIDE, counts: tuple[int, ...] = ROWS, copies: int = COPIES, repeats: int = 24) -> dict:
    import bitsandbytes
    import bitsandbytes.functional as bnb

    from benchmarks.reading_nf4 import read
    from reference.kernels import nf4 as kernels  # Triton is not needed to show a table

    where, time = device(), partial(cold_milliseconds, repeats=repeats)
    torch.manual_seed(0)
    weights = [torch.randn(side, side, device=where, dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
    target = torch.empty_like(weights[0])
    n = side * side
    rate = 4 * n / time(target.copy_, weights)  # bytes in a millisecond, read and written
    ours = [kernels.quantize_nf4(w) for w in weights]
    nested = [double_quantize(q) for q in ours]
    single = [bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4") for w in weights]
    double = [bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4", compress_statistics=True) for w in weights]
    packed_bytes, double_bytes = n / 2 + 4 * n / BLOCK, n / 2 + n / BLOCK + 4 * n / BLOCK / 256
    backend = "inductor" if where.type == "cuda" else "aot_eager"  # in seconds, where nothing is timed
    compiled = torch.compile(lambda packed, absmax: decode(packed, absmax, side), backend=backend)

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
            "ours": time(kernels.dequantize_nf4, nested),
            "bitsandbytes": time(bnb.dequantize_4bit, *zip(*double, strict=True)),
            "floor": (2 * n + double_bytes) / rate,
        },
    ]
    for count in counts:
        x = torch.randn(count, side, device=where, dtype=torch.bfloat16)
        rows.append(
            {
                "work": "linear",
                "rows": count,
                "ours": time(lambda q, x=x: kernels.linear_nf4(x, q), ours),
                "ours, double quantization": time(lambda q, x=x: kernels.linear_nf4(x, q), nested),
                "bitsandbytes": time(lambda p, s, x=x: bitsandbytes.matmul_4bit(x, p.t(), quant_state=s), *zip(*single, strict=True)),
                "bf16 weights": time(lambda w, x=x: linear(x, w), weights),
            }
        )
    fastest = rows[-1]["bf16 weights"] / counts[-1]  # milliseconds for the products of a row, many at a time
    for row in rows:
        if count := row.get("rows"):
            row["floor"] = max((packed_bytes + 4 * count * side) / rate, count * fastest)
    reading = min(time(partial(read, parts=parts, blocks=blocks), ours) for parts in (2, 3, 4, 6, 8) for blocks in (2, 4))
    found = {"side": side, "block_size": BLOCK, "copy_gigabytes_per_second": rate / 1e6, "reading": reading, "rows": rows}
    return found | {"equal": equal(ours, nested, double, compiled)}


def decode(packed: torch.Tensor, absmax: torch.Tensor, side: int) -> torch.Tensor:
    """What torch.compile is given: the same decoding as one expression."""
    codes = torch.stack([packed >> 4, packed & 15], -1).int().view(-1, BLOCK)  # (blocks, BLOCK)
    return (plain.NF4_CODEBOOK.to(packed.device)[codes] * absmax[:, None]).bfloat16().view(side, side)


def equal(ours: list[NF4Tensor], nested: list[NF4Tensor], double: list, compiled: Callable) -> dict[str, bool]:
    """Whether what was timed computes the same."""
    import bitsandbytes.functional as bnb

    from reference.kernels import nf4 as kernels

    packed, state = double[0]
    q, n = ours[0], nested[0]
    return {
        "codes": torch.equal(q.packed.view(-1), packed.view(-1)),
        "dequantized": torch.equal(kernels.dequantize_nf4(q), plain.dequantize_nf4(q)),
        "double": torch.equal(kernels.dequantize_nf4(n), plain.dequantize_nf4(n)),
        "double, bitsandbytes": torch.equal(kernels.dequantize_nf4(n), bnb.dequantize_4bit(packed, state)),
        "compiled": torch.equal(compiled(q.packed, q.absmax), plain.dequantize_nf4(q)),
    }


def table(result: dict) -> str:
    keys = "ours", "ours, double quantization", "bitsandbytes", "torch", "torch.compile", "bf16 weights", "floor"
    heads = ("µs", "ours", "nested", "bnb", "×", "torch", "compile", "bf16", "floor")
    rows = []
    for row in result["rows"]:
        times = [short(1e3 * row[key]) if key in row else "" for key in keys]
        name = f"{row['rows']:,} row{'s' * (row['rows'] > 1)}" if "rows" in row else row["work"].replace("double quantization", "nested")
        rows.append([name, *times[:3], f"{row['bitsandbytes'] / row['ours']:.2f}", *times[3:]])
    copied = f"a copy reaches {result['copy_gigabytes_per_second']:.0f} GB/s"
    reading = f"reading codes and scales takes {1e3 * result['reading']:.1f} µs"
    different = [name for name, same in result["equal"].items() if not same]
    equal = f"NOT the same results: {', '.join(different)}" if different else "all give the same results"
    about = "nested: ours with double quantization; bnb: bitsandbytes; ×: its time over ours; bf16: a layer of bf16 weights"
    return "\n".join([columns(heads, rows), wrapped(about), wrapped(f"{copied}; {reading}; {equal}")])


def main() -> None:
    record("nf4_kernels", __doc__, measure, table, small={"side": 256, "counts": (1, 16), "copies": 1, "repeats": 1})


if __name__ == "__main__":
    main()
