"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course.checking import NotYet, mistaken
from course.checks import lora as check
from course.checks.lora.forward import LoRALinear as PlainLoRA
from course.checks.lora.inject import ToyModel
from course.checks.lora.merge import Mergeable
from course.checks.lora.repair import adapt
from reference.lora import LoRALinear, inject_lora

made = partial(mistaken, PlainLoRA)
merging = partial(mistaken, Mergeable)


def seeded(layer, factor):
    factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(0)))


def kept_of(like, layer, p=None):
    """A mask of the shape of ``like`` that keeps 1 − p of it, scaled up; all ones where nothing is dropped."""
    p = layer.p if p is None else p
    return (torch.rand_like(like) >= p) / (1 - p) if layer.training and layer.p else torch.ones_like(like)


def merges_in_forward(layer, x):
    layer.base.weight.data += layer.scale() * layer.lora_B.data @ layer.lora_A.data
    return layer.base(x)


def factors_as_modules(base, r, alpha, dropout=0.0):
    layer = made()(base, r, alpha, dropout)
    del layer.lora_A, layer.lora_B
    layer.lora_A, layer.lora_B = nn.Linear(base.in_features, r, bias=False), nn.Linear(r, base.out_features, bias=False)
    return layer


def factors_as_tensors(base, r, alpha, dropout=0.0):
    layer = made()(base, r, alpha, dropout)
    a, b = layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()
    del layer.lora_A, layer.lora_B
    layer.lora_A, layer.lora_B = a, b
    return layer


SLY_LAYERS = {
    "A so small that nothing can grow": (made(start_A=lambda s, A: nn.init.normal_(A, std=1e-12)), "got 'far smaller'"),
    "A far too large": (made(start_A=lambda s, A: nn.init.uniform_(A, 0, 3)), "starts far too large"),
    "no adapter in other dtypes": (made(path=lambda s, x: PlainLoRA.path(s, x) * (x.dtype is torch.float32)), "bfloat16 base"),
    "no scale in float64": (made(scale=lambda s: 1.0 if s.lora_A.dtype is torch.float64 else s.lora_alpha / s.r), "float64 base"),
    "whole rows dropped": (made(drop=lambda s, x: x * kept_of(x[..., :1], s)), "whole rows are dropped"),
    "one mask for all rows": (made(drop=lambda s, x: x * kept_of(x[0], s)), "dropout draws once for all rows"),
    "one mask for a weight": (
        made(path=lambda s, x: F.linear(F.linear(x, F.dropout(s.lora_A, s.p, s.training)), s.lora_B), drop=lambda s, x: x),
        "dropout draws once for all rows",
    ),
    "between A and B too": (
        made(path=lambda s, x: F.linear(s.drop(F.linear(x, s.lora_A)), s.lora_B)),
        "in multiples of the right one: expected '0 or 1.33', got 'none .three to eight different updates.'",
    ),
    "on the base path too, drawn anew": (
        made(forward=lambda s, x: F.linear(s.drop(x), s.base.weight, s.base.bias) + s.update(x)),
        "on the base path too, with a draw of its own",
    ),
    "p kept, not dropped": (
        made(drop=lambda s, x: x * kept_of(x, s, 1 - s.p) * s.p / (1 - s.p) if s.training and s.p else x),
        "most rows get an update",
    ),
    "every layer starts with the same A": (made(start_A=seeded), "two layers start alike"),
    "no gradient passes": (made(path=lambda s, x: F.linear(F.linear(x, s.lora_A.data), s.lora_B.data)), "gradient"),
    "no gradient reaches A": (made(path=lambda s, x: F.linear(F.linear(x, s.lora_A.data), s.lora_B)), "gradient of lora_A"),
    "no gradient reaches the input": (made(path=lambda s, x: F.linear(F.linear(x.detach(), s.lora_A), s.lora_B)), "gradient of the input"),
    "merged at every call": (made(forward=merges_in_forward), "gradient of lora_A"),
    "factors as modules": (factors_as_modules, "expected 'Parameter', got 'Linear'"),
    "factors that no optimizer sees": (factors_as_tensors, "expected 'Parameter', got 'Tensor'"),
    "adapter only in training": (made(path=lambda s, x: PlainLoRA.path(s, x) * s.training), "in eval mode"),
    "dropout without rescaling": (made(drop=lambda s, x: x * (torch.rand_like(x) > s.p) if s.training else x), "in training"),
    "a no-op": (made(path=lambda s, x: 0 * PlainLoRA.path(s, x)), "values differ"),
    "a no-op without graph": (made(forward=lambda s, x: s.base(x)), "values differ"),
}


@pytest.mark.parametrize("name", SLY_LAYERS)
def test_sly_layers_are_refused(name):
    answer, words = SLY_LAYERS[name]
    with pytest.raises(NotYet, match=words):
        check.forward(answer)


def test_both_factors_zero_is_refused_in_its_own_words():
    with pytest.raises(NotYet, match=r"both zero: .* can never learn"):
        check.forward(made(start_A=lambda s, A: nn.init.zeros_(A)))


@pytest.mark.parametrize(
    "right",
    [
        made(start_A=lambda s, A: nn.init.normal_(A, std=1 / s.r)),
        made(start_A=lambda s, A: nn.init.normal_(A, std=0.02)),
        made(start_A=lambda s, A: nn.init.xavier_uniform_(A)),
        LoRALinear,
    ],
)
def test_other_right_layers_pass(right):
    for _ in range(3):
        check.forward(right)


def test_a_layer_that_needs_a_bias_is_told_so():
    answer = made(forward=lambda s, x: s.base(x) + s.update(x) + 0 * s.base.bias)
    for seed in range(3):
        with pytest.raises(NotYet, match=r"fails where the base has no bias"):
            check.forward._judge(answer, seed)


def stays_float32(layer, weight):
    layer.base.weight = nn.Parameter(weight, requires_grad=False)


def becomes_trainable(layer, weight):
    Mergeable.write(layer, weight)
    layer.base.requires_grad_(True)


def freezes_the_factors(layer):
    Mergeable.merge(layer)
    layer.requires_grad_(False)


def frees_the_base(layer):
    Mergeable.unmerge(layer)
    layer.base.requires_grad_(True)


def first_backup(layer):
    return layer.__dict__.setdefault("first", Mergeable.backup(layer))


def onto_first_backup(layer):
    return first_backup(layer).float() + layer.delta()


class SubtractsLikePEFT(LoRALinear):
    """Right in float32 up to rounding, not bit for bit."""

    def unmerge(self):
        self.unmerged_weight = self.base.weight - self.delta_weight().detach() if self.merged else None
        super().unmerge()


def test_the_reference_merges_as_asked():
    check.merge(LoRALinear)


@pytest.mark.parametrize(
    "answer, words",
    [
        (merging(write=stays_float32), "dtype"),
        (merging(write=becomes_trainable), "what trains while merged"),
        (merging(backup=lambda s: nn.Parameter(Mergeable.backup(s))), "what trains while merged.*original"),
        (merging(merge=freezes_the_factors), "what trains after unmerge"),
        (merging(unmerge=frees_the_base), "what trains after unmerge.*base.bias, base.weight"),
        (merging(backup=first_backup), "that of the first merge"),
        (merging(total=onto_first_backup), "other base weights after merging"),
        (merging(merge=lambda s: None), "after merge"),
        (merging(unmerge=lambda s: None), "after unmerge"),
        (SubtractsLikePEFT, "subtracts the update"),
    ],
)
def test_sly_merges_are_refused(answer, words):
    with pytest.raises(NotYet, match=words):
        check.merge(answer)


@pytest.mark.parametrize(
    "answer",
    [
        lambda shapes, r, targets: 0,
        lambda shapes, r, targets: sum(r * sum(shape) for name, shape in shapes.items() if name.rsplit(".", 2)[-1] in targets),
        lambda shapes, r, targets: check.parameter_count.reference(shapes, 8, targets),
        lambda shapes, r, targets: str(check.parameter_count.reference(shapes, r, targets)),
    ],
)
def test_sly_counts_are_refused(answer):
    with pytest.raises(NotYet):
        check.parameter_count(answer)


def wraps_everything_twice(model, targets, r, alpha):
    names = inject_lora(model, r, alpha, targets)
    for name in names:
        layer = model.get_submodule(name)
        layer.base = LoRALinear(layer.base, r, alpha)
    return names


def returns_names_only(model, targets, r, alpha):
    return inject_lora(ToyModel(), r, alpha, targets)


@pytest.mark.parametrize("answer", [wraps_everything_twice, returns_names_only])
def test_sly_injections_are_refused(answer):
    with pytest.raises(NotYet, match="wrapped"):
        check.inject(answer)


def in_eval_mode(model, targets, r, lora_alpha):
    names = inject_lora(model, r, lora_alpha, targets)
    model.eval()
    return names


def half_in_eval_mode(model, targets, r, lora_alpha):
    names = inject_lora(model, r, lora_alpha, targets)
    model.get_submodule(names[0]).eval()
    return names


def head_by_its_full_name(model, targets, r, lora_alpha):
    if targets == "all-linear":
        targets = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]
    return inject_lora(model, r, lora_alpha, targets)


@pytest.mark.parametrize(
    "answer, words",
    [
        (in_eval_mode, "the model was put into eval mode"),
        (half_in_eval_mode, "the model is in: expected 'training mode', got 'eval mode and training mode'"),
        (head_by_its_full_name, "inside another model it is called 'decoder.lm_head'"),
    ],
)
def test_injections_that_pass_on_one_plain_model_are_refused(answer, words):
    for seed in range(3):
        with pytest.raises(NotYet, match=words):
            check.inject._judge(answer, seed)


def full_fine_tuning(model, x, y, steps, lr):
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model


def random_factors_and_no_training(model, x, y, steps, lr):
    inject_lora(model, 2, 6)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return model


def too_slow_and_frozen_after(model, x, y, steps, lr):
    return at_another_rank(model, x, y, steps, lr / 1000).requires_grad_(False)


def trained_aside(model, x, y, steps, lr):
    trained = copy.deepcopy(model)
    inject_lora(trained, 2, 6)
    optimizer = torch.optim.AdamW([{"params": [p]} for name, p in trained.named_parameters() if ".lora_" in name], lr=lr)
    for _ in range(steps):
        (trained(x) - y).square().mean().backward()
        optimizer.step()
        trained.zero_grad()
    return trained


@pytest.mark.parametrize(
    "kind, rate, more, work",
    [
        (torch.optim.SGD, 5, 3, "120, 3, 6 steps of SGD, lr 0.25"),
        (torch.optim.Adam, 1, 1, "40, 1, 2 steps of Adam, lr 0.05"),
        (torch.optim.AdamW, 1, 0.5, "20, 0, 1 steps of AdamW, lr 0.05"),
        (torch.optim.AdamW, 2, 1, "40, 1, 2 steps of AdamW, lr 0.1"),
    ],
)
def test_another_optimizer_another_rate_and_other_steps_are_refused(kind, rate, more, work):
    def answer(model, x, y, steps, lr):
        inject_lora(model, 2, 6)
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate * lr)
        for _ in range(int(more * steps)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        return model

    with pytest.raises(NotYet, match=f"the optimizer takes: expected '40, 1, 2 steps of AdamW, lr 0.05', got '{work}'"):
        check.repair(answer)


def test_a_model_that_was_trained_as_a_copy_passes():
    for seed in range(3):
        check.repair._judge(trained_aside, seed)


def from_zero_A(model):
    """The other start from the pretrained model, as embeddings have it."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.zeros_(p) if "lora_A" in name else nn.init.normal_(p, std=0.5)


def test_either_factor_may_be_the_zero_one():
    for seed in range(3):
        check.repair._judge(mistaken(adapt, prepare=from_zero_A), seed)


def and_the_loss(*arguments):
    return adapt(*arguments), 0.1


SLY_RUNS = [
    (lambda *arguments: print(end=str(adapt(*arguments))[:0]), "your function returns None: it must return the model"),
    (and_the_loss, "what your function returns: expected 'the model', got 'a tuple'"),
    (full_fine_tuning, "no adapter"),
    (random_factors_and_no_training, "got .lora_A never moved"),
    (too_slow_and_frozen_after, "got 'the factors moved, but the error did not halve'"),
]


@pytest.mark.parametrize("answer, words", SLY_RUNS)
def test_sly_runs_are_refused(answer, words):
    with pytest.raises(NotYet, match=words):
        check.repair(answer)


def by_full_training(model, x, y, steps, lr):
    trained = copy.deepcopy(model)
    optimizer = torch.optim.Adam(trained.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(trained(x), y).backward()
        optimizer.step()
    inject_lora(trained, 2, 6)
    with torch.no_grad():
        trained[2].lora_B.fill_(1e-6)
    return trained


def at_another_rank(model, x, y, steps, lr):
    inject_lora(model, 4, 12)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    "judge, answer, words",
    [
        (check.inject, lambda model, targets, r, lora_alpha: inject_lora(model, r, 9.5, target_modules=targets), "the update"),
        (check.inject, lambda model, targets, r, lora_alpha: inject_lora(model, 1, lora_alpha, target_modules=targets), "ranks"),
        (check.repair, by_full_training, "base weights"),
        (check.repair, at_another_rank, "the adapters"),
    ],
)
def test_what_the_task_names_is_looked_at(judge, answer, words):
    for seed in range(3):
        with pytest.raises(NotYet, match=words):
            judge._judge(answer, seed)
