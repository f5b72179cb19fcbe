"""The checks of unit 02: a layer, merging, counting, injecting, convolutions, and a training run that does not learn.

Wrong answers are one right answer with one part replaced. Observations about random starts are sentences (does it learn, do the rows
differ), never values, so that two right answers may draw differently.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from course.checking import Check, raised
from course.checks.svd import nearest
from reference import lora
from reference.lora import LoRALinear, inject_lora

# ---------------------------------------------------------------------------------------------------------------- forward


class PlainLoRA(nn.Module):
    """A LoRA layer in pieces: y = base(x) + scale · B·A·dropout(x). Each wrong answer below replaces one piece."""

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.r, self.lora_alpha, self.p = base, r, lora_alpha, lora_dropout
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, r, **like))
        self.freeze()
        with torch.no_grad():
            self.start()

    def freeze(self) -> None:
        self.base.requires_grad_(False)

    def start(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def scale(self) -> float:
        return self.lora_alpha / self.r

    def path(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A), self.lora_B)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale() * self.path(self.drop(x))


def variant(base: type, **replaced) -> type:
    """``base`` with methods replaced: a wrong answer."""
    return type("Answer", (base,), replaced)


def start_with(fill_a, fill_b):
    """Other first values; each argument fills one tensor in place."""

    def start(layer: PlainLoRA) -> None:
        fill_a(layer.lora_A)
        fill_b(layer.lora_B)

    return variant(PlainLoRA, start=start)


def kaiming(factor: Tensor) -> None:
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def large(factor: Tensor) -> None:
    nn.init.normal_(factor, std=0.5)


BothZero = start_with(nn.init.zeros_, nn.init.zeros_)


def freeze_a_too(layer: PlainLoRA) -> None:
    layer.base.requires_grad_(False)
    layer.lora_A.requires_grad_(False)


def add_bias_again(layer: PlainLoRA, x: Tensor) -> Tensor:
    y = PlainLoRA.forward(layer, x)
    return y if layer.base.bias is None else y + layer.base.bias


def drop_base_too(layer: PlainLoRA, x: Tensor) -> Tensor:
    x = layer.drop(x)
    return layer.base(x) + layer.scale() * layer.path(x)


class ATransposed(PlainLoRA):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.lora_A, self.lora_B = nn.Parameter(self.lora_A.data.T.clone()), nn.Parameter(self.lora_B.data.T.clone())


class AlwaysFloat32(PlainLoRA):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.lora_A, self.lora_B = nn.Parameter(self.lora_A.data.float()), nn.Parameter(self.lora_B.data.float())


class CastBase(PlainLoRA):
    def __init__(self, base: nn.Linear, *arguments) -> None:
        super().__init__(base.float(), *arguments)


class CopiedBase(PlainLoRA):
    def __init__(self, base: nn.Linear, *arguments) -> None:
        super().__init__(copy.deepcopy(base), *arguments)


def learns(layer: nn.Module, base: nn.Linear, g: torch.Generator, steps: int = 60, lr: float = 0.2) -> bool:
    """Does gradient descent on what the layer says is trainable more than halve the error to a target that a rank-1 update reaches?"""
    x = torch.randn(64, base.in_features, generator=g)
    shift = torch.randn(base.out_features, 1, generator=g) @ torch.randn(1, base.in_features, generator=g)
    with torch.no_grad():
        target = F.linear(x, base.weight + shift / shift.norm(), base.bias)
    trained = [p for p in layer.parameters() if p.requires_grad]
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(layer(x), target)
        losses.append(loss.item())
        if not trained or not loss.requires_grad:
            return False
        for p, gradient in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            p.data.add_(0 if gradient is None else gradient, alpha=-lr)
    return losses[-1] < 0.5 * losses[0]


ONE_DRAW = "all rows the same, and other at each call"


def shares_of_update(layer: nn.Module, base: nn.Linear, x: Tensor, update: Tensor) -> str:
    """Equal rows with one non-zero input: what multiples of the update they got; where it is none, how many different updates there are."""

    def got(x: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(x.clone()) - base(x)  # (rows, out)

    rest = got(x)
    if kinds(rest) == 1 and any(kinds(torch.cat([rest[:1], got(x[:1])])) == 2 for _ in range(50)):
        return ONE_DRAW
    share = (rest @ update) / (update @ update)  # (rows,)
    if torch.allclose(rest, share[:, None] * update, atol=1e-4):
        return " or ".join(f"{value:g}" for value in sorted({round(value, 2) + 0.0 for value in share.tolist()}))
    found = kinds(rest)
    words = "one update, for all rows" if found == 1 else "two different updates" if found == 2 else "three to eight different updates"
    return f"no multiple of it ({words if found <= 8 else 'more than eight different updates'})"


def kinds(rows: Tensor) -> int:
    """How many different rows there are."""
    count = 0
    while len(rows):
        rows, count = rows[(rows - rows[0]).abs().amax(1) > 1e-4], count + 1
    return count


def order_of_start(layer: nn.Module) -> str:
    """lora_A's entries beside 1/√in_features. Uniform or normal, by torch's rule, Xavier's or PEFT's 1/r: all are of that order."""
    spread = layer.lora_A.detach().float().std().item() * math.sqrt(layer.lora_A.shape[1])
    return "far smaller" if spread < 0.1 else "far larger" if spread > 16 else "larger" if spread > 4 else "of that order"


def drawn_alike(updates: Tensor) -> str:
    """Of (samples, positions, out) updates of inputs that are all the same: along which axis they are the same too."""
    axes = {"samples": updates[:1], "positions": updates[:, :1]}
    alike = [name for name, first in axes.items() if torch.allclose(updates, first.expand_as(updates), atol=1e-4)]
    return " and ".join(alike) or "neither"


def observe_forward(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    r, alpha, in_features, out_features = 3, 7, 6, 5  # α/r = 2.33: differs from α, 1, r/α, α/√r and α//r
    dropout = 0.25  # of 0.5 nobody can tell p from 1 − p

    def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
        return nn.Linear(in_features, out_features, bias=bias).to(dtype)

    base = linear()
    kept, x = base.weight.detach().clone(), torch.randn(2, 4, in_features, generator=g)
    layer = answer(base, r, alpha)
    seen = {
        "layer.lora_A is a": type(getattr(layer, "lora_A", None)).__name__,
        "layer.lora_B is a": type(getattr(layer, "lora_B", None)).__name__,
        "the shape of lora_A": tuple(getattr(getattr(layer, "lora_A", None), "shape", ())),
        "the shape of lora_B": tuple(getattr(getattr(layer, "lora_B", None), "shape", ())),
    }
    if seen["the shape of lora_A"] != (r, in_features) or seen["the shape of lora_B"] != (out_features, r):
        return seen
    parameters = dict(layer.named_parameters())
    held = [*layer.parameters(), *layer.buffers()]
    a, b = layer.lora_A, layer.lora_B
    start = order_of_start(answer(nn.Linear(1024, 16), 16, alpha))
    seen |= {
        "lora_A trains": any(p is a and p.requires_grad for p in parameters.values()),
        "lora_B trains": any(p is b and p.requires_grad for p in parameters.values()),
        "numbers that train besides lora_A and lora_B": sum(
            p.numel() for p in parameters.values() if p.requires_grad and p is not a and p is not b
        ),
        "the layer holds the base's own weight": any(p.data_ptr() == base.weight.data_ptr() for p in held),
        "before training lora_B is all zero": not bool(b.any()),
        "before training lora_A is all zero": not bool(a.any()),
        "before training the output is the base's own": torch.allclose(layer(x), base(x), atol=1e-6),
        "the rank of lora_A before training": int(torch.linalg.matrix_rank(a.detach().float())) if a.any() else 0,
        "two layers start alike": torch.equal(a, answer(linear(), r, alpha).lora_A),
        "before training lora_A's entries beside 1/√in_features, for 1,024 inputs, 16 outputs and rank 16": start,
    }
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=g))
        b.copy_(torch.randn(b.shape, generator=g))
    x.requires_grad_(True)
    y = layer(x)
    seen["the output with non-zero factors"] = y
    if not y.requires_grad:
        return seen
    weights = torch.randn(y.shape, generator=g)
    named = {name: p for name, p in {"the input": x, "lora_A": a, "lora_B": b}.items() if p.requires_grad}
    gradients = torch.autograd.grad((y * weights).sum(), list(named.values()), allow_unused=True)
    for (name, p), gradient in zip(named.items(), gradients, strict=True):
        seen[f"the gradient of {name}"] = torch.zeros_like(p) if gradient is None else gradient
    seen["the base weight after all this"] = base.weight.detach().clone()
    seen["the base weight is untouched"] = torch.equal(base.weight, kept)

    for dtype, share in ((torch.bfloat16, 2**-6), (torch.float64, 2**-20)):  # a base in another dtype, and one without a bias
        base, label = linear(dtype, bias=False), f"with a {dtype} base the output is"
        x = torch.randn(2, in_features, generator=g).to(dtype)
        try:
            layer = answer(base, r, alpha)
            seen[f"a {dtype} base is afterwards"] = str(base.weight.dtype)
            if base.weight.dtype != dtype:
                continue
            with torch.no_grad():  # numbers that bfloat16 and float32 factors both hold exactly
                layer.lora_A.copy_(torch.randn(a.shape, generator=g).bfloat16())
                layer.lora_B.copy_(torch.randn(b.shape, generator=g).bfloat16())
                y = layer(x)
        except (RuntimeError, TypeError) as error:
            seen[label] = f"a {type(error).__name__}"
            continue
        seen[label] = str(y.dtype)
        wide = [each.detach().double() for each in (y, x, base.weight, layer.lora_A, layer.lora_B)]
        error = (wide[0] - _output(*wide[1:], alpha / r)).abs()
        size = _output(*(each.abs() for each in wide[1:]), alpha / r)  # of the products: sums may cancel
        seen[f"{label} right to within rounding"] = bool((error <= share * size).all())

    base = linear()
    layer = answer(base, r, alpha, dropout)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(a.shape, generator=g))
        layer.lora_B.copy_(torch.randn(b.shape, generator=g).abs() + 0.5)
    one_input = torch.zeros(256, in_features)
    one_input[:, 2] = 1.0
    two_inputs = one_input.clone()
    two_inputs[:, 4] = 1.0
    update = (alpha / r) * (layer.lora_B @ layer.lora_A)[:, 2].detach()
    layer.eval()
    rows = "in rows with one input that is not zero, the update is the right one times"
    seen[f"in eval mode, with dropout {dropout}, {rows}"] = shares_of_update(layer, base, one_input, update)
    layer.train()
    training = f"in training, with dropout {dropout}"
    seen[f"{training}, {rows}"] = found = shares_of_update(layer, base, one_input, update)
    if found == ONE_DRAW:
        return seen  # what more is seen depends on the draw
    with torch.no_grad():
        layer(given := one_input.clone())
        seen[f"{training}, the layer's input is afterwards"] = "as it was" if torch.equal(given, one_input) else "changed"
        seen[f"{training}, most rows get an update"] = bool((layer(one_input.clone()) - base(one_input)).any(1).float().mean() > 0.5)
        seen[f"{training} and two inputs that are not zero, kinds of updates"] = min(kinds(layer(two_inputs.clone()) - base(two_inputs)), 9)
        many = torch.ones(12, 15, in_features)
        seen[f"{training}, what is the same for all in a batch of (12 samples, 15 positions)"] = drawn_alike(layer(many) - base(many))

    base = linear()
    learned = learns(answer(base, r, alpha), base, g) if start == "of that order" else f"not tried: lora_A starts {start}"
    seen["it learns: 60 steps of gradient descent halve the error"] = learned
    return seen


def _output(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    return x @ weight.T + scale * (x @ lora_a.T @ lora_b.T)


forward = Check(
    task="a LoRA layer: right shapes, right scale, frozen base, dropout in its place, and it learns",
    observe=observe_forward,
    reference=PlainLoRA,
    second=LoRALinear,
    misconceptions={
        "your update is the right one times r: the scale is α/r, you used α": variant(PlainLoRA, scale=lambda s: s.lora_alpha),
        "your update has no scale: multiply B·A·x by α/r (a test with α = r would not have noticed)": variant(
            PlainLoRA, scale=lambda s: 1.0
        ),
        "the scale is upside down: it is α/r, you used r/α": variant(PlainLoRA, scale=lambda s: s.r / s.lora_alpha),
        "the scale is α/√r: that is rsLoRA; plain LoRA, asked for here, divides by r": variant(
            PlainLoRA, scale=lambda s: s.lora_alpha / math.sqrt(s.r)
        ),
        "the scale was cut to a whole number: α/r wants /, not //": variant(PlainLoRA, scale=lambda s: s.lora_alpha // s.r),
        "the scale is there twice (in both factors, or in a factor and in the sum): the update is s·B·A with s = α/r, once": variant(
            PlainLoRA, scale=lambda s: (s.lora_alpha / s.r) ** 2
        ),
        "lora_B starts random: the output jumps before the first step, so training starts from a damaged model; set lora_B to "
        "zero": start_with(kaiming, large),
        "lora_A and lora_B are both zero: the gradient of each is a product with the other, so both stay zero for ever and this layer can "
        "never learn; draw lora_A at random": BothZero,
        "lora_A is zero and lora_B random: that learns too, but here, as in PEFT, it is lora_A that is drawn at random and lora_B that is "
        "zero": start_with(nn.init.zeros_, large),
        "lora_A starts far too large: its entries are to be of the order of 1/√in_features (torch.randn alone gives 1, at 4,096 inputs 64 "
        "times too much); else the first steps are too long": start_with(nn.init.normal_, nn.init.zeros_),
        "lora_A starts too large: its entries are of the order of 1/√out_features or 1/√r; what A sums over are the inputs, so divide by "
        "√in_features": start_with(lambda factor: nn.init.normal_(factor, std=factor.shape[0] ** -0.5), nn.init.zeros_),
        "all entries of lora_A start equal: its rows get equal gradients for ever, so your rank-r adapter has rank 1; draw them at "
        "random": start_with(nn.init.ones_, nn.init.zeros_),
        "the base layer still trains: call base.requires_grad_(False), else gradients and optimizer are those of full fine-tuning": variant(
            PlainLoRA, freeze=lambda s: None
        ),
        "the base's weight is frozen but its bias still trains: freeze all of the base": variant(
            PlainLoRA, freeze=lambda s: s.base.weight.requires_grad_(False)
        ),
        "lora_A does not train: both factors are parameters that require gradients": variant(PlainLoRA, freeze=freeze_a_too),
        "the bias is added twice: base(x) has added it already": variant(PlainLoRA, forward=add_bias_again),
        "the base's bias is lost: call base(x) instead of multiplying by its weight": variant(
            PlainLoRA, forward=lambda s, x: F.linear(x, s.base.weight) + s.scale() * s.path(s.drop(x))
        ),
        "the base path is missing: the layer gives base(x) plus the update, not the update alone": variant(
            PlainLoRA, forward=lambda s, x: s.scale() * s.path(s.drop(x))
        ),
        "dropout acts on the update, after B: it belongs on the input of A, so that inputs are dropped, not outputs": variant(
            PlainLoRA, forward=lambda s, x: s.base(x) + s.scale() * s.drop(s.path(x))
        ),
        "dropout acts between A and B: it belongs on the input of A": variant(
            PlainLoRA, forward=lambda s, x: s.base(x) + s.scale() * F.linear(s.drop(F.linear(x, s.lora_A)), s.lora_B)
        ),
        "dropout acts on the base path too: the frozen layer must see the whole input; only the adapter's input is dropped": variant(
            PlainLoRA, forward=drop_base_too
        ),
        "dropout still acts in eval mode: it must depend on self.training (nn.Dropout does)": variant(
            PlainLoRA, drop=lambda s, x: F.dropout(x, s.p, True)
        ),
        "lora_dropout has no effect: drop the adapter's input in training mode": variant(PlainLoRA, drop=lambda s, x: x),
        "what dropout keeps is not scaled up: divide by 1 − p in training, so that the mean stays (nn.Dropout does)": variant(
            PlainLoRA, drop=lambda s, x: x * (torch.rand_like(x) > s.p) if s.training else x
        ),
        "what dropout keeps is divided by p: divide by 1 − p, so that the mean stays (nn.Dropout does)": variant(
            PlainLoRA, drop=lambda s, x: x * (torch.rand_like(x) > s.p) / s.p if s.training and s.p else x
        ),
        "dropout changes the layer's input in place: the base, or the residual stream, still needs it; leave inplace=True out": variant(
            PlainLoRA, drop=lambda s, x: F.dropout(x, s.p, s.training, inplace=s.p > 0)
        ),
        "whole rows are dropped, or kept: dropout decides for each number of the input on its own (nn.Dropout does)": variant(
            PlainLoRA, drop=lambda s, x: x * (torch.rand(*x.shape[:-1], 1) > s.p) / (1 - s.p) if s.training else x
        ),
        "dropout draws once for all rows: it decides for each number of each row on its own; call it on x, not on a weight": variant(
            PlainLoRA, drop=lambda s, x: x * F.dropout(torch.ones(x.shape[-1], dtype=x.dtype), s.p, s.training)
        ),
        "dropout draws once for all samples of a batch: it decides for each number of each sample on its own; call it on x itself": variant(
            PlainLoRA, drop=lambda s, x: x * F.dropout(torch.ones_like(x[:1] if x.ndim == 3 else x), s.p, s.training)
        ),
        "dropout draws once for all positions of a sample: it decides for each number of each position on its own; call it on x "
        "itself": variant(PlainLoRA, drop=lambda s, x: x * F.dropout(torch.ones_like(x[:, :1] if x.ndim == 3 else x), s.p, s.training)),
        "the base was cast to float32: it stays as it was given, in its own dtype; only the factors may be float32": CastBase,
        "the factors are transposed: as in nn.Linear, lora_A is (r, in_features) and lora_B is (out_features, r)": ATransposed,
        "a base that is not float32 fails: make the factors in its dtype, or cast x to theirs and the result back": AlwaysFloat32,
        "the layer holds a copy of the base's weight: that doubles the memory; keep the base layer itself": CopiedBase,
    },
)

# ------------------------------------------------------------------------------------------------------------------ merge


class Mergeable(PlainLoRA):
    """The worked answer: one rounding, in the weight's dtype, and the very same bits back."""

    merged = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else super().forward(x)

    def delta(self) -> Tensor:
        return self.scale() * (self.lora_B.detach().float() @ self.lora_A.detach().float())  # (out, in)

    def put(self) -> None:
        weight = self.base.weight
        self.original = weight.detach().clone()
        weight.data.copy_(weight.float() + self.delta())  # copy_ rounds to the weight's dtype, once

    def take_back(self) -> None:
        self.base.weight.data.copy_(self.original)
        self.original = None

    def merge(self) -> None:
        if self.merged:
            raise ValueError("already merged: unmerge() first, else the update is added twice")
        self.put()
        self.merged = True

    def unmerge(self) -> None:
        if not self.merged:
            raise ValueError("not merged: there is nothing to take out")
        self.take_back()
        self.merged = False


class MergedOtherwise(nn.Module):
    """A second right answer: the base layer's weight is swapped for a new parameter, computed in float64."""

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.base, self.scaling, self._kept = base.requires_grad_(False), lora_alpha / r, []
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features, dtype=base.weight.dtype) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=base.weight.dtype))

    @property
    def merged(self) -> bool:
        return bool(self._kept)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.base(x) + x @ self.lora_A.T @ self.lora_B.T * self.scaling

    def merge(self) -> None:
        if self.merged:
            raise ValueError("already merged")
        self._kept.append(self.base.weight)
        exact = self.base.weight.double() + self.scaling * torch.einsum("or,ri->oi", self.lora_B.double(), self.lora_A.double())
        self.base.weight = nn.Parameter(exact.detach().to(self._kept[0].dtype), requires_grad=False)

    def unmerge(self) -> None:
        if not self.merged:
            raise ValueError("not merged")
        self.base.weight = self._kept.pop()


def replace_by_update(layer: Mergeable) -> None:
    layer.original = layer.base.weight.detach().clone()
    layer.base.weight.data.copy_(layer.delta())


def round_twice(layer: Mergeable) -> None:
    layer.original = layer.base.weight.detach().clone()
    layer.base.weight.data.add_(layer.scale() * (layer.lora_B.detach() @ layer.lora_A.detach()))


def subtract(layer: Mergeable, factor: float = 1.0) -> None:
    layer.base.weight.data.copy_(layer.base.weight.float() - factor * layer.delta())


def merge_again(layer: Mergeable) -> None:
    layer.original = layer.original if layer.merged else layer.base.weight.detach().clone()
    subtract(layer, -1)
    layer.merged = True


def refuse_too_late(layer: Mergeable) -> None:
    if layer.merged:
        subtract(layer, -1)
    Mergeable.merge(layer)


def merge_without_flag(layer: Mergeable) -> None:
    Mergeable.merge(layer)
    layer.merged = False


def unmerge_and_keep_flag(layer: Mergeable) -> None:
    Mergeable.unmerge(layer)
    layer.merged = True


def unmerge_unchecked(layer: Mergeable) -> None:
    layer.take_back() if layer.merged else subtract(layer)
    layer.merged = False


def remembered_delta(layer: Mergeable) -> Tensor:
    if not hasattr(layer, "remembered"):
        layer.remembered = Mergeable.delta(layer)
    return layer.remembered


def back_as_parameter(layer: Mergeable) -> None:
    layer.base.weight, layer.original = nn.Parameter(layer.original), None


def put_without_copy(layer: Mergeable) -> None:
    layer.original = layer.base.weight.data
    layer.base.weight.data.copy_(layer.base.weight.float() + layer.delta())


def put_first_backup(layer: Mergeable) -> None:
    first = getattr(layer, "first", None)
    Mergeable.put(layer)
    layer.first = layer.original = layer.original if first is None else first


def merge_and_wipe(layer: Mergeable) -> None:
    Mergeable.merge(layer)
    layer.lora_B.data.zero_()


def observe_merge(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    r, alpha, n = 3, 7, 12  # square, so that a transposed update has the right shape too
    base = nn.Linear(n, n)
    layer = answer(base, r, alpha)

    def fill(layer: nn.Module) -> None:
        with torch.no_grad():
            layer.lora_A.copy_(torch.randn(r, n, generator=g) / 4)
            layer.lora_B.copy_(torch.randn(n, r, generator=g) / 4)

    def weight(layer: nn.Module) -> Tensor:
        return layer.base.weight.detach().clone()

    fill(layer)
    x, kept, factors = torch.randn(4, n, generator=g), weight(layer), layer.lora_B.detach().clone()
    seen = {"the output before merging": layer(x)}
    layer.merge()
    seen |= {
        "the base weight after merge()": weight(layer),
        "layer.merged after merge()": layer.merged,
        "the output after merge()": layer(x),
    }
    seen["a second merge()"] = raised(layer.merge)
    seen |= {"the base weight after the second merge()": weight(layer), "the output after the second merge()": layer(x)}
    seen["lora_B after merge()"] = layer.lora_B.detach().clone()
    seen["what trains while merged, besides lora_A and lora_B"] = trainable(layer, besides=("lora_A", "lora_B"))
    error = raised(layer.unmerge)
    seen |= {
        "unmerge() of a merged layer": error,
        "the base weight after unmerge()": weight(layer),
        "layer.merged after unmerge()": layer.merged,
    }
    seen |= {
        "the output after unmerge()": layer(x),
        "a second unmerge()": raised(layer.unmerge),
        "the base weight after that": weight(layer),
    }
    seen["lora_B after unmerge()"] = torch.equal(layer.lora_B, factors)
    seen["what trains after unmerge()"] = trainable(layer)
    layer.lora_B.data.mul_(1.5)  # trained on
    seen["merging again after unmerge() and more training"] = raised(layer.merge)
    seen["the base weight after merging again"] = weight(layer)
    seen["float32 gives exactly the old weight back"] = raised(layer.unmerge) is None and torch.equal(weight(layer), kept)
    layer.base.weight.data.add_(0.5)  # another checkpoint
    kept = weight(layer)
    seen["merging into other base weights"] = raised(layer.merge)
    seen["other base weights after merging"] = weight(layer)
    seen["other base weights come back exactly"] = raised(layer.unmerge) is None and torch.equal(weight(layer), kept)

    n = 48
    layer = answer(nn.Linear(n, n).to(torch.bfloat16), r, alpha)
    fill(layer)
    old = weight(layer)
    exact = old.double() + (alpha / r) * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
    layer.merge()
    seen["the bfloat16 weight's dtype after merge()"] = str(weight(layer).dtype)
    seen["merged in bfloat16: every weight is the bfloat16 number nearest to W + s·B·A"] = nearest(weight(layer), exact)
    if layer.merged:
        layer.unmerge()
    seen["unmerged in bfloat16: every weight is exactly what it was"] = torch.equal(weight(layer), old)
    return seen


merge = Check(
    task="merge and unmerge: scaled, rounded once, never twice, and exactly undone",
    observe=observe_merge,
    reference=Mergeable,
    second=MergedOtherwise,
    misconceptions={
        "merged without the scale: the update is (α/r)·B·A": variant(Mergeable, delta=lambda s: Mergeable.delta(s) / s.scale()),
        "the merged update is transposed: a weight is (out, in), so the update is lora_B @ lora_A": variant(
            Mergeable, delta=lambda s: Mergeable.delta(s).T
        ),
        "merging replaced the weight by the update: add it to the weight": variant(Mergeable, put=replace_by_update),
        "a second merge() added the update again: raise a ValueError when the layer is already merged": variant(
            Mergeable, merge=merge_again
        ),
        "a second merge() was silently ignored: raise a ValueError, since a caller who merges twice has lost count": variant(
            Mergeable, merge=lambda s: None if s.merged else Mergeable.merge(s)
        ),
        "a second merge() changed the weight before it was refused: check first, then change": variant(Mergeable, merge=refuse_too_late),
        "merge() does not set the flag: the layer goes on adding the update to a weight that holds it already": variant(
            Mergeable, merge=merge_without_flag, unmerge=Mergeable.take_back
        ),
        "the merged layer still adds the adapter's output: forward must give base(x) alone while merged": variant(
            Mergeable, forward=PlainLoRA.forward
        ),
        "unmerge() forgets to clear the flag: the layer has lost its update": variant(Mergeable, unmerge=unmerge_and_keep_flag),
        "unmerge() of a layer that is not merged took the update out anyway: raise a ValueError": variant(
            Mergeable, unmerge=unmerge_unchecked
        ),
        "unmerge() of a layer that is not merged was silently ignored: raise a ValueError": variant(
            Mergeable, unmerge=lambda s: Mergeable.unmerge(s) if s.merged else None
        ),
        "unmerge() takes out the update without its scale: the weight does not come back": variant(
            Mergeable, take_back=lambda s: subtract(s, 1 / s.scale())
        ),
        "unmerge() adds the update once more instead of taking it out": variant(Mergeable, take_back=lambda s: subtract(s, -1)),
        "unmerge() subtracts the update: rounding does not cancel (bfloat16 keeps 8 bits), so the old weight does not come back; keep it "
        "aside in merge()": variant(Mergeable, take_back=subtract),
        "merged in 16 bits: s·B·A was rounded to bfloat16 before it was added, and the sum once more; add in float32, round once": variant(
            Mergeable, put=round_twice
        ),
        "the update is computed once and kept: after more training merge() must use the factors as they are then": variant(
            Mergeable, delta=remembered_delta
        ),
        "unmerge() put the old weight back as a new nn.Parameter, which trains: give it requires_grad=False, or copy_ into the old "
        "one": variant(Mergeable, take_back=back_as_parameter),
        "the weight kept aside is no copy: it changed with the merge, so nothing is left to put back; keep a clone()": variant(
            Mergeable, put=put_without_copy
        ),
        "the weight kept aside is that of the first merge(): the base may have changed since; keep it anew in every merge()": variant(
            Mergeable, put=put_first_backup
        ),
        "merge() wiped lora_B: the factors must stay, else nothing can be unmerged or saved": variant(Mergeable, merge=merge_and_wipe),
    },
)

# -------------------------------------------------------------------------------------------------------- parameter_count


def suffix_match(name: str, targets) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def counted(match=suffix_match, each=lambda out, inn, r: r * (out + inn), layers=lambda found: found):
    """A counting function with one part replaced."""

    def count(shapes: dict[str, tuple[int, int]], r: int, targets: list[str]) -> int:
        return sum(each(*shapes[name], r) for name in layers([name for name in shapes if match(name, targets)]))

    return count


def count_by_building(shapes: dict[str, tuple[int, int]], r: int, targets: list[str]) -> int:
    total = 0
    for name, (out_features, in_features) in shapes.items():
        words = name.split(".")
        if any(words[-len(target.split(".")) :] == target.split(".") for target in targets):
            total += torch.empty(r, in_features, device="meta").numel() + torch.empty(out_features, r, device="meta").numel()
    return total


def observe_parameter_count(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    hidden, layers = 32 * draw(3, 9), draw(2, 5)
    kv, wide = hidden // 4, hidden * 3 + draw(1, 30)
    one = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "self_attn.xq_proj": (2 * hidden, kv), "self_attn.q_proj_gate": (kv, kv),
        "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide), "adapter.up_proj": (kv, wide),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()} | {"lm_head": (977, hidden)}
    cases = (
        ["q_proj", "v_proj"],
        ["down_proj"],
        ["mlp.up_proj"],
        ["model.layers.1.self_attn.k_proj"],
        ["lm_head", "o_proj"],
        ["self_attn"],
        ["q_proj", "self_attn.q_proj"],  # two names of one layer
    )
    ranks = [draw(2, 40) for _ in cases]
    return {f"r = {r}, targets {targets}": answer(dict(shapes), r, list(targets)) for r, targets in zip(ranks, cases, strict=True)}


parameter_count = Check(
    task="counting LoRA's parameters, in any shapes and for any targets",
    observe=observe_parameter_count,
    reference=counted(),
    second=count_by_building,
    misconceptions={
        "r·in·out is not low rank at all: A has r·in numbers and B has out·r, so r·(in + out)": counted(
            each=lambda out, inn, r: r * inn * out
        ),
        "only A was counted: B has out·r numbers too": counted(each=lambda out, inn, r: r * inn),
        "only B was counted: A has r·in numbers too": counted(each=lambda out, inn, r: r * out),
        "2·r·in takes every matrix for a square one: k_proj and v_proj are narrower under grouped queries, MLPs wider; use "
        "r·(in + out)": counted(each=lambda out, inn, r: 2 * r * inn),
        "2·r·out takes every matrix for a square one: use r·(in + out)": counted(each=lambda out, inn, r: 2 * r * out),
        "the rank is missing: each of A and B is r times as large": counted(each=lambda out, inn, r: inn + out),
        "biases were counted: LoRA adds two factors and no bias": counted(each=lambda out, inn, r: r * (inn + out) + out),
        "the frozen weights were counted: only A and B train": counted(each=lambda out, inn, r: inn * out),
        "frozen and trained were added: only A and B train": counted(each=lambda out, inn, r: inn * out + r * (inn + out)),
        "names were matched anywhere: 'q_proj' is inside 'xq_proj' too; a target is the full name or what follows a dot": counted(
            match=lambda name, targets: any(target in name for target in targets)
        ),
        "names were matched by their last letters: 'xq_proj' ends with 'q_proj' too; compare after a dot": counted(
            match=lambda name, targets: name.endswith(tuple(targets))
        ),
        "only the last word of a name was compared: a target may hold dots, such as 'mlp.up_proj', or be a full name": counted(
            match=lambda name, targets: name.split(".")[-1] in targets
        ),
        "a full name has no dot before it: the target 'lm_head' names the layer lm_head": counted(
            match=lambda name, targets: any(name.endswith("." + target) for target in targets)
        ),
        "a target was looked for among all words of a name: 'self_attn' is a block, not a linear layer; compare with the end "
        "of the name": counted(match=lambda name, targets: suffix_match(name, targets) or any(t in name.split(".") for t in targets)),
        "only the last words were compared: the targets 'mlp.up_proj' and 'adapter.up_proj' differ": counted(
            match=lambda name, targets: name.split(".")[-1] in {target.split(".")[-1] for target in targets}
        ),
        "only one layer was counted: a target matches in every layer of the model": counted(layers=lambda found: found[:1]),
        "the targets were ignored: count the layers whose names match": counted(match=lambda name, targets: True),
    },
)

# ----------------------------------------------------------------------------------------------------------------- inject


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.xq_proj, self.v_proj, self.v_proj_gate = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(x) * torch.tanh(self.q_proj(x) + self.xq_proj(x)) * self.v_proj_gate(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn, self.cross = nn.LayerNorm(width), Attention(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.attn(x) + self.cross(x) + self.mlp(x)


class ToyModel(nn.Module):
    """What a decoder looks like to somebody who walks over its modules: an embedding, blocks, a head."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.xlm_head, self.lm_head_gate = nn.Linear(width, width), nn.Linear(width, width)  # not the head, whatever they are called
        self.lm_head = nn.Linear(width, 9, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.xlm_head(x) * torch.tanh(self.lm_head_gate(x)))


def wrapped(model: nn.Module) -> str:
    """The paths of modules that hold LoRA's factors."""
    return ", ".join(sorted(name for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "lora_B")))


def trainable(model: nn.Module, besides: tuple[str, ...] = ()) -> str:
    return ", ".join(sorted(name for name, p in model.named_parameters() if p.requires_grad and name not in besides))


def injector(
    match=suffix_match, head=lambda name: name == "lm_head", freeze="before", nothing="refuse", walk=None, names="wrapped", once=True
):
    """An injecting function with one part replaced."""

    def inject(model: nn.Module, targets, r: int, lora_alpha: float) -> list[str]:
        linears = [name for name, module in (walk or nn.Module.named_modules)(model) if isinstance(module, nn.Linear)]
        chosen = [name for name in linears if (not head(name) if targets == "all-linear" else match(name, targets))]
        by_target = chosen if targets == "all-linear" else [name for target in targets for name in linears if match(name, [target])]
        chosen = chosen if once else by_target
        if freeze == "first":
            model.requires_grad_(False)
        if not chosen and nothing == "refuse":
            raise ValueError(f"no linear layer is called {targets}")
        if freeze == "before":
            model.requires_grad_(False)
        for name in chosen:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoRALinear(model.get_submodule(name), r, lora_alpha))
        if freeze == "after":
            model.requires_grad_(False)
        return {"wrapped": chosen, "none": None, "last": [name.split(".")[-1] for name in chosen], "by target": by_target}[names]

    return inject


def wrap_without_setting(model: nn.Module, targets, r: int, lora_alpha: float) -> list[str]:
    chosen = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and (n != "lm_head" if targets == "all-linear" else suffix_match(n, targets))
    ]
    if not chosen:
        raise ValueError("nothing to wrap")
    model.requires_grad_(False)
    for name in chosen:
        LoRALinear(model.get_submodule(name), r, lora_alpha)
    return chosen


def freeze_wrapped_only(model: nn.Module, targets, r: int, lora_alpha: float) -> list[str]:
    return injector(freeze="never")(model, targets, r, lora_alpha)  # LoRALinear freezes its own base, and nothing else


def observe_inject(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (2, 5), generator=g)
    r, lora_alpha = (int(torch.randint(*ends, (), generator=g)) for ends in ((2, 5), (5, 9)))
    seen = {}
    cases = (["q_proj", "v_proj"], ["attn.q_proj"], ["layers.1.cross.v_proj"], ["lm_head"], ["q_proj", "attn.q_proj"], "all-linear")
    for targets in cases:
        torch.manual_seed(seed)  # the same model, however much randomness the answer took before
        model = ToyModel()
        before = model(ids).detach()
        try:
            names = answer(model, targets, r, lora_alpha)
        except ValueError:
            seen[f"targets {targets}"] = "refused with a ValueError"
            continue
        seen[f"targets {targets}"] = "accepted"
        seen[f"targets {targets}: layers that are wrapped"] = wrapped(model)
        seen[f"targets {targets}: what trains"] = trainable(model)
        seen[f"targets {targets}: the model's output before training"] = model(ids).detach() - before
        seen[f"targets {targets}: names returned"] = sorted(names) if isinstance(names, (list, tuple, set)) else names
        factors = {name: p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
        seen[f"targets {targets}: ranks"] = sorted({p.shape[0] for name, p in factors.items() if name.endswith("A")})
        seen[f"targets {targets}: lora_A is random"] = all(p.any().item() for name, p in factors.items() if name.endswith("A"))
        with torch.no_grad():
            for factor in factors.values():
                factor.fill_(0.1)
            seen[f"targets {targets}: the update of the output when all factors are 0.1"] = model(ids) - before
    for targets in (["no_such_layer"], ["attn"]):  # the second is a block, not a linear layer
        model = ToyModel()
        before = trainable(model)
        seen[f"targets {targets}"] = raised(answer, model, targets, r, lora_alpha)
        seen["what trains after that error"] = "as before" if trainable(model) == before else "changed"
    return seen


inject = Check(
    task="injecting LoRA into a model by name: only the targets wrapped, only the adapters training",
    observe=observe_inject,
    reference=injector(),
    second=lambda model, targets, r, lora_alpha: inject_lora(model, r, lora_alpha, target_modules=targets),
    misconceptions={
        "names were matched anywhere: 'q_proj' is inside 'xq_proj' too; a target is the full name or what follows a dot": injector(
            match=lambda name, targets: any(target in name for target in targets)
        ),
        "names were matched by their last letters: 'xq_proj' ends with 'q_proj' too; compare after a dot": injector(
            match=lambda name, targets: name.endswith(tuple(targets))
        ),
        "only the last word of a name was compared: 'attn.q_proj' and full names are targets too": injector(
            match=lambda name, targets: name.split(".")[-1] in targets
        ),
        "only full names match: 'q_proj' stands for every layer whose name ends in '.q_proj'": injector(
            match=lambda name, targets: name in targets
        ),
        "full names do not match: a target may be one, such as 'layers.1.cross.v_proj', with no dot before it": injector(
            match=lambda name, targets: any(name.endswith("." + target) for target in targets)
        ),
        "'all-linear' wrapped the output head: it means every linear except lm_head": injector(head=lambda name: False),
        "'all-linear' left out every layer with 'lm_head' anywhere in its name: it leaves out lm_head alone": injector(
            head=lambda name: "lm_head" in name
        ),
        "'all-linear' left out every layer whose name ends with 'lm_head', such as xlm_head: it leaves out lm_head alone": injector(
            head=lambda name: name.endswith("lm_head")
        ),
        "a layer that two targets name is wrapped twice: ask of each layer whether any target names it": injector(once=False),
        "a layer that two targets name is returned twice: it is one layer": injector(names="by target"),
        "lm_head is skipped even when it is named: only 'all-linear' leaves it out": injector(
            match=lambda name, targets: name != "lm_head" and suffix_match(name, targets)
        ),
        "only the wrapped layers were frozen: all other parameters still train; freeze the whole model first": freeze_wrapped_only,
        "everything was frozen after wrapping, the adapters too: nothing trains; freeze first, then wrap": injector(freeze="after"),
        "layers were wrapped but never put into the model: setattr(parent, last word of the name, wrapped layer)": wrap_without_setting,
        "only the model's direct children were looked at: walk with named_modules()": injector(
            walk=nn.Module.named_children, nothing="accept"
        ),
        "a target that matches nothing was accepted: raise a ValueError, else somebody trains nothing and never hears of it": injector(
            nothing="accept"
        ),
        "the model was frozen before the error: look for the targets first, change the model after": injector(freeze="first"),
        "nothing was returned: return the names of the layers that were wrapped": injector(names="none"),
        "only last words were returned: return full names, such as 'layers.0.attn.q_proj'": injector(names="last"),
    },
)

# ------------------------------------------------------------------------------------------------------------- conv_delta


def conv_delta_worked(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return scaling * torch.einsum("or,rihw->oihw", lora_B[:, :, 0, 0], lora_A)


def conv_delta_by_matrix(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    flat = lora_B.flatten(1) @ lora_A.flatten(1)  # (out, in·h·w)
    return (scaling * flat).view(lora_B.shape[0], *lora_A.shape[1:])


def _reordered(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    flat = lora_B.flatten(1) @ lora_A.permute(0, 2, 3, 1).flatten(1)
    return scaling * flat.view(lora_B.shape[0], *lora_A.shape[1:])


def _centre(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    full, centre = conv_delta_worked(lora_A, lora_B, scaling), torch.zeros(lora_B.shape[0], *lora_A.shape[1:], dtype=lora_A.dtype)
    h, w = lora_A.shape[2] // 2, lora_A.shape[3] // 2
    centre[:, :, h, w] = full[:, :, h, w]
    return centre


def observe_conv_delta(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    seen = {}
    for dtype, (out, inn, r, h, w) in {torch.float32: (5, 4, 3, 3, 3), torch.float64: (4, 4, 2, 3, 5)}.items():
        a = torch.randn(r, inn, h, w, generator=g, dtype=dtype)
        b = torch.randn(out, r, 1, 1, generator=g, dtype=dtype)
        seen[f"the update of a {h}×{w} convolution with {inn} input and {out} output channels"] = answer(a, b, 2.6)
    seen["the update of a 1×1 convolution"] = answer(torch.randn(2, 4, 1, 1, generator=g), torch.randn(5, 2, 1, 1, generator=g), 1.4)
    a, b = torch.randn(1, 4, 3, 2, generator=g), torch.randn(5, 1, 1, 1, generator=g)
    label = "the update of rank 1 of a 3×2 convolution"
    try:
        seen[label] = answer(a, b, 0.7)
    except (RuntimeError, IndexError):
        seen[label] = "an error"
    return seen


conv_delta = Check(
    task="the weight that a k×k and a 1×1 convolution make together",
    observe=observe_conv_delta,
    reference=conv_delta_worked,
    second=conv_delta_by_matrix,
    misconceptions={
        "the scale is missing: the update is scaling·(B after A)": lambda a, b, s: conv_delta_worked(a, b, 1.0),
        "the update is divided by the scaling: multiply": lambda a, b, s: conv_delta_worked(a, b, 1 / s),
        "input and output channels are swapped: a convolution's weight is (out, in, h, w)": lambda a, b, s: conv_delta_worked(
            a, b, s
        ).transpose(0, 1),
        "height and width are swapped: keep A's last two axes in their order": lambda a, b, s: conv_delta_worked(a, b, s).transpose(2, 3),
        "the kernel is turned by 180°: torch's conv2d correlates, it does not flip": lambda a, b, s: conv_delta_worked(a, b, s).flip(2, 3),
        "the numbers are right but in the wrong places: A was flattened as (h, w, in) and unfolded as (in, h, w)": _reordered,
        "only the centre of the kernel was filled: all k·k positions of A count": _centre,
        "the positions of the kernel were summed up: every position keeps its own value": (
            lambda a, b, s: conv_delta_worked(a, b, s).sum((2, 3), keepdim=True).expand(-1, -1, *a.shape[2:])
        ),
        "your code fails at rank 1: squeeze() takes away every axis of length 1, that of the rank too; take only the last two, as "
        "lora_B[:, :, 0, 0] or lora_B.flatten(1) does": lambda a, b, s: s * torch.einsum("or,rihw->oihw", b.squeeze(), a),
        "the update is still a matrix (out, in·h·w): give it the shape of the convolution's weight": (
            lambda a, b, s: conv_delta_worked(a, b, s).flatten(1)
        ),
    },
)

# ----------------------------------------------------------------------------------------------------------------- repair


def adapter(late_optimizer=True, random_a=True, random_b=False, freeze=True, steps_before_clearing=True, clears=True, holds=""):
    """The training function of the exercise with its bugs mended, or one of them left in."""

    def adapt(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> nn.Module:
        def optimizer_now() -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

        optimizer = None if late_optimizer else optimizer_now()
        inject_lora(model, r=2, lora_alpha=6)
        if not random_a:
            for name, p in model.named_parameters():
                if "lora_" in name:
                    nn.init.zeros_(p)
        if random_b:
            for p in _factors(model, "lora_B"):
                nn.init.normal_(p, std=0.5)
        if not freeze:
            model.requires_grad_(False)
        optimizer = optimizer or torch.optim.AdamW(
            [p for name, p in model.named_parameters() if p.requires_grad and holds in name] or [torch.zeros(1)], lr=lr, weight_decay=0.0
        )
        for _ in range(steps):
            loss = F.mse_loss(model(x), y)
            if steps_before_clearing and clears:
                optimizer.zero_grad()
            loss.backward()
            if not steps_before_clearing:
                optimizer.zero_grad()
            optimizer.step()
        return model

    return adapt


def adapt_differently(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> nn.Module:
    lora.inject_lora(model, 2, 6, target_modules="all-linear")
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(factors, lr=lr)
    for _ in range(steps):
        for p, grad in zip(factors, torch.autograd.grad(F.mse_loss(model(x), y), factors), strict=True):
            p.grad = grad
        optimizer.step()
    return model


def returns_nothing(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    adapter()(model, x, y, steps, lr)


def trains_the_base(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> nn.Module:
    lora.inject_lora(model, 2, 6)
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return model


def _factors(model: object, letter: str) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if letter in name] if isinstance(model, nn.Module) else []


def added_up(once: nn.Module, twice: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Do two steps leave the sum of their gradients in lora_B.grad, instead of the second one's?"""
    first, both = ([p.grad for p in _factors(model, "lora_B")] for model in (once, twice))
    if not first or any(gradient is None for gradient in first + both) or "lora_B" not in trainable(once):
        return False
    second = torch.autograd.grad(F.mse_loss(once(x), y), _factors(once, "lora_B"))
    return all(torch.allclose(now, old + new, rtol=1e-3, atol=1e-6) for now, old, new in zip(both, first, second, strict=True))


def work_of(runs: dict[int, list[torch.optim.Optimizer]]) -> str:
    """From the optimizer of each step that was taken in each run: how many steps, of which kind, at which rate."""
    stepped = [optimizer for run in runs.values() for optimizer in run]
    kinds_ = sorted({type(optimizer).__name__ for optimizer in stepped})
    rates = sorted({float(group["lr"]) for optimizer in stepped for group in optimizer.param_groups})
    several = ", each of a new one" if any(len({id(optimizer) for optimizer in run}) > 1 for run in runs.values()) else ""
    counts = ", ".join(str(len(run)) for run in runs.values())
    return f"{counts} steps of {' and '.join(kinds_) or 'none'}, lr {', '.join(f'{rate:g}' for rate in rates)}{several}"


def observe_repair(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 8, generator=g)
    with torch.no_grad():
        y = model(x) + x @ torch.randn(8, 1, generator=g) @ torch.randn(1, 4, generator=g) / 3
        base, before = [p.clone() for p in model.parameters()], F.mse_loss(model(x), y).item()
    weights, other = list(model.parameters()), copy.deepcopy(model)
    runs, models = {40: [], 1: [], 2: []}, [model, copy.deepcopy(other), other]
    results = []
    watch = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: runs[steps].append(optimizer))
    try:
        for steps, each in zip(runs, models, strict=True):
            torch.manual_seed(seed)  # the same start: what is the same after two steps as after 40 does not train
            results.append(answer(each, x, y, steps, 0.05))
    except NotImplementedError:  # a RuntimeError too
        raise
    except RuntimeError as error:
        found = "backward found nothing to train" if "does not require grad" in str(error) else str(error)
        return {"what your function returns": "the model", "the run": found}
    finally:
        watch.remove()
    result, *shorter = results
    obeyed = all(len(stepped) in (0, steps) for steps, stepped in runs.items())
    if not isinstance(result, nn.Module):
        return {"what your function returns": None if result is None else f"a {type(result).__name__}"}
    factors = {name: p for name, p in result.named_parameters() if "lora_" in name}
    others = [p for name, p in result.named_parameters() if "lora_" not in name]  # a copy's, if the model was copied
    moved = any(not torch.equal(p, old) for found in (weights, others) for p, old in zip(found, base, strict=False))
    a, b = _factors(result, "lora_A"), _factors(result, "lora_B")
    with torch.no_grad():
        after = F.mse_loss(result(x), y).item()
    gradients = [p.grad for p in b if p.grad is not None and p.grad.any()]
    if not factors:
        state = "there is no adapter in the model"
    elif moved:
        state = "the base weights moved"
    elif not any(p.any() for p in a) and not any(p.any() for p in b):
        state = "lora_A and lora_B are both still zero"
    elif not any(p.any() for p in b):
        state = "lora_B never moved" + (", though it has gradients" if gradients else ", and it has no gradients")
    elif obeyed and all(torch.equal(p, early) for p, early in zip(a, _factors(shorter[1], "lora_A"), strict=False)):
        state = "lora_A never moved"
    else:
        state = "it learned" if after < 0.5 * before else "the factors moved, but the error did not halve"
        if state != "it learned" and added_up(*shorter, x, y):
            state += ": the gradients of the steps are added up"
    near = all(p.abs().max() < 0.051 for p in _factors(shorter[0], "lora_B"))
    adapters = {name: m for name, m in result.named_modules() if isinstance(m, LoRALinear)}
    return {
        "what your function returns": "the model",
        "the run": state,
        "what trains": sorted({name.split(".")[-1] for name, p in result.named_parameters() if p.requires_grad}),
        "the adapters": [f"{name}: r = {m.r}, α/r = {m.scaling:g}" for name, m in adapters.items()],
        "for 40, 1 and 2 steps at lr = 0.05, the optimizer takes": work_of(runs),
        # AdamW's first step moves no number by more than lr, but for its last digits
        "after one step of 0.05 from zero, lora_B is": "as near as that" if near else "farther away",
    }


repair = Check(
    task="a training run that learns: adapters in the optimizer, one factor random, adapters unfrozen, gradients alive at the step",
    observe=observe_repair,
    reference=adapter(),
    second=adapt_differently,
    misconceptions={
        "the optimizer does not hold lora_B, whose gradients nobody uses: made before the adapters existed, it holds the frozen weights "
        "alone; build it after inject_lora": adapter(late_optimizer=False),
        "lora_A never moves: does the optimizer hold lora_B alone? Then the update can only use the r directions of the input that lora_A "
        "drew at random; give it both": adapter(holds="lora_B"),
        "both factors are set to zero: the gradient of each is a product with the other, so nothing will ever move; leave lora_A "
        "random": adapter(random_a=False),
        "both factors are drawn at random: then the first step starts from a model that is not the pretrained one; lora_B starts at "
        "zero, and inject_lora has seen to that": adapter(random_b=True),
        "everything is frozen after the adapters were put in, the adapters too: backward has nothing to train; inject_lora has frozen the "
        "base already": adapter(freeze=False),
        "the gradients are cleared between backward() and step(): the optimizer sees none; clear them before backward()": adapter(
            steps_before_clearing=False
        ),
        "the gradients are never cleared: backward() adds to what is in .grad, so that every step takes the sum of all steps before; call "
        "optimizer.zero_grad() before each backward()": adapter(clears=False),
        "your function returns None: it must return the model that it trained; end it with `return model`": returns_nothing,
        "the base trains too: that is full fine-tuning with extra factors; only lora_A and lora_B may require gradients": trains_the_base,
    },
)
