"""A model as a GGUF file, the format of llama.cpp: its tensors under that program's names, and the sizes that it needs to run them.

Two things differ from transformers beside the names. llama.cpp rotates neighbouring pairs of a head's numbers where transformers rotates
its halves, so the rows of Llama's q and k are put into another order. And Gemma's norms multiply by 1 + w, which is added here. Weights are
written as they are: float32 as F32, bfloat16 as BF16; quantizing a GGUF is llama.cpp's own work.
"""

from pathlib import Path

import gguf
import torch
from torch import Tensor, nn

from course.capstone.base import Base

FAMILIES = {"llama": "llama", "gemma3_text": "gemma3"}
LAYER = {  # transformers' name in a layer -> llama.cpp's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
NORMS = {
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    },
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class CannotWrite(Exception):
    """Why there is no GGUF; the rest of a run goes on."""


def write(model: nn.Module, base: Base, file: Path) -> str:
    """Write a plain model; returns what a user has to know about the file.

    Raises:
        CannotWrite: the family is not one of ``FAMILIES``, or the model has what the format has no place for.
    """
    config = model.config
    if (family := FAMILIES.get(config.model_type)) is None:
        raise CannotWrite(
            f"this writer knows {', '.join(FAMILIES)}, not {config.model_type}: use llama.cpp's converter on the merged model"
        )
    if family == "gemma3":
        check_gemma(config)
    writer = gguf.GGUFWriter(file, family)
    writer.add_name(Path(base.name).name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_sliding_window(config.sliding_window)
    note = _vocabulary(writer, base)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.removesuffix(".weight")
        part = module.partition("model.layers.")[2].partition(".")[2]
        value = tensor.detach().cpu()
        if family == "llama" and part in heads:
            value = interleaved(value, heads[part])
        if family == "gemma3" and value.ndim == 1:
            value = value + 1
        _add(writer, f"{gguf_name(module, family)}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return note


def check_gemma(config) -> None:
    """Raise unless attention is as the format takes it for granted: scores over √head_dim, and every sixth layer sees the whole text.

    Raises:
        CannotWrite: it is otherwise; the file would load, and answer something else.
    """
    usual = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(config.num_hidden_layers)]
    if config.query_pre_attn_scalar != config.head_dim or list(config.layer_types) != usual:
        raise CannotWrite("a GGUF of gemma3 has no place for this attention's scale or its order of layers")


def gguf_name(module: str, family: str) -> str:
    """llama.cpp's name of a module: "model.layers.3.mlp.up_proj" -> "blk.3.ffn_up".

    Raises:
        CannotWrite: the module has none.
    """
    if module in OUTSIDE:
        return OUTSIDE[module]
    number, _, part = module.partition("model.layers.")[2].partition(".")
    if (name := (LAYER | NORMS[family]).get(part)) is None:
        raise CannotWrite(f"llama.cpp's {family} has no place for {module}")
    return f"blk.{number}.{name}"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head so that numbers that rotate together are neighbours: (heads·d, in), halves -> pairs."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read(file: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a GGUF, through transformers, whose tokenizer lies beside it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    settings = {"quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **settings)
    return model.eval()


def _add(writer, name: str, value: Tensor) -> None:
    if value.dtype == torch.bfloat16 and value.ndim > 1:
        raw = value.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:  # norms are float32 in every GGUF
        writer.add_tensor(name, value.float().contiguous().numpy())


def _vocabulary(writer, base: Base) -> str:
    """The tokens, where the base's own GGUF has them in llama.cpp's form; else none, and the tokenizer's files are beside the GGUF."""
    source = Path(base.name) if base.name.endswith(".gguf") else None
    if base.name == "gemma-3-270m":
        from course.lab.models import packaged_gemma

        source = packaged_gemma()
    if source is None or base.new:
        writer.add_tokenizer_model("no_vocab")
        return "without a vocabulary: token ids in and out, or llama.cpp's converter on the merged model"
    for key, field in gguf.GGUFReader(source).fields.items():
        if key.startswith("tokenizer.") and key != "tokenizer.ggml.eos_token_id":
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, *field.types[1:2])
    writer.add_eos_token_id(base.tokenizer.eos_token_id)
    return "with the vocabulary of the base's GGUF"
