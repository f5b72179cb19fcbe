"""Offloaded layers compute what resident ones do, forward and backward, bit for bit; what would go wrong silently is refused."""

import copy
import gc
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference.lora import inject_lora, lora_layers
from reference.offload import OffloadedSequential
from reference.qlora import NF4Linear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Block(nn.Module):
    """Residual, with dropout, a buffer that changes, and an argument."""

    def __init__(self, width: int, four_bits: bool):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)
        if four_bits:
            self.up = NF4Linear.from_linear(self.up, compute_dtype=torch.float32)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, k=1.0):
        if not torch.is_grad_enabled():
            self.calls += 1
        return x + k * self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


def stack(depth=5, width=16, adapters=True, four_bits=True, seed=0):
    torch.manual_seed(seed)
    layers = nn.ModuleList([Block(width, four_bits and i % 2 == 1) for i in range(depth)]).requires_grad_(False)
    if adapters:
        inject_lora(layers, r=2, lora_alpha=4)
        for _, layer in lora_layers(layers):
            nn.init.normal_(layer.lora_B)
    return layers


def run(layers, x, **more):
    for layer in layers:
        x = layer(x, **more)
    return x


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=12)
@given(depth=st.integers(1, 5), store=st.sampled_from(("cpu", "disk")), rows=st.integers(1, 5))
def test_inference_equals_the_resident_stack(device, depth, store, rows):
    layers = stack(depth)
    resident = copy.deepcopy(layers).to(device).eval()
    offloaded = OffloadedSequential(layers, device, store).eval()
    x = torch.randn(rows, 16, device=device)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(offloaded(x, k=0.5), run(resident, x, k=0.5))
    assert offloaded.layers[0].calls == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_lora_training_equals_the_resident_stack(device, store, depth):
    layers = stack(depth)
    resident = copy.deepcopy(layers).to(device)
    offloaded = OffloadedSequential(layers, device, store)
    models = offloaded, resident
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in models]
    x = torch.randn(3, 16, device=device)
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)  # dropout
            y = model(x, k=0.5) if model is offloaded else run(model, x, k=0.5)
            y.square().mean().backward()
            optimizer.step()
        for (name, p), q in zip(offloaded.layers.named_parameters(), resident.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) == (not p.requires_grad)
            assert torch.equal(p.to(device), q), name
            if p.grad is not None:
                assert torch.equal(p.grad, q.grad), name
        for optimizer in optimizers:
            optimizer.zero_grad()


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_of_the_input_needs_no_adapter(device):
    layers = stack(3, adapters=False)
    resident = copy.deepcopy(layers).to(device).eval()
    offloaded = OffloadedSequential(layers, device).eval()
    x, same = (torch.ones(2, 16, device=device, requires_grad=True) for _ in range(2))
    offloaded(x).sum().backward()
    run(resident, same).sum().backward()
    assert torch.equal(x.grad, same.grad)


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_the_state_dict_is_the_resident_one(store):
    layers = stack()
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    offloaded = OffloadedSequential(layers, "cpu", store)
    found = offloaded.layers.state_dict()
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_weights_that_change_in_place_are_sent_again(device, store):
    layers = stack(2, four_bits=False)
    resident = copy.deepcopy(layers).to(device).eval()
    offloaded = OffloadedSequential(layers, device, store).eval()
    x = torch.randn(2, 16, device=device)
    with torch.no_grad():
        offloaded(x)  # both layers are in their slots now
        state = {name: 2 * value for name, value in resident.state_dict().items() if value.is_floating_point()}
        resident.load_state_dict(state)
        offloaded.layers.load_state_dict(state)
        assert torch.equal(offloaded(x), run(resident, x))


def test_a_layer_is_read_while_the_one_before_computes():
    """The order in which layers are sent: forward and back again, and what is there is not sent twice."""
    offloaded = OffloadedSequential(stack(4), "cpu")
    sent, send = [], offloaded._store.send
    offloaded._store.send = lambda number, *rest: (sent.append(number), send(number, *rest))[1]
    x = torch.randn(2, 16)
    with torch.no_grad():
        offloaded(x)
        assert sent == [0, 1, 2, 3, 0]
        sent.clear()
        offloaded(x)
        assert sent == [1, 2, 3, 0]
    offloaded(x).sum().backward()
    sent.clear()
    y = offloaded(x)
    assert sent == [2, 3]  # 0 and 1 are still there from the backward
    sent.clear()
    y.sum().backward()
    assert sent == [1, 0]


def test_what_needs_a_gradient_and_buffers_are_not_packed():
    offloaded = OffloadedSequential(stack(2), "cpu")
    names = {name for homes in offloaded._homes for name in homes}
    assert names and not any("lora" in name or "absmax" in name or "calls" in name for name in names)


def test_files_go_with_the_stack(tmp_path):
    offloaded = OffloadedSequential(stack(2), "cpu", "disk", tmp_path / "here")
    assert sorted(os.listdir(tmp_path / "here")) == ["layer_0000.safetensors", "layer_0001.safetensors"]
    del offloaded
    gc.collect()
    assert os.listdir(tmp_path / "here")  # a folder that was given stays
    temporary = OffloadedSequential(stack(2), "cpu", "disk")
    folder = temporary._store._temporary
    assert os.path.isdir(folder)
    del temporary
    gc.collect()
    assert not os.path.exists(folder)


def shared():
    layers = stack(3, four_bits=False)
    layers[2].down.base.weight = layers[0].down.base.weight
    return layers


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: OffloadedSequential([], "cpu"), "layers is empty"),
        (lambda: OffloadedSequential(stack(2), "cpu", "ssd"), "store must be one of cpu, disk, got 'ssd'"),
        (lambda: OffloadedSequential(stack(2), "cpu", folder="x"), 'folder is for store="disk"'),
        (lambda: OffloadedSequential([nn.Linear(3, 3, device="meta").requires_grad_(False)], "cpu"), "weight of layer 0 is on the meta"),
        (lambda: OffloadedSequential(shared(), "cpu"), "belongs to layers 0 and 2"),
        (lambda: OffloadedSequential(stack(2), "cpu").half(), "convert the layers"),
    ],
)
def test_bad_arguments_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_weight_that_would_silently_not_be_trained_is_refused():
    offloaded = OffloadedSequential(stack(2, four_bits=False), "cpu")
    offloaded.layers[1].down.base.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"down\.base\.weight of layer 1 is offloaded: it would get no gradient"):
        offloaded(torch.randn(1, 16))


def test_a_weight_that_was_replaced_is_refused():
    offloaded = OffloadedSequential(stack(2, four_bits=False), "cpu")
    offloaded.layers[1].down.base.weight.data = torch.zeros(16, 32)
    with pytest.raises(ValueError, match=r"down\.base\.weight of layer 1 was replaced"):
        offloaded(torch.randn(1, 16))


def test_moving_a_parent_leaves_the_weights_at_home():
    offloaded = OffloadedSequential(stack(2), "cpu")
    parent = nn.Sequential(nn.Linear(16, 16), offloaded)
    parent.to("cpu")
    parent(torch.randn(1, 16))


def test_a_reader_that_fails_says_so():
    offloaded = OffloadedSequential(stack(3), "cpu", "disk")
    offloaded._store.frozen[1].clear()
    with pytest.raises(KeyError), torch.no_grad():
        offloaded(torch.randn(1, 16))
