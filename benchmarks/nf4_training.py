"""The NF4 linear layer in training, forward and backward, beside bitsandbytes' and bf16 weights.

    python -m benchmarks.nf4_training             # a CUDA device, seconds; saves the recorded result "nf4_training"

Measured as in benchmarks.nf4_kernels. The weight is frozen, so the gradient of x is the only one: y = x · Ŵᵀ, then ∂L/∂y · Ŵ.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.cli import record
from benchmarks.meters import cold_milliseconds as time
from benchmarks.nf4_kernels import BLOCK, COPIES, SIDE
from course.lab.tables import columns, wrapped
from reference.qlora.layer import NF4Linear

ROWS = 512, 2048, 8192


def both_ways(forward: Callable, x: Tensor, direction: Tensor) -> Callable[..., Tensor]:
    """The product with a weight, and the gradient of x."""
    return lambda *weight: torch.autograd.grad(forward(x, *weight), x, direction)[0]


def contestants(weights: list[Tensor]) -> dict[str, tuple]:
    """Name -> how x is multiplied with what, and lists of what."""
    import bitsandbytes
    import bitsandbytes.functional as bnb

    packed, states = zip(*(bnb.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4") for w in weights), strict=True)
    return {
        "ours": (lambda x, layer: layer(x), [NF4Linear.from_weight(w, None, BLOCK, False) for w in weights]),
        "ours, double quantization": (lambda x, layer: layer(x), [NF4Linear.from_weight(w, None, BLOCK, True) for w in weights]),
        "bitsandbytes": (lambda x, codes, state: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state), packed, states),
        "bf16 weights": (linear, weights),
    }


def measure(side: int = SIDE, counts: tuple[int, ...] = ROWS, repeats: int = 24, where: str = "cuda") -> dict:
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device=where, dtype=torch.bfloat16)  # noqa: E731
    given = contestants([draw(side, side) * 0.02 for _ in range(COPIES)])
    rows, gradients = [], {}
    for count in counts:
        x, direction = draw(count, side).requires_grad_(), draw(count, side)
        row = {"rows": count}
        for name, (forward, *weights) in given.items():
            work = both_ways(forward, x, direction)
            row[name] = time(work, *weights, repeats=repeats)
            gradients[name] = work(*(column[0] for column in weights)).double()
        row["difference"] = ((gradients["ours"] - gradients["bitsandbytes"]).norm() / gradients["bitsandbytes"].norm()).item()
        rows.append(row)
    return {"side": side, "block_size": BLOCK, "rows": rows}


def table(result: dict) -> str:
    heads = ("forward + backward, ms", "ours", "nested", "bitsandbytes", "×", "bf16 weights")
    keys = "ours", "ours, double quantization", "bitsandbytes", "bf16 weights"
    rows = []
    for row in result["rows"]:
        *times, half = (f"{row[key]:.4f}" for key in keys)
        rows.append([f"{row['rows']:,} rows", *times, f"{row['bitsandbytes'] / row['ours']:.2f}", half])
    apart = max(row["difference"] for row in result["rows"])
    about = f"nested: ours with double quantization; ×: bitsandbytes' time over ours; gradients differ by at most {apart:.1e}"
    return "\n".join([columns(heads, rows), wrapped(about)])


def main() -> None:
    record("nf4_training", __doc__, measure, table, small={"side": 128, "counts": (3, 70), "repeats": 2, "where": "cpu"})


if __name__ == "__main__":
    main()
