"""reference.soft_prompts against peft, bit for bit; what a prompt and a prefix can hold; their errors."""

import copy

import peft
import pytest
import torch
from family_helpers import IDS, MASK, SMALL, peft_model, tiny_gpt2, trained
from lora_helpers import assert_same, tiny_bert, tiny_llama
from transformers import DynamicCache

from reference.soft_prompts import (
    Prefix,
    PrefixEncoder,
    PrefixTuning,
    Prompt,
    PromptEncoder,
    PromptTuning,
    prefix_sizes,
    sampled_start,
    text_start,
)

CAUSAL = {"llama": tiny_llama, "gpt2": tiny_gpt2}
P = 5


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def renamed(encoder):
    """The state of peft's encoder under the names here."""
    names = (("embedding.weight", "embedding"), ("lstm_head", "lstm"), ("mlp_head", "mlp"))
    state = {}
    for name, value in encoder.state_dict().items():
        for old, new in names:
            name = name.replace(old, new)
        state[name] = value.clone()
    return state


def assert_same_training(ours, theirs, part, labels=True):
    """Loss, logits and gradients bit for bit; after ten steps too."""
    encoder, steps = theirs.prompt_encoder["default"], 10
    mine, other = dict(part.named_parameters()), dict(encoder.named_parameters())
    other = dict(zip(renamed(encoder), other.values(), strict=True))
    optimizers = [torch.optim.AdamW(group.values(), lr=1e-2) for group in (mine, other)]
    for _ in range(steps):
        results = [model(input_ids=IDS, attention_mask=MASK, labels=IDS if labels else None) for model in (ours, theirs)]
        assert torch.equal(results[0].logits, results[1].logits)
        for result, optimizer in zip(results, optimizers, strict=True):
            optimizer.zero_grad()
            (result.loss if labels else result.logits.square().sum()).backward()
            optimizer.step()
        # sums over a batch may be taken in another order: a last place
        for name in mine:
            assert_same(mine[name].grad, other[name].grad, ulps=64)
            other[name].data.copy_(mine[name].data)
    assert set(trained(ours)) == {f"{'prefix' if hasattr(ours, 'prefix') else 'prompt'}.{name}" for name in mine}


@pytest.mark.parametrize("kind", CAUSAL)
def test_prompt_tuning(kind):
    base = CAUSAL[kind]().eval()
    theirs = peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    ours = PromptTuning(copy.deepcopy(base), Prompt(theirs.prompt_encoder["default"].embedding.weight))
    assert_same_training(ours, theirs, ours.prompt)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("network", ["mlp", "lstm"])
def test_p_tuning(kind, network):
    base = CAUSAL[kind]().eval()
    options = dict(encoder_reparameterization_type=network.upper(), encoder_hidden_size=7)
    theirs = peft_model(base, peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **options))
    encoder = PromptEncoder(P, SMALL, 7, network)
    encoder.load_state_dict(renamed(theirs.prompt_encoder["default"]))
    ours = PromptTuning(copy.deepcopy(base), encoder)
    assert_same_training(ours, theirs, ours.prompt)


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("projected", [False, True])
def test_prefix_tuning(kind, projected):
    base = CAUSAL[kind]().eval()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=projected, encoder_hidden_size=9)
    theirs = peft_model(base, config)
    encoder = theirs.prompt_encoder["default"]
    layers, heads, width = prefix_sizes(base.config)
    prefix = Prefix(encoder.embedding.weight) if not projected else PrefixEncoder(P, heads * width, 9, 2 * layers * heads * width)
    prefix.load_state_dict(renamed(encoder))
    ours = PrefixTuning(copy.deepcopy(base), prefix, DynamicCache)
    assert_same_training(ours, theirs, ours.prefix)


def test_prompts_for_bert():
    """Prefixes are not: BERT reads no cache."""
    base = tiny_bert().eval()
    theirs = peft_model(base, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P))
    ours = PromptTuning(copy.deepcopy(base), Prompt(theirs.prompt_encoder["default"].embedding.weight))
    for p in theirs.base_model.parameters():
        p.requires_grad_(False)  # peft trains the classifier too
    assert_same_training(ours, theirs, ours.prompt, labels=False)
    with_types = ours(IDS, MASK, token_type_ids=torch.zeros_like(IDS))
    assert torch.equal(with_types.logits, ours(IDS, MASK).logits)
    assert ours(IDS, labels=torch.tensor([0, 2])).loss.isfinite()  # a class for each text is passed on as it is


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_prompt_and_a_prefix_can_hold_any_text(kind):
    base = CAUSAL[kind]().eval()
    text = torch.randint(40, (1, P))
    full = base(input_ids=torch.cat([text.expand(2, -1), IDS], 1)).logits
    prompt = PromptTuning(copy.deepcopy(base), Prompt(text_start(base.get_input_embeddings(), text[0].tolist(), P)))
    assert_same(prompt(IDS).logits, full)
    with torch.no_grad():
        cache = base(input_ids=text, use_cache=True).past_key_values
    prefix = Prefix.from_cache([(layer.keys, layer.values) for layer in cache.layers])
    assert_same(PrefixTuning(copy.deepcopy(base), prefix, DynamicCache)(IDS).logits, full[:, P:], ulps=64)


def test_zero_prefixes_are_not_neutral():
    base = tiny_llama().eval()
    layers, heads, width = prefix_sizes(base.config)
    zero = PrefixTuning(copy.deepcopy(base), Prefix(torch.zeros(P, 2 * layers * heads * width)), DynamicCache)
    assert (zero(IDS).logits - base(input_ids=IDS).logits).abs().max() > 0.05


def test_keys_and_values_alternate_by_layer():
    base = tiny_llama()
    layers, heads, width = prefix_sizes(base.config)
    rows = torch.arange(2.0 * layers * heads * width)[None].repeat(3, 1) + 1000 * torch.arange(3)[:, None]
    pairs = PrefixTuning(base, Prefix(rows), DynamicCache).keys_and_values(2)
    assert len(pairs) == layers and pairs[0][0].shape == (2, heads, 3, width)
    size = heads * width
    for layer, pair in enumerate(pairs):
        for which, tensor in enumerate(pair):
            first = (2 * layer + which) * size
            assert tensor[1, 1, 2, 0] == 2000 + first + width  # token 2, head 1


def test_starts():
    table = tiny_llama().get_input_embeddings()
    start = text_start(table, [3, 1, 4], 7)
    assert torch.equal(start, table.weight[[3, 1, 4, 3, 1, 4, 3]])
    assert torch.equal(text_start(table, [3, 1, 4], 2), table.weight[[3, 1]])
    drawn = sampled_start(table, 4, torch.Generator().manual_seed(0))
    assert all(any(torch.equal(row, each) for each in table.weight) for row in drawn)
    before = table.weight.clone()
    Prompt(start).embedding.data.zero_()
    assert torch.equal(table.weight, before)


def test_half_precision_keeps_float32_prompts():
    base = tiny_llama().to(torch.bfloat16).eval()
    ours = PromptTuning(base, Prompt(sampled_start(base.get_input_embeddings(), P)))
    out = ours(IDS, MASK, labels=IDS)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and ours.prompt.embedding.grad.dtype == torch.float32


def test_what_is_refused():
    base = tiny_llama()
    with pytest.raises(ValueError, match="prompt has width 7, the model's embedding 16"):
        PromptTuning(base, Prompt(torch.zeros(P, 7)))
    assert all(p.requires_grad for p in base.parameters())
    with pytest.raises(ValueError, match=r"shape \(tokens, width\)"):
        Prompt(torch.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        Prompt(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="ids is empty"):
        text_start(base.get_input_embeddings(), [], 3)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        sampled_start(base.get_input_embeddings(), 0)
    with pytest.raises(ValueError, match="network must be 'mlp' or 'lstm'"):
        PromptEncoder(2, 3, network="gru")
    with pytest.raises(ValueError, match="the model wants 32"):
        PrefixTuning(base, Prefix(torch.zeros(P, 31)), DynamicCache)
    prompt = PromptTuning(tiny_llama(), Prompt(torch.zeros(P, SMALL)))
    with pytest.raises(ValueError, match="position_ids must not be given"):
        prompt(IDS, position_ids=IDS)
    prefix = PrefixTuning(tiny_llama(), Prefix(torch.zeros(P, 32)), DynamicCache)
    with pytest.raises(ValueError, match="past_key_values must not be given"):
        prefix(IDS, past_key_values=DynamicCache())
    prefix.base.gradient_checkpointing_enable()
    prefix.train()
    with pytest.raises(ValueError, match="runs its layers without the cache"):
        prefix(IDS)
    prefix.eval()
    prefix(IDS)


def test_what_answers_say_of_pefts_encoders():
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    assert config.encoder_reparameterization_type == peft.PromptEncoderReparameterizationType.MLP and config.encoder_num_layers == 2
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
