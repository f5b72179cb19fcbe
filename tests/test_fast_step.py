"""A recorded step and compiled layers train as ordinary ones do."""

import copy
import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from reference.llama import Llama  # noqa: E402
from reference.llama.step import GraphedStep, capturable_adamw, compile_layers  # noqa: E402
from reference.lora import (  # noqa: E402
    inject_lora,
    lora_layers,
    mixed,
)
from reference.model_shapes import ModelShape  # noqa: E402
from reference.qlora import NF4Linear, quantize_linears  # noqa: E402
from reference.qlora.ops import dequantize, nf4_product  # noqa: E402
from reference.qlora.product import parts  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
SMALL = ModelShape("small", 128, 3, 4, 2, 32, 192, 50)


def qlora(seed=0, device=DEVICE):
    torch.manual_seed(seed)
    model = Llama(SMALL).bfloat16().to(device)
    quantize_linears(model)
    inject_lora(model, 4, 12)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batches(count, device=DEVICE):
    random = torch.Generator().manual_seed(1)
    return [torch.randint(50, (2, 24), generator=random).to(device) for _ in range(count)]


def ordinary(model, ids, lr=1e-3):
    optimizer, losses = torch.optim.AdamW(trained(model), lr=lr), []
    for batch in ids:
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def graphed(model, ids, lr=1e-3):
    step = GraphedStep(model, capturable_adamw(trained(model), lr), Llama.loss, ids[0])
    return [loss.item() for loss in [step.step(batch) for batch in ids]]


def test_without_cuda_it_is_an_ordinary_step():
    cpu = torch.device("cpu")
    one, other, ids = qlora(device=cpu), qlora(device=cpu), batches(4, cpu)
    assert graphed(one, ids) == ordinary(other, ids)
    for mine, theirs in zip(trained(one), trained(other), strict=True):
        assert torch.equal(mine, theirs) and mine.grad is not None


@pytest.mark.gpu
def test_ten_recorded_steps_are_ten_ordinary_ones():
    one, other, ids = qlora(), qlora(), batches(10)
    assert graphed(one, ids) == pytest.approx(ordinary(other, ids), rel=2e-3)
    for mine, theirs in zip(trained(one), trained(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-3)  # fused and plain AdamW differ where a gradient is nearly zero
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.gpu
def test_recording_changes_neither_weights_nor_state():
    model = qlora()
    before = [parameter.detach().clone() for parameter in trained(model)]
    optimizer = capturable_adamw(trained(model), 1e-2)
    step = GraphedStep(model, optimizer, Llama.loss, batches(1)[0])
    assert all(torch.equal(mine, old) for mine, old in zip(trained(model), before, strict=True))
    assert all(not tensor.any() for state in optimizer.state.values() for tensor in state.values())
    again = GraphedStep(model, optimizer, Llama.loss, batches(1)[0])  # with state that a step has filled
    step.step(batches(1)[0])
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    again = GraphedStep(model, optimizer, Llama.loss, batches(1)[0])
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[i][key], kept[i][key]) for i in kept for key in kept[i])
    losses = [again.step(batches(1)[0]).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    optimizer.param_groups[0]["lr"].fill_(0.0)
    before = [parameter.detach().clone() for parameter in trained(model)]
    again.step(batches(1)[0])
    assert all(torch.equal(mine, old) for mine, old in zip(trained(model), before, strict=True))  # the rate is read at every replay


@pytest.mark.gpu
def test_compiled_layers_can_be_recorded():
    one, other, ids = qlora(), qlora(), batches(5)
    compile_layers(one)
    assert graphed(one, ids) == pytest.approx(ordinary(other, ids), rel=5e-3)


@pytest.mark.gpu
def test_an_optimizer_that_counts_on_the_cpu_is_refused():
    model = qlora()
    with pytest.raises(ValueError, match="capturable=True"):
        GraphedStep(model, torch.optim.AdamW(trained(model)), Llama.loss, batches(1)[0])


def test_other_shapes_are_refused():
    model = qlora()
    step = GraphedStep(model, capturable_adamw(trained(model), 1e-3), Llama.loss, batches(1)[0])
    with pytest.raises(ValueError, match=r"\(2, 24\)"):
        step.step(batches(1)[0][:1])
    with pytest.raises(ValueError, match="empty"):
        capturable_adamw([], 1e-3)


# ---- compiling


def test_layers_compile_whole_and_once_for_all(monkeypatch):
    monkeypatch.setattr(mixed, "FEW_ROWS", 0)  # the kernels, or none, in both models: they round elsewhere
    plain, compiled, ids = qlora(), qlora(), batches(1)[0]
    counter = CompileCounterWithBackend("aot_eager")
    assert compile_layers(compiled, counter) == SMALL.layers  # fullgraph: a break would raise
    for model in (plain, compiled):
        model.loss(ids).backward()
    assert counter.frame_count == 2  # the first layer's input needs no gradient
    for mine, theirs in zip(trained(compiled), trained(plain), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5 * theirs.grad.abs().max().item())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_operation_is_the_layer_s_product(double_quant, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, bias, device=DEVICE)
    layer = NF4Linear.from_linear(linear, 32, double_quant, torch.float32)
    x = torch.randn(2, 5, 96, device=DEVICE, requires_grad=True)
    sizes = (*layer.shape, layer.block_size)
    packed = parts(layer.quantized)
    assert torch.equal(dequantize(*packed, *sizes, torch.bfloat16), layer.dequantize(torch.bfloat16))
    torch.library.opcheck(torch.ops.nf4.linear.default, (x, layer.bias, *packed, *sizes))
    torch.library.opcheck(torch.ops.nf4.dequantize.default, (*packed, *sizes, torch.float16))
    results = []
    compiled = torch.compile(lambda x, bias: nf4_product(x, bias, layer.quantized), backend="aot_eager", fullgraph=True)
    for run in (compiled, lambda x, bias: nf4_product(x, bias, layer.quantized)):
        x.grad = None
        with torch.autocast(DEVICE.type, torch.bfloat16):  # which changes nothing
            y = run(x, layer.bias)
        y.square().sum().backward()
        results.append((y.detach(), x.grad.clone()))
        assert y.dtype == torch.float32
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


# ---- the update on the tensor cores


@pytest.mark.parametrize("rows, inside, outside, r, scaling", [(37, 48, 130, 5, 0.7), (70, 33, 65, 16, 2.0), (1, 64, 64, 20, 1.5)])
def test_the_update_in_pieces_has_float32_s_precision(rows, inside, outside, r, scaling):
    low_rank = pytest.importorskip("reference.kernels.low_rank")
    torch.manual_seed(0)
    A, B = torch.randn(r, inside, device=DEVICE) / inside**0.5, torch.randn(outside, r, device=DEVICE) / 3
    x, y, grad = (torch.randn(rows, width, device=DEVICE).bfloat16() for width in (inside, outside, outside))
    pieces = low_rank.pieces(A)
    assert pieces.dtype == torch.bfloat16 and torch.equal(pieces.float().view(r, 3, inside).sum(1), A)  # nothing is lost
    total, h = low_rank.forward(y, x, A, B, scaling)
    grad_x, grad_A, grad_B = low_rank.backward(grad, x, h, A, B, scaling)
    wide = [t.double() for t in (y, x, A, B, grad)]
    Y, X, a, b, G = wide
    right = {"total": Y + scaling * X @ a.T @ b.T, "h": X @ a.T, "x": scaling * G @ b @ a, "A": scaling * (G @ b).T @ X}
    right["B"] = scaling * G.T @ (X @ a.T)
    ours = {"total": total, "h": h, "x": grad_x, "A": grad_A, "B": grad_B}
    for name, exact in right.items():
        half = name in ("total", "x")
        assert ours[name].dtype == (torch.bfloat16 if half else torch.float32)
        # The interpreter cuts bfloat16 off instead of rounding
        tolerance = (2**-8 if CUDA else 2**-7) if half else 2e-6
        size = exact.abs().max().item()
        torch.testing.assert_close(ours[name].double(), exact, rtol=tolerance, atol=tolerance * (1e-3 if half else 1) * size, msg=name)


def test_the_layer_takes_the_kernels_where_it_can_and_learns_the_same(monkeypatch):
    pytest.importorskip("triton")
    layer = inject_one()
    x = torch.randn(3, 21, 64, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for takes in (True, False):
        monkeypatch.setattr(mixed, "takes_kernels", lambda *_, takes=takes: takes)
        layer.zero_grad()
        x.grad, x.requires_grad = None, True
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad.clone(), layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).norm() < 0.01 * theirs.norm() and mine.dtype == theirs.dtype


def test_the_update_s_operations_are_whole():
    pytest.importorskip("triton")
    torch.manual_seed(0)
    x, y, A, B = (torch.randn(*s, device=DEVICE) for s in ((5, 32), (5, 48), (4, 32), (48, 4)))
    x, y = x.bfloat16(), y.bfloat16()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lora.forward.default, (y, x, A, B, 0.5), test_utils=tests)
    torch.library.opcheck(torch.ops.lora.backward.default, (y, x, x @ A.T.bfloat16(), A, B, 0.5), test_utils=tests) if CUDA else None


def test_only_bfloat16_beside_float32_on_cuda_takes_the_kernels():
    rows = mixed.FEW_ROWS
    half, factor = torch.zeros(rows, 4, dtype=torch.bfloat16, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    assert mixed.takes_kernels(half, half, factor, factor) == (CUDA and mixed._TRITON)
    assert not mixed.takes_kernels(half[1:], half[1:], factor, factor)
    assert not mixed.takes_kernels(half.half(), half.half(), factor, factor)
    wide = torch.zeros(65, 4, device=DEVICE)
    assert not mixed.takes_kernels(half, half, wide, wide.T)
    mixed.use_tensor_cores(False)
    assert not mixed.takes_kernels(half, half, factor, factor)
    mixed.use_tensor_cores(True)


def inject_one():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 80).bfloat16().to(DEVICE))
    inject_lora(model, 4, 6)
    torch.nn.init.normal_(model[0].lora_B)
    return model[0]
