"""Progressive networks: the paper's formula, and old columns that stay as they were, bit for bit."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from reference.progressive import Adapter, ProgressiveNetwork


def column(*sizes):
    return [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]


def linear_laterals(*sizes):
    return lambda i: nn.Linear(sizes[i], sizes[i + 1], bias=False)


def network(columns=3, sizes=(5, 6, 7, 4), lateral=None, seed=0):
    torch.manual_seed(seed)
    net = ProgressiveNetwork(column(*sizes))
    for _ in range(columns - 1):
        net.add_column(column(*sizes), lateral or linear_laterals(*sizes))
    return net


def test_it_is_the_papers_formula():
    net, x = network(), torch.randn(8, 5)
    h = [x, x, x]
    for i in range(3):
        sums = [net.columns[k][i](h[k]) + (sum(net.laterals[k][i][j](h[j]) for j in range(k)) if i and k else 0) for k in range(3)]
        h = [s if i == 2 else F.relu(s) for s in sums]
    for task in range(3):
        torch.testing.assert_close(net(x, task), h[task])
    assert torch.equal(net(x), net(x, 2)) and torch.equal(net(x, -3), net(x, 0))


@settings(max_examples=15, deadline=None)
@given(columns=st.integers(2, 4), seed=st.integers(0, 50))
def test_training_a_new_column_moves_no_bit_of_the_old(columns, seed):
    net, x = network(columns, seed=seed), torch.randn(16, 5)
    before = [net(x, task) for task in range(columns)]
    trained = [p for p in net.parameters() if p.requires_grad]
    own = [*net.columns[-1].parameters(), *net.laterals[-1].parameters()]
    assert {id(p) for p in trained} == {id(p) for p in own}
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(16) % 4).backward()
        optimizer.step()
    assert all(torch.equal(net(x, task), before[task]) for task in range(columns - 1))
    assert not torch.equal(net(x), before[-1])


def test_old_columns_stay_in_evaluation_mode():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)), nn.Linear(6, 4)]
    net, x = ProgressiveNetwork(blocks), torch.randn(9, 5)
    net.train()
    assert net.columns[0][0].training
    net(x)
    net.add_column(column(5, 6, 4), linear_laterals(5, 6, 4))
    before = net(x, 0)
    net.train()
    net(x)
    assert not net.columns[0][0].training and net.columns[1][0].training
    assert torch.equal(net(x, 0), before)  # no dropout, and its statistics did not move


def test_a_new_column_hears_the_old_one_and_not_the_other_way_round():
    net, x = network(2), torch.randn(8, 5)
    before = net(x, 0), net(x, 1)
    with torch.no_grad():
        net.columns[0][0].weight.add_(1)
    assert not torch.equal(net(x, 1), before[1])
    with torch.no_grad():
        net.columns[0][0].weight.sub_(1)
        net.columns[1][0].weight.add_(1)
        assert torch.equal(net(x, 0), ProgressiveNetwork(list(net.columns[0]))(x))


def test_adapters_and_no_laterals():
    sizes, x = (5, 6, 7, 4), torch.randn(3, 5)
    net = network(2, sizes, lambda i: Adapter(sizes[i], 2, sizes[i + 1]))
    lateral, h = net.laterals[1][1][0], torch.relu(net.columns[0][0](x))
    torch.testing.assert_close(lateral(h), lateral.widen(F.relu(lateral.narrow(lateral.scale * h))))
    alone = ProgressiveNetwork(column(*sizes))
    alone.add_column(column(*sizes))
    torch.testing.assert_close(alone(x), ProgressiveNetwork(list(alone.columns[1]))(x))


def test_it_grows_with_the_square_of_the_tasks():
    """Columns grow evenly, laterals by one more for each earlier column."""

    def count(columns):
        net = network(columns)
        return sum(p.numel() for p in net.columns.parameters()), sum(p.numel() for p in net.laterals.parameters())

    (one, none), (four, six) = count(1), count(4)
    assert (four, none) == (4 * one, 0) and six == 6 * count(2)[1]


def test_bad_input():
    net = network(2)
    with pytest.raises(ValueError, match="blocks is empty"):
        ProgressiveNetwork([])
    before = len(net.columns), [p.requires_grad for p in net.parameters()]
    with pytest.raises(ValueError, match="blocks must be 3, as in the first column, got 2"):
        net.add_column(column(5, 6, 4))
    assert (len(net.columns), [p.requires_grad for p in net.parameters()]) == before
    for task in (2, -3):
        with pytest.raises(ValueError, match="task must be from -2 to 1"):
            net(torch.randn(1, 5), task)
    with pytest.raises(TypeError, match="task must be an integer"):
        net(torch.randn(1, 5), 1.0)


@pytest.mark.gpu
def test_on_a_gpu():
    net, x = network().cuda(), torch.randn(4, 5).cuda()
    assert net(x).is_cuda
