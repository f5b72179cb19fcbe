"""`reference.precision` against torch.amp.GradScaler, an optimizer in float32, and the arithmetic of bfloat16."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reference.precision import LossScaler, MasterWeights, add_kahan_, add_stochastic_, stochastic_round

# ---- loss scaling


def theirs(**settings) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **settings)


def pair():
    one = [nn.Linear(3, 2), nn.Linear(3, 2)]
    return one, copy.deepcopy(one)


def optimizers(layers, kind=torch.optim.AdamW):
    return [kind(layer.parameters(), lr=0.1, **({"foreach": False} if kind is torch.optim.AdamW else {})) for layer in layers]


EVENTS = st.lists(st.tuples(st.sampled_from([0.0, math.inf, math.nan, -math.inf]), st.sampled_from([0, 1, 2])), min_size=1, max_size=12)


@given(EVENTS, st.integers(1, 4), st.sampled_from([2.0**16, 3.0, 2.0**126, 2.0**-100]), st.booleans())
def test_every_step_is_gradscalers(events, interval, init, clip):
    """Infinities in the first, the second or no optimizer's gradients; growth, backing off, clipping."""
    settings = {"init_scale": init, "growth_interval": interval, "growth_factor": 3.0, "backoff_factor": 0.25}
    scalers = LossScaler(**settings), theirs(**settings)
    layers = pair()
    sides = [(scaler, each, optimizers(each)) for scaler, each in zip(scalers, layers, strict=True)]
    for bad, where in events:
        x = torch.randn(4, 3)
        for scaler, each, steps in sides:
            for layer, optimizer in zip(each, steps, strict=True):
                optimizer.zero_grad()
                scaler.scale(layer(x).square().mean()).backward()
            if where < 2:
                each[where].weight.grad[0, 1] += bad
            if clip:
                scaler.unscale_(steps[0])
                nn.utils.clip_grad_norm_(each[0].parameters(), 0.1)
            for optimizer in steps:
                scaler.step(optimizer)
            scaler.update()
        ours, other = (torch.cat([p.detach().flatten() for layer in each for p in layer.parameters()]) for each in layers)
        assert torch.equal(ours, other) or (ours.isnan() == other.isnan()).all()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert scalers[0].state_dict() == scalers[1].state_dict()


def test_one_optimizer_skips_and_the_other_steps():
    layers = [nn.Linear(2, 1), nn.Linear(2, 1)]
    before = [layer.weight.detach().clone() for layer in layers]
    scaler, steps = LossScaler(), optimizers(layers)
    scaler.scale(sum(layer(torch.ones(1, 2)).sum() for layer in layers)).backward()
    layers[0].weight.grad[0, 0] = math.inf
    for optimizer in steps:
        scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layers[0].weight, before[0]) and not torch.equal(layers[1].weight, before[1])
    assert scaler.get_scale() == 2.0**15


def test_the_scale_never_becomes_infinite():
    scaler = LossScaler(init_scale=2.0**127, growth_interval=1)
    layer = nn.Linear(1, 1)
    layer.weight.grad = torch.ones(1, 1)
    scaler.step(torch.optim.SGD(layer.parameters(), lr=0.0))
    scaler.update()
    assert scaler.get_scale() == 2.0**127


def test_states_load_both_ways():
    ours, other = LossScaler(init_scale=8.0, growth_interval=7), theirs()
    ours.good_steps = 3
    other.load_state_dict(ours.state_dict())
    assert other.get_scale() == 8.0 and other.get_growth_interval() == 7
    back = LossScaler()
    back.load_state_dict(other.state_dict())
    assert back.state_dict() == ours.state_dict()


def test_a_wrong_order_of_calls_is_refused():
    layer = nn.Linear(1, 1)
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), LossScaler()
    with pytest.raises(RuntimeError, match="no optimizer was unscaled or stepped"):
        scaler.update()
    layer(torch.ones(1, 1)).sum().backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already unscaled"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    for again in (scaler.step, scaler.unscale_):
        with pytest.raises(RuntimeError, match="already stepped"):
            again(optimizer)
    scaler.update()


def test_float16_and_sparse_gradients_are_refused():
    half = nn.Linear(1, 1).half()
    half.weight.grad = torch.ones(1, 1).half()
    with pytest.raises(ValueError, match="gradients are float16: keep float32 parameters"):
        LossScaler().unscale_(torch.optim.SGD(half.parameters(), lr=0.1))
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="gradients are sparse"):
        LossScaler().unscale_(torch.optim.SGD(table.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "bad",
    [
        {"init_scale": 0.0},
        {"init_scale": math.inf},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"backoff_factor": 0.0},
        {"growth_interval": 0},
        {"growth_interval": 2.5},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        LossScaler(**bad)


# ---- master weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind, settings", [(torch.optim.AdamW, {"lr": 1e-3}), (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9})])
def test_masters_are_the_optimizer_on_float32_parameters(dtype, kind, settings):
    layer = nn.Linear(8, 8).to(dtype)
    shadow = [p.detach().float().requires_grad_() for p in layer.parameters()]
    ours, other = MasterWeights(layer.parameters(), kind, **settings), kind(shadow, **settings)
    for _ in range(10):
        layer(torch.randn(4, 8).to(dtype)).float().square().mean().backward()
        for p, q in zip(layer.parameters(), shadow, strict=True):
            q.grad = p.grad.float()
        ours.step()
        other.step()
        ours.zero_grad()
        for p, q, master in zip(layer.parameters(), shadow, ours.masters, strict=True):
            assert torch.equal(master, q) and torch.equal(p, q.to(dtype)) and p.grad is None


def test_small_steps_add_up_only_in_the_masters():
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    plain = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    ours, other = MasterWeights([p], torch.optim.SGD, lr=1e-4), torch.optim.SGD([plain], lr=1e-4)
    for _ in range(1000):
        p.grad, plain.grad = -torch.ones_like(p), -torch.ones_like(p)
        ours.step()
        other.step()
    assert (plain == 1).all() and torch.allclose(p.float(), torch.tensor(1.1), atol=0.004)


def test_scaling_and_clipping_go_through_the_masters():
    layer = nn.Linear(4, 4).half()
    ours, scaler = MasterWeights(layer.parameters(), torch.optim.SGD, lr=1.0), LossScaler(init_scale=1024.0)
    before = [m.detach().clone() for m in ours.masters]
    scaler.scale(layer(torch.ones(1, 4).half()).float().sum()).backward()
    ours.gather()
    scaler.unscale_(ours)
    nn.utils.clip_grad_norm_(ours.masters, 0.5)
    scaler.step(ours)
    scaler.update()
    moved = torch.cat([(m - b).flatten() for m, b in zip(ours.masters, before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert torch.equal(layer.weight, ours.masters[0].half())


def test_masters_resume_and_bad_parameters_are_refused():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).bfloat16()
    ours = MasterWeights(layer.parameters(), torch.optim.AdamW, lr=1e-3)
    layer(torch.randn(2, 4).bfloat16()).sum().backward()
    ours.step()
    other = nn.Linear(4, 4).bfloat16()
    resumed = MasterWeights(other.parameters(), torch.optim.AdamW, lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert all(map(torch.equal, resumed.masters, ours.masters)) and torch.equal(other.weight, layer.weight)
    with pytest.raises(ValueError, match="the masters have shapes"):
        MasterWeights(nn.Linear(2, 2).half().parameters(), torch.optim.AdamW).load_state_dict(ours.state_dict())
    with pytest.raises(ValueError, match="params is empty"):
        MasterWeights([], torch.optim.AdamW)
    with pytest.raises(TypeError, match="float16, bfloat16 or float32, got"):
        MasterWeights(nn.Linear(2, 2).double().parameters(), torch.optim.AdamW)
    single = nn.Linear(2, 2)
    assert MasterWeights(single.parameters(), torch.optim.SGD, lr=0.1).masters[0] is single.weight


# ---- rounding

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS, min_size=1, max_size=20), st.integers(0, 2**16 - 1))
def test_stochastic_rounding_gives_a_neighbour_by_the_low_bits(values, noise):
    """Up, away from zero, exactly where the noise is below what is cut off: seen with Python's integers."""
    x = torch.tensor(values, dtype=torch.float32)
    rounded = stochastic_round(x, noise=torch.full_like(x, noise, dtype=torch.int32))
    assert rounded.dtype == torch.bfloat16
    for value, got in zip(x.tolist(), rounded.view(torch.int16).tolist(), strict=True):
        bits = torch.tensor(value).view(torch.int32).item() & 0xFFFFFFFF
        expected = (bits >> 16) + (noise < (bits & 0xFFFF))
        assert got & 0xFFFF == expected


def test_its_mean_is_the_number():
    x = torch.full((200_000,), 1.0 + 2**-9)
    rounded = stochastic_round(x, torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(1 + 2**-9, abs=5e-5)
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf])
    assert torch.equal(stochastic_round(exact).float(), exact)
    assert stochastic_round(torch.tensor([math.nan])).isnan().all()


def test_a_thousand_small_steps():
    nearest, stochastic, kahan, lost = (torch.ones(1000, dtype=torch.bfloat16) for _ in range(4))
    lost.zero_()
    update, generator = torch.full((1000,), 1e-4), torch.Generator().manual_seed(0)
    for _ in range(1000):
        nearest += update.bfloat16()
        add_stochastic_(stochastic, update, generator)
        add_kahan_(kahan, lost, update)
    assert (nearest == 1).all()
    assert stochastic.float().mean().item() == pytest.approx(1.1, abs=0.002)
    assert kahan.unique().numel() == 1 and kahan[0].item() == pytest.approx(1.1, abs=2**-8)  # half of what numbers there are apart


@given(st.lists(st.floats(-1, 1, width=32), min_size=5, max_size=200))
def test_kahan_is_within_a_rounding_of_the_exact_sum(steps):
    weight, lost = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    for step in steps:
        add_kahan_(weight, lost, torch.tensor([step]))
    exact = 1 + math.fsum(steps)
    size = max(1.0, max(abs(1 + math.fsum(steps[:i])) for i in range(len(steps) + 1)))
    assert abs(weight.item() - exact) <= size * 2**-8 * 1.01 + len(steps) * size * 2**-16


def test_bad_arguments_of_rounding_are_refused():
    with pytest.raises(TypeError, match="x must be float32"):
        stochastic_round(torch.ones(2).bfloat16())
    with pytest.raises(ValueError, match="noise must be int32 of shape"):
        stochastic_round(torch.ones(2), noise=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="must be bfloat16"):
        add_stochastic_(torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="update must have the shape"):
        add_kahan_(torch.ones(2).bfloat16(), torch.zeros(2).bfloat16(), torch.ones(3))
