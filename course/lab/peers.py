"""The course's kernels and steps beside the libraries that people use, on two GPUs, from recorded results.

The two sides of a comparison were measured in one run, on the same card. ``goal`` is how many times as fast as the library the work was
meant to be; it was set before it was measured, and one that was missed stays in the table. None where no goal was set.
"""

from collections.abc import Sequence
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


def all_rows(device: str | None = None) -> list[Row]:
    """Every comparison measured on that card."""
    return [*kernels(device), *trained(device), *layers(device), *steps(device)]


def table(devices: Sequence[str] = ("h100", "h200")) -> str:
    """All rows as text, the cards side by side, missed goals said plainly; below them steps under a cap, which have no peer.

    Args:
        devices: parts of the names of the devices' folders, as :func:`recorded.load` takes them.
    """
    heads = ("", "", *(name for card in devices for name in (f"{card.upper()}: ours", "library", "×")), "goal", "")
    lines, group = [], None
    for rows in zip(*map(all_rows, devices), strict=True):
        first = rows[0]
        if first.group != group:
            group = first.group
            lines.append((group, *[""] * (len(heads) - 1)))
        numbers = [each for row in rows for each in (row.ours, row.library, f"{row.times:.2f}")]
        missed = [card.upper() for card, row in zip(devices, rows, strict=True) if row.verdict == "not met"]
        verdict = f"not met on {', '.join(missed)}" if missed else first.verdict
        lines.append((f"  {first.work}", first.unit, *numbers, "" if first.goal is None else f"{first.goal:g}", verdict))
    lines.append(("QLoRA step in one process, 1 × 512 tokens", *[""] * (len(heads) - 3), "cap", ""))
    for rows in zip(*map(_capped, devices), strict=True):
        processes = [(row["context"] + row["reserved"]) / 1e9 for row in rows]
        cap = rows[0]["cap"] / 1e9
        numbers = [each for process in processes for each in (process, None, "")]
        lines.append((f"  {rows[0]['shape']}", "GB", *numbers, f"{cap:g}", "met" if max(processes) <= cap else "not met"))
    return columns(heads, lines, ".3f")


def _capped(device: str) -> list[dict]:
    return sorted(recorded.load("qlora_caps", device)["result"]["rows"], key=lambda row: row["cap"])
