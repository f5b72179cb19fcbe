"""`reference.checkpointing.OffloadActivations`: nothing changes but where tensors are, bit for bit; and how much travels, once each."""

import functools
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from course.lab.live import LiveBytes, SavedForBackward
from reference.checkpointing import OffloadActivations, checkpoint
from reference.checkpointing.lane import Lane
from reference.checkpointing.pool import ALIGNED, HostPool
from reference.llama.model import Layer, rotation
from reference.model_shapes import ModelShape

SHAPE = ModelShape("small", 64, 2, 4, 2, 16, 128, 50)


class Chain(nn.Module):
    """Layers of a Llama, with dropout between them."""

    def __init__(self, layers: int = 4, shape: ModelShape = SHAPE):
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(Layer(shape, 1e-5) for _ in range(layers))

    def forward(self, x, how=lambda layer, x, positions: layer(x, positions)):
        positions = rotation(x.shape[1], self.shape.head_dim, 1e4, x.device, x.dtype)
        for layer in self.layers:
            x = F.dropout(how(layer, x, positions), 0.1)
        return x


def gradients(model: nn.Module, forward, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    y = forward(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def equal(one: list, other: list) -> bool:
    return all(map(torch.equal, one, other))


def inside(offload: OffloadActivations, forward):
    def run(x):
        with offload:
            return forward(x)

    return run


@pytest.mark.parametrize("ahead_bytes", [0, 40_000, 1 << 28])
@pytest.mark.parametrize("how", ["plain", "checkpointed"])
def test_three_steps_are_those_without_it_bit_for_bit(ahead_bytes, how):
    model, x = Chain(), torch.randn(2, 32, 64)
    forward = model if how == "plain" else functools.partial(model, how=checkpoint)
    plain = gradients(model, model, x)
    offload = OffloadActivations(model, min_bytes=1000, ahead_bytes=ahead_bytes)
    taken = []
    for _ in range(3):
        assert equal(gradients(model, inside(offload, forward), x), plain)
        taken.append(offload.host_bytes)
    assert taken[0] == taken[2] > 0  # buffers are used again


def test_each_storage_travels_once_and_no_weight_does():
    model, x = Chain(1), torch.randn(2, 32, 64)
    with SavedForBackward(model) as saved:
        model(x)
    offload = OffloadActivations(model, min_bytes=1)
    with offload:
        y = model(x)
    assert offload.copied_bytes == saved.bytes
    assert len(offload.order) > len({whole() for whole in offload.order})  # some are kept more than once
    y.sum().backward()
    copies = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: copies.append(t.nbytes) or t, lambda t: t):
        model(x)
    assert sum(copies) > 1.5 * saved.bytes  # what save_on_cpu copies


def test_what_is_on_the_device_is_what_was_allowed():
    """On a CPU both memories are one: leave the pool's slabs out, and count."""
    model, x = Chain(6), torch.randn(4, 32, 64)
    with LiveBytes() as live:
        y = model(x)
    kept, largest = live.bytes - y.nbytes, 4 * 32 * 128 * 4
    del y
    offload = OffloadActivations(model, min_bytes=1000, ahead_bytes=2 * largest)
    with LiveBytes() as live:
        with offload:
            y = model(x)
        after = live.bytes - offload.host_bytes
        peak_before = live.peak - offload.host_bytes
        y.sum().backward()
        peak = live.peak - offload.host_bytes - sum(p.grad.nbytes for p in model.parameters())
    assert offload.copied_bytes > 0.9 * kept
    assert after < 0.2 * kept and peak_before < 0.25 * kept and peak < 0.35 * kept


def test_nothing_comes_back_twice(monkeypatch):
    """Not what was used, and is held only until its operation is done, nor what is there."""
    model, x, copied = Chain(3), torch.randn(2, 32, 64), []
    monkeypatch.setattr(Lane, "copy", lambda self, to, source: copied.append(len(to.copy_(source))))
    for ahead in (0, 40_000, 1 << 28):
        offload = OffloadActivations(model, min_bytes=1000, ahead_bytes=ahead)
        with offload:
            y = model(x)
        copied.clear()
        y.sum().backward()
        assert sum(copied) <= offload.copied_bytes
        assert (sum(copied) == 0) == (ahead == 1 << 28)  # all were still there


def test_after_a_backward_that_retains_its_graph_nothing_is_left_on_the_device():
    model, x = Chain(2), torch.randn(2, 32, 64)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    offload = OffloadActivations(model, min_bytes=1, ahead_bytes=0)
    with LiveBytes() as live:
        with offload:
            y = model(x)
        before = live.bytes
        y.backward(torch.zeros_like(y), retain_graph=True)
        assert live.bytes <= before + y.nbytes


def test_two_forwards_before_two_backwards_and_a_retained_graph():
    model, one, other = Chain(2), torch.randn(1, 16, 64), torch.randn(1, 24, 64)
    offload = OffloadActivations(model, min_bytes=500, ahead_bytes=10_000)

    def loss(x, run):
        torch.manual_seed(3)
        return run(x).square().mean()

    def both(run):
        model.zero_grad()
        first, second = loss(one, run), loss(other, run)
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        return [p.grad.clone() for p in model.parameters()]

    assert equal(both(inside(offload, model)), both(model))


def test_graphs_that_are_dropped_give_their_buffers_back():
    model, x = Chain(2), torch.randn(1, 16, 64)
    offload = OffloadActivations(model, min_bytes=500, ahead_bytes=1 << 20)
    with offload:
        y = model(x)
    taken, lane = offload.host_bytes, next(iter(offload.lanes.values()))
    del y  # no backward
    with pytest.raises(ZeroDivisionError), offload:
        model(x)
        raise ZeroDivisionError
    gc.collect()
    with offload:
        y = model(x)
    assert offload.host_bytes <= 2 * taken
    y.sum().backward()
    del y
    offload.let_go(0)
    free = sum(len(buffer) for buffers in lane.pool.free.values() for buffer in buffers)
    assert free + len(lane.pool.rest) <= lane.pool.bytes and free > 0


def test_views_come_back_as_they_were():
    """A slice, a transpose, an expanded and a strided view, and a tensor that is used twice."""
    weight = nn.Parameter(torch.randn(8, 8))
    owner = nn.ParameterList([weight])
    x = torch.randn(4, 24, requires_grad=True)

    def forward(x):
        q, k, v = (x * 2).chunk(3, 1)  # views of one storage
        z = (q.T @ k) @ v.T  # transposes
        s = torch.sigmoid(z)
        return (s * s[:1].expand(8, 4) * z[:, ::2].repeat(1, 2)).sum() + (q @ weight).sum()

    (plain,) = torch.autograd.grad(forward(x), x)
    for ahead in (0, 100, 10_000):
        offload = OffloadActivations(owner, min_bytes=1, ahead_bytes=ahead)
        with offload:
            y = forward(x)
        (found,) = torch.autograd.grad(y, x)
        assert torch.equal(found, plain)


def test_a_change_in_place_is_refused_while_the_tensor_leaves():
    owner = nn.ParameterList([])
    x = torch.randn(1000, requires_grad=True)
    offload = OffloadActivations(owner, min_bytes=1)
    with offload:
        y = x * 1
        z = y.sin()
        y.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(1000,\) was changed in place while it was copied"):
        z.sum().backward()


def test_a_storage_that_was_changed_travels_again():
    owner, x = nn.ParameterList([]), torch.randn(1000, requires_grad=True)
    offload = OffloadActivations(owner, min_bytes=1, ahead_bytes=0)
    with offload:
        y = x * 1
        first = y.sin()
        with torch.no_grad():
            y.mul_(2)
        second = y.sin()
    assert offload.copied_bytes == 2 * 4000  # the first content has left already, so both are right
    (found,) = torch.autograd.grad((first + second).sum(), x)
    assert torch.allclose(found, x.cos() + (2 * x).cos())


def test_small_tensors_and_other_dtypes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    x = torch.randn(4, 8)
    plain = gradients(model, model, x)
    offload = OffloadActivations(model, min_bytes=1 << 20)
    assert equal(gradients(model, inside(offload, model), x), plain) and offload.copied_bytes == 0
    half = model.bfloat16()
    plain = gradients(half, half, x.bfloat16())
    offload = OffloadActivations(half, min_bytes=1, ahead_bytes=0)
    assert equal(gradients(half, inside(offload, half), x.bfloat16()), plain) and offload.copied_bytes > 0


@pytest.mark.parametrize("bad", [{"min_bytes": 0}, {"ahead_bytes": -1}, {"min_bytes": 1.5}])
def test_bad_numbers_are_refused(bad):
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        OffloadActivations(nn.Linear(2, 2), **bad)


# ---- the pool


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_buffers_never_overlap_and_are_used_again(sizes, random):
    pool, taken = HostPool(pinned=False, slab_bytes=4096), []
    for number, size in enumerate(sizes):
        buffer = pool.take(size)
        assert buffer.shape == (size,) and buffer.dtype == torch.uint8
        assert buffer.storage_offset() % ALIGNED == 0
        buffer.fill_(number % 251)
        taken.append((number, buffer))
        if random.random() < 0.3:
            pool.give(taken.pop(random.randrange(len(taken)))[1])
        assert all((kept == i % 251).all() for i, kept in taken)
    made = pool.bytes
    for _, buffer in taken:
        pool.give(buffer)
    for _, buffer in taken:
        pool.take(len(buffer))
    assert pool.bytes == made


def test_slabs_are_powers_of_two():
    pool = HostPool(pinned=False, slab_bytes=4096)
    pool.take(10_000)
    assert pool.bytes == 16_384
    for bad in (1000, 256, 4097):
        with pytest.raises(ValueError, match="slab_bytes must be a power of two"):
            HostPool(pinned=False, slab_bytes=bad)


# ---- on a GPU


def on_gpu(layers: int = 4) -> tuple[Chain, torch.Tensor]:
    shape = ModelShape("wide", 1024, 2, 8, 4, 128, 2816, 50)
    model = Chain(layers, shape).to("cuda", torch.bfloat16)
    return model, torch.randn(4, 1024, 1024, device="cuda", dtype=torch.bfloat16)


@pytest.fixture
def deterministic():
    """Fused attentions add up their gradients in any order on a GPU: two runs without offloading differ already."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("ahead_bytes", [0, 1 << 24, 1 << 28])
@pytest.mark.parametrize("how", ["plain", "checkpointed"])
def test_on_a_gpu_steps_are_those_without_it_bit_for_bit(ahead_bytes, how, deterministic):
    model, x = on_gpu()
    forward = model if how == "plain" else functools.partial(model, how=checkpoint)
    plain = gradients(model, model, x)
    again = gradients(model, model, x)
    assert equal(plain, again), "the model itself is not the same twice"
    offload = OffloadActivations(model, ahead_bytes=ahead_bytes)
    taken = []
    for _ in range(4):
        assert equal(gradients(model, inside(offload, forward), x), plain)
        taken.append(offload.host_bytes)
    assert taken[1] == taken[3]
    assert next(iter(offload.lanes.values())).pool.rest.is_pinned()


@pytest.mark.gpu
def test_on_a_gpu_memory_is_that_of_save_on_cpu():
    model, x = on_gpu(8)
    gradients(model, model, x)  # gradients' memory is there from now on
    peaks = {}
    offload = OffloadActivations(model, ahead_bytes=1 << 24)
    theirs = torch.autograd.graph.save_on_cpu(pin_memory=True)
    for name, context in (("plain", None), ("theirs", theirs), ("ours", offload)):
        for _ in range(2):
            model.zero_grad()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            if context is None:
                y = model(x)
            else:
                with context:
                    y = model(x)
            y.float().square().mean().backward()
            del y
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated()
    assert peaks["ours"] < 1.1 * peaks["theirs"] < peaks["plain"], peaks
