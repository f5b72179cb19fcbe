"""Prompt tuning, P-tuning and prefix tuning in PEFT's files: one tensor, ``prompt_embeddings``.

    PROMPT_TUNING, P_TUNING   (P, d)            the rows that the model reads
    PREFIX_TUNING             (P, 2·L·H·d_h)    keys and values, as in reference.soft_prompts.prefix

Of an encoder (P-tuning, or a projected prefix) a file holds what comes out. So what is read is a
plain prompt or prefix: it gives the same outputs, and training goes on without the encoder.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from reference.adapter_format.config import CONFIG, refuse_others
from reference.adapter_format.files import WEIGHTS, check_finite, read_weights
from reference.adapter_format.keys import check_keys
from reference.soft_prompts import (
    Prefix,
    PrefixEncoder,
    PrefixTuning,
    Prompt,
    PromptEncoder,
    PromptTuning,
    prefix_sizes,
)

TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
KNOWN = {"peft_type", "num_virtual_tokens", "token_dim", "num_transformer_submodules"}
KNOWN |= {"num_attention_heads", "num_layers", "encoder_hidden_size", "prefix_projection"}
KNOWN |= {"encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"}
KNOWN |= {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"}
KNOWN |= {"tokenizer_kwargs", "init_weights"}  # how it began: the values are in the file
KEY = "prompt_embeddings"


def contents(tuned: PromptTuning | PrefixTuning, task_type: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config."""
    is_prefix = isinstance(tuned, PrefixTuning)
    part = tuned.prefix if is_prefix else tuned.prompt
    rows = part().detach().float().cpu().clone()
    layers, heads, width = prefix_sizes(tuned.base.config)
    config = {
        "task_type": task_type,
        "inference_mode": True,
        "num_virtual_tokens": len(rows),
        "num_transformer_submodules": 1,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * width if is_prefix else rows.shape[1],
    }
    if is_prefix:
        config |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
        if isinstance(part, PrefixEncoder):
            hidden = part.transform[0].out_features
            config |= {"prefix_projection": True, "encoder_hidden_size": hidden}
    elif isinstance(part, PromptEncoder):
        network = "MLP" if part.lstm is None else "LSTM"
        hidden = part.mlp[0].out_features if part.lstm is None else part.lstm.hidden_size
        config |= {"peft_type": "P_TUNING", "encoder_reparameterization_type": network}
        config |= {"encoder_hidden_size": hidden}
    else:
        config |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    return {KEY: rows}, config


def load_prompt(
    model: nn.Module, directory: Path, config: dict, make_cache: Callable | None
) -> PromptTuning | PrefixTuning:
    """``model`` with the prompt or prefix of ``directory``."""
    path = directory / CONFIG
    refuse_others(config, KNOWN, path)
    if config.get("num_transformer_submodules") not in (None, 1):
        words = "a prompt for encoder and decoder is not done here"
        raise ValueError(f"{path} asks for num_transformer_submodules=2: {words}")
    is_prefix = config["peft_type"] == "PREFIX_TUNING"
    if is_prefix and make_cache is None:
        words = "give make_cache, such as transformers.DynamicCache"
        raise ValueError(f"{path} holds a prefix, which needs a cache: {words}")
    layers, heads, width = prefix_sizes(model.config)
    text = model.get_input_embeddings().weight.shape[1]
    shape = (config.get("num_virtual_tokens"), 2 * layers * heads * width if is_prefix else text)
    tensors = read_weights(directory)
    check_keys(tensors, {KEY: shape}, directory / WEIGHTS)
    check_finite(tensors, directory / WEIGHTS)
    if is_prefix:
        return PrefixTuning(model, Prefix(tensors[KEY]), make_cache)
    return PromptTuning(model, Prompt(tensors[KEY]))
