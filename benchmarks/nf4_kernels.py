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

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels then run on the CPU
import triton
import triton.language as tl

from reference import nf4 as plain
from reference.double_quant import double_quantize
from reference.kernels import nf4 as kernels
from reference.nf4 import NF4Tensor

SIDE, BLOCK, COPIES = 8192, 64, 16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)


@triton.jit
def _read_kernel(packed_ptr, absmax_ptr, codes_ptr, scales_ptr, N, K_BLOCKS, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Sums of ROWS rows' words of codes, and of their scales, over one part of the features; BLOCKS blocks at a time."""
    WORDS: tl.constexpr = BLOCKS * BLOCK // 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    turns = K_BLOCKS // BLOCKS
    share = tl.cdiv(turns, tl.num_programs(1))
    first = tl.program_id(1) * share
    words_ptr = packed_ptr + row[:, None] * (K_BLOCKS * (BLOCK // 8)) + tl.arange(0, WORDS)[None, :]
    absmax_ptr += row[:, None] * K_BLOCKS + tl.arange(0, BLOCKS)[None, :]
    codes, scales = tl.zeros((ROWS, WORDS), tl.int32), tl.zeros((ROWS, BLOCKS), tl.float32)
    turn = tl.minimum(first, turns - 1)
    words, absmax = tl.load(words_ptr + turn * WORDS), tl.load(absmax_ptr + turn * BLOCKS)
    for turn in range(first, tl.minimum(first + share, turns)):
        turn = tl.minimum(turn + 1, turns - 1)  # the next are on their way while these are added
        next_words, next_absmax = tl.load(words_ptr + turn * WORDS), tl.load(absmax_ptr + turn * BLOCKS)
        codes, scales = codes + words, scales + absmax
        words, absmax = next_words, next_absmax
    tl.store(codes_ptr + tl.program_id(1) * N + row, tl.sum(codes, 1))
    tl.store(scales_ptr + tl.program_id(1) * N + row, tl.sum(scales, 1))


def read(q: NF4Tensor, parts: int, rows: int = 64, blocks: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """(parts, out_features) sums of codes, eight to a word, and of scales; sizes are multiples of ``rows`` and ``blocks`` blocks."""
    N, K = q.shape
    sums = [torch.empty(parts, N, dtype=dtype, device=q.packed.device) for dtype in (torch.int32, torch.float32)]
    words = q.packed.view(-1).view(torch.int32)
    _read_kernel[(N // rows, parts)](words, q.absmax, *sums, N, K // q.block_size, q.block_size, rows, blocks, num_warps=4)
    return tuple(sums)


def measure(side: int = SIDE, counts: tuple[int, ...] = ROWS, copies: int = COPIES, repeats: int = 24) -> dict:
    import bitsandbytes
    import bitsandbytes.functional as bnb

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
    lines = [f"copy: {result['copy_gigabytes_per_second']:.0f} GB/s; milliseconds; × is bitsandbytes' time over ours"]
    lines.append(f"codes and scales of a weight, read and added up: {result['reading']:.4f}")
    for row in result["rows"]:
        name = f"{row['work']} {row.get('rows', '')}"
        others = "".join(f"{key} {row[key]:.4f}  " for key in row if key not in ("work", "rows", "ours", "bitsandbytes"))
        lines.append(
            f"{name:34}{row['ours']:8.4f}  bitsandbytes {row['bitsandbytes']:.4f} ({row['bitsandbytes'] / row['ours']:.2f}×)  {others}"
        )
    return "\n".join([*lines, f"equal: {result['equal']}"])


def main() -> None:
    record("nf4_kernels", __doc__, measure, table, small={"side": 256, "counts": (1, 16), "copies": 1, "repeats": 1})


if __name__ == "__main__":
    main()
