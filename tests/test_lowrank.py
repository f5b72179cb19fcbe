"""reference.lowrank against torch.linalg, the Eckart–Young theorem, cases known by hand, and the definition of a random subspace."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference import lowrank
from reference.lowrank import RandomSubspace, effective_rank, energy_captured, rank_for_energy, stable_rank, truncated_svd

HALF = (torch.float16, torch.bfloat16)
shapes = st.tuples(st.integers(2, 24), st.integers(2, 24), st.integers(0, 10**6))  # out, in, seed


def matrix(out: int, inside: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(out, inside, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def best(weight: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


# --- truncated_svd ------------------------------------------------------------------------------------------------------------------


@given(shapes, st.data())
@settings(max_examples=25)
def test_product_is_the_truncated_sum_and_error_is_the_tail(shape, data):
    weight = matrix(*shape)
    rank = data.draw(st.integers(1, min(weight.shape)))
    b, a = truncated_svd(weight, rank)
    assert b.shape == (weight.shape[0], rank) and a.shape == (rank, weight.shape[1])
    torch.testing.assert_close(b @ a, best(weight, rank), rtol=0, atol=1e-12)  # float64: rounding alone
    tail = torch.linalg.svdvals(weight)[rank:]
    torch.testing.assert_close(torch.linalg.matrix_norm(weight - b @ a), tail.norm(), rtol=1e-9, atol=1e-12)


@given(shapes, st.data())
@settings(max_examples=25)
def test_no_other_matrix_of_that_rank_is_closer(shape, data):
    """Eckart–Young, tried by rivals: random factors, the optimum disturbed, and the best rank-r matrix in a random row space."""
    weight = matrix(*shape)
    rank = data.draw(st.integers(1, min(weight.shape)))
    b, a = truncated_svd(weight, rank)
    g = torch.Generator().manual_seed(shape[2] + 1)
    disturbed = (b + 0.01 * torch.randn(b.shape, generator=g, dtype=b.dtype)) @ a
    q = torch.linalg.qr(torch.randn(weight.shape[1], rank, generator=g, dtype=b.dtype)).Q  # (in, r)
    random_factors = torch.randn(b.shape, generator=g, dtype=b.dtype) @ torch.randn(a.shape, generator=g, dtype=a.dtype)
    for order in ("fro", 2, "nuc"):
        error = torch.linalg.matrix_norm(weight - b @ a, ord=order)
        for rival in (disturbed, weight @ q @ q.T, random_factors):
            assert error <= torch.linalg.matrix_norm(weight - rival, ord=order) + 1e-10


def test_root_of_each_singular_value_goes_to_each_side():
    weight = matrix(9, 5)
    b, a = truncated_svd(weight, 4)
    s = torch.linalg.svdvals(weight)[:4]
    torch.testing.assert_close(b.T @ b, s.diag(), rtol=0, atol=1e-12)
    torch.testing.assert_close(a @ a.T, s.diag(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (5, 5), (1, 6), (6, 1)])
def test_every_dtype_and_shape(dtype, shape):
    weight = matrix(*shape, dtype=dtype)
    rank = (min(shape) + 1) // 2
    b, a = truncated_svd(weight, rank)
    assert b.dtype == a.dtype == dtype and b.shape == (shape[0], rank) and a.shape == (rank, shape[1])
    # each factor is rounded once to its dtype: relative error of an entry at most eps/2, and |b|·|a| sums over rank terms
    tolerance = torch.finfo(dtype).eps * (b.double().abs() @ a.double().abs()).max().item() * (1 if dtype in HALF else 30)
    torch.testing.assert_close(b.double() @ a.double(), best(weight.double(), rank), rtol=0, atol=tolerance)


def test_full_rank_gives_the_matrix_back_and_views_and_gradients_do_no_harm():
    weight = nn.Parameter(matrix(6, 10))
    before = weight.detach().clone()
    for w in (weight, weight.T, weight[::2, 1::3]):
        b, a = truncated_svd(w, min(w.shape))
        torch.testing.assert_close(b @ a, w.detach(), rtol=0, atol=1e-12)
        assert not b.requires_grad and not a.requires_grad
    assert torch.equal(weight, before)


def test_rank_deficient_matrix_is_exact_from_its_rank_on():
    weight = matrix(12, 3, 1) @ matrix(3, 8, 2)
    for rank in (3, 5, 8):
        b, a = truncated_svd(weight, rank)
        torch.testing.assert_close(b @ a, weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "weight, rank, error, words",
    [
        ([[1.0]], 1, TypeError, "weight .* got list"),
        (torch.ones(3, 3, dtype=torch.int64), 1, TypeError, r"weight .* got torch.int64.*\.float\(\)"),
        (torch.ones(3, 3, dtype=torch.complex64), 1, TypeError, "weight .* got torch.complex64"),
        (torch.ones(3), 1, ValueError, r"two axes .* got shape \(3,\)"),
        (torch.ones(2, 3, 3), 1, ValueError, r"two axes .* got shape \(2, 3, 3\)"),
        (torch.tensor([[1.0, math.nan]]), 1, ValueError, "NaN or infinite"),
        (torch.tensor([[1.0, math.inf]]), 1, ValueError, "NaN or infinite"),
        (torch.ones(3, 4), 0, ValueError, "rank must be from 1 to 3, got 0"),
        (torch.ones(3, 4), 4, ValueError, "rank must be from 1 to 3, got 4"),
        (torch.ones(3, 4), 2.0, TypeError, "rank must be an integer, got 2.0"),
        (torch.ones(3, 4), True, TypeError, "rank must be an integer, got True"),
    ],
)
def test_truncated_svd_refuses(weight, rank, error, words):
    with pytest.raises(error, match=words):
        truncated_svd(weight, rank)


# --- energy, effective rank, stable rank ----------------------------------------------------------------------------------------------


@given(shapes, st.data())
@settings(max_examples=25)
def test_energy_is_one_minus_the_squared_relative_error(shape, data):
    weight = matrix(*shape)
    rank = data.draw(st.integers(1, min(weight.shape)))
    s = torch.linalg.svdvals(weight)
    relative = torch.linalg.matrix_norm(weight - best(weight, rank)) / torch.linalg.matrix_norm(weight)
    assert energy_captured(s, rank) == pytest.approx(1 - relative.item() ** 2, abs=1e-12)
    assert energy_captured(s.flip(0), rank) == energy_captured(s, rank)


def test_energy_by_hand():
    s = torch.tensor([4.0, 3.0, 0.0])
    assert [energy_captured(s, r) for r in (1, 2, 3)] == pytest.approx([16 / 25, 1.0, 1.0])
    assert [rank_for_energy(s, share) for share in (0.1, 0.64, 0.65, 1.0)] == [1, 1, 2, 2]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.floats(0.01, 1.0))
@settings(max_examples=50)
def test_rank_for_energy_is_the_smallest(values, share):
    s = torch.tensor(values, dtype=torch.float64)
    rank = rank_for_energy(s, share)
    assert energy_captured(s, rank) >= share - 1e-12
    assert rank == 1 or energy_captured(s, rank - 1) < share


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("scale", [1.0, 300.0, 1e-3])  # 300² overflows float16
def test_identity_and_rank_one(dtype, scale):
    n = 17
    flat = torch.full((n,), scale, dtype=dtype)
    single = torch.zeros(n, dtype=dtype)
    single[5] = scale
    for rank_of in (effective_rank, stable_rank):
        assert rank_of(flat) == pytest.approx(n, rel=1e-12)
        assert rank_of(single) == pytest.approx(1, rel=1e-12)
    assert energy_captured(flat, 3) == pytest.approx(3 / n, rel=1e-12)


def test_effective_rank_by_hand():
    """p = (1/2, 1/4, 1/4): entropy 1.5 bits, so 2^1.5; with squares normalised instead it would be lower."""
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5, rel=1e-12)


@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=30).filter(any), st.floats(1e-6, 1e6))
@settings(max_examples=50)
def test_ranks_are_bounded_by_the_rank_and_blind_to_scale_and_order(values, scale):
    s = torch.tensor(values, dtype=torch.float64)
    for rank_of in (effective_rank, stable_rank):
        assert 1 - 1e-9 <= rank_of(s) <= int((s > 0).sum()) + 1e-9
        assert rank_of(s.flip(0) * scale) == pytest.approx(rank_of(s), rel=1e-9)


def test_extreme_scales_neither_overflow_nor_vanish():
    for scale in (1e200, 1e-200):
        s = torch.tensor([2.0, 1.0], dtype=torch.float64) * scale
        assert energy_captured(s, 1) == pytest.approx(0.8) and stable_rank(s) == pytest.approx(1.25)


@pytest.mark.parametrize("function", [effective_rank, stable_rank, lambda s: energy_captured(s, 1), lambda s: rank_for_energy(s, 0.9)])
@pytest.mark.parametrize(
    "values, error, words",
    [
        ([1.0], TypeError, "singular_values must be a tensor"),
        (torch.tensor([1, 2]), TypeError, "singular_values must be a tensor of real numbers"),
        (torch.ones(2, 2), ValueError, r"vector .* got shape \(2, 2\)"),
        (torch.ones(0), ValueError, "vector of at least one value"),
        (torch.tensor([1.0, -1.0]), ValueError, "not negative"),
        (torch.tensor([1.0, math.nan]), ValueError, "finite"),
        (torch.zeros(3), ValueError, "all singular values are zero"),
    ],
)
def test_singular_values_are_checked(function, values, error, words):
    with pytest.raises(error, match=words):
        function(values)


def test_rank_and_share_are_checked():
    s = torch.ones(3)
    for rank in (0, 4):
        with pytest.raises(ValueError, match=f"rank must be from 1 to 3, got {rank}"):
            energy_captured(s, rank)
    for share in (0.0, 1.1, 90):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            rank_for_energy(s, share)


def test_noise_lies_between_the_marchenko_pastur_edges():
    low, high = lowrank.marchenko_pastur_edges((600, 300), std=0.02)
    s = torch.linalg.svdvals(0.02 * matrix(600, 300, seed=3))
    assert s.max().item() == pytest.approx(high, rel=0.02) and s.min().item() == pytest.approx(low, rel=0.05)


# --- RandomSubspace -----------------------------------------------------------------------------------------------------------------


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)).to(dtype)


def columns(subspace: RandomSubspace) -> torch.Tensor:
    """P itself, (D, d), one column at a time."""
    return torch.stack([subspace.expand(unit) for unit in torch.eye(subspace.dimension, dtype=subspace.z.dtype)], dim=1)


both = pytest.mark.parametrize("projection", ["sparse", "dense"])


@both
@pytest.mark.parametrize("dimension", [0, 1, 7, 60])
def test_starts_where_the_module_starts(projection, dimension):
    module, x = network(), torch.randn(5, 6)
    expected = module(x).detach()
    subspace = RandomSubspace(module, dimension, projection=projection)
    assert torch.equal(subspace(x), expected)  # z = 0: bit for bit
    assert [name for name, p in subspace.named_parameters() if p.requires_grad] == ["z"] and subspace.z.numel() == dimension


@both
@pytest.mark.parametrize("dimension", [1, 10, 143])
def test_columns_are_orthonormal(projection, dimension):
    """D = 121 is no multiple of d = 10; the last case has d = D."""
    module = nn.Linear(10, 13) if dimension == 143 else network()
    p = columns(RandomSubspace(module, dimension, seed=3, projection=projection))
    assert p.shape == (sum(q.numel() for q in module.parameters()), dimension)
    torch.testing.assert_close(p.T @ p, torch.eye(dimension), rtol=0, atol=2e-6)  # float32, sums of up to 143 terms


@both
def test_gradient_of_z_is_the_projected_gradient_of_the_parameters(projection):
    module, x = network(dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    twin = copy.deepcopy(module)
    subspace = RandomSubspace(module, 11, seed=5, projection=projection)
    with torch.no_grad():
        subspace.z.normal_()
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(twin.parameters()) + columns(subspace) @ subspace.z, twin.parameters())
    torch.testing.assert_close(subspace(x), twin(x), rtol=1e-12, atol=1e-12)
    subspace(x).square().sum().backward()
    twin(x).square().sum().backward()
    full = torch.cat([p.grad.flatten() for p in twin.parameters()])
    torch.testing.assert_close(subspace.z.grad, columns(subspace).T @ full, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(subspace.project(full), subspace.z.grad, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in module.parameters())


@both
def test_decided_by_its_seed_alone(projection):
    one = columns(RandomSubspace(network(), 7, seed=1, projection=projection))
    torch.manual_seed(99)  # the global generator has no say
    state = torch.get_rng_state()
    subspace = RandomSubspace(network(seed=4), 7, seed=1, projection=projection)
    assert torch.equal(columns(subspace), one)
    torch.set_rng_state(state)
    assert not torch.equal(columns(RandomSubspace(network(), 7, seed=2, projection=projection)), one)


def test_drawing_leaves_the_global_generator_alone():
    module = network()
    state = torch.get_rng_state()
    RandomSubspace(module, 7)
    truncated_svd(matrix(4, 4), 2)
    assert torch.equal(torch.get_rng_state(), state)


@both
def test_training_moves_the_output_and_leaves_the_module(projection):
    module, x, y = network(), torch.randn(32, 6), torch.randn(32, 4)
    before = copy.deepcopy(module.state_dict())
    subspace = RandomSubspace(module, 40, projection=projection)
    optimizer = torch.optim.Adam([p for p in subspace.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(60):
        loss = (subspace(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    twin = network(seed=1)
    twin.load_state_dict(subspace.parameters_now())  # the result can be written into a plain module
    assert torch.equal(twin(x), subspace(x))


@pytest.mark.parametrize("dtype", [torch.float64, *HALF])
def test_keeps_the_modules_dtype_and_z_in_at_least_float32(dtype):
    subspace = RandomSubspace(network(dtype=dtype), 7)
    assert subspace.z.dtype == torch.promote_types(dtype, torch.float32)
    output = subspace(torch.randn(3, 6).to(dtype))
    assert output.dtype == dtype
    output.sum().backward()
    assert torch.isfinite(subspace.z.grad).all() and subspace.z.grad.abs().sum() > 0


def test_only_parameters_that_required_gradients_take_part():
    module = network()
    module[0].requires_grad_(False)
    subspace = RandomSubspace(module, 5)
    assert all(not name.startswith("0.") for name in subspace.names)
    with torch.no_grad():
        subspace.z.fill_(1.0)
    assert set(subspace.parameters_now()) == {"2.weight", "2.bias", "3.weight", "3.bias"}


def test_shared_parameters_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    subspace = RandomSubspace(Tied(), 16)
    with torch.no_grad():
        subspace.z.normal_()
    x, weight = torch.randn(3, 4), subspace.parameters_now()["first.weight"]
    torch.testing.assert_close(subspace(x), x @ weight.T @ weight.T)


def test_saves_z_and_the_module_but_not_the_projection():
    subspace = RandomSubspace(network(), 7, seed=1)
    with torch.no_grad():
        subspace.z.normal_()
    state = subspace.state_dict()
    assert set(state) == {"z", *(f"module.{name}" for name in network().state_dict())}
    again = RandomSubspace(network(seed=9), 7, seed=1)
    again.load_state_dict(state)
    x = torch.randn(3, 6)
    assert torch.equal(again(x), subspace(x))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"dimension": -1}, ValueError, "dimension must be from 0 to 121, got -1"),
        ({"dimension": 122}, ValueError, "dimension must be from 0 to 121, got 122"),
        ({"dimension": 2.5}, TypeError, "dimension must be an integer"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"projection": "fastfood"}, ValueError, "projection must be 'sparse' or 'dense'"),
    ],
)
def test_random_subspace_refuses_and_leaves_the_module_trainable(arguments, error, words):
    module = network()
    with pytest.raises(error, match=words):
        RandomSubspace(module, **{"dimension": 3, **arguments})
    assert all(p.requires_grad for p in module.parameters())


def test_random_subspace_refuses_what_it_cannot_train():
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module"):
        RandomSubspace(torch.ones(3), 1)
    with pytest.raises(ValueError, match="no parameter that requires gradients"):
        RandomSubspace(network().requires_grad_(False), 1)
    with pytest.raises(ValueError, match="already inside a RandomSubspace"):
        RandomSubspace(RandomSubspace(network(), 3), 1)


# --- on a GPU -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_cuda_gives_what_the_cpu_gives(dtype):
    weight = matrix(65, 33, dtype=dtype)
    b, a = truncated_svd(weight.cuda(), 9)
    cpu_b, cpu_a = truncated_svd(weight, 9)
    assert b.is_cuda and b.dtype == dtype
    # cuSOLVER's Jacobi sweeps stop earlier than LAPACK: 2.5e-5 seen in float32, on entries up to about 5
    torch.testing.assert_close((b @ a).cpu().float(), (cpu_b @ cpu_a).float(), rtol=0, atol=max(1e-4, 20 * torch.finfo(dtype).eps))
    s = torch.linalg.svdvals(weight.cuda().float())
    assert effective_rank(s) == pytest.approx(effective_rank(s.cpu()), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@both
def test_cuda_subspace_is_the_cpus(projection):
    here, there = RandomSubspace(network(), 7, projection=projection), RandomSubspace(network().cuda(), 7, projection=projection)
    z = torch.randn(7)
    assert there.z.is_cuda
    torch.testing.assert_close(there.expand(z.cuda()).cpu(), here.expand(z), rtol=1e-6, atol=1e-6)
    there(torch.randn(3, 6, device="cuda")).square().sum().backward()
    assert torch.isfinite(there.z.grad).all()
