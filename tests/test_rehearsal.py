"""The buffer is uniform, fractions are met, projections do what they say; distillation, DER++, interpolation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

from reference.lora import LoRALinear
from reference.rehearsal import ReplayBuffer, dark_experience, distillation, interpolate, mix_batches, project_gradient


def filled(capacity, count, seed=0, parts=1):
    buffer = ReplayBuffer(capacity, seed)
    for part in torch.arange(count).view(-1, 1).chunk(parts):
        buffer.add(part)
    return buffer


# the buffer


def test_each_row_is_kept_equally_often():
    """Chi-squared over 4,000 buffers; keeping the newest, the oldest, or replacing always would be found at once."""
    kept = torch.zeros(30)
    for seed in range(4000):
        kept[torch.cat(filled(6, 30, seed).rows)] += 1
    assert kept.sum() == 6 * 4000
    assert stats.chisquare(kept.numpy()).pvalue > 1e-3


def test_pairs_are_kept_equally_often_too():
    together = torch.zeros(8, 8)
    for seed in range(4000):
        rows = torch.cat(filled(3, 8, seed).rows)
        together[rows[:, None], rows] += 1
    pairs = together[torch.triu(torch.ones(8, 8), 1) == 1]
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-3


@settings(max_examples=40, deadline=None)
@given(capacity=st.integers(1, 12), count=st.integers(1, 40), parts=st.integers(1, 5), seed=st.integers(0, 50))
def test_it_holds_no_row_twice_and_never_too_many(capacity, count, parts, seed):
    buffer = filled(capacity, count, seed, parts)
    rows = torch.cat(buffer.rows).tolist()
    assert len(buffer) == len(rows) == len(set(rows)) == min(capacity, count)
    assert buffer.seen == count
    assert rows == torch.cat(filled(capacity, count, seed).rows).tolist()  # however the stream was cut


def test_what_is_kept_is_a_copy():
    stream, buffer = torch.zeros(3, 2), ReplayBuffer(3)
    buffer.add(stream)
    stream += 1
    assert buffer.sample(3).sum() == 0


def test_samples_are_uniform_and_without_repeats():
    buffer, drawn = filled(5, 5), torch.zeros(5)
    for _ in range(2000):
        rows = buffer.sample(2).flatten()
        assert rows[0] != rows[1]
        drawn[rows] += 1
    assert stats.chisquare(drawn.numpy()).pvalue > 1e-3
    assert buffer.sample(12).shape == (12, 1) and buffer.sample(0).shape == (0, 1)


@pytest.mark.parametrize(
    "make, kind, words",
    [
        (lambda: ReplayBuffer(0), ValueError, "capacity must be at least 1, got 0"),
        (lambda: ReplayBuffer(2.5), TypeError, "capacity must be an integer"),
        (lambda: ReplayBuffer(3, "a"), TypeError, "seed must be an integer"),
        (lambda: ReplayBuffer(3).sample(1), ValueError, "the buffer is empty"),
        (lambda: filled(3, 3).sample(-1), ValueError, "count must be at least 0"),
        (lambda: filled(3, 3).add(torch.zeros(2, 4)), ValueError, r"rows are \(4,\) of torch.float32, the buffer's \(1,\)"),
    ],
)
def test_a_buffer_says_what_is_wrong(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


# mixing


@settings(max_examples=60, deadline=None)
@given(fraction=st.floats(0, 1), rows=st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_the_fraction_is_met_after_every_batch(fraction, rows):
    new = [torch.zeros(count, 2) for count in rows]
    mixed = list(mix_batches(new, lambda count: torch.ones(count, 2), fraction))
    assert [len(batch) for batch in mixed] == rows
    total = old = 0
    for batch in mixed:
        total, old = total + len(batch), old + batch[:, 0].sum().item()
        assert abs(old - fraction * total) <= 0.5 + 1e-9


def test_ten_percent_of_eight_is_four_rows_in_five_batches():
    mixed = mix_batches([torch.zeros(8, 1)] * 5, lambda count: torch.ones(count, 1), 0.1)
    assert [int(batch.sum()) for batch in mixed] == [1, 1, 0, 1, 1]


def test_mixing_leaves_batches_alone_and_checks_shapes():
    new = torch.zeros(4, 3)
    (mixed,) = mix_batches([new], lambda count: torch.ones(count, 3), 0.5)
    assert mixed[:, 0].tolist() == [0, 0, 1, 1] and new.sum() == 0
    (whole,) = mix_batches([new], filled(2, 2).sample, 0.0)
    assert whole is new
    with pytest.raises(ValueError, match=r"old rows have the shape \(1,\), new ones \(3,\)"):
        list(mix_batches([new], filled(2, 2).sample, 0.5))
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="fraction must be"):
            mix_batches([new], filled(2, 2).sample, fraction)
    with pytest.raises(TypeError, match="fraction must be a number"):
        mix_batches([new], filled(2, 2).sample, "10 %")


# gradients


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), parts=st.integers(1, 4))
def test_what_is_projected_does_not_hurt_the_old_rows(seed, parts):
    g = torch.Generator().manual_seed(seed)
    new, old = ([torch.randn(3, 2, generator=g, dtype=torch.float64) for _ in range(parts)] for _ in range(2))
    found = project_gradient(new, old)
    flat, f_new, f_old = (torch.cat([t.flatten() for t in ts]) for ts in (found, new, old))
    assert flat @ f_old >= -1e-9
    if f_new @ f_old >= 0:
        assert torch.equal(flat, f_new)
    else:
        torch.testing.assert_close(flat, f_new - (f_new @ f_old) / (f_old @ f_old) * f_old)
        assert flat.norm() <= f_new.norm() + 1e-12


def test_projection_is_over_all_parameters_at_once():
    """One parameter agrees with the old gradient and one is against it: the sum decides."""
    new, old = [torch.tensor([3.0]), torch.tensor([-1.0])], [torch.tensor([1.0]), torch.tensor([1.0])]
    assert project_gradient(new, old)[1].item() == -1.0


def test_projection_of_odd_input():
    zero = [torch.zeros(2)]
    assert project_gradient([torch.ones(2)], zero)[0].tolist() == [1, 1]
    for new, old in (([], []), ([torch.ones(2)], [torch.ones(3)]), ([torch.ones(2)], [])):
        with pytest.raises(ValueError, match="new and old must have the same shapes"):
            project_gradient(new, old)


# logits


def test_distillation_is_zero_at_the_teacher_and_cross_entropy_less_entropy_at_one():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, 7, generator=g) for _ in range(2))
    assert distillation(teacher, teacher, 3.0).abs() < 1e-6
    p = teacher.softmax(-1)
    kl = (p * (p.log() - student.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(distillation(student, teacher, 1.0), kl)


def test_the_temperatures_square_keeps_the_gradient():
    """High T: T² · KL tends to the mean squared difference of centred logits over 2 · classes, whatever T is."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    d = student - teacher
    limit = ((d - d.mean(-1, keepdim=True)) ** 2).sum(-1).mean() / (2 * 7)
    assert distillation(student, teacher, 500.0).item() == pytest.approx(limit.item(), rel=1e-2)


def test_the_teacher_gets_no_gradient():
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    distillation(student, teacher).backward()
    assert student.grad.any() and teacher.grad is None


def test_dark_experience_is_its_formula():
    g = torch.Generator().manual_seed(0)
    logits, stored, again = (torch.randn(4, 6, generator=g) for _ in range(3))
    labels = torch.randint(6, (4,), generator=g)
    wanted = 0.3 * ((logits - stored) ** 2).mean() + 0.7 * F.cross_entropy(again, labels)
    torch.testing.assert_close(dark_experience(logits, stored, again, labels, 0.3, 0.7), wanted)


def test_logits_that_do_not_fit():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"teacher has the shape \(2, 4\), the logits \(2, 3\)"):
        distillation(a, b)
    for temperature in (0, -1.0):
        with pytest.raises(ValueError, match="temperature must be"):
            distillation(a, a, temperature)
    with pytest.raises(ValueError, match="stored has the shape"):
        dark_experience(a, b, a, torch.zeros(2).long(), 1, 1)
    with pytest.raises(ValueError, match="labels have the shape"):
        dark_experience(a, a, a, torch.zeros(3).long(), 1, 1)
    with pytest.raises(ValueError, match="alpha must be at least 0"):
        dark_experience(a, a, a, torch.zeros(2).long(), -1, 1)


# weights


def test_half_the_way_back_of_lora_is_half_its_scale():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(5, 4).double(), 2, 6)
    nn.init.normal_(layer.lora_B)
    before = {"weight": layer.base.weight.detach()}
    after = {"weight": before["weight"] + layer.delta_weight().detach()}
    layer.scaling *= 0.3
    mixed = interpolate(before, after, 0.3)["weight"]
    torch.testing.assert_close(mixed, before["weight"] + layer.delta_weight().detach())


def test_the_ends_are_exact_and_counts_are_taken_over():
    before = {"w": torch.randn(50), "steps": torch.tensor(1)}
    after = {"w": torch.randn(50), "steps": torch.tensor(9)}
    assert torch.equal(interpolate(before, after, 0.0)["w"], before["w"])
    assert torch.equal(interpolate(before, after, 1.0)["w"], after["w"])
    assert interpolate(before, after, 0.5)["steps"] == 9


def test_states_of_two_models():
    a = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match="'v' is in one of them only"):
        interpolate(a, a | {"v": torch.zeros(2)}, 0.5)
    with pytest.raises(ValueError, match=r"'w' has the shape \(2,\) before and \(3,\) after"):
        interpolate(a, {"w": torch.zeros(3)}, 0.5)
    with pytest.raises(ValueError, match="share must be from 0 to 1"):
        interpolate(a, a, 1.5)
