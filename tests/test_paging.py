"""Paged and offloaded AdamW: torch's numbers bit for bit, whatever the pages, and every bad input refused by name."""

import contextlib
import copy
import gc
import io
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference.paging import POLICIES, OffloadedAdamW, PagedAdamW
from reference.paging.layout import ALIGNMENT, Layout
from reference.paging.update import plain_update

SETTINGS = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
SHAPES = ((37, 50), (200,), (), (3, 5, 7), (64, 64), (1,), (0,))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def parameters(dtype=torch.float32, shapes=SHAPES, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes]


def set_gradients(*models, seed, missing=0.0):
    """The same random gradients in all; some parameters may have none."""
    g = torch.Generator().manual_seed(seed)
    for together in zip(*models, strict=True):
        grad = torch.randn(together[0].shape, generator=g).to(together[0].dtype)
        absent = torch.rand((), generator=g).item() < missing
        for p in together:
            p.grad = None if absent else grad.clone()


def paged(params, frames=3, page_bytes=2048, **more):
    return PagedAdamW(params, resident_bytes=frames * page_bytes, page_bytes=page_bytes, **SETTINGS | more)


def torchs(params, **more):
    return torch.optim.AdamW(params, foreach=False, fused=False, **SETTINGS | more)


def equal(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def equal_states(one, other):
    one, other = one.state_dict()["state"], other.state_dict()["state"]
    assert one.keys() == other.keys()
    return all(torch.equal(one[k][n], other[k][n]) for k in one for n in other[k])


def kinds(optimizer, step=None):
    found = [event.kind for event in optimizer.trace if step in (None, event.step)]
    return {kind: found.count(kind) for kind in ("hit", "in", "out")}


# the same numbers as torch's


@settings(max_examples=40)
@given(
    st.sampled_from(DTYPES), st.sampled_from(POLICIES), st.integers(1, 12), st.sampled_from((1024, 2048, 8192)), st.sampled_from((0, 0.3))
)
def test_twenty_steps_equal_torchs_bit_for_bit(dtype, policy, frames, page_bytes, missing):
    one, other = parameters(dtype), parameters(dtype)
    ours, theirs = paged(one, frames, page_bytes, policy=policy), torchs(other)
    for step in range(20):
        set_gradients(one, other, seed=step, missing=missing)
        ours.step()
        theirs.step()
    assert equal(one, other) and equal_states(ours, theirs)
    assert ours.pool.table and len(ours.pool.table) + len(ours.pool.free) <= frames


def test_groups_schedulers_and_late_parameters():
    one, other = parameters(), parameters()
    late_one, late_other = parameters(torch.bfloat16, seed=9), parameters(torch.bfloat16, seed=9)

    def groups(ps):
        return [{"params": ps[:3], "lr": 0.1, "weight_decay": 0.0}, {"params": ps[3:], "betas": (0.3, 0.5)}]

    optimizers = paged(groups(one)), torchs(groups(other))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 20) for o in optimizers]
    for step in range(20):
        if step == 7:
            for optimizer, late in zip(optimizers, (late_one, late_other), strict=True):
                optimizer.add_param_group({"params": late, "lr": 0.2, "initial_lr": 0.2})
            for schedule in schedules:
                schedule.base_lrs.append(0.2)
        set_gradients(one, other, seed=step)
        set_gradients(late_one, late_other, seed=100 + step)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert equal(one, other) and equal(late_one, late_other)
    assert equal_states(*optimizers)


def test_a_closure_is_called_with_gradients():
    p = nn.Parameter(torch.ones(3))
    optimizer = paged([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert optimizer.step(closure).item() < 3


def test_gradients_that_are_not_contiguous():
    one, other = parameters(shapes=((8, 5),)), parameters(shapes=((8, 5),))
    ours, theirs = paged(one), torchs(other)
    one[0].grad = torch.ones(1).expand(8, 5)
    other[0].grad = torch.ones(8, 5)
    ours.step()
    theirs.step()
    assert equal(one, other)


def test_an_order_of_operations_matters():
    """What the bit equality is worth: the formula as textbooks write it rounds otherwise."""
    p, g, m, v = (torch.rand(10_000) for _ in range(4))
    q, n = p.clone(), m.clone()
    from reference.paging.update import Numbers

    by = Numbers.of({**SETTINGS}, 3)
    plain_update(p, g, m, v.clone(), by)
    n = 0.8 * n + (1 - 0.8) * g
    assert not torch.equal(m, n) and torch.allclose(m, n)
    assert not torch.equal(p, q)


# pages


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.sampled_from((1024, 4096)), st.sampled_from(DTYPES))
def test_every_number_has_one_place(counts, page_bytes, dtype):
    layout = Layout(page_bytes, pinned=False)
    for count in counts:
        layout.add(torch.empty(count, dtype=dtype))
    taken = set()
    for index, page in enumerate(layout.pages):
        assert page.host.nbytes == page_bytes and page.pieces
        for number, start, offset, length in page.pieces:
            assert offset % ALIGNMENT == 0 and length > 0 and offset + length <= page.size
            places = {(index, place) for place in range(offset, offset + length)}
            assert not taken & places
            taken |= places
            assert start + length <= counts[number]
    for number, count in enumerate(counts):
        assert sum(piece.length for _, piece in layout.places[number]) == count
        values = torch.randn(count).to(dtype)
        layout.write(number, 1, values)
        assert torch.equal(layout.read(number, 1, (count,)), values)
        assert not layout.read(number, 0, (count,)).any()
    waste = sum(page.size for page in layout.pages) - sum(counts)
    assert waste < layout.pages[0].size + ALIGNMENT * len(counts) if layout.pages else True


def scan(policy, frames, steps=6, pages=8):
    p = nn.Parameter(torch.randn(pages * 128))  # 128 float32 numbers fill a page of 1024 bytes
    optimizer = PagedAdamW([p], resident_bytes=frames * 1024, page_bytes=1024, policy=policy)
    for _ in range(steps):
        p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("frames", [1, 2, 5, 7])
def test_lru_never_hits_on_a_cyclic_scan(frames):
    optimizer = scan("lru", frames)
    assert kinds(optimizer) == {"hit": 0, "in": 48, "out": 48 - frames}


@pytest.mark.parametrize("frames", [1, 2, 5, 7])
def test_alternating_hits_what_it_holds(frames):
    optimizer = scan("alternate", frames)
    for step in range(2, 7):
        assert kinds(optimizer, step) == {"hit": frames, "in": 8 - frames, "out": 8 - frames}


@pytest.mark.parametrize("frames", [2, 5, 7])
def test_mru_hits_about_as_often(frames):
    optimizer = scan("mru", frames, steps=15)
    hits = [kinds(optimizer, step)["hit"] for step in range(2, 16)]
    assert all(frames - 1 <= hit <= frames for hit in hits)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_stays(policy):
    optimizer = scan(policy, frames=9)
    assert kinds(optimizer) == {"hit": 40, "in": 8, "out": 0}


def test_only_changed_pages_are_written_back():
    optimizer = scan("lru", frames=2)
    optimizer.state_dict()
    before = kinds(optimizer)
    optimizer.state_dict()
    assert kinds(optimizer) == before
    assert before["out"] == before["in"]


def test_pages_without_a_gradient_stay_at_home():
    one, two = nn.Parameter(torch.randn(128)), nn.Parameter(torch.randn(128))
    optimizer = PagedAdamW([one, two], resident_bytes=2048, page_bytes=1024)
    one.grad = torch.ones(128)
    optimizer.step()
    assert {event.page for event in optimizer.trace} == {0}
    assert list(optimizer.state_dict()["state"]) == [0]


def test_the_trace_is_bounded():
    optimizer = scan("lru", frames=1, steps=1)
    assert optimizer.trace.maxlen


# state dicts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [(torchs, paged), (paged, torchs), (paged, paged)])
def test_states_go_to_and_from_torch(dtype, change):
    first, second = change
    one, other = parameters(dtype), parameters(dtype)
    optimizer, straight = first(one), torchs(other)
    for step in range(12):
        if step == 5:  # through a file
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            one = [nn.Parameter(p.detach().clone()) for p in one]
            optimizer = second(one)
            optimizer.load_state_dict(torch.load(file))
        set_gradients(one, other, seed=step, missing=0.2)
        optimizer.step()
        straight.step()
    assert equal(one, other) and equal_states(optimizer, straight)
    if second is paged:
        assert kinds(optimizer)["out"] > 0  # it still pages
        assert all(set(state) == {"step"} for state in optimizer.state.values())


def test_a_loaded_state_replaces_what_was_there():
    one = parameters()
    optimizer = paged(one)
    empty = optimizer.state_dict()
    set_gradients(one, seed=0)
    optimizer.step()
    optimizer.load_state_dict(empty)
    assert not optimizer.state_dict()["state"]
    other = parameters()
    with torch.no_grad():
        for p, q in zip(one, other, strict=True):
            p.copy_(q)
    theirs = torchs(other)
    set_gradients(one, other, seed=1)
    optimizer.step()
    theirs.step()
    assert equal(one, other)


def test_a_state_dict_is_a_copy():
    one = parameters()
    optimizer = paged(one)
    set_gradients(one, seed=0)
    optimizer.step()
    before = optimizer.state_dict()
    kept = copy.deepcopy(before)
    optimizer.step()
    for number, entry in kept["state"].items():
        assert torch.equal(before["state"][number]["exp_avg"], entry["exp_avg"])


def test_a_fused_checkpoint_is_counted_on_the_cpu():
    one, other = parameters(), parameters()
    theirs = torch.optim.AdamW(other, fused=True, **SETTINGS)
    set_gradients(one, other, seed=0)
    theirs.step()
    ours = paged(one)
    ours.load_state_dict(theirs.state_dict())
    assert all(state["step"].device.type == "cpu" for state in ours.state.values())
    assert not ours.param_groups[0]["fused"]


def test_states_that_do_not_fit_change_nothing():
    one = parameters()
    optimizer = paged(one)
    set_gradients(one, seed=0)
    optimizer.step()
    good = optimizer.state_dict()
    for damage, words in (
        (lambda s: s["state"][0].pop("exp_avg"), "must hold step, exp_avg, exp_avg_sq"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(3)), r"shape \(3,\), the parameter \(37, 50\)"),
        (lambda s: s["state"].update({0: {"state1": torch.zeros(1), "state2": torch.zeros(1), "step": 3}}), "state1, state2, step"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad must be False"),
        (lambda s: s["param_groups"].append({"params": []}), "different number of parameter groups"),
    ):
        bad = copy.deepcopy(good)
        damage(bad)
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(bad)
        now = optimizer.state_dict()
        assert all(torch.equal(now["state"][k][n], good["state"][k][n]) for k in good["state"] for n in good["state"][k])


# errors


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"resident_bytes": 2047, "page_bytes": 2048}, ValueError, "resident_bytes 2047 is below page_bytes 2048"),
        ({"page_bytes": 0}, ValueError, "page_bytes must be at least 1024, got 0"),
        ({"page_bytes": 3000}, ValueError, "power of two, such as 2048 or 4096, got 3000"),
        ({"page_bytes": 2048.0}, TypeError, "page_bytes must be an integer"),
        ({"resident_bytes": "1GB"}, TypeError, "resident_bytes must be an integer"),
        ({"policy": "fifo"}, ValueError, "policy must be one of alternate, mru, lru, got 'fifo'"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr must be a number"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        PagedAdamW(parameters(), **arguments)


@pytest.mark.parametrize("kind", [PagedAdamW, OffloadedAdamW])
@pytest.mark.parametrize(
    "bad, words",
    [
        (lambda: nn.Parameter(torch.zeros(3, device="meta")), "parameter 7 is on meta"),
        (lambda: nn.Parameter(torch.zeros(3, 4).T), "parameter 7 is not contiguous"),
        (lambda: nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False), "parameter 7 is torch.int32"),
        (lambda: nn.Parameter(torch.zeros(3, dtype=torch.complex64)), "parameter 7 is torch.complex64"),
    ],
)
def test_bad_parameters_are_named_and_leave_a_late_group_out(kind, bad, words):
    optimizer = kind(parameters())
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [bad()]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=words):
        kind([*parameters(), bad()])


@pytest.mark.parametrize("kind", [PagedAdamW, OffloadedAdamW])
@pytest.mark.parametrize(
    "gradient, words",
    [
        (lambda p: torch.zeros_like(p).to_sparse(), "gradient of parameter 4 is sparse"),
        (lambda p: torch.zeros_like(p, dtype=torch.float64), "torch.float64, the parameter torch.float32"),
    ],
)
def test_bad_gradients_change_nothing(kind, gradient, words):
    one = parameters()
    optimizer = kind(one)
    set_gradients(one, seed=0)
    one[4].grad_dtype = None
    one[4].grad = gradient(one[4])
    before = [p.detach().clone() for p in one]
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert equal(before, one) and not optimizer.state_dict()["state"]


@pytest.mark.parametrize("failing", range(1, 9))
@pytest.mark.parametrize("where", ["copy in", "copy out", "update"])
def test_an_error_in_mid_step_leaves_every_page_old_or_new(failing, where, monkeypatch):
    optimizer = scan("lru", frames=2, steps=3)
    (p,) = optimizer._parameters
    other = nn.Parameter(p.detach().clone())
    theirs = torch.optim.AdamW([other], foreach=False, fused=False)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p.grad = torch.randn_like(p)
    other.grad = p.grad.clone()
    old = optimizer.state_dict()["state"][0] | {"p": p.detach().clone()}
    theirs.step()
    new = theirs.state_dict()["state"][0] | {"p": other.detach()}
    calls = 0

    def fails(real):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise MemoryError("no more")
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        if where == "update":
            real = optimizer._updater
            patch.setattr(optimizer, "_updater", lambda *given: fails(real(*given)))
        else:
            lane = optimizer.pool.incoming if where == "copy in" else optimizer.pool.outgoing
            patch.setattr(lane, "copy", fails(lane.copy))
        with contextlib.suppress(MemoryError):
            optimizer.step()
    now = optimizer.state_dict()["state"][0] | {"p": p.detach()}
    states = []
    for page in range(8):
        here = slice(128 * page, 128 * (page + 1))
        same = [all(torch.equal(now[k][here], which[k][here]) for k in ("p", "exp_avg", "exp_avg_sq")) for which in (old, new)]
        assert any(same), f"page {page} is torn"
        states.append(same[1])
    assert states == sorted(states, reverse=True)
    frames = [*optimizer.pool.table.values(), *optimizer.pool.free]
    assert len(set(map(id, frames))) == len(frames) <= 2
    optimizer.step()  # and on it goes
    assert optimizer.state_dict()["state"][0]["exp_avg"].isfinite().all()


@pytest.mark.parametrize("kind", [PagedAdamW, OffloadedAdamW])
def test_a_group_may_be_empty_but_not_all(kind):
    p = nn.Parameter(torch.ones(3))
    optimizer = kind([{"params": []}, {"params": [p]}, {"params": []}])
    p.grad = torch.ones(3)
    optimizer.step()
    assert (p < 1).all()
    for nothing in ([], [{"params": []}]):
        with pytest.raises(ValueError, match=r"empty parameter list|no parameter"):
            kind(nothing)


def test_it_is_not_copied_or_pickled():
    with pytest.raises(TypeError, match="save its state_dict"):
        copy.deepcopy(paged(parameters()))


# the step on the CPU


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(37, 53), nn.Tanh(), nn.Linear(53, 11)).to(dtype)


def train(model, optimizer, steps=10, clip=None, passes=1):
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        for _ in range(passes):
            x = torch.randn(9, 37, generator=g).to(next(model.parameters()).dtype)
            model(x).square().sum().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


@pytest.mark.parametrize("bucket_bytes", [1, 4000, 1 << 26])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("clip", ["not", "outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_equals_torchs_fused_on_a_cpu(bucket_bytes, passes, clip, dtype):
    ours, theirs = network(dtype=dtype), network(dtype=dtype)
    settings_ = dict(lr=1e-2, weight_decay=0.1)
    mine = OffloadedAdamW(ours.parameters(), max_norm=0.1 if clip == "inside" else None, bucket_bytes=bucket_bytes, **settings_)
    one = train(ours, mine, clip=0.1 if clip == "outside" else None, passes=passes)
    theirs_ = torch.optim.AdamW(theirs.parameters(), fused=True, **settings_)
    other = train(theirs, theirs_, clip=None if clip == "not" else 0.1, passes=passes)
    if clip == "inside" and dtype is torch.bfloat16:
        assert all(torch.allclose(p, q, rtol=2e-2, atol=1e-2) for p, q in zip(one, other, strict=True))
    else:
        assert equal(one, other) and equal_states(mine, theirs_)


def test_gradients_are_copied_once_unless_they_change():
    model = network()
    optimizer = OffloadedAdamW(model.parameters())
    sent = []
    real = optimizer._send
    optimizer._send = lambda number, gradient: (sent.append(number), real(number, gradient))[1]
    model(torch.randn(2, 37)).sum().backward()
    gc.collect()
    optimizer.step()
    assert sorted(sent) == [0, 1, 2, 3]
    sent.clear()
    model(torch.randn(2, 37)).sum().backward()  # adds to what is there
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert sorted(sent) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_optimizers_that_are_gone_leave_nothing_behind():
    model = network()
    optimizer = OffloadedAdamW(model.parameters())
    train(model, optimizer, 2)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    parameter = weakref.ref(model[0].weight)
    optimizer = OffloadedAdamW(model.parameters())
    model(torch.randn(2, 37)).sum().backward()
    del optimizer, model
    gc.collect()
    assert parameter() is None


def test_a_skipped_step_leaves_no_stale_gradient():
    model, same = network(), network()
    ours, theirs = OffloadedAdamW(model.parameters()), torch.optim.AdamW(same.parameters(), fused=True)
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(3, 37)
        for each, optimizer in ((model, ours), (same, theirs)):
            optimizer.zero_grad()
            each(x).square().sum().backward()
    ours.step()
    theirs.step()
    assert equal(model.parameters(), same.parameters())


def test_values_that_others_change_are_seen():
    model, same = network(), network()
    ours, theirs = OffloadedAdamW(model.parameters()), torch.optim.AdamW(same.parameters(), fused=True)
    for _ in range(3):
        for each, optimizer in ((model, ours), (same, theirs)):
            each(torch.ones(3, 37)).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                each[0].weight.mul_(0.5)
            each[2].bias.data = torch.ones(11)
    assert equal(model.parameters(), same.parameters())


@pytest.mark.parametrize("change", [(PagedAdamW, OffloadedAdamW), (OffloadedAdamW, PagedAdamW), (OffloadedAdamW, OffloadedAdamW)])
def test_states_go_from_one_way_to_the_other(change):
    model, same = network(), network()
    first, straight = change[0](model.parameters(), lr=1e-2), torch.optim.AdamW(same.parameters(), lr=1e-2)
    train(model, first, 4)
    second = change[1](model.parameters(), lr=1e-2)
    second.load_state_dict(first.state_dict())
    train(same, straight, 4)
    for one, other in zip(train(model, second, 4), train(same, straight, 4), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("arguments, words", [({"bucket_bytes": 0}, "bucket_bytes must be at least 1"), ({"max_norm": -1.0}, "max_norm")])
def test_bad_arguments_of_the_offloaded_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        OffloadedAdamW(parameters(), **arguments)
