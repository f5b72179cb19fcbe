"""reference.ia3 against peft; reference.t_few against the published formulas; their errors."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from family_helpers import MODELS, assert_parity, assert_unchanged, fill, logits, peft_model, snapshot, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import assert_same, tiny_llama
from torch import nn

from reference.ia3 import IA3Layer, inject_ia3
from reference.lora import inject_lora
from reference.qlora import NF4Linear
from reference.t_few import answer_scores, choice_losses
from reference.wrapped import adapters, merge_adapters

TARGETS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_trains_and_merges_as_in_peft(kind):
    base, (targets, feedforward) = MODELS[kind]().eval(), TARGETS[kind]
    ours = copy.deepcopy(base)
    inject_ia3(ours, targets, feedforward)
    theirs = peft_model(base, peft.IA3Config(target_modules=targets, feedforward_modules=feedforward))
    assert_same(logits(ours), logits(base))  # all scales are one
    fill(ours, theirs)
    assert_parity(ours, theirs)
    before = logits(ours).detach()
    assert_same(logits(merge_adapters(ours)), before, ulps=100)
    theirs_merged = theirs.merge_and_unload()
    for name, tensor in theirs_merged.state_dict().items():
        assert_same(ours.state_dict()[name], tensor, ulps=8000)


@st.composite
def layers(draw):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    n_in, n_out, dtype = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    base = nn.Linear(n_in, n_out, bias=draw(st.booleans())).to(dtype)
    layer = IA3Layer(base, draw(st.booleans()))
    layer.ia3_l.data.normal_()
    return layer, torch.randn(3, n_in, dtype=dtype)


@given(layers())
@settings(max_examples=40, deadline=None)
def test_the_merged_layer_computes_the_same_bias_included(case):
    layer, x = case
    W, b = layer.merged_weight()
    bias = layer.base.bias if b is None else b
    expected = F.linear(x.double(), W.double(), None if bias is None else bias.double())
    size = F.linear(x.double().abs(), W.double().abs()).max().item() + 2
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=(1e-5 if x.dtype == torch.float32 else 2**-6) * size)
    assert layer(x).dtype == x.dtype


def test_scaling_the_last_layer_s_input_is_scaling_the_one_before_it():
    """l on down_proj's input and l on up_proj's output are the same model."""
    base = tiny_llama().eval()
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    inject_ia3(one, ["down_proj"], ["down_proj"])
    inject_ia3(other, ["up_proj"], [])
    for (_, a), (_, b) in zip(adapters(one), adapters(other), strict=True):
        a.ia3_l.data.normal_()
        b.ia3_l.data.copy_(a.ia3_l.T)
    assert_same(logits(one), logits(other), ulps=32)


def test_over_nf4_it_trains_and_does_not_merge():
    base = nn.Sequential(NF4Linear.from_linear(nn.Linear(64, 8), compute_dtype=torch.float32))
    inject_ia3(base, ["0"], [])
    base(torch.randn(2, 64)).sum().backward()
    assert base[0].ia3_l.grad is not None and base[0].ia3_l.dtype == torch.float32
    with pytest.raises(TypeError, match=r"keeps its weight as torch\.uint8: dequantize it first"):
        merge_adapters(base)
    assert isinstance(base[0], IA3Layer)


def test_refusals_leave_the_model():
    model = tiny_llama()
    before = snapshot(model)
    for words, arguments in (
        ("'down_proj' is none of the target_modules", (["k_proj"], ["down_proj"])),
        ("matches no layer", (["nothing"], [])),
        ("only linear layers", (["embed_tokens"], [])),
    ):
        with pytest.raises(ValueError, match=words):
            inject_ia3(model, *arguments)
        assert_unchanged(model, before)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_adapters(model)
    inject_ia3(model)
    with pytest.raises(ValueError, match="is a IA3Layer already"):
        inject_ia3(model)
    next(iter(trained(model).values())).data[0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="would leave NaN"):
        merge_adapters(model)
    assert [type(part) for part in model.modules()] == before[2]
    other = tiny_llama()
    inject_lora(other, 2, 3, ["q_proj"])
    with pytest.raises(ValueError, match="is a LoRALinear already"):
        inject_ia3(other)


# ---- T-Few's losses -------------------------------------------------------------------------------------------------------------------


def published(logits, labels, right):
    """As r-three/t-few computes them, without what padding and the right choice add to UL."""
    batch, choices, _ = labels.shape
    costs = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(batch, choices, -1)
    scores = costs.sum(-1) / (labels != -100).sum(-1)
    rows = torch.arange(batch)
    lm = F.cross_entropy(logits[rows, right].flatten(0, 1), labels[rows, right].flatten())
    ln = F.cross_entropy(-scores, right)
    likely = -costs + (labels < 0) * -100
    likely[rows, right] = -100
    counted = likely != -100
    ul = -torch.log(1 - torch.exp(likely) + 1e-2)[counted].sum() / counted.sum()
    return lm, ul, ln


@st.composite
def examples(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch, choices, length, vocabulary = (draw(st.integers(low, high)) for low, high in ((1, 4), (2, 5), (1, 6), (2, 9)))
    labels = torch.randint(vocabulary, (batch, choices, length), generator=g)
    start = torch.randint(length, (batch, choices, 1), generator=g)  # ignored up to here, one token at least is left
    labels[torch.arange(length) < start] = -100
    logits = torch.randn(batch, choices, length, vocabulary, generator=g)
    return logits, labels, torch.randint(choices, (batch,), generator=g)


@given(examples())
@settings(max_examples=60, deadline=None)
def test_the_losses_are_the_published_ones(case):
    losses = choice_losses(*case)
    lm, ul, ln = published(*case)
    for name, value in (("lm", lm), ("ul", ul), ("ln", ln), ("loss", lm + ul + ln)):
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-6)
    off = choice_losses(*case, ul=0.0, ln=0.0)
    assert torch.equal(off["loss"], off["lm"])


def test_a_model_that_knows_has_no_loss_and_the_highest_score():
    labels = torch.tensor([[[-100, 3, 1], [-100, 2, -100]]])
    sure = torch.full((1, 2, 3, 5), -30.0)
    for choice, place, token in ((0, 1, 3), (0, 2, 1)):
        sure[0, choice, place, token] = 30.0
    sure[0, 1, 1, 0] = 30.0  # the wrong choice has another token's probability
    losses = choice_losses(sure, labels, torch.tensor([0]))
    assert losses["lm"] < 1e-6 and losses["ln"] < 1e-6 and losses["ul"] < 0
    assert answer_scores(sure, labels).argmax() == 0


def test_longer_choices_are_not_worse_for_being_long():
    labels = torch.tensor([[[1, 1, 1, 1], [1, -100, -100, -100]]])
    scores = answer_scores(torch.zeros(1, 2, 4, 3), labels)
    assert torch.equal(scores[0, 0], scores[0, 1])


@pytest.mark.parametrize(
    "shape, labels, right, words",
    [
        ((1, 2, 3, 5), torch.zeros(1, 2, 4), [0], "must agree"),
        ((1, 1, 3, 5), torch.zeros(1, 1, 3), [0], "one choice"),
        ((1, 2, 3, 5), torch.zeros(1, 2, 3), [2], "right must be one index below 2"),
        ((1, 2, 3, 5), torch.full((1, 2, 3), -100), [0], "no token to score"),
    ],
)
def test_what_is_refused(shape, labels, right, words):
    with pytest.raises(ValueError, match=words):
        choice_losses(torch.zeros(shape), labels.long(), torch.tensor(right))
