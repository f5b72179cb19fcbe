"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused. And the judges' arithmetic is the reference's."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from course.checking import NotYet, mistaken
from course.checks import gradient_checkpointing as check
from course.checks.gradient_checkpointing.function import checkpoint as worked
from course.checks.gradient_checkpointing.runs import least_runs
from course.checks.gradient_checkpointing.scaling import scaled_step
from course.checks.gradient_checkpointing.segments import best_segments
from course.checks.gradient_checkpointing.silent import silent_parameters
from course.checks.gradient_checkpointing.stochastic import by_spacing, stochastic_round
from reference import checkpointing, precision


def refused(judge, answer, seeds=range(3)) -> list[str]:
    found = []
    for seed in seeds:
        with pytest.raises(NotYet) as caught:
            judge._judge(answer, seed)
        found.append(str(caught.value))
    return found


def test_the_judges_arithmetic_is_the_references():
    for layers, ratio in ((16, 1), (32, 17), (77, 5)):
        k, count = best_segments(layers, 100, 100 * ratio)
        assert k == checkpointing.optimal_segments(layers, ratio)
        assert count == 100 * checkpointing.activation_cost(layers, k, ratio)
    assert all(least_runs(n, j) == checkpointing.extra_runs(n, j) + n for n in range(1, 30) for j in range(1, 6))
    x = torch.randn(2000) * torch.exp2(torch.randint(-100, 100, (2000,)).float())
    noise = torch.randint(0, 65_536, (2000,), dtype=torch.int32)
    for other in (by_spacing(x, noise), precision.stochastic_round(x, noise=noise)):
        assert torch.equal(stochastic_round(x, noise), other)


# ---- right, in other dress


def segments_with_numpy(layers, input_bytes, layer_bytes):
    k = np.arange(1, layers + 1)
    cost = k * input_bytes + np.ceil(layers / k) * layer_bytes
    return np.argmin(cost) + 1, cost.min()


def segments_as_a_list(layers, input_bytes, layer_bytes):
    return [*best_segments(layers, input_bytes, layer_bytes)]


def by_saved_tensor_hooks(block, x):
    return checkpointing.checkpoint_by_hooks(block, x)


def by_torchs(block, x):
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)


def with_setup_context(block, x):
    """The newer form of a function, and backward() with gradients taken off the copies."""
    trained = [p for p in block.parameters() if p.requires_grad]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(x, state, *parameters):
            return block(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.state = inputs[1]

        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            now = torch.get_rng_state()
            torch.set_rng_state(ctx.state)
            with torch.enable_grad():
                found = torch.autograd.grad(block(x), [x, *trained], grad, allow_unused=True)
            torch.set_rng_state(now)
            return found[0], None, *found[1:]

    return Function.apply(x, torch.get_rng_state(), *trained)


def runs_bottom_up(layers, slots):
    table = [[n * (n + 1) // 2 for n in range(layers + 1)]]
    for _ in range(1, slots):
        row = [0, 1]
        for n in range(2, layers + 1):
            row.append(min(i + row[i] + table[-1][n - i] for i in range(1, n)))
        table.append(row)
    return table[-1][layers]


def scaling_with_sums(grads, scale, good_steps, interval):
    if not math.isfinite(sum(float((g * 0).sum()) for g in grads)):
        return None, scale * 0.5, 0
    good_steps = (good_steps + 1) % interval
    doubled = torch.tensor(scale * 2.0)
    grown = scale if good_steps or not doubled.isfinite() else doubled.item()
    return [g.mul(1 / scale) for g in grads], grown, good_steps


def rounding_with_numpy(x, noise):
    bits = x.numpy().view(np.uint32)
    low = bits & np.uint32(0xFFFF)
    rounded = (bits - low) + (noise.numpy().astype(np.uint32) < low).astype(np.uint32) * np.uint32(0x10000)
    rounded = np.where(np.isfinite(x.numpy()), rounded.view(np.float32), x.numpy())
    return torch.from_numpy(rounded).bfloat16()


def rounding_in_int64(x, noise):
    bits = x.view(torch.int32).long() & 0xFFFFFFFF
    up = (noise < bits % 65_536) & x.isfinite()
    upper = torch.where(x.isnan(), 0x7FC0, bits // 65_536 + up)
    return upper.int().short().view(torch.bfloat16)


def silent_with_zero_grad(model, compute_loss):
    saved = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        compute_loss().backward()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    names = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for p, grad in zip(model.parameters(), saved, strict=True):
        p.grad = grad
    return names


@pytest.mark.parametrize(
    "judge, answer",
    [
        (check.segments, segments_with_numpy),
        (check.segments, segments_as_a_list),
        (check.checkpoint, by_saved_tensor_hooks),
        (check.checkpoint, by_torchs),
        (check.checkpoint, with_setup_context),
        (check.silent, silent_with_zero_grad),
        (check.runs, runs_bottom_up),
        (check.scaling, scaling_with_sums),
        (check.stochastic, rounding_with_numpy),
        (check.stochastic, rounding_in_int64),
    ],
)
def test_right_answers_in_other_dress_pass_every_time(judge, answer):
    for seed in range(4):
        judge._judge(answer, seed)


# ---- wrong, in ways that nobody listed


def keeps_all_in_a_closure(block, x):
    """Looks like a checkpoint, and holds the first run's graph."""
    with torch.enable_grad():
        inside = x.detach().requires_grad_()
        y = block(inside)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *parameters):
            return y.detach()

        @staticmethod
        def backward(ctx, grad):
            return torch.autograd.grad(y, [inside, *(p for p in block.parameters() if p.requires_grad)], grad, retain_graph=True)

    return Function.apply(x, *(p for p in block.parameters() if p.requires_grad))


def in_evaluation_mode(block, x):
    block.eval()
    y = worked(block, x)
    block.train()
    return y


def silent_without_care(model, compute_loss):
    compute_loss().backward()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def thaws(block, x):
    block.requires_grad_()
    return worked(block, x)


@pytest.mark.parametrize(
    "judge, answer, words",
    [
        (check.segments, lambda n, b, a: (math.isqrt(n) or 1, 0), "√N segments|segments for|bytes for"),
        (check.segments, lambda n, b, a: best_segments(n, b, a)[0], "return the number of segments and the bytes"),
        (check.segments, lambda n, b, a: best_segments(n, b, a)[::-1], "segments for"),
        (check.segments, lambda n, b, a: best_segments(64, b, a), "segments for"),
        (check.checkpoint, keeps_all_in_a_closure, "kept for the backward: expected 'the input'"),
        (check.checkpoint, in_evaluation_mode, "the output"),
        (check.checkpoint, thaws, "a frozen parameter has a gradient"),
        (check.checkpoint, lambda block, x: worked(block, x.detach()), "the gradient of x|x has no gradient"),
        (check.checkpoint, lambda block, x: block(x).detach(), "."),
        (check.silent, lambda model, loss: [], "without a gradient"),
        (check.silent, lambda model, loss: [n for n, p in model.named_parameters() if "blocks" in n], "without a gradient|frozen"),
        (check.silent, lambda model, loss: set(silent_parameters(model, loss)), "expected"),
        (check.silent, silent_without_care, "every .grad afterwards: expected 'as before', got 'what your code left there'"),
        (check.runs, lambda n, j: least_runs(n, j) + (n > 30), "runs of"),
        (check.runs, lambda n, j: 2 * n, "runs of 1 layer with 1 place: expected 1, got 2"),
        (check.runs, lambda n, j: str(least_runs(n, j)), "expected a number"),
        (check.scaling, lambda g, s, n, i: (None, s / 2, 0), "gradients after a good step"),
        (check.scaling, lambda g, s, n, i: scaled_step(g, s, n, i)[:2], "return the unscaled gradients"),
        (check.scaling, mistaken(scaled_step, good=lambda grads: not any(x.isnan().any() for x in grads)), "an infinity went through"),
        (check.scaling, lambda g, s, n, i: scaled_step(g, max(s, 1.0), n, i), "a scale below one"),
        (check.scaling, lambda g, s, n, i: ([x.div_(s) for x in g], *scaled_step(g, s, n, i)[1:]), "changed in place"),
        (check.stochastic, lambda x, noise: x.bfloat16(), "rounding to nearest|positive"),
        (check.stochastic, lambda x, noise: stochastic_round(x, noise.flip(0)), "positive"),
        (check.stochastic, lambda x, noise: stochastic_round(x.abs(), noise), "negative"),
        (check.stochastic, lambda x, noise: stochastic_round(x.nan_to_num(), noise), "infinities"),
        (check.stochastic, mistaken(stochastic_round, rounds=lambda x: ~x.isinf()), "a NaN whose low bits are set"),
    ],
)
def test_sly_answers_are_refused(judge, answer, words):
    import re

    for message in refused(judge, answer):
        assert re.search(words, message), message


def test_old_gradients_are_the_learners_to_keep():
    """A parameter's .grad is the same tensor afterwards, not only an equal one."""
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    before = layer.weight.grad
    assert silent_parameters(layer, lambda: layer(torch.ones(1, 2)).sum()) == []
    assert layer.weight.grad is before and layer.bias.grad is None


def test_partial_functions_are_answers_too():
    check.runs(functools.partial(least_runs))
