"""The course's kernels and steps beside the libraries that people use, on one GPU, from recorded results.

The two sides of a row were measured in one run, on the same card. ``goal`` is how many times as fast as the library the work was meant
to be; it was set before it was measured, and one that was missed stays in the table. None where no goal was set.
"""

from dataclasses import dataclass

from course.lab import recorded
from course.lab.tables import columns

GOALS = {"quantize": 8, "dequantize": 1.27, "dequantize, double quantization": 1.27, 1: 2, 16: 2, 2048: 1, 8192: 1}
STEPS = {(1, 512): (3, None), (4, 2048): (1.25, 1)}  # (batch, sequence) -> goals for seconds and for the peak
OURS, PEER = "llama, compiled, graph", "peft"  # whole steps, as benchmarks/qlora_step.py names them


@dataclass(frozen=True)
class Row:
    """One piece of work: ``ours`` and ``library`` in ``unit``, less is better."""

    group: str
    work: str
    ours: float
    library: float
    unit: str
    goal: float | None = None

    @property
    def times(self) -> float:
        """The library's number over ours."""
        return self.library / self.ours

    @property
    def verdict(self) -> str:
        """ "met" or "not met"; nothing without a goal."""
        return "" if self.goal is None else "met" if self.times >= self.goal else "not met"


def kernels(device: str | None = None) -> list[Row]:
    """Quantizing, dequantizing and the linear layer beside bitsandbytes': milliseconds, weights of 8192 × 8192."""
    rows = []
    for row in recorded.load("nf4_kernels", device)["result"]["rows"]:
        count = row.get("rows")
        group, work = ("NF4 linear layer", f"{count:,} row{'s' * (count > 1)} of x") if count else ("NF4 weights", row["work"])
        rows.append(Row(group, work, row["ours"], row["bitsandbytes"], "ms", GOALS.get(count or row["work"])))
    return rows


def trained(device: str | None = None) -> list[Row]:
    """The NF4 layer in training, forward and backward, beside bitsandbytes': milliseconds, a weight of 8192 × 8192."""
    found = recorded.load("nf4_training", device)["result"]["rows"]
    group, goals = "NF4 linear layer, forward + backward", {2048: 1, 8192: 1}
    return [Row(group, f"{row['rows']:,} rows of x", row["ours"], row["bitsandbytes"], "ms", goals.get(row["rows"])) for row in found]


def layers(device: str | None = None) -> list[Row]:
    """A LoRA layer over bf16 weights beside peft's, forward and backward, α/r = 2: milliseconds."""
    training = recorded.load("lora_layer", device)["result"]["training"]
    chosen = {name.partition(",")[0]: row["milliseconds"] for name, row in training.items() if name.endswith("α/r = 2")}
    return [Row("LoRA layer, 4,096 rows, forward + backward", name, row["ours"], row["peft"], "ms") for name, row in chosen.items()]


def steps(device: str | None = None) -> list[Row]:
    """Whole QLoRA steps of Llama-2-7B's shape beside peft + bitsandbytes: seconds, and GB at the peak."""
    found = {(row["how"], row["batch"], row["sequence"]): row for row in recorded.load("qlora_step", device)["result"]["rows"]}
    rows = []
    for (batch, sequence), (fast, small) in STEPS.items():
        ours, peer = (found[how, batch, sequence] for how in (OURS, PEER))
        work = f"{batch} × {sequence:,} tokens"
        rows.append(Row("QLoRA step, 7B", work, ours["seconds"], peer["seconds"], "s", fast))
        rows.append(Row("QLoRA step, 7B", f"{work}, peak", ours["peak"] / 1e9, peer["peak"] / 1e9, "GB", small))
    return rows


def table(device: str | None = None) -> str:
    """All rows as text, missed goals said plainly; below them the steps under a cap, which no library's run is beside."""
    heads, lines, group = ("", "ours", "library", "", "library/ours", "goal", ""), [], None
    for row in (*kernels(device), *trained(device), *layers(device), *steps(device)):
        if row.group != group:
            group = row.group
            lines.append((group, *[""] * (len(heads) - 1)))
        goal = "" if row.goal is None else f"{row.goal:g}"
        lines.append((f"  {row.work}", row.ours, row.library, row.unit, f"{row.times:.2f}", goal, row.verdict))
    lines.append(("QLoRA step in one process, 1 × 512 tokens", *[""] * (len(heads) - 3), "cap", ""))
    for row in sorted(recorded.load("qlora_caps", device)["result"]["rows"], key=lambda row: row["cap"]):
        process, cap = (row["context"] + row["reserved"]) / 1e9, row["cap"] / 1e9
        lines.append((f"  {row['shape']}", process, None, "GB", "", f"{cap:g}", "met" if process <= cap else "not met"))
    return columns(heads, lines, ".3f")
