"""The simulated server: closed forms where there are some, the same requests in both ways of serving, errors."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.multi_lora.simulation import Costs, Load, arrivals, expected_hits, quantile, simulate


@pytest.mark.parametrize("busy", [0.3, 0.7])
def test_one_tenant_and_one_row_is_the_queue_m_d_1(busy):
    service = 0.5
    found = simulate(Load(1, busy / service, new=1), Costs(service), rows=1, requests=60_000)
    waits = [request.times[0] - request.arrived - service for request in found.requests]
    expected = busy * service / (2 * (1 - busy))
    assert statistics.fmean(waits) == pytest.approx(expected, rel=0.05)
    assert found.busy == pytest.approx(busy, rel=0.02) and found.loads == 1


def test_a_lone_request_takes_what_its_steps_take():
    load = Load(3, 1e-6, prompt=10, new=5, adapter_bytes=400)
    costs = Costs(base=1.0, row=0.1, adapter=0.01, token=0.001, bus=100.0, merge=7.0)
    one = simulate(load, costs, rows=8, pool_bytes=400, requests=1).requests[0]
    first = 4.0 + 1.11 + 0.01  # the copy, the step, the prompt
    assert one.times[0] - one.arrived == pytest.approx(first)
    assert one.times[-1] - one.times[0] == pytest.approx(4 * 1.11)
    one = simulate(load, costs, rows=8, requests=1, how="merged").requests[0]
    assert one.times[0] - one.arrived == pytest.approx(7.0 + 1.1 + 0.01)
    assert one.times[-1] - one.times[0] == pytest.approx(4 * 1.1)


def test_a_full_batch_shares_the_base():
    """All there at once: rows of them take base + rows · row for each token, whoever they are."""
    costs, load = Costs(1.0, row=0.05, adapter=0.25), Load(64, 1e9, zipf=0, new=3)
    found = simulate(load, costs, rows=16, requests=320)
    steps = 320 / 16 * 3
    rows = 1.0 + 16 * 0.05
    assert found.seconds == pytest.approx(steps * (rows + 0.25 * found.distinct), rel=0.02)
    assert found.between_tokens(1.0) <= rows + 16 * 0.25 + 1e-9
    merged = simulate(load, Costs(1.0, row=0.05, merge=2.0), rows=16, requests=320, how="merged")
    assert 64 <= merged.loads <= 66 and merged.distinct == 1
    assert merged.seconds == pytest.approx(merged.loads * (2.0 + 3 * (1.0 + 5 * 0.05)), rel=0.02)


def test_hits_of_equal_tenants_are_the_places_they_have():
    load = Load(1000, 1.0, zipf=0.0, adapter_bytes=10)
    for places in (100, 500):
        found = simulate(load, Costs(1e-6), rows=4, pool_bytes=10 * places, requests=20_000)
        assert found.hit_rate == pytest.approx(places / 1000, abs=0.025)
    everybody = simulate(load, Costs(1e-6), rows=4, pool_bytes=10_000, requests=20_000)
    assert everybody.loads == len({request.tenant for request in everybody.requests})


def test_hits_under_zipf_are_ches_approximation():
    """LRU keeps what was asked for within the last T requests, where T is such that so many are kept (Che et al. 2002)."""
    for zipf, places in ((1.0, 200), (1.0, 800), (0.5, 200), (1.5, 50)):
        found = simulate(Load(2000, 1.0, zipf, adapter_bytes=1), Costs(1e-6), rows=1, pool_bytes=places, requests=20_000, warm=True)
        assert found.hit_rate == pytest.approx(expected_hits(2000, zipf, places), abs=0.015)
    assert expected_hits(1000, 0.0, 100) == pytest.approx(0.1) and expected_hits(10, 1.0, 10) == 1


def test_a_warm_start_has_those_who_ask_most():
    load, costs = Load(50, 2.0, zipf=2.0, adapter_bytes=4), Costs(0.1, bus=1.0)
    cold, warm = (simulate(load, costs, 4, 20, 400, warm=warm) for warm in (False, True))
    assert cold.loads - warm.loads in range(1, 6) and warm.first_token(0.5) <= cold.first_token(0.5)
    everybody = simulate(load, costs, 4, 200, 400, warm=True)
    assert everybody.loads == 0


def test_shares_follow_zipf():
    found = arrivals(Load(50, 2.0, zipf=1.5), 40_000, seed=3)
    counts = [sum(request.tenant == k for request in found) for k in range(4)]
    for k in range(1, 4):
        assert counts[0] / counts[k] == pytest.approx((k + 1) ** 1.5, rel=0.12)
    assert found[-1].arrived == pytest.approx(40_000 / 2.0, rel=0.02)


@given(
    st.integers(1, 30), st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), st.floats(0.1, 50), st.sampled_from(["unmerged", "merged"])
)
@settings(max_examples=60, deadline=None)
def test_everybody_is_served_in_order_and_in_full(tenants, places, rows, new, rate, how):
    load = Load(tenants, rate, new=new, prompt=2, adapter_bytes=8)
    costs = Costs(0.1, 0.01, 0.02, 0.001, bus=50.0, merge=0.3)
    found = simulate(load, costs, rows, 8 * places, 60, how)
    assert len(found.requests) == 60 and all(len(request.times) == new for request in found.requests)
    for request in found.requests:
        assert request.times == sorted(request.times) and request.times[0] >= request.arrived + costs.base
    of_one = {}
    for request in sorted(found.requests, key=lambda r: r.arrived):
        assert of_one.get(request.tenant, 0.0) <= request.times[0]
        of_one[request.tenant] = request.times[0]
    assert 0 < found.busy <= 1 + 1e-9 and found.loads >= len({r.tenant for r in found.requests})
    assert 0 < found.distinct <= (1 if how == "merged" else min(rows, places, tenants))


def test_quantiles_and_bad_input():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and quantile([1.0, 2.0], 0.99) == 2.0 and quantile([5.0], 0.0) == 5.0
    with pytest.raises(ValueError, match="share"):
        quantile([1.0], 1.5)
    with pytest.raises(ValueError, match="at least one number"):
        quantile([], 0.5)
    load = Load(2, 1.0, adapter_bytes=10)
    with pytest.raises(ValueError, match="pool_bytes must hold an adapter of 10 bytes, got 9"):
        simulate(load, Costs(1.0), 1, 9)
    with pytest.raises(ValueError, match="how must be 'unmerged' or 'merged'"):
        simulate(load, Costs(1.0), 1, 10, how="both")
    with pytest.raises(ValueError, match="rate must be above 0"):
        Load(1, 0.0)
    with pytest.raises(ValueError, match="a step must take time"):
        Costs(0.0)
    with pytest.raises(ValueError, match="bus must be above 0"):
        Costs(1.0, bus=0.0)
    with pytest.raises((TypeError, ValueError), match="tenants"):
        Load(0, 1.0)
