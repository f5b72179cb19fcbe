"""What the tests of QLoRA share: the same layer and the same training under bitsandbytes and peft."""

import copy

import bitsandbytes
import peft
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding

from reference.lora import inject_lora, lora_layers
from reference.qlora import quantize_linears

# eps above its default: Adam divides by the gradient's size, so a last-place difference of a vanishing gradient becomes a whole step
ADAMW = dict(lr=1e-2, eps=1e-4)


def bnb_linear(linear, block_size=64, double_quant=True, compute_dtype=torch.float32):
    """``linear`` as bitsandbytes quantizes it. In training mode: its inference path repacks the weight for the CPU at hand."""
    theirs = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype,
        double_quant,
        "nf4",
        device="meta",
    )
    theirs.weight = bitsandbytes.nn.Params4bit(linear.weight.detach().clone(), False, None, block_size, double_quant, "nf4", module=theirs)
    theirs.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return theirs.to(linear.weight.device).train()


class Block(nn.Module):
    """One decoder layer of Llama's shape with random weights, and positions for it; gives the output."""

    def __init__(self, hidden=128, intermediate=320):
        super().__init__()
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa"
        )
        self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, x):
        positions = self.rotary(x, torch.arange(x.shape[1], device=x.device)[None])
        y = self.layer(x, position_embeddings=positions)
        return y[0] if isinstance(y, tuple) else y


def both(model, r=4, lora_alpha=10, double_quant=True, compute_dtype=torch.float32):
    """``model`` as a QLoRA model of ours and of peft and bitsandbytes, with equal factors; and pairs of adapted layers."""
    ours, theirs = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    names = quantize_linears(ours, double_quant=double_quant, compute_dtype=compute_dtype)
    for name in names:
        theirs.set_submodule(name, bnb_linear(theirs.get_submodule(name), 64, double_quant, compute_dtype))
    assert inject_lora(ours, r, lora_alpha, names) == names
    theirs.is_loaded_in_4bit = True  # or peft takes its layer for dense bases
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=names))
    pairs = [(layer, theirs.base_model.model.get_submodule(name)) for name, layer in lora_layers(ours)]
    assert all(isinstance(other, peft.tuners.lora.Linear4bit) for _, other in pairs)
    for mine, other in pairs:
        with torch.no_grad():
            nn.init.normal_(mine.lora_B, std=0.02)
        for target, source in zip(factors_of(other), (mine.lora_A, mine.lora_B), strict=True):
            target.data = source.data.clone()
    return ours, theirs, pairs


def train(model, loss, steps=10):
    """Losses of ``steps`` AdamW steps on what requires a gradient."""
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW), []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def factors_of(layer):
    """``lora_A`` and ``lora_B`` of a layer of peft."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
