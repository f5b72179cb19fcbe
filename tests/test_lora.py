"""reference.lora against peft, layer by layer; its properties; its errors."""

import copy
import math
import pickle
import warnings
import weakref

import peft
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import ULP, assert_same, tiny_bert, tiny_llama
from torch import nn

from benchmarks import lora_layer
from reference.lora import (
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    inject_lora,
    lora_layers,
    lora_state_dict,
    merge_lora,
    replace_layers,
    trainable_parameters,
)
from reference.qlora import NF4Linear

few = settings(max_examples=12)
HALF = (torch.bfloat16, torch.float16)


class One(nn.Module):
    """A model of one layer, so that there is something to inject into."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def fill(layer):
    """Both factors away from zero, as in the middle of training."""
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


def peft_layer(base, ours, copy_factors=True, **options):
    """peft's layer over a copy of ``base``, with our factors in it, and those factors."""
    config = peft.LoraConfig(r=ours.r, lora_alpha=ours.lora_alpha, target_modules=["layer"], use_rslora=ours.use_rslora, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about groups and merging
        layer = peft.get_peft_model(One(copy.deepcopy(base)), config).base_model.model.layer
    if isinstance(base, nn.Embedding):
        factors = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    else:
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for theirs, value in zip(factors, (ours.lora_A, ours.lora_B), strict=True):
        assert theirs.shape == value.shape
        if copy_factors:
            theirs.data = value.detach().clone()
    return layer, factors


def assert_parity(base, ours, x, merge=True):
    """Forward, gradients, ten AdamW steps, merged weight, and the output after merging."""
    theirs, their_factors = peft_layer(base, ours)
    factors, float_input = [ours.lora_A, ours.lora_B], x.is_floating_point()
    x_ours, x_theirs = (x.clone().requires_grad_(float_input) for _ in range(2))
    output, expected = ours(x_ours), theirs(x_theirs)
    direction = torch.randn_like(output)
    largest, *largest_gradients = sums_of_sizes(ours, x, direction)
    assert_same(output, expected, size=largest)
    output.backward(direction)
    expected.backward(direction)
    # Tensor cores, on which the factors' gradients are summed on CUDA, cut off what falls below a sum's last place instead of rounding it.
    ulps = 16 if x.is_cuda else 4
    pairs = [*zip(factors, their_factors, strict=True), *[(x_ours, x_theirs)] * float_input]
    for (mine, other), size in zip(pairs, largest_gradients, strict=True):
        assert_same(mine.grad, other.grad, ulps, size=size)
    assert all(parameter.grad is None for parameter in ours.base.parameters())

    target, layers = torch.randn_like(output, dtype=torch.float32), (ours, theirs)
    # eps above its default: Adam divides by the gradient's size, so a last-place difference of a vanishing gradient becomes a whole step
    optimizers = [torch.optim.AdamW(group, lr=1e-2, eps=1e-4) for group in (factors, their_factors)]
    for _ in range(10):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(layer(x).float(), target).backward()
            optimizer.step()
    for mine, other in zip(factors, their_factors, strict=True):
        assert_same(mine.detach(), other.detach(), ulps=100, half_ulps=2)
    if not merge:
        return
    before, largest = ours(x).detach(), sums_of_sizes(ours, x, direction)[0]
    ours.merge()
    theirs.merge()
    assert_same(ours.base.weight.detach(), theirs.get_base_layer().weight.detach(), ulps=100, half_ulps=2)
    # In half precision up to seven roundings part the two ways, each of at most half a ULP of the products' sizes, not of their sum:
    # the merged weight's, the last one's, and those of x·Aᵀ, of its product with B, of the scaled one, of the base and of the sum.
    torch.testing.assert_close(ours(x), before, rtol=0, atol=(16 if x.dtype == torch.float32 else 3.5) * ULP[before.dtype] * largest)


def sums_of_sizes(layer, x, direction):
    """Largest output and gradients (A, B, x if it has one), were all products positive: what their rounding is relative to."""
    positive, x = copy.deepcopy(layer).float(), x.detach().clone()
    x = x.abs().float().requires_grad_() if x.is_floating_point() else x
    for parameter in positive.parameters():
        parameter.data.abs_()
    output = positive(x)
    output.backward(direction.abs().float())
    return [tensor.max().item() for tensor in (output, positive.lora_A.grad, positive.lora_B.grad, *[x.grad] * x.is_floating_point())]


@st.composite
def linears(draw):
    """(base, adapted copy, input)"""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    n_in, n_out, dtype = draw(st.integers(2, 40)), draw(st.integers(2, 40)), draw(st.sampled_from([torch.float32, *HALF]))
    base = nn.Linear(n_in, n_out, bias=draw(st.booleans())).to(dtype)
    r, alpha = draw(st.integers(1, min(n_in, n_out, 9))), draw(st.sampled_from([1, 2.5, 3, 7, 16, 40]))
    ours = fill(LoRALinear(copy.deepcopy(base), r, alpha, use_rslora=draw(st.booleans())))
    if draw(st.booleans()):
        ours.to(dtype)  # factors as narrow as the base; else float32
    return base, ours, torch.randn(*draw(st.sampled_from([(5,), (2, 3), (1, 1), ()])), n_in, dtype=dtype)


@given(linears())
@settings(few, max_examples=40)
def test_linear_equals_peft(case):
    assert_parity(*case)


@st.composite
def convolutions(draw):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    kernel, groups = draw(st.sampled_from([1, 2, 3, (3, 1), (2, 4)])), draw(st.sampled_from([1, 1, 1, 2]))
    c_in, c_out = groups * draw(st.integers(1, 5)), groups * draw(st.integers(2, 6))
    settings_ = dict(stride=draw(st.integers(1, 2)), padding=draw(st.sampled_from([0, 1, 2])), bias=draw(st.booleans()), groups=groups)
    base = nn.Conv2d(c_in, c_out, kernel, **settings_).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    r = groups * draw(st.integers(1, max(1, min(c_in, c_out) // groups)))
    ours = fill(LoRAConv2d(copy.deepcopy(base), r, draw(st.sampled_from([1, 3, 8, 20])), use_rslora=draw(st.booleans())))
    return base, ours, torch.randn(2, c_in, 7, 6, dtype=base.weight.dtype)


@given(convolutions())
@settings(few, max_examples=25)
def test_convolution_equals_peft(case):
    base, ours, x = case
    assert_parity(base, ours, x, merge=base.groups == 1)
    if base.groups > 1:
        with pytest.raises(ValueError, match="groups=2"):
            ours.merge()


@pytest.mark.parametrize("options", [dict(dilation=2), dict(dilation=(1, 3), padding=2), dict(padding="same", dilation=2)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_what_peft_lacks_in_convolutions_merges_exactly(options, padding_mode):
    """peft gives A no dilation and always pads with zeros; with the base's own, merged and unmerged outputs agree."""
    torch.manual_seed(0)
    layer = fill(LoRAConv2d(nn.Conv2d(4, 5, 3, padding_mode=padding_mode, **options), r=3, lora_alpha=7))
    x = torch.randn(2, 4, 12, 12)
    before = layer(x)
    layer.merge()
    assert_same(layer(x), before, ulps=100)


@st.composite
def embeddings(draw):
    torch.manual_seed(draw(st.integers(0, 2**20)))
    n, dim = draw(st.integers(3, 30)), draw(st.integers(2, 20))
    base = nn.Embedding(n, dim, padding_idx=draw(st.sampled_from([None, 1])), scale_grad_by_freq=draw(st.booleans()))
    base.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    ours = LoRAEmbedding(copy.deepcopy(base), draw(st.integers(1, min(n, dim))), draw(st.sampled_from([1, 3, 8, 20])))
    return base, fill(ours), torch.randint(n, draw(st.sampled_from([(4,), (2, 5)])))


@given(embeddings())
@few
def test_embedding_equals_peft(case):
    assert_parity(*case)


@pytest.mark.parametrize("padding_idx, by_frequency", [(1, False), (None, True), (3, True)])
def test_an_embedding_treats_padding_and_frequent_tokens_as_its_base_does(padding_idx, by_frequency):
    torch.manual_seed(0)
    base = nn.Embedding(7, 5, padding_idx=padding_idx, scale_grad_by_freq=by_frequency)
    assert_parity(base, fill(LoRAEmbedding(copy.deepcopy(base), 3, 5)), torch.tensor([[1, 1, 3, 0], [1, 3, 3, 6]]))


@pytest.mark.parametrize("embed_scale", [3.0, torch.tensor(2.5)])
def test_a_scaled_embedding_scales_the_update_too(embed_scale):
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    torch.manual_seed(0)
    base = Scaled(11, 6)
    base.embed_scale = embed_scale
    assert_parity(base, fill(LoRAEmbedding(copy.deepcopy(base), 3, 5)), torch.randint(11, (4, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make, x", [(lambda: nn.Linear(12, 9), (20, 12)), (lambda: nn.Conv2d(3, 4, 3), (4, 3, 8, 8))])
def test_dropout_equals_peft_under_the_same_seed(make, x, dtype):
    torch.manual_seed(3)
    base, x = make().to(dtype), torch.randn(x, dtype=dtype)
    wrapper = LoRALinear if isinstance(base, nn.Linear) else LoRAConv2d
    ours = fill(wrapper(copy.deepcopy(base), 3, 8, lora_dropout=0.4))
    theirs, _ = peft_layer(base, ours, lora_dropout=0.4)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(11)
        results.append(layer(x))
    assert_same(*results)
    assert (results[0] != results[1]).float().mean() < 0.02  # the sum is rounded once, as there: a second rounding shows in many places
    assert not torch.equal(ours(x), results[0])  # another draw
    ours.eval()
    theirs.eval()
    assert_same(ours(x), theirs(x))
    assert torch.equal(ours(x), ours(x))


def test_dropout_keeps_the_expectation_and_spares_the_base():
    torch.manual_seed(0)
    layer = fill(LoRALinear(nn.Linear(30, 4), 2, 3, lora_dropout=0.3))
    x = torch.randn(30)
    with torch.no_grad():
        draws = layer(x.expand(40_000, 30))
        layer.eval()
        error = draws.std(0) / 200  # the standard error of the mean of 40,000 draws
        assert ((draws.mean(0) - layer(x)).abs() < 5 * error).all()
        nn.init.zeros_(layer.lora_B)
        layer.train()
        assert torch.equal(layer(x), layer.base(x))


def test_a_wrapped_layer_is_in_the_mode_of_its_base():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    inject_lora(model, 2, 4, lora_dropout=0.5)
    assert not any(module.training for module in model.modules())


# ---- the start -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_training_begins_at_the_base_and_moves_from_the_first_step(init, dtype):
    torch.manual_seed(0)
    base, x = nn.Linear(16, 8).to(dtype), torch.randn(5, 16, dtype=dtype)
    expected = base(x)
    layer = LoRALinear(base, 4, 10, init=init)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert torch.equal(layer(x), expected) and layer(x).dtype == dtype
    layer(x).square().sum().backward()
    assert layer.lora_B.grad.abs().min() > 0  # B learns at once ...
    assert not layer.lora_A.grad.any()  # ... A from the second step on


def test_statistics_of_the_start():
    torch.manual_seed(0)
    kaiming = LoRALinear(nn.Linear(400, 300), 50, 7).lora_A
    assert kaiming.abs().max() <= 1 / math.sqrt(400)
    assert kaiming.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)  # of 20,000 draws: 0.5 % is one standard error
    gaussian = LoRALinear(nn.Linear(400, 300), 50, 7, init="gaussian").lora_A
    assert gaussian.std().item() == pytest.approx(1 / 50, rel=0.03)
    convolution = LoRAConv2d(nn.Conv2d(20, 60, 5), 40, 7).lora_A
    assert convolution.std().item() == pytest.approx(1 / math.sqrt(3 * 20 * 25), rel=0.03)
    embedding = LoRAEmbedding(nn.Embedding(300, 200), 100, 7)
    assert not embedding.lora_A.any() and embedding.lora_B.std().item() == pytest.approx(1, rel=0.03)


@given(linears())
@settings(few, max_examples=15)
def test_pissa_equals_peft_up_to_sign(case):
    base, other, x = case
    ours = LoRALinear(copy.deepcopy(base), other.r, other.lora_alpha, use_rslora=other.use_rslora, init="pissa")
    theirs, (A, B) = peft_layer(base, ours, copy_factors=False, init_lora_weights="pissa")
    of, size = base.weight.dtype, base.weight.detach().float().abs().max().item()  # peft rounds its factors to the base's dtype on the way
    signs = torch.sign((A * ours.lora_A).sum(1)).detach()  # (r,)
    assert_same((ours.lora_A * signs[:, None]).detach(), A.detach(), ulps=16, half_ulps=2, of=of)
    assert_same((ours.lora_B * signs).detach(), B.detach(), ulps=16, half_ulps=2, of=of)
    assert_same(ours.base.weight.detach(), theirs.get_base_layer().weight.detach(), ulps=16, size=size)
    # The split changes nothing, W = (W − s·B·A) + s·B·A, and what is left is what the first r directions do not explain.
    assert_same((ours.base.weight + ours.delta_weight()).to(of).detach(), base.weight.detach(), ulps=16)
    torch.testing.assert_close(ours(x), base(x), rtol=0, atol=64 * ULP[of] * size * max(1, x.float().norm().item()))
    left = torch.linalg.svdvals(base.weight.float())[ours.r :].norm().item()
    assert torch.linalg.matrix_norm(ours.base.weight.float()).item() == pytest.approx(left, rel=1e-3, abs=16 * ULP[of] * size * 10)


def test_rslora_scale():
    assert LoRALinear(nn.Linear(9, 9), 9, 6).scaling == 6 / 9
    assert LoRALinear(nn.Linear(9, 9), 9, 6, use_rslora=True).scaling == 2.0


# ---- merging -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_merging_rounds_once_and_unmerging_gives_the_weight_back(dtype):
    torch.manual_seed(0)
    layer = fill(LoRALinear(nn.Linear(12, 7).to(dtype), 3, 5))
    weight = layer.base.weight.clone()
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, weight)
    expected = (weight.double() + 5 / 3 * layer.lora_B.double() @ layer.lora_A.double()).float()
    torch.testing.assert_close(layer.weight.float(), expected, rtol=ULP[dtype], atol=1e-6)  # half an ulp of one rounding
    assert not layer(torch.randn(2, 12, dtype=dtype)).requires_grad and trainable_parameters(layer)[0] == 0  # nothing left to train
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, weight) and not layer.weight.requires_grad
    assert layer(torch.randn(2, 12, dtype=dtype)).requires_grad


def test_the_update_of_narrow_factors_is_multiplied_in_float32():
    torch.manual_seed(0)
    layer = fill(LoRALinear(nn.Linear(64, 60).bfloat16(), 32, 5)).bfloat16()
    wide = 5 / 32 * layer.lora_B.double() @ layer.lora_A.double()
    assert layer.delta_weight().dtype == torch.bfloat16
    assert (layer.delta_weight() != wide.bfloat16()).double().mean() < 0.01  # rounded once, from a sum that is nearly exact


def test_merging_twice_and_unmerging_an_unmerged_layer():
    layer = fill(LoRALinear(nn.Linear(4, 4), 2, 3))
    with pytest.raises(ValueError, match="not merged"):
        layer.unmerge()
    layer.merge()
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match="merged already"):
        layer.merge()
    assert torch.equal(layer.weight, weight)


KINDS = [
    (lambda: LoRALinear(nn.Linear(6, 5), 2, 3), torch.randn(4, 6)),
    (lambda: LoRAConv2d(nn.Conv2d(3, 5, 3), 2, 3), torch.randn(2, 3, 6, 6)),
    (lambda: LoRAEmbedding(nn.Embedding(9, 5), 2, 3), torch.arange(9)),
]


@pytest.mark.parametrize("make, x", KINDS, ids=["linear", "convolution", "embedding"])
def test_every_round_trip_of_merging_is_exact(make, x):
    torch.manual_seed(0)
    layer = fill(make()).bfloat16()
    x = x.bfloat16() if x.is_floating_point() else x
    weight, output = layer.base.weight.clone(), layer(x)
    for _ in range(5):
        layer.merge()
        other = copy.deepcopy(layer)
        layer.unmerge()
        other.unmerge()  # a copy can go back on its own
        assert torch.equal(layer.base.weight, weight) and torch.equal(other.base.weight, weight)
        layer.lora_B.data = layer.lora_B.data.flip(0)
    layer.lora_B.data = layer.lora_B.data.flip(0)
    assert torch.equal(layer(x), output) and layer.unmerged_weight is None


def test_the_weight_that_is_kept_follows_casts_and_is_neither_parameter_nor_saved():
    torch.manual_seed(0)
    layer = fill(LoRALinear(nn.Linear(6, 5), 2, 3))
    weight, parameters, keys = layer.base.weight.detach(), list(dict(layer.named_parameters())), list(layer.state_dict())
    layer.merge()
    assert layer.unmerged_weight.data_ptr() == weight.data_ptr()  # held, not copied
    assert list(dict(layer.named_parameters())) == parameters and list(layer.state_dict()) == [*keys[:2], "merged", *keys[2:]]
    layer.double().unmerge()
    assert torch.equal(layer.base.weight, weight.double())


@pytest.mark.parametrize("trained", [("lora_A", "lora_B"), ("lora_B",), ()])
def test_unmerging_thaws_no_factor_that_was_frozen(trained):
    layer = fill(LoRALinear(nn.Linear(6, 5), 2, 3))
    for name in ("lora_A", "lora_B"):
        getattr(layer, name).requires_grad_(name in trained)
    layer.merge()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer.unmerge()
    assert tuple(name for name, parameter in layer.named_parameters() if parameter.requires_grad) == trained


def test_merging_for_good_keeps_no_second_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    inject_lora(model, 2, 3)
    layers, old = list(model), [weakref.ref(layer.base.weight) for layer in model]
    merge_lora(model)
    assert all(reference() is None for reference in old) and all(layer.unmerged_weight is None for layer in layers)
    with pytest.raises(ValueError, match="load the base's own weights again"):
        layers[0].unmerge()
    assert layers[0].merged


class Packed(nn.Module):
    """A linear layer whose weight is not a matrix of real numbers: here, eight bits a weight and one scale."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max().item() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8).flatten().view(torch.uint8), requires_grad=False)

    def dequantized(self):
        return self.weight.view(torch.int8).view(self.out_features, self.in_features) * self.scale

    def forward(self, x):
        return F.linear(x, self.dequantized().to(x.dtype))


class Mergeable(Packed):
    def merge_delta(self, delta):
        dense = nn.Linear(self.in_features, self.out_features)
        dense.weight.data = self.dequantized() + delta
        self.__init__(dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_base_is_trained_and_its_weight_left_alone(dtype):
    torch.manual_seed(0)
    base = Packed(nn.Linear(10, 6))
    stored = base.weight.clone()
    layer = fill(LoRALinear(base, 3, 4))
    x = torch.randn(5, 10, dtype=dtype, requires_grad=True)
    assert_same(layer(x), (base(x) + 4 / 3 * (x.float() @ layer.lora_A.T @ layer.lora_B.T)).to(dtype))
    layer(x).sum().backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None and x.grad is not None
    with pytest.raises(TypeError, match="uint8"):
        layer.merge()
    with pytest.raises(TypeError, match="before quantizing"):
        LoRALinear(base, 2, 4, init="pissa")
    assert torch.equal(base.weight, stored) and not layer.merged


def test_a_packed_base_may_merge_in_its_own_way():
    torch.manual_seed(0)
    layer = fill(LoRALinear(Mergeable(nn.Linear(10, 6)), 3, 4))
    expected = layer.base.dequantized() + layer.delta_weight()
    layer.merge()
    torch.testing.assert_close(layer.base.dequantized(), expected, rtol=0, atol=layer.base.scale / 2 * 1.001)
    model = nn.Sequential(fill(LoRALinear(Mergeable(nn.Linear(10, 6)), 3, 4)))
    assert isinstance(merge_lora(model)[0], Mergeable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_four_bit_layer_of_bitsandbytes_is_a_base(dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=dtype, quant_type="nf4")
    base.load_state_dict(nn.Linear(128, 64).state_dict())
    base, x = base.to("cpu"), torch.randn(4, 128, dtype=dtype)
    base(x)  # quantizes
    ours = fill(LoRALinear(copy.deepcopy(base), 4, 6))
    theirs, factors = peft_layer(base, ours)
    assert_same(ours(x), theirs(x))
    ours(x).sum().backward()
    theirs(x).sum().backward()
    assert_same(ours.lora_A.grad, factors[0].grad)
    assert_same(ours.lora_B.grad, factors[1].grad)
    with pytest.raises(TypeError, match="dequantize it first"):
        ours.merge()


def test_merging_does_not_reach_a_weight_that_another_layer_shares():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 5), "head": nn.Linear(5, 9, bias=False)})
    model["head"].weight = model["embedding"].weight
    table = model["embedding"].weight.clone()
    inject_lora(model, 2, 3, ["embedding"])
    fill(model["embedding"])
    before = model["embedding"](torch.arange(9))
    merge_lora(model)
    assert_same(model["embedding"](torch.arange(9)), before)
    assert torch.equal(model["head"].weight, table)


# ---- memory --------------------------------------------------------------------------------------------------------------------------


def saved_for_backward(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    return saved


@pytest.mark.parametrize("base_dtype, factor_dtype", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
def test_the_input_is_kept_once_for_A_and_never_for_the_base(base_dtype, factor_dtype):
    layer = LoRALinear(nn.Linear(32, 24).to(base_dtype), 3, 4).to(dtype=base_dtype)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(factor_dtype), layer.lora_B.data.to(factor_dtype)
    x = torch.randn(64, 32, dtype=base_dtype, requires_grad=True)
    saved = saved_for_backward(layer, x)
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved) == 1
    rows = [tensor for tensor in saved if tensor.dim() == 2 and 64 in tensor.shape and tensor.data_ptr() != x.data_ptr()]
    assert [tuple(tensor.shape) for tensor in rows] == [(64, 3)]  # besides x only A·x: r numbers a row, no second copy of x, nothing of out
    assert not any(tensor.data_ptr() == x.data_ptr() for tensor in saved_for_backward(layer.base, x))
    full = nn.Linear(32, 24).to(base_dtype)
    assert sum(tensor.data_ptr() == x.data_ptr() for tensor in saved_for_backward(full, x)) == 1  # what full fine-tuning keeps


def test_layers_that_share_an_input_keep_it_once():
    """Query, key and value read the same bfloat16 tensor. peft keeps a float32 copy for each."""
    x = torch.randn(64, 32, dtype=torch.bfloat16)
    query, key = (LoRALinear(nn.Linear(32, 32).bfloat16(), 3, 4) for _ in range(2))
    saved = [
        tensor for layer in (query, key) for tensor in saved_for_backward(layer, x) if 64 in tensor.shape
    ]  # held, so no address repeats
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in saved}
    assert sum(kept.values()) == x.nbytes + 2 * 64 * 3 * 4
    theirs, _ = peft_layer(query.base, query)
    assert sum(tensor.nbytes for tensor in saved_for_backward(theirs, x) if tensor.shape == x.shape) == 2 * x.nbytes


def test_autocast_equals_peft():
    torch.manual_seed(0)
    base = nn.Linear(12, 9)
    ours = fill(LoRALinear(copy.deepcopy(base), 3, 4))
    theirs, factors = peft_layer(base, ours)
    for x in (torch.randn(4, 12), torch.randn(4, 12, dtype=torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            output, expected = ours(x), theirs(x)
        assert_same(output, expected)
        output.sum().backward()
        expected.sum().backward()
        assert_same(ours.lora_A.grad, factors[0].grad)
        assert_same(ours.lora_B.grad, factors[1].grad)


# ---- whole models --------------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x))


TARGETS = [
    "all-linear",
    ["q_proj", "v_proj"],
    ["query", "value", "classifier"],
    ["model.layers.1.mlp.up_proj"],
    ["0", "head"],
    ["roj"],
    r".*layers\.0.*(q|down)_proj",
    r".*attention\.self\.(query|key)",
    "q_proj",
    "lm_head",
    r"block\.\d",
    ["embed_tokens", "word_embeddings"],
]


@pytest.mark.parametrize("target_modules", TARGETS, ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, MLP])
def test_target_rules_are_pefts(make, target_modules):
    ours, theirs = make(), make()
    try:
        peft_model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=3, target_modules=target_modules)).base_model.model
    except ValueError:
        with pytest.raises(ValueError):
            inject_lora(ours, 2, 3, target_modules)
        assert not list(lora_layers(ours)) and trainable_parameters(ours)[0] == trainable_parameters(make())[0]
        return
    names = inject_lora(ours, 2, 3, target_modules)
    assert names == [name for name, module in peft_model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    trainable = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{factor}" for name in names for factor in ("lora_A", "lora_B")} == set(lora_state_dict(ours))
    assert trainable_parameters(ours)[0] == sum(p.numel() for p in peft_model.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_trains_as_under_peft_and_merges(make, dtype):
    torch.manual_seed(0)
    base = make().to(dtype).eval()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    inject_lora(ours, 3, 5, use_rslora=True)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True))
    pairs = [(fill(layer), theirs.base_model.model.get_submodule(name)) for name, layer in lora_layers(ours)]
    for mine, other in pairs:
        other.lora_A["default"].weight.data = mine.lora_A.data.clone()
        other.lora_B["default"].weight.data = mine.lora_B.data.clone()
    ids = torch.randint(40, (2, 9))
    logits, expected = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert_same(logits, expected, ulps=16, half_ulps=2)
    logits.float().square().sum().backward()
    expected.float().square().sum().backward()
    for mine, other in pairs:
        assert_same(mine.lora_A.grad, other.lora_A["default"].weight.grad, ulps=64, half_ulps=2, of=dtype)
        assert_same(mine.lora_B.grad, other.lora_B["default"].weight.grad, ulps=64, half_ulps=2, of=dtype)
    merged = merge_lora(ours)
    assert merged is ours and type(ours) is type(base)
    assert list(ours.state_dict()) == list(base.state_dict()) and not list(lora_layers(ours))
    if dtype == torch.float32:
        assert_same(ours(input_ids=ids).logits, logits, ulps=1000)  # twelve layers of sums in another order
    for name, weight in theirs.merge_and_unload().state_dict().items():
        assert_same(ours.state_dict()[name], weight, ulps=8)


def test_a_layer_with_two_names_is_wrapped_once_for_both():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": shared, "inner": nn.ModuleDict({"second": shared}), "other": nn.Linear(6, 6)})
    assert inject_lora(model, 2, 3, ["second"]) == ["first"]
    assert model["first"] is model["inner"]["second"] and isinstance(model["first"], LoRALinear)
    assert list(lora_state_dict(model)) == ["first.lora_A", "first.lora_B"]
    merge_lora(model)
    assert model["first"] is shared and model["inner"]["second"] is shared


def test_a_layer_twice_in_one_parent():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert inject_lora(model, 2, 3) == ["0"]
    assert model[0] is model[2] and isinstance(model[2], LoRALinear)


def test_tied_weights_stay_tied_where_only_the_layers_around_them_are_adapted():
    model = tiny_llama(tie_word_embeddings=True)
    names = inject_lora(model, 2, 3)
    assert "lm_head" not in names and model.lm_head.weight is model.model.embed_tokens.weight
    merge_lora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_second_injection_adds_to_the_first():
    model = tiny_llama()
    inject_lora(model, 2, 3, ["q_proj"])
    inject_lora(model, 4, 3, ["up_proj"])
    assert {layer.r for _, layer in lora_layers(model)} == {2, 4}
    assert all(layer.lora_A.requires_grad for _, layer in lora_layers(model))
    with pytest.raises(ValueError, match="wrapped already"):
        inject_lora(model, 2, 3, ["q_proj", "k_proj"])
    with pytest.raises(ValueError, match="wrapped already"):
        inject_lora(model, 2, 3)
    with pytest.raises(ValueError, match="matches no layer"):
        inject_lora(model, 2, 3, ["base", "lora_dropout"])  # what is inside an adapted layer is not there
    assert len(list(lora_layers(model))) == 4


def test_torch_s_own_transformer_sees_the_update_in_eval_mode():
    """Its fast path reads the layers' weights instead of calling them; and attention never calls its output projection."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        plain = model(x)
    names = inject_lora(model, 2, 3)
    assert names == [f"layers.{layer}.linear{i}" for layer in range(2) for i in (1, 2)]
    with pytest.raises(ValueError, match="MultiheadAttention"):
        inject_lora(model, 2, 3, ["out_proj"])
    for _, layer in lora_layers(model):
        fill(layer)
    slow = model(x)
    with torch.no_grad():
        fast = model(x)
        padded = model(x, src_key_padding_mask=padding)
    assert_same(fast, slow, ulps=16)
    assert (fast - plain).abs().max() > 0.1
    merge_lora(model)
    assert_same(model(x), slow.detach(), ulps=200)
    assert_same(model(x, src_key_padding_mask=padding)[1, :3], padded[1, :3], ulps=200)


def fast_calls(model, x, monkeypatch):
    """How often torch's fast path runs in one evaluation of ``model``."""
    calls, fast = [], torch._transformer_encoder_layer_fwd
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *arguments: calls.append(1) or fast(*arguments))
        model(x)
    return len(calls)


def test_a_merged_transformer_of_torch_s_has_its_fast_path_again(monkeypatch):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 8)
    assert fast_calls(model, x, monkeypatch) == 2
    inject_lora(model, 2, 3)
    assert fast_calls(model, x, monkeypatch) == 0
    merge_lora(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert fast_calls(model, x, monkeypatch) == 2


def test_a_packed_layer_in_torch_s_transformer_is_called_before_and_after_merging(monkeypatch):
    """The fast path would multiply by its codes."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    replace_layers(model, {model.linear1: NF4Linear.from_linear(model.linear1)})
    x = torch.randn(2, 5, 8)
    for _ in range(3):
        inject_lora(model, 2, 3, ["linear1"])
        assert fast_calls(model, x, monkeypatch) == 0
        merge_lora(model)
        assert fast_calls(model, x, monkeypatch) == 0 and len(model.linear1._forward_pre_hooks) == 1


def adapted_mlp(seed=0, merged=False):
    torch.manual_seed(seed)
    model = MLP()
    inject_lora(model, 2, 3)
    for _, layer in lora_layers(model):
        fill(layer)
        if merged:
            layer.merge()
    return model


def test_a_merged_state_is_loaded_as_merged():
    """Its weights hold the update; taken for the base's own, it would count twice."""
    merged, fresh, x = adapted_mlp(merged=True), adapted_mlp(seed=1), torch.randn(4, 6)
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(x), merged(x)) and all(layer.merged for _, layer in lora_layers(fresh))
    assert trainable_parameters(fresh)[0] == 0 and list(fresh.state_dict()) == list(merged.state_dict())
    with pytest.raises(ValueError, match="load the base's own weights again"):  # the base's own weight is in no file
        fresh.head.unmerge()
    again = adapted_mlp(seed=2, merged=True)  # what it keeps is not the weight of before this merge
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(x), merged(x))
    with pytest.raises(ValueError, match="load the base's own weights again"):
        again.head.unmerge()


def test_an_unmerged_state_is_loaded_as_unmerged():
    plain, merged, x = adapted_mlp(), adapted_mlp(seed=1, merged=True), torch.randn(4, 6)
    assert not any("merged" in key for key in plain.state_dict())  # so the states of before this entry are read alike
    merged.load_state_dict(plain.state_dict())
    assert torch.equal(merged(x), plain(x)) and not any(layer.merged for _, layer in lora_layers(merged))
    assert trainable_parameters(merged) == trainable_parameters(plain)
    merged.head.merge()
    merged.head.unmerge()
    assert torch.equal(merged(x), plain(x))


def test_factors_alone_are_loaded_beside_the_base_s_own_weight():
    plain, merged, x = adapted_mlp(), adapted_mlp(merged=True), torch.randn(4, 6)
    for _, layer in lora_layers(plain):
        fill(layer)
    merged.load_state_dict(lora_state_dict(plain), strict=False)
    assert torch.equal(merged(x), plain(x))
    assert not any("merged" in key for key in lora_state_dict(adapted_mlp(merged=True)))


def test_a_merged_four_bit_layer_is_loaded_as_merged():
    torch.manual_seed(0)
    layers = [fill(LoRALinear(NF4Linear.from_linear(nn.Linear(64, 8)), 2, 3)) for _ in range(2)]
    layers[0].merge()
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(4, 64)
    assert torch.equal(layers[1](x), layers[0](x)) and layers[1].merged


def test_copies_pickles_state_dicts_and_moves_work():
    torch.manual_seed(0)
    model = MLP()
    inject_lora(model, 2, 3)
    for _, layer in lora_layers(model):
        fill(layer)
    x = torch.randn(4, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    fresh = MLP()
    inject_lora(fresh, 2, 3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert fresh.head.in_features == 8 and fresh.head.bias is fresh.head.base.bias
    assert model.double()(x.double()).dtype == torch.float64
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fresh.head.no_such_thing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_traces_the_layer_in_one_graph(dtype):
    torch.manual_seed(0)
    layer = fill(LoRALinear(nn.Linear(6, 5).to(dtype), 2, 3))
    x = torch.randn(4, 6, dtype=dtype)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.lora_A.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_gradient(dtype):
    torch.manual_seed(0)
    layer, x = fill(LoRALinear(nn.Linear(6, 5).to(dtype), 2, 3)), torch.randn(4, 6, dtype=dtype)
    gradients = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        run(x).sum().backward()
        gradients.append([layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_per_example_gradients_work():
    """torch.func over the layer, as exact Fisher information needs it."""
    layer = fill(LoRALinear(nn.Linear(6, 5), 2, 3))
    factors = {name: parameter.detach() for name, parameter in layer.named_parameters() if parameter.requires_grad}
    loss = lambda parameters, x: torch.func.functional_call(layer, parameters, (x,)).square().sum()  # noqa: E731
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(factors, torch.randn(4, 6))
    assert gradients["lora_A"].shape == (4, 2, 6)


# ---- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(r=0), "r must be at least 1"),
        (dict(r=5, init="pissa"), "r must be from 1 to 4"),
        (dict(r=-1), "r must be at least 1"),
        (dict(r=2.0), "r must be an integer"),
        (dict(r=True), "r must be an integer"),
        (dict(lora_alpha=0), "lora_alpha"),
        (dict(lora_alpha=float("nan")), "lora_alpha"),
        (dict(lora_alpha="16"), "lora_alpha"),
        (dict(lora_dropout=1.0), "lora_dropout"),
        (dict(lora_dropout=-0.1), "lora_dropout"),
        (dict(lora_dropout=float("nan")), "lora_dropout"),
        (dict(init="zeros"), "init"),
    ],
)
def test_arguments_out_of_range_change_nothing(options, words):
    options = {"r": 2, "lora_alpha": 3} | options
    linear = nn.Linear(4, 6)
    with pytest.raises((ValueError, TypeError), match=words):
        LoRALinear(linear, **options)
    assert linear.weight.requires_grad
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(4, 6))  # the first one could be wrapped; the second is found out before it is
    with pytest.raises((ValueError, TypeError), match=words):
        inject_lora(model, **options)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_pissa_finds_a_broken_weight_before_it_touches_another():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = math.inf
    weight = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"1: .*NaN or infinity"):
        inject_lora(model, 2, 3, init="pissa")
    assert torch.equal(model[0].weight, weight) and type(model[0]) is nn.Linear
    convolutions = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match="linear layers only"):
        inject_lora(convolutions, 2, 3, ["0", "1"], init="pissa")
    assert type(convolutions[0]) is nn.Linear


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_adapter_is_not_merged(broken):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_lora(model, 2, 3)
    fill(model[0])
    fill(model[1]).lora_A.data[1, 1] = broken
    weights = [layer.base.weight.clone() for layer in model]
    with pytest.raises(ValueError, match=r"1: .*NaN or infinity"):
        merge_lora(model)
    with pytest.raises(ValueError, match="NaN or infinity"):
        model[1].merge()
    assert not model[0].merged and not model[1].merged
    assert all(torch.equal(layer.base.weight, weight) for layer, weight in zip(model, weights, strict=True))


def test_a_merge_that_overflows_float16_is_refused():
    layer = fill(LoRALinear(nn.Linear(4, 4).half(), 2, 1e6))
    with pytest.raises(ValueError, match="infinity"):
        layer.merge()
    assert torch.isfinite(layer.weight).all() and not layer.merged


def test_the_wrong_kind_of_base():
    for wrapper, base in [
        (LoRALinear, nn.LayerNorm(4)),
        (LoRALinear, nn.Conv2d(4, 4, 1)),
        (LoRAConv2d, nn.Linear(4, 4)),
        (LoRAEmbedding, "x"),
    ]:
        with pytest.raises(TypeError, match="base must be"):
            wrapper(base, 2, 3)
    with pytest.raises(ValueError, match="wrapped already"):
        LoRALinear(LoRALinear(nn.Linear(4, 4), 2, 3), 2, 3)
    with pytest.raises(ValueError, match="max_norm"):
        LoRAEmbedding(nn.Embedding(4, 4, max_norm=1.0), 2, 3)
    with pytest.raises(ValueError, match="groups"):
        LoRAConv2d(nn.Conv2d(4, 4, 1, groups=2), 3, 3)


def test_targets_that_cannot_be():
    with pytest.raises(ValueError, match=r"matches no layer.*block\.0, block\.2, head"):
        inject_lora(MLP(), 2, 3, ["q_proj"])
    with pytest.raises(ValueError, match="matches no layer"):
        inject_lora(MLP(), 2, 3, [])
    with pytest.raises(ValueError, match="block is a Sequential"):
        inject_lora(MLP(), 2, 3, ["block"])
    with pytest.raises(ValueError, match="not a regular expression"):
        inject_lora(MLP(), 2, 3, "(block")
    with pytest.raises(ValueError, match=r"LoRALinear\(model, r, lora_alpha\)"):
        inject_lora(nn.Linear(4, 4), 2, 3)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_lora(MLP())
    with pytest.raises(ValueError, match="take its base"):
        merge_lora(LoRALinear(nn.Linear(4, 4), 2, 3))


def test_the_benchmark_runs_at_a_small_size():
    result = lora_layer.measure(small=True)
    for row in result["training"].values():
        assert set(row["milliseconds"]) == {"ours", "peft", "frozen layer", "full training"} and row["ratio"] > 0
    kept = result["training"]["float32 factors, α/r = 2"]["kept_bytes"]
    assert kept["ours"] == 32 * 16 * 4  # A·x; peft keeps a float32 copy of x (32 × 64) as well
    assert kept["peft"] == 32 * 16 * 4 + 32 * 64 * 4


# ---- CUDA ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])  # float16 has no room for Adam's squared gradients
@pytest.mark.parametrize("alpha", [32, 5])
def test_cuda_equals_peft(dtype, factor_dtype, alpha):
    if factor_dtype.itemsize < 4 and dtype != factor_dtype:
        pytest.skip("factors are float32 or of the layer's dtype")
    torch.manual_seed(0)
    base = nn.Linear(192, 320, device="cuda", dtype=dtype)
    ours = LoRALinear(copy.deepcopy(base), 16, alpha)
    with torch.no_grad():
        ours.lora_A.normal_(std=0.05)
        ours.lora_B.normal_(std=0.05)
    ours.to(factor_dtype)
    ours.base.to(dtype)
    assert_parity(base, ours, torch.randn(3, 65, 192, device="cuda", dtype=dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", HALF)
def test_cuda_convolution_and_embedding_equal_peft(dtype):
    torch.manual_seed(0)
    base = nn.Conv2d(16, 24, 3, padding=1, device="cuda", dtype=dtype)
    ours = LoRAConv2d(copy.deepcopy(base), 4, 8)
    nn.init.normal_(ours.lora_B, std=0.1)
    assert_parity(base, ours, torch.randn(2, 16, 9, 9, device="cuda", dtype=dtype))
    base = nn.Embedding(50, 24, device="cuda", dtype=dtype)
    ours = LoRAEmbedding(copy.deepcopy(base), 4, 8)
    nn.init.normal_(ours.lora_A, std=0.1)
    assert_parity(base, ours, torch.randint(50, (4, 7), device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_of_activations_is_the_input_once():
    """Forward of a bfloat16 layer with float32 factors: beyond the output, what stays is A·x, not a copy of x."""
    layer = LoRALinear(nn.Linear(2048, 2048, device="cuda", dtype=torch.bfloat16), 16, 32)
    x = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x)  # workspaces of the library
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    assert torch.cuda.memory_allocated() - before - y.nbytes <= 4096 * 16 * 4 + 2**20
