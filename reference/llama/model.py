"""A Llama decoder, whole, in one file.

    x = x + o(attention(q(n), k(n), v(n)))    n = RMSNorm(x), q and k rotated by their positions
    x = x + down(silu(gate(n)) · up(n))       n = RMSNorm(x)

Parameters have the names of the Hugging Face library's ``LlamaForCausalLM``, so its ``state_dict``
loads, and the numbers are the same. Three things differ, for training: each layer is checkpointed
(its input is kept, all else computed again in the backward: Chen et al. 2016), the loss never makes
the logits whole (:mod:`reference.llama.loss`), and nothing in a step waits for the device or
depends on a value, so that a CUDA graph can record it (:mod:`reference.llama.step`). Touvron et al.
2023, "LLaMA"; RMSNorm: Zhang and Sennrich 2019; rotary positions: Su et al. 2021; grouped queries:
Ainslie et al. 2023; SwiGLU: Shazeer 2020.

Shapes in comments: B rows, T tokens, C hidden, H heads, G key and value heads, D head_dim, M width
of the MLP, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reference.llama.loss import CHUNK, linear_cross_entropy, next_tokens
from reference.model_shapes import ModelShape

Rotation = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotation(
    length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> Rotation:
    """cos and sin of position · theta^(−2i/D) for the D/2 pairs of a head, (T, D).

    The second half repeats the first.
    """
    pair = torch.arange(0, head_dim, 2, device=device).float()  # (D/2,)
    frequency = 1 / theta ** (pair / head_dim)  # (D/2,)
    angle = torch.arange(length, device=device).float()[:, None] * frequency  # (T, D/2)
    angle = torch.cat([angle, angle], 1)  # (T, D)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn the pair (x[i], x[i + D/2]) by its position's angle; x: (B, heads, T, D)."""
    cos, sin = by
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.head_dim, self.grouped = shape.head_dim, shape.heads != shape.kv_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out_features, in_features = shape.linears[name]
            setattr(self, name, nn.Linear(in_features, out_features, bias=False))

    def forward(self, x: Tensor, positions: Rotation) -> Tensor:
        q = rotate(self._heads(self.q_proj(x)), positions)  # (B, H, T, D)
        k = rotate(self._heads(self.k_proj(x)), positions)  # (B, G, T, D)
        v = self._heads(self.v_proj(x))  # (B, G, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)

    def _heads(self, y: Tensor) -> Tensor:
        """(B, T, heads·D) -> (B, heads, T, D)."""
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, shape: ModelShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, M) in between


class Layer(nn.Module):
    def __init__(self, shape: ModelShape, eps: float):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(shape.hidden, eps), Attention(shape)
        self.post_attention_layernorm, self.mlp = RMSNorm(shape.hidden, eps), MLP(shape)

    def forward(self, x: Tensor, positions: Rotation) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, last norm: what lies below the output head."""

    def __init__(self, shape: ModelShape, theta: float, eps: float, checkpointing: bool):
        super().__init__()
        self.head_dim, self.theta, self.checkpointing = shape.head_dim, theta, checkpointing
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, eps) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)  # (B, T, C)
        positions = rotation(ids.shape[1], self.head_dim, self.theta, x.device, x.dtype)
        if not (self.checkpointing and torch.is_grad_enabled()):
            for layer in self.layers:
                x = layer(x, positions)
            return self.norm(x)
        # Where something is dropped, computing again must drop the same: the generator's state is
        # then kept, through the CPU.
        dropouts = (module for module in self.modules() if isinstance(module, nn.Dropout))
        drops = any(module.p > 0 and module.training for module in dropouts)
        for layer in self.layers:
            x = checkpoint(layer, x, positions, use_reentrant=False, preserve_rng_state=drops)
        return self.norm(x)


class Llama(nn.Module):
    """The language model.

    Args:
        shape: its sizes; of a Llama-like layer (gated MLP, no biases, two norms).
        theta: base of the rotary frequencies.
        eps: of the norms.
        checkpointing: keep only each layer's input for the backward.

    Raises:
        ValueError: the shape is not like Llama's, or head_dim is odd.
    """

    def __init__(
        self,
        shape: ModelShape,
        theta: float = 10_000.0,
        eps: float = 1e-5,
        checkpointing: bool = True,
    ):
        super().__init__()
        if not shape.like_llama or shape.positions or shape.head_dim % 2:
            wanted = "a gated MLP, no biases, two norms a layer, rotary positions, an even head_dim"
            raise ValueError(f"{shape.name} is not like Llama: {wanted}")
        self.shape = shape
        self.model = Decoder(shape, theta, eps, checkpointing)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Where the shape says so, the head is the embedding.

        Call it once more after values were put in the place of the meta device's.
        """
        if self.shape.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        """The head: "all-linear" leaves it out by this name."""
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states after the last norm, (B, T, C), for token ids (B, T)."""
        return self.model(ids)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T, V)."""
        return self.lm_head(self(ids))

    def loss(self, ids: Tensor, chunk: int = CHUNK) -> Tensor:
        """Mean cross-entropy of each next token, a float32 number.

        Logits exist for ``chunk`` tokens at a time.
        """
        return linear_cross_entropy(self(ids), self.lm_head.weight, next_tokens(ids), chunk)
