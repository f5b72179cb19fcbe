"""reference.kernels.multi_lora in Triton's interpreter: a loop over tokens; only an adapter's own numbers are read; tables filled again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")

from torch import nn

from reference.kernels.multi_lora import Plan, add_updates, fill, tables
from reference.multi_lora import Factors, MultiLoRALinear, Route

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)]


def factors(r, n_out, n_in, dtype=torch.float32, scaling=1.5):
    A, B = torch.randn(r, n_in) / n_in**0.5, torch.randn(n_out, r) / r**0.5
    return Factors(A.to(DEVICE, dtype), B.to(DEVICE, dtype), scaling)


def by_loop(y, x, adapters, rows, tokens):
    """Each token for itself, in float64."""
    found = y.double()
    for row, which in enumerate(rows):
        f = None if which is None else adapters[which]
        for t in range(row * tokens, (row + 1) * tokens):
            if f is not None:
                found[t] += f.scaling * f.B.double() @ (f.A.double() @ x[t].double())
    return found


def run(y, x, adapters, rows, tokens, splits=None):
    """The kernels' sum; ``rows`` name adapters by their place in ``adapters``."""
    used = [None if which is None else adapters[which] for which in rows]
    route = Route(used)
    (table,) = tables([route.distinct], DEVICE)
    y = y.clone()
    add_updates(y, x, table, Plan(route.groups, len(rows), tokens, DEVICE), splits)
    return y


def near(found, expected, dtype):
    """Half types: the sum is rounded once, of float32 sums; h has two half numbers' digits. The interpreter cuts bfloat16 off instead."""
    cut = 2**-8 if CUDA else 2**-7
    tolerance = {torch.float32: 3e-6, torch.bfloat16: cut, torch.float16: 2**-10}[dtype]
    small = expected.abs().max().item() / (1 if dtype == torch.float32 else 8)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * small)


@st.composite
def cases(draw):
    n_out, n_in = draw(st.sampled_from([(24, 40), (130, 17), (7, 300)]))
    ranks = draw(st.lists(st.sampled_from([1, 3, 8, 16, 20]), min_size=1, max_size=4))
    rows = draw(st.lists(st.sampled_from([*range(len(ranks)), None]), min_size=1, max_size=7))
    return (
        n_out,
        n_in,
        ranks,
        rows,
        draw(st.sampled_from([1, 1, 2, 5])),
        draw(st.sampled_from([None, 1, 2, 3])),
        draw(st.sampled_from(TYPES)),
    )


@given(cases())
@settings(max_examples=30)
def test_every_token_gets_its_own_update(case):
    n_out, n_in, ranks, rows, tokens, splits, (dtype, kept) = case
    adapters = [factors(r, n_out, n_in, kept, scaling=0.5 + i) for i, r in enumerate(ranks)]
    x, y = (torch.randn(len(rows) * tokens, width, device=DEVICE).to(dtype) for width in (n_in, n_out))
    near(run(y, x, adapters, rows, tokens, splits), by_loop(y, x, adapters, rows, tokens), dtype)


def test_an_adapter_with_more_tokens_than_a_tile():
    adapters = [factors(4, 20, 30), factors(16, 20, 30)]
    rows, tokens = [0, 1, 0, None, 0], 45  # 135 tokens of the first: tiles of 64, 64 and 7
    x, y = (torch.randn(len(rows) * tokens, width, device=DEVICE) for width in (30, 20))
    plan = Plan(Route([adapters[0], adapters[1], adapters[0], None, adapters[0]]).groups, 5, tokens, DEVICE)
    assert plan.tile == 64 and plan.tiles.tolist() == [[0, 0, 64], [0, 64, 64], [0, 128, 7], [1, 135, 45]]
    near(run(y, x, adapters, rows, tokens), by_loop(y, x, adapters, rows, tokens), torch.float32)


@pytest.mark.parametrize(("dtype", "kept"), TYPES)
def test_rows_without_an_adapter_keep_every_bit(dtype, kept):
    adapters, rows = [factors(5, 24, 40, kept)], [None, 0, None]
    x, y = (torch.randn(3, width, device=DEVICE).to(dtype) for width in (40, 24))
    found = run(y, x, adapters, rows, 1)
    assert torch.equal(found[[0, 2]], y[[0, 2]]) and not torch.equal(found[1], y[1])
    assert torch.equal(run(y, x, adapters, [None, None, None], 1), y)


def test_the_same_batch_gives_the_same_bits_in_any_company():
    """A row's sum does not depend on who else is in the batch, if the shares are the same."""
    adapters = [factors(r, 24, 600, torch.bfloat16) for r in (8, 16, 16)]
    x, y = (torch.randn(4, width, device=DEVICE).bfloat16() for width in (600, 24))
    alone = run(y[:1], x[:1], adapters, [1], 1, splits=2)
    mixed = run(y, x, adapters, [1, 0, 2, 1], 1, splits=2)
    assert torch.equal(mixed[:1], alone)
    assert torch.equal(mixed, run(y, x, adapters, [1, 0, 2, 1], 1, splits=2))


def test_nothing_beyond_an_adapters_own_rank_is_read():
    """NaN lies right behind each factor; an adapter that was padded to the largest rank would read it."""

    def surrounded(tensor):
        memory = torch.full((tensor.numel() + 4096,), torch.nan, device=DEVICE)
        memory[: tensor.numel()] = tensor.flatten()
        return memory[: tensor.numel()].view(tensor.shape)

    adapters = [factors(3, 24, 40), factors(40, 24, 40)]
    adapters = [Factors(surrounded(f.A), surrounded(f.B), f.scaling) for f in adapters]
    x, y = torch.randn(3, 40, device=DEVICE), torch.randn(3, 24, device=DEVICE)
    near(run(y, x, adapters, [0, 1, 0], 1), by_loop(y, x, adapters, [0, 1, 0], 1), torch.float32)


def test_tables_take_other_adapters_and_plans_other_rows_in_place():
    first, second = [factors(3, 24, 40), factors(8, 24, 40)], [factors(16, 24, 40), None, factors(2, 24, 40)]
    (table,) = tables([first], DEVICE, room=3)
    plan, entries = Plan([[0, 2], [1]], 3, 1, DEVICE, refilled=True), table.entries
    x, y = torch.randn(3, 40, device=DEVICE), torch.randn(3, 24, device=DEVICE)
    where = plan.order.data_ptr(), plan.tiles.data_ptr(), entries.data_ptr()
    fill(table, second)
    plan.fill([[1], [0], [2]])
    assert where == (plan.order.data_ptr(), plan.tiles.data_ptr(), table.entries.data_ptr())
    found = y.clone()
    add_updates(found, x, table, plan)
    near(found, by_loop(y, x, second, [1, 0, 2], 1), torch.float32)
    with pytest.raises(ValueError, match="4 adapters for a table of 3: give room"):
        fill(table, [*second, second[0]])
    with pytest.raises(ValueError, match=r"made for rank 8 and torch.float32: make another one"):
        fill(table, [factors(17, 24, 40)])
    with pytest.raises(ValueError, match="make another one"):
        fill(table, [factors(3, 24, 40, torch.bfloat16)])


def test_a_plan_has_the_tiles_of_its_groups_or_room_for_any():
    plan = Plan([[0, 1, 2, 3]], 4, 1, DEVICE)
    assert len(plan.tiles) == plan.busy == 1
    with pytest.raises(ValueError, match=r"2 tiles for a plan of 1: make it with refilled=True"):
        plan.fill([[0], [1]])
    assert plan.tiles.tolist() == [[0, 0, 4]]
    plan = Plan([[0]], 256, 1, DEVICE, refilled=True)
    assert len(plan.tiles) == 256 and plan.busy < 256
    plan.fill([[i] for i in range(256)])
    assert plan.tiles[:, 2].tolist() == [1] * 256


def test_shares_fill_a_gpu_and_are_few():
    from reference.kernels.multi_lora.sizes import TABLE, sizes

    for tile, rank in TABLE:
        size = sizes(tile, rank, 2)
        shares = [size.splits(tiles, 4096, 132) for tiles in (1, 16, 256)]
        assert shares == sorted(shares, reverse=True) and shares[0] <= size.shares and shares[2] <= 4
        assert all(n & (n - 1) == 0 for n in shares)
        assert size.splits(1, 48, 132) == 1
        assert sizes(tile, 128, 4).shrink["COLUMNS"] < size.shrink["COLUMNS"]


@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_aligned_factors_are_said_to_be_and_others_read_too(kept):
    even, odd = [factors(r, 24, 48, kept) for r in (8, 16)], factors(3, 24, 48, kept)
    moved = torch.zeros(8 * 48 + 1, dtype=kept, device=DEVICE)[1:].view(8, 48).copy_(even[0].A)
    shifted = Factors(moved, even[0].B, even[0].scaling)
    for adapters, aligned in ((even, True), ([*even, odd], False), ([shifted, even[1]], False)):
        (table,) = tables([adapters], DEVICE)
        assert table.aligned == aligned
        x, y = (torch.randn(3, width, device=DEVICE).to(kept) for width in (48, 24))
        near(run(y, x, adapters, [1, 0, 1], 1), by_loop(y, x, adapters, [1, 0, 1], 1), kept)
    (table,) = tables([even], DEVICE)
    fill(table, even[:1])
    for other in (odd, shifted):
        with pytest.raises(ValueError, match="addresses of whole 16 bytes: make another one"):
            fill(table, [other])


def test_one_copy_makes_the_tables_of_all_layers():
    layers = [[factors(2, 24, 40), None], [factors(5, 9, 24), factors(1, 9, 24)]]
    found = tables(layers, DEVICE)
    assert [t.rank for t in found] == [2, 5]
    x, y = torch.randn(2, 24, device=DEVICE), torch.randn(2, 9, device=DEVICE)
    sums = y.clone()
    add_updates(sums, x, found[1], Plan([[0], [1]], 2, 1, DEVICE))
    near(sums, by_loop(y, x, layers[1], [0, 1], 1), torch.float32)


@pytest.mark.parametrize(("dtype", "kept"), TYPES)
def test_a_layer_reaches_for_them_with_the_right_rows(dtype, kept, monkeypatch):
    layer = MultiLoRALinear(nn.Linear(40, 24).to(DEVICE, dtype))
    adapters = [factors(r, 24, 40, kept) for r in (2, 16, 5)]
    for i, f in enumerate(adapters):
        layer.add(f"t{i}", f)
    monkeypatch.setattr(layer, "_takes_kernels", lambda *_: True)
    for rows, places in ((["t1", None, "t0", "t1"], [1, None, 0, 1]), ("t2", [2] * 4), ([None, "t2", None, "t0"], [None, 2, None, 0])):
        for tokens in (1, 3):
            x = torch.randn(4, tokens, 40, device=DEVICE).to(dtype)
            layer.select(rows)
            with torch.no_grad():
                y = layer.base(x).view(-1, 24)
                near(layer(x).view(-1, 24), by_loop(y, x.view(-1, 40), adapters, places, tokens), dtype)


def test_bad_input_is_named():
    f, x, y = factors(2, 24, 40), torch.randn(2, 40, device=DEVICE), torch.randn(2, 24, device=DEVICE)
    (table,), plan = tables([[f]], DEVICE), Plan([[0, 1]], 2, 1, DEVICE)
    with pytest.raises(ValueError, match=r"contiguous, of 2 tokens; got \(3, 24\) and \(2, 40\)"):
        add_updates(torch.zeros(3, 24, device=DEVICE), x, table, plan)
    with pytest.raises(ValueError, match="contiguous"):
        add_updates(y, torch.randn(40, 2, device=DEVICE).T, table, plan)
    with pytest.raises(ValueError, match="x and y must be alike"):
        add_updates(y, x.bfloat16(), table, plan)
    with pytest.raises(ValueError, match=r"x is torch.bfloat16, y torch.bfloat16, the factors torch.float16"):
        add_updates(y.bfloat16(), x.bfloat16(), tables([[factors(2, 24, 40, torch.float16)]], DEVICE)[0], plan)
    with pytest.raises(ValueError, match="must be of one dtype"):
        tables([[f, factors(2, 24, 40, torch.bfloat16)]], DEVICE)
    with pytest.raises(ValueError, match="must be contiguous and on"):
        tables([[Factors(torch.randn(40, 2, device=DEVICE).T, f.B)]], DEVICE)


@pytest.mark.gpu
@pytest.mark.parametrize("n_out", [4096, 11008])
@pytest.mark.parametrize("mix", ["distinct", "identical", "some"])
def test_on_a_gpu_large_layers_and_a_recorded_graph(n_out, mix):
    n, adapters = 64, [factors((8, 16, 64)[i % 3], n_out, 4096, torch.bfloat16) for i in range(64)]
    rows = {"distinct": list(range(n)), "identical": [2] * n, "some": [i % 5 if i % 7 else None for i in range(n)]}[mix]
    x, y = (torch.randn(n, width, device=DEVICE).bfloat16() for width in (4096, n_out))
    expected = by_loop(y, x, adapters, rows, 1)
    near(run(y, x, adapters, rows, 1), expected, torch.bfloat16)
    (table,) = tables([[adapters[2]]], DEVICE, room=64)
    plan, out = Plan([list(range(n))], n, 1, DEVICE, refilled=True), y.clone()
    add_updates(out, x, table, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(y)
        add_updates(out, x, table, plan)
    route = Route([None if which is None else adapters[which] for which in rows])
    fill(table, route.distinct)
    plan.fill(route.groups)
    graph.replay()
    near(out, expected, torch.bfloat16)


# ---- who reaches for them


def test_a_models_tables_are_one_copy_and_layers_use_them(monkeypatch):
    """On a CPU in the interpreter: a layer without an adapter, one shared by two, and what the layers would have made themselves."""
    from reference import kernels
    from reference.multi_lora import MultiLoRA, layer, model

    net = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 16)).to(DEVICE)
    served = MultiLoRA(net, ["0", "1"])
    served.add("both", {"0": factors(3, 24, 40), "1": factors(2, 16, 24)})
    served.add("first", {"0": factors(5, 24, 40)})
    x, rows = torch.randn(3, 40, device=DEVICE), ["first", None, "both"]
    with torch.no_grad(), served.rows(rows):
        expected = net(x)
    calls, real = [], kernels.multi_lora.tables
    monkeypatch.setattr(kernels.multi_lora, "tables", lambda *given, **named: calls.append(given) or real(*given, **named))
    monkeypatch.setattr(model, "kernels_for", lambda device: True)
    monkeypatch.setattr(layer.MultiLoRALinear, "_takes_kernels", lambda *_: True)
    with torch.no_grad(), served.rows(rows):
        assert len(calls) == 1 and len(calls[0][0]) == 2
        found = net(x)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected)
    served.select(None)
    assert len(calls) == 1


@pytest.mark.parametrize(("dtype", "kept"), TYPES)
def test_one_adapter_for_few_rows_is_found_again_and_sees_new_numbers(dtype, kept):
    from reference.kernels.multi_lora import single

    f = factors(5, 24, 40, kept)
    for rows in (1, 3, single.FEW):
        x, y = torch.randn(rows, 40, device=DEVICE).to(dtype), torch.randn(rows, 24, device=DEVICE).to(dtype)
        found = y.clone()
        single.add_update(found, x, f.A, f.B, f.scaling)
        near(found, by_loop(y, x, [f], [0] * rows, 1), dtype)
    made = single._table.cache_info().misses
    f.A.mul_(2)  # as an optimizer would: in place
    found = y.clone()
    single.add_update(found, x, f.A, f.B, f.scaling)
    near(found, by_loop(y, x, [f], [0] * rows, 1), dtype)
    assert single._table.cache_info().misses == made


def test_an_unmerged_lora_layer_takes_them_at_generation(monkeypatch):
    from reference.lora import LoRALinear, generation

    layer = LoRALinear(nn.Linear(40, 24).to(DEVICE, torch.bfloat16), 4, 6).eval()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 1, 40, device=DEVICE).bfloat16()
    with torch.no_grad():
        expected = layer(x) if not CUDA else layer.base(x) + (layer.scaling * x.float() @ layer.lora_A.T @ layer.lora_B.T).bfloat16()
        monkeypatch.setattr(generation, "takes_kernels", lambda *_: True)
        near(layer(x).view(2, 24), expected.view(2, 24).double(), torch.bfloat16)


@pytest.mark.parametrize(("dtype", "kept"), TYPES[1:])
@pytest.mark.parametrize(("n_out", "n_in", "r"), [(24, 40, 5), (33, 100, 16), (300, 17, 70), (7, 9000, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_through_base_and_adapter_in_two_launches(bias, n_out, n_in, r, dtype, kept):
    """NaN lies right behind whatever is read."""
    from reference.kernels.multi_lora import single

    def surrounded(tensor):
        memory = torch.full((tensor.numel() + 40_000,), torch.nan, dtype=tensor.dtype, device=DEVICE)
        memory[: tensor.numel()] = tensor.flatten()
        return memory[: tensor.numel()].view(tensor.shape)

    base, f = nn.Linear(n_in, n_out, bias=bias).to(DEVICE, dtype), factors(r, n_out, n_in, kept)
    A, B, W, x = (surrounded(each) for each in (f.A, f.B, base.weight.data, torch.randn(1, n_in, device=DEVICE).to(dtype)))
    b = surrounded(base.bias.data) if bias else None
    found = single.adapted_row(x, W, b, A, B, f.scaling)
    exact = x.double() @ W.double().T + (b.double() if bias else 0)
    near(found, by_loop(exact, x, [f], [0], 1), dtype)
    assert torch.equal(found, single.adapted_row(x, W, b, A, B, f.scaling))


@pytest.mark.parametrize("kept", [torch.float16, torch.float32])
def test_layers_take_two_launches_at_one_row(kept, monkeypatch):
    """An unmerged LoRA layer, and one of many adapters; packed, watched or wide bases and more rows go the other way."""
    from reference.kernels.multi_lora import single
    from reference.lora import LoRALinear, generation

    base, f = nn.Linear(40, 24).to(DEVICE, torch.float16), factors(4, 24, 40, kept)
    many, one = MultiLoRALinear(base), LoRALinear(base, 4, 6).eval()
    one.lora_A.data, one.lora_B.data, one.scaling = f.A, f.B, f.scaling
    many.add("t", f)
    calls, real = [], single.adapted_row
    monkeypatch.setattr(single, "adapted_row", lambda *given: calls.append(1) or real(*given))
    monkeypatch.setattr(generation, "takes_kernels", lambda *_: True)
    monkeypatch.setattr(many, "_takes_kernels", lambda *_: True)
    wanted = 0
    for x in (torch.randn(1, 1, 40), torch.randn(1, 40), torch.randn(3, 40)):
        x = x.to(DEVICE, torch.float16)
        right = by_loop(base(x).view(-1, 24), x.view(-1, 40), [f], [0] * (x.numel() // 40), 1)
        for chosen in ("t", ["t"] * len(x)):
            many.select(chosen)
            with torch.no_grad():
                for layer in (one, many):
                    y = layer(x)
                    assert y.shape == (*x.shape[:-1], 24)
                    near(y.view(-1, 24), right, torch.float16)
                    wanted += x.numel() == 40
                    assert len(calls) == wanted
    x = x[:1]
    many.select([None])
    with torch.no_grad():
        assert torch.equal(many(x), base(x)) and len(calls) == wanted
    assert generation.plain(base, x) and not generation.plain(base, x.float()) and not generation.plain(nn.Bilinear(40, 1, 24), x)
    handle = base.register_forward_hook(lambda *_: None)
    assert not generation.plain(base, x), "a hook waits"
    handle.remove()
    assert generation.plain(base, x)


def test_when_a_layer_takes_them(monkeypatch):
    """The decision, on tensors that only say where they are."""
    from types import SimpleNamespace

    from reference.lora import generation

    def tensor(*shape, dtype=torch.bfloat16, cuda=True, contiguous=True):
        count = torch.Size(shape).numel()
        return SimpleNamespace(
            shape=shape, dtype=dtype, is_cuda=cuda, numel=lambda: count, is_contiguous=lambda: contiguous, __len__=lambda: shape[0]
        )

    monkeypatch.setattr(generation, "_TRITON", True)
    half, wide = (tensor(4, 40), tensor(24, 4)), (tensor(4, 40, dtype=torch.float32), tensor(24, 4, dtype=torch.float32))
    with torch.no_grad():
        for A, B in (half, wide):
            assert generation.takes_kernels(tensor(1, 40), A, B) and generation.takes_kernels(tensor(16, 1, 40), A, B)
            assert not generation.takes_kernels(tensor(17, 40), A, B), "many rows"
            assert not generation.takes_kernels(tensor(0, 40), A, B), "no row"
            assert not generation.takes_kernels(tensor(1, 40, cuda=False), A, B), "no GPU"
            assert not generation.takes_kernels(tensor(1, 40, dtype=torch.float32), A, B), "float32"
        assert not generation.takes_kernels(tensor(1, 40, dtype=torch.float16), *half), "other factors"
        assert not generation.takes_kernels(tensor(1, 40), half[0], tensor(24, 4, contiguous=False)), "a view"
        monkeypatch.setattr(generation, "_TRITON", False)
        assert not generation.takes_kernels(tensor(1, 40), *half), "no Triton"
        monkeypatch.setattr(generation, "_TRITON", True)
    assert not generation.takes_kernels(tensor(1, 40), *half), "training"


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_on_a_gpu_a_lora_layer_generates_by_them_also_from_a_graph(kept):
    from reference.lora import LoRALinear, generation

    layer = LoRALinear(nn.Linear(4096, 11008, bias=False).to(DEVICE, torch.bfloat16), 16, 24).eval()
    nn.init.normal_(layer.lora_B, std=0.02)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(kept), layer.lora_B.data.to(kept)
    x = torch.randn(1, 1, 4096, device=DEVICE).bfloat16()
    with torch.no_grad():
        assert generation.takes_kernels(x, layer.lora_A, layer.lora_B)
        exact = x.double() @ layer.base.weight.double().T  # the layer rounds the sum, not its parts
        exact += layer.scaling * x.double() @ layer.lora_A.double().T @ layer.lora_B.double().T
        near(layer(x).view(1, -1), exact.view(1, -1), torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
    near(y.view(1, -1), exact.view(1, -1), torch.bfloat16)
