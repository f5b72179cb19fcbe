"""LoRA's relatives, ten lines each: other ways to train few numbers of a weight.

                what is trained                                  numbers in an (out × in) layer
    rsLoRA      A, B; scale α/√r            (reference.lora)     r·(in + out)
    PiSSA       A, B from W's own top SVD   (reference.lora)     r·(in + out)
    LoRA+       A, B; B at k times A's rate                      r·(in + out)
    LoftQ       A, B from what quantizing W loses                r·(in + out)
    VeRA        two vectors between shared random A and B        r + out
    LoHa        (B₁A₁) ⊙ (B₂A₂): rank up to r²                   2r·(in + out)
    LoKr        w₁ ⊗ w₂, w₂ = B·A if that is smaller             about √(in·out) + r·(√in + √out)
    OFT         a rotation R of the input, block by block        in·(b − 1)/2
    BitFit      the biases that the model has                    out, or none
    LN tuning   the gains (and biases) of the norms              –

Kalajdzievski 2023 (2312.03732); Meng et al. 2024 (2404.02948); Hayou et al. 2024 (2402.12354);
Li et al. 2023 (2310.08659); Kopiczko et al. 2023 (2310.11454); Hyeon-Woo et al. 2021 (2108.06098);
Yeh et al. 2023 (2309.14859); Qiu et al. 2023 (2306.07280); Ben Zaken et al. 2021 (2106.10199);
Zhao et al. 2023 (2312.11420). Each gives peft's numbers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.arguments import check_integer
from reference.lora.weights import check_weight
from reference.wrapped import Adapter, matrix, sizes, wide


class Update(Adapter):
    """y = W·x + b + ΔW·x for a ``delta_weight()`` (out, in) that is formed at every call."""

    def __init__(self, base: nn.Module):
        check_weight(base)
        super().__init__(base)

    def new(self, *shape: int) -> nn.Parameter:
        like = self.base.weight
        empty = torch.zeros(shape, dtype=wide(like), device=like.device)
        return nn.Parameter(empty)

    def drawn(self, *shape: int) -> nn.Parameter:
        """As nn.Linear draws a weight."""
        parameter = self.new(*shape)
        nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + self.update(x.to(getattr(self, self.trained[0]).dtype))).to(y.dtype)

    def update(self, x: Tensor) -> Tensor:
        return F.linear(x, self.delta_weight())

    def merged_weight(self) -> tuple[Tensor, None]:
        return matrix(self.base) + self.delta_weight(), None


class VeRA(Update):
    """ΔW = diag(b)·B·diag(d)·A: A and B random, frozen and shared by all layers, cut to size."""

    trained = ("vera_lambda_d", "vera_lambda_b")

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, d_initial: float = 0.1, key: int = 0):
        super().__init__(base)
        (n_in, n_out), self.key = sizes(base), key  # the seed of A and B
        self.shared = (A[:, :n_in], B[:n_out])  # views: held once for the model, and not saved
        self.vera_lambda_d, self.vera_lambda_b = self.new(len(A)), self.new(n_out)
        nn.init.constant_(self.vera_lambda_d, d_initial)

    def halves(self) -> tuple[Tensor, Tensor]:
        self.shared = tuple(each.to(self.vera_lambda_d) for each in self.shared)
        return self.shared

    def update(self, x: Tensor) -> Tensor:
        A, B = self.halves()
        return self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(x, A), B)

    def delta_weight(self) -> Tensor:
        A, B = self.halves()
        return (self.vera_lambda_b[:, None] * B) @ (self.vera_lambda_d[:, None] * A)


class LoHa(Update):
    """ΔW = α/r · (w1a·w1b) ⊙ (w2a·w2b)."""

    trained = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    def __init__(self, base: nn.Module, r: int, alpha: float):
        super().__init__(base)
        n_in, n_out = sizes(base)
        self.r, self.alpha, self.scaling = r, alpha, alpha / r
        self.hada_w1_a, self.hada_w1_b = self.drawn(n_out, r), self.drawn(r, n_in)
        self.hada_w2_a, self.hada_w2_b = self.drawn(n_out, r), self.new(r, n_in)

    def delta_weight(self) -> Tensor:
        one, two = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        return one * two * self.scaling


class LoKr(Update):
    """ΔW = α/r · w1 ⊗ w2 with w2 = w2_a·w2_b where r is below half its longer side."""

    def __init__(self, base: nn.Module, r: int, alpha: float):
        super().__init__(base)
        n_in, n_out = sizes(base)
        self.r, self.alpha, self.scaling = r, alpha, alpha / r
        (i1, i2), (o1, o2) = near_square(n_in), near_square(n_out)
        self.lokr_w1 = self.new(o1, i1)
        self.thin = r < max(o2, i2) / 2
        if self.thin:
            self.lokr_w2_a, self.lokr_w2_b = self.drawn(o2, r), self.drawn(r, i2)
        else:
            self.lokr_w2 = self.drawn(o2, i2)
        self.trained = ("lokr_w1", *(("lokr_w2_a", "lokr_w2_b") if self.thin else ("lokr_w2",)))

    def delta_weight(self) -> Tensor:
        w2 = self.lokr_w2_a @ self.lokr_w2_b if self.thin else self.lokr_w2
        return torch.kron(self.lokr_w1, w2) * self.scaling


class OFT(Update):
    """y = W·(x·R) + b: R rotates blocks of ``block_size`` inputs, R = Cayley of a skew matrix.

    peft's default replaces the exact (I + Q)(I − Q)⁻¹ by I + 2Q + 2Q² + 2Q³ + Q⁴, close to it for
    small Q and not quite a rotation; with ``exact`` it takes (I − Q)(I + Q)⁻¹, the other way round.
    """

    trained = ("oft_R",)

    def __init__(self, base: nn.Module, block_size: int = 32, exact: bool = False):
        super().__init__(base)
        n_in, _ = sizes(base)
        check_integer("block_size", block_size, 2)
        if n_in % block_size:
            raise ValueError(f"block_size must divide the {n_in} inputs, got {block_size}")
        self.block_size, self.exact = block_size, exact
        self.oft_R = self.new(n_in // block_size, block_size * (block_size - 1) // 2)

    def rotations(self) -> Tensor:
        """(blocks, b, b)"""
        upper = torch.triu_indices(self.block_size, self.block_size, 1, device=self.oft_R.device)
        Q = self.oft_R.new_zeros(len(self.oft_R), self.block_size, self.block_size)
        Q[:, upper[0], upper[1]] = self.oft_R
        Q, eye = Q - Q.mT, torch.eye(self.block_size, device=Q.device, dtype=Q.dtype)
        if self.exact:
            return torch.linalg.solve(eye + Q, (eye - Q).expand_as(Q), left=False)
        square = Q @ Q
        return eye + 2 * Q + 2 * square + 2 * square @ Q + square @ square

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.to(self.oft_R.dtype).unflatten(-1, (-1, self.block_size))  # (…, blocks, b)
        turned = torch.einsum("...kb,kbc->...kc", blocks, self.rotations())
        return self.base(turned.flatten(-2).to(x.dtype))

    def merged_weight(self) -> tuple[Tensor, None]:
        blocks = matrix(self.base).unflatten(1, (-1, self.block_size))  # (out, blocks, b)
        turned = torch.einsum("okc,kbc->okb", blocks.to(self.oft_R.dtype), self.rotations())
        return turned.flatten(1), None


def near_square(n: int) -> tuple[int, int]:
    """n as a product of two factors as near each other as there are, the smaller first."""
    small = max(i for i in range(1, math.isqrt(n) + 1) if n % i == 0)
    return small, n // small
