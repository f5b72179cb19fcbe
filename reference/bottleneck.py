"""Bottleneck adapters: a small network inside each block, the first method of the family.

    a(h) = scaling · up(f(down(h)))        down: d → m,  up: m → d,  m = d // factor

Two thin linear layers with a nonlinearity between, so what they add is *not* an update of a weight:
nothing merges, and every pass has two more products in a row. Where it stands:

    after (Houlsby)     y = g(x) + a(g(x))         behind attention and feed-forward, before the sum
    after (Pfeiffer)    y = g(x) + a(g(x))         behind the whole block of a pre-norm model
    around (Pfeiffer)   y = N(h + a(N(h)))         at the last norm N of a post-norm block (BERT)
    beside (parallel)   y = g(x) + a(x)            next to the feed-forward, g

"Adapters start at the identity" holds for one of the starts only: with ``up`` at zero. The usual
one draws both from N(0, 0.02²): near the identity, not it.

Houlsby et al. 2019 (1902.00751); Pfeiffer et al. 2021 (2005.00247); He et al. 2022 (2110.04366),
whose parallel adapter reads what the feed-forward reads. Fusing several: :mod:`reference.fusion`.
"""

import math
import re
from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from reference.arguments import check_integer, check_number
from reference.lora.targets import plain_name
from reference.wrapped import Adapter, check_plain, wide, wrap

ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
STARTS = ("normal", "identity")
HOULSBY = {"place": "after", "factor": 16, "activation": "silu"}  # names: attention, feed-forward
PFEIFFER = {"place": "after", "factor": 16, "activation": "relu"}  # names: the blocks
PFEIFFER_POST_NORM = {**PFEIFFER, "place": "around"}  # names: the last norms of the blocks
PARALLEL = {"place": "beside", "factor": 2, "activation": "relu"}  # names: feed-forward
PARALLEL |= {"scaling": 4.0, "start": "identity"}


class Bottleneck(nn.Module):
    """scaling · up(f(down(h))), both with a bias: h (…, d) -> (…, d). The sum is not in it.

    Args:
        d, m: outer and inner width.
        activation: "relu", "silu" or "gelu".
        start: "normal" (both weights N(0, 0.02²)), or "identity" (``down`` as nn.Linear draws it,
            ``up`` zero, so that it adds nothing). Biases are zero.
    """

    def __init__(
        self, d: int, m: int, activation: str = "relu", scaling: float = 1.0, start: str = "normal"
    ):
        super().__init__()
        check_integer("d", d, 1)
        check_integer("m", m, 1)
        check_number("scaling", scaling)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {[*ACTIVATIONS]}, got {activation!r}")
        if start not in STARTS:
            raise ValueError(f"start must be one of {STARTS}, got {start!r}")
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        self.activation, self.scaling = activation, scaling
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if start == "identity":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, h: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.activation](self.down(h.to(self.down.weight.dtype)))  # (…, m)
        return (self.up(inner) * self.scaling).to(h.dtype)


class Placed(Adapter):
    """A module with a bottleneck ``adapter`` at it. A tuple's first item is the module's output."""

    trained = ("adapter",)

    def __init__(self, base: nn.Module, adapter: nn.Module):
        super().__init__(base)
        self.adapter = adapter


class After(Placed):
    """y = g(x) + a(g(x))."""

    def forward(self, *inputs, **named):
        out = self.base(*inputs, **named)
        return _first(out, lambda y: y + self.adapter(y))


class Around(Placed):
    """y = N(h + a(N(h))) for a norm N, whose input h is the sum of residual and sublayer."""

    def forward(self, h: Tensor) -> Tensor:
        return self.base(h + self.adapter(self.base(h)))


class Beside(Placed):
    """y = g(x) + a(x)."""

    def forward(self, x: Tensor, *inputs, **named):
        return _first(self.base(x, *inputs, **named), lambda y: y + self.adapter(x))


PLACES = {"after": After, "around": Around, "beside": Beside}


def _first(out, change):
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def inject_bottleneck(
    model: nn.Module,
    modules: str | Iterable[str],
    place: str = "after",
    factor: float = 16,
    activation: str = "relu",
    scaling: float = 1.0,
    start: str = "normal",
) -> list[str]:
    """Put a bottleneck at the named modules and freeze all else.

    Args:
        model: has ``get_input_embeddings()``, whose width is d.
        modules: full names or ends of names after a dot, or one regular expression.
        place: "after", "around" or "beside", as above. HOULSBY, PFEIFFER and PARALLEL hold the
            settings of the papers: ``inject_bottleneck(model, ["self_attn", "mlp"], **HOULSBY)``.
        factor: m = d // factor, at least 1.

    Returns:
        The names of the modules.

    Raises:
        ValueError: nothing matches, one match lies in another, the model is adapted, an argument is
            out of range. The model is as it was then.
    """
    check_plain(model)
    if place not in PLACES:
        raise ValueError(f"place must be one of {[*PLACES]}, got {place!r}")
    check_number("factor", factor, 1)
    table = model.get_input_embeddings().weight
    d = table.shape[1]
    options = {"activation": activation, "scaling": scaling, "start": start}

    def make(name: str, module: nn.Module) -> Placed:
        adapter = Bottleneck(d, max(1, int(d // factor)), **options)
        return PLACES[place](module, adapter.to(table.device, wide(table)))

    return wrap(model, named_modules(model, modules), make)


def named_modules(model: nn.Module, names: str | Iterable[str]) -> dict[str, nn.Module]:
    """The modules that ``names`` chooses: full names, ends after a dot, or one pattern.

    Raises:
        ValueError: there is none, or one lies inside another.
    """
    ends = () if isinstance(names, str) else tuple(names)

    def chosen(name: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, name) is not None
        return name in ends or name.endswith(tuple(f".{end}" for end in ends))

    modules = [(plain_name(name), part) for name, part in model.named_modules() if name]
    found = {name: part for name, part in modules if chosen(name)}
    if not found:
        kinds = sorted({name.rpartition(".")[2] for name, _ in modules})
        raise ValueError(f"modules={names!r} matches nothing; names end in {', '.join(kinds[:12])}")
    for name in found:
        if outer := next((other for other in found if name.startswith(f"{other}.")), None):
            raise ValueError(f"{name} lies in {outer}, which is chosen too: name one of them")
    return found
