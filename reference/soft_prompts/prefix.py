"""Prefix tuning: trained keys and values that every token of the text attends to, in every layer.

Prompt tuning writes at the bottom and hopes that the layers carry it up. Prefix tuning gives each
layer P keys and values of its own, through the cache that generation uses:

    attention(q, [prefix keys; keys], [prefix values; values])

2·L·H·P·d_h numbers for L layers with H key-value heads of width d_h. The keys are those *after* the
rotary embedding, as the cache holds them, and the text's positions start at P. So the cache of any
text prompt is a prefix: :meth:`Prefix.from_cache` starts there, and gives what the prompt gives.

A prefix of zeros is not neutral. A key of zeros scores q·0 = 0, and exp(0) = 1 of the softmax goes
to a value of zero: every attention output shrinks.

Li & Liang 2021, "Prefix-Tuning" (2101.00190), with the projection below; Liu et al. 2022, "P-Tuning
v2" (2110.07602), without it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reference.arguments import check_integer
from reference.soft_prompts.prompt import before


def prefix_sizes(config) -> tuple[int, int, int]:
    """(layers, key-value heads, width of a head) from a transformer's config."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width


class Prefix(nn.Module):
    """Keys and values as they are: ``forward()`` gives (P, 2·L·H·d_h).

    In a row: layer by layer the keys and then the values, head by head.

    Args:
        start: (P, 2·L·H·d_h); N(0, 1) is peft's.
    """

    def __init__(self, start: Tensor):
        super().__init__()
        if start.dim() != 2 or start.numel() == 0 or not torch.isfinite(start).all():
            wanted = "(tokens, 2·layers·heads·width), without NaN or infinity"
            raise ValueError(f"start must be {wanted}, got shape {tuple(start.shape)}")
        self.embedding = nn.Parameter(start.detach().float().clone())

    @classmethod
    def from_cache(cls, keys_and_values: list[tuple[Tensor, Tensor]]) -> "Prefix":
        """The prefix that a text leaves in a model's cache.

        Args:
            keys_and_values: of each layer, (1, heads, P, width) each.
        """
        both = [each[0] for pair in keys_and_values for each in pair]  # (H, P, d_h), 2L of them
        return cls(torch.stack(both).permute(2, 0, 1, 3).flatten(1))  # (P, 2·L·H·d_h)

    def forward(self) -> Tensor:
        return self.embedding


class PrefixEncoder(nn.Module):
    """Keys and values from P rows through Linear-Tanh-Linear, which is trained with them.

    Needed in training only, as P-tuning's encoder is.
    """

    def __init__(self, tokens: int, width: int, hidden: int, numbers: int):
        super().__init__()
        sizes = {"tokens": tokens, "width": width, "hidden": hidden, "numbers": numbers}
        for name, value in sizes.items():
            check_integer(name, value, 1)
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        layers = nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, numbers)
        self.transform = nn.Sequential(*layers)

    def forward(self) -> Tensor:
        return self.transform(self.embedding)


class PrefixTuning(nn.Module):
    """A frozen causal model with a trained prefix in its cache.

    Args:
        model: of transformers, with a ``config``.
        prefix: a :class:`Prefix` or :class:`PrefixEncoder`.
        make_cache: gives an empty cache with ``update(keys, values, layer)``:
            ``transformers.DynamicCache``, or ``lambda: DynamicCache(config=model.config)`` where
            layers have windows.
    """

    def __init__(self, model: nn.Module, prefix: nn.Module, make_cache: Callable):
        super().__init__()
        self.layers, self.heads, self.width = prefix_sizes(model.config)
        wanted, numbers = 2 * self.layers * self.heads * self.width, prefix().shape[1]
        if numbers != wanted:
            words = f"{self.layers} layers of {self.heads} key-value heads, width {self.width}"
            raise ValueError(
                f"prefix has {numbers} numbers a token, the model wants {wanted}: {words}"
            )
        self.base = model.requires_grad_(False)
        self.prefix = prefix.to(model.get_input_embeddings().weight.device)
        self.make_cache = make_cache

    def keys_and_values(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, (batch, heads, P, width) each, in the model's dtype."""
        rows = self.prefix().to(self.base.get_input_embeddings().weight.dtype)
        parts = rows.view(len(rows), 2 * self.layers, self.heads, self.width)
        parts = parts.permute(1, 2, 0, 3)[:, None].expand(-1, batch, -1, -1, -1)
        return list(zip(parts[0::2], parts[1::2], strict=True))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more):
        """What the model gives for the text after the prefix: input_ids (batch, length).

        Raises:
            ValueError: ``position_ids`` or a cache are given; or the model checkpoints its layers,
                which run without a cache then.
        """
        if more.get("position_ids") is not None or more.get("past_key_values") is not None:
            raise ValueError(
                "position_ids and past_key_values must not be given: the prefix is both"
            )
        parts = self.base.modules()
        if self.training and any(getattr(part, "gradient_checkpointing", False) for part in parts):
            words = "so the prefix would be lost: gradient_checkpointing_disable() first"
            raise ValueError(f"a checkpointed model runs its layers without the cache, {words}")
        cache = self.make_cache()
        for layer, (keys, values) in enumerate(self.keys_and_values(len(input_ids))):
            cache.update(keys, values, layer)
        if attention_mask is not None:
            more["attention_mask"] = before(attention_mask, len(self.prefix()), 1)
        return self.base(input_ids=input_ids, past_key_values=cache, **more)
