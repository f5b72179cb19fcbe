"""How near the NF4 kernels and their candidates come to what can be reached, each beside the share that the course aims at.

    python -m benchmarks.kernel_limits            # a CUDA device, some minutes; saves the recorded result "kernel_limits"

One run, one card: a weight of 8192 × 8192 in bfloat16, blocks of 64, timed as in ``nf4_kernels``. A row has the course's kernel ("ours"),
bitsandbytes, torch.compile of the same work in plain torch, the floor (bytes that must move over the rate of a copy; for the layer, if that
is longer, its products at the rate of bf16 weights with many rows), and every candidate of ``candidates_nf4`` that gives the same numbers.
"reached" is the floor over our time, or, for 16 to 128 rows, the time with bf16 weights over ours; "bar" is what it should be.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.cli import failed, message, record
from benchmarks.meters import cold_milliseconds
from benchmarks.nf4_kernels import BLOCK, COPIES, SIDE, decode
from course.lab.devices import device
from course.lab.tables import columns, short, wrapped
from reference import nf4 as plain
from reference.double_quant import double_quantize
from reference.nf4 import NF4Tensor

BARS = {"quantize": 0.85, "dequantize": 0.93, "dequantize, double quantization": 0.90, "one row": 0.70, "rows": 1.0}
ROWS = (1, 16, 32, 64, 128)
MANY = 8192  # rows whose products tell the rate of products
CLOSE = 0.02  # of the norm: products in 16 bits, added up in another order


def measure(
    side: int = SIDE, counts: tuple[int, ...] = ROWS, copies: int = COPIES, repeats: int = 24, many: int = MANY, first: int = 99
) -> dict:
    """``first``: how many candidates of each kind."""
    import bitsandbytes
    import bitsandbytes.functional as bnb

    from benchmarks import candidates_nf4 as candidates
    from reference.kernels import nf4 as kernels  # Triton is not needed to show a table

    where, time = device(), partial(cold_milliseconds, repeats=repeats)
    torch.manual_seed(0)
    half = torch.bfloat16 if where.type == "cuda" else torch.float16  # Triton's interpreter can't multiply bfloat16
    weights = [torch.randn(side, side, device=where, dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
    n = side * side
    rate = 4 * n / time(torch.empty_like(weights[0]).copy_, weights)  # bytes in a millisecond, read and written
    ours = [kernels.quantize_nf4(w) for w in weights]
    nested = [double_quantize(q) for q in ours]
    single = [bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4") for w in weights]
    double = [bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4", compress_statistics=True) for w in weights]
    packed_bytes, double_bytes = n / 2 + 4 * n / BLOCK, n / 2 + n / BLOCK + 4 * n / BLOCK / 256
    compiled = partial(torch.compile, backend="inductor" if where.type == "cuda" else "aot_eager")
    decoded = compiled(lambda packed, absmax: decode(packed, absmax, side))
    tensors = [q.packed for q in ours], [q.absmax for q in ours]

    def tried(ways: dict[str, Callable], *columns: list, same: Callable) -> list[dict]:
        return list(_tried(dict(islice(ways.items(), first)), columns, same, time))

    rows = [
        {
            "work": "quantize",
            "bar": BARS["quantize"],
            "ours": time(lambda w: kernels.quantize_nf4(w, check=False), weights),
            "bitsandbytes": time(lambda w: bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4"), weights),
            "torch.compile": time(compiled(encode), weights),
            "floor": (2 * n + packed_bytes) / rate,
            "candidates": tried(candidates.QUANTIZE, weights, same=lambda q: _equal(q, ours[0])),
        }
    ]
    for work, given, theirs, least, more in (
        ("dequantize", ours, single, packed_bytes, {"torch.compile": time(decoded, *tensors)}),
        ("dequantize, double quantization", nested, double, double_bytes, {}),
    ):
        right = plain.dequantize_nf4(given[0])
        rows.append(
            {
                "work": work,
                "bar": BARS[work],
                "ours": time(kernels.dequantize_nf4, given),
                "bitsandbytes": time(bnb.dequantize_4bit, *zip(*theirs, strict=True)),
                **more,
                "floor": (2 * n + least) / rate,
                "candidates": tried(candidates.DEQUANTIZE, given, same=lambda w, right=right: torch.equal(w, right)),
            }
        )
    wide = torch.randn(many, side, device=where, dtype=torch.bfloat16)
    fastest = time(lambda w: linear(wide, w), weights) / many  # milliseconds for the products of a row, many at a time
    right = plain.dequantize_nf4(ours[0]).to(half)
    for count in counts:
        x = torch.randn(count, side, device=where, dtype=half)
        ways = candidates.ONE_ROW if count == 1 else candidates.FEW_ROWS if count <= 64 else candidates.MORE_ROWS
        ways = {name: partial(_of, way, x) for name, way in ways.items()}
        expected = linear(x, right)
        rows.append(
            {
                "work": "linear",
                "rows": count,
                "bar": BARS["one row" if count == 1 else "rows"],
                "ours": time(lambda q, x=x: kernels.linear_nf4(x, q), ours),
                "bitsandbytes": time(lambda p, s, x=x: bitsandbytes.matmul_4bit(x, p.t(), quant_state=s), *zip(*single, strict=True)),
                "torch.compile": time(lambda p, a, x=x: linear(x, decoded(p, a).to(half)), *tensors),
                "bf16 weights": time(lambda w, x=x: linear(x, w.to(half)), weights),
                "floor": max((packed_bytes + 4 * count * side) / rate, count * fastest),
                "candidates": tried(ways, ours, same=lambda y, expected=expected: (y - expected).norm() <= CLOSE * expected.norm()),
            }
        )
    for row in rows:
        against = "bf16 weights" if row.get("rows", 1) > 1 else "floor"
        row["reached"] = row[against] / row["ours"]
        row["reached by the fastest"] = row[against] / min(row["ours"], *(found.get("ms", row["ours"]) for found in row["candidates"]))
    return {"side": side, "block_size": BLOCK, "copy_gigabytes_per_second": rate / 1e6, "rows": rows}


def _tried(ways: dict[str, Callable], columns: tuple, same: Callable, time: Callable) -> Iterator[dict]:
    """Of each way its milliseconds, or its problem."""
    for name, way in ways.items():
        try:
            right = same(way(*(column[0] for column in columns)))
            found = {"ms": time(way, *columns)} if right else {"problem": "gives other numbers"}
        except Exception as error:  # one that does not compile for this card leaves the others
            found = {"problem": message(error)}
        yield {"way": name} | found


def _of(way: Callable, x: Tensor, q: NF4Tensor) -> Tensor:
    return way(x, q)


def _equal(q: NF4Tensor, other: NF4Tensor) -> bool:
    return torch.equal(q.packed.view(-1), other.packed.view(-1)) and torch.equal(q.absmax, other.absmax)


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """What torch.compile is given to quantize: the same codes as one expression."""
    blocks = weight.view(-1, BLOCK).float()
    absmax = blocks.abs().amax(1)
    between = plain.midpoints(plain.NF4_CODEBOOK).to(weight.device)
    codes = (blocks / absmax[:, None] > between[:, None, None]).sum(0, dtype=torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], absmax


def table(result: dict) -> str:
    others = "bitsandbytes", "torch.compile", "bf16 weights", "floor"
    rows, lines = [], []
    for row in result["rows"]:
        name = f"{row['work']}, {row['rows']} row{'s' * (row['rows'] > 1)}" if "rows" in row else row["work"]
        verdict = "reached" if row["reached"] >= row["bar"] else f"missed, at {row['reached'] / row['bar']:.0%}"
        times = (short(1e3 * row[key]) if key in row else "" for key in ("ours", *others))
        rows.append([name.replace("double quantization", "nested"), *times, row["reached"], verdict])
        tried = sorted((found for found in row["candidates"] if "ms" in found), key=lambda found: found["ms"])
        speeds = ", ".join(f"{found['way'].replace(' × ', '×')} {row['ours'] / found['ms']:.2f}" for found in tried)
        lines.append(wrapped(f"{name}: {speeds or 'none'}; with the fastest {row['reached by the fastest']:.2f} of {row['bar']:.2f}"))
        lines += [failed(f"    {found['way']}", found["problem"]) for found in row["candidates"] if "problem" in found]
    heads = ("µs", "ours", "bnb", "compile", "bf16", "floor", "of it", "")
    copied = f"a copy reaches {result['copy_gigabytes_per_second']:.0f} GB/s; nested: double quantization; bnb: bitsandbytes"
    about = f"{copied}; of it: the floor over our time, from 16 rows the time of bf16 weights over ours, and whether that is the bar"
    return "\n".join([columns(heads, rows), wrapped(about), "", "Times as fast as ours:", *lines])


def main() -> None:
    record(
        "kernel_limits", __doc__, measure, table, small={"side": 256, "counts": (1, 16), "copies": 1, "repeats": 1, "many": 16, "first": 1}
    )


if __name__ == "__main__":
    main()
