"""Bytes of tensors, counted exactly."""

import pytest
import torch
from torch import nn

from course.lab.live import LiveBytes, SavedForBackward, module_bytes, storage_bytes


def test_peak_and_what_is_left():
    with LiveBytes() as live:
        kept = torch.ones(1000)  # 4,000 bytes
        other = kept * 2  # and 4,000
        third = other.view(10, 100)[2:]  # a view holds no bytes of its own
        del other, third
        assert live.bytes == 4000
        kept += torch.ones(500).sum()  # 2,000 and 4 for a moment
    assert live.peak == 8000 and live.bytes == 4000
    del kept
    assert live.bytes == 0


def test_a_cap_is_kept():
    with LiveBytes(most=4000) as live:
        kept = torch.ones(1000)
        with pytest.raises(MemoryError, match="4,004 bytes are there, more than the cap of 4,000"):
            kept.sum()
        kept += 1  # in place it fits
    assert live.bytes == 4000


def test_the_backward_pass_is_counted():
    x, weight = torch.randn(50, 40), torch.randn(40, 30, requires_grad=True)
    with LiveBytes() as live:
        y = x @ weight
        y.backward(torch.ones_like(y))
    assert live.peak == 4 * (50 * 30 * 2 + 30 * 40)


def test_storages_count_once():
    x = torch.zeros(100)
    assert storage_bytes([x, x[:10], x.view(10, 10)]) == 400
    layer = nn.Linear(10, 20)
    tied = nn.Sequential(layer, layer)
    assert module_bytes(tied) == 4 * (200 + 20)


def test_what_a_layer_keeps():
    layer, x = nn.Linear(40, 30), torch.randn(50, 40)
    with SavedForBackward(layer) as saved:
        layer(x)
    assert saved.bytes == 4 * 50 * 40  # its input, for the weight's gradient
    layer.requires_grad_(False)
    with SavedForBackward(layer) as saved:
        layer(x.requires_grad_())
    assert saved.tensors == []  # only its own weight
    with SavedForBackward() as saved:
        layer(x)
    assert saved.bytes == 4 * 30 * 40


def test_the_meta_device_holds_nothing():
    with LiveBytes() as live:
        torch.ones(1000, device="meta") + 1
    assert live.peak == 0
