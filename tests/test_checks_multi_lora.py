"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused. And the judges' arithmetic is the reference's."""

import importlib

import pytest
import torch

from course.checking import NotYet
from course.checks import multi_lora as check
from course.checks.multi_lora.combine import weighted_sum
from course.checks.multi_lora.route import mixed_batch
from course.checks.multi_lora.ties import ties
from reference.multi_lora import Factors, MultiLoRALinear, combine, merged_update

pools = importlib.import_module("course.checks.multi_lora.pool")  # the package hands on the check under that name
platforms = importlib.import_module("course.checks.multi_lora.platform")


def refused(judge, answer, words=None):
    for seed in range(3):
        with pytest.raises(NotYet, match=words):
            judge._judge(answer, seed)


def accepted(judge, answer):
    for seed in range(3):
        judge._judge(answer, seed)


# ---- the judges' arithmetic


def test_the_mixed_batch_is_the_references():
    torch.manual_seed(0)
    base = torch.nn.Linear(7, 5, bias=False)
    layer, adapters = (
        MultiLoRALinear(base),
        {"a": (torch.randn(2, 7), torch.randn(5, 2), 0.5), "b": (torch.randn(4, 7), torch.randn(5, 4), 2.0)},
    )
    for name, factors in adapters.items():
        layer.add(name, Factors(*factors))
    rows, x = ["b", None, "a", "b"], torch.randn(4, 7)
    layer.select(rows)
    with torch.no_grad():
        torch.testing.assert_close(mixed_batch(x, base.weight, adapters, rows), layer(x))


def test_the_sum_is_the_references():
    torch.manual_seed(0)
    adapters = [(torch.randn(2, 7), torch.randn(5, 2), 0.5), (torch.randn(4, 7), torch.randn(5, 4), 2.0)]
    found, (A, B) = combine([Factors(*a) for a in adapters], [0.7, -0.3]), weighted_sum(adapters, [0.7, -0.3])
    torch.testing.assert_close(B @ A, found.delta())


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_ties_is_the_references(density):
    torch.manual_seed(0)
    adapters = [Factors(torch.randn(2, 7), torch.randn(5, 2), s) for s in (0.5, 1.0, 2.0)]
    mine = ties([a.delta() for a in adapters], [1.0, 0.5, 2.0], density)
    torch.testing.assert_close(mine, merged_update(adapters, [1.0, 0.5, 2.0], "ties", density))


def test_the_pool_is_the_references():
    """The long day through ``AdapterPool``, with sizes that its packing leaves as they are."""
    from reference.multi_lora import MultiLoRA
    from reference.multi_lora.serving import AdapterPool, PoolFull

    unit = 512  # bytes: what packing rounds to, or a part of it
    served = MultiLoRA(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)), ["0"])
    events = pools.drawn(5)
    sizes = {name: size for kind, name, size in events if kind == "+"}
    tenants = {name: {"0": Factors(torch.zeros(size, 64), torch.zeros(64, size))} for name, size in sizes.items()}
    assert all(
        2 * unit // 2 * size == sum(t.nbytes for t in (f["0"].A, f["0"].B))
        for (name, f), size in zip(tenants.items(), sizes.values(), strict=True)
    )
    pool, held, found = AdapterPool(served, 100 * unit, 1 << 24), {}, []
    for name, adapter in tenants.items():
        pool.register(name, adapter)
    for kind, name, _ in events:
        if kind == "-":
            pool.release(held[name].pop())
            continue
        before = list(pool.resident)
        try:
            held.setdefault(name, []).append(pool.acquire(name))
        except PoolFull:
            found.append("wait")
        else:
            found.append([other for other in before if other not in pool.resident])
    assert found == pools.played(pools.Pool(100), events)


def test_the_platform_of_the_example_in_round_numbers():
    found = platforms.design(platforms.EXAMPLE)
    assert found["adapter_bytes"] == pytest.approx(414e6, rel=0.01) and found["kv_bytes"] == 327_680 * 32 * 2048
    assert found["adapters_on_card"] == 45 and found["step_seconds"] == pytest.approx(23e-3, rel=0.05) and found["cards"] == 3


# ---- others


def test_rows_by_a_gather_pass_and_a_batch_in_place_does_not():
    def gathered(x, weight, adapters, rows):
        y = x @ weight.T
        for i, name in enumerate(rows):
            if name is not None:
                A, B, s = adapters[name]
                y[i] = y[i] + s * B @ (A @ x[i])
        return y

    def in_place(x, weight, adapters, rows):
        y = gathered(x, weight, adapters, rows)
        x.zero_()
        return y

    accepted(check.route, gathered)
    refused(check.route, in_place, "changed in place")
    refused(check.route, lambda x, weight, adapters, rows: x @ weight.T)


def test_one_product_with_the_base_in_any_way_of_writing_it():
    def updated(y, x, adapters, rows):
        for i, name in enumerate(rows):
            if name is not None:
                A, B, s = adapters[name]
                y[i] += s * (B @ (A @ x[i]))
        return y

    ways = (
        torch.nn.functional.linear,
        lambda x, weight: (weight @ x.T).T.contiguous(),
        lambda x, weight: torch.einsum("ri,oi->ro", x, weight),
        lambda x, weight: x @ weight.clone().T,
        lambda x, weight: (x[:, None] * weight).sum(-1),
        lambda x, weight: torch.vmap(lambda row: weight @ row)(x),
    )
    for way in ways:
        accepted(check.route, lambda x, weight, adapters, rows, way=way: updated(way(x, weight), x, adapters, rows))

    def anew_for_every_row(x, weight, adapters, rows):
        return torch.stack([updated(x @ weight.T, x, adapters, rows)[i] for i in range(len(x))])

    refused(check.route, anew_for_every_row, "the base was multiplied row by row")


def test_the_adapters_that_were_given_stay_as_they_are():
    def with_none(x, weight, adapters, rows):
        adapters[None] = torch.zeros(1, x.shape[1]), torch.zeros(len(weight), 1), 0.0
        return x @ weight.T + torch.stack([s * (B @ (A @ row)) for row, (A, B, s) in zip(x, map(adapters.get, rows), strict=True)])

    def scaled(x, weight, adapters, rows):
        for A, _, s in adapters.values():
            A.mul_(s)
        return mixed_batch(x, weight, adapters, rows, scale=lambda s: 1.0)

    def trimmed(deltas, weights, density):
        deltas[:] = [ties_trim(delta, density) for delta in deltas]
        return ties(deltas, weights, 1.0)

    ties_trim = importlib.import_module("course.checks.multi_lora.ties").largest
    refused(check.route, with_none, "argument 3 was changed in place")
    refused(check.route, scaled, "argument 3 was changed in place")
    refused(check.ties, trimmed, "argument 1 was changed in place")


def test_how_many_entries_stay_is_rounded_down():
    def rounded(deltas, weights, density):
        n = deltas[0].numel()
        return ties(deltas, weights, (round(density * n) + 0.5) / n)

    refused(check.ties, rounded, "was rounded")


def test_factors_of_another_shape_are_told_their_shapes():
    words = r"A is \(8, 6\) and B \(6, 7\): of a layer \(8, 7\) A is \(rank, 7\) and B \(8, rank\)"
    refused(check.combine, lambda adapters, weights: weighted_sum(adapters, weights)[::-1], words)


def test_a_pool_takes_what_just_fits_and_changes_nothing_at_an_error():
    class Strict(pools.Pool):
        def acquire(self, name, size):
            if size >= self.capacity:
                raise ValueError(name)
            return super().acquire(name, size)

    class Late(pools.Pool):
        def acquire(self, name, size):
            gone = [each for each in self.candidates() if size > self.capacity]
            for each in gone:
                del self.sizes[each]
            return super().acquire(name, size)

    class Waits(pools.Pool):
        def acquire(self, name, size):
            return super().acquire(name, size) or None

    refused(check.pool, Strict, "an adapter as large as the pool fits")
    refused(check.pool, Late, "adapters were thrown out for one that is larger than the pool")
    refused(check.pool, Waits, r"\+a40 \+b60 -a -b \+a40; capacity 100\).*expected 'a: nobody went', got 'a: None, it waits'")


def test_a_sum_of_full_rank_is_no_adapter_of_these_ranks():
    def dense(adapters, weights):
        delta = sum(w * s * B @ A for (A, B, s), w in zip(adapters, weights, strict=True))
        return torch.eye(7), delta

    def halved(adapters, weights):
        A = torch.cat([A * w * s * 0.5 for (A, _, s), w in zip(adapters, weights, strict=True)])
        return A, torch.cat([2 * B for _, B, _ in adapters], 1)

    refused(check.combine, dense)
    accepted(check.combine, halved)
    refused(check.combine, lambda adapters, weights: (adapters[0][0], adapters[0][1]))
    refused(check.combine, lambda adapters, weights: adapters[0][0], "two tensors, A and B")


def test_a_pool_that_reports_in_tuples_passes_and_one_that_forgets_the_error_does_not():
    class Tuples(pools.Pool):
        def acquire(self, name, size):
            gone = super().acquire(name, size)
            return gone if gone is None else tuple(gone)

    class Accepts(pools.Pool):
        def acquire(self, name, size):
            return super().acquire(name, min(size, self.capacity))

    accepted(check.pool, Tuples)
    refused(check.pool, Accepts)


def test_a_pool_that_forgets_what_it_threw_out_is_told_so_and_not_its_key_error():
    class Forgets(pools.Pool):
        def acquire(self, name, size):
            gone = super().acquire(name, size)
            for each in gone or ():
                del self.users[each]
            return gone

        def release(self, name):
            if name not in self.users:
                raise KeyError(name)
            super().release(name)

    class InUse(Forgets):
        candidates = pools.in_use_too

    class Unpinned(Forgets):
        def pin(self, name):
            pass

    accepted(check.pool, Forgets)
    refused(check.pool, InUse, "an adapter in use was thrown out")
    refused(check.pool, Unpinned, "a hit is not pinned")


def test_a_total_of_zero_counts_as_plus():
    def lost(deltas, weights, density):
        return ties(deltas, weights, density, elect=lambda trimmed, w: trimmed.sum(0).sign())

    refused(check.ties, lost, "a total of 0 elected no sign")


def test_weight_and_scale_in_both_factors_are_told():
    def twice(adapters, weights):
        parts = [(w * s * A, w * s * B) for (A, B, s), w in zip(adapters, weights, strict=True)]
        return torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], 1)

    refused(check.combine, twice, "weight and scale are in A and in B")


def test_a_cache_so_large_that_no_adapter_fits_is_told_as_the_mistake_it_is():
    """Some seeds leave no room with all heads cached; an answer may then go below 0."""

    def all_heads(p):
        found = platforms.design(p, kv=lambda p: platforms.kv_of(p, p.shape.heads))
        room = p.card_bytes - p.base_bytes - found["kv_bytes"]
        return found | {"adapters_on_card": room // found["adapter_bytes"]}

    seeds = [seed for seed in range(30) if any(all_heads(p)["adapters_on_card"] < 0 for p in platforms.drawn(seed))]
    assert seeds
    for seed in seeds[:3]:
        with pytest.raises(NotYet, match="counted for all query heads"):
            check.platform._judge(all_heads, seed)


def test_a_platform_without_a_number_or_with_a_pair_is_told():
    def short(p):
        return {key: value for key, value in platforms.design(p).items() if key != "cards"}

    refused(check.platform, short, "missing: cards")
    refused(check.platform, lambda p: (1, 2), "return a dictionary")
    refused(check.platform, lambda p: platforms.design(p) | {"swap_seconds": 0.0})
