"""What "all-linear" adapts is found out on models of each architecture, and the page says what is found."""

import pytest

from course import ROOT
from course.claims.interview import wrapped_by_peft
from course.lab import families

FOUND = {family.name: families.look(family) for family in families.FAMILIES}
PAGE = (ROOT / "lessons" / "appendix" / "02_targets.md").read_text(encoding="utf-8")


def test_the_page_shows_the_table_of_now():
    assert families.table() in PAGE, "put what `python -m course.lab.families` prints into lessons/appendix/02_targets.md"


@pytest.mark.parametrize("name", FOUND)
def test_every_weight_is_either_wrapped_or_left(name):
    found = FOUND[name]
    assert not set(found.wrapped) & set(found.left)
    assert not set(found.wrapped) & {"lm_head", "embed_tokens", "wte", "shared"}
    assert 0 <= found.percent < 100 and bool(found.wrapped) == (found.percent > 0)


def test_what_the_page_says_of_single_families():
    for name in ("Mixtral-8x7B", "DeepSeek-V3"):
        assert {"experts.gate_up_proj", "experts.down_proj"} <= set(FOUND[name].left) and FOUND[name].percent < 5
    assert "classifier" in FOUND["ViT-base"].wrapped
    assert "qkv_proj" in FOUND["Phi-3-mini"].wrapped
    assert all("query_key_value" in FOUND[name].wrapped for name in ("GPT-NeoX-20B", "Falcon-7B"))
    assert all("lm_head" not in FOUND[name].left for name in ("Gemma 3 270M", "Falcon-7B", "GPT-2", "T5-small"))


def test_peft_adapts_the_experts_and_routers_of_these_two():
    by_name = {family.name: family for family in families.FAMILIES}
    for name in ("Mixtral-8x7B", "DeepSeek-V3"):
        assert {"mlp.experts", "mlp.experts.base_layer", "mlp.gate"} <= wrapped_by_peft(by_name[name].built(small=True)), name


def test_the_shapes_are_those_of_the_models():
    """Parameters in billions, as their makers count them."""
    sizes = {family.name: sum(p.numel() for p in family.built(small=False).parameters()) for family in families.FAMILIES}
    known = {"Llama-2-7B": 6.74, "Gemma 3 270M": 0.268, "Qwen3-8B": 8.19, "Phi-3-mini": 3.82, "Mixtral-8x7B": 46.7, "GPT-2": 0.124}
    known |= {
        "GPT-NeoX-20B": 20.6,
        "Falcon-7B": 6.92,
        "BERT-base": 0.110,
        "T5-small": 0.0605,
        "ViT-base": 0.0866,
        "Whisper-tiny": 0.0378,
        "DeepSeek-V3": 671,
    }
    assert {name: size / 1e9 for name, size in sizes.items()} == pytest.approx(known, rel=0.02)
