"""What ``target_modules="all-linear"`` adapts in the families of models that people meet.

Names and classes of layers differ between families, so this is found out rather than remembered: a small model is built from each
architecture's config, adapted, and looked at. What share of the weights that is, is counted in the architecture's usual size.

    python -m course.lab.families     # the table of lessons/appendix/02_targets.md
"""

import re
from dataclasses import dataclass

import torch
import transformers as hf
from torch import nn

from reference.lora import inject_lora

WIDTH, VOCAB = 16, 50
_ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_DECODER = {**_SMALL, **_ENDS, "vocab_size": VOCAB, "num_key_value_heads": 1}
_BOTH = ("encoder", "decoder")  # of a model that has two stacks


@dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        name: of a model that people know; ``usual`` gives its size.
        model, config: classes.
        small: sizes that make it small.
        usual: what its config says besides the class's own defaults.
    """

    name: str
    model: type
    config: type
    small: dict
    usual: dict

    def built(self, small: bool) -> nn.Module:
        """With random weights if it is small, else without any."""
        config = self.config(**(self.small if small else self.usual))
        with torch.device("cpu" if small else "meta"):
            return self.model(config)


FAMILIES = (
    Family("Llama-2-7B", hf.LlamaForCausalLM, hf.LlamaConfig, _DECODER, {}),
    Family("Gemma 3 270M", hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, _DECODER | {"head_dim": 8}, {
        "hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "intermediate_size": 2048, "vocab_size": 262_144,
    }),
    Family("Qwen3-8B", hf.Qwen3ForCausalLM, hf.Qwen3Config, _DECODER | {"head_dim": 8}, {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 12_288, "vocab_size": 151_936,
    }),
    Family("Phi-3-mini", hf.Phi3ForCausalLM, hf.Phi3Config, _DECODER, {}),
    Family("Mixtral-8x7B", hf.MixtralForCausalLM, hf.MixtralConfig, _DECODER | {"num_local_experts": 4}, {}),
    Family("DeepSeek-V3", hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, _DECODER | {
        "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    }, {}),
    Family("GPT-2", hf.GPT2LMHeadModel, hf.GPT2Config, {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": VOCAB, **_ENDS}, {}),
    Family("GPT-NeoX-20B", hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {**_SMALL, **_ENDS, "vocab_size": VOCAB}, {}),
    Family("Falcon-7B", hf.FalconForCausalLM, hf.FalconConfig, {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB, **_ENDS,
    }, {}),
    Family("BERT-base", hf.BertForMaskedLM, hf.BertConfig, {**_SMALL, "vocab_size": VOCAB}, {}),
    Family("T5-small", hf.T5ForConditionalGeneration, hf.T5Config, {
        "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB,
    }, {}),
    Family("ViT-base", hf.ViTForImageClassification, hf.ViTConfig, {**_SMALL, "image_size": 32}, {}),
    Family("Whisper-tiny", hf.WhisperForConditionalGeneration, hf.WhisperConfig, {
        **{f"{stack}_layers": 2 for stack in _BOTH}, **{f"{stack}_attention_heads": 2 for stack in _BOTH},
        **{f"{stack}_ffn_dim": 32 for stack in _BOTH}, "d_model": WIDTH, "vocab_size": VOCAB, "num_mel_bins": 8,
        "decoder_start_token_id": 0, **_ENDS,
    }, {}),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What was adapted in a family.

    Attributes:
        wrapped: last words of the adapted layers' names, in the model's order.
        left: the same of all other weights with more than one axis; of a bare parameter the last two words.
        percent: of the usual size's parameters, those in adapted layers.
    """

    wrapped: tuple[str, ...]
    left: tuple[str, ...]
    percent: float


def look(family: Family) -> Found:
    """Adapt a small model of the family and see what was wrapped: nothing, where there is no layer that can be."""
    model = family.built(small=True)
    weights = [name for name, parameter in model.named_parameters() if sum(length > 1 for length in parameter.shape) > 1]
    try:
        adapted = {f"{name}.weight" for name in inject_lora(model, r=2, lora_alpha=4)}
    except ValueError:
        adapted = set()
    everywhere = {_any_layer(name) for name in adapted}
    sizes = {name: parameter.numel() for name, parameter in family.built(small=False).named_parameters()}
    inside = sum(size for name, size in sizes.items() if _any_layer(name) in everywhere)
    wrapped, left = ([_short(name) for name in weights if (name in adapted) == wanted] for wanted in (True, False))
    return Found(tuple(dict.fromkeys(wrapped)), tuple(dict.fromkeys(left)), 100 * inside / sum(sizes.values()))


def _any_layer(name: str) -> str:
    """The name without the numbers of blocks."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _short(name: str) -> str:
    """ "model.layers.0.mlp.up_proj.weight" -> "up_proj", but "…experts.up_proj" -> "experts.up_proj"."""
    words = name.split(".")
    return words[-2] if words[-1] == "weight" else ".".join(words[-2:])


def table() -> str:
    """In Markdown, a row a family."""

    def code(names: tuple[str, ...]) -> str:
        return ", ".join(f"`{name}`" for name in names) or "nothing: it raises an error"

    rows = [(family.name, look(family)) for family in FAMILIES]
    lines = [f"| {name} | {code(found.wrapped)} | {found.percent:.0f} % | {code(found.left)} |" for name, found in rows]
    return "\n".join(["| model | what `all-linear` wraps | of all weights | what it leaves |", "|---|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
