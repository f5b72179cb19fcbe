"""The decision for GPUs without bfloat16. None is here: what CUDA says is replaced, and the decision is tested, not the speed."""

import contextlib

import pytest
import torch

from course import doctor
from reference import capability
from reference.qlora import product


@pytest.fixture
def card(monkeypatch):
    """A GPU of a given capability, as far as torch says."""

    def put(major: int, minor: int) -> torch.device:
        def is_bf16_supported(including_emulation: bool = True) -> bool:
            return including_emulation or (major, minor) >= (8, 0)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (major, minor))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        capability.has_bfloat16.cache_clear()
        return torch.device("cuda", 0)

    yield put
    capability.has_bfloat16.cache_clear()


class OnCard:
    """A tensor as far as the choice of kernels looks at it."""

    is_cuda = True

    def __init__(self, device: torch.device):
        self.device = device


@pytest.mark.parametrize("number, has", [((7, 0), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True)])
def test_bfloat16_begins_with_8_0_and_emulation_does_not_count(card, monkeypatch, number, has):
    device = card(*number)
    assert capability.has_bfloat16(device) is has
    assert capability.half_dtype(device) == (torch.bfloat16 if has else torch.float16)
    monkeypatch.setattr(product, "_TRITON", True)
    monkeypatch.setattr(product, "_kernels", lambda: "kernels")
    assert product.kernels_for(OnCard(device)) == ("kernels" if has else None)


def test_a_cpu_has_bfloat16():
    assert capability.half_dtype(torch.device("cpu")) == torch.bfloat16


def test_the_doctor_says_which_it_is(card):
    card(7, 5)
    finding = doctor.sixteen_bits()
    assert finding.state == doctor.NOTE and "capability 7.5 is below 8.0" in finding.found and "float16" in finding.mend
    card(9, 0)
    assert doctor.sixteen_bits().found.startswith("bfloat16")
