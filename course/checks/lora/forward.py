"""A LoRA layer: shapes, first values, scale, dropout, dtypes, and whether it learns.

What is random is observed in sentences (does it learn, do the rows differ), never in values, so that two right answers may draw
differently.
"""

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course.checking import Check, Seen, but
from course.checks.lora.shared import fill
from reference import lora


class LoRALinear(nn.Module):
    """The worked answer: y = base(x) + α/r · B·A·dropout(x)."""

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.r, self.lora_alpha, self.p = self.held(base), r, lora_alpha, lora_dropout
        self.lora_A, self.lora_B = self.factor(r, base.in_features), self.factor(base.out_features, r)
        for parameter in self.frozen():
            parameter.requires_grad_(False)
        with torch.no_grad():
            self.start_A(self.lora_A)
            self.start_B(self.lora_B)

    def held(self, base: nn.Linear) -> nn.Linear:
        return base

    def factor(self, rows: int, columns: int) -> nn.Parameter:
        return nn.Parameter(self.base.weight.new_empty(rows, columns))

    def frozen(self) -> Iterable[nn.Parameter]:
        return self.base.parameters()

    def start_A(self, factor: Tensor) -> None:
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def start_B(self, factor: Tensor) -> None:
        nn.init.zeros_(factor)

    def scale(self) -> float:
        return self.lora_alpha / self.r

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def path(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    def update(self, x: Tensor) -> Tensor:
        return self.scale() * self.path(self.drop(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.update(x)


R, ALPHA, IN, OUT = 3, 7, 6, 5  # α/r = 2.33: differs from α, 1, r/α, α/√r and α//r
DROPOUT = 0.25  # of 0.5 nobody can tell p from 1 − p
ONE_DRAW = "all rows the same, and other at each call"


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    base, x = linear(), torch.randn(2, 4, IN, generator=g)
    before = base.weight.detach().clone()
    layer = answer(base, R, ALPHA)
    factors = {name: getattr(layer, name, None) for name in ("lora_A", "lora_B")}
    shapes = {f"the shape of {name}": tuple(getattr(factor, "shape", ())) for name, factor in factors.items()}
    yield from [(f"layer.{name} is a", type(factor).__name__) for name, factor in factors.items()]
    yield from shapes.items()
    if [*shapes.values()] != [(R, IN), (OUT, R)]:
        return
    start = order_of_start(answer(nn.Linear(1024, 16), 16, ALPHA))
    yield from before_training(layer, base, x, other=answer(linear(), R, ALPHA)).items()
    yield "before training lora_A's entries beside 1/√in_features, for 1,024 inputs, 16 outputs and rank 16", start
    fill(layer, g)
    y = layer(x.requires_grad_(True))
    yield "the output with non-zero factors", y
    if not y.requires_grad:
        return
    named = {name: p for name, p in {"the input": x, **factors}.items() if p.requires_grad}
    total = (y * torch.randn(y.shape, generator=g)).sum()
    gradients = torch.autograd.grad(total, list(named.values()), materialize_grads=True)
    yield from [(f"the gradient of {name}", gradient) for name, gradient in zip(named, gradients, strict=True)]
    yield "the base weight after all this", base.weight.detach().clone()
    yield "the base weight is untouched", torch.equal(base.weight, before)
    yield "over a base without a bias the update is", without_bias(answer, g)
    for dtype, rounding in ((torch.bfloat16, 2**-6), (torch.float64, 2**-20)):
        yield from in_another_dtype(answer, dtype, rounding, g)
    base = linear()
    dropped = dict(with_dropout(answer(base, R, ALPHA, DROPOUT), base, g))
    yield from dropped.items()
    if ONE_DRAW not in dropped.values():  # else what more is seen depends on the draw
        base = linear()
        learned = learns(answer(base, R, ALPHA), base, g) if start == "of that order" else f"not tried: lora_A starts {start}"
        yield "it learns: 60 steps of gradient descent halve the error", learned


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return nn.Linear(IN, OUT, bias=bias).to(dtype)


def before_training(layer: nn.Module, base: nn.Linear, x: Tensor, other: nn.Module) -> dict:
    a, b = layer.lora_A, layer.lora_B
    trained = [p for p in layer.parameters() if p.requires_grad]
    return {
        "lora_A trains": any(p is a for p in trained),
        "lora_B trains": any(p is b for p in trained),
        "numbers that train besides lora_A and lora_B": sum(p.numel() for p in trained if p is not a and p is not b),
        "the layer holds the base's own weight": base.weight.data_ptr() in {p.data_ptr() for p in (*layer.parameters(), *layer.buffers())},
        "before training lora_B is all zero": not bool(b.any()),
        "before training lora_A is all zero": not bool(a.any()),
        "before training the output is the base's own": torch.allclose(layer(x), base(x), atol=1e-6),
        "the rank of lora_A before training": int(torch.linalg.matrix_rank(a.detach().float())) if a.any() else 0,
        "two layers start alike": torch.equal(a, other.lora_A),
    }


def order_of_start(layer: nn.Module) -> str:
    """lora_A's entries beside 1/√in_features. Uniform or normal, by torch's rule, Xavier's or PEFT's 1/r: all are of that order."""
    spread = layer.lora_A.detach().float().std().item() * math.sqrt(layer.lora_A.shape[1])
    return "far smaller" if spread < 0.1 else "far larger" if spread > 16 else "larger" if spread > 4 else "of that order"


@torch.no_grad()
def without_bias(answer, g: torch.Generator) -> Tensor | str:
    base, x = linear(bias=False), torch.randn(2, IN, generator=g)
    try:
        layer = answer(base, R, ALPHA)
        fill(layer, g)
        return layer(x) - base(x)
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"a {type(error).__name__}"


@torch.no_grad()
def in_another_dtype(answer, dtype: torch.dtype, rounding: float, g: torch.Generator) -> Seen:
    base, label = linear(dtype), f"with a {dtype} base the output is"
    x = torch.randn(2, IN, generator=g).to(dtype)
    try:
        layer = answer(base, R, ALPHA)
        yield f"a {dtype} base is afterwards", str(base.weight.dtype)
        if base.weight.dtype != dtype:
            return
        fill(layer, g, dtype=torch.bfloat16)  # numbers that factors in float32 hold too
        y = layer(x)
    except (RuntimeError, TypeError) as error:
        yield label, f"a {type(error).__name__}"
        return
    wide = [each.double() for each in (x, base.weight, base.bias, layer.lora_A, layer.lora_B)]
    size = output(*map(torch.abs, wide))  # of the products: sums may cancel
    right = (y.double() - output(*wide)).abs() <= rounding * size
    yield label, str(y.dtype)
    yield f"{label} right to within rounding", bool(right.all())


def output(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return x @ weight.T + bias + ALPHA / R * (x @ lora_A.T @ lora_B.T)


@torch.no_grad()
def with_dropout(layer: nn.Module, base: nn.Linear, g: torch.Generator) -> Seen:
    one_input = torch.eye(IN)[2].repeat(256, 1)
    training = f"in training, with dropout {DROPOUT}"
    layer.train()
    yield f"{training} and lora_B zero, the output is the base's own", torch.allclose(layer(one_input.clone()), base(one_input), atol=1e-6)
    fill(layer, g)
    layer.lora_B.abs_().add_(0.5)
    two_inputs = one_input + torch.eye(IN)[4]
    update = ALPHA / R * (layer.lora_B @ layer.lora_A)[:, 2]

    def got(x: Tensor) -> Tensor:
        return layer(x.clone()) - base(x)

    for label in (f"in eval mode, with dropout {DROPOUT}", training):
        layer.train(label == training)
        share = shares_of_update(got, one_input, update)
        yield f"{label}, in rows with one input that is not zero, the update in multiples of the right one", share
    if share == ONE_DRAW:
        return
    layer(given := one_input.clone())
    batch = got(torch.ones(12, 15, IN))  # of 12 samples, 15 positions
    yield f"{training}, the layer's input is afterwards", "as it was" if torch.equal(given, one_input) else "changed"
    yield f"{training}, most rows get an update", bool(got(one_input).any(1).float().mean() > 0.5)
    yield f"{training} and two inputs that are not zero, kinds of updates", min(kinds(got(two_inputs)), 9)
    yield f"{training}, all samples of a batch get the same", kinds(batch.flatten(1)) == 1
    yield f"{training}, all positions of a sample get the same", kinds(batch.transpose(0, 1).flatten(1)) == 1


def shares_of_update(got, x: Tensor, update: Tensor) -> str:
    """Equal rows with one non-zero input: what multiples of the update they got; where it is none, how many different updates there are."""
    rest = got(x)
    found = kinds(rest)
    if found == 1 and any(kinds(torch.cat([rest[:1], got(x[:1])])) == 2 for _ in range(50)):
        return ONE_DRAW
    share = (rest @ update) / (update @ update)  # (rows,)
    if torch.allclose(rest, share[:, None] * update, atol=1e-4):
        return " or ".join(f"{value:g}" for value in sorted({round(value, 2) + 0.0 for value in share.tolist()}))
    words = "one update, for all rows" if found == 1 else "two different updates" if found == 2 else "three to eight different updates"
    return f"none ({words if found <= 8 else 'more than eight different updates'})"


def kinds(rows: Tensor) -> int:
    """How many different rows there are."""
    count = 0
    while len(rows):
        rows, count = rows[(rows - rows[0]).abs().amax(1) > 1e-4], count + 1
    return count


def learns(layer: nn.Module, base: nn.Linear, g: torch.Generator) -> bool:
    """Does gradient descent on what the layer says is trainable more than halve the error to a target that a rank-1 update reaches?"""
    x = torch.randn(64, IN, generator=g)
    shift = torch.randn(OUT, 1, generator=g) @ torch.randn(1, IN, generator=g)
    with torch.no_grad():
        target = F.linear(x, base.weight + shift / shift.norm(), base.bias)
    trained = [p for p in layer.parameters() if p.requires_grad]
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x), target)
        losses.append(loss.item())
        if not trained or not loss.requires_grad:
            return False
        for p, gradient in zip(trained, torch.autograd.grad(loss, trained, materialize_grads=True), strict=True):
            p.data.add_(gradient, alpha=-0.2)
    return losses[-1] < 0.5 * losses[0]


def one_mask(like):
    """Dropout whose mask has the shape of ``like(x)``."""
    return lambda layer, x: x * F.dropout(torch.ones_like(like(x)), layer.p, layer.training)


check = Check(
    task="a LoRA layer: right shapes, right scale, frozen base, dropout in its place, and it learns",
    observe=observe,
    reference=LoRALinear,
    second=lora.LoRALinear,
    misconceptions={
        "your update is the right one times r: the scale is α/r, you used α": but(scale=lambda s: s.lora_alpha),
        "your update has no scale: multiply B·A·x by α/r (a test with α = r would not have noticed)": but(scale=lambda s: 1.0),
        "the scale is upside down: it is α/r, you used r/α": but(scale=lambda s: s.r / s.lora_alpha),
        "the scale is α/√r: that is rsLoRA; plain LoRA, asked for here, divides by r": but(scale=lambda s: s.lora_alpha / math.sqrt(s.r)),
        "the scale was cut to a whole number: α/r wants /, not //": but(scale=lambda s: s.lora_alpha // s.r),
        "the scale is there twice (in both factors, or in a factor and in the sum): the update is s·B·A with s = α/r, once": but(
            scale=lambda s: (s.lora_alpha / s.r) ** 2
        ),
        "lora_B starts random: the output jumps before the first step, so training starts from a damaged model; set lora_B to zero": but(
            start_B=lambda s, B: nn.init.normal_(B, std=0.5)
        ),
        "lora_A and lora_B are both zero: the gradient of each is a product with the other, so both stay zero for ever and this layer can "
        "never learn; draw lora_A at random": but(start_A=lambda s, A: nn.init.zeros_(A)),
        "lora_A is zero and lora_B random: that learns too, but here, as in PEFT, it is lora_A that is drawn at random and lora_B that is "
        "zero": but(start_A=lambda s, A: nn.init.zeros_(A), start_B=lambda s, B: nn.init.normal_(B, std=0.5)),
        "lora_A starts far too large: its entries are to be of the order of 1/√in_features (torch.randn alone gives 1, at 4,096 inputs 64 "
        "times too much); else the first steps are too long": but(start_A=lambda s, A: nn.init.normal_(A)),
        "lora_A starts too large: its entries are of the order of 1/√out_features or 1/√r; what A sums over are the inputs, so divide by "
        "√in_features": but(start_A=lambda s, A: nn.init.normal_(A, std=s.r**-0.5)),
        "all entries of lora_A start equal: its rows get equal gradients for ever, so your rank-r adapter has rank 1; draw them at "
        "random": but(start_A=lambda s, A: nn.init.ones_(A)),
        "the base layer still trains: call base.requires_grad_(False), else gradients and optimizer are those of full fine-tuning": but(
            frozen=lambda s: ()
        ),
        "the base's weight is frozen but its bias still trains: freeze all of the base": but(frozen=lambda s: [s.base.weight]),
        "lora_A does not train: both factors are parameters that require gradients": but(
            start_A=lambda s, A: LoRALinear.start_A(s, A.requires_grad_(False))
        ),
        "the bias is added twice: base(x) has added it already": but(
            forward=lambda s, x: LoRALinear.forward(s, x) + (0 if s.base.bias is None else s.base.bias)
        ),
        "the base's bias is lost: call base(x) instead of multiplying by its weight": but(
            forward=lambda s, x: F.linear(x, s.base.weight) + s.update(x)
        ),
        "your layer fails where the base has no bias, as most linear layers of today's language models: base.bias is None there; call "
        "base(x), which knows": but(forward=lambda s, x: F.linear(x, s.base.weight) + s.base.bias + s.update(x)),
        "the base path is missing: the layer gives base(x) plus the update, not the update alone": but(forward=lambda s, x: s.update(x)),
        "dropout acts on the update, after B: it belongs on the input of A, so that inputs are dropped, not outputs": but(
            update=lambda s, x: s.scale() * s.drop(s.path(x))
        ),
        "dropout acts between A and B: it belongs on the input of A": but(
            update=lambda s, x: s.scale() * F.linear(s.drop(F.linear(x, s.lora_A)), s.lora_B)
        ),
        "dropout acts on the base path too: the frozen layer must see the whole input; only the adapter's input is dropped": but(
            forward=lambda s, x: s.base(dropped := s.drop(x)) + s.scale() * s.path(dropped)
        ),
        "dropout acts on the base path too, with a draw of its own: the frozen layer must see the whole input; only the adapter's input is "
        "dropped": but(forward=lambda s, x: s.base(s.drop(x)) + s.update(x)),
        "dropout still acts in eval mode: it must depend on self.training (nn.Dropout does)": but(drop=lambda s, x: F.dropout(x, s.p)),
        "lora_dropout has no effect: drop the adapter's input in training mode": but(drop=lambda s, x: x),
        "what dropout keeps is not scaled up: divide by 1 − p in training, so that the mean stays (nn.Dropout does)": but(
            drop=lambda s, x: x * (torch.rand_like(x) > s.p) if s.training else x
        ),
        "what dropout keeps is divided by p: divide by 1 − p, so that the mean stays (nn.Dropout does)": but(
            drop=lambda s, x: x * (torch.rand_like(x) > s.p) / s.p if s.training and s.p else x
        ),
        "dropout changes the layer's input in place: the base, or the residual stream, still needs it; leave inplace=True out": but(
            drop=lambda s, x: F.dropout(x, s.p, s.training, inplace=s.p > 0)
        ),
        "whole rows are dropped, or kept: dropout decides for each number of the input on its own (nn.Dropout does)": but(
            drop=one_mask(lambda x: x[..., :1])
        ),
        "dropout draws once for all rows: it decides for each number of each row on its own; call it on x, not on a weight": but(
            drop=one_mask(lambda x: x.flatten(0, -2)[0])
        ),
        "dropout draws once for all samples of a batch: it decides for each number of each sample on its own; call it on x itself": but(
            drop=one_mask(lambda x: x[:1] if x.ndim == 3 else x)
        ),
        "dropout draws once for all positions of a sample: it decides for each number of each position on its own; call it on x "
        "itself": but(drop=one_mask(lambda x: x[:, :1] if x.ndim == 3 else x)),
        "the base was cast to float32: it stays as it was given, in its own dtype; only the factors may be float32": but(
            held=lambda s, base: base.float()
        ),
        "the factors are transposed: as in nn.Linear, lora_A is (r, in_features) and lora_B is (out_features, r)": but(
            factor=lambda s, rows, columns: LoRALinear.factor(s, columns, rows)
        ),
        "a base that is not float32 fails: make the factors in its dtype, or cast x to theirs and the result back": but(
            factor=lambda s, rows, columns: nn.Parameter(torch.empty(rows, columns))
        ),
        "the layer holds a copy of the base's weight: that doubles the memory; keep the base layer itself": but(
            held=lambda s, base: copy.deepcopy(base)
        ),
    },
)
