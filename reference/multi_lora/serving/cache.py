"""Keys and values of many requests in one memory, a token at a time, and a model that reads them.

A request's tokens need not lie side by side: a table says in which slots they are, so memory is
given out by the token and no request reserves room for the longest (vLLM's pages, with one token
to a page: Kwon et al. 2023). S-LoRA counts adapters and tokens against one another in such a pool.

    write   slot(t) ← k_t, v_t     at each layer, for the tokens that are new
    read    K, V = all slots of the request, in order; a query sees those up to its own position

Shapes in comments: B rows, T new tokens, S slots of the longest row, G key and value heads, D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.arguments import check_integer
from reference.llama.model import Llama, rotate, rotation
from reference.model_shapes import ModelShape


def token_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize


class KVCache:
    """``slots`` tokens' keys and values.

    Slot 0 belongs to nobody: what pads a batch is written there.
    """

    def __init__(self, shape: ModelShape, slots: int, dtype: torch.dtype, device: torch.device):
        check_integer("slots", slots, 1)
        sizes = shape.layers, slots + 1, shape.kv_heads, shape.head_dim
        self.k, self.v = torch.zeros(2, *sizes, dtype=dtype, device=device)
        self._free = list(range(slots, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Slots for ``count`` tokens.

        Raises:
            ValueError: fewer are free.
        """
        if count > self.free:
            raise ValueError(f"{count} slots wanted, {self.free} are free")
        return [self._free.pop() for _ in range(count)]

    def give(self, slots: list[int]) -> None:
        """Take slots back."""
        self._free += reversed(slots)


@torch.no_grad()
def next_logits(
    model: Llama, cache: KVCache, ids: Tensor, slots: Tensor, start: Tensor, count: Tensor
) -> Tensor:
    """Logits after each row's last new token, (B, V); keys and values of new tokens are written.

    Args:
        ids: (B, T) new tokens, padded on the right.
        slots: (B, S) of each row's tokens in order, new ones included; 0 beyond its end.
        start: (B,) tokens that are in the cache already: the position of the first new one.
        count: (B,) new tokens, from 1 to T.
    """
    (B, T), S = ids.shape, slots.shape[1]
    step = torch.arange(T, device=ids.device)
    position = (start[:, None] + step).clamp(max=S - 1)  # (B, T)
    target = torch.where(step < count[:, None], slots.gather(1, position), 0)  # (B, T)
    sees = torch.arange(S, device=ids.device) <= position[..., None]  # (B, T, S)
    decoder = model.model
    x = decoder.embed_tokens(ids)  # (B, T, C)
    turns = rotation(S, decoder.head_dim, decoder.theta, x.device, x.dtype)
    cos, sin = (part[position][:, None] for part in turns)  # (B, 1, T, D)
    for i, layer in enumerate(decoder.layers):
        a, n = layer.self_attn, layer.input_layernorm(x)
        q, k = (rotate(a._heads(p(n)), (cos, sin)) for p in (a.q_proj, a.k_proj))  # (B, ·, T, D)
        cache.k[i, target] = k.transpose(1, 2)
        cache.v[i, target] = a._heads(a.v_proj(n)).transpose(1, 2)
        K, V = (part[i, slots].transpose(1, 2) for part in (cache.k, cache.v))  # (B, G, S, D)
        y = F.scaled_dot_product_attention(q, K, V, sees[:, None], enable_gqa=a.grouped)
        x = x + a.o_proj(y.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    last = x[torch.arange(B, device=x.device), count - 1]  # (B, C)
    return model.lm_head(decoder.norm(last))


def padded(rows: list[list[int]], device: torch.device) -> Tensor:
    """(B, longest) int64, zeros beyond the end of a row."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)


def generate(
    model: Llama, prompts: list[list[int]], max_new_tokens: int, stop: int | None = None
) -> list[list[int]]:
    """The likeliest next token, again and again, for each prompt.

    With many adapters: ``with served.rows(names): generate(model, prompts, n)``, a name a prompt.

    Args:
        stop: a token after which a row ends. It is the last one returned.

    Raises:
        ValueError: a prompt is empty or there is none; ``max_new_tokens`` is below 1.
    """
    check_integer("max_new_tokens", max_new_tokens, 1)
    if not prompts or not all(prompts):
        raise ValueError("prompts must hold at least one, each of one token or more")
    weight = model.model.embed_tokens.weight
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    cache = KVCache(model.shape, sum(lengths), weight.dtype, weight.device)
    slots = padded([cache.take(length) for length in lengths], weight.device)
    start = torch.zeros(len(prompts), dtype=torch.int64, device=weight.device)
    count = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    ids, found = padded(prompts, weight.device), []
    for _ in range(max_new_tokens):
        found.append(next_logits(model, cache, ids, slots, start, count).argmax(-1))  # (B,)
        start, count = start + count, torch.ones_like(count)
        ids = found[-1][:, None]
    rows = torch.stack(found, 1).tolist()
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]
