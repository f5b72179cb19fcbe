"""reference.lora on models of every kind: what can't be adapted is skipped or refused by name, and nothing is changed by a refusal."""

import copy
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import assert_same, tiny_llama
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm
from transformers import (
    BartConfig,
    BartModel,
    FalconConfig,
    FalconForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    WavLMConfig,
    WavLMModel,
)
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig

from reference.adapter_format import load_adapter, save_adapter
from reference.lora import LoRALinear, LoRATransposed, find_targets, inject_lora, lora_layers, merge_lora, thaw
from reference.lora.called import never_called
from reference.qlora import NF4Linear, quantize_linears

IDS = torch.randint(30, (2, 7), generator=torch.Generator().manual_seed(1))


def fill(model):
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return model


def snapshot(model):
    """Everything that a refused call must leave as it was."""
    modules = [(name, id(part), part.training) for name, part in model.named_modules(remove_duplicate=False)]
    hooks = [
        {key: list(value) for key, value in vars(part).items() if "hook" in key and isinstance(value, dict)} for part in model.modules()
    ]
    parameters = [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters(remove_duplicate=False)]
    values = {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return modules, hooks, parameters, values


def assert_unchanged(model, before):
    *structure, values = snapshot(model)
    assert tuple(structure) == before[:3]
    for name, value in values.items():
        assert value.is_meta or value.is_quantized or torch.equal(value.nan_to_num(), before[3][name].nan_to_num()), name


def assert_refused(model, words, call, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error, match=words):
        call(model)
    assert_unchanged(model, before)


# ---- layers that nobody calls --------------------------------------------------------------------------------------------------------


class ByWeight(nn.Module):
    """Reads some weights and calls some layers."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(8, 8)
        self.both, self.asked, self.inner = nn.Linear(8, 8), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))
        self.filter = nn.Conv2d(1, 1, 3)

    def forward(self, x):
        x = self.called(x).to(self.asked.weight.dtype) + self.asked(x) + self.inner(x)
        penalty = self.both.weight.square().sum() + self.inner[0].weight.sum()
        image = F.conv2d(x[None, None], self.filter.weight, self.filter.bias, padding=1)[0, 0]
        return F.linear(self.both(image), self.read.weight, self.read.bias) + self.table.weight[: len(x)] + penalty


class Deeper(nn.Module):
    """The weight is that of a grandchild; and the reading is in another function, a nested one."""

    def __init__(self):
        super().__init__()
        self.holder = nn.ModuleDict({"used": nn.Linear(8, 8)})
        self.block = ByWeight()
        self.block.spare = nn.Linear(8, 8)

    def mixed(self, x):
        def inner():
            return x @ self.block.spare.weight.T

        return inner()

    def forward(self, x):
        return self.mixed(self.block(x)) + self.holder["used"](x)


class Looped(nn.Module):
    """Calls its layers without naming them, and reads a weight by name."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x + self.first.weight.sum()


class Indirect(Looped):
    def forward(self, x):
        for name in ("first", "second"):
            x = getattr(self, name)(x)
        return x + self.second.weight.sum()


TINY = dict(hidden_size=16, num_hidden_layers=1, vocab_size=30)


def mobilebert():
    options = dict(intermediate_size=32, true_hidden_size=16, intra_bottleneck_size=16, num_attention_heads=2)
    return MobileBertForMaskedLM(MobileBertConfig(**TINY | {"hidden_size": 24}, embedding_size=16, **options))


def wavlm():
    conv = dict(conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return WavLMModel(WavLMConfig(**TINY, num_attention_heads=2, intermediate_size=32, **conv))


@pytest.mark.parametrize(
    "make, unseen",
    [
        (tiny_llama, []),
        (ByWeight, ["read", "table", "filter"]),
        (Deeper, ["block.read", "block.table", "block.filter", "block.spare"]),
        (Looped, []),
        (Indirect, []),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1), ["layers.0.self_attn.out_proj"]),
        (lambda: nn.TransformerDecoderLayer(8, 2, 16), ["self_attn.out_proj", "multihead_attn.out_proj"]),
        (wavlm, [f"encoder.layers.0.attention.{name}_proj" for name in "qkv"] + ["encoder.layers.0.attention.out_proj"]),
        (mobilebert, ["cls.predictions.decoder", "cls.predictions.dense"]),
    ],
)
def test_layers_that_are_read_and_never_called_are_found(make, unseen):
    model = make()
    found = never_called(model)
    assert {name for name, part in model.named_modules() if part in found} == set(unseen)
    assert all("never calls it" in why for why in found.values())


@pytest.mark.parametrize("make", [lambda: MambaForCausalLM(MambaConfig(**TINY)), lambda: FalconMambaForCausalLM(FalconMambaConfig(**TINY))])
def test_a_mamba_block_is_adapted_where_it_is_called(make):
    """dt_proj is read; on GPUs a fused kernel reads x_proj and out_proj too (peft refuses out_proj). What is adapted merges exactly."""
    model = make().eval()
    targets = find_targets(model, "all-linear")
    block = "backbone.layers.0.mixer"
    assert list(targets) == [f"{block}.in_proj"]
    assert targets.skipped.keys() == {f"{block}.{name}" for name in ("dt_proj", "x_proj", "out_proj")}
    assert all("Mamba" in why for why in targets.skipped.values())
    for name in targets.skipped:
        assert_refused(
            model, rf"{name} belongs to \w*MambaMixer.*choose other target_modules", lambda m, name=name: inject_lora(m, 2, 3, [name])
        )
    inject_lora(model, 2, 3)
    fill(model)
    before = model(IDS).logits
    assert_same(merge_lora(model)(IDS).logits, before.detach(), ulps=2000)


@settings(max_examples=20)
@given(st.sets(st.sampled_from(["called", "both", "asked", "inner.0"]), min_size=1), st.integers(0, 99))
def test_merging_changes_no_output_of_a_model_that_reads_weights(names, seed):
    torch.manual_seed(seed)
    model, x = Deeper(), torch.randn(6, 8)
    base = copy.deepcopy(model)
    inject_lora(model, 2, 3, [f"block.{name}" for name in names - {"both", "inner.0"}] or ["used"])
    fill(model)
    before = model(x)
    assert not torch.equal(before, base(x))  # every adapter is seen
    assert_same(merge_lora(model)(x), before.detach(), ulps=500)


# ---- layers whose forward is their own -----------------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """No forward of its own: the plain one."""


class Gate(nn.Module):
    """A linear layer in name only."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.weight = 8, 8, nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.weight.softmax(0)


def router():
    return Llama4Router(Llama4TextConfig(hidden_size=8, num_local_experts=8, num_experts_per_tok=1))


def patched():
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


def dynamic():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})[0]


OWN = {
    "subclass": (lambda: Doubled(8, 8), "is a Doubled, whose forward is its own"),
    "router": (router, "is a Llama4Router, whose forward is its own"),
    "no linear": (Gate, "is a Gate, whose forward is its own"),
    "patched": (patched, "has a forward that was put on it from outside"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "computes its weight at each call"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), "computes its weight at each call"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), "computes its weight at each call"),
    "old weight norm": (lambda: old_weight_norm(nn.Linear(8, 8)), "computes its weight at each call"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "computes its weight at each call"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, words", [*OWN.values(), (dynamic, "computes its weight at each call")], ids=[*OWN, "dynamic"])
def test_what_is_no_plain_layer_is_skipped_by_all_linear_and_refused_by_name(make, words):
    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "odd": make(), "named": Renamed(8, 8)})
    targets = find_targets(model, "all-linear")
    assert list(targets) == ["plain", "named"]
    assert words in targets.skipped["odd"]
    for target_modules in (["odd"], ["plain", "odd"], "plain|odd"):
        assert_refused(model, f"odd {words}.*choose other", lambda m, t=target_modules: inject_lora(m, 2, 3, t))
    assert inject_lora(model, 2, 3) == ["plain", "named"]
    alone = nn.ModuleDict({"odd": make()})
    assert_refused(alone, f"matches no layer.*odd {words}", lambda m: inject_lora(m, 2, 3))


def test_a_layer_compiled_by_itself_is_adapted_neither_outside_nor_inside():
    model = nn.Sequential(torch.compile(nn.Linear(8, 8)), nn.Linear(8, 8))
    assert find_targets(model, "all-linear").skipped.keys() == {"0._orig_mod"}
    for name in ("0", "0._orig_mod"):
        assert_refused(model, "0.* is compiled by itself: inject first, then compile", lambda m, name=name: inject_lora(m, 2, 3, [name]))


def test_embeddings_that_look_up_otherwise():
    """BART's positions are counted inside; its words are scaled, which the adapter does too."""
    options = dict(vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    model = BartModel(BartConfig(**options, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, scale_embedding=True))
    assert_refused(model, "embed_positions is a BartLearnedPositionalEmbedding", lambda m: inject_lora(m, 2, 3, ["embed_positions"]))
    assert inject_lora(model, 2, 3, ["embed_tokens"])
    before = fill(model).eval()(IDS).last_hidden_state
    assert_same(merge_lora(model)(IDS).last_hidden_state, before.detach(), ulps=3000)


def test_falcon_s_linear_layer_is_plain():
    model = FalconForCausalLM(FalconConfig(**TINY, num_attention_heads=2)).eval()
    assert len(inject_lora(model, 2, 3)) == 4
    before = fill(model)(IDS).logits
    assert_same(merge_lora(model)(IDS).logits, before.detach(), ulps=3000)


def test_a_parametrization_that_comes_after_the_adapter_stops_merging_whole():
    for register in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    ):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        inject_lora(model, 2, 3)
        fill(model)
        register(model[1].base)
        assert_refused(model, "1: .*computes its weight", merge_lora)
        assert_refused(model, "computes its weight", lambda m: m[1].merge())
    with pytest.raises(ValueError, match="computes its weight"):
        LoRALinear(parametrizations.weight_norm(nn.Linear(8, 8)), 2, 3)
    layer = parametrizations.weight_norm(nn.Linear(8, 8))
    parametrize.remove_parametrizations(layer, "weight")
    LoRALinear(layer, 2, 3)  # the remedy


# ---- weights that are elsewhere ------------------------------------------------------------------------------------------------------


def test_models_on_the_meta_device(tmp_path):
    saved = tiny_llama()
    inject_lora(saved, 2, 3, ["q_proj"])
    save_adapter(saved, tmp_path / "adapter")
    with torch.device("meta"):
        empty = tiny_llama()
    words = r"model\.layers\.0\.self_attn\.q_proj.*weight is on the meta device.*load the model"
    for init in ("kaiming", "gaussian", "pissa"):
        assert_refused(empty, words, lambda m, init=init: inject_lora(m, 2, 3, init=init))
    assert_refused(empty, words, lambda m: load_adapter(m, tmp_path / "adapter"))
    moved = copy.deepcopy(saved).to("meta")
    assert_refused(moved, r"q_proj.*\.weight is on the meta device", merge_lora)
    assert_refused(moved, r"q_proj.*lora_A is on the meta device", lambda m: load_adapter(m, tmp_path / "adapter"))
    assert_refused(moved, r"q_proj.*lora_A is on the meta device", lambda m: save_adapter(m, tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    half = copy.deepcopy(fill(saved))
    half.model.layers[1].self_attn.q_proj.base.to("meta")  # the last of the layers alone
    assert_refused(half, r"layers\.1\.self_attn\.q_proj.*meta", merge_lora)


def test_a_model_that_accelerate_keeps_elsewhere():
    model = tiny_llama()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert_refused(model, "on the meta device, without values, or was offloaded by accelerate", lambda m: inject_lora(m, 2, 3))
    plain = tiny_llama()
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(plain.model.layers[0].self_attn.q_proj, AlignDevicesHook(execution_device="cpu"))  # moves inputs, nothing else
    assert len(inject_lora(plain, 2, 3)) == 14


# ---- nothing is changed by what is refused -------------------------------------------------------------------------------------------


def test_a_model_that_peft_has_adapted_is_refused():
    for options in (dict(), dict(use_dora=True), dict(modules_to_save=["lm_head"])):
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
        for target_modules in ("all-linear", ["up_proj"], ["q_proj"], ["default"]):
            words = r"q_proj is adapted by peft, as (lora\.)?Linear: merge_and_unload\(\)"
            assert_refused(model, words, lambda m, t=target_modules: inject_lora(m, 2, 3, t))
        assert_refused(model.base_model.model, "adapted by peft", lambda m: inject_lora(m, 2, 3))
    assert inject_lora(peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload(), 2, 3)
    other = peft.get_peft_model(tiny_llama(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert_refused(other, "adapted by peft", lambda m: inject_lora(m, 2, 3))


BROKEN = {
    "computed": lambda model: parametrizations.weight_norm(model[1]),
    "elsewhere": lambda model: model[1].to("meta"),
    "nan": lambda model: nn.init.constant_(model[1].weight, math.nan),
    "packed": lambda model: model.__setitem__(1, NF4Linear.from_linear(model[1])),
    "own forward": lambda model: model.__setitem__(1, Doubled(8, 8)),
    "not whole": lambda model: setattr(model[1], "forward", lambda x: x),
    "nothing": lambda model: None,
}
ARGUMENTS = dict(
    r=st.sampled_from([0, -1, 2.0, "2", True, 9]),
    lora_alpha=st.sampled_from([0, math.nan, "16", None]),
    lora_dropout=st.sampled_from([1, -1, math.inf]),
    init=st.sampled_from(["zeros", None]),
    target_modules=st.sampled_from([["3"], [], "(", ["nothing", "2.0"], ["1", "model"]]),
)


@settings(max_examples=60)
@given(st.sampled_from(list(BROKEN)), st.sampled_from([None, *ARGUMENTS]), st.booleans(), st.data())
def test_a_refused_injection_leaves_the_model_as_it_was(broken, argument, trained, data):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ModuleList([nn.ReLU()]), nn.Linear(8, 8))
    model[0].requires_grad_(trained)
    model[0].register_forward_hook(lambda *_: None)
    model.eval()
    BROKEN[broken](model)
    options = dict(r=2, lora_alpha=3, target_modules=["0", "1", "3"], init="pissa")
    if argument:
        options[argument] = data.draw(ARGUMENTS[argument])
    before = snapshot(model)
    try:
        inject_lora(model, **options)
    except (ValueError, TypeError):
        assert_unchanged(model, before)
    else:
        assert broken == "nothing" or options["target_modules"] == ["3"]


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_what_no_check_foresees_is_taken_back(monkeypatch, init):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    model[0].weight.requires_grad_(False)
    start, calls = LoRALinear.start, []

    def failing(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        start(layer)

    monkeypatch.setattr(LoRALinear, "start", failing)
    assert_refused(model, "", lambda m: inject_lora(m, 2, 3, init=init), MemoryError)


class Picky(NF4Linear):
    def merge_delta(self, delta):
        raise ValueError("not this one")


@pytest.mark.parametrize("spoil", ["nan", "overflow", "computed", "meta", "own way", "integer"])
def test_a_refused_merge_leaves_the_model_as_it_was(spoil):
    model = nn.Sequential(nn.Linear(8, 8), NF4Linear.from_linear(nn.Linear(8, 8)), nn.Linear(8, 8).half())
    if spoil == "own way":
        model.append(Picky.from_linear(nn.Linear(8, 8)))
    inject_lora(model, 2, 3, [str(i) for i in range(3)])
    if spoil == "own way":
        model[3] = LoRALinear(model[3], 2, 3)
    fill(model)
    last = model[2]
    error = TypeError if spoil == "integer" else ValueError
    if spoil == "nan":
        last.lora_B.data[0, 0] = math.nan
    elif spoil == "overflow":
        last.lora_B.data *= 1e9
    elif spoil == "computed":
        parametrizations.orthogonal(last.base.float())
    elif spoil == "meta":
        last.base.to("meta")
    elif spoil == "integer":
        last.base.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    model[0].register_forward_hook(lambda *_: None)
    assert_refused(model, "", merge_lora, error)


# ---- ranks above a layer's smaller side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(6, 1), (1, 6), (3, 4)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_rank_above_the_smaller_side_is_peft_s(sizes, use_rslora):
    base, x = nn.Sequential(nn.Linear(*sizes)), torch.randn(5, sizes[0])
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    assert inject_lora(ours, 5, 3, use_rslora=use_rslora) == ["0"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=5, lora_alpha=3, target_modules="all-linear", use_rslora=use_rslora))
    other = theirs.base_model.model[0]
    fill(ours)
    other.lora_A["default"].weight.data = ours[0].lora_A.data.clone()
    other.lora_B["default"].weight.data = ours[0].lora_B.data.clone()
    assert_same(ours(x), theirs(x), ulps=16)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert_same(ours[0].lora_A.grad, other.lora_A["default"].weight.grad, ulps=32)
    assert_same(ours[0].lora_B.grad, other.lora_B["default"].weight.grad, ulps=32)
    assert_same(merge_lora(ours)[0].weight.detach(), theirs.merge_and_unload()[0].weight.detach(), ulps=16)
    assert_refused(copy.deepcopy(base), f"0: r must be from 1 to {min(sizes)}, got 5", lambda m: inject_lora(m, 5, 3, init="pissa"))


def test_embeddings_and_convolutions_take_any_rank_too():
    model = nn.ModuleDict({"table": nn.Embedding(3, 4), "filter": nn.Conv2d(1, 2, 1)})
    assert inject_lora(model, 7, 3, ["table", "filter"]) == ["table", "filter"]


# ---- tied embeddings -----------------------------------------------------------------------------------------------------------------


def tied():
    torch.manual_seed(0)
    return tiny_llama(tie_word_embeddings=True).eval()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"], ["q_proj"]])
def test_a_merged_tied_model_keeps_its_logits_when_it_is_resized_and_saved(tmp_path, targets):
    model = tied()
    inject_lora(model, 2, 3, targets)
    expected = fill(model)(IDS).logits.detach()
    merge_lora(model)
    assert model.config.tie_word_embeddings == (targets == ["q_proj"]) == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert_same(model(IDS).logits, expected, ulps=2000)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    for vocabulary in (44, 50):
        model.resize_token_embeddings(vocabulary)
        assert_same(model(IDS).logits[..., :40].detach(), expected, ulps=2000)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (targets == ["q_proj"])


def test_an_adapted_tied_model_is_tied_again_without_losing_its_adapter():
    for targets in (["embed_tokens"], ["lm_head"], ["q_proj"]):
        model = tied()
        inject_lora(model, 2, 3, targets)
        expected = fill(model)(IDS).logits
        model.tie_weights()
        assert torch.equal(model(IDS).logits, expected) and len(list(lora_layers(model))) >= 1
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_resizing_what_is_adapted_is_refused(targets):
    model = fill(tied())
    inject_lora(model, 2, 3, targets)
    with pytest.raises((TypeError, ValueError), match=r"LoRAEmbedding|merge_lora"):
        model.resize_token_embeddings(44)


def test_a_quantized_tied_head_is_not_tied_again():
    model = tied()
    quantize_linears(model, skip=())
    expected = model(IDS).logits
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert torch.equal(model(IDS).logits, expected)


# ---- GPT-2, whose linear layers keep (in, out) ---------------------------------------------------------------------------------------


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3)).eval()


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa"])
@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], ["c_attn", "lm_head"], ["wte", "c_fc"]])
def test_gpt2_equals_peft_in_forward_merge_and_files_both_ways(tmp_path, targets, init):
    if init == "pissa" and {"wte", "lm_head"} & set(targets):
        return  # for linear layers only; and in a tied head peft's takes the embedding apart as well
    base = gpt2()
    ours = copy.deepcopy(base)
    names = inject_lora(ours, 3, 5, targets, init=init)
    assert any(isinstance(layer, LoRATransposed) for _, layer in lora_layers(ours))
    with torch.no_grad():
        for _, layer in lora_layers(ours):
            layer.lora_A += 0.1 * torch.randn_like(layer.lora_A)
            layer.lora_B += 0.1 * torch.randn_like(layer.lora_B)
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    wrapped = [name for name, part in theirs.base_model.model.named_modules() if isinstance(part, peft.tuners.lora.LoraLayer)]
    assert names == wrapped and ("lm_head" in targets or theirs.peft_config["default"].fan_in_fan_out)
    ulps = 200 if init == "pissa" else 32
    assert_same(ours(IDS).logits, theirs(IDS).logits, ulps)
    theirs.save_pretrained(tmp_path / "theirs")
    again = copy.deepcopy(base)
    assert load_adapter(again, tmp_path / "theirs") == names
    assert_same(again(IDS).logits, ours(IDS).logits, ulps)
    ours(IDS).logits.square().sum().backward()
    merged = theirs.merge_and_unload()
    expected = ours(IDS).logits.detach()
    merge_lora(ours)
    assert_same(ours(IDS).logits, expected, ulps=1000)
    for name in names:
        weight, other = ours.get_submodule(name).weight, merged.get_submodule(name).weight
        assert_same(weight.detach(), other.detach(), ulps)


def test_a_turned_layer_by_itself():
    layer = gpt2().transformer.h[0].attn.c_attn
    ours = LoRATransposed(layer, 2, 3)
    assert ours.lora_A.shape == (2, 16) and ours.lora_B.shape == (48, 2) and ours.delta_weight().shape == layer.weight.shape
    with pytest.raises(TypeError, match="Conv1D of transformers"):
        LoRATransposed(nn.Linear(4, 4), 2, 3)
    with pytest.raises(TypeError, match="base must be a linear layer"):
        LoRALinear(gpt2().transformer.h[0].attn.c_attn, 2, 3)


# ---- models that are wrapped -----------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6))])

    def forward(self, x):
        return self.rest[1](self.rest[0](self.first(x)))


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.rest[1] = compiled(model.rest[1])
    return model


WRAPPED = [lambda model: model, compiled, compiled_inside, lambda model: compiled(compiled_inside(model)), nn.DataParallel]


@pytest.mark.parametrize("after", [False, True], ids=["wrapped and then adapted", "adapted and then wrapped"])
@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("targets", ["all-linear", r"first|rest\.1\.0", ["first", "rest.1.0"]], ids=str)
def test_files_of_a_wrapped_model_are_those_of_the_plain_one(tmp_path, wrap, after, targets):
    base, x = Stack(), torch.randn(3, 6)
    plain = copy.deepcopy(base)
    names = inject_lora(plain, 2, 3, targets)
    fill(plain)
    save_adapter(plain, tmp_path / "plain")
    ours = copy.deepcopy(base)
    if not (after or wrap is nn.DataParallel):
        ours = wrap(ours)
    inject_lora(ours, 2, 3, targets)
    if after or wrap is nn.DataParallel:
        ours = wrap(ours)
    assert not torch.allclose(ours(x), plain(x))
    load_adapter(ours, tmp_path / "plain")
    assert_same(ours(x), plain(x))
    save_adapter(ours, tmp_path / "wrapped")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    fresh = wrap(copy.deepcopy(base))
    fresh(x)  # compiled before it is adapted
    assert len(load_adapter(fresh, tmp_path / "wrapped")) == len(names)
    assert_same(fresh(x), plain(x))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "wrapped")
    assert_same(theirs(x), plain(x))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, int])
@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, np.float16])
def test_numbers_of_numpy_s_and_paths_are_written_as_plain_ones(tmp_path, integer, number):
    ours = Stack()
    inject_lora(ours, integer(2), number(3), lora_dropout=number(0.25), use_rslora=np.bool_(True))
    save_adapter(ours, tmp_path, base_model_name_or_path=Path("some") / "model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 3, True)
    assert config["base_model_name_or_path"] == str(Path("some/model")) and config["lora_dropout"] == float(number(0.25))
    load_adapter(ours, tmp_path)
    load_adapter(Stack(), tmp_path)
    peft.PeftModel.from_pretrained(Stack(), tmp_path)


def test_what_json_has_no_place_for_is_named_and_nothing_written(tmp_path):
    ours = Stack()
    inject_lora(ours, 2, Fraction(3, 2))
    with pytest.raises(TypeError, match=r"no place for Fraction\(3, 2\)"):
        save_adapter(ours, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- training everything again -------------------------------------------------------------------------------------------------------


def test_thawing_leaves_what_is_packed_and_names_it():
    model = tiny_llama()
    quantize_linears(model)
    inject_lora(model, 2, 3)
    merge_lora(fill(model))
    packed = thaw(model)
    assert packed == [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, NF4Linear)]
    assert all(p.requires_grad == (name not in packed) for name, p in model.named_parameters())
    assert thaw(tiny_llama()) == []
