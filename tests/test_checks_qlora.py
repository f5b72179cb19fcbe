"""Answers that nobody listed: right ones in other dress pass, sly wrong ones are refused. And the worked answers against the modules."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course.checking import NotYet
from course.checks import qlora as check
from course.lab.evaluation import compare_losses
from course.lab.live import module_bytes
from reference.lora import LoRALinear
from reference.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4
from reference.nf4_format import Layout
from reference.nf4_product import NF4Product
from reference.qlora import NF4Linear, merge_errors, quantize_linears

decode = check.decode


def refused(judge, answer, words):
    with pytest.raises(NotYet, match=words):
        judge(answer)


# ---- the product


def by_the_reference(x, packed, absmax, bias, shape, block_size):
    return NF4Product.apply(x, bias, packed, absmax, None, None, Layout(shape, block_size, x.dtype))


def function_of(forward, backward):
    return type("Answer", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}).apply


def forward(ctx, x, packed, absmax, bias, shape, block_size):
    ctx.save_for_backward(packed, absmax)
    ctx.layout = shape, block_size
    return F.linear(x, decode(packed, absmax, shape, block_size, x.dtype), bias)


def backward(ctx, grad):
    grad_x = torch.einsum("...o,oi->...i", grad, decode(*ctx.saved_tensors, *ctx.layout, grad.dtype))
    return grad_x, None, None, grad.reshape(-1, grad.shape[-1]).sum(0), None, None


def as_attribute(ctx, x, packed, absmax, bias, shape, block_size):
    ctx.weight = decode(packed, absmax, shape, block_size, x.dtype)
    return F.linear(x, ctx.weight, bias)


def from_attribute(ctx, grad):
    return grad @ ctx.weight, None, None, grad.reshape(-1, grad.shape[-1]).sum(0), None, None


def keeps_the_input(ctx, x, *rest):
    ctx.x = x
    return forward(ctx, x, *rest)


def two_axes_only(ctx, grad):
    return backward(ctx, grad)[0], None, None, grad.sum((0, 1)) if grad.ndim == 3 else None, None, None


def checkpointed(x, packed, absmax, bias, shape, block_size):
    """Right gradients, by doing the product a second time, which needs the input."""

    def run(x, bias):
        return F.linear(x, decode(packed, absmax, shape, block_size, x.dtype), bias)

    return torch.utils.checkpoint.checkpoint(run, x, bias, use_reentrant=False)


@pytest.mark.parametrize("answer", [by_the_reference, function_of(forward, backward)])
def test_other_right_products_pass(answer):
    check.product(answer)


@pytest.mark.parametrize(
    "answer, words",
    [
        (function_of(as_attribute, from_attribute), "a dense copy of the weight is kept"),
        (function_of(keeps_the_input, backward), "the input is kept"),
        (checkpointed, "the input is kept"),
        (function_of(forward, two_axes_only), "bias beside a vector"),
        (function_of(forward, lambda ctx, grad: (None,) * 6), "gradient of the input: expected a tensor"),
        (function_of(forward, lambda ctx, grad: (-backward(ctx, grad)[0], *backward(ctx, grad)[1:])), "gradient of the input"),
        (lambda *arguments: by_the_reference(*arguments).detach(), "requires a gradient"),
        (lambda x, *rest: by_the_reference(x.detach(), *rest), "gradient of the input"),
        (lambda *arguments: by_the_reference(*arguments) * 1.01, "values differ"),
        (lambda x, *rest: by_the_reference(x.flatten(0, -2), *rest), "shape"),
    ],
)
def test_sly_products_are_refused(answer, words):
    refused(check.product, answer, words)


# ---- bytes


def test_the_worked_answer_counts_what_is_there():
    for tied in (False, True):
        model = check._a_model(random.Random(3), tied)
        counted = check.base_bytes(model, ("lm_head",))
        quantize_linears(model)
        assert counted["codes"] + counted["scales"] + counted["16 bits"] == module_bytes(model)


@pytest.mark.parametrize(
    "answer",
    [
        lambda model, skip: sum(p.nbytes for p in model.parameters()),
        lambda model, skip: {**check.base_bytes(model, skip), "scales": 0},
        lambda model, skip: check.base_bytes(model, ("lm_head",)),
        lambda model, skip: {key: float(round(value)) for key, value in check.base_bytes(model, skip).items()},
        lambda model, skip: {key: value for key, value in check.base_bytes(model, skip).items() if key != "codes"},
        check.base_with(quantized=lambda name, module: name.endswith("proj")),
    ],
)
def test_sly_counts_are_refused(answer):
    if answer.__qualname__.endswith("base_with.<locals>.answer"):
        check.bytes_of_base(answer)  # it goes by names, and here that comes to the same
    else:
        refused(check.bytes_of_base, answer, ".")


def test_bits_of_a_quantized_weight_are_what_a_layer_takes():
    layer = NF4Linear.from_linear(nn.Linear(1024, 1024, bias=False))
    stored = layer.weight.nbytes + layer.absmax.nbytes + layer.nested_absmax.nbytes
    assert 8 * stored / 1024**2 == check.BITS  # beside the 4 bytes of the offset


def test_the_worked_break_even_is_one():
    linears = [(640, 320), (320, 640), (320, 320)]
    even = check.frozen_with()(linears, 0)["QLoRA needs more from"]
    for others, more in ((even * 0.99, False), (even * 1.01, True)):
        found = check.frozen_with()(linears, others)
        assert (found["QLoRA, the rest in float32"] > found["LoRA"]) == more


@pytest.mark.parametrize(
    "answer",
    [
        lambda linears, others: {**check.frozen_with()(linears, others), "QLoRA needs more from": others},
        lambda linears, others: {key: value / 2**30 for key, value in check.frozen_with()(linears, others).items()},
        lambda linears, others: check.frozen_with()(linears, 0),
        lambda linears, others: None,
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


def mean_error(q, original, *rest):
    """An error by elements."""
    found = check.merges.reference(q, original, *rest)
    trained = found["weights"]["dequantized"].float()
    return {**found, "errors": {k: ((w.float() - trained).abs().mean() / trained.abs().mean()).item() for k, w in found["weights"].items()}}


def changes_its_input(q, original, *rest):
    found = check.merges.reference(q, original, *rest)
    found["weights"] = {key: weight.float() for key, weight in found["weights"].items()}
    return found


@pytest.mark.parametrize(
    "answer, words",
    [(only("weights"), "the error"), (only("errors"), "the weight"), (mean_error, "the error"), (changes_its_input, "bfloat16, got")],
)
def test_sly_merges_are_refused(answer, words):
    refused(check.merges, answer, words)


# ---- the 2 % rule


def by_the_lab(baseline, candidate, tolerance, confidence):
    found = compare_losses(baseline.mean(1), candidate.mean(1), confidence=confidence).rise
    return {"estimate": found.estimate, "low": found.low, "high": found.high, "verdict": found.verdict(tolerance)}


def in_float32(baseline, candidate, tolerance, confidence):
    lost = (candidate - baseline).mean(1)
    half = check._student(lost, confidence)
    low, estimate, high = (torch.expm1(lost.mean() + sign * half) for sign in (-1, 0, 1))
    verdict = "within" if high <= tolerance else "beyond" if low > tolerance else "unknown"
    return {"estimate": estimate, "low": low, "high": high, "verdict": verdict}


@pytest.mark.parametrize("answer", [by_the_lab, in_float32])
def test_other_right_rules_pass(answer):
    for _ in range(5):
        check.rule(answer)


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda b, c, tolerance, confidence: check.rule.reference(b, c, 0.02 if tolerance == 0.03 else 0.03, confidence), "."),
        (lambda b, c, tolerance, confidence: check.rule.reference(b, c, tolerance, 0.99), "low|high"),
        (lambda b, c, tolerance, confidence: {**check.rule.reference(b, c, tolerance, confidence), "verdict": "within"}, "verdict"),
        (lambda b, c, tolerance, confidence: check.rule.reference(b[:-1], c[:-1], tolerance, confidence), "estimate"),
        (lambda b, c, tolerance, confidence: {"verdict": "within"}, "nothing was observed"),
    ],
)
def test_sly_rules_are_refused(answer, words):
    refused(check.rule, answer, words)


def test_decoding_is_the_modules():
    q = quantize_nf4(torch.randn(7, 9), 32)
    expected = dequantize_nf4(q, torch.bfloat16)
    assert torch.equal(decode(q.packed, q.absmax, (7, 9), 32, torch.bfloat16), expected)
    assert isinstance(q, NF4Tensor)
