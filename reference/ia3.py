"""IA³: three vectors for each transformer block that amplify or inhibit what passes by.

    keys, values:   y = l ⊙ (W·x + b)       l: (out,)    the layer's output is scaled
    feed-forward:   y = W·(l ⊙ x) + b       l: (in,)     the last layer's input is scaled

All l start at one, so training begins at the pretrained model. Of a Llama block they are of
``k_proj``, ``v_proj`` and ``down_proj``: no other common method trains fewer numbers. Both forms
are exact rescalings of the layer, W' = diag(l)·W and b' = l ⊙ b, or W' = W·diag(l) and b' = b, so
it merges without a trace.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning" (2205.05638). The losses of its recipe T-Few are in :mod:`reference.t_few`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reference.lora.targets import plain_name
from reference.lora.weights import check_weight
from reference.wrapped import Adapter, linear_targets, matrix, sizes, wide, wrap


class IA3Layer(Adapter):
    """A linear layer whose outputs, or inputs with ``feedforward``, are scaled one by one.

    Attributes:
        ia3_l: (out, 1), or (1, in) with ``feedforward``: the shapes in which peft keeps it.

    Raises:
        ValueError: the base is adapted already, computes its weight or has it on the meta device.
    """

    trained = ("ia3_l",)

    def __init__(self, base: nn.Module, feedforward: bool = False):
        check_weight(base)
        super().__init__(base)
        n_in, n_out = sizes(base)
        shape = (1, n_in) if feedforward else (n_out, 1)
        like = base.weight
        self.ia3_l = nn.Parameter(torch.ones(shape, dtype=wide(like), device=like.device))
        self.feedforward = feedforward

    def forward(self, x: Tensor) -> Tensor:
        l = self.ia3_l.flatten()
        if self.feedforward:
            return self.base((x * l).to(x.dtype))
        y = self.base(x)
        return (y * l).to(y.dtype)

    def merged_weight(self) -> tuple[Tensor, Tensor | None]:
        """W' and b'. The bias is scaled with the outputs it is part of, and not with inputs."""
        W, bias = matrix(self.base) * self.ia3_l, self.base.bias
        return W, None if bias is None or self.feedforward else bias * self.ia3_l.flatten()

    def extra_repr(self) -> str:
        return f"feedforward={self.feedforward}"


def inject_ia3(
    model: nn.Module,
    target_modules: str | Iterable[str] = ("k_proj", "v_proj", "down_proj"),
    feedforward_modules: Iterable[str] = ("down_proj",),
) -> list[str]:
    """Give the chosen linear layers a scale and freeze all else; ``merge_adapters`` merges.

    Args:
        target_modules: by LoRA's rules, :func:`reference.lora.inject_lora`.
        feedforward_modules: full names or ends of names after a dot, of those targets whose input
            is scaled. Each has to be a target.

    Returns:
        The names of the layers.

    Raises:
        ValueError: nothing matches, a match can't be adapted, a feed-forward module is no target.
            The model is as it was then.
    """
    targets = linear_targets(model, target_modules)
    ends = (feedforward_modules,) if isinstance(feedforward_modules, str) else feedforward_modules
    scaled_inputs = {name for name in targets if any(_is(name, end) for end in ends)}
    for end in ends:
        if not any(_is(name, end) for name in targets):
            words = "is none of the target_modules, so nothing of it would be scaled"
            raise ValueError(f"feedforward_modules: {end!r} {words}")
    return wrap(model, targets, lambda name, layer: IA3Layer(layer, name in scaled_inputs))


def _is(name: str, end: str) -> bool:
    return plain_name(name) == end or plain_name(name).endswith(f".{end}")
