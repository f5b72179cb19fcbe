"""Whole modules and single rows that train beside the factors: as in peft, in memory, over ten steps and in files."""

import copy
import json
import warnings

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_helpers import assert_same, tiny_bert, tiny_llama
from safetensors.torch import load_file
from torch import nn

from reference.adapter_format import load_adapter, save_adapter
from reference.lora import TrainedRows, inject_lora, lora_layers, lora_state_dict, merge_lora, trainable_parameters
from reference.qlora import quantize_linears

IDS = torch.tensor([[3, 7, 39, 3, 12], [39, 0, 3, 5, 38]])
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)

# The model, what is asked of inject_lora, and what says the same to peft.
CASES = {
    "head": (UNTIED, dict(modules_to_save=["lm_head"]), {}),
    "embedding": (UNTIED, dict(modules_to_save=["embed_tokens"]), {}),
    "both": (UNTIED, dict(modules_to_save=["embed_tokens", "lm_head"]), {}),
    "norm": (UNTIED, dict(modules_to_save=["model.norm"]), {}),
    "tied, named by the embedding": (TIED, dict(modules_to_save=["embed_tokens"]), dict(ensure_weight_tying=True)),
    "tied, named by both": (TIED, dict(modules_to_save=["embed_tokens", "lm_head"]), dict(ensure_weight_tying=True)),
    "rows": (UNTIED, dict(trainable_token_indices=[39, 3]), {}),
    "rows of both": (UNTIED, dict(trainable_token_indices={"embed_tokens": [3], "lm_head": [3, 38]}), {}),
    "tied rows": (TIED, dict(trainable_token_indices=[39, 3]), {}),
    "tied rows by name": (TIED, dict(trainable_token_indices={"embed_tokens": [39, 3]}), {}),
    "rows and norm": (TIED, dict(trainable_token_indices=[3], modules_to_save=["model.norm"]), {}),
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def quiet_peft_model(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**options))


def pair(kind, asked, more):
    """The same model adapted here and by peft, from the same factors, moved from where they start."""
    torch.manual_seed(0)
    ours = tiny_llama(**kind)
    theirs = quiet_peft_model(copy.deepcopy(ours), r=2, lora_alpha=3, target_modules=["q_proj"], **asked, **more)
    inject_lora(ours, r=2, lora_alpha=3, target_modules=["q_proj"], **asked)
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            other = theirs.base_model.model.get_submodule(name)
            layer.lora_B.normal_()
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
    return ours, theirs


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("case", CASES)
def test_as_in_peft(case, tmp_path):
    ours, theirs = pair(*CASES[case])
    assert trainable_parameters(ours)[0] == theirs.get_nb_trainable_parameters()[0]
    assert_same(logits(ours), logits(theirs), ulps=16)
    train(ours, 10), train(theirs, 10)
    assert_same(logits(ours), logits(theirs), ulps=2000)  # Adam divides the last digits of a gradient by its size

    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {key: value.shape for key, value in files[0].items()} == {key: value.shape for key, value in files[1].items()}

    plain = [tiny_llama(**CASES[case][0]) for _ in range(2)]
    for model in plain:
        torch.manual_seed(0)
        model.load_state_dict(tiny_llama(**CASES[case][0]).state_dict())
    load_adapter(plain[0], tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(plain[1], tmp_path / "ours")
    assert_same(logits(plain[0]), logits(theirs), ulps=16)
    assert_same(logits(read), logits(ours), ulps=16)

    before, tied = logits(ours), ours.config.tie_word_embeddings
    merge_lora(ours)
    assert_same(logits(ours), before, ulps=32)
    assert not any(isinstance(part, TrainedRows) for part in ours.modules())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied == CASES[case][0]["tie_word_embeddings"]
    assert trainable_parameters(ours)[0] == 0


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_what_peft_untied_is_untied_here(names, tmp_path):
    """peft's default gives each named module a copy of its own: its file may hold two different matrices."""
    torch.manual_seed(0)
    model = tiny_llama(**TIED)
    theirs = quiet_peft_model(copy.deepcopy(model), r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=names)
    train(theirs, 3)
    theirs.save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    assert_same(logits(model), logits(theirs), ulps=16)
    assert not model.config.tie_word_embeddings
    save_adapter(model, tmp_path / "again")
    assert not json.loads((tmp_path / "again" / "adapter_config.json").read_text())["ensure_weight_tying"]


def test_a_file_with_two_matrices_does_not_fit_a_tied_adapted_model(tmp_path):
    model = tiny_llama(**UNTIED)
    inject_lora(model, r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    save_adapter(model, tmp_path)
    tied = tiny_llama(**TIED)
    inject_lora(tied, r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    before = copy.deepcopy(tied.state_dict())
    with pytest.raises(ValueError, match=r"two values for .*embed_tokens.* and .*lm_head.*load into a plain model"):
        load_adapter(tied, tmp_path)
    assert all(torch.equal(value, tied.state_dict()[key]) for key, value in before.items())


def test_other_rows_do_not_fit(tmp_path):
    model = tiny_llama()
    inject_lora(model, r=2, lora_alpha=3, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    save_adapter(model, tmp_path)
    other = tiny_llama()
    inject_lora(other, r=2, lora_alpha=3, target_modules=["q_proj"], trainable_token_indices=[1, 3])
    with pytest.raises(ValueError, match=r"tokens \[\[1, 3\]\], the file is for \[\[1, 2\]\]"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("kind", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("variant", [dict(use_dora=True), dict(rank_pattern={"q_proj": 4})], ids=["dora", "ranks"])
def test_beside_other_adapters(variant, kind, tmp_path):
    """A head and rows, with DoRA and with ranks by layer: what peft wrote, and what is written of it again, gives peft's logits."""
    torch.manual_seed(0)
    model = tiny_llama(**kind)
    plain = copy.deepcopy(model)
    asked = {"modules_to_save": ["lm_head"]} if kind is UNTIED else {"trainable_token_indices": [39, 3]}
    theirs = quiet_peft_model(copy.deepcopy(model), r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], **variant, **asked)
    train(theirs, 3)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    assert_same(logits(model), logits(theirs), ulps=32)
    save_adapter(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "ours")), logits(theirs), ulps=32)


def test_a_classifier_as_peft_saves_it(tmp_path):
    """A sequence classifier's config names heads that this model has not, as peft's task type does."""
    torch.manual_seed(0)
    model = tiny_bert()
    theirs = quiet_peft_model(copy.deepcopy(model), r=2, lora_alpha=3, target_modules=["query"], task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path)
    assert {"classifier", "score"} <= set(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"])
    with torch.no_grad():
        model.classifier.weight.zero_()
    load_adapter(model, tmp_path)
    assert_same(logits(model.eval()), logits(theirs.eval()), ulps=16)
    assert model.classifier.weight.requires_grad


@given(
    seed=st.integers(0, 99),
    indices=st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True),
    padding=st.none() | st.integers(0, 11),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rows_are_the_weight_with_these_rows(seed, indices, padding, dtype):
    """Forward and gradient, against the whole weight with its rows replaced."""
    torch.manual_seed(seed)
    embedding = nn.Embedding(12, 5, padding_idx=padding, dtype=dtype)
    head = nn.Linear(5, 12, dtype=dtype)
    embedding.weight = head.weight
    rows = TrainedRows(embedding, indices)
    both = rows, TrainedRows(head, indices, rows.rows)
    with torch.no_grad():
        rows.rows.add_(1)
    weight = head.weight.detach().clone().requires_grad_()
    replaced = weight.index_copy(0, torch.tensor(indices), rows.rows.detach().to(dtype))
    replaced.retain_grad()
    ids = torch.randint(12, (3, 4))
    x = torch.randn(3, 4, 5, dtype=dtype)
    expected = nn.functional.embedding(ids, replaced, padding), nn.functional.linear(x, replaced, head.bias)
    actual = both[0](ids), both[1](x)
    assert torch.equal(actual[0], expected[0])
    assert_same(actual[1], expected[1], ulps=8, half_ulps=2)
    (actual[0].float().sum() + actual[1].float().square().sum()).backward()
    (expected[0].float().sum() + expected[1].float().square().sum()).backward()
    assert_same(rows.rows.grad, replaced.grad[indices].float(), of=dtype, ulps=32, half_ulps=8)


def test_the_other_rows_stay_to_the_bit_and_a_new_token_is_learned():
    torch.manual_seed(0)
    model = tiny_llama(**TIED)
    before = model.lm_head.weight.clone()
    inject_lora(model, r=2, lora_alpha=3, target_modules=["q_proj"], trainable_token_indices=[39])
    start = model(input_ids=IDS, labels=IDS).loss.item()
    train(model, 30)
    assert model(input_ids=IDS, labels=IDS).loss < start - 1
    merge_lora(model)
    changed = (model.lm_head.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == [39]


def test_all_linear_leaves_out_what_trains_whole():
    model = tiny_bert()
    names = inject_lora(model, r=2, lora_alpha=3, modules_to_save=["encoder.layer.0"])
    assert names and not any("layer.0" in name for name in names)
    assert all(parameter.requires_grad for parameter in model.bert.encoder.layer[0].parameters())
    assert {name for name in lora_state_dict(model) if "layer.0" in name} == {
        f"bert.encoder.layer.0.{name}" for name, _ in model.bert.encoder.layer[0].named_parameters()
    }


def test_a_second_adapter_keeps_what_the_first_trains():
    model = tiny_llama()
    inject_lora(model, r=2, lora_alpha=3, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3])
    inject_lora(model, r=2, lora_alpha=3, target_modules=["v_proj"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"lm_head.weight", "model.embed_tokens.rows"} <= trained and len(trained) == 2 + 2 * 4


def test_a_copy_of_the_model_is_adapted_alike(tmp_path):
    model = tiny_llama(**TIED)
    inject_lora(model, r=2, lora_alpha=3, target_modules=["q_proj"], trainable_token_indices=[3], modules_to_save=["model.norm"])
    twin = copy.deepcopy(model)
    assert twin.lm_head.rows is twin.model.embed_tokens.rows
    save_adapter(twin, tmp_path)
    assert load_adapter(model, tmp_path)


def test_what_trains_outside_is_not_lost(tmp_path):
    model = tiny_llama()
    inject_lora(model, r=2, lora_alpha=3, target_modules=["q_proj"])
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lm_head.weight train outside the adapter, and would be lost: name their modules"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def quantized():
    model = tiny_llama()
    quantize_linears(model, skip=())
    return model


REFUSED = {
    "no such module": (tiny_llama, dict(modules_to_save=["head"]), ValueError, "'head' names no module"),
    "a string": (tiny_llama, dict(modules_to_save="lm_head"), ValueError, "must be a list of names, got 'lm_head'"),
    "packed": (quantized, dict(modules_to_save=["lm_head"]), ValueError, "lm_head.*uint8, which can't be trained"),
    "adapted and whole": (tiny_llama, dict(modules_to_save=["q_proj"]), ValueError, "q_proj is to be adapted.*choose one"),
    "rows and whole": (
        tiny_llama,
        dict(modules_to_save=["embed_tokens"], trainable_token_indices=[1]),
        ValueError,
        "rows of model.embed_tokens train whole already",
    ),
    "adapted and rows": (
        tiny_llama,
        dict(target_modules=["embed_tokens"], trainable_token_indices=[1]),
        ValueError,
        "embed_tokens is to be adapted.*trained rows: choose one",
    ),
    "too high": (tiny_llama, dict(trainable_token_indices=[40]), ValueError, "trainable_token_indices must be from 0 to 39, got 40"),
    "negative": (tiny_llama, dict(trainable_token_indices=[-1]), ValueError, "got -1"),
    "twice": (tiny_llama, dict(trainable_token_indices=[1, 1]), ValueError, r"each once, got \[1, 1\]"),
    "not a token": (tiny_llama, dict(trainable_token_indices=["<new>"]), TypeError, "must be an integer, got '<new>'"),
    "no embedding": (tiny_llama, dict(trainable_token_indices={"model.norm": [1]}), TypeError, "only rows of an nn.Embedding or nn.Linear"),
    "no such layer": (tiny_llama, dict(trainable_token_indices={"wte": [1]}), ValueError, "'wte' names no layer"),
    "tied, other rows": (
        lambda: tiny_llama(**TIED),
        dict(trainable_token_indices={"embed_tokens": [1], "lm_head": [2]}),
        ValueError,
        "'lm_head' shares its weight.*the same rows",
    ),
    "packed head": (quantized, dict(trainable_token_indices={"lm_head": [1]}), TypeError, "only rows of|not trainable"),
    "no input embeddings": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        dict(target_modules=["0"], trainable_token_indices=[1]),
        ValueError,
        "get_input",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_unchanged(case):
    make, asked, error, words = REFUSED[case]
    model = make()
    before = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    with pytest.raises(error, match=words):
        inject_lora(model, r=2, lora_alpha=3, **{"target_modules": ["q_proj"], **asked})
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == before
    assert not list(lora_layers(model)) and not any(isinstance(part, TrainedRows) for part in model.modules())


def test_a_broken_row_is_not_merged():
    model = tiny_llama()
    inject_lora(model, r=2, lora_alpha=3, target_modules=["q_proj"], trainable_token_indices=[3])
    with torch.no_grad():
        model.model.embed_tokens.rows[0, 0] = torch.nan
    with pytest.raises(ValueError, match="embed_tokens: the trained rows hold NaN"):
        merge_lora(model)
    assert all(not layer.merged for _, layer in lora_layers(model))


def test_peft_warns_when_one_of_two_tied_tables_is_trained_whole():
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        peft.get_peft_model(tiny_llama(**TIED), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_the_defaults_that_answers_state():
    config = peft.LoraConfig()
    assert (config.r, config.lora_alpha, config.use_rslora, config.ensure_weight_tying) == (8, 8, False, False)
