"""Bytes on a card and between cards, from shapes. What is counted in running processes is in tests/test_sharded.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.memory import SHAPES
from reference.memory.recipes import QLORA, weights
from reference.memory.sharding import received_bytes, sharded_memory, share_bytes, whole_everywhere
from reference.model_shapes import LLAMA_2_7B, LLAMA_2_70B, LLAMA_3_2_1B

SHAPED = [shape for shape in SHAPES.values() if shape.like_llama]
TOKENS = 4096


@pytest.mark.parametrize("shape", SHAPED, ids=lambda shape: shape.name)
def test_on_one_card_it_is_the_model_of_unit_00(shape):
    """But for code books, of which each layer of unit 00 counts its own."""
    alone, known = sharded_memory(shape, 1), weights(shape, QLORA).bytes
    books = 4 * (16 + 256) * len(shape.linears) * shape.layers
    assert alone.shares == known - books
    assert alone.adapters == 16 * shape.adapter_parameters(16) and alone.received == 0


@pytest.mark.parametrize("shape", SHAPED, ids=lambda shape: shape.name)
@pytest.mark.parametrize("cards", [2, 3, 8])
def test_shares_add_up(shape, cards):
    alone, each = sharded_memory(shape, 1), sharded_memory(shape, cards)
    nested = whole_everywhere(shape)
    whole = cards * (each.shares - nested)
    assert alone.shares - nested <= whole < 1.01 * (alone.shares - nested)  # more where rows don't divide
    assert each.held == each.shares + 12 * each.adapters // 16


def test_the_formula_of_the_docstring():
    """Rows that divide: (N−1)/N · (2·w + e + g)."""
    alone = sharded_memory(LLAMA_2_7B, 1)
    g = 4 * LLAMA_2_7B.adapter_parameters(16)
    e = 2 * (2 * LLAMA_2_7B.embedding + LLAMA_2_7B.hidden)
    w = alone.shares - whole_everywhere(LLAMA_2_7B) - e + g
    for cards in (2, 4, 8):
        assert received_bytes("FSDP", LLAMA_2_7B, cards, TOKENS) == (cards - 1) / cards * (2 * w + e + g)
        assert received_bytes("DDP", LLAMA_2_7B, cards, TOKENS) == 2 * (cards - 1) / cards * g


def test_sixteen_bits_send_four_times_as_much():
    four, sixteen = (sharded_memory(LLAMA_2_70B, 8, block=block) for block in (64, None))
    assert 3.5 < sixteen.received / four.received < 3.9
    assert 3.5 < sixteen.shares / four.shares < 3.9


@given(st.sampled_from(["DDP", "FSDP", "tensor", "pipeline"]), st.sampled_from(SHAPED), st.integers(2, 64))
def test_one_card_receives_nothing_and_more_cards_never_less(engine, shape, cards):
    assert received_bytes(engine, shape, 1, TOKENS) == 0
    assert 0 < received_bytes(engine, shape, cards, TOKENS) <= received_bytes(engine, shape, 2 * cards, TOKENS)


def test_only_two_engines_send_activations():
    for engine, grows in {"DDP": 1, "FSDP": 1, "tensor": 2, "pipeline": 2}.items():
        once, twice = (received_bytes(engine, LLAMA_2_7B, 4, tokens) for tokens in (TOKENS, 2 * TOKENS))
        assert twice == grows * once
    per_layer = received_bytes("tensor", LLAMA_3_2_1B, 2, TOKENS) / LLAMA_3_2_1B.layers
    assert per_layer == 6 * 2 * TOKENS * LLAMA_3_2_1B.hidden  # of two cards each receives a whole stream a sum


def test_a_share_is_filled_up():
    assert [share_bytes([(33, 10), (1, 4)], cards) for cards in (1, 2, 3)] == [334, 174, 114]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="cards must be at least 1, got 0"):
        sharded_memory(LLAMA_2_7B, 0)
    with pytest.raises(ValueError, match="engine must be one of DDP, FSDP, tensor, pipeline, got 'ZeRO'"):
        received_bytes("ZeRO", LLAMA_2_7B, 2, TOKENS)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        received_bytes("DDP", LLAMA_2_7B, 2, 0)
    with pytest.raises(ValueError, match="rank must be"):
        sharded_memory(LLAMA_2_7B, 2, rank=10**6)
