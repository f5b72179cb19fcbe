"""Head and loss in chunks: the same numbers as torch's, without the logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from course.lab.live import LiveBytes
from reference.llama.loss import IGNORED, linear_cross_entropy, next_tokens


def whole(hidden, weight, targets):
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED)


def case(rows, features=24, vocabulary=61, dtype=torch.float32, seed=0, ignored=0.3):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*rows, features, generator=random).to(dtype)
    weight = (0.4 * torch.randn(vocabulary, features, generator=random)).to(dtype)
    targets = torch.randint(vocabulary, rows, generator=random)
    targets[torch.rand(rows, generator=random) < ignored] = IGNORED
    targets.view(-1)[0] = 3  # at least one counts
    return hidden, weight, targets


def gradients(loss, hidden, weight, targets, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight, targets, **options)
    (2.5 * value).backward()  # not by chance the right answer for a gradient of one
    return value.detach(), hidden.grad, weight.grad


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 23), st.integers(1, 80), st.integers(0, 999))
def test_value_and_gradients_are_those_of_torch(rows, length, chunk, seed):
    ours = gradients(linear_cross_entropy, *case((rows, length), seed=seed), chunk=chunk)
    theirs = gradients(whole, *case((rows, length), seed=seed))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)  # a probability of nearly one, less one, keeps its last places only


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_its_rounding(dtype):
    inputs = case((4, 40), dtype=dtype)
    ours, theirs = gradients(linear_cross_entropy, *inputs, chunk=32), gradients(whole, *inputs)
    exact = gradients(whole, *(t.double() if t.is_floating_point() else t for t in inputs))
    assert ours[0].dtype == torch.float32 and ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6)
    for mine, other, right in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert mine.dtype == dtype
        assert (mine - right).norm() <= 1.2 * (other - right).norm() + 1e-4 * right.norm()


def test_small_float16_gradients_do_not_vanish():
    """A loss over many rows divides by many: torch's own float16 gradient of the logits loses what is below 6e-8."""
    hidden, weight, targets = case((4, 512), vocabulary=4000, dtype=torch.float16, ignored=0)
    _, ours, _ = gradients(linear_cross_entropy, hidden, weight / 8, targets)
    _, exact, _ = gradients(whole, hidden.double(), weight.double() / 8, targets)
    assert (ours - exact).norm() < 0.01 * exact.norm()


def test_gradient_where_it_is_asked_for():
    hidden, weight, targets = case((2, 9))
    linear_cross_entropy(hidden.requires_grad_(), weight, targets).backward()
    assert hidden.grad is not None and weight.grad is None
    hidden = hidden.detach()
    linear_cross_entropy(hidden, weight.requires_grad_(), targets).backward()
    assert weight.grad is not None and hidden.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_the_logits_never_exist_whole():
    rows, features, vocabulary, chunk = 512, 16, 1000, 32
    hidden, weight, targets = case((rows,), features, vocabulary)
    hidden.requires_grad_()
    with LiveBytes() as live:
        linear_cross_entropy(hidden, weight, targets, chunk).backward()
    small = 3 * hidden.nbytes + 40 * rows
    assert live.peak <= 3 * 4 * chunk * vocabulary + small  # logits, what logsumexp makes of them, their cast
    with LiveBytes() as plain:
        whole(hidden, weight, targets).backward()
    assert plain.peak > 2 * 4 * rows * vocabulary  # the test can tell
    with LiveBytes() as live, torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, chunk)
    assert live.peak <= 2 * 4 * chunk * vocabulary + 40 * rows


def test_nothing_counted_is_nan_as_in_torch():
    hidden, weight, targets = case((2, 3))
    targets[:] = IGNORED
    assert whole(hidden, weight, targets).isnan() and linear_cross_entropy(hidden, weight, targets).isnan()


def test_next_tokens():
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORED]]


def test_errors_say_what_does_not_fit():
    hidden, weight, targets = case((2, 3))
    with pytest.raises(ValueError, match=r"targets \(2, 2\)"):
        linear_cross_entropy(hidden, weight, targets[:, :2])
    with pytest.raises(ValueError, match=r"weight \(61, 23\)"):
        linear_cross_entropy(hidden, weight[:, 1:], targets)
    with pytest.raises(TypeError, match="bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), targets)
    with pytest.raises(TypeError, match="int32"):
        linear_cross_entropy(hidden, weight, targets.int())
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(hidden, weight, targets, 0)
