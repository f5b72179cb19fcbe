"""The first kernel gives what its four operators give, for every size, and writes nothing else."""

import re
import textwrap

import pytest
import torch

from course import ROOT

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from hypothesis import given, settings
from hypothesis import strategies as st

from reference.kernels.first import dequantize, dequantize_with_torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(n: int, block: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (n,), dtype=torch.int8, generator=g).to(DEVICE), torch.rand(-(-n // block), generator=g).to(DEVICE)


@settings(max_examples=15)
@given(st.integers(0, 3000), st.sampled_from((1, 32, 64, 100)), st.sampled_from((torch.float32, torch.float16)), st.integers(0, 99))
def test_it_equals_plain_torch(n, block, dtype, seed):
    codes, steps = draw(n, block, seed)
    assert torch.equal(dequantize(codes, steps, block, dtype), dequantize_with_torch(codes, steps, block, dtype))


def test_shapes_stay():
    codes, steps = draw(6 * 50, 64, 0)
    assert dequantize(codes.view(6, 50), steps, 64, torch.float32).shape == (6, 50)


def test_bad_inputs_are_refused():
    codes, steps = draw(128, 64, 0)
    with pytest.raises(ValueError, match="one step per block"):
        dequantize(codes, steps[:1], 64, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        dequantize(codes.view(2, 64).T, steps, 64, torch.float32)


def test_the_lesson_shows_the_code_that_is_tested():
    page, source = ((ROOT / path).read_text() for path in ("lessons/13_kernels.md", "reference/kernels/first.py"))
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(shown) == 2 and all(
        block.strip() in textwrap.dedent(source).replace("\n    ", "\n") or block.strip() in source for block in shown
    )
