"""What the tests of LoRA share: how equal is equal, and small transformers."""

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

# Ours and peft's run the same products in the same order; a library may sum one of them in another order. That costs a few units in the
# last place: of float32 (2^-23) where sums are kept in float32, of the half type where a result is stored in it.
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_same(actual, expected, ulps=4, half_ulps=1, of=None, size=None):
    """Equal up to some units in the last place of the largest entry, or of ``size``: ``ulps`` of float32, ``half_ulps`` of a half type."""
    assert actual.dtype == expected.dtype
    dtype = of or actual.dtype
    tolerance = (ulps if dtype == torch.float32 else half_ulps) * ULP[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * (size or expected.abs().max().item()))


# Weights drawn wider than a real model's: a change in any of its layers then shows in the logits.
SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.4)


def tiny_llama(**options):
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32, **options))


def tiny_bert():
    return BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=32, num_labels=3))
