"""What ncu prints is read by kernel and metric, and what was recorded holds together."""

import pytest

from benchmarks import nf4_profile as benchmark
from course.lab import recorded

NAMES = ["ID", "Kernel Name", *benchmark.METRICS.values()]


def report(unit: str = "nsecond", kernels: tuple[str, ...] = tuple(benchmark.KERNELS.values())) -> str:
    rows = [NAMES, ["", "", unit, *["%"] * (len(NAMES) - 3)]]
    rows += [[str(i), f"{name}(int)", "1,234.5", *[str(10 * i + 1)] * (len(NAMES) - 3)] for i, name in enumerate(kernels)]
    return "==PROF== Connected\n" + "\n".join(",".join(f'"{value}"' for value in row) for row in rows) + "\n"


def test_a_report_is_read():
    found = benchmark.parse(report())
    assert list(found) == list(benchmark.KERNELS)
    assert found["1 row"]["microseconds"] == pytest.approx(1.2345) and found["1 row"]["dram"] == 21
    assert benchmark.parse(report("us"))["16 rows"]["microseconds"] == 1234.5


def test_what_is_missing_is_named():
    with pytest.raises(RuntimeError, match="ncu measured nothing; its last lines: ==ERROR== no permission"):
        benchmark.parse("==ERROR== no permission")
    with pytest.raises(RuntimeError, match="ncu saw no kernel _rows_kernel"):
        benchmark.parse(report(kernels=("_quantize_kernel", "_dequantize_kernel", "_vector_kernel")))


@pytest.mark.parametrize("kernel", benchmark.KERNELS)
def test_the_record_holds_together(kernel):
    """Shares are shares; integers and logic start at half the rate of all instructions together."""
    row = recorded.load("nf4_profile", device="h100")["result"]["kernels"][kernel]
    assert all(0 <= row[part] <= 100 for part in ("dram", "issue", "alu", "fma", "l1", "tensor"))
    assert row["alu instructions"] < row["instructions"]
    schedulers, busy = 4 * 132, row["alu instructions"] / row["cycles"]
    assert row["alu"] == pytest.approx(100 * busy / (schedulers * 0.5), rel=0.05)
