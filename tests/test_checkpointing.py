"""`reference.checkpointing` against a plain forward and torch.utils.checkpoint: bit for bit, and what each of them keeps."""

import copy
import functools
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_helpers import tiny_llama
from torch import nn
from torch.utils import checkpoint as torchs

from course.lab.live import LiveBytes, SavedForBackward
from reference import checkpointing
from reference.checkpointing import checkpoint, checkpoint_binomial, checkpoint_by_hooks, checkpoint_sequential

both = pytest.mark.parametrize("how", [checkpoint, checkpoint_by_hooks])


def block(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.3), nn.Linear(2 * width, width))


def model(blocks: int = 4, width: int = 16) -> nn.Module:
    return nn.Sequential(*[block(width) for _ in range(blocks)], nn.Linear(width, 3))


def one_by_one(how):
    def forward(layers, x):
        for layer in layers[:-1]:
            x = how(layer, x)
        return layers[-1](x)

    return forward


def step(layers: nn.Module, forward, x: torch.Tensor, seed: int = 1) -> tuple[list, torch.Tensor]:
    """Output, gradients of all parameters and of x, and the random number drawn after it."""
    layers.zero_grad()
    x = x.detach().requires_grad_(x.requires_grad)
    torch.manual_seed(seed)
    y = forward(layers, x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layers.parameters())], torch.rand(())


def same(one, other) -> bool:
    pairs = [*zip(one[0], other[0], strict=True), (one[1], other[1])]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


@both
@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_those_without_it_and_torchs_bit_for_bit(how, needs_gradient, autocast):
    layers, x = model(), torch.randn(5, 16, requires_grad=needs_gradient)

    def cast(forward):
        def run(layers, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return forward(layers, x)

        return run

    plain = step(layers, cast(lambda layers, x: layers(x)), x)
    assert all(g is not None for g in plain[0][2:])
    assert same(step(layers, cast(one_by_one(how)), x), plain)
    assert same(step(layers, cast(one_by_one(functools.partial(torchs.checkpoint, use_reentrant=False))), x), plain)


@pytest.mark.parametrize("how", [checkpoint, checkpoint_by_hooks])
def test_without_the_generators_state_dropout_is_another_one(how):
    layers, x = model(), torch.randn(5, 16)
    plain = step(layers, lambda layers, x: layers(x), x)
    assert not same(step(layers, one_by_one(functools.partial(how, preserve_rng_state=False)), x), plain)


@both
def test_what_is_kept_is_the_input(how):
    layers, x = block(), torch.randn(5, 16, requires_grad=True) * 1
    with SavedForBackward(layers) as saved:
        y = how(layers, x)
    assert [t.data_ptr() for t in saved.tensors if t.numel() > 1] == [x.data_ptr()]
    y.sum().backward()


@both
def test_frozen_inputs_train_the_block(how):
    """torch's re-entrant variant leaves all gradients None here, with a warning."""
    layers, head, x = block(), nn.Linear(16, 2), torch.randn(3, 16)
    head(how(layers, x)).sum().backward()
    assert all(p.grad is not None for p in layers.parameters())
    other = copy.deepcopy(layers)
    other.zero_grad()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        head(torchs.checkpoint(other, x, use_reentrant=True)).sum().backward()
    assert all(p.grad is None for p in other.parameters())


def weighted(x, pair, *, scale, name, table):
    assert name == "a" and table["flag"] is True
    return {"y": x * pair[0] * scale, "list": [pair[1] + x.sum(), 7], "none": None}


@both
def test_arguments_and_results_may_be_anything(how):
    x, a, b = (torch.randn(4, requires_grad=True) for _ in range(3))
    weights = torch.randn(4)

    def loss(out):
        assert out["list"][1] == 7 and out["none"] is None
        return (out["y"] * weights).sum() + out["list"][0].prod()

    given_ = {"scale": 3.0, "name": "a", "table": {"flag": True, "t": b}}
    plain = torch.autograd.grad(loss(weighted(x, (a, b), **given_)), (x, a, b))
    again = torch.autograd.grad(loss(how(weighted, x, (a, b), **given_)), (x, a, b))
    assert all(torch.equal(p, q) for p, q in zip(plain, again, strict=True))


@both
def test_only_some_results_are_used_and_some_inputs_are_integers(how):
    table = nn.Embedding(7, 4)
    ids = torch.tensor([1, 2, 2])

    def two(ids, x):
        return table(ids) * x, x.detach() * 2, ids + 1

    x = torch.randn(3, 4, requires_grad=True)
    first, second, third = how(two, ids, x)
    assert torch.equal(third, ids + 1) and torch.equal(second, x * 2)
    first.sum().backward()
    assert torch.equal(x.grad, table(ids)) and table.weight.grad[2].equal(x[1] + x[2])


@both
def test_nested_and_under_no_grad(how):
    layers, x = model(6), torch.randn(5, 16)
    plain = step(layers, lambda layers, x: layers(x), x)

    def nested(layers, x):
        def inner(x):
            for layer in layers[1:3]:
                x = how(layer, x)
            return layers[3](x)

        x = how(inner, layers[0](x))
        return layers[6](layers[5](layers[4](x)))

    assert same(step(layers, nested, x), plain)
    with torch.no_grad():
        assert not how(layers[0], x).requires_grad
    frozen = block().requires_grad_(False)
    assert not how(frozen, x).requires_grad


@both
def test_shared_weights_accumulate_and_retained_graphs_run_twice(how):
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)

    def gradient(wrap, times):
        layer.zero_grad()
        loss = wrap(layer, wrap(layer, x)).square().sum()
        for i in range(times):
            loss.backward(retain_graph=i + 1 < times)
        return layer.weight.grad.clone()

    for times in (1, 2):
        assert torch.equal(gradient(how, times), gradient(lambda f, x: f(x), times))


@both
def test_autograd_grad_and_inputs_work(how):
    """Neither does with torch's re-entrant variant."""
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    (found,) = torch.autograd.grad(how(layer, x).sum(), layer.weight)
    assert torch.equal(found, x.detach().sum(0).expand(4, 4))
    how(layer, x).sum().backward(inputs=[layer.weight])
    assert x.grad is None and layer.bias.grad is None and layer.weight.grad is not None


class Holder:
    def __init__(self):
        self.layer = nn.Linear(4, 4)

    def __call__(self, x):
        return self.layer(x)


GLOBAL = nn.Linear(4, 4)


def uses_a_global(x):
    return GLOBAL(x)


def test_captured_modules_are_found():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    for function, of in (
        (lambda x: layer(x), layer),
        (functools.partial(lambda table, x: table["a"][0](x), {"a": [layer]}), layer),
        (layer.forward, layer),
        (uses_a_global, GLOBAL),
        (lambda x, layer=layer: layer(x), layer),
    ):
        of.zero_grad()
        y = checkpoint(function, x)
        assert y.grad_fn.name() == "_CheckpointBackward"  # not run plainly, as where nothing is to be trained
        y.sum().backward()
        assert of.weight.grad is not None


def test_what_is_out_of_sight_is_refused_in_words_or_computed_plainly():
    holder, x = Holder(), torch.randn(2, 4)
    checkpoint(holder, x).sum().backward()  # nothing seen to train: it ran as it is, not checkpointed
    assert holder.layer.weight.grad is not None
    with pytest.raises(RuntimeError, match=r"trains a tensor of shape \(4, 4\) that checkpoint cannot see"):
        checkpoint(holder, x.requires_grad_()).sum().backward()
    middle = holder.layer(x)
    with pytest.raises(ValueError, match=r"captures a tensor of shape \(2, 4\) that is computed from trained ones"):
        checkpoint(lambda x: x * middle, x)
    checkpoint_by_hooks(lambda x: x * middle, x).sum().backward()  # the ordinary graph knows it


def test_changes_in_place_are_noticed():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    y = checkpoint(layer, x)
    with torch.no_grad():
        layer.weight += 1
    with pytest.raises(RuntimeError, match="a parameter was changed in place"):
        y.sum().backward()
    for how in (checkpoint, checkpoint_by_hooks):
        middle = x * 1
        y = how(layer, middle)
        middle.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_second_derivative_needs_the_hooks():
    x = torch.randn(3, requires_grad=True)
    (first,) = torch.autograd.grad(checkpoint_by_hooks(torch.sin, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.allclose(second, -torch.sin(x))
    with pytest.raises(RuntimeError, match="no second derivative: use checkpoint_by_hooks"):
        torch.autograd.grad(checkpoint(torch.sin, x).sum(), x, create_graph=True)


def test_gradcheck():
    layer, x = block(3).double().eval(), torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: checkpoint(layer, x), (x,))
    assert torch.autograd.gradcheck(lambda x: checkpoint_by_hooks(layer, x), (x,))


class Changing(nn.Module):
    """Not the same twice: another factor, shape or depth the second time."""

    def __init__(self, what):
        super().__init__()
        self.what, self.runs = what, 0

    def forward(self, x):
        self.runs += 1
        again = self.runs > 1
        if self.what == "value":
            return (x * (3.0 if again else 1.0)).sin()
        if self.what == "shape":
            return torch.sin(x[:1] if again else x).sum()
        return torch.sin(x) if again else torch.sin(torch.sin(x))


def test_what_the_comparison_of_two_runs_sees():
    for what, words in (("shape", "was .* in the forward and is"), ("number", "2 tensors were kept in the forward, 1 when")):
        with pytest.raises(RuntimeError, match=words):
            checkpoint_by_hooks(Changing(what), torch.randn(3, requires_grad=True)).sum().backward()
        with pytest.raises(torchs.CheckpointError):
            torchs.checkpoint(Changing(what), torch.randn(3, requires_grad=True), use_reentrant=False).sum().backward()
    x = torch.randn(3, requires_grad=True)
    checkpoint_by_hooks(Changing("value"), x).sum().backward()  # silently another gradient, in torch too
    wrong = x.grad.clone()
    x.grad = None
    torchs.checkpoint(Changing("value"), x, use_reentrant=False).sum().backward()
    assert torch.allclose(wrong, x.grad) and not torch.allclose(wrong, x.cos())
    with pytest.raises(RuntimeError, match="must do the same twice"):
        checkpoint_by_hooks(Changing("value"), x, check_values=True).sum().backward()


def test_what_torch_does_not_see():
    """Early stop hides tensors that would be too many, and the re-entrant variant compares nothing."""

    def deeper_each_time():
        depths = itertools.count(1)
        return lambda x: functools.reduce(lambda y, _: torch.sin(y), range(next(depths)), x)

    x = torch.randn(3, requires_grad=True)
    torchs.checkpoint(deeper_each_time(), x, use_reentrant=False).sum().backward()
    with torchs.set_checkpoint_early_stop(False):
        y = torchs.checkpoint(deeper_each_time(), x, use_reentrant=False)
    with pytest.raises(torchs.CheckpointError):
        y.sum().backward()
    for what in ("number", "value"):
        torchs.checkpoint(Changing(what), x, use_reentrant=True).sum().backward()


def test_torchs_default_is_re_entrant_with_a_warning():
    layers, head, x = block(), nn.Linear(16, 2), torch.randn(3, 16)
    with pytest.warns(UserWarning) as caught:
        head(torchs.checkpoint(layers, x)).sum().backward()
    said = " ".join(str(each.message) for each in caught)
    assert "the use_reentrant parameter should be passed explicitly" in said and "None of the inputs have requires_grad=True" in said
    assert all(p.grad is None for p in layers.parameters())


def test_the_default_of_transformers_is_not_re_entrant():
    llama = tiny_llama()
    llama.gradient_checkpointing_enable()
    how = [m._gradient_checkpointing_func for m in llama.modules() if getattr(m, "gradient_checkpointing", False)]
    assert how and all(each.keywords == {"use_reentrant": False} for each in how)


def test_the_number_of_results_is_compared():
    runs = []

    def more_each_time(x):
        runs.append(0)
        return [x * 2] * len(runs)

    (y,) = checkpoint(more_each_time, torch.randn(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="1 results in the forward, 2 computed again"):
        y.sum().backward()


def test_the_hooks_stop_early():
    """The second run ends once the last kept tensor is there: here before the last product."""
    calls = []

    class Noted(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            calls.append(self.out_features)
            return y

    for how, expected in ((checkpoint, [8, 4, 8, 4]), (checkpoint_by_hooks, [8, 4, 8])):
        calls.clear()
        layers = nn.Sequential(Noted(4, 8), nn.ReLU(), Noted(8, 4))
        how(layers, torch.randn(2, 4, requires_grad=True)).sum().backward()
        assert calls == expected


# ---- segments


@given(st.integers(1, 200), st.floats(0, 100))
def test_segments_are_all_layers_and_the_best_number_is_the_best(layers, ratio):
    for segments in {1, layers, max(1, layers // 3)}:
        sizes = checkpointing.segment_sizes(layers, segments)
        assert sum(sizes) == layers and len(sizes) == segments and max(sizes) - min(sizes) <= 1
    best = checkpointing.optimal_segments(layers, ratio)
    costs = [checkpointing.activation_cost(layers, k, ratio) for k in range(1, layers + 1)]
    assert costs[best - 1] == min(costs) and best == costs.index(min(costs)) + 1


def test_root_n_holds_where_a_layer_keeps_its_input_alone():
    for n in (16, 64, 100, 400):
        assert checkpointing.optimal_segments(n) == math.isqrt(n)
        assert checkpointing.activation_cost(n, math.isqrt(n)) == 2 * math.isqrt(n)
    assert checkpointing.optimal_segments(32, 17) == 32  # one layer each
    assert checkpointing.activation_cost(32, 32, 17) == 49


@pytest.mark.parametrize("segments", [1, 2, 3, 5])
@both
def test_segments_change_nothing(how, segments):
    layers, x = model(4), torch.randn(5, 16)
    plain = step(layers, lambda layers, x: layers(x), x)
    assert same(step(layers, lambda layers, x: checkpoint_sequential(layers, x, segments, how), x), plain)
    torchs_way = functools.partial(torchs.checkpoint_sequential, use_reentrant=False)
    assert same(step(layers, lambda layers, x: torchs_way(layers, segments, x), x), plain)


def test_memory_follows_the_formula():
    """Every byte of 16 layers whose insides are five times as large as their inputs."""
    width, rows, n = 32, 64, 16

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)).square())  # keeps x, tanh twice as wide, its square: 5 inputs

    layers, x = nn.Sequential(*[Layer() for _ in range(n)]), torch.randn(rows, width)
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)  # there before, so that they are not counted
    one = 4 * rows * width
    for segments in (1, 2, 4, 8, 16):
        with LiveBytes() as live:
            checkpoint_sequential(layers, x, segments).sum().backward()
        expected = one * checkpointing.activation_cost(n, segments, 5)
        assert live.peak == pytest.approx(expected, abs=6 * one + 8 * width * width * 4), segments


@pytest.mark.parametrize("bad, error", [(0, ValueError), (5, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_numbers_of_segments_are_refused(bad, error):
    with pytest.raises(error, match="segments must be"):
        checkpoint_sequential(nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]), torch.randn(1, 2), bad)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="layers must be at least 1"):
        checkpoint_sequential([], torch.randn(1, 2), 1)
    with pytest.raises(ValueError, match="ratio must be finite"):
        checkpointing.optimal_segments(4, math.nan)
    with pytest.raises(ValueError, match="slots must be at least 1"):
        checkpoint_binomial([nn.Linear(2, 2)], torch.randn(1, 2), 0)
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint_binomial([], torch.randn(1, 2), 1)


# ---- the binomial schedule


@functools.cache
def by_recursion(layers: int, slots: int) -> int:
    if layers == 1:
        return 0
    if slots == 1:
        return layers * (layers - 1) // 2
    return min(i + by_recursion(i, slots) + by_recursion(layers - i, slots - 1) for i in range(1, layers))


def test_the_closed_form_solves_the_recursion():
    for layers in range(1, 60):
        for slots in range(1, 8):
            assert checkpointing.extra_runs(layers, slots) == by_recursion(layers, slots), (layers, slots)


@pytest.mark.parametrize("layers, slots, runs", [(10, 3, 25), (32, 5, 100), (100, 3, 590), (7, 1, 28), (5, 9, 9)])
@both
def test_layers_run_as_often_as_revolve_says(how, layers, slots, runs):
    """The totals of checkpoint_schedules.Revolve: t + N."""
    count = 0

    class Counted(nn.Linear):
        def forward(self, x):
            nonlocal count
            count += 1
            return super().forward(x)

    chain = nn.Sequential(*[Counted(2, 2) for _ in range(layers)])
    with LiveBytes() as live:
        checkpoint_binomial(chain, torch.randn(500, 2), slots, how).sum().backward()
    assert count == runs == checkpointing.extra_runs(layers, slots) + layers
    if how is checkpoint_by_hooks:  # inputs of 4 kB, what one layer needs, and 5 kB of generator state for each region
        assert live.peak < 4000 * (min(slots, layers) + 5) + 5100 * slots + 100 * layers


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
@both
def test_the_schedule_changes_nothing(how, slots):
    layers, x = model(5), torch.randn(5, 16)
    plain = step(layers, lambda layers, x: layers(x), x)
    assert same(step(layers, lambda layers, x: checkpoint_binomial(layers, x, slots, how), x), plain)


# ---- on a GPU


@pytest.mark.gpu
@both
@pytest.mark.parametrize("autocast", [False, True])
def test_on_a_gpu_dropout_and_gradients_are_the_same_bit_for_bit(how, autocast):
    layers, x = model(4, 256).cuda(), torch.randn(64, 256, device="cuda")

    def cast(forward):
        def run(layers, x):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                return forward(layers, x)

        return run

    def drawn(layers, forward):
        torch.cuda.manual_seed(2)
        found, number = step(layers, cast(forward), x)
        return [*found, torch.rand(3, device="cuda")], number

    plain = drawn(layers, lambda layers, x: layers(x))
    assert same(drawn(layers, lambda layers, x: layers(x)), plain), "the model itself is not the same twice"
    assert same(drawn(layers, one_by_one(how)), plain)
    assert same(drawn(layers, one_by_one(functools.partial(torchs.checkpoint, use_reentrant=False))), plain)
    assert same(drawn(layers, lambda layers, x: checkpoint_sequential(layers, x, 3, how)), plain)
    assert same(drawn(layers, lambda layers, x: checkpoint_binomial(layers, x, 2, how)), plain)
