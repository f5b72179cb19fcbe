"""reference.adapter_format beyond LoRA: files both ways between here and peft, with equal logits; the rest is refused."""

import copy
import functools
import json
import shutil
import warnings

import peft
import pytest
import torch
from family_helpers import IDS, LINEARS, MASK, MODELS, SMALL, assert_unchanged, fill, logits, peft_model, snapshot, tiny_gpt2, trained
from lora_helpers import assert_same, tiny_bert, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from reference import relatives
from reference.adapter_format import load_adapter, load_prompt, save_adapter
from reference.ia3 import inject_ia3
from reference.lora import inject_lora, lora_layers
from reference.lora.dora import DoRALayer, inject_dora
from reference.soft_prompts import Prefix, PrefixEncoder, PrefixTuning, Prompt, PromptEncoder, PromptTuning

TYPES = {  # name -> (inject here, peft's config, kinds of models)
    "IA3": (
        lambda m, t: inject_ia3(m, t, t[-1:]),
        lambda t: peft.IA3Config(target_modules=t, feedforward_modules=t[-1:]),
        MODELS,
    ),
    "VERA": (
        lambda m, t: relatives.inject_vera(m, 5, t, key=7),
        lambda t: peft.VeraConfig(r=5, target_modules=t, projection_prng_key=7),
        MODELS,
    ),
    "LOHA": (
        lambda m, t: relatives.inject_loha(m, 3, 5.5, t),
        lambda t: peft.LoHaConfig(r=3, alpha=5.5, target_modules=t),
        ("llama", "bert"),
    ),
    "LOKR": (
        lambda m, t: relatives.inject_lokr(m, 2, 5, t),
        lambda t: peft.LoKrConfig(r=2, alpha=5, target_modules=t),
        ("llama", "bert"),
    ),
    "OFT": (
        lambda m, t: relatives.inject_oft(m, 4, t),
        lambda t: peft.OFTConfig(oft_block_size=4, target_modules=t),
        ("llama", "bert"),
    ),
    "OFT, exact": (
        lambda m, t: relatives.inject_oft(m, 4, t, exact=True),
        lambda t: peft.OFTConfig(oft_block_size=4, target_modules=t, use_cayley_neumann=False),
        ("llama", "bert"),
    ),
    "DoRA": (
        lambda m, t: inject_dora(m, 3, 5, t, use_rslora=True),
        lambda t: peft.LoraConfig(r=3, lora_alpha=5, target_modules=t, use_dora=True, use_rslora=True),
        MODELS,
    ),
}
CASES = [(name, kind) for name, (_, _, kinds) in TYPES.items() for kind in kinds]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def from_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of missing and of unexpected keys
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def shake(model, spread=0.3):
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(spread * torch.randn_like(p))


@pytest.mark.parametrize("name, kind", CASES)
def test_both_ways(tmp_path, name, kind):
    inject, config, _ = TYPES[name]
    base = MODELS[kind]().eval()
    ours = copy.deepcopy(base)
    names = inject(ours, LINEARS[kind])
    shake(ours, 0.1 if "OFT" in name else 0.3)
    save_adapter(ours, tmp_path / "ours", "some/model")
    theirs = from_peft(base, tmp_path / "ours")
    assert_same(logits(ours), logits(theirs), ulps=64)
    assert (logits(ours) - logits(base)).abs().max() > 0.02
    assert theirs.peft_config["default"].base_model_name_or_path == "some/model"
    again = copy.deepcopy(base)
    assert load_adapter(again, tmp_path / "ours") == names
    assert torch.equal(logits(again), logits(ours)) and set(trained(again)) == set(trained(ours))

    theirs = peft_model(base, config(LINEARS[kind]))
    shake(theirs, 0.1 if "OFT" in name else 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = copy.deepcopy(base)
    assert load_adapter(loaded, tmp_path / "theirs") == names
    assert_same(logits(loaded), logits(theirs), ulps=64)
    if name != "DoRA":  # and into a model that is adapted already
        shake(loaded)
        load_adapter(loaded, tmp_path / "theirs")
        assert_same(logits(loaded), logits(theirs), ulps=64)


def test_ranks_and_alphas_by_layer(tmp_path):
    base = tiny_llama().eval()
    ours = copy.deepcopy(base)
    inject_lora(ours, 2, 3, ["q_proj", "v_proj"])
    inject_lora(ours, 5, 3, [r"model.layers.1.mlp.up_proj"])
    inject_lora(ours, 2, 9, ["down_proj"])
    shake(ours)
    save_adapter(ours, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["r"] == 2 and list(config["rank_pattern"].values()) == [5] and list(config["alpha_pattern"].values()) == [9, 9]
    assert_same(logits(from_peft(base, tmp_path / "ours")), logits(ours), ulps=64)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(ours))

    options = dict(rank_pattern={"layers.0.self_attn.q_proj": 7, "q_proj": 4}, alpha_pattern={r".*layers\.1\..*": 11})
    for dora in (False, True):
        theirs = peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], use_dora=dora, **options))
        shake(theirs)
        theirs.save_pretrained(tmp_path / f"theirs{dora}")
        loaded = copy.deepcopy(base)
        load_adapter(loaded, tmp_path / f"theirs{dora}")
        assert_same(logits(loaded), logits(theirs), ulps=64)
        found = {name: (layer.r, layer.lora_alpha) for name, layer in lora_layers(loaded)}
        assert found["model.layers.0.self_attn.q_proj"] == (7, 5) and found["model.layers.1.self_attn.q_proj"] == (4, 11)
        assert all(isinstance(layer, DoRALayer) == dora for _, layer in lora_layers(loaded))


def prompts(base):
    from reference.soft_prompts import prefix_sizes

    layers, heads, width = prefix_sizes(base.config)
    numbers = 2 * layers * heads * width
    text = functools.partial(PromptTuning, copy.deepcopy(base))
    prefix = functools.partial(PrefixTuning, copy.deepcopy(base), make_cache=DynamicCache)
    return {
        "PROMPT_TUNING": (lambda: text(Prompt(torch.randn(5, SMALL))), peft.PromptTuningConfig, {}),
        "P_TUNING": (lambda: text(PromptEncoder(5, SMALL, 7)), peft.PromptEncoderConfig, {"encoder_hidden_size": 7}),
        "P_TUNING, LSTM": (
            lambda: text(PromptEncoder(5, SMALL, 7, "lstm")),
            peft.PromptEncoderConfig,
            {"encoder_hidden_size": 7, "encoder_reparameterization_type": "LSTM"},
        ),
        "PREFIX_TUNING": (lambda: prefix(Prefix(torch.randn(5, numbers))), peft.PrefixTuningConfig, {}),
        "PREFIX_TUNING, projected": (
            lambda: prefix(PrefixEncoder(5, heads * width, 9, numbers)),
            peft.PrefixTuningConfig,
            {"prefix_projection": True, "encoder_hidden_size": 9},
        ),
    }


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("name", ["PROMPT_TUNING", "P_TUNING", "P_TUNING, LSTM", "PREFIX_TUNING", "PREFIX_TUNING, projected"])
def test_soft_prompts_both_ways(tmp_path, make, name):
    base = make().eval()
    tune, config, options = prompts(base)[name]
    ours = tune()
    save_adapter(ours, tmp_path / "ours")
    assert list(load_file(tmp_path / "ours" / "adapter_model.safetensors")) == ["prompt_embeddings"]
    theirs = from_peft(base, tmp_path / "ours")
    assert theirs.peft_config["default"].peft_type == name.partition(",")[0]
    assert_same(logits(theirs), logits(ours), ulps=4)
    again = load_prompt(copy.deepcopy(base), tmp_path / "ours", DynamicCache)
    assert_same(logits(again), logits(ours), ulps=4)

    theirs = peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=5, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_prompt(copy.deepcopy(base), tmp_path / "theirs", DynamicCache)
    assert_same(logits(loaded), logits(theirs), ulps=4)
    assert all(name.startswith(("prompt.", "prefix.")) for name in trained(loaded))


def test_a_prompt_for_bert(tmp_path):
    base = tiny_bert().eval()
    theirs = peft_model(base, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"not supported here: modules_to_save=.*classifier"):  # peft saves the new head with it
        load_prompt(copy.deepcopy(base), tmp_path / "theirs")
    ours = PromptTuning(copy.deepcopy(base), Prompt(torch.randn(5, SMALL)))
    save_adapter(ours, tmp_path / "ours", task_type="FEATURE_EXTRACTION")
    again = load_prompt(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(again(IDS, MASK).logits, ours(IDS, MASK).logits)


# ---- refusals -------------------------------------------------------------------------------------------------------------------------


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("IA3", dict(modules_to_save=["lm_head"]), r"not supported here: modules_to_save=\['lm_head'\]"),
        ("IA3", dict(init_ia3_weights=False), "init_ia3_weights=False: only True"),
        ("IA3", dict(feedforward_modules=["o_proj"]), "is none of the target_modules"),
        ("VERA", dict(projection_prng_key=None), "key must be an integer"),
        ("VERA", dict(r=4), "of another shape"),
        ("VERA", dict(vera_dropout=0.1), "vera_dropout=0.1: only 0.0"),
        ("LOHA", dict(rank_pattern={"q_proj": 2}), "not supported here: rank_pattern"),
        ("LOHA", dict(module_dropout=0.5), "module_dropout=0.5"),
        ("LOKR", dict(decompose_both=True), "not supported here: decompose_both=True"),
        ("LOKR", dict(decompose_factor=8), "decompose_factor=8: only -1"),
        ("OFT", dict(block_share=True), "not supported here: block_share=True"),
        ("OFT", dict(coft=True), "not supported here: coft=True"),
        ("OFT", dict(num_cayley_neumann_terms=3), "num_cayley_neumann_terms=3: only 5"),
        ("OFT", dict(oft_block_size=8), "of another shape"),
        ("DoRA", dict(bias="all"), "not supported here: bias='all'"),
        ("DoRA", dict(use_dora=False), "unexpected: .*lora_magnitude_vector"),
        ("DoRA", dict(target_modules=["embed_tokens"]), "DoRA is for linear layers"),
    ],
)
def test_what_is_refused_leaves_the_model(tmp_path, name, changes, words):
    model = tiny_llama()
    TYPES[name][0](model, LINEARS["llama"])
    save_adapter(model, tmp_path)
    plain = tiny_llama()
    before = snapshot(plain)
    with pytest.raises((ValueError, TypeError), match=words):
        load_adapter(plain, edit(tmp_path, **changes))
    assert_unchanged(plain, before)


def test_vera_with_other_matrices_is_refused(tmp_path):
    theirs = peft_model(tiny_llama(), TYPES["VERA"][1](["q_proj"]))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    load_adapter(tiny_llama(), tmp_path)
    tensors["base_model.vera_A"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="are not those of its projection_prng_key"):
        load_adapter(tiny_llama(), tmp_path)


def test_broken_values_and_mixed_models(tmp_path):
    model = tiny_llama()
    inject_ia3(model)
    save_adapter(model, tmp_path)
    first = next(iter(trained(model).values()))
    first.data[0] = torch.inf
    with pytest.raises(ValueError, match="holds NaN, infinity"):
        save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.clone().fill_(torch.nan) for name, tensor in tensors.items()}, file)
    plain = tiny_llama()
    before = snapshot(plain)
    with pytest.raises(ValueError, match="holds NaN"):
        load_adapter(plain, tmp_path)
    assert_unchanged(plain, before)
    save_file(tensors, file)
    other = tiny_llama()
    relatives.inject_oft(other, 4)
    with pytest.raises(ValueError, match="load into a plain model"):
        load_adapter(other, edit(tmp_path, target_modules=LINEARS["llama"]))
    mixed = tiny_llama()
    inject_dora(mixed, 2, 3, ["q_proj"])
    inject_lora(mixed, 2, 3, ["v_proj"])
    with pytest.raises(ValueError, match="differ in DoRA"):
        save_adapter(mixed, tmp_path / "mixed")
    inject_dora(dora := tiny_llama(), 2, 3, ["q_proj"])
    with pytest.raises(ValueError, match="holds LoRA layers already"):
        save_adapter(dora, tmp_path / "dora")
        load_adapter(dora, tmp_path / "dora")


def test_prompts_that_do_not_fit(tmp_path):
    base = tiny_llama()
    save_adapter(PromptTuning(copy.deepcopy(base), Prompt(torch.randn(5, SMALL))), tmp_path / "prompt")
    save_adapter(PrefixTuning(copy.deepcopy(base), Prefix(torch.randn(5, 32)), DynamicCache), tmp_path / "prefix")
    with pytest.raises(ValueError, match="stands around the model: call load_prompt"):
        load_adapter(base, tmp_path / "prompt")
    with pytest.raises(ValueError, match="needs a cache: give make_cache"):
        load_prompt(base, tmp_path / "prefix")
    other = shutil.copytree(tmp_path / "prompt", tmp_path / "other")
    for changes, words in (
        (dict(num_transformer_submodules=2), "encoder and decoder"),
        (dict(num_transformer_submodules=1, num_virtual_tokens=6), "of another shape"),
        (dict(num_virtual_tokens=5, modules_to_save=["score"]), "not supported here: modules_to_save"),
        (dict(peft_type="CPT"), "peft_type must be one of PROMPT_TUNING, P_TUNING, PREFIX_TUNING, got 'CPT'"),
    ):
        with pytest.raises(ValueError, match=words):
            load_prompt(base, edit(other, **changes))
    inject_ia3(plain := tiny_llama())
    save_adapter(plain, tmp_path / "ia3")
    with pytest.raises(ValueError, match="got 'IA3'"):
        load_prompt(base, tmp_path / "ia3")
    assert all(p.requires_grad for p in base.parameters())


def test_the_helper_fills_both_alike():
    one, other = tiny_llama(), tiny_llama()
    for model in (one, other):
        inject_ia3(model)
    fill(one, other)
    assert all(torch.equal(p, trained(other)[name]) for name, p in trained(one).items())
