"""reference.bottleneck and reference.fusion against the library ``adapters`` (recorded by tests/data/adapters_library.py)."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from family_helpers import IDS, SMALL, assert_unchanged, snapshot, tiny_gpt2, trained
from lora_helpers import assert_same, tiny_bert, tiny_llama
from safetensors.torch import load_file
from torch import nn

from reference.bottleneck import HOULSBY, PARALLEL, PFEIFFER, PFEIFFER_POST_NORM, Bottleneck, inject_bottleneck
from reference.fusion import Fusion, fuse, value_penalty
from reference.lora import inject_lora
from reference.wrapped import adapters, merge_adapters

LIBRARY = load_file(Path(__file__).parent / "data" / "adapters_library.safetensors")
MODELS = {"llama": tiny_llama, "bert": tiny_bert}
PLACES = {  # model, method -> modules, settings
    ("llama", "houlsby"): (["self_attn", "mlp"], HOULSBY),
    ("llama", "pfeiffer"): (r"model\.layers\.\d+", PFEIFFER),
    ("bert", "houlsby"): (["attention.output.dense", "output.dense"], HOULSBY),
    ("bert", "pfeiffer"): (r".*layer\.\d+\.output\.LayerNorm", PFEIFFER_POST_NORM),
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def library(prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in LIBRARY.items() if name.startswith(prefix)}


def base_model(kind):
    model = MODELS[kind]().eval()
    model.load_state_dict(library(f"{kind}.base."))
    return model


def library_name(place):
    """Where the library keeps the adapter of a place here."""
    for ours, theirs in (
        (".self_attn", ".attention_adapters"),
        (".mlp", ".output_adapters"),
        (".attention.output.dense", ".attention.output"),
        (".output.dense", ".output"),
        (".output.LayerNorm", ".output"),
    ):
        if place.endswith(ours):
            return place.removesuffix(ours) + theirs
    return f"{place}.output_adapters"


def adapted(kind, method, tensors, which="a"):
    model, (modules, settings) = base_model(kind), PLACES[kind, method]
    names = inject_bottleneck(model, modules, **settings | {"factor": 4})
    for name in names:
        for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")):
            for part in ("weight", "bias"):
                value = tensors[f"{library_name(name)}.adapters.{which}.{theirs}.{part}"]
                getattr(getattr(model.get_submodule(name).adapter, ours), part).data.copy_(value)
    return model, names


@pytest.mark.parametrize("kind, method", PLACES)
def test_a_model_gives_the_library_s_logits(kind, method):
    ids = LIBRARY["input_ids"]
    assert_same(base_model(kind)(input_ids=ids).logits, LIBRARY[f"{kind}.logits"], ulps=64)
    tensors = library(f"{kind}.{method}.")
    model, names = adapted(kind, method, tensors)
    assert 4 * len(names) == len(tensors) - 1  # every adapter of the library has its place here
    assert_same(model(input_ids=ids).logits, tensors["logits"], ulps=256)
    assert (tensors["logits"] - LIBRARY[f"{kind}.logits"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", MODELS)
def test_fusion_gives_the_library_s_logits(kind):
    tensors = library(f"{kind}.fusion.")
    model, names = adapted(kind, "pfeiffer", tensors, "a")
    other, _ = adapted(kind, "pfeiffer", tensors, "b")
    assert fuse(model, [other]) == names
    for name in names:
        fusion = model.get_submodule(name).adapter
        for own, parameter in fusion.named_parameters():
            if not own.startswith("adapters."):
                parameter.data.copy_(tensors[f"{library_name(name)}.adapter_fusion_layer.a,b.{own}"])
    assert_same(model(input_ids=LIBRARY["input_ids"]).logits, tensors["logits"], ulps=256)
    assert {name.rpartition("adapter.")[2] for name in trained(model)} == {
        "query.weight", "query.bias", "key.weight", "key.bias", "value.weight",
    }  # fmt: skip


def test_parallel_is_the_formula():
    base = tiny_llama().eval()
    ours = copy.deepcopy(base)
    names = inject_bottleneck(ours, ["mlp"], **PARALLEL)
    assert_same(ours(input_ids=IDS).logits, base(input_ids=IDS).logits)  # this one starts at the identity
    placed = ours.get_submodule(names[0])
    for parameter in placed.adapter.parameters():
        parameter.data.normal_()
    x, a = torch.randn(2, 3, SMALL), placed.adapter
    expected = placed.base(x) + 4.0 * (F.relu(x @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias)
    assert a.down.weight.shape == (SMALL // 2, SMALL)
    assert_same(placed(x), expected)


def test_the_usual_start_is_near_the_identity_and_not_it():
    base = tiny_llama().eval()
    ours = copy.deepcopy(base)
    inject_bottleneck(ours, ["self_attn", "mlp"], **HOULSBY)
    difference = (ours(input_ids=IDS).logits - base(input_ids=IDS).logits).abs().max()
    assert 0 < difference < 0.1


def test_modules_that_return_tuples_and_gpt2():
    base = tiny_gpt2().eval()
    ours = copy.deepcopy(base)
    names = inject_bottleneck(ours, ["attn", "mlp"], start="identity")
    assert len(names) == 4
    assert_same(ours(input_ids=IDS).logits, base(input_ids=IDS).logits)
    ours.get_submodule(names[0]).adapter.up.weight.data.normal_()
    assert (ours(input_ids=IDS).logits - base(input_ids=IDS).logits).abs().max() > 1e-3


def test_only_the_adapters_train_in_float32():
    model = tiny_llama().to(torch.bfloat16)
    inject_bottleneck(model, ["mlp"], **HOULSBY)
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(".adapter." in name and p.grad.dtype == torch.float32 for name, p in trained(model).items())
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapter." not in name)


def test_a_fresh_fusion_is_about_the_mean_of_its_adapters():
    several = [Bottleneck(SMALL, 3) for _ in range(3)]
    for adapter in several:
        adapter.up.weight.data.normal_()
    fusion, h = Fusion(several), torch.randn(4, 7, SMALL)
    with torch.no_grad():
        fusion.query.weight.zero_()
        mean = torch.stack([adapter(h) for adapter in several]).mean(0)
        torch.testing.assert_close(fusion(h), mean, rtol=1e-3, atol=1e-4)
        weights = fusion.weights(h, torch.stack([adapter(h) for adapter in several], -2))
        torch.testing.assert_close(weights, torch.full((4, 7, 3), 1 / 3))


def test_fusion_learns_to_choose_by_token():
    """Two adapters that each help half of the tokens; attention by the token finds out which."""
    d = 8
    several = [Bottleneck(d, d, scaling=1.0) for _ in range(2)]
    for i, adapter in enumerate(several):
        adapter.down.weight.data.zero_(), adapter.up.weight.data.zero_()
        adapter.up.bias.data.fill_(1.0 - 2 * i)  # one adds +1, the other −1
    fusion = Fusion(several)
    h = torch.randn(256, d)
    target = torch.where(h[:, :1] > 0, 1.0, -1.0).expand(-1, d)
    optimizer = torch.optim.Adam([p for p in fusion.parameters() if p.requires_grad], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(fusion(h), target).backward()
        optimizer.step()
    assert F.mse_loss(fusion(h), target) < 0.3  # the mean of both has 1.0
    assert all(p.grad is None for p in fusion.adapters.parameters())


def test_value_penalty():
    model, other = tiny_llama(), tiny_llama()
    for each in (model, other):
        inject_bottleneck(each, ["mlp"], **HOULSBY)
    fuse(model, [other])
    assert value_penalty(model) < 1e-8
    placed = [part for _, part in adapters(model)]
    placed[0].adapter.value.weight.data[0, 1] = 3.0
    assert value_penalty(model).item() == pytest.approx(0.01 * 9, rel=1e-3)
    with pytest.raises(ValueError, match="no fusion"):
        value_penalty(tiny_llama())


def test_refusals_leave_the_model():
    model = tiny_llama()
    before = snapshot(model)
    for words, arguments in (
        ("matches nothing; names end in", dict(modules=["ffn"])),
        ("lies in model.layers.0, which is chosen too", dict(modules=r"model\.layers\.\d+(\.mlp)?")),
        ("place must be one of", dict(modules=["mlp"], place="before")),
        ("factor must be at least 1", dict(modules=["mlp"], factor=0.5)),
        ("activation must be one of", dict(modules=["mlp"], activation="tanh")),
        ("start must be one of", dict(modules=["mlp"], start="zero")),
    ):
        with pytest.raises(ValueError, match=words):
            inject_bottleneck(model, **arguments)
        assert_unchanged(model, before)
    with pytest.raises(ValueError, match="has bottlenecks at"):
        fuse(model, [])
    inject_bottleneck(model, ["mlp"], **HOULSBY)
    with pytest.raises(ValueError, match="is a After already"):
        inject_bottleneck(model, ["mlp"], **HOULSBY)
    with pytest.raises(TypeError, match="can't be merged: no single weight"):
        merge_adapters(model)
    elsewhere = tiny_llama()
    inject_bottleneck(elsewhere, ["self_attn"], **HOULSBY)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model 1 has bottlenecks at"):
        fuse(model, [elsewhere])
    assert_unchanged(model, before)
    fuse(model, [copy.deepcopy(model)])
    with pytest.raises(ValueError, match="fused already"):
        fuse(model, [])
    with pytest.raises(ValueError, match="adapters of one width"):
        Fusion([Bottleneck(4, 2), Bottleneck(5, 2)])
    other = nn.Sequential(nn.Linear(4, 4))
    inject_lora(other, 2, 3, ["0"])
    with pytest.raises(ValueError, match="is a LoRALinear already"):
        inject_bottleneck(other, ["0"])
