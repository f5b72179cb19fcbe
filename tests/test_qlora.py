"""reference.qlora against bitsandbytes and peft: the layer, its gradient, whole models in place; its properties; its errors."""

import copy
import itertools
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import ULP, assert_same, tiny_bert, tiny_llama
from qlora_helpers import Block, bnb_linear, both, factors_of, train
from torch import nn

from course.lab import models
from course.lab.live import LiveBytes, SavedForBackward, module_bytes
from reference.adapter_format import load_adapter, save_adapter
from reference.lora import LoRALinear, inject_lora, lora_layers, merge_lora
from reference.nf4 import quantize_nf4
from reference.qlora import NF4Linear, merge_into_dequantized, quantize_linears
from reference.qlora.product import NF4Product

pytestmark = pytest.mark.filterwarnings(
    "ignore:Merge lora module", "ignore:`is_gradient_checkpointing`", "ignore:Initializing zero-element"
)
few = settings(max_examples=25)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes, double_quants = st.sampled_from(DTYPES), st.booleans()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dense(layer, dtype=None):
    """The plain layer that ``layer`` computes: its dequantized weight and its bias."""
    weight = layer.dequantize(dtype or layer.compute_dtype)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=weight.dtype, device=weight.device)
    linear.weight.data = weight
    if layer.bias is not None:
        linear.bias.data = layer.bias.detach().to(weight.dtype)
    return linear


def state(layer):
    return [tensor for tensor in (layer.weight, layer.absmax, layer.nested_absmax, layer.offset) if tensor is not None]


def unchanged(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


# ---- the layer -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, compute_dtype, double_quant, bias", itertools.product(DTYPES, DTYPES, (True, False), (True, False)))
def test_forward_equals_bitsandbytes_bit_for_bit(dtype, compute_dtype, double_quant, bias):
    """The same product of the same numbers. Rows are whole blocks, beyond which bitsandbytes' CPU path decodes wrongly."""
    linear = nn.Linear(192, 96, bias).to(dtype)
    ours = NF4Linear.from_linear(linear, 64, double_quant, compute_dtype)
    theirs = bnb_linear(linear, 64, double_quant, compute_dtype)
    x = torch.randn(2, 5, 192, dtype=dtype)
    assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == dtype
    assert ours.dtype == dtype and ours.dequantize().dtype == dtype
    assert ours.weight.dtype == torch.uint8 and torch.equal(ours.weight, theirs.weight.data)
    if dtype == compute_dtype or dtype == torch.float32:
        x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        direction = torch.randn_like(ours(x))
        ours(x_ours).backward(direction)
        theirs(x_theirs).backward(direction)
        if dtype == compute_dtype:
            assert torch.equal(x_ours.grad, x_theirs.grad)
        else:  # theirs multiplies by the weight rounded to the compute dtype as well, but from the original dtype
            assert_same(x_ours.grad, x_theirs.grad, half_ulps=2, of=compute_dtype)


def test_bitsandbytes_goes_backward_through_a_rounder_weight_than_forward():
    """bfloat16 weights, float32 compute: its forward decodes to float32, its backward to bfloat16. Ours uses one weight for both."""
    linear = nn.Linear(128, 64, bias=False).to(torch.bfloat16)
    ours, theirs = NF4Linear.from_linear(linear, compute_dtype=torch.float32), bnb_linear(linear)
    x, direction = torch.randn(3, 128), torch.randn(3, 64)
    assert torch.equal(ours(x), theirs(x))
    for layer, dtype in ((ours, torch.float32), (theirs, torch.bfloat16)):
        layer(leaf := x.clone().requires_grad_()).backward(direction)
        assert torch.equal(leaf.grad, direction @ ours.dequantize(dtype).float())


@few
@given(
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 70),
    block_size=st.sampled_from([2, 16, 64, 256]),
    double_quant=double_quants,
    bias=st.booleans(),
    dtype=dtypes,
    batch=st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 1, 2)]),
)
def test_any_shape_is_the_dense_layer_with_the_dequantized_weight(out_features, in_features, block_size, double_quant, bias, dtype, batch):
    linear = nn.Linear(in_features, out_features, bias).to(dtype)
    layer = NF4Linear.from_linear(linear, block_size, double_quant, dtype)
    twin = dense(layer)
    x, x_twin = (torch.randn(*batch, in_features, dtype=dtype, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    y, expected = layer(x.requires_grad_()), twin(x_twin.requires_grad_())
    assert torch.equal(y, expected)
    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction)
    if x.numel():
        assert_same(x.grad, x_twin.grad)
    if bias:
        assert_same(layer.bias.grad, twin.bias.grad)
    assert layer.weight.grad is None
    q = quantize_nf4(linear.weight, block_size)
    assert torch.equal(layer.weight, q.packed)
    if not double_quant:
        assert torch.equal(layer.absmax, q.absmax)


@pytest.mark.parametrize("double_quant, bias, shape", itertools.product((True, False), (True, False), ((3, 10), (2, 3, 10), (10,))))
def test_gradients_are_right_in_float64(double_quant, bias, shape):
    layer = NF4Linear.from_linear(nn.Linear(10, 7, bias), 16, double_quant, torch.float64).double()
    twin, x = dense(layer), torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def with_bias(x, bias=None):
        return NF4Product.apply(x, bias, layer.quantized)

    inputs = (x,) if layer.bias is None else (x, layer.bias)
    assert torch.autograd.gradcheck(with_bias, inputs)
    assert torch.autograd.gradgradcheck(with_bias, inputs)
    # both sum ten products, in another order
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-14, atol=1e-14)
    (ours,), (theirs,) = (torch.autograd.grad(model(x).pow(3).sum(), x) for model in (layer, twin))
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("double_quant", [True, False])
def test_what_is_kept_for_backward_is_the_packed_weight(double_quant):
    layer = NF4Linear.from_linear(nn.Linear(256, 512), 64, double_quant, torch.float32)
    x = torch.randn(8, 256, requires_grad=True)
    with SavedForBackward() as saved:
        layer(x)
    own = {tensor.data_ptr() for tensor in state(layer)}
    assert {tensor.data_ptr() for tensor in saved.tensors} == own  # by reference, and nothing else: not even x
    n = 256 * 512
    assert saved.bytes == (n / 2 + n / 64 + 4 * n / 64 / 256 + 4 if double_quant else n / 2 + 4 * n / 64)
    with SavedForBackward(layer) as saved, LiveBytes() as live:
        y = layer(x)
        assert saved.bytes == 0
        assert live.bytes == y.nbytes  # what the forward leaves behind: its output
    with SavedForBackward() as saved:
        F.linear(x, layer.dequantize(torch.float32))
    assert saved.bytes == 4 * n  # the naive way: a dense copy for every layer, until the backward


def test_nothing_is_kept_where_no_gradient_is_wanted():
    layer = NF4Linear.from_linear(nn.Linear(32, 16, bias=False))
    with SavedForBackward() as saved:
        y = layer(torch.randn(4, 32))
    assert not y.requires_grad and not saved.tensors


def test_only_the_bias_wants_a_gradient():
    layer = NF4Linear.from_linear(nn.Linear(12, 5), compute_dtype=torch.float32)
    layer(torch.randn(2, 3, 12)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((5,), 6.0))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_gradient(reentrant, compute_dtype):
    layer = LoRALinear(NF4Linear.from_linear(nn.Linear(64, 48), compute_dtype=compute_dtype), 4, 6)
    nn.init.normal_(layer.lora_B)
    results = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        run(x).square().sum().backward()
        results.append([x.grad, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_compute_dtype_alone(compute_dtype):
    layer = NF4Linear.from_linear(nn.Linear(64, 48), compute_dtype=compute_dtype)
    results = []
    for enabled in (False, True):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
            y.square().sum().backward()
        results.append((y.detach(), x.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert results[1][0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
        adapted = LoRALinear(layer, 2, 6)
        adapted(torch.randn(5, 64)).sum().backward()
    assert adapted.lora_B.grad.abs().sum() > 0


def test_casts_and_moves_leave_codes_and_scales_alone():
    for double_quant in (True, False):
        layer = NF4Linear.from_linear(nn.Linear(70, 33), 64, double_quant)
        before = [tensor.clone() for tensor in state(layer)]
        moves = (
            lambda m: m.half(),
            lambda m: m.bfloat16(),
            lambda m: m.to(torch.float16),
            lambda m: m.double(),
            lambda m: m.to("cpu", torch.bfloat16),
            lambda m: m.type(torch.float32),
            lambda m: m.float(),
            lambda m: m.cpu(),
            copy.deepcopy,
            lambda m: pickle.loads(pickle.dumps(m)),
        )
        for move in moves:
            layer = move(layer)
            assert isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad
            assert all(new.dtype == old.dtype and torch.equal(new, old) for new, old in zip(state(layer), before, strict=True))
        assert layer.bias.dtype == torch.float32  # the bias is an ordinary parameter
        meta = copy.deepcopy(layer).to("meta")
        assert all(new.is_meta and new.dtype == old.dtype for new, old in zip(state(meta), before, strict=True))
        assert [p.dtype for p in layer.parameters()] == [torch.uint8, torch.float32]


def test_the_layer_shares_the_bias_and_leaves_the_linear_as_it_was():
    linear = nn.Linear(20, 10).eval()
    before = linear.weight.detach().clone()
    layer = NF4Linear.from_linear(linear)
    assert layer.bias is linear.bias and torch.equal(linear.weight, before) and not layer.training
    assert "block_size=64" in repr(layer) and "double_quant=True" in repr(layer)


def test_an_empty_layer_holds_zeros():
    for double_quant in (True, False):
        layer = NF4Linear(30, 20, double_quant=double_quant, block_size=32)
        assert torch.equal(layer.dequantize(), torch.zeros(20, 30, dtype=torch.bfloat16))


def test_a_large_weight_goes_in_pieces_and_comes_out_whole(monkeypatch):
    weight = torch.randn(37, 101)
    for double_quant in (True, False):
        whole = NF4Linear.from_weight(weight, None, 64, double_quant)
        with monkeypatch.context() as patch:
            patch.setattr("reference.qlora.product.PIECE", 256)
            pieces = NF4Linear.from_weight(weight, None, 64, double_quant)
            assert all(torch.equal(*pair) for pair in zip(state(whole), state(pieces), strict=True))
            restored = pieces.dequantize(torch.float32)
        assert torch.equal(restored, whole.dequantize(torch.float32))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: NF4Linear.from_linear(nn.Linear(8, 8), 48), ValueError, "power of two"),
        (lambda: NF4Linear.from_linear(nn.Linear(8, 8), 1), ValueError, "at least 2"),
        (lambda: NF4Linear.from_linear(nn.Linear(8, 8), compute_dtype=torch.int8), TypeError, "compute_dtype"),
        (lambda: NF4Linear.from_linear(nn.Linear(8, 8), compute_dtype="bfloat16"), TypeError, "compute_dtype"),
        (lambda: NF4Linear.from_linear(nn.Conv1d(8, 8, 1)), TypeError, "nn.Linear"),
        (lambda: NF4Linear.from_linear(nn.Linear(8, 8, dtype=torch.float64)), TypeError, "float32, float16 or bfloat16"),
        (lambda: NF4Linear.from_linear(nn.Linear(8, 8, device="meta")), ValueError, "meta device"),
        (lambda: NF4Linear.from_linear(NF4Linear.from_linear(nn.Linear(8, 8))), TypeError, "nn.Linear"),
        (lambda: NF4Linear.from_linear(nn.Linear(8, 8))(torch.ones(2, 8, dtype=torch.int64)), TypeError, "floating"),
        (lambda: NF4Linear.from_linear(nn.Linear(8, 8))(torch.ones(2, 9)), RuntimeError, "shape"),
        (lambda: NF4Linear.from_linear(nn.Linear(8, 6)).merge_delta(torch.ones(8, 6)), ValueError, "shape"),
    ],
)
def test_wrong_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ---- QLoRA: the LoRA layer over it ---------------------------------------------------------------------------------------------------


def test_the_lora_layer_takes_it_as_a_base():
    base = NF4Linear.from_linear(nn.Linear(40, 30), compute_dtype=torch.float32)
    layer = LoRALinear(base, 3, 7)
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.dtype == torch.float32 and layer.lora_A.shape == (3, 40)
    x = torch.randn(4, 40, requires_grad=True)
    twin, expected = dense(base), None
    expected = twin(x) + 7 / 3 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert base.weight.grad is None and base.bias.grad is None and layer.lora_B.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="before quantizing"):
        LoRALinear(base, 3, 7, init="pissa")


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["tiny model", "Llama block"])
def test_ten_steps_equal_peft_and_bitsandbytes_bit_for_bit(kind, compute_dtype, double_quant):
    """On one CPU both sides run the same products on the same numbers, so there is nothing to tolerate. alpha is 2.5 times the rank."""
    if kind == "tiny model":
        model, ids = models.load("tiny", where=torch.device("cpu"))[0], torch.randint(200, (10, 2, 12))

        def loss(model, step):
            return model(input_ids=ids[step], labels=ids[step]).loss
    else:
        model, x, target = Block(), torch.randn(10, 2, 8, 128), torch.randn(10, 2, 8, 128)

        def loss(model, step):
            return F.mse_loss(model(x[step]), target[step])

    ours, theirs, pairs = both(model, 4, 10, double_quant, compute_dtype)
    losses = train(ours, loss)
    assert losses == train(theirs, loss)
    assert losses[-1] < losses[0]
    for mine, other in pairs:
        for a, b in zip((mine.lora_A, mine.lora_B), factors_of(other), strict=True):
            assert torch.equal(a, b)
    if kind == "Llama block":
        for mine, other in pairs:
            mine.merge()
            other.merge()
            assert torch.equal(mine.base.weight, other.get_base_layer().weight.data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_block_trains_as_under_peft(dtype):
    """Half-precision weights, activations and compute, float32 factors on both sides."""
    x, target = torch.randn(10, 2, 8, 128, dtype=dtype), torch.randn(10, 2, 8, 128)
    ours, theirs, pairs = both(Block().to(dtype), 4, 10, True, dtype)

    def loss(model, step):
        return F.mse_loss(model(x[step]).float(), target[step])

    first, second = train(ours, loss), train(theirs, loss)
    assert first == pytest.approx(second, rel=4 * ULP[dtype])  # ours adds in float32 and rounds once, peft rounds the update first
    for mine, other in pairs:
        for a, b in zip((mine.lora_A, mine.lora_B), factors_of(other), strict=True):
            assert_same(a.detach(), b.detach(), half_ulps=16, of=dtype)


def test_its_adapter_goes_to_a_file_and_onto_another_quantized_model(tmp_path):
    model = tiny_llama()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        quantize_linears(one, compute_dtype=torch.float32)
    inject_lora(model, 2, 5)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path)
    load_adapter(twin, tmp_path)
    ids = torch.randint(40, (2, 9))
    assert torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits)


# ---- whole models --------------------------------------------------------------------------------------------------------------------


def test_a_model_is_quantized_in_place():
    model = tiny_llama()
    before = snapshot(model)
    names = quantize_linears(model, block_size=16, compute_dtype=torch.float32)
    assert names == [n for n, m in tiny_llama().named_modules() if type(m) is nn.Linear and n != "lm_head"] and len(names) == 14
    for name, module in model.named_modules():
        assert isinstance(module, NF4Linear) == (name in names)
        assert (type(module) is nn.Linear) == (name == "lm_head")
    for key, value in before.items():
        if key.removesuffix(".weight") not in names:
            assert torch.equal(model.state_dict()[key], value)
    adapted = inject_lora(model, 2, 5)
    assert adapted == names
    ids = torch.randint(40, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "skip, left",
    [
        ((), 0),
        (("lm_head",), 1),
        ("lm_head", 1),
        (("q_proj",), 2),
        (("self_attn",), 8),
        (("layers.1",), 7),
        (("model.layers.0.mlp.up_proj",), 1),
        (("proj", "up", "nothing"), 0),
    ],
)
def test_skip_names_layers_or_parts_of_names(skip, left):
    model = tiny_llama()
    assert len(quantize_linears(model, skip=skip)) == 15 - left
    assert sum(type(m) is nn.Linear for m in model.modules()) == left


def test_a_layer_with_two_names_is_quantized_once():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"first": shared, "inner": nn.ModuleDict({"second": shared}), "other": nn.Linear(6, 6)})
    assert quantize_linears(model) == ["first", "other"]
    assert model["first"] is model["inner"]["second"] and isinstance(model["first"], NF4Linear)


def test_a_tied_head_is_quantized_and_the_embedding_stays():
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = model.model.embed_tokens.weight.detach().clone()
    quantize_linears(model, skip=())
    assert torch.equal(model.model.embed_tokens.weight, before) and isinstance(model.lm_head, NF4Linear)


def test_what_is_quantized_already_is_left_and_the_rest_done():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0] = first = NF4Linear.from_linear(model[0], 16)
    assert quantize_linears(model) == ["1"] and model[0] is first
    with pytest.raises(ValueError, match="2 layers that are quantized already"):
        quantize_linears(model)


def test_layers_that_are_no_plain_linear_are_left():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    assert quantize_linears(model, compute_dtype=torch.float32) == ["linear1", "linear2"]  # the attention reads its weights itself
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), model.train()(x), rtol=1e-5, atol=1e-5)  # no fast path past the layers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_named_and_nothing_is_changed(value):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        quantize_linears(model)
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(block_size=48), ValueError, "power of two"),
        (dict(block_size=1), ValueError, "at least 2"),
        (dict(block_size=64.0), TypeError, "integer"),
        (dict(compute_dtype=torch.int32), TypeError, "compute_dtype"),
        (dict(skip=("model", "lm_head")), ValueError, "no nn.Linear"),
    ],
)
def test_wrong_options_change_nothing(options, error, words):
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(error, match=words):
        quantize_linears(model, **options)
    assert unchanged(model, before)


def test_models_that_cannot_be():
    with pytest.raises(ValueError, match="from_linear"):
        quantize_linears(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"1\.weight must be float32"):
        quantize_linears(model := nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double()))
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"0\.weight is empty"):
        quantize_linears(nn.Sequential(nn.Linear(4, 0)))
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        quantize_linears(nn.Sequential(nn.Linear(4, 4, device="meta")))


def test_adapted_layers_are_refused():
    model = tiny_llama()
    inject_lora(model, 2, 4, ["q_proj"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is adapted already: quantize first"):
        quantize_linears(model)
    assert unchanged(model, before)
    import peft

    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapted already"):
        quantize_linears(theirs)


def test_an_adapter_on_a_quantized_layer_does_not_keep_the_rest_from_being_quantized():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_linears(model, skip=("1",))
    inject_lora(model, 2, 4, ["0"])
    assert quantize_linears(model) == ["1"]


# ---- weights that come one by one ----------------------------------------------------------------------------------------------------


class Stream:
    """Weights made when they are asked for; remembers the order, and whether the ones given before are still there."""

    def __init__(self, model, dtype=torch.bfloat16):
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.dtype, self.asked, self.given, self.alive = dtype, [], [], []

    def __call__(self, name):
        self.alive.append(sum(one() is not None for one in self.given))
        self.asked.append(name)
        g = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        value = torch.randn(self.shapes[name], generator=g).mul_(0.02).to(self.dtype)
        if "proj" in name:
            self.given.append(weakref.ref(value.untyped_storage()))
        return value


def on_meta(make=tiny_llama):
    with torch.device("meta"):
        model = make()
    real = make()
    for name, module in real.named_modules():
        for key in module._non_persistent_buffers_set:
            setattr(model.get_submodule(name), key, getattr(module, key))
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_a_model_on_the_meta_device_equals_one_that_was_quantized_whole(make):
    model = on_meta(make)
    stream = Stream(model, torch.float32)
    names = quantize_linears(model, compute_dtype=torch.float32, weights=stream)
    assert sorted(stream.asked) == sorted(stream.shapes) and len(set(stream.asked)) == len(stream.asked)
    whole, again = make(), Stream(model, torch.float32)
    again.shapes = stream.shapes
    for name, parameter in whole.named_parameters():
        parameter.data = again(name)
    assert quantize_linears(whole, compute_dtype=torch.float32) == names
    assert unchanged(model, whole.state_dict())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.load_state_dict(whole.state_dict())
    ids = torch.randint(40, (2, 9))
    assert torch.equal(model.eval()(input_ids=ids).logits, whole.eval()(input_ids=ids).logits)


def test_one_layer_at_a_time_is_there_in_16_bits():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(6))

    with torch.device("meta"):
        model = Stack()
    stream, one = Stream(model), 2 * 1024 * 1024
    with LiveBytes() as live:
        quantize_linears(model, weights=stream)
    assert stream.alive == [0] * 6  # when the next is asked for, none of those before is left
    result = module_bytes(model)
    assert 6 * one / 4 < result < 6 * one / 3.8
    # beside the result and the layer in 16 bits: making the random numbers (float32), and the quantizer's working memory of 65,536 values
    assert live.peak < result + one + 2 * one + 65536 * 32
    assert live.bytes == result

    class Dense:  # the same measure sees that whole layers are kept, if they are
        def __init__(self):
            self.kept = []

        def __call__(self, name):
            self.kept.append(stream(name))
            return self.kept[-1]

    with torch.device("meta"):
        model = Stack()
    keeps = Dense()
    with LiveBytes() as live:
        quantize_linears(model, weights=keeps)
    assert live.bytes == result + 6 * one


def test_at_hand_each_weight_is_let_go_before_the_next_is_touched(monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    refs, alive = [weakref.ref(layer.weight) for layer in model], []
    original = NF4Linear.from_weight.__func__

    def watched(cls, *arguments, **settings):
        alive.append(sum(ref() is not None for ref in refs))
        return original(cls, *arguments, **settings)

    monkeypatch.setattr(NF4Linear, "from_weight", classmethod(watched))
    quantize_linears(model)
    assert alive == [4, 3, 2, 1] and not any(ref() is not None for ref in refs)


def test_a_stream_that_breaks_says_what_is_left_and_a_second_call_goes_on():
    model = on_meta()
    stream = Stream(model)
    bad = "model.layers.0.mlp.gate_proj.weight"

    def broken(name):
        value = stream(name)
        return value.fill_(float("nan")) if name == bad else value

    with pytest.raises(
        ValueError, match=r"gate_proj\.weight holds NaN or infinity.*; 4 of 14 layers are quantized, .* second call goes on"
    ):
        quantize_linears(model, weights=broken)
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 4
    assert model.model.layers[0].mlp.gate_proj.weight.is_meta
    assert len(quantize_linears(model, weights=stream)) == 10
    whole = on_meta()
    quantize_linears(whole, weights=Stream(whole))
    assert unchanged(model, whole.state_dict())


@pytest.mark.parametrize("gives", [lambda name: None, lambda name: torch.ones(2, 3), lambda name: torch.ones(6, 4, device="meta")])
def test_a_stream_of_something_else_is_refused(gives):
    model = nn.Sequential(nn.Linear(4, 6, device="meta"))
    with pytest.raises(ValueError, match=r"weights\('0\.weight'\) must give a tensor of shape \(6, 4\), got a"):
        quantize_linears(model, weights=gives)
    assert type(model[0]) is nn.Linear and model[0].weight.is_meta


def test_a_computed_buffer_on_the_meta_device_is_named_first():
    with torch.device("meta"):
        model = tiny_llama()
    asked = []
    with pytest.raises(ValueError, match=r"rotary_emb\.\w*inv_freq is computed, not stored"):
        quantize_linears(model, weights=asked.append)
    assert not asked


def test_tied_parameters_on_the_meta_device_stay_tied():
    model = on_meta(lambda: tiny_llama(tie_word_embeddings=True))
    stream = Stream(model)
    quantize_linears(model, weights=stream)
    assert model.lm_head.weight is model.model.embed_tokens.weight and "lm_head.weight" not in stream.asked


# ---- CUDA ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_cuda_layer_equals_bitsandbytes_on_the_same_bytes(dtype, double_quant):
    linear = nn.Linear(512, 320, device="cuda", dtype=dtype)
    theirs = bnb_linear(linear, 64, double_quant, dtype)
    ours = NF4Linear(512, 320, True, 64, double_quant, dtype, dtype, device="cuda")
    ours.load_state_dict(theirs.state_dict())
    x, direction = torch.randn(2048, 512, device="cuda", dtype=dtype), torch.randn(2048, 320, device="cuda", dtype=dtype)
    grads = []
    for layer in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(direction)
        grads.append((y.detach(), leaf.grad))
    (y, grad), (expected, expected_grad) = grads
    # 512 and 320 products in cuBLAS' order; the same numbers go in
    assert_same(y, expected, ulps=64, half_ulps=1, of=dtype)
    assert_same(grad, expected_grad, ulps=64, half_ulps=1, of=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size, shape", [(64, (320, 512)), (64, (77, 131)), (256, (33, 65))])
def test_cuda_quantizes_as_the_cpu_does(block_size, shape):
    weight = torch.randn(shape)
    here = NF4Linear.from_weight(weight, None, block_size, False)
    there = NF4Linear.from_weight(weight.cuda(), None, block_size, False)
    assert torch.equal(here.weight, there.weight.cpu()) and torch.equal(here.absmax, there.absmax.cpu())
    for dtype in DTYPES:
        assert torch.equal(here.dequantize(dtype), there.dequantize(dtype).cpu())
    moved = NF4Linear.from_weight(weight, None, block_size, True).to("cuda", torch.float16)
    assert moved.nested_absmax.dtype == torch.float32 and moved.weight.is_cuda and moved.weight.dtype == torch.uint8
    back = copy.deepcopy(moved).cpu()
    assert torch.equal(back.dequantize(torch.float32), moved.dequantize(torch.float32).cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("double_quant", [True, False])
def test_cuda_ten_steps_equal_peft_and_bitsandbytes_in_bfloat16(double_quant):
    """A Llama-shaped block and the tiny model, all in bfloat16 with float32 factors; both sides hold bitsandbytes' own bytes."""
    cases = []
    x, target = torch.randn(10, 4, 512, 128, device="cuda", dtype=torch.bfloat16), torch.randn(10, 4, 512, 128, device="cuda")
    block = Block().to("cuda", torch.bfloat16)
    cases.append((block, lambda m, s: F.mse_loss(m(x[s].to(next(n for n in m.parameters() if n.ndim == 1).dtype)).float(), target[s])))
    ids = torch.randint(200, (10, 32, 64), device="cuda")
    tiny = models.load("tiny", torch.bfloat16, torch.device("cuda"))[0]
    cases.append((tiny, lambda m, s: m(input_ids=ids[s], labels=ids[s]).loss))
    for model, loss in cases:
        ours, theirs, pairs = both(model, 4, 10, double_quant, torch.bfloat16)
        for mine, other in pairs:
            mine.base.load_state_dict(other.get_base_layer().state_dict())
        exact = copy.deepcopy(ours).float()  # the same packed weights and factors, and every product in float32
        for module in exact.modules():
            if isinstance(module, NF4Linear):
                module.compute_dtype = torch.float32
        of_ours, of_theirs, truth = (gradients(side, loss) for side in (ours, theirs, exact))
        # Both round every product to bfloat16, in another order: neither may be farther from the truth than the other by much.
        for a, b, right in zip(of_ours, of_theirs, truth, strict=True):
            assert (a - right).norm() <= 1.5 * (b - right).norm() + 0.01 * right.norm()
        before = [factor.detach().clone() for mine, _ in pairs for factor in (mine.lora_A, mine.lora_B)]
        first, second = train(ours, loss), train(theirs, loss)
        assert first == pytest.approx(second, rel=4 * ULP[torch.bfloat16])
        after = [
            (a.detach(), b.detach()) for mine, other in pairs for a, b in zip((mine.lora_A, mine.lora_B), factors_of(other), strict=True)
        ]
        for start, (a, b) in zip(before, after, strict=True):  # Adam makes the error of a small gradient as large as a step
            assert (a - b).norm() < 0.3 * (b - start).norm()


def gradients(model, loss):
    """Of all that trains, in the order of the layers, A before B; float32."""
    loss(model, 0).backward()
    found = [p.grad.float().clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


@pytest.mark.gpu
def test_cuda_a_streamed_model_never_holds_two_layers_in_16_bits():
    """A few decoder layers of Llama-2-7B's shape, made on the GPU one weight at a time."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.ModuleList(nn.Linear(4096, 11008, bias=False) for _ in range(8))

    with torch.device("meta"):
        model = Stack()
    one = 2 * 4096 * 11008

    def weights(name):
        return torch.empty(11008, 4096, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)

    weights("")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantize_linears(model, weights=weights)
    peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    # 4.127 bits a weight; the allocator hands out whole 2 MiB, of which a large tensor leaves less than one unused
    assert held < 8 * (one * 4.13 / 16 + (1 << 20))
    assert peak < held + one + (1 << 22) * 40  # the quantizer's working memory: pieces of 4 M values


@pytest.mark.gpu
def test_cuda_backward_keeps_no_dense_weight():
    layers = nn.Sequential(*[NF4Linear.from_linear(nn.Linear(2048, 2048, False, device="cuda", dtype=torch.bfloat16)) for _ in range(6)])
    x = torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layers(x).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layers(x)
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 2**16
    torch.cuda.reset_peak_memory_stats()
    y.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2 * 2048 * 2048 + (1 << 22) * 24


@pytest.mark.gpu
def test_cuda_cpu_model_is_quantized_onto_the_gpu():
    model = tiny_llama().to(torch.bfloat16)
    names = quantize_linears(model, device="cuda", block_size=16)
    assert all(model.get_submodule(name).weight.is_cuda for name in names)
    assert not model.model.embed_tokens.weight.is_cuda
    merged = merge_into_dequantized(model.to("cuda"))
    inject_lora(merged, 2, 4)
    merge_lora(merged)
    assert not list(lora_layers(merged))
