"""The decoder is the library's, number for number; QLoRA goes over it; its memory is that of the recipe."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.cases import config_of
from course.lab import models
from course.lab.live import LiveBytes
from reference.llama import Llama
from reference.lora import inject_lora, lora_layers
from reference.model_shapes import GEMMA_3_270M, ModelShape
from reference.qlora import NF4Linear, quantize_linears

SMALL = ModelShape("small", 64, 3, 4, 2, 16, 96, 50)
CPU = torch.device("cpu")


def theirs_of(shape, dtype=torch.float32, theta=10_000.0):
    torch.manual_seed(0)
    rope = {"rope_theta": theta, "rope_type": "default"}
    config = config_of(shape, rms_norm_eps=1e-5, rope_parameters=rope, initializer_range=0.2)
    return LlamaForCausalLM(config).to(dtype)


def ours_of(theirs, shape, **options):
    ours = Llama(shape, **options)
    state = theirs.state_dict()
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if shape.tied else set())
    return ours.to(next(theirs.parameters()).dtype)


def assert_equal(ours, theirs, ids, rtol, atol):
    expected = theirs(input_ids=ids, labels=ids)
    torch.testing.assert_close(ours.logits(ids), expected.logits, rtol=rtol, atol=atol * expected.logits.abs().max().item())
    loss = ours.loss(ids, chunk=13)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=10 * rtol)
    loss.backward(), expected.loss.backward()
    right = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = right[name].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=100 * rtol, atol=atol * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_tiny_model_s_weights_give_its_logits_and_gradients(checkpointing):
    theirs, _ = models.load("tiny", where=CPU)
    ours = ours_of(theirs, ModelShape.from_config(theirs.config), eps=theirs.config.rms_norm_eps, checkpointing=checkpointing)
    ids = torch.randint(349, (2, 40), generator=torch.Generator().manual_seed(1))
    assert_equal(ours, theirs, ids, rtol=1e-6, atol=5e-6)  # last places of float32, over four layers


@pytest.mark.parametrize("change", [dict(), dict(tied=True), dict(kv_heads=4), dict(head_dim=24), dict(kv_heads=1)])
def test_other_shapes_equal_the_library(change):
    shape = dataclasses.replace(SMALL, **change)
    theirs = theirs_of(shape, theta=500.0)
    assert_equal(ours_of(theirs, shape, theta=500.0), theirs, torch.randint(50, (2, 21)), rtol=2e-6, atol=5e-6)


def test_bfloat16_is_as_near_to_the_truth_as_the_library():
    theirs = theirs_of(SMALL)
    ids = torch.randint(50, (4, 30))
    exact = theirs.double()(input_ids=ids).logits
    error = lambda logits: (logits - exact).norm().item()  # noqa: E731
    half = theirs_of(SMALL, torch.bfloat16)
    assert error(ours_of(half, SMALL).logits(ids)) < 1.2 * error(half(input_ids=ids).logits)


def test_qlora_over_a_model_that_never_was_in_16_bits():
    shape = dataclasses.replace(SMALL, hidden=128)
    whole = theirs_of(shape, torch.bfloat16)
    weights = whole.state_dict()
    with torch.device("meta"):
        model = Llama(shape).bfloat16()
    names = quantize_linears(model, device=CPU, weights=lambda name: weights[name].clone())
    assert len(names) == 7 * shape.layers and not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    inject_lora(model, 4, 8)
    assert sum(isinstance(layer.base, NF4Linear) for _, layer in lora_layers(model)) == 7 * shape.layers  # and no head
    inject_ids = torch.randint(50, (2, 17))
    quantize_linears(whole)
    inject_lora(whole, 4, 8)
    for (_, one), (_, other) in zip(lora_layers(model), lora_layers(whole), strict=True):
        other.lora_A.data.copy_(one.lora_A.data.normal_(std=0.1))
        other.lora_B.data.copy_(one.lora_B.data.normal_(std=0.1))
    ours, theirs = model.loss(inject_ids), whole(input_ids=inject_ids, labels=inject_ids).loss
    ours.backward(), theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=0.01)  # bfloat16 throughout
    for (_, one), (_, other) in zip(lora_layers(model), lora_layers(whole), strict=True):
        cosine = nn.functional.cosine_similarity(one.lora_B.grad.flatten(), other.lora_B.grad.flatten(), dim=0)
        assert cosine > 0.98
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_tied_head_stays_tied_through_the_meta_device():
    shape = dataclasses.replace(SMALL, tied=True)
    with torch.device("meta"):
        model = Llama(shape)
    weights = Llama(shape).state_dict()
    quantize_linears(model, device=CPU, weights=lambda name: weights[name])
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.lm_head.weight.is_meta


def test_checkpointing_keeps_each_layer_s_input_only():
    shape = dataclasses.replace(SMALL, layers=8)
    ids = torch.randint(50, (4, 64))
    held = {}
    for checkpointing in (True, False):
        model = Llama(shape, checkpointing=checkpointing)
        with LiveBytes() as live:
            loss = model.loss(ids)
            held[checkpointing] = live.bytes
        loss.backward()
    one = 4 * ids.numel() * shape.hidden
    assert held[True] < 12 * one < held[False] / 3  # eight inputs, the last layer's output, what norm and loss keep


def test_dropout_falls_on_the_same_places_when_a_layer_is_computed_again():
    torch.manual_seed(0)
    model = Llama(SMALL)
    inject_lora(model, 4, 8, lora_dropout=0.5)
    ids, gradients = torch.randint(50, (2, 9)), []
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.data.normal_()
    for checkpointing in (True, False):
        model.model.checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(1)
        model.loss(ids).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_shape_that_is_not_llama_s_is_refused():
    with pytest.raises(ValueError, match="Gemma"):
        Llama(GEMMA_3_270M)
    with pytest.raises(ValueError, match="even head_dim"):
        Llama(dataclasses.replace(SMALL, head_dim=15))
