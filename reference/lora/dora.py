"""DoRA: LoRA that learns how long each row of the weight is apart from where the row points.

    W' = m ⊙ V/‖V‖,    V = W + s·B·A        m: (out,), one magnitude for each output, trained

‖V‖ is the norm of each *row* of V as torch stores it, (out, in): one number for each output. (The
paper writes W as (d × k) and speaks of columns; they are the same numbers.) m starts as ‖W‖, so
training begins at the pretrained model, as LoRA does.

The norm is a constant in the backward pass, as the paper proposes. With the gain g = m/‖V‖ the
layer then is LoRA's, whose output without the bias is multiplied by g:

    y = b + g ⊙ (u − b),    u = W·x + b + s·B·A·x

The norm needs no B·A either. With w a row of W and β the same row of B,

    ‖w + s·β·A‖² = ‖w‖² + 2s·β·(A·w) + s²·β·(A·Aᵀ)·βᵀ

whose largest parts are W·Aᵀ, (out × r), and A·Aᵀ, (r × r).

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (2402.09353; the constant norm is in
section 4.3).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reference.lora.conv_embedding import LoRATransposed
from reference.lora.inject import inject_layers
from reference.lora.layer import LoRALayer, LoRALinear
from reference.lora.mixed import takes_kernels
from reference.lora.targets import find_targets, wrapper_of
from reference.lora.weights import describe

AT_ONCE = 1 << 22  # numbers of W that are widened at a time


class DoRALayer(LoRALayer):
    """y = b + g ⊙ (W·x + s·B·A·x) with g = m/‖W + s·B·A‖, over a frozen linear layer.

    Arguments, errors and merging are those of :class:`reference.lora.LoRALayer`. The base may be
    quantized, if it has ``dequantize()``. Dropped inputs pass V as a whole, as in peft.

    Attributes:
        lora_magnitude_vector: m, (out,), trained with both factors.
    """

    factor_names = ("lora_A", "lora_B", "lora_magnitude_vector")

    def start(self) -> None:
        super().start()
        self.lora_magnitude_vector = nn.Parameter(self.norms().to(self.lora_A.dtype))

    def dense(self) -> Tensor:
        """W or, of a quantized base, what it decodes to: (out, in)."""
        return self.base.dequantize() if hasattr(self.base, "dequantize") else self.matrix()

    @torch.no_grad()
    def norms(self) -> Tensor:
        """‖W + s·B·A‖ of each row, (out,), float32 or wider; no (out × in) product is formed."""
        W, s = self.dense(), self.scaling
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.to(wide), self.lora_B.to(wide)
        if takes_kernels(W, W, A, B):
            squares, cross = _kernels().products(W, A, B)  # (out,) each
        else:
            rows = max(1, AT_ONCE // W.shape[1])
            blocks = zip(W.split(rows), B.split(rows), strict=True)
            parts = [_products(w.to(wide), A, b) for w, b in blocks]
            squares, cross = (torch.cat(part) for part in zip(*parts, strict=True))
        own = (B @ (A @ A.T) * B).sum(1)  # ‖β·A‖²
        return (squares + 2 * s * cross + s * s * own).clamp(min=0).sqrt()

    def gain(self) -> Tensor:
        """g = m/‖V‖, (out,); to autograd the norm is a constant."""
        return self.lora_magnitude_vector / self.norms()

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        if not (self.training and self.lora_dropout.p > 0):
            return self.scaled(super().forward(x))
        y, dropped = self.base(x), self.lora_dropout(x)
        plain = self.base(dropped)
        update = self.up(F.linear(dropped.to(self.lora_A.dtype), self.lora_A)) * self.scaling
        return (y - plain + self.scaled(plain + update)).to(y.dtype)

    def scaled(self, u: Tensor) -> Tensor:
        """b + g ⊙ (u − b) for LoRA's output u, (..., out), in its dtype."""
        gain, bias = self.gain(), self.base.bias
        if takes_kernels(u, u, self.lora_A, self.lora_B):
            return _Gain.apply(u, gain, bias)
        if bias is None:
            return (u * gain).to(u.dtype)
        return torch.addcmul((1 - gain) * bias, u.to(gain.dtype), gain).to(u.dtype)

    def delta_weight(self) -> Tensor:
        """W' − W in the shape of the weight: what merging adds."""
        W = self.dense().to(self.lora_A.dtype)
        V = W + LoRALayer.delta_weight(self)
        delta = (self.gain()[:, None] * V - W).detach()
        return delta.T if isinstance(self, LoRATransposed) else delta

    def unmerge(self) -> None:
        """Put W back, to the bit. A quantized base can't: W' − W would be asked of W'.

        Raises:
            ValueError: the base is quantized; and as for LoRA.
        """
        if self.merged and hasattr(self.base, "merge_delta"):
            words = "the norms of W are gone. Load the base's own weights again"
            raise ValueError(f"{describe(self)} was merged into a quantized weight: {words}")
        super().unmerge()


class DoRALinear(DoRALayer, LoRALinear):
    """DoRA over an ``nn.Linear``, or over a quantized layer that can ``dequantize()``."""


class DoRATransposed(DoRALayer, LoRATransposed):
    """DoRA over the ``Conv1D`` of transformers' GPT-2, which keeps its weight as (in, out)."""


KINDS = {LoRALinear: DoRALinear, LoRATransposed: DoRATransposed}  # LoRA's layer -> DoRA's


def inject_dora(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    target_modules: str | Iterable[str] = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init: str = "kaiming",
) -> list[str]:
    """As :func:`reference.lora.inject_lora`, with DoRA; ``merge_lora`` merges it.

    Raises:
        ValueError, TypeError: as there; or a match is a convolution, an embedding, or packed
            without ``dequantize()``.
    """
    targets = find_targets(model, target_modules)
    for name, layer in targets.items():
        check_target(name, layer)
    settings = (r, lora_alpha, lora_dropout, use_rslora, init)
    return inject_layers(model, targets, lambda layer: KINDS[wrapper_of(layer)], settings)


def check_target(name: str, layer: nn.Module) -> None:
    """Raise unless DoRA can be over ``layer``."""
    if wrapper_of(layer) not in KINDS:
        words = "DoRA is for linear layers here: choose other target_modules"
        raise ValueError(f"{name} is {describe(layer)}: {words}")
    if not (layer.weight.is_floating_point() or hasattr(layer, "dequantize")):
        words = "and has no dequantize(), so the norms of its rows can't be had"
        raise TypeError(f"{name} keeps its weight as {layer.weight.dtype}, {words}")


def _products(W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """‖w‖² and β·(A·w) for each row w of W and β of B."""
    return W.square().sum(1), (W @ A.T * B).sum(1)


def _kernels():
    from reference.kernels import dora

    return dora


class _Gain(torch.autograd.Function):
    """b + g ⊙ (u − b) by kernels, without wide copies of u or its gradient; b is frozen."""

    @staticmethod
    def forward(ctx, u: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, gain, bias)
        offset = None if bias is None else (1 - gain) * bias
        return _kernels().gain(u.reshape(-1, len(gain)), gain, offset).view(u.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u, gain, bias = ctx.saved_tensors
        rows = (each.reshape(-1, len(gain)) for each in (grad, u))
        grad_u, grad_gain = _kernels().back(*rows, gain, bias)
        return grad_u.view(u.shape), grad_gain, None
