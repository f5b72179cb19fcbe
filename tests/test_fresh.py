"""What a notebook's function takes along into a new process."""

import math

import pytest
import torch

from course.lab.fresh import in_fresh_process, source
from course.lab.meters import show_bytes as shown

triton = pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")
tl = triton.language

TILE, values = 16, torch.ones(3)


@triton.jit
def double_kernel(x_ptr, out_ptr, n, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out_ptr + place, 2 * tl.load(x_ptr + place, place < n), place < n)


def worked_double(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    double_kernel[(triton.cdiv(len(x), TILE),)](x, out, len(x), TILE)
    return out


double = worked_double  # as where a reader's function is not written yet


def total(n: int, unit: str) -> dict:
    values = torch.arange(float(n))  # its own, not the one above
    return {"sum": double(values).sum().item(), "shown": shown(n), "unit": unit, "root": math.sqrt(n)}


def uses_a_tensor() -> float:
    return values.sum().item()


def fails() -> None:
    raise ZeroDivisionError("on purpose")


def test_it_takes_kernels_functions_modules_and_constants_along():
    assert in_fresh_process(total, 25, "ms") == {"sum": 600.0, "shown": "25 B", "unit": "ms", "root": 5.0}
    lines = source(total).splitlines()
    assert "TILE = 16" in lines and "import math as math" in lines and "double = worked_double" in lines
    assert "from course.lab.meters import show_bytes as shown" in lines


def test_what_cannot_be_written_down_is_named():
    with pytest.raises(ValueError, match=r"values is a Tensor, .* make it inside uses_a_tensor"):
        in_fresh_process(uses_a_tensor)


def test_a_failure_there_is_told_here():
    with pytest.raises(RuntimeError, match=r"fails failed in its process: (.|\n)*on purpose"):
        in_fresh_process(fails)
