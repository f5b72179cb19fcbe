"""The pool, the scheduler and the engine: answers are each tenant's own, memory is kept to, nobody starves, versions last, errors."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import assert_same
from torch import nn

from reference.adapter_format import save_adapter
from reference.llama import Llama
from reference.lora import LoRALinear, inject_lora, merge_lora
from reference.model_shapes import ModelShape
from reference.multi_lora import Factors, MultiLoRA, MultiLoRALinear, Route, bytes_of, factors_of
from reference.multi_lora.serving import AdapterPool, Engine, KVCache, PoolFull, Request, generate, graphs, next_logits, token_bytes
from reference.multi_lora.serving.cache import padded
from reference.multi_lora.serving.packed import PackedAdapter
from reference.qlora import quantize_linears

SHAPE = ModelShape("tiny", hidden=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24, vocab=40)
TOKEN = token_bytes(SHAPE, torch.float32)
CPU = torch.device("cpu")


@pytest.fixture
def base():
    torch.manual_seed(0)
    model = Llama(SHAPE, checkpointing=False).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.4)  # wide, so that every layer shows in the likeliest token
    return model


def tenant(base, r, seed, targets="all-linear"):
    """An adapter, and the plain model that it makes."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    inject_lora(model, r, 2 * r, targets)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.3)
    adapter = factors_of(model)
    return adapter, merge_lora(copy.deepcopy(model)), model


def slowly(model, prompt, count):
    """The likeliest tokens, the whole text anew for each."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model.logits(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def prompts(count, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(40, (int(n),), generator=g).tolist() for n in torch.randint(1, 9, (count,), generator=g)]


def engine(base, tenants, rows=4, slots=200, device_bytes=1 << 20, **settings):
    served = MultiLoRA(copy.deepcopy(base))
    pool = AdapterPool(served, device_bytes, 1 << 20)
    for name, adapter in tenants.items():
        pool.register(name, adapter)
    return Engine(served, pool, rows, slots * TOKEN, **settings)


def served_in_steps(base, tenants, wanted, **settings):
    """Everybody's tokens, where requests come while others run."""
    server, ended = engine(base, tenants, **settings), []
    requests = [Request(name, prompt, 2 + i % 5) for i, (name, prompt) in enumerate(zip(wanted, prompts(len(wanted)), strict=True))]
    for request in requests:
        server.submit(request)
        ended += server.step()
    server.run()
    return [request.tokens for request in requests], server


# ---- cache


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=15)
def test_logits_from_the_cache_are_those_of_the_whole_text(lengths, seed):
    torch.manual_seed(seed)
    model, extra = Llama(SHAPE, checkpointing=False).eval(), 3
    texts = [torch.randint(40, (n + extra,)).tolist() for n in lengths]
    cache = KVCache(SHAPE, sum(map(len, texts)) + 5, torch.float32, CPU)
    cache.take(2)
    rows = [cache.take(len(text)) for text in texts]
    start, count = torch.zeros(len(texts), dtype=torch.int64), torch.tensor(lengths)
    ids = padded([text[:n] for text, n in zip(texts, lengths, strict=True)], CPU)
    for step in range(extra + 1):
        found = next_logits(model, cache, ids, padded(rows, CPU), start, count)
        for i, (text, n) in enumerate(zip(texts, lengths, strict=True)):
            with torch.no_grad():
                assert_same(found[i], model.logits(torch.tensor([text[: n + step]]))[0, -1], ulps=256)
        if step < extra:
            start, count = start + count, torch.ones_like(count)
            ids = torch.tensor([[text[n + step]] for text, n in zip(texts, lengths, strict=True)])


def test_generation_is_the_slow_one(base):
    texts = prompts(5)
    expected = [slowly(base, text, 7) for text in texts]
    assert generate(base, texts, 7) == expected
    stop = expected[0][2]
    assert generate(base, texts, 7, stop)[0] == expected[0][: expected[0].index(stop) + 1]


def test_generation_with_a_tenant_a_row(base):
    tenants = {name: tenant(base, r, seed) for name, r, seed in (("a", 2, 1), ("b", 5, 2))}
    served, texts, names = MultiLoRA(copy.deepcopy(base)), prompts(4), ["b", None, "a", "b"]
    for name, (adapter, *_) in tenants.items():
        served.add(name, adapter)
    with served.rows(names):
        found = generate(served.model, texts, 6)
    assert found == [slowly(tenants[n][1] if n else base, text, 6) for n, text in zip(names, texts, strict=True)]
    assert found != generate(base, texts, 6)


def test_the_cache_gives_out_what_it_has():
    cache = KVCache(SHAPE, 5, torch.float32, CPU)
    first = cache.take(3)
    assert 0 not in first and cache.free == 2
    with pytest.raises(ValueError, match="3 slots wanted, 2 are free"):
        cache.take(3)
    cache.give(first)
    assert sorted(cache.take(5)) == [1, 2, 3, 4, 5]
    assert cache.k.nbytes + cache.v.nbytes == 6 * TOKEN


# ---- engine


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, 6)), min_size=1, max_size=8), st.integers(1, 4), st.data())
@settings(max_examples=12)
def test_everybody_gets_his_own_answer_whatever_the_company(wanted, rows, data):
    torch.manual_seed(0)
    base = Llama(SHAPE, checkpointing=False).eval()
    for parameter in base.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.4)
    tenants = {name: tenant(base, r, r) for name, r in (("a", 1), ("b", 3), ("c", 8))}
    largest = max(bytes_of(adapter) for adapter, *_ in tenants.values())
    # Memory for one adapter at a time, or for all; tokens of a few requests, or of all.
    room, slots = data.draw(st.sampled_from([2 * largest, 1 << 20])), data.draw(st.sampled_from([16, 200]))
    server = engine(base, {name: t[0] for name, t in tenants.items()}, rows, slots, room)
    requests = [Request(name, text, n) for (name, n), text in zip(wanted, prompts(len(wanted)), strict=True)]
    for request in requests:
        server.submit(request)
    ended = server.run()
    assert sorted(map(id, ended)) == sorted(map(id, requests)) and not server.busy
    for request in requests:
        model = tenants[request.tenant][1] if request.tenant else base
        assert request.tokens == slowly(model, request.prompt, request.max_new_tokens)
        assert len(request.times) == len(request.tokens) and request.times[0] >= request.submitted
    assert server.cache.free == server.scheduler.slots
    assert all(held.users == 0 for held in server.pool.tenants.values())
    assert server.pool.device_used <= room


def test_an_adapter_that_is_replaced_or_removed_never_changes_a_request_that_runs(base):
    (old, old_model, _), (new, new_model, _) = tenant(base, 3, 1), tenant(base, 6, 2)
    server = engine(base, {"a": old})
    first, second, text = Request("a", [1, 2, 3], 8), Request("a", [1, 2, 3], 8), [1, 2, 3]
    server.submit(first)
    server.step()
    server.pool.replace("a", new)
    server.submit(second)
    server.step()
    used = server.pool.device_used
    server.pool.remove("a")
    assert server.pool.device_used == used  # both versions run
    server.run()
    assert first.tokens == slowly(old_model, text, 8) and second.tokens == slowly(new_model, text, 8)
    assert first.tokens != second.tokens
    assert server.pool.device_used == 0  # and went with their last request


def test_requests_wait_for_memory_and_nothing_that_runs_is_thrown_out(base):
    adapters = {name: tenant(base, 4, i)[0] for i, name in enumerate("abc")}
    size = engine(base, adapters).pool.tenants["a"].nbytes
    server = engine(base, adapters, rows=8, device_bytes=2 * size, ahead=0)
    for name in "abca":
        server.submit(Request(name, [1, 2], 3))
    server.step()
    # c is third, and the pool is full: it waits, and the request behind it too, whose adapter is there.
    assert [r.tenant for r in server.scheduler.running] == ["a", "b"] and server.pool.device_used == 2 * size
    server.run()
    assert server.pool.counts["evictions"] >= 1 and server.pool.counts["loads"] >= 3
    by_tokens = engine(base, adapters, rows=8, slots=11)
    for name in "abc":
        by_tokens.submit(Request(name, [1, 2], 3))
    by_tokens.step()
    assert len(by_tokens.scheduler.running) == 2 and by_tokens.cache.free == 1


def test_who_sends_many_requests_waits_behind_who_sends_the_first(base):
    adapters = {name: tenant(base, 2, i)[0] for i, name in enumerate("ab")}
    server = engine(base, adapters, rows=1)
    greedy, modest = [Request("a", [1, 2], 4) for _ in range(6)], Request("b", [1, 2], 4)
    for request in greedy:
        server.submit(request)
    server.step()
    server.submit(modest)
    ended = server.run()
    assert ended.index(modest) == 1  # right after the one that ran
    # Who comes late has saved up nothing: the two take turns.
    server = engine(base, adapters, rows=1)
    for _ in range(5):
        server.submit(Request("a", [1, 2], 2))
    server.run()
    for name in "abababab":
        server.submit(Request(name, [1, 2], 2))
    order = [request.tenant for request in server.run()]
    assert order.count("b") == 4 and max(order[:4].count(name) for name in "ab") <= 3


def test_a_stop_token_ends_a_request(base):
    expected = slowly(base, [1, 2, 3], 8)
    server = engine(base, {})
    server.submit(request := Request(None, [1, 2, 3], 8, stop=expected[3]))
    server.run()
    assert request.tokens == expected[: expected.index(expected[3]) + 1]


# ---- pool


@pytest.fixture
def files(base, tmp_path):
    for i, name in enumerate("abcd"):
        save_adapter(tenant(base, 2 + i, i)[2], tmp_path / name)
    return tmp_path


def test_what_comes_from_disk_goes_through_ram_to_the_device(base, files):
    served = MultiLoRA(base)
    probe = AdapterPool(served, 1 << 20, 1 << 20)
    for name in "abcd":
        probe.register(name, files / name)
    sizes = {}
    for name in "abcd":
        probe.release(probe.acquire(name))
        sizes[name] = probe.tenants[name].nbytes
    assert sizes["a"] < sizes["d"]  # by bytes, not by the largest rank
    assert probe.host.reads == probe.counts["loads"] == 4 and probe.counts["bytes"] == sum(sizes.values())
    pool = AdapterPool(served, sizes["a"] + sizes["b"], sizes["b"] + sizes["c"])
    for name in "abcd":
        pool.register(name, files / name)
    for name in ("a", "b", "a"):
        pool.release(pool.acquire(name))
    assert pool.resident == ["b", "a"] and pool.counts["hits"] == 1 and pool.host.reads == 2
    pool.evict("a")
    pool.release(pool.acquire("a"))  # from RAM
    assert pool.host.reads == 2 and pool.counts["loads"] == 3
    pool.evict("a")
    pool.release(pool.acquire("c"))  # b, the least recently used, goes, from the device and from RAM
    assert pool.resident == ["c"] and pool.host.used <= pool.host.limit and pool.device_used <= pool.device_bytes
    pool.release(pool.acquire("a"))
    assert pool.host.reads == 3
    pool.release(pool.acquire("b"))
    assert pool.host.reads == 4


def test_its_factors_are_the_files_and_keep_their_values_in_another_dtype(base, files):
    served = MultiLoRA(copy.deepcopy(base))
    for dtype in (None, torch.bfloat16):
        pool = AdapterPool(served, 1 << 20, 1 << 20, dtype)
        pool.register("b", files / "b")
        held, expected = pool.acquire("b"), factors_of(tenant(base, 3, 1)[2])
        for name, factors in held.adapter.items():
            assert torch.equal(factors.A, expected[name].A.to(dtype or torch.float32)) and factors.scaling == expected[name].scaling
            assert torch.equal(factors.B, expected[name].B.to(dtype or torch.float32))


@given(st.lists(st.tuples(st.sampled_from(["acquire", "release", "prefetch", "replace", "evict"]), st.integers(0, 4)), max_size=40))
@settings(max_examples=40)
def test_no_order_of_calls_breaks_the_books(calls):
    """What is pinned stays, with its values; the device's bytes are never exceeded, save by versions that were replaced."""
    served = MultiLoRA(nn.Sequential(nn.Linear(8, 8)))
    adapters = [{"0": Factors(torch.full((r, 8), float(r)), torch.ones(8, r))} for r in (1, 2, 3, 4, 5)]
    pool = AdapterPool(served, 1200, 1 << 20)  # room for two: a factor takes 256 bytes or more
    for i, adapter in enumerate(adapters):
        pool.register(str(i), adapter)
    pinned = []
    for call, i in calls:
        name = str(i)
        try:
            if call == "acquire":
                held = pool.acquire(name)
                pinned.append((held, held.adapter["0"].A.clone()))
            elif call == "release" and pinned:
                pool.release(pinned.pop(i % len(pinned))[0])
            elif call == "prefetch":
                pool.prefetch(name)
            elif call == "replace":
                pool.replace(name, {"0": Factors(torch.full((i + 2, 8), -float(i)), torch.ones(8, i + 2))})
            elif call == "evict":
                pool.evict(name)
        except PoolFull:
            assert pinned
        except ValueError as error:
            assert "in use" in str(error) or "not on the device" in str(error)
        assert pool.device_used <= pool.device_bytes
        for held, values in pinned:
            assert held.users > 0 and torch.equal(held.adapter["0"].A, values)
    assert sum(held.users for held in {id(h): h for h, _ in pinned}.values()) == len(pinned)


def drawn_adapter(number, kind):
    """A version whose every value tells its number; kinds have other layers, ranks, dtypes."""
    half = torch.half if kind == 3 else torch.float32
    ranks = [{"0": 2, "1": 2}, {"0": 1, "1": 5}, {"1": 3}, {"0": 2, "1": 2}][kind]
    filled = {n: (torch.full((r, 8), float(number)).to(half), torch.full((8, r), -float(number)).to(half)) for n, r in ranks.items()}
    return {n: Factors(*both, number + 0.5) for n, both in filled.items()}


def assert_lies_as(found, adapter):
    assert list(found) == list(adapter) and len(found) == len(adapter)
    for name, f in adapter.items():
        g = found[name]
        assert torch.equal(g.A, f.A) and torch.equal(g.B, f.B) and g.A.dtype == f.A.dtype and g.scaling == f.scaling
        assert g.r == f.r and g.sizes == f.sizes and g.A.is_contiguous() and g.B.is_contiguous() and found.get(name) is g


CALLS = ["acquire", "acquire", "acquire", "release", "prefetch", "replace", "evict", "remove", "register"]


@given(st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 3), st.integers(0, 3)), max_size=50), st.integers(2100, 5000))
@settings(max_examples=60)
def test_what_somebody_holds_never_changes_whatever_comes_after_it(calls, room):
    """Requests that run, and whoever kept an adapter, a tensor or a route of one that has ended."""
    served = MultiLoRA(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    pool, versions, running, kept = AdapterPool(served, room, 1 << 20), {}, [], []
    for number, (call, i, kind) in enumerate([("register", i, i) for i in range(4)] + calls):
        name = "abcd"[i]
        try:
            if call == "acquire":
                held = pool.acquire(name)
                running.append((held, held.adapter, versions[held]))
            elif call == "release" and running:
                held, adapter, right = running.pop(i % len(running))
                pool.release(held)
                one = Factors(adapter["1"].A, adapter["1"].B, adapter["1"].scaling)
                kept.append((Route([adapter]).distinct[0] if kind else {"1": one}, right))
            elif call in ("replace", "register"):
                getattr(pool, call)(name, right := drawn_adapter(number, kind))
                versions[pool.tenants[name]] = right
            elif call != "release":
                getattr(pool, call)(name)
        except PoolFull:
            assert running
        except ValueError as error:
            assert any(words in str(error) for words in ("no adapter", "there is a tenant", "in use", "not on the device"))
        for held, adapter, right in running:
            assert held.users and held.adapter is adapter
            assert_lies_as(adapter, right)
        for adapter, right in kept:
            for layer, f in adapter.items():
                assert torch.equal(f.A, right[layer].A) and torch.equal(f.B, right[layer].B) and f.scaling == right[layer].scaling
        there = [held for held in versions if held.adapter is not None]
        assert pool.device_used == sum(held.nbytes for held in there) <= room
        assert {held.name for held in there if held is pool.tenants.get(held.name)} == set(pool.resident)
        places = sorted((min(f.A.data_ptr() for f in held.adapter.values()), held.nbytes) for held in there)
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places))  # no two in one place


def test_an_adapter_is_packed_whatever_its_factors_are():
    """Each at a multiple of 256 bytes; dtypes are mixed, some are not contiguous."""
    served = MultiLoRA(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(24, 5)))
    adapter = {
        "1": Factors(torch.randn(8, 3).T, torch.randn(3, 24).T, 0.5),
        "0": Factors(torch.randn(70, 8).half(), torch.randn(8, 70).half(), 2.0),
        "2": Factors(torch.randn(1, 24).double(), torch.randn(5, 1).double(), -1.0),
    }
    pool = AdapterPool(served, 1 << 14, 1 << 14)
    pool.register("a", adapter)
    held = pool.acquire("a")
    assert_lies_as(held.adapter, adapter)
    starts = [t.data_ptr() - held.adapter["1"].A.data_ptr() for f in held.adapter.values() for t in (f.A, f.B)]
    assert starts == [0, 256, 768, 2048, 3328, 3584] and held.nbytes == 3840 == pool.device_used == pool.host.used
    with pytest.raises(TypeError):
        held.adapter["0"] = adapter["0"]
    assert held.adapter.get("3") is None and "3" not in held.adapter


def test_nothing_is_done_layer_by_layer_when_an_adapter_is_loaded(base, files, monkeypatch):
    checked, made = [], []
    check, make = MultiLoRA.check, PackedAdapter._make
    monkeypatch.setattr(MultiLoRA, "check", lambda self, adapter, name, **more: checked.append(name) or check(self, adapter, name, **more))
    monkeypatch.setattr(PackedAdapter, "_make", lambda self, *place: made.append(place) or make(self, *place))
    adapter = tenant(base, 3, 7)[0]
    served = MultiLoRA(base)
    pool = AdapterPool(served, 1 << 20, 1 << 20)
    pool.register("ram", adapter)
    pool.register("disk", files / "b")
    assert checked == ["ram"]  # a file is checked when it is read
    for _ in range(3):
        for name in ("ram", "disk"):
            pool.release(pool.acquire(name))
            pool.evict(name)
    assert checked == ["ram", "disk"] and not made and pool.counts["loads"] == 6
    pool.replace("ram", adapter)
    held = pool.acquire("ram")
    for _ in range(2):
        served.use(Route([held.adapter]))
        served.use(None)
    assert checked == ["ram", "disk", "ram"] and len(made) == len(served.layers)


def test_files_that_do_not_fit_are_refused_when_they_are_read(base, files):
    pool = AdapterPool(MultiLoRA(base, ["q_proj"]), 1 << 20, 1 << 20)
    pool.register("a", files / "a")
    for work in (pool.acquire, pool.prefetch):
        with pytest.raises(ValueError, match=r"adapter 'a': layers \[.*\] are not served: name them in target_modules"):
            work("a")
        assert not pool.resident and not pool.host.used and not pool.device_used


@pytest.mark.gpu
def test_on_a_gpu_copies_and_kernels_wait_for_each_other():
    """A pool of one large adapter: each is copied to where kernels still read the one before, and the CPU waits for nothing."""
    width, r = 4096, 1024
    served = MultiLoRA(nn.Sequential(nn.Linear(width, width, bias=False, device="cuda")))
    nn.init.zeros_(served.layers["0"].base.weight)
    pool, found, spoilt = AdapterPool(served, 2 * r * width * 4, 8 * r * width * 4), [], []
    for i, name in enumerate("abc"):
        pool.register(name, {"0": Factors(torch.full((r, width), i + 1.0), torch.ones(width, r), 1 / (r * width))})
    x = torch.ones(64, width, device="cuda")
    with torch.no_grad():
        for step in range(60):
            if step % 7 == 3:  # fetched, and thrown out before anybody waited for it
                pool.prefetch(other := "abc"[(step + 1) % 3])
                pool.evict(other)
                next_owner = torch.ones(2 * r * width, device="cuda")
                torch.cuda._sleep(4_000_000)  # longer than the copy takes
                spoilt.append((next_owner != 1).sum())
                del next_owner
            held = pool.acquire("abc"[step % 3])
            served.use(Route.same(held.adapter))
            found.append([served.model(x) for _ in range(4)][-1])
            served.use(None)
            pool.release(held)
    for step, y in enumerate(found):
        torch.testing.assert_close(y, torch.full_like(y, step % 3 + 1.0), rtol=1e-3, atol=0)
    assert spoilt and not any(count.item() for count in spoilt)


def test_pool_errors_name_what_is_wrong(base, files):
    served = MultiLoRA(base)
    pool = AdapterPool(served, 1 << 20, 1 << 20)
    pool.register("a", files / "a")
    for work in (pool.acquire, pool.prefetch, pool.evict, pool.remove, lambda name: pool.replace(name, files / "a")):
        with pytest.raises(ValueError, match="no adapter 'x'; there are: 'a'"):
            work("x")
    with pytest.raises(ValueError, match="there is a tenant 'a'"):
        pool.register("a", files / "b")
    with pytest.raises(ValueError, match="'a' is not on the device"):
        pool.evict("a")
    held = pool.acquire("a")
    with pytest.raises(ValueError, match="'a' is in use by 1"):
        pool.evict("a")
    pool.release(held)
    with pytest.raises(ValueError, match="'a' is released more often than acquired"):
        pool.release(held)
    pool.register("lost", files / "nowhere")
    with pytest.raises(FileNotFoundError):
        pool.acquire("lost")
    odd = {"model.layers.0.mlp.up_proj": Factors(torch.ones(2, 3), torch.ones(4, 2))}
    for work in (pool.register, lambda _, adapter: pool.replace("a", adapter)):
        with pytest.raises(ValueError, match=r"adapter '\w+', model.layers.0.mlp.up_proj: the factors are for a layer of sizes"):
            work("odd", odd)
    assert list(pool.tenants) == [*pool.resident, "lost"] == ["a", "lost"] and pool.host.used == pool.tenants["a"].nbytes
    small = AdapterPool(served, 100, 1 << 20)
    small.register("a", files / "a")
    with pytest.raises(ValueError, match=r"'a' has \d+ bytes, the pool 100: give it more device_bytes"):
        small.acquire("a")
    with pytest.raises(ValueError, match=r"'a' has \d+ bytes, and 100 of RAM can be had: give more host_bytes"):
        AdapterPool(served, 100, 100).register("a", held.adapter)
    for wrong in ((0, 10), (10, 0)):
        with pytest.raises(ValueError, match=r"_bytes must be at least 1, got 0"):
            AdapterPool(served, *wrong)


def test_requests_that_could_never_run_are_refused(base):
    server = engine(base, {"a": tenant(base, 2, 1)[0]}, slots=10)
    for request, message in (
        (Request("x", [1], 2), "no adapter 'x'"),
        (Request("a", [], 2), "prompt must hold at least one token"),
        (Request("a", [1] * 6, 5), r"may need 6 \+ 5 tokens, the cache has 10 slots"),
        (Request("a", [1], 0), "max_new_tokens must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            server.submit(request)
    assert not server.busy
    with pytest.raises(TypeError, match=r"must be a reference\.llama\.Llama, got Sequential"):
        Engine(MultiLoRA(nn.Sequential(nn.Linear(8, 8))), server.pool, 1, 1 << 20)
    with pytest.raises(ValueError, match=f"kv_bytes must be at least {TOKEN}"):
        Engine(server.served, server.pool, 1, TOKEN - 1)
    for texts, count in (([], 3), ([[]], 3), ([[1]], 0)):
        with pytest.raises(ValueError, match="at least"):
            generate(base, texts, count)


def test_a_tenant_that_goes_while_it_waits_takes_only_its_own_request_along(base):
    adapters = {name: tenant(base, 2, i)[0] for i, name in enumerate("ab")}
    server = engine(base, adapters, rows=1)
    for name in "aba":
        server.submit(Request(name, [1, 2], 2))
    server.step()
    server.pool.remove("b")
    ended, errors = [], []
    while server.busy:
        try:
            ended += server.step()
        except ValueError as error:
            errors.append(str(error))
    assert [r.tenant for r in ended] == ["a", "a"] and len(errors) == 1 and "no adapter 'b'" in errors[0]


def test_a_route_groups_requests_of_one_version():
    adapter = {"0": Factors(torch.ones(1, 8), torch.ones(8, 1))}
    pool = AdapterPool(MultiLoRA(nn.Sequential(nn.Linear(8, 8))), 1 << 12, 1 << 12)
    pool.register("a", adapter)
    one, two = pool.acquire("a"), pool.acquire("a")
    pool.replace("a", adapter)
    three = pool.acquire("a")
    assert Route([h.adapter for h in (one, three, two)]).groups == [[0, 2], [1]]


def test_over_a_base_in_four_bits_everybody_gets_what_he_gets_alone(base):
    tenants = {name: tenant(base, r, seed)[0] for name, r, seed in (("a", 2, 1), ("b", 5, 2), ("c", 3, 3))}
    quantize_linears(base, compute_dtype=torch.float32)
    alone = MultiLoRA(copy.deepcopy(base))
    for name, adapter in tenants.items():
        alone.add(name, adapter)
    asked = list(zip([*tenants, None, "b"], prompts(5), strict=True))
    found = engine(base, tenants, rows=3, device_bytes=2 * max(map(bytes_of, tenants.values())) + 4096)
    requests = [Request(name, prompt, 6) for name, prompt in asked]
    for request in requests:
        found.submit(request)
    found.run()
    for request, (name, prompt) in zip(requests, asked, strict=True):
        with alone.rows(name):
            assert request.tokens == generate(alone.model, [prompt], 6)[0]


# ---- decode steps from graphs


WANTED = ["a", None, "b", "a", "c", "c", "b", None, "a", "b", "c", "a"]


def three_tenants(base, dtype=torch.float32):
    """Of other ranks; one has no adapter in some layers."""
    made = {"a": tenant(base, 2, 1)[0], "b": tenant(base, 4, 2, ["q_proj", "down_proj"])[0], "c": tenant(base, 3, 3)[0]}
    return {name: {layer: f.to(dtype) for layer, f in adapter.items()} for name, adapter in made.items()}


def test_steps_from_memory_of_their_own_give_the_same_tokens(base):
    tenants = three_tenants(base)
    right, _ = served_in_steps(base, tenants, WANTED, rows=3)
    found, server = served_in_steps(base, tenants, WANTED, rows=3, cuda_graphs=True)
    assert found == right and {key[0] for key in server.graphs.steps} == {1, 2, 4}
    assert all(layer._route is None for layer in server.served.layers.values())


def test_tables_of_a_step_follow_adapters_that_come_and_go(base, monkeypatch):
    """As on a GPU, without the recording: kernels read what a step's tables and plan say, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton exists for Linux on x86-64")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process: the next test replays them")
    monkeypatch.setattr(graphs, "kernels_for", lambda device: True)
    monkeypatch.setattr(MultiLoRALinear, "_takes_kernels", lambda *_: True)
    base, tenants = base.half(), three_tenants(base, torch.float16)
    right, server = served_in_steps(base, tenants, WANTED, rows=3)
    tight = 2 * max(held.nbytes for held in server.pool.tenants.values())
    found, server = served_in_steps(base, tenants, WANTED, rows=3, cuda_graphs=True, device_bytes=tight)
    assert found == right and server.pool.counts["loads"] > 3  # evicted, and loaded to another place
    assert any(rank == 16 and dtype is torch.float16 for _, _, rank, dtype, _ in server.graphs.steps)


@pytest.mark.gpu
@pytest.mark.parametrize("quantized", [False, True])
def test_on_a_gpu_replayed_steps_give_the_same_tokens(base, quantized):
    tenants = three_tenants(base, torch.bfloat16)
    base = base.bfloat16().cuda()
    if quantized:
        quantize_linears(base, block_size=8)
    right, server = served_in_steps(base, tenants, WANTED, rows=3)
    tight = 2 * max(held.nbytes for held in server.pool.tenants.values())
    found, server = served_in_steps(base, tenants, WANTED, rows=3, device_bytes=tight, cuda_graphs=True)
    assert all(step.graph is not None for step in server.graphs.steps.values())
    same = sum(a == b for a, b in zip(found, right, strict=True))  # a padded batch may round otherwise
    assert same >= len(right) - 2
