"""reference.lora.dora against peft; its norm without B·A; merging; quantized bases; its kernels; its errors."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from family_helpers import LINEARS, MODELS, assert_parity, assert_unchanged, fill, logits, peft_model, snapshot, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import assert_same, tiny_llama
from torch import nn

from reference.lora import inject_lora, lora_layers, lora_state_dict, merge_lora
from reference.lora.dora import DoRALinear, inject_dora
from reference.qlora import NF4Linear, merge_into_dequantized, quantize_linears

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def dense_norms(layer):
    W = layer.dense().double()
    return (W + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)


def shaken(layer, spread=0.5):
    with torch.no_grad():
        for name in layer.factor_names:
            parameter = getattr(layer, name)
            parameter.add_(spread * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_model_trains_as_in_peft(kind, rslora):
    base = MODELS[kind]().eval()
    ours = copy.deepcopy(base)
    inject_dora(ours, 3, 5, LINEARS[kind], use_rslora=rslora)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEARS[kind], use_dora=True, use_rslora=rslora)
    theirs = peft_model(base, config)
    for name, parameter in trained(ours).items():
        if name.endswith("vector"):  # both start at the rows' norms
            assert_same(parameter.detach(), trained(theirs)[name].detach())
    fill(ours, theirs, 0.3)
    assert_parity(ours, theirs, ulps=64)
    before = logits(ours).detach()
    merged, theirs_merged = merge_lora(ours), theirs.merge_and_unload()
    assert_same(logits(merged), before, ulps=200)
    assert_same(logits(merged), logits(theirs_merged), ulps=32000)


@st.composite
def layers(draw):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    n_in, n_out, dtype = draw(st.integers(2, 40)), draw(st.integers(2, 40)), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    base = nn.Linear(n_in, n_out, bias=draw(st.booleans())).to(dtype)
    layer = DoRALinear(base, draw(st.integers(1, min(n_in, n_out, 9))), draw(st.sampled_from([1, 2.5, 7, 40])))
    return shaken(layer), torch.randn(*draw(st.sampled_from([(5,), (2, 3), ()])), n_in, dtype=dtype)


@given(layers())
@settings(max_examples=40, deadline=None)
def test_the_norm_needs_no_product_and_the_output_is_the_formulas(case):
    layer, x = case
    torch.testing.assert_close(layer.norms().double(), dense_norms(layer), rtol=1e-5, atol=1e-5)
    V = layer.base.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    W = layer.lora_magnitude_vector.double()[:, None] * V / V.norm(dim=1, keepdim=True)
    expected = F.linear(x.double(), W, None if layer.base.bias is None else layer.base.bias.double())
    size = F.linear(x.double().abs(), W.abs()).max().item() + 1
    tolerance = (1e-5 if x.dtype == torch.float32 else 2**-6) * size
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=tolerance)
    layer.merge()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=tolerance)
    layer.unmerge()


def test_it_starts_at_the_pretrained_model_and_a_zero_update_is_neutral():
    base = tiny_llama().eval()
    ours = copy.deepcopy(base)
    assert len(inject_dora(ours, 2, 3)) == 14
    assert_same(logits(ours), logits(base), ulps=16)
    assert {name.rpartition(".")[2] for name in lora_state_dict(ours)} == {"lora_A", "lora_B", "lora_magnitude_vector"}


def test_the_norm_is_a_constant_in_the_backward():
    """With a gradient through the norm, A's would be another: by more than a tenth here."""
    layer = shaken(DoRALinear(nn.Linear(12, 9), 3, 6))
    x, direction = torch.randn(7, 12), torch.randn(7, 9)
    layer(x).backward(direction)
    V = layer.base.weight.detach() + layer.scaling * layer.lora_B @ layer.lora_A
    y = F.linear(x, layer.lora_magnitude_vector[:, None] * V / V.norm(dim=1, keepdim=True), layer.base.bias)
    (through,) = torch.autograd.grad(y, layer.lora_A, direction)
    assert (through - layer.lora_A.grad).norm() > 0.1 * layer.lora_A.grad.norm()


def test_dropout_in_training_is_peft_s():
    base = nn.Sequential(nn.Linear(12, 9))
    ours = copy.deepcopy(base)
    inject_dora(ours, 3, 5, ["0"], lora_dropout=0.4)
    theirs = peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True, lora_dropout=0.4))
    layer, other = shaken(ours[0]), theirs.base_model.model[0]
    other.lora_A["default"].weight.data = layer.lora_A.detach().clone()
    other.lora_B["default"].weight.data = layer.lora_B.detach().clone()
    other.lora_magnitude_vector["default"].weight.data = layer.lora_magnitude_vector.detach().clone()
    x = torch.randn(64, 12)
    for mode in (True, False):
        layer.train(mode), other.train(mode)
        torch.manual_seed(3)
        mine = layer(x)
        torch.manual_seed(3)
        torch.testing.assert_close(mine, other(x), rtol=1e-5, atol=1e-5)


def test_over_nf4():
    base = tiny_llama().eval()
    quantize_linears(base, compute_dtype=torch.float32)
    ours = copy.deepcopy(base)
    names = inject_dora(ours, 3, 5, ["q_proj", "down_proj"])
    assert isinstance(ours.get_submodule(names[0]).base, NF4Linear)
    assert_same(logits(ours), logits(base), ulps=16)
    for _, layer in lora_layers(ours):
        shaken(layer)
        torch.testing.assert_close(layer.norms().double(), dense_norms(layer))
    before = logits(ours).detach()
    logits(ours).square().mean().backward()
    assert all(p.grad is not None for p in trained(ours).values())
    dense = merge_into_dequantized(copy.deepcopy(ours))
    assert_same(logits(dense), before, ulps=200)
    layer = ours.get_submodule(names[0])
    layer.merge()  # requantized
    with pytest.raises(ValueError, match="the norms of W are gone"):
        layer.unmerge()


def test_merging_twice_and_unmerging():
    layer = shaken(DoRALinear(nn.Linear(6, 5).bfloat16(), 2, 3))
    weight = layer.base.weight.clone()
    layer.merge()
    assert [p.requires_grad for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)] == [False] * 3
    with pytest.raises(ValueError, match="merged already"):
        layer.merge()
    layer.unmerge()
    assert torch.equal(layer.base.weight, weight) and layer.lora_magnitude_vector.requires_grad


def test_refusals_leave_the_model():
    model = tiny_llama()
    before = snapshot(model)
    for words, options in (("DoRA is for linear layers", dict(target_modules=["embed_tokens", "q_proj"])), ("r must be", dict(r=0))):
        with pytest.raises(ValueError, match=words):
            inject_dora(model, **{"r": 2, "lora_alpha": 3} | options)
        assert_unchanged(model, before)
    inject_dora(model, 2, 3, ["q_proj"])
    with pytest.raises(ValueError, match="wrapped already"):
        inject_dora(model, 2, 3, ["q_proj"])
    inject_lora(model, 2, 3, ["v_proj"])  # LoRA beside DoRA: magnitudes go on training
    assert all(layer.lora_magnitude_vector.requires_grad for name, layer in lora_layers(model) if name.endswith("q_proj"))


# ---- kernels: on CUDA, else in Triton's interpreter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 130, 5), (33, 16, 1), (7, 257, 20)])
def test_kernels_give_what_torch_gives(shape):
    pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")
    from reference.kernels import dora

    n, k, r = shape
    device, half = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float16)  # the interpreter cuts bfloat16 off
    g = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(*size, generator=g).to(device) for size in ((n, k), (r, k), (n, r)))
    W = W.to(half)
    squares, cross = dora.products(W, A, B)
    torch.testing.assert_close(squares, W.float().square().sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross, (W.float() @ A.T * B).sum(1), rtol=1e-4, atol=1e-4 * k**0.5 * r)
    u, grad = (torch.randn(150, n, generator=g).to(device, half) for _ in range(2))
    gain, bias = (torch.randn(n, generator=g).to(device) for _ in range(2))
    for shift in (None, bias):
        y = dora.gain(u, gain, None if shift is None else (1 - gain) * shift)
        right = u.float() * gain + (0 if shift is None else (1 - gain) * shift)
        torch.testing.assert_close(y, right.to(half), rtol=2**-7, atol=2**-7)
        grad_u, grad_gain = dora.back(grad, u, gain, shift)
        torch.testing.assert_close(grad_u, (grad.float() * gain).to(half), rtol=2**-7, atol=2**-7)
        away = u.float() - (0 if shift is None else shift)
        torch.testing.assert_close(grad_gain, (grad.float() * away).sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_on_a_gpu_it_gives_peft_s_numbers(bias):
    base = nn.Linear(1024, 768, bias=bias, device="cuda", dtype=torch.bfloat16)
    layer = shaken(DoRALinear(copy.deepcopy(base), 16, 32), 0.02)
    x, direction = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True), None
    y = layer(x)
    direction = torch.randn_like(y)
    y.backward(direction)
    exact = [each.detach().double().requires_grad_() for each in (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)]
    W, b = base.weight.double(), base.bias.double() if bias else None
    V = W + layer.scaling * exact[2] @ exact[1]
    right = F.linear(exact[0], (exact[3] / V.norm(dim=1).detach())[:, None] * V, b)
    right.backward(direction.double())
    assert (y.double() - right).norm() < 6e-3 * right.norm()
    for mine, other in zip((x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector), exact, strict=True):
        assert (mine.grad.double() - other.grad).norm() < 6e-3 * other.grad.norm()
    torch.testing.assert_close(layer.norms().double(), V.norm(dim=1).detach(), rtol=1e-5, atol=1e-5)


def test_the_helpers_parity_can_fail():
    base = tiny_llama().eval()
    ours = copy.deepcopy(base)
    inject_lora(ours, 2, 3, ["q_proj"])
    theirs = copy.deepcopy(ours)
    fill(ours, theirs)
    assert_parity(ours, theirs, steps=1)
    next(iter(trained(theirs).values())).data.mul_(1.01)
    with pytest.raises(AssertionError):
        assert_parity(ours, theirs, steps=1)
