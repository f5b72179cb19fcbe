"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused. And the worked answers against the modules."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from course.checking import NotYet, mistaken
from course.checks import qlora as check
from course.checks.qlora.bytes_of_base import a_model, quantized_bytes
from course.checks.qlora.frozen import frozen_bytes
from course.checks.qlora.merges import three_merges
from course.checks.qlora.product import by_the_reference, decode, nf4_product
from course.checks.qlora.rule import two_percent_rule
from course.checks.qlora.shared import BITS
from course.lab.evaluation import compare_losses
from course.lab.live import module_bytes
from reference.lora import LoRALinear
from reference.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4
from reference.qlora import NF4Linear, merge_errors, quantize_linears


def refused(judge, answer, words):
    with pytest.raises(NotYet, match=words):
        judge(answer)


# ---- the product


def test_the_block_size_is_an_argument():
    for seed in range(3):
        with pytest.raises(NotYet):
            check.product._judge(lambda *given: by_the_reference(*given[:5], 64), seed)


def function_of(forward, backward):
    return type("Answer", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}).apply


def forward(ctx, x, packed, absmax, bias, shape, block_size):
    ctx.save_for_backward(packed, absmax)
    ctx.layout = shape, block_size
    return F.linear(x, decode(packed, absmax, shape, block_size, x.dtype), bias)


def backward(ctx, grad):
    grad_x = torch.einsum("...o,oi->...i", grad, decode(*ctx.saved_tensors, *ctx.layout, grad.dtype))
    return grad_x, None, None, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None, None, None


def as_attribute(ctx, x, packed, absmax, bias, shape, block_size):
    ctx.weight = decode(packed, absmax, shape, block_size, x.dtype)
    return F.linear(x, ctx.weight, bias)


def from_attribute(ctx, grad):
    return grad @ ctx.weight, None, None, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None, None, None


def keeps_the_input(ctx, x, *rest):
    ctx.x = x
    return forward(ctx, x, *rest)


def two_axes_only(ctx, grad):
    return backward(ctx, grad)[0], None, None, grad.sum((0, 1)) if grad.ndim == 3 and ctx.needs_input_grad[3] else None, None, None


def checkpointed(x, packed, absmax, bias, shape, block_size):
    """Right gradients, by doing the product a second time, which needs the input."""

    def run(x, bias):
        return F.linear(x, decode(packed, absmax, shape, block_size, x.dtype), bias)

    return torch.utils.checkpoint.checkpoint(run, x, bias, use_reentrant=False)


def backward_with(gradient_of_x, gradient_of_bias=lambda flat: flat.sum(0)):
    """A backward from the flat gradient, (rows, out), and Ŵ."""

    def backward(ctx, grad):
        flat, weight = grad.reshape(-1, grad.shape[-1]), decode(*ctx.saved_tensors, *ctx.layout, grad.dtype)
        grad_bias = gradient_of_bias(flat) if ctx.needs_input_grad[3] else None
        return gradient_of_x(flat, weight).reshape(*grad.shape[:-1], -1), None, None, grad_bias, None, None

    return backward


ROW_BY_ROW = backward_with(lambda flat, weight: torch.stack([row @ weight for row in flat]), sum)
IN_COLUMNS = backward_with(lambda flat, weight: F.linear(flat, weight.T.contiguous()))
WITHOUT_PRODUCTS = backward_with(lambda flat, weight: (flat[..., None] * weight).sum(-2))
BIAS_BY_A_PRODUCT = backward_with(torch.matmul, lambda flat: torch.ones(len(flat), dtype=flat.dtype) @ flat)
IN_NUMPY = backward_with(lambda flat, weight: torch.from_numpy(flat.float().numpy() @ weight.float().numpy()).to(flat.dtype))


@pytest.mark.parametrize(
    "answer",
    [function_of(forward, back) for back in (backward, ROW_BY_ROW, IN_COLUMNS, WITHOUT_PRODUCTS, BIAS_BY_A_PRODUCT, IN_NUMPY)],
)
def test_other_right_products_pass(answer):
    for seed in range(5):
        check.product._judge(answer, seed)


def in_dtype(dtype_of):
    """A backward that decodes to another dtype than the gradient's."""

    def backward(ctx, grad):
        grad_x = grad @ decode(*ctx.saved_tensors, *ctx.layout, dtype_of(grad.dtype)).to(grad.dtype)
        return grad_x, None, None, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None, None, None

    return backward


def in_float32_only(ctx, grad):
    grad_x = grad @ decode(*ctx.saved_tensors, *ctx.layout, torch.float32)
    return grad_x, None, None, grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None, None, None


def with_views(ctx, grad):
    grad_bias = grad.view(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
    return backward(ctx, grad)[0], None, None, grad_bias, None, None


def views_the_input(ctx, x, packed, absmax, bias, shape, block_size):
    y = forward(ctx, x.view(-1, x.shape[-1]), packed, absmax, bias, shape, block_size)
    return y.view(*x.shape[:-1], -1)


def with_every_gradient(ctx, grad):
    return backward(ctx, grad)[0], None, None, grad.reshape(-1, grad.shape[-1]).sum(0), None, None


def keeps_a_short_copy(ctx, x, *rest):
    ctx.weight = decode(*rest[:2], *rest[3:], torch.bfloat16)
    return forward(ctx, x, *rest)


def keeps_the_output(ctx, *arguments):
    ctx.y = forward(ctx, *arguments)
    return ctx.y


@pytest.mark.parametrize(
    "answer, words",
    [
        (function_of(as_attribute, from_attribute), "a dense copy of the weight is kept"),
        (function_of(keeps_the_input, backward), "the input is kept"),
        (function_of(keeps_the_output, backward), "the output is kept"),
        (function_of(keeps_a_short_copy, backward), "bytes kept.*expected 0, got 1920"),
        (function_of(forward, in_float32_only), "with a bfloat16 input the backward fails"),
        (
            function_of(forward, in_dtype(lambda dtype: torch.bfloat16 if dtype.itemsize == 2 else dtype)),
            "with float16 the gradients are.*wrong",
        ),
        (function_of(forward, with_views), "view size is not compatible"),
        (function_of(views_the_input, backward), "view size is not compatible"),
        (function_of(forward, with_every_gradient), "without a bias the backward fails"),
        (function_of(forward, lambda ctx, grad: backward(ctx, grad)[:5]), "incorrect number of gradients"),
        (lambda x, packed, absmax, bias, shape, block_size: torch.zeros(*x.shape[:-1], shape[0]), "values differ"),
        (lambda x, *rest: x, "values differ"),
        (checkpointed, "the input is kept"),
        (function_of(forward, two_axes_only), "bias beside a vector"),
        (function_of(forward, lambda ctx, grad: (None,) * 6), "neither the input nor the bias gets a gradient"),
        (function_of(forward, lambda ctx, grad: (None, *backward(ctx, grad)[1:])), "the gradient of the input is missing"),
        (function_of(forward, lambda ctx, grad: (-backward(ctx, grad)[0], *backward(ctx, grad)[1:])), "gradient of the input"),
        (lambda *arguments: by_the_reference(*arguments).detach(), "requires a gradient"),
        (lambda x, *rest: by_the_reference(x.detach(), *rest), "gradient of the input"),
        (lambda *arguments: by_the_reference(*arguments) * 1.01, "values differ"),
        (lambda x, *rest: by_the_reference(x.flatten(0, -2), *rest), "shape"),
    ],
)
def test_sly_products_are_refused(answer, words):
    refused(check.product, answer, words)


def test_a_vector_that_fails_is_named():
    """sum(()) sums over all axes, and a vector has no leading ones."""
    answer = mistaken(nf4_product, bias_gradient=lambda grad: grad.sum(tuple(range(grad.ndim - 1))))
    refused(check.product, answer, r"for an x without leading axes, \(in,\), your code raised RuntimeError")


# ---- bytes


def test_the_worked_answer_counts_what_is_there():
    for tied in (False, True):
        model = a_model(random.Random(3), tied)
        counted = quantized_bytes(model, ("lm_head",))
        quantize_linears(model)
        assert counted["codes"] + counted["scales"] + counted["16 bits"] == module_bytes(model)


@pytest.mark.parametrize(
    "answer",
    [
        lambda model, skip: sum(p.nbytes for p in model.parameters()),
        lambda model, skip: {**quantized_bytes(model, skip), "scales": 0},
        lambda model, skip: quantized_bytes(model, ("lm_head",)),
        lambda model, skip: {key: float(round(value)) for key, value in quantized_bytes(model, skip).items()},
        lambda model, skip: {key: value for key, value in quantized_bytes(model, skip).items() if key != "codes"},
        lambda model, skip: dict.fromkeys(quantized_bytes(model, skip), 0),
        lambda model, skip: tuple(quantized_bytes(model, skip).values()),
        lambda model, skip: {**quantized_bytes(model, skip), "bits per quantized weight": 4.127},
        mistaken(quantized_bytes, skipped=lambda name, skip: name.endswith(tuple(skip))),
        mistaken(quantized_bytes, skipped=lambda name, skip: name.split(".")[-1] in (skip or ("lm_head",))),
        mistaken(quantized_bytes, skipped=lambda name, skip: bool({name.split(".")[0], name.split(".")[-1]} & set(skip))),
        lambda model, skip: quantized_bytes(model, skip[:1]),
        mistaken(quantized_bytes, scales=lambda blocks: 5 * blocks),
        lambda model, skip: quantized_bytes(model.float(), skip),
    ],
)
def test_sly_counts_are_refused(answer):
    refused(check.bytes_of_base, answer, ".")


def test_names_compared_by_their_ends_are_named():
    def by_ends(model, skip):
        names = [name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(skip)]
        return quantized_bytes(model, tuple(names))

    refused(check.bytes_of_base, by_ends, "compared with the ends of names")


def quantizes_what_it_is_given(model, skip):
    found = quantized_bytes(model, skip)
    quantize_linears(model, [name for name, m in model.named_modules() if type(m) is nn.Linear and name.split(".")[-1] in skip])
    return found


def test_a_model_that_is_changed_in_place_is_said():
    refused(
        check.bytes_of_base, quantizes_what_it_is_given, "an untied head, after your function: model was changed in place; work on a copy"
    )


def test_layers_may_be_known_by_their_names():
    check.bytes_of_base(mistaken(quantized_bytes, chosen=lambda name, module: name.endswith(("proj", "head"))))


def test_bits_of_a_quantized_weight_are_what_a_layer_takes():
    layer = NF4Linear.from_linear(nn.Linear(1024, 1024, bias=False))
    stored = layer.weight.nbytes + layer.absmax.nbytes + layer.nested_absmax.nbytes
    assert 8 * stored / 1024**2 == BITS  # beside the 4 bytes of the offset


def with_break_even(number):
    return mistaken(frozen_bytes, even=lambda saved: number(saved / 2))


def test_the_worked_break_even_is_one():
    linears = [(640, 320), (320, 640), (320, 320)]
    even = frozen_bytes(linears, 0)["QLoRA needs more from"]
    for others, more in ((even * 0.99, False), (even * 1.01, True)):
        found = frozen_bytes(linears, others)
        assert (found["QLoRA, the rest in float32"] > found["LoRA"]) == more


@pytest.mark.parametrize(
    "answer",
    [
        lambda linears, others: {**frozen_bytes(linears, others), "QLoRA needs more from": others},
        lambda linears, others: {key: value / 2**30 for key, value in frozen_bytes(linears, others).items()},
        lambda linears, others: frozen_bytes(linears, 0),
        lambda linears, others: None,
        lambda linears, others: dict.fromkeys(frozen_bytes(linears, others), 0),
        mistaken(frozen_bytes, copied=min),
        *(with_break_even(number) for number in (int, math.floor, math.ceil, abs, lambda value: value if value > 0 else None)),
        mistaken(frozen_bytes, copied=lambda sizes: sizes[0]),
        lambda linears, others: mistaken(frozen_bytes, copied=lambda sizes: math.prod(max(linears)))(linears, others),
        lambda linears, others: frozen_bytes(linears, others + 1),
    ],
)
def test_sly_comparisons_are_refused(answer):
    refused(check.frozen, answer, ".")


# ---- merging


def by_layers(q, original, lora_A, lora_B, lora_alpha):
    """Through the reference's own layers."""
    linear = nn.Linear(*reversed(original.shape), bias=False)
    linear.weight = nn.Parameter(original)
    layer = LoRALinear(NF4Linear.from_linear(linear, q.block_size, False, torch.float32), len(lora_A), lora_alpha)
    layer.lora_A.data, layer.lora_B.data = lora_A, lora_B
    errors, delta = merge_errors(layer, original), layer.delta_weight().detach()
    packed = copy.deepcopy(layer.base)
    packed.merge_delta(delta)
    weights = {
        "dequantized": (layer.base.dequantize(torch.float32) + delta).to(original.dtype),
        "requantized": packed.dequantize(torch.float32),
        "original": (original + delta).to(original.dtype),
    }
    return {"weights": weights, "errors": errors}


def test_the_layers_of_the_reference_give_the_same():
    for _ in range(3):
        check.merges(by_layers)


def only(part):
    return lambda *arguments: {part: check.merges.reference(*arguments)[part]}


def way_by_way(*arguments):
    found = check.merges.reference(*arguments)
    return {way: (weight, found["errors"][way]) for way, weight in found["weights"].items()}


def with_truth(truth, narrow=False, own=False):
    """As a learner would write it: the truth rounded, differences in the weight's own dtype, or 'original' compared with its own sum."""

    def answer(q, original, lora_A, lora_B, lora_alpha):
        delta = lora_alpha / len(lora_A) * lora_B @ lora_A
        trained = dequantize_nf4(q, torch.float32) + delta
        weights = check.merges.reference(q, original, lora_A, lora_B, lora_alpha)["weights"]
        right, errors = truth(trained, trained.to(original.dtype).float()), {}
        for way, weight in weights.items():
            with_what = original.float() + delta if own and way == "original" else right
            far = weight - with_what.to(weight.dtype) if narrow else weight.float() - with_what
            errors[way] = (far.float().norm() / with_what.norm()).item()
        return {"weights": weights, "errors": errors}

    return answer


def test_more_in_the_dictionary_than_was_asked_for_is_no_mistake():
    def generous(*arguments):
        found = check.merges.reference(*arguments)
        return {**found, **found["weights"], "size": 3}

    check.merges(generous)
    check.merges(with_truth(lambda trained, rounded: trained))


def with_error(error):
    """An error by elements: of a merged weight against what was trained."""

    def answer(q, original, lora_A, lora_B, lora_alpha):
        weights = check.merges.reference(q, original, lora_A, lora_B, lora_alpha)["weights"]
        trained = dequantize_nf4(q, torch.float32) + lora_alpha / len(lora_A) * lora_B @ lora_A
        return {"weights": weights, "errors": {way: error(weight.float(), trained).item() for way, weight in weights.items()}}

    return answer


def all_in_float32(q, original, *rest):
    found = check.merges.reference(q, original, *rest)
    found["weights"] = {key: weight.float() for key, weight in found["weights"].items()}
    return found


@pytest.mark.parametrize(
    "answer, words",
    [
        (only("weights"), "missing: errors"),
        (only("errors"), "missing: weights"),
        (with_error(lambda merged, true: (merged - true).abs().mean() / true.abs().mean()), "errors: dequantized"),
        (with_error(lambda merged, true: ((merged - true) / true).abs().mean()), "errors: dequantized"),
        (all_in_float32, "bfloat16, got"),
        (lambda *arguments: check.merges.reference(*arguments)["weights"], "the three ways stand at the top"),
        (lambda *arguments: check.merges.reference(*arguments)["errors"], "the three ways stand at the top"),
        (lambda *arguments: {}, "returns for a bfloat16 weight: missing: errors, weights"),
        (way_by_way, "the three ways stand at the top"),
        (with_truth(lambda trained, rounded: rounded), "'dequantized' is compared with itself"),
        (with_truth(lambda trained, rounded: trained, narrow=True), "'dequantized' is compared with itself"),
        (with_truth(lambda trained, rounded: trained, own=True), "the error of 'original' compares it with W"),
        (lambda *arguments: list(check.merges.reference(*arguments)), "expected a dictionary, got list"),
        (mistaken(three_merges, scale=lambda alpha, r: -alpha / r), "weights: dequantized: values differ"),
        (mistaken(three_merges, scale=lambda alpha, r: int(alpha) / r), "the update is large: weights: dequantized: values differ"),
        (mistaken(three_merges, unrounded=("dequantized",)), "the error of 'dequantized' is zero"),
        (
            lambda q, W, A, B, alpha: three_merges(q, W, A.to(W.dtype).float(), B, alpha),
            "more digits than 16 bits hold: weights: dequantized",
        ),
        (mistaken(three_merges, requantize=lambda total, q, delta: total - delta), "weights: requantized"),
    ],
)
def test_sly_merges_are_refused(answer, words):
    refused(check.merges, answer, words)


# ---- the 2 % rule


def by_the_lab(baseline, candidate, tolerance, confidence):
    found = compare_losses(baseline.mean(1), candidate.mean(1), confidence=confidence).rise
    return {"estimate": found.estimate, "low": found.low, "high": found.high, "verdict": found.verdict(tolerance)}


def in_float32(baseline, candidate, tolerance, confidence):
    lost = (candidate - baseline).mean(1)
    half = stats.t.ppf((1 + confidence) / 2, len(lost) - 1) * lost.std().item() / math.sqrt(len(lost))
    low, estimate, high = (torch.expm1(lost.mean() + sign * half) for sign in (-1, 0, 1))
    verdict = "within" if high <= tolerance else "beyond" if low > tolerance else "unknown"
    return {"estimate": estimate, "low": low, "high": high, "verdict": verdict}


def by_scipys_test(baseline, candidate, tolerance, confidence):
    after, before = (losses.double().numpy().mean(1) for losses in (candidate, baseline))
    interval = stats.ttest_rel(after, before).confidence_interval(confidence)
    low, high = np.exp(interval.low) - 1, np.exp(interval.high) - 1
    verdict = ("unknown" if low <= tolerance else "beyond") if high > tolerance else "within"
    return {"verdict": verdict, "high": high, "low": low, "estimate": np.exp((after - before).mean()) - 1}


@pytest.mark.parametrize("answer", [by_the_lab, in_float32, by_scipys_test])
def test_other_right_rules_pass(answer):
    for seed in range(5):
        check.rule._judge(answer, seed)


def bytes_by_pointers(model, skip):
    """numpy's integers, and addresses of memory in place of identities."""
    layers = [m for name, m in model.named_modules() if type(m) is nn.Linear and name.split(".")[-1] not in skip]
    sizes = np.array([m.weight.shape.numel() for m in layers])
    blocks = np.ceil(sizes / 64).astype(int)
    codes, scales = ((sizes + 1) // 2).sum(), (blocks + 4 * np.ceil(blocks / 256).astype(int) + 4).sum()
    others = [m for m in model.modules() if m not in layers]
    kept = [p for m in others for p in m.parameters(recurse=False)] + [m.bias for m in layers if m.bias is not None]
    rest = {p.data_ptr(): p.nbytes for p in kept}
    return {
        "16 bits": sum(rest.values()),
        "codes": codes,
        "scales": scales,
        "bits per quantized weight": 8 * (codes + scales) / sizes.sum(),
    }


def frozen_with_numpy(linears, others):
    sizes = np.prod(np.array(linears), axis=1)
    base = sizes.sum() * (4.125 + 1 / 512) / 8 + 2 * sizes.max()
    first = 2 * (sizes.sum() + others)
    third = base + 4 * others
    return {
        "LoRA": first,
        "QLoRA": base + 2 * others,
        "QLoRA, the rest in float32": third,
        "QLoRA needs more from": others + (first - third) / 2,
    }


def merges_by_ranks(q, original, lora_A, lora_B, lora_alpha):
    """In numpy's float64, one rank after the other."""
    delta = sum(np.outer(b, a) for a, b in zip(lora_A.double().numpy(), lora_B.double().numpy().T, strict=True)) * lora_alpha / len(lora_A)
    trained, base = dequantize_nf4(q, torch.float32).double().numpy() + delta, original.double().numpy()
    narrow = {"dequantized": trained, "original": base + delta}
    weights = {way: torch.from_numpy(weight).to(original.dtype) for way, weight in narrow.items()}
    weights["requantized"] = dequantize_nf4(quantize_nf4(torch.from_numpy(trained).float(), q.block_size), torch.float32)
    errors = {way: np.linalg.norm(weight.double().numpy() - trained) / np.linalg.norm(trained) for way, weight in weights.items()}
    return {"errors": errors, "weights": weights}


@pytest.mark.parametrize(
    "judge, answer",
    [(check.bytes_of_base, bytes_by_pointers), (check.frozen, frozen_with_numpy), (check.merges, merges_by_ranks)],
)
def test_right_answers_in_other_dress_pass_every_time(judge, answer):
    for seed in range(5):
        judge._judge(answer, seed)


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda b, c, tolerance, confidence: check.rule.reference(b, c, 0.02 if tolerance == 0.03 else 0.03, confidence), "."),
        (lambda b, c, tolerance, confidence: check.rule.reference(b, c, tolerance, 0.99), "low|high"),
        (lambda b, c, tolerance, confidence: {**check.rule.reference(b, c, tolerance, confidence), "verdict": "within"}, "verdict"),
        (lambda b, c, tolerance, confidence: check.rule.reference(b[:-1], c[:-1], tolerance, confidence), "estimate|low|high"),
        (lambda b, c, tolerance, confidence: {"verdict": "within"}, "missing: estimate, high, low"),
        (lambda b, c, tolerance, confidence: None, "expected a dictionary, got NoneType"),
        (lambda *arguments: {**check.rule.reference(*arguments), "verdict": True}, "verdict: expected 'within', got True"),
        (lambda b, c, tolerance, confidence: check.rule.reference(b, c, tolerance, 1 - confidence), "low"),
        (
            mistaken(two_percent_rule, probability=lambda confidence: 0.975, spread=lambda lost, *_: 2 * lost.std() / math.sqrt(len(lost))),
            "low",
        ),
        (mistaken(two_percent_rule, share=lambda nats, b: math.exp(nats)), "estimate"),
        (
            mistaken(
                two_percent_rule, verdict=lambda low, high, t, _: "unknown" if low <= t <= high else "within" if high < t else "beyond"
            ),
            "<=",
        ),
        (
            mistaken(
                two_percent_rule, verdict=lambda low, high, t, _: "unknown" if low < t < high else "within" if high <= t else "beyond"
            ),
            "compare its lower end with >",
        ),
    ],
)
def test_sly_rules_are_refused(answer, words):
    refused(check.rule, answer, words)


def test_rounded_break_evens_are_told_apart():
    """Whatever the seed: round() is neither floor nor ceil on these sizes, and int() is neither."""
    ways = {math.ceil: "rounded up", math.floor: "rounded down", round: "is rounded: return", int: "is cut off"}
    for seed in range(20):
        for number, words in ways.items():
            with pytest.raises(NotYet, match=words):
                check.frozen._judge(with_break_even(number), seed)
        check.frozen._judge(frozen_with_numpy, seed)


def test_decoding_is_the_modules():
    q = quantize_nf4(torch.randn(7, 9), 32)
    expected = dequantize_nf4(q, torch.bfloat16)
    assert torch.equal(decode(q.packed, q.absmax, (7, 9), 32, torch.bfloat16), expected)
    assert isinstance(q, NF4Tensor)
