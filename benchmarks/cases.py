"""The models that benchmarks train: a real one's shape and random weights, on which neither bytes nor seconds depend.

They are made on the meta device and filled layer by layer, so that no 16-bit copy of a quantized model ever exists.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.meters import Extra
from course.lab import models
from reference.lora import inject_lora
from reference.model_shapes import GEMMA_3_270M, ModelShape
from reference.qlora import quantize_linears

RANK, ALPHA = 16, 32
OURS, PEERS, PREPARED = "QLoRA", "QLoRA, peft + bitsandbytes", "QLoRA, peft + bitsandbytes, prepared"
DENSE, DENSE_PEFT = "LoRA", "LoRA, peft"
CHECKPOINTING = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
# With Gemma's sizes and Llama's layer: what reference.memory's prediction is exact for.
LIKE_GEMMA = dataclasses.replace(GEMMA_3_270M, name="Llama with Gemma-3-270M's sizes", norms=2, qk_norm=False)


@dataclasses.dataclass(frozen=True)
class Case:
    shape: ModelShape
    checkpointing: bool
    batches: tuple[tuple[int, int], ...]  # (rows, tokens)
    rank: int = RANK


@functools.cache
def pretrained() -> nn.Module:
    """The course's tiny model; copy it before you change it."""
    return models.load("tiny")[0]


def tiny_shape() -> ModelShape:
    return ModelShape.from_config(models.load("tiny", where=torch.device("cpu"))[0].config, "the course's tiny model")


def config_of(shape: ModelShape, kind: type = LlamaConfig, **settings):
    """The library's configuration of ``shape``; ``settings`` are those that a shape leaves open."""
    return kind(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        use_cache=False,
        **settings,
    )


def llama(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The library's Llama, with its random first values; on the meta device without any."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config_of(shape))
    finally:
        torch.set_default_dtype(default)


def random_weights(shapes: dict[str, torch.Size], device: torch.device) -> Callable[[str], Tensor]:
    """A function from a parameter's name to new values in bf16, as a checkpoint's reader would give them one by one."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda name: torch.empty(shapes[name], dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator)


def skeleton(shape: ModelShape, device: torch.device) -> tuple[nn.Module, Callable[[str], Tensor]]:
    """The model without values, and what gives them."""
    model = llama(shape, torch.bfloat16, torch.device("meta"))
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # computed, not stored
    weights = random_weights({name: p.shape for name, p in model.named_parameters()}, device)
    return model.requires_grad_(False), weights


def fill(model: nn.Module, weights: Callable[[str], Tensor]) -> None:
    """Values for every parameter that has none yet."""
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, nn.Parameter(weights(name), requires_grad=False))
    model.tie_weights()


def pack_with_bitsandbytes(model: nn.Module, weights: Callable[[str], Tensor], device: torch.device) -> None:
    """Every linear but the head as bitsandbytes' NF4 with double quantization, bf16 products; one by one, so that copies don't pile up."""
    import bitsandbytes as bnb

    for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]:
        linear = model.get_submodule(name)
        sizes = linear.in_features, linear.out_features
        packed = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        packed.weight = bnb.nn.Params4bit(weights(f"{name}.weight"), requires_grad=False, quant_type="nf4", module=packed).to(device)
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, packed)
    model.is_loaded_in_4bit = True  # by this peft knows which of its layers to take


def build(how: str, case: Case, device: torch.device, extra: Extra) -> nn.Module:
    """The adapted model, ready to train."""
    model, weights = skeleton(case.shape, device)
    weights = extra.watched(weights)
    if how == OURS:
        quantize_linears(model, device=device, weights=weights)
    elif how in (PEERS, PREPARED):
        pack_with_bitsandbytes(model, weights, device)
    fill(model, weights)
    extra.stop()
    if how == PREPARED:
        import peft

        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=case.checkpointing, **CHECKPOINTING)
    elif case.checkpointing:
        model.gradient_checkpointing_enable(**CHECKPOINTING)
    if how in (OURS, DENSE):
        inject_lora(model, case.rank, ALPHA)
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=case.rank, lora_alpha=ALPHA, target_modules="all-linear"))
    return model.train()
