"""Training inside a random subspace: how many numbers does a whole training run need?

Instead of all D parameters θ only d numbers z are trained, with a fixed random D × d matrix P
(Li et al. 2018, "Measuring the intrinsic dimension of objective landscapes"):

    θ = θ0 + P·z
"""

from typing import Any

import torch
from torch import Tensor, nn

from reference.arguments import check_integer


class RandomSubspace(nn.Module):
    """A module whose parameters can move only inside a random d-dimensional subspace.

    P (D × d, D the number of parameters of the module that require gradients) is fixed and has
    orthonormal columns, so that z and the step P·z are equally long and the gradient of z is
    Pᵀ·(gradient of θ). Two kinds:

    - ``"sparse"``: one non-zero in each row. Every parameter is dealt at random to one of d groups
      (sizes differ by at most one) and gets a random sign; a column is its group's signs over the
      root of the group's size. Groups don't overlap, so columns are orthonormal exactly, and P
      costs 5 bytes a parameter instead of 4·d. Not uniform over subspaces; unit 01 compares the
      two.
    - ``"dense"``: the Q of a Gaussian D × d matrix, a subspace drawn uniformly from all of them.
      The definition, for small modules.

    What it holds: the module with θ0, now frozen; z, the only trainable parameter; P in buffers
    that are not saved, since the seed gives P again. The result of a run is d numbers and a seed.
    P is drawn on the CPU: one seed gives one P on every device.

    Args:
        module: any module; its parameters that require gradients take part and are frozen, the
            others stay as they are.
        dimension: d, from 0 (nothing can move) to D.
        seed: decides P.
        projection: "sparse" or "dense".

    Raises:
        TypeError: ``module`` is not a module, ``dimension`` or ``seed`` not an integer.
        ValueError: nothing to train, ``dimension`` out of range, an unknown projection, a module
            that is already wrapped.
    """

    def __init__(
        self, module: nn.Module, dimension: int, seed: int = 0, projection: str = "sparse"
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if any(isinstance(part, RandomSubspace) for part in module.modules()):
            raise ValueError("module is already inside a RandomSubspace: wrap the plain module")
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError(
                "module has no parameter that requires gradients: "
                "call module.requires_grad_(True) first"
            )
        check_integer("seed", seed)
        if projection not in ("sparse", "dense"):
            raise ValueError(f"projection must be 'sparse' or 'dense', got {projection!r}")
        total = sum(p.numel() for p in trained.values())
        check_integer("dimension", dimension, 0, total)
        self.dimension, self.seed, self.projection = dimension, seed, projection
        self.names = tuple(trained)
        first = next(iter(trained.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)  # 16 bits would lose small steps
        self.z = nn.Parameter(torch.zeros(dimension, dtype=dtype, device=first.device))  # (d,)
        for name, buffer in self._draw(total, torch.Generator().manual_seed(seed)).items():
            self.register_buffer(name, buffer.to(first.device), persistent=False)
        self.module = module
        for p in trained.values():
            p.requires_grad_(False)

    def _draw(self, total: int, generator: torch.Generator) -> dict[str, Tensor]:
        """P, as the buffers that its kind needs."""
        d = self.dimension
        if self.projection == "dense":
            gaussian = torch.randn(total, d, generator=generator, dtype=self.z.dtype)
            return {"matrix": torch.linalg.qr(gaussian).Q}  # (D, d)
        group = torch.randperm(total, generator=generator) % max(d, 1)  # (D,): dealt like cards
        coin = torch.randint(0, 2, (total,), generator=generator, dtype=torch.int8)
        sign = coin * 2 - 1  # (D,): −1 or 1
        size = group.bincount(minlength=d)[:d]  # (d,)
        return {"group": group.int(), "sign": sign, "scale": size.to(self.z.dtype).rsqrt()}

    def expand(self, z: Tensor) -> Tensor:
        """P·z, shape (D,): the step of all trained parameters, in the order of ``names``."""
        if self.projection == "dense":
            return self.matrix @ z
        if self.dimension == 0:
            return z.new_zeros(len(self.group))
        return (self.scale * z).index_select(0, self.group) * self.sign

    def project(self, vector: Tensor) -> Tensor:
        """Pᵀ·vector, shape (d,): what the gradient of all parameters, (D,), becomes for z."""
        if self.projection == "dense":
            return self.matrix.T @ vector
        if self.dimension == 0:
            return vector.new_zeros(0)
        sums = torch.zeros_like(self.scale).index_add(0, self.group, vector * self.sign)
        return self.scale * sums

    def parameters_now(self) -> dict[str, Tensor]:
        """θ0 + P·z by parameter name, each in its own dtype; differentiable with respect to z."""
        start = [self.module.get_parameter(name) for name in self.names]
        steps = self.expand(self.z).split([p.numel() for p in start])
        return {
            name: (p + step.view_as(p)).to(p.dtype)
            for name, p, step in zip(self.names, start, steps, strict=True)
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``module`` gives with parameters θ0 + P·z; ``module`` itself keeps θ0."""
        return torch.func.functional_call(self.module, self.parameters_now(), args, kwargs)
