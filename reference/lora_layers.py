"""A low-rank update beside a frozen layer: linear, convolution, embedding.

Fine-tuning changes a weight W by some ΔW. LoRA keeps W as it is and writes the change as a product of two thin matrices, which are all that
is trained:

    W' = W + ΔW,    ΔW = s · B · A,    s = α/r        A: (r × in), random    B: (out × r), zero

B = 0 makes ΔW = 0 at the start, so training begins at the pretrained model; A ≠ 0 gives B a gradient from the first step. With r far below
in and out the two factors hold r·(in + out) numbers instead of in·out. (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
rsLoRA, s = α/√r: Kalajdzievski 2023. PiSSA, A and B from the top of W's own SVD: Meng et al. 2024.)

The factors are float32 even when the base is half precision: a step of the optimizer is often smaller than bfloat16 can add to them. The
product is added in float32 and rounded once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITS = ("kaiming", "gaussian", "pissa")


class LoRALayer(nn.Module):
    """What every adapted layer shares: a frozen ``base``, the two factors, the scale, merging.

    Attributes:
        base: the frozen layer.
        lora_A, lora_B: the two factors, the only trained parameters.
        scaling: s, a float: α/r, or α/√r with ``use_rslora``.
        merged: whether ΔW is now inside the base's weight.
    """

    def __init__(self, base: nn.Module, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, init: str, shapes: tuple):
        shape_A, shape_B = shapes
        largest = min(math.prod(shape_A[1:]), shape_B[0])
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= largest:
            raise ValueError(f"r must be an integer from 1 to {largest} for {_describe(base)}, got {r!r}")
        if not (math.isfinite(lora_alpha) and lora_alpha > 0):
            raise ValueError(f"lora_alpha must be a positive number, got {lora_alpha!r}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout!r}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        super().__init__()
        self.base = base
        self.r, self.lora_alpha, self.use_rslora, self.init = r, lora_alpha, use_rslora, init
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merged = False
        weight = base.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.zeros(shape_A, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=dtype, device=weight.device))
        self.reset_parameters()
        base.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A random, B zero: "kaiming" draws A as ``nn.Linear`` does, uniform in ±1/√fan_in; "gaussian" from N(0, 1/r²)."""
        if self.init == "pissa":
            raise ValueError(f"init='pissa' is defined for linear layers only, got {_describe(self.base)}: use 'kaiming' or 'gaussian'")
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def delta_weight(self) -> Tensor:
        """ΔW = s · B · A in the shape of the base's weight, and in the factors' dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + ΔW; from here on the forward is the base's own, and nothing is left to train.

        Raises:
            ValueError: already merged, or the sum holds NaN or infinity.
            TypeError: the base's weight is not floating point (packed, quantized) and the base has no ``merge_delta``.
        """
        if self.merged:
            raise ValueError(f"{_describe(self)} is merged already: a second merge would add its update twice")
        self._add_to_base(self.delta_weight())
        self._set_merged(True)

    @torch.no_grad()
    def unmerge(self) -> None:
        """W ← W − ΔW: the base's weight as before the merge, up to the rounding of its dtype."""
        if not self.merged:
            raise ValueError(f"{_describe(self)} is not merged: there is no update to take out")
        self._add_to_base(-self.delta_weight())
        self._set_merged(False)

    def _set_merged(self, merged: bool) -> None:
        self.merged = merged
        for factor in (self.lora_A, self.lora_B):  # a merged layer must not train: unmerging would take out another update than went in
            factor.requires_grad_(not merged)
            factor.grad = None

    def _add_to_base(self, delta: Tensor) -> None:
        if not torch.isfinite(delta).all():
            raise ValueError(f"the update of {_describe(self)} holds NaN or infinity: the adapter is broken")
        if hasattr(self.base, "merge_delta"):  # a layer that stores its weight in its own way adds to it in its own way
            self.base.merge_delta(delta)
            return
        weight = self.base.weight
        if not weight.is_floating_point():
            raise TypeError(
                f"{_describe(self.base)} keeps its weight as {weight.dtype}, to which an update can't be added: dequantize it first"
            )
        total = (weight + delta).to(weight.dtype)  # added in the wider dtype, rounded once
        if not torch.isfinite(total).all():
            raise ValueError(f"merging would leave NaN or infinity in the weight of {_describe(self.base)} ({weight.dtype})")
        self.base.weight = nn.Parameter(total, requires_grad=False)  # a new one: another layer may share the old

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that asks a layer for its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}, merged={self.merged}"


class LoRALinear(LoRALayer):
    """y = W·x + b + s · B·A·dropout(x).

    Args:
        base: ``nn.Linear``, or any layer with ``in_features``, ``out_features`` and a ``weight``, which may be packed: only the base's own
            forward reads it. Frozen here.
        r: rank, 1 to min(in_features, out_features).
        lora_alpha: α; the scale of the update is α/r.
        lora_dropout: probability, in [0, 1), of dropping an input of A; of the base's input, never.
        use_rslora: scale by α/√r instead, so that the update keeps its size as r grows.
        init: "kaiming", "gaussian" (B = 0), or "pissa": the top r singular triples of W become s·B·A and leave the base.

    Shapes: ``lora_A`` (r, in_features), ``lora_B`` (out_features, r); input (..., in_features), output (..., out_features).
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
    ):
        if isinstance(base, LoRALayer) or not is_linear(base):
            raise TypeError(f"base must be a linear layer that is not wrapped yet, got {_describe(base)}")
        self.in_features, self.out_features = base.in_features, base.out_features
        super().__init__(base, r, lora_alpha, lora_dropout, use_rslora, init, ((r, base.in_features), (base.out_features, r)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init == "pissa":
            self._split_principal()
        else:
            super().reset_parameters()

    def _split_principal(self) -> None:
        """PiSSA: W = U·S·Vᵀ; B = U_r·√(S_r/s), A = √(S_r/s)·V_rᵀ, and the base keeps W − s·B·A, so the output does not change."""
        weight = self.base.weight
        if not weight.is_floating_point():
            raise TypeError(
                f"init='pissa' needs the weight itself, but {_describe(self.base)} keeps it as {weight.dtype}: apply it before quantizing"
            )
        if not torch.isfinite(weight).all():
            raise ValueError(f"init='pissa': the weight of {_describe(self.base)} holds NaN or infinity")
        U, S, Vh = torch.linalg.svd(weight.to(self.lora_A.dtype), full_matrices=False)
        root = torch.sqrt(S[: self.r] / self.scaling)  # (r,)
        self.lora_A.copy_(root[:, None] * Vh[: self.r])  # (r, in)
        self.lora_B.copy_(U[:, : self.r] * root)  # (out, r)
        self._add_to_base(-self.delta_weight())

    def delta_weight(self) -> Tensor:
        return _product(self.lora_B, self.lora_A, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        h = F.linear(self.lora_dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., r)
        return (y + F.linear(h, self.lora_B) * self.scaling).to(y.dtype)


class LoRAConv2d(LoRALayer):
    """A convolution to r channels like the base's, then a 1×1 convolution to its output channels.

    Shapes: ``lora_A`` (r, in_channels, kh, kw), ``lora_B`` (out_channels, r // groups, 1, 1). A has the base's stride, padding and dilation.
    In a grouped convolution A sees all input channels and B is grouped, as in peft; then ΔW does not fit the base's weight: no merging.
    """

    def __init__(
        self,
        base: nn.Conv2d,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
    ):
        if not isinstance(base, nn.Conv2d):
            raise TypeError(f"base must be an nn.Conv2d, got {_describe(base)}")
        if isinstance(r, int) and r % base.groups:
            raise ValueError(f"r must be a multiple of the base's groups ({base.groups}), got {r}")
        shapes = ((r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups, 1, 1))
        super().__init__(base, r, lora_alpha, lora_dropout, use_rslora, init, shapes)

    def delta_weight(self) -> Tensor:
        if self.base.groups > 1:
            raise ValueError(f"the update of a convolution with groups={self.base.groups} does not fit its weight: it can't be merged")
        return _product(self.lora_B.flatten(1), self.lora_A.flatten(1), self.scaling).view_as(self.base.weight)  # (out, in, kh, kw)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        x = self.lora_dropout(x.to(self.lora_A.dtype))
        if self.base.padding_mode != "zeros":  # the base pads by itself in this case
            x, padding = F.pad(x, self.base._reversed_padding_repeated_twice, mode=self.base.padding_mode), 0
        else:
            padding = self.base.padding
        h = F.conv2d(x, self.lora_A, None, self.base.stride, padding, self.base.dilation)  # (batch, r, h', w')
        return (y + F.conv2d(h, self.lora_B, groups=self.base.groups) * self.scaling).to(y.dtype)


class LoRAEmbedding(LoRALayer):
    """A token's row gets s · B · A[:, token]. Here A is zero and B is normal: a column of A is reached by its own token only.

    Shapes: ``lora_A`` (r, num_embeddings), ``lora_B`` (embedding_dim, r). ``init`` chooses nothing; it is there for one signature.
    """

    def __init__(
        self,
        base: nn.Embedding,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
    ):
        if not isinstance(base, nn.Embedding):
            raise TypeError(f"base must be an nn.Embedding, got {_describe(base)}")
        if base.max_norm is not None:
            raise ValueError("an embedding with max_norm rewrites its own weight in the forward: it can't be a frozen base")
        shapes = ((r, base.num_embeddings), (base.embedding_dim, r))
        super().__init__(base, r, lora_alpha, lora_dropout, use_rslora, init, shapes)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init == "pissa":
            super().reset_parameters()
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def delta_weight(self) -> Tensor:
        return _product(self.lora_B, self.lora_A, self.scaling).T  # (num_embeddings, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.merged:
            return y
        rows = F.embedding(
            x, self.lora_A.T, self.base.padding_idx, scale_grad_by_freq=self.base.scale_grad_by_freq, sparse=self.base.sparse
        )
        update = F.linear(rows, self.lora_B) * self.scaling  # (..., embedding_dim)
        if (embed_scale := getattr(self.base, "embed_scale", None)) is not None:  # Gemma multiplies what it looks up
            update = update * embed_scale
        return (y + update).to(y.dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` behaves as a linear layer: ``in_features``, ``out_features`` and a ``weight``."""
    return all(hasattr(module, name) for name in ("in_features", "out_features", "weight"))


def _product(lora_B: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """s · B · A, computed in float32 or wider, in the dtype of the factors."""
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    return ((lora_B.to(wide) @ lora_A.to(wide)) * scaling).to(lora_A.dtype)


def _describe(module: object) -> str:
    if isinstance(module, LoRALayer):
        return f"{type(module).__name__}({_describe(module.base)})"
    sizes = [
        str(getattr(module, name)) for name in ("in_features", "out_features", "num_embeddings", "embedding_dim") if hasattr(module, name)
    ]
    sizes = sizes or [str(getattr(module, name)) for name in ("in_channels", "out_channels") if hasattr(module, name)]
    return f"{type(module).__name__}({', '.join(sizes)})"
