"""Many copies of a small Llama trained at once: every weight has a leading axis, one entry a copy.

A study of forgetting needs a thousand short runs of a model of a million parameters. One at a time they wait for Python; stacked, a
product over all copies is one batched product, and a GPU trains a hundred copies in the time of a few. Each copy has its own batches,
learning rate, clipping and Adam state, so nothing is shared but the arithmetic: a test holds a copy against the model trained alone.

    stack = Stack(model, copies=6)                        # full fine-tuning
    stack = Stack(model, copies=6, ranks=[1, 1, 4, 4, 16, 16])        # LoRA on all linears; smaller ranks are zero rows of the largest
    optimizer = StackedAdam(stack, lr=[1e-3, 3e-3, ...])
    losses = next_token_losses(stack(ids), ids)           # ids (copies, rows, length) -> (copies,)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

LAYER_LINEARS = tuple(f"self_attn.{n}_proj" for n in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


class Stack:
    """``copies`` of ``model`` as one function of token ids.

    Attributes:
        weights: the model's own names -> (copies, *shape); (1, *shape) of what is frozen and shared.
        trained: the leaves that require gradients, by name; with adapters "….lora_A" (copies, r, in) and "….lora_B" (copies, out, r).

    Args:
        ranks: of each copy's adapter on every linear but the head, scaled by 2 (α = 2r); None trains all weights.
        seeds: of each copy's factors A.
        also: with adapters, further weights that train ("model.embed_tokens.weight", "lm_head.weight").
        fixed: without adapters, weights that do not.
        lateral: a frozen model that a fresh column listens to: the output of its block i − 1 goes, through a matrix of its own, into what
            block i puts out (:mod:`reference.progressive`).
    """

    SCALE = 2.0

    def __init__(
        self,
        model: LlamaForCausalLM | Sequence[LlamaForCausalLM],
        copies: int,
        where: torch.device | None = None,
        ranks: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        also: Sequence[str] = (),
        fixed: Sequence[str] = (),
        lateral: LlamaForCausalLM | None = None,
    ):
        models = [model] * copies if isinstance(model, nn.Module) else list(model)
        self.config, self.copies, self.where = models[0].config, copies, where or next(models[0].parameters()).device
        states = [dict(each.state_dict()) for each in models[: 1 if isinstance(model, nn.Module) else None]]
        self.weights = {name: torch.stack([s[name].detach() for s in states]).to(self.where) for name in states[0]}
        self.trained: dict[str, Tensor] = {}
        self.heard = Stack(lateral, 1, self.where, ranks=[0]) if lateral is not None else None
        if ranks is None:
            for name in self.weights:
                if name not in fixed:
                    self._own(name)
        else:
            for name in also:
                self._own(name)
            self._inject(ranks, seeds or range(copies))
        if lateral is not None:
            width = self.config.hidden_size
            for i in range(1, self.config.num_hidden_layers):
                g = [torch.Generator().manual_seed(1000 * i + s) for s in seeds or range(copies)]
                U = torch.stack([torch.empty(width, width).uniform_(-1, 1, generator=each) / math.sqrt(width) for each in g])
                self.trained[f"lateral.{i}"] = U.to(self.where).requires_grad_()

    def _own(self, name: str) -> None:
        """Give each copy its own ``name`` and train it."""
        self.weights[name] = self.weights[name].expand(self.copies, *self.weights[name].shape[1:]).clone().requires_grad_()
        self.trained[name] = self.weights[name]

    def _inject(self, ranks: Sequence[int], seeds: Sequence[int]) -> None:
        self.ranks, self.seeds = list(ranks), list(seeds)
        widest = max(ranks)
        for index, name in enumerate(self.linears() if widest else ()):
            out, into = self.weights[f"{name}.weight"].shape[1:]
            A, B = torch.zeros(self.copies, widest, into), torch.zeros(self.copies, out, widest)
            for copy, (r, seed) in enumerate(zip(ranks, seeds, strict=True)):
                g = torch.Generator().manual_seed(100_000 * index + seed)
                A[copy, :r] = torch.empty(r, into).uniform_(-1, 1, generator=g) / math.sqrt(into)
            self.trained[f"{name}.lora_A"] = A.to(self.where).requires_grad_()
            self.trained[f"{name}.lora_B"] = B.to(self.where).requires_grad_()

    def linears(self) -> list[str]:
        """Names of all linear layers but the head."""
        return [f"model.layers.{i}.{name}" for i in range(self.config.num_hidden_layers) for name in LAYER_LINEARS]

    def delta(self, name: str) -> Tensor:
        """ΔW of a linear layer, (copies, out, in)."""
        return self.SCALE * self.trained[f"{name}.lora_B"] @ self.trained[f"{name}.lora_A"]

    @torch.no_grad()
    def merge_and_restart(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Put the adapters into the weights, start fresh ones, and return the factors A that were there: the next task's adapter."""
        old = {name: self.trained[f"{name}.lora_A"].detach() for name in self.linears()}
        for name in self.linears():
            self.weights[f"{name}.weight"] = self.weights[f"{name}.weight"] + self.delta(name)
        self._inject(self.ranks, seeds)
        return old

    # forward

    def __call__(self, ids: Tensor, states: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits (copies, rows, length, vocabulary) of ids (copies, rows, length); with ``states`` also what went into each block."""
        copies, rows, length = ids.shape
        c, x = self.config, self._embed(ids)  # (copies, rows · length, hidden)
        heard = self.heard(ids, states=True)[1] if self.heard else None
        rotation, inputs = self._rotation(length, x.dtype), []
        for i in range(c.num_hidden_layers):
            at = f"model.layers.{i}."
            inputs.append(x)
            n = self._norm(x, at + "input_layernorm")
            y = x + self._linear(self._attention(n, at + "self_attn.", rows, length, rotation), at + "self_attn.o_proj")
            n = self._norm(y, at + "post_attention_layernorm")
            gated = F.silu(self._linear(n, at + "mlp.gate_proj")) * self._linear(n, at + "mlp.up_proj")
            y = y + self._linear(gated, at + "mlp.down_proj")
            if heard and i:
                y = y + _per_copy(heard[i].expand(copies, -1, -1), self.trained[f"lateral.{i}"])
            x = y
        logits = self._linear(self._norm(x, "model.norm"), "lm_head").view(copies, rows, length, -1)
        return (logits, inputs) if states else logits

    def _embed(self, ids: Tensor) -> Tensor:
        E, flat = self.weights["model.embed_tokens.weight"], ids.flatten(1)
        if len(E) == 1:
            return F.embedding(flat, E[0])
        offset = torch.arange(len(E), device=ids.device)[:, None] * E.shape[1]
        return F.embedding(flat + offset, E.flatten(0, 1))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        w = self.weights[f"{name}.weight"][:, None]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * w

    def _linear(self, x: Tensor, name: str) -> Tensor:
        W = self.weights[f"{name}.weight"]
        y = F.linear(x, W[0]) if len(W) == 1 else _per_copy(x, W)
        if f"{name}.lora_A" in self.trained:
            y = y + self.SCALE * _per_copy(_per_copy(x, self.trained[f"{name}.lora_A"]), self.trained[f"{name}.lora_B"])
        return y

    def _rotation(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        D = self.config.hidden_size // self.config.num_attention_heads
        theta = self.config.rope_parameters["rope_theta"] if hasattr(self.config, "rope_parameters") else self.config.rope_theta
        angle = torch.arange(length)[:, None] / theta ** (torch.arange(0, D, 2) / D)  # (length, D/2)
        both = torch.cat([angle, angle], -1).to(self.where)
        return both.cos().to(dtype), both.sin().to(dtype)

    def _attention(self, n: Tensor, at: str, rows: int, length: int, rotation: tuple[Tensor, Tensor]) -> Tensor:
        c = self.config
        D = c.hidden_size // c.num_attention_heads

        def heads(name: str, count: int) -> Tensor:  # (copies · rows, count, length, D)
            return self._linear(n, at + name).view(-1, length, count, D).transpose(1, 2)

        q, k, v = heads("q_proj", c.num_attention_heads), heads("k_proj", c.num_key_value_heads), heads("v_proj", c.num_key_value_heads)
        cos, sin = rotation
        q, k = (x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin for x in (q, k))
        k, v = (x.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 1) for x in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).reshape(n.shape[0], rows * length, c.hidden_size)


def _per_copy(x: Tensor, W: Tensor) -> Tensor:
    """x (copies, tokens, in), W (copies, out, in) -> (copies, tokens, out)."""
    return torch.bmm(x, W.transpose(1, 2))


def next_token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each copy, (copies,): logits (copies, rows, length, vocabulary), ids (copies, rows, length)."""
    found = F.cross_entropy(logits[:, :, :-1].flatten(0, 2), ids[:, :, 1:].flatten(), reduction="none")
    return found.view(len(ids), -1).mean(1)


class StackedAdam:
    """AdamW without weight decay, as ``course.lab.training.train`` uses it, with a learning rate and a clipped norm for each copy."""

    def __init__(self, stack: Stack, lr: Sequence[float], betas=(0.9, 0.999), eps: float = 1e-8, clip: float = 1.0):
        self.stack, self.betas, self.eps, self.clip, self.steps = stack, betas, eps, clip, 0
        self.lr = torch.tensor(lr, device=stack.where)
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in stack.trained.items()}

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step along ``gradients``, in the order of ``stack.trained``."""
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()  # (copies,)
        factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        self.steps += 1
        b1, b2 = self.betas
        for (name, p), g in zip(self.stack.trained.items(), gradients, strict=True):
            shape = (-1, *[1] * (p.dim() - 1))
            g = g * factor.view(shape)
            m, v = self.moments[name]
            m.lerp_(g, 1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            denominator = (v.sqrt() / math.sqrt(1 - b2**self.steps)).add_(self.eps)
            p.sub_(self.lr.view(shape) / (1 - b1**self.steps) * m / denominator)
