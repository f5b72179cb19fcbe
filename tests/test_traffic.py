"""Bytes that operators move: against what can be counted by hand."""

import pytest
import torch

from course.lab.traffic import MovedBytes


@pytest.mark.parametrize(
    "work, expected",
    [
        (lambda x: x + x, 3 * 4),  # both arguments and the result
        (lambda x: x > 0, 4 + 1),
        (lambda x: x.add_(1), 2 * 4),  # read and written in place
        (lambda x: x.bfloat16(), 4 + 2),
        (lambda x: x.view(-1)[3:], 0),  # views move nothing
        (lambda x: torch.empty(7, 9), 0),
        (lambda x: torch.empty_like(x).copy_(x), 2 * 4),  # the target is written, not read
        (lambda x: (x * 2).exp(), 4 * 4),  # the intermediate result twice
    ],
)
def test_a_value_moves_so_many_bytes(work, expected):
    x = torch.randn(7, 9)
    with MovedBytes() as moved:
        work(x)
    assert moved.bytes == expected * x.numel()
