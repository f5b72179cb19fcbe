"""reference.relatives against peft: updates, gradients, ten steps, merged weights; starts, rates and subsets; errors."""

import copy
import functools
import math

import peft
import pytest
import torch
from family_helpers import IDS, LINEARS, MODELS, assert_parity, assert_unchanged, fill, logits, peft_model, snapshot, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import assert_same, tiny_bert, tiny_llama
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lokr.layer import factorization
from torch import nn

from reference import relatives
from reference.lora import inject_lora, lora_layers, trainable_parameters
from reference.nf4 import dequantize_nf4, quantize_nf4
from reference.qlora import NF4Linear, quantize_linears
from reference.relatives.updates import near_square
from reference.wrapped import adapters, merge_adapters

METHODS = {  # name -> (how to inject, peft's config)
    "VeRA": (functools.partial(relatives.inject_vera, r=5, key=3), functools.partial(peft.VeraConfig, r=5, projection_prng_key=3)),
    "LoHa": (functools.partial(relatives.inject_loha, r=3, alpha=5), functools.partial(peft.LoHaConfig, r=3, alpha=5)),
    "LoKr": (functools.partial(relatives.inject_lokr, r=2, alpha=5), functools.partial(peft.LoKrConfig, r=2, alpha=5)),
    "LoKr, thin": (functools.partial(relatives.inject_lokr, r=1, alpha=5), functools.partial(peft.LoKrConfig, r=1, alpha=5)),
    "OFT": (functools.partial(relatives.inject_oft, block_size=4), functools.partial(peft.OFTConfig, oft_block_size=4)),
    "OFT, exact": (
        functools.partial(relatives.inject_oft, block_size=4, exact=True),
        functools.partial(peft.OFTConfig, oft_block_size=4, use_cayley_neumann=False),
    ),
}
ONLY_LINEAR = {"LoHa", "LoKr", "LoKr, thin", "OFT", "OFT, exact"}  # which peft has not for GPT-2's Conv1D


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_a_model_trains_and_merges_as_in_peft(name, kind):
    inject, config = METHODS[name]
    base = MODELS[kind]().eval()
    ours = copy.deepcopy(base)
    inject(ours, target_modules=LINEARS[kind])
    assert_same(logits(ours), logits(base), ulps=16)  # all start at the pretrained model
    if kind == "gpt2" and name in ONLY_LINEAR:
        fill(ours, copy.deepcopy(ours), 0.1)
        before = logits(ours).detach()
        assert_same(logits(merge_adapters(ours)), before, ulps=200)
        return
    theirs = peft_model(base, config(target_modules=LINEARS[kind]))
    fill(ours, theirs, 0.1 if "OFT" in name else 0.4)
    assert_parity(ours, theirs, ulps=32)
    before = logits(ours).detach()
    assert_same(logits(merge_adapters(ours)), before, ulps=200)
    merged = theirs.merge_and_unload().state_dict()
    for key, tensor in ours.state_dict().items():
        assert_same(tensor, merged[key], ulps=32000)


@given(st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_near_square_is_peft_s_factorization(n):
    assert near_square(n) == factorization(n)


def test_exact_oft_is_a_rotation_and_the_default_nearly():
    layer = relatives.OFT(nn.Linear(16, 5), 8)
    for size in (0.01, 0.3):
        layer.oft_R.data.normal_(std=size)
        default, layer.exact = layer.rotations(), True
        exact, layer.exact = layer.rotations(), False
        torch.testing.assert_close(exact @ exact.mT, torch.eye(8).expand(2, 8, 8), rtol=0, atol=1e-5)
        # the default turns the other way round; of that rotation it is the beginning of a series
        assert ((default - exact.mT).abs().max() < 1e-5) == (size == 0.01)
    assert (default @ default.mT - torch.eye(8)).abs().max() > 0.01  # and far out it is none


def test_loha_reaches_rank_r_squared():
    layer = relatives.LoHa(nn.Linear(20, 30), 3, 3)
    layer.hada_w2_b.data.normal_()
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 9


def test_counts():
    """Of one (48 × 32) layer; LoRA r = 4 beside them."""
    n_out, n_in, r = 48, 32, 4

    def count(layer):
        return sum(p.numel() for p in layer.parameters() if p.requires_grad)

    linear = functools.partial(nn.Linear, n_in, n_out)
    assert count(relatives.VeRA(linear(), torch.randn(r, 40), torch.randn(60, r))) == r + n_out
    assert count(relatives.LoHa(linear(), r, 1)) == 2 * r * (n_in + n_out)
    assert count(relatives.LoKr(linear(), 2, 1)) == 6 * 4 + 2 * (8 + 8)
    assert count(relatives.LoKr(linear(), 4, 1)) == 6 * 4 + 8 * 8
    assert count(relatives.OFT(linear(), 8)) == n_in * 7 / 2


def test_vera_s_layers_share_one_pair():
    model = tiny_llama()
    relatives.inject_vera(model, 5)
    layers = [layer for _, layer in adapters(model)]
    assert len({layer.shared[0].untyped_storage().data_ptr() for layer in layers}) == 1
    assert not any("shared" in key for key in model.state_dict())


# ---- starts and rates -----------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_loftq_is_nearer_than_quantizing_and_rounds_help(seed, rounds):
    W = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed))
    R, A, B = relatives.loftq(W, 6, rounds)
    plain = (W - dequantize_nf4(quantize_nf4(W))).norm()
    assert (W - dequantize_nf4(quantize_nf4(R)) - B @ A).norm() < 0.9 * plain
    if rounds == 1:
        assert torch.equal(R, W)
        values = torch.linalg.svdvals(W - dequantize_nf4(quantize_nf4(W)))
        left = (W - dequantize_nf4(quantize_nf4(W)) - B @ A).norm()
        assert left == pytest.approx(values[6:].norm().item(), rel=1e-4)  # the best of rank 6


def test_loftq_in_a_model_starts_nearer_to_it():
    base = tiny_llama().eval()
    quantized, ours = copy.deepcopy(base), copy.deepcopy(base)
    quantize_linears(quantized, double_quant=False, compute_dtype=torch.float32)
    names = relatives.inject_loftq(ours, 4, rounds=5, compute_dtype=torch.float32)
    assert len(names) == 14 and isinstance(ours.get_submodule(names[0]).base, NF4Linear)
    assert all(layer.scaling == 1 for _, layer in lora_layers(ours))
    away = [(model(input_ids=IDS).logits - base(input_ids=IDS).logits).norm() for model in (ours, quantized)]
    assert away[0] < 0.8 * away[1]
    ours(input_ids=IDS, labels=IDS).loss.backward()
    assert all("lora_" in name and p.grad is not None for name, p in trained(ours).items())


def test_lora_plus_groups_are_peft_s():
    base = tiny_bert()
    ours = copy.deepcopy(base)
    inject_lora(ours, 2, 3, ["query", "value"])
    theirs = peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["query", "value"]))
    expected = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)
    rates = {id(p): group["lr"] for group in expected.param_groups for p in group["params"]}
    mine = {id(p): group["lr"] for group in relatives.lora_plus_groups(ours, 1e-3, 8) for p in group["params"]}
    for name, parameter in trained(ours).items():
        assert mine[id(parameter)] == rates[id(trained(theirs)[name])] == (8e-3 if "lora_B" in name else 1e-3)
    assert len(mine) == len(trained(ours))
    torch.optim.AdamW(relatives.lora_plus_groups(ours, 1e-3))


# ---- subsets --------------------------------------------------------------------------------------------------------------------------


def test_bitfit_and_ln_tuning():
    model = tiny_bert()
    names = relatives.train_biases(model)
    assert set(names) == set(trained(model)) and all(name.endswith("bias") for name in names)
    assert len(names) == sum(name.endswith("bias") for name, _ in model.named_parameters())
    names = relatives.train_norms(model)
    assert set(names) == set(trained(model)) and all("LayerNorm" in name for name in names)
    theirs = peft_model(tiny_bert(), peft.LNTuningConfig(target_modules=["LayerNorm"]))
    assert sum(p.numel() for p in trained(theirs).values()) == trainable_parameters(model)[0]
    llama = tiny_llama()
    before = snapshot(llama)
    with pytest.raises(ValueError, match="no bias"):
        relatives.train_biases(llama)
    assert_unchanged(llama, before)
    assert len(relatives.train_norms(llama)) == 5
    with pytest.raises(ValueError, match="no norm"):
        relatives.train_norms(nn.Sequential(nn.Linear(2, 2)))


def test_refusals_leave_the_model():
    model = tiny_llama()
    before = snapshot(model)
    calls = [
        (ValueError, "block_size must divide the 16 inputs, got 5", lambda: relatives.inject_oft(model, 5)),
        (ValueError, "r must be at least 1", lambda: relatives.inject_loha(model, 0, 1)),
        (ValueError, "alpha must be above 0", lambda: relatives.inject_lokr(model, 2, -1)),
        (TypeError, "key must be an integer", lambda: relatives.inject_vera(model, 2, key="a")),
        (ValueError, "r must be from 1 to 16", lambda: relatives.inject_loftq(model, 17)),
        (ValueError, "trains no lora_B", lambda: relatives.lora_plus_groups(model, 1e-3)),
        (ValueError, "ratio must be above 0", lambda: relatives.lora_plus_groups(model, 1e-3, 0)),
        (TypeError, "LoftQ quantizes an nn.Linear", lambda: relatives.inject_loftq(model, 2, ["embed_tokens"])),
    ]
    for error, words, call in calls:
        with pytest.raises(error, match=words):
            call()
        assert_unchanged(model, before)
    relatives.inject_oft(model, 8)
    with pytest.raises(ValueError, match="is a OFT already"):
        relatives.inject_vera(model, 2)
    assert math.isfinite(logits(model).sum().item())
