"""The decision for GPUs without bfloat16. None is here: what CUDA says is replaced, and the decision is tested, not the speed."""

import contextlib
import inspect

import pytest
import torch

from course import doctor
from reference import capability
from reference.lora import mixed
from reference.paging import PagedAdamW, optimizer
from reference.qlora import NF4Linear, product, quantize_linears
from reference.qlora import layer as qlora_layer


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
    shape = torch.Size((mixed.FEW_ROWS, 64))

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16):
        self.device, self.dtype = device, dtype

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return 8


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


@pytest.mark.parametrize("number", [(7, 5), (8, 0)])
def test_the_low_rank_update_takes_its_kernels_only_with_bfloat16(card, monkeypatch, number):
    device = card(*number)
    monkeypatch.setattr(mixed, "_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x, factor = OnCard(device), OnCard(device, torch.float32)
    assert mixed.takes_kernels(x, x, factor, factor) is (number >= (8, 0))


def test_a_compiled_update_is_torchs_without_bfloat16(monkeypatch):
    """The compiler meets one operation and asks nothing; the operation itself decides."""
    monkeypatch.setattr(mixed, "has_bfloat16", lambda device: False)
    y, x, grad = (torch.randn(6, width).bfloat16() for width in (5, 8, 5))
    A, B = torch.randn(3, 8), torch.randn(5, 3)
    total, h = mixed.kernels_forward(y, x, A, B, 0.7)
    assert torch.equal(total, mixed._with_torch(y, x, A, B, 0.7)[0])
    found = mixed.kernels_backward(grad, x, h, A, B, 0.7)
    for one, other in zip(found, mixed._back_with_torch(grad, x, h, A, B, 0.7, (True, True, True)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("has", [False, True])
def test_pages_are_updated_by_torch_without_bfloat16(monkeypatch, has):
    monkeypatch.setattr(optimizer, "has_bfloat16", lambda device: has)
    monkeypatch.setattr(optimizer, "find_spec", lambda name: True)
    parameter = torch.nn.Parameter(torch.ones(8))
    adam = PagedAdamW([parameter], page_bytes=1 << 10)
    gradients = {0: torch.ones(8)}
    numbers = adam._count(gradients)
    adam.pool.device = torch.device("cuda")
    if has:
        asked = []
        monkeypatch.setattr("reference.kernels.adamw.Tables.of", lambda pages, device: asked.append(device))
        monkeypatch.setattr("reference.kernels.adamw.PageUpdates", lambda *given: "kernel")
        assert adam._updater(gradients, numbers) == "kernel" and asked == [adam.pool.device]
    else:
        with torch.no_grad():
            adam._updater(gradients, numbers)(0, torch.zeros(2, 8))
        assert parameter[0] < 1


def test_qlora_computes_in_what_the_device_has(monkeypatch):
    linear, x = torch.nn.Linear(64, 32, bias=False), torch.randn(3, 64)
    assert NF4Linear.from_linear(linear).compute_dtype == NF4Linear(64, 32).compute_dtype == torch.bfloat16
    asked = []
    monkeypatch.setattr(qlora_layer, "half_dtype", lambda device: asked.append(device) or torch.float16)
    layer, model = NF4Linear.from_linear(linear), torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    assert layer.compute_dtype == torch.float16 and asked == [torch.device("cpu")]
    assert torch.equal(layer(x), (x.half() @ layer.dequantize(torch.float16).T).float())
    quantize_linears(model)
    assert model[0].compute_dtype == torch.float16
    assert NF4Linear.from_linear(linear, compute_dtype=torch.float32).compute_dtype == torch.float32


def test_torch_counts_emulation_unless_told_otherwise():
    assert inspect.signature(torch.cuda.is_bf16_supported).parameters["including_emulation"].default is True
