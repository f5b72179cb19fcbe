"""The checks of unit 06: the gradient through packed weights, bytes of a quantized model, LoRA against QLoRA, merging, the 2 % rule."""

import copy
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.stats import norm, t
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from course.checking import Check, NotYet
from course.lab.live import LiveBytes
from reference.nf4 import NF4_CODEBOOK, NF4Tensor, dequantize_nf4, quantize_nf4
from reference.qlora import NF4Linear, quantize_linears


def entries(found: object, *names: str) -> Any:
    """Of a dictionary the entries that were asked for; anything else as it is, so that the learner hears what it is."""
    return {name: found[name] for name in names if name in found} if isinstance(found, Mapping) else found


# ------------------------------------------------------------------------------------------------ the product and its gradient


def decode(packed: Tensor, absmax: Tensor, shape: tuple[int, int], block_size: int, dtype: torch.dtype) -> Tensor:
    return dequantize_nf4(NF4Tensor(packed, absmax, torch.Size(shape), dtype, block_size))


def keep_the_packed(x: Tensor, packed: Tensor, absmax: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return packed, absmax


def output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def through(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight


def over_rows(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def product_with(
    output=output,
    kept=keep_the_packed,
    through=through,
    bias_gradient=over_rows,
    waste=False,
    unscaled=False,
    keep_y=False,
    back=None,
    always_bias=False,
) -> Callable:
    """The worked answer, with pieces that can be replaced; as a function of (x, packed, absmax, bias, shape, block_size)."""

    class Answer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, packed, absmax, bias, shape, block_size):
            weight = decode(packed, absmax, shape, block_size, x.dtype)
            ctx.save_for_backward(packed, absmax, *kept(x, packed, absmax, weight))
            ctx.layout = shape, block_size
            y = output(x, weight, bias)
            ctx.y = y if keep_y else None
            return y

        @staticmethod
        def backward(ctx, grad):
            packed, absmax, *_ = ctx.saved_tensors
            weight = decode(packed, torch.ones_like(absmax) if unscaled else absmax, *ctx.layout, back or grad.dtype)
            if waste:
                rows = grad.reshape(-1, grad.shape[-1])
                rows.T @ rows  # stands for ∂L/∂W: a product that nobody uses
            grad_bias = bias_gradient(grad) if always_bias or ctx.needs_input_grad[3] else None
            return (through(grad, weight) if ctx.needs_input_grad[0] else None), None, None, grad_bias, None, None

    return Answer.apply


class _Otherwise(torch.autograd.Function):
    """A second right answer: sums written out, in the column layout, with everything but the packed tensors as attributes."""

    @staticmethod
    def forward(ctx, x, packed, absmax, bias, shape, block_size):
        ctx.save_for_backward(packed, absmax)
        ctx.decode = lambda p, a: decode(p, a, shape, block_size, x_dtype).T.contiguous()
        x_dtype = x.dtype
        y = x @ ctx.decode(packed, absmax)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad):
        columns = ctx.decode(*ctx.saved_tensors)  # (in, out)
        grad_bias = grad
        while grad_bias.ndim > 1:
            grad_bias = grad_bias.sum(0)
        return F.linear(grad, columns), None, None, grad_bias if ctx.needs_input_grad[3] else None, None, None


def _bfloat16_for_all_16_bits(x, packed, absmax, bias, shape, block_size) -> Tensor:
    if x.dtype == torch.float16:
        x, bias = x.bfloat16(), bias.bfloat16()
    return product_with()(x, packed, absmax, bias, shape, block_size)


def _dense(x, packed, absmax, bias, shape, block_size) -> Tensor:
    """Autograd by itself: it keeps the dequantized weight."""
    return F.linear(x, decode(packed, absmax, shape, block_size, x.dtype), bias)


def _in_float32(x, packed, absmax, bias, shape, block_size) -> Tensor:
    wide = product_with()(x.float(), packed, absmax, None if bias is None else bias.float(), shape, block_size)
    return wide


class _Products(TorchDispatchMode):
    """Whether a matrix product gave as many numbers as the weight has: its gradient. (How else a backward multiplies is its own affair.)"""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.weights = weights
        self.found = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found |= function.overloadpacket.__name__ in self.NAMES and result.numel() == self.weights
        return result


def _gradients(y: Tensor, leaves: tuple[Tensor, ...], direction: Tensor) -> list[Tensor | str]:
    if not y.requires_grad:
        return ["none"] * len(leaves)
    found = torch.autograd.grad(y, leaves, direction.to(y.dtype), allow_unused=True)
    return ["none" if gradient is None else gradient for gradient in found]


def _kept_bytes(answer, x: Tensor, arguments: tuple) -> int | str:
    with LiveBytes() as live:
        middle = x * 2.0  # not a leaf: it is freed as soon as nobody needs it
        try:
            y = answer(middle, *arguments)
        except RuntimeError:
            return "a RuntimeError"
        total = y.sum()  # a sum needs its argument's shape only
        del middle, y
        return live.bytes - total.nbytes


def _in_16_bits(answer, x: Tensor, arguments: tuple, direction: Tensor) -> tuple[str, str]:
    """The dtype of the output; whether both gradients are right, as far as 16 bits go."""
    leaves = x.requires_grad_(), arguments[2]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    right = _gradients(_dense(exact[0], *arguments[:2], exact[1], *arguments[3:]), tuple(exact), direction.float())
    try:
        y = answer(leaves[0], *arguments)
    except RuntimeError as error:
        return f"a RuntimeError: {error}", "none"
    try:
        found = _gradients(y, leaves, direction)
    except RuntimeError as error:
        return str(y.dtype), f"a RuntimeError: {error}"
    far = torch.finfo(x.dtype).eps  # twice what rounding at every step gives; in float16 less than a bfloat16 weight is off
    near = [isinstance(g, Tensor) and bool((g.float() - r).norm() < far * r.norm()) for g, r in zip(found, right, strict=True)]
    return str(y.dtype), "right" if all(near) else "wrong"


def _observe_product(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)

    def make(out_features: int, in_features: int, dtype: torch.dtype = torch.float32, block_size: int = 64) -> tuple:
        q = quantize_nf4(torch.randn(out_features, in_features, generator=g), block_size)
        bias = torch.randn(out_features, generator=g).to(dtype).requires_grad_()
        return q.packed, q.absmax, bias, (out_features, in_features), block_size

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    n = 24  # square, so that a transposed weight fits too; rows end inside blocks
    arguments = make(n, n)
    # Neither x nor the gradient is contiguous: in a model they come out of transposes.
    bias, x, direction = arguments[2], draw(3, 2, n).transpose(0, 1).requires_grad_(), draw(3, 2, n).transpose(0, 1)
    seen = {}
    y = answer(x, *arguments)
    seen["the output of a (2, 3, 24) input"] = y
    if not isinstance(y, Tensor):
        return seen
    seen["the output without a bias"] = plain = answer(x, *arguments[:2], None, *arguments[3:])
    seen["the output requires a gradient where the input does"] = y.requires_grad
    if not y.requires_grad or y.shape != direction.shape:
        return seen
    with _Products(n * n) as products:
        gradients = _gradients(y, (x, bias), direction)
    for name, gradient in zip(("the input", "the bias"), gradients, strict=True):
        seen[f"the gradient of {name}"] = gradient
    if isinstance(plain, Tensor) and plain.shape == direction.shape:
        try:
            found, how = _gradients(plain, (x,), direction)[0], "runs"
        except RuntimeError:
            found, how = gradients[0], "raises a RuntimeError"
        seen["the backward without a bias"], seen["the gradient of the input without a bias"] = how, found
    wide, x_wide = make(40, 24, block_size=32), draw(7, 24).requires_grad_()  # input, output and packed weight differ in size
    seen["bytes kept for the backward, beside the packed weight"] = _kept_bytes(answer, x_wide, wide)
    seen["the backward computes a gradient of the weight"] = products.found
    one = draw(n).requires_grad_()
    try:
        y = answer(one, *arguments)
        ofs = _gradients(y, (one, bias), direction[0, 0])
    except (RuntimeError, IndexError, ValueError) as error:
        raise NotYet(f"for an x without leading axes, (in,), your code raised {type(error).__name__}: {error}") from error
    seen["the output of a vector"] = y
    seen["the gradient of a vector"], seen["the gradient of the bias beside a vector"] = ofs
    frozen = answer(x, arguments[0], arguments[1], bias.detach(), *arguments[3:])
    seen["the gradient of the input when the bias is frozen"] = _gradients(frozen, (x,), direction)[0]
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        seen[f"with {name} the output is"], seen[f"with {name} the gradients are"] = _in_16_bits(
            answer, draw(3, n, dtype=dtype), make(n, n, dtype), draw(3, n, dtype=dtype)
        )
    try:
        y = answer(x_wide, *wide)
        seen["the output of a (40, 24) weight"] = y.detach()
        seen["the gradient through a (40, 24) weight"] = _gradients(y, (x_wide,), y.detach())[0]
    except RuntimeError:
        seen["the output of a (40, 24) weight"] = "a RuntimeError"
    return seen


product = Check(
    task="y = x·Ŵᵀ + b and its gradient; nothing is kept but the packed weight",
    observe=_observe_product,
    reference=product_with(),
    second=_Otherwise.apply,
    misconceptions={
        "the gradient goes through the transposed weight: y = x·Ŵᵀ gives ∂L/∂x = ∂L/∂y · Ŵ, without the transpose": product_with(
            through=lambda grad, weight: grad @ weight.T
        ),
        "the output is x·Ŵ: as in nn.Linear the weight is (out, in) and the product is with its transpose": product_with(
            output=lambda x, weight, bias: x @ weight if bias is None else x @ weight + bias
        ),
        "the bias is missing in the output: add it, or pass it to F.linear": product_with(output=lambda x, weight, bias: x @ weight.T),
        "the bias gets no gradient: its gradient is that of the output, summed over all rows": product_with(
            bias_gradient=lambda grad: None
        ),
        "the gradient of the bias is a mean over the rows: it is their sum": product_with(bias_gradient=lambda grad: over_rows(grad) / 6),
        "a dense copy of the weight is kept until the backward, by ctx or by autograd itself: 4 bytes a weight, for every layer; keep the "
        "packed weight, and decode it again": _dense,
        "the input is kept for the backward: it would be needed for the weight's gradient only, and the weight is frozen": product_with(
            kept=lambda x, packed, absmax, weight: (x,)
        ),
        "codes and scales are copied before they are saved: save the tensors themselves, the layer holds them anyway": product_with(
            kept=lambda x, packed, absmax, weight: (packed.clone(), absmax.clone())
        ),
        "the incoming gradient is passed on as it is: that is the straight-through estimator, for training what is rounded; here nothing "
        "is rounded on the way of x, and the product's gradient is ∂L/∂y · Ŵ": product_with(through=lambda grad, weight: grad.clone()),
        "the output is kept for the backward: the gradient of a product needs the weight only": product_with(keep_y=True),
        "with a bfloat16 input the backward fails: decode to the dtype of the incoming gradient, not always to float32": product_with(
            back=torch.float32
        ),
        "the gradient goes through the levels without their scales: multiply by absmax in the backward too": product_with(unscaled=True),
        "the backward computes a gradient of the weight: it is frozen, return None for it": product_with(waste=True),
        "a bfloat16 input comes out as float32: dequantize to the dtype of x": _in_float32,
        "a float16 input is taken for bfloat16: dequantize to the dtype of x, whatever it is": _bfloat16_for_all_16_bits,
        "without a bias the backward fails: torch wants None for an argument that was None; ask ctx.needs_input_grad": product_with(
            always_bias=True
        ),
    },
    rtol=1e-3,
    atol=1e-4,
)

# ---------------------------------------------------------------------------------------------- bytes of a quantized model


BITS = 4 + 8 / 64 + 32 / (64 * 256)  # of a quantized weight: code, 8-bit scale, scale of the scales


def _blocks(linear: nn.Linear) -> int:
    return -(-linear.weight.numel() // 64)


def _scale_bytes(blocks: int) -> int:
    return blocks + 4 * -(-blocks // 256) + 4


def base_with(
    quantized: Callable[[str, nn.Module], bool] = lambda name, module: isinstance(module, nn.Linear),
    skips: Callable[[str, tuple[str, ...]], bool] = lambda name, skip: name.rpartition(".")[2] in skip,
    half: Callable[[int], float] = lambda n: -(-n // 2),
    blocks: Callable[[int], int] = lambda n: -(-n // 64),
    scales: Callable[[list[int]], int] = lambda blocks: sum(map(_scale_bytes, blocks)),
    rest: Callable[[str, nn.Parameter], bool] = lambda name, p: True,
    rest_bytes: int = 2,
    twice: bool = False,
    over_all: bool = False,
    biases: bool = False,
    beside: bool = False,
    formula: bool = False,
) -> Callable:
    """The worked answer, with pieces that can be replaced."""

    def answer(model: nn.Module, skip: tuple[str, ...]) -> dict[str, float]:
        chosen = [module for name, module in model.named_modules() if quantized(name, module) and not skips(name, skip)]
        parts = [[module.weight, *([module.bias] if biases and module.bias is not None else [])] for module in chosen]
        inside = set() if beside else {id(tensor) for tensors in parts for tensor in tensors}
        sizes = [sum(tensor.numel() for tensor in tensors) for tensors in parts]
        codes, constants = sum(map(half, sizes)), scales(list(map(blocks, sizes)))
        others = [p for n, p in model.named_parameters(remove_duplicate=not twice) if id(p) not in inside and rest(n, p)]
        weights = sum(p.numel() for p in model.parameters()) if over_all else sum(sizes)
        return {
            "codes": codes,
            "scales": constants,
            "16 bits": rest_bytes * sum(p.numel() for p in others),
            "bits per quantized weight": BITS if formula else 8 * (codes + constants) / weights,
        }

    return answer


base_bytes = base_with()


def _base_bytes_again(model: nn.Module, skip: tuple[str, ...]) -> dict[str, float]:
    """Quantize a copy and look."""
    model = copy.deepcopy(model)
    quantize_linears(model, [name for name, m in model.named_modules() if type(m) is nn.Linear and name.rpartition(".")[2] in skip])
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    codes, scales = sum(m.weight.nbytes for m in layers), sum(m.absmax.nbytes + m.nested_absmax.nbytes + m.offset.nbytes for m in layers)
    rest = sum(p.nbytes for p in model.parameters() if p.dtype == torch.bfloat16)
    weights = sum(m.in_features * m.out_features for m in layers)
    return {"codes": codes, "scales": scales, "16 bits": rest, "bits per quantized weight": (codes + scales) * 8 / weights}


def _a_model(rng: random.Random, tied: bool, full: bool = False) -> nn.Module:
    """Embedding, a few blocks with norms and biases, head; in bfloat16. Sizes are odd, or whole multiples at both levels."""
    hidden, mlp, vocabulary = rng.randrange(91, 111, 2), rng.randrange(221, 261, 2), rng.randrange(301, 341, 2)
    if full:  # no partly used byte, block or block of blocks
        hidden, mlp = 128, 128 * rng.randint(1, 3)
    model = nn.Module()
    model.embed = nn.Embedding(vocabulary, hidden)
    model.blocks = nn.ModuleList(
        nn.ModuleDict({"norm": nn.RMSNorm(hidden), "up_proj": nn.Linear(hidden, mlp), "down_proj": nn.Linear(mlp, hidden, bias=False)})
        for _ in range(rng.randint(2, 4))
    )
    model.last_down_proj = nn.Linear(hidden, hidden)  # ends in "down_proj", and is another name
    model.lm_head = nn.Linear(hidden, vocabulary, bias=False)
    if tied:
        model.lm_head.weight = model.embed.weight
    return model.to(torch.bfloat16)


def _observe_base(answer, seed: int) -> dict:
    rng, seen = random.Random(seed), {}
    for name, model, skip in (
        ("an untied head", _a_model(rng, False), ("lm_head",)),
        ("a tied head", _a_model(rng, True), ("lm_head",)),
        ("down_proj skipped, and the head is not", _a_model(rng, False), ("down_proj",)),
        ("nothing skipped", _a_model(rng, False), ()),
        ("all blocks full, skip=('blocks', 'lm_head')", _a_model(rng, False, full=True), ("blocks", "lm_head")),
    ):
        seen[name] = entries(answer(model, skip), "codes", "scales", "16 bits", "bits per quantized weight")
    return seen


bytes_of_base = Check(
    task="bytes of a quantized model, part by part",
    observe=_observe_base,
    reference=base_bytes,
    second=_base_bytes_again,
    misconceptions={
        "skip is ignored: the layers that it names, here the output head, stay in 16 bits": base_with(skips=lambda name, skip: False),
        "skip is looked for inside of names: 'last_down_proj' is another layer than 'down_proj'; compare with what follows the last "
        "dot": base_with(skips=lambda name, skip: any(part in name for part in skip)),
        "the output head is skipped where skip does not name it: skip says all, and may be empty": base_with(
            skips=lambda name, skip: name.rpartition(".")[2] in (*skip, "lm_head")
        ),
        "skip is compared with every part of a name: only what follows the last dot counts, so 'blocks' is no layer's name": base_with(
            skips=lambda name, skip: any(part in skip for part in name.split("."))
        ),
        "the output head alone is skipped: skip may name other layers too, and 'down_proj' means every layer whose name ends in "
        "'.down_proj'": base_with(skips=lambda name, skip: name in skip),
        "an odd number of weights leaves half a byte unused, and it is stored: round up in each layer": base_with(half=lambda n: n / 2),
        "half a byte is lost where a layer has an odd number of weights: round up in each layer, not down": base_with(
            half=lambda n: n // 2
        ),
        "n // 2 + 1 is one byte too many where n is even; rounded up, n/2 is math.ceil(n / 2)": base_with(half=lambda n: n // 2 + 1),
        "n // 64 + 1 is one block too many where the last one is full; rounded up, n/64 is math.ceil(n / 64)": base_with(
            blocks=lambda n: n // 64 + 1
        ),
        "blocks // 256 + 1 is one too many where the last 256 are full; rounded up, it is math.ceil(blocks / 256)": base_with(
            scales=lambda blocks: sum(k + 4 * (k // 256 + 1) + 4 for k in blocks)
        ),
        "a short last block has a scale too: round the number of blocks up in each layer": base_with(blocks=lambda n: n // 64),
        "where the last group of 256 blocks is short it has a scale too: round their number up in each layer": base_with(
            scales=lambda blocks: sum(k + 4 * (k // 256) + 4 for k in blocks)
        ),
        "the bias is quantized with the weight: it stays in 16 bits": base_with(biases=True),
        "the quantized layers are counted in 16 bits too: what became codes is no longer there": base_with(beside=True),
        "these are the bits of a large layer, by formula: divide the codes and scales of these layers by their weights": base_with(
            formula=True
        ),
        "the embedding is counted in 4 bits: it is a table, not an nn.Linear, and stays in 16": base_with(
            quantized=lambda name, module: isinstance(module, (nn.Linear, nn.Embedding))
        ),
        "a tied head is counted twice: it is the embedding's own tensor": base_with(twice=True),
        "the embedding is missing: it stays in 16 bits": base_with(rest=lambda name, p: not name.startswith("embed")),
        "the biases are missing: they are not quantized, and stay in 16 bits": base_with(rest=lambda name, p: not name.endswith("bias")),
        "the norms are missing: they stay in 16 bits": base_with(rest=lambda name, p: "norm" not in name),
        "what is not quantized is counted in 4 bytes: it is bfloat16 here, 2 bytes": base_with(rest_bytes=4),
        "the scales are counted in float32: double quantization keeps one byte for each, and a float32 for each 256 of them": base_with(
            scales=lambda blocks: sum(4 * count for count in blocks)
        ),
        "the scales' own scales are missing: one float32 for each 256 scales of a layer": base_with(
            scales=lambda blocks: sum(count + 4 for count in blocks)
        ),
        "the offset is missing: the mean of a layer's scales, one float32": base_with(
            scales=lambda blocks: sum(_scale_bytes(count) - 4 for count in blocks)
        ),
        "the scales of all layers are counted as if they were one layer's: each layer has its own offset, and its own last, short "
        "block": base_with(scales=lambda blocks: _scale_bytes(sum(blocks))),
        "the scales are missing: each block of 64 weights has one": base_with(scales=lambda blocks: 0),
        "the bits are spread over all parameters: divide by the number of quantized weights": base_with(over_all=True),
    },
    rtol=1e-9,
)

# -------------------------------------------------------------------------------------------------- LoRA against QLoRA


def frozen_with(
    bits: float = BITS,
    moment: Callable[[list[int]], float] = lambda sizes: 2 * max(sizes),
    wide: int = 4,
    wide_linears: bool = False,
    even: float = 1.0,
    last: bool = False,
    even_without_copy: bool = False,
    unit: float = 1,
    number: Callable[[float], float] = lambda value: value,
) -> Callable:
    """The worked answer, with pieces that can be replaced."""

    def answer(linears: list[tuple[int, int]], others: int) -> dict[str, float]:
        sizes = [out * into for out, into in linears]
        weights, transient = sum(sizes), 2 * sizes[-1] if last else moment(sizes)
        small = weights * (4 if wide_linears else bits / 8)
        saved = 2 * weights - weights * bits / 8 - transient * (not even_without_copy)
        return {
            "LoRA": unit * (2 * weights + 2 * others),
            "QLoRA": unit * (weights * bits / 8 + 2 * others + transient),
            "QLoRA, the rest in float32": unit * (small + wide * others + transient),
            "QLoRA needs more from": number(even * saved / 2),
        }

    return answer


def _frozen_again(linears: list[tuple[int, int]], others: int) -> dict[str, float]:
    weights = largest = 0
    for out, into in linears:
        weights += out * into
        largest = max(largest, out * into)
    lora = (weights + others) * 16 / 8
    per_weight = (4 + (8 + 32 / 256) / 64) / 8
    held = weights * per_weight + largest * 2
    return {
        "LoRA": lora,
        "QLoRA": held + others * 2,
        "QLoRA, the rest in float32": held + others * 4,
        "QLoRA needs more from": weights - held / 2,  # 2·weights + 2·others = held + 4·others
    }


def _linears(rng: random.Random, layers: int) -> list[tuple[int, int]]:
    hidden = 64 * rng.randrange(3, 8, 2)  # an odd number of bytes is packed, so the break-even ends in ½
    linears = [size for _ in range(layers) for size in ((hidden, hidden), (3 * hidden, hidden), (hidden, 3 * hidden + 64))]
    rng.shuffle(linears)
    # the largest is neither the first nor the last
    return [(hidden, hidden), *linears, (hidden + 64, hidden)] if layers else [(3 * hidden, hidden)]


def _rounds_down(linears: list[tuple[int, int]]) -> bool:
    even = frozen_with()(linears, 0)["QLoRA needs more from"]
    return round(even) < even


def _observe_frozen(answer, seed: int) -> dict:
    rng, seen = random.Random(seed), {}
    for name, least, most, share in (
        ("many layers", 20, 40, 0.05),
        ("a small model with a large vocabulary", 4, 8, 1.7),
        ("a single layer", 0, 0, 0.5),
    ):
        linears = _linears(rng, rng.randint(least, most))
        while name == "many layers" and _rounds_down(linears):  # a single layer's does: round() is then neither floor nor ceil
            linears = _linears(rng, rng.randint(least, most))
        others = int(share * sum(out * into for out, into in linears)) + linears[0][1]
        seen[name] = entries(answer(linears, others), "LoRA", "QLoRA", "QLoRA, the rest in float32", "QLoRA needs more from")
    return seen


frozen = Check(
    task="frozen bytes under LoRA and QLoRA, and where QLoRA needs more",
    observe=_observe_frozen,
    reference=frozen_with(),
    second=_frozen_again,
    misconceptions={
        "the moment's copy is missing: while a layer computes, its weight is there in 16 bits too; count the largest": frozen_with(
            moment=lambda sizes: 0
        ),
        "all layers are counted as dequantized at once: a copy lives for one product, so only the largest counts": frozen_with(
            moment=lambda sizes: 2 * sum(sizes)
        ),
        "the moment's copy is counted in float32: it has the compute dtype, bfloat16, 2 bytes": frozen_with(
            moment=lambda sizes: 4 * max(sizes)
        ),
        "the copy is of the last layer, whatever its size: the peak is set by the largest": frozen_with(last=True),
        "the copy is left out of the break-even: the third has it and the first has not": frozen_with(even_without_copy=True),
        "these are bits: divide by 8": frozen_with(unit=8),
        "these are gigabytes: return bytes": frozen_with(unit=1e-9),
        "the copy is of an average layer: the peak is set by the largest": frozen_with(moment=lambda sizes: 2 * sum(sizes) / len(sizes)),
        "the scales are missing: a quantized weight takes 4 + 8/64 + 32/(64·256) bits": frozen_with(bits=4),
        "the scales are counted in float32, 4.5 bits a weight: with double quantization it is 4 + 8/64 + 32/(64·256)": frozen_with(
            bits=4.5
        ),
        "half a bit is taken off for double quantization: it saves 0.373 bits of the 0.5, and the scales still cost 0.127": frozen_with(
            bits=4.5 - 0.5 + 32 / (64 * 256)
        ),
        "the float32 copies are counted beside the 16-bit tensors: they take their place, so the rest costs 4 bytes and not 6": frozen_with(
            wide=6
        ),
        "the quantized layers became float32 as well: only what is not quantized does": frozen_with(wide_linears=True),
        "the break-even is twice what it should be: each of the others costs 2 bytes more than under LoRA, so divide the saved bytes by "
        "2": frozen_with(even=2.0),
        "the break-even is cut off at zero: where it is negative, QLoRA needs more whatever the others; return it as it is": frozen_with(
            number=lambda value: max(0, value)
        ),
        "the break-even is rounded: return it as it is": frozen_with(number=round),
        "the break-even is rounded up: it is where the two are equal, not the first whole number from there on; return it as it is": (
            frozen_with(number=math.ceil)
        ),
        "the break-even is rounded down: divide with / and not with //, and return it as it is": frozen_with(number=math.floor),
        "what follows the break-even's decimal point is cut off: return it as it is, without int()": frozen_with(number=int),
        "the break-even is rounded up, and cut off at zero: return it as it is, a half and negative where it comes out so": frozen_with(
            number=lambda value: max(0, math.ceil(value))
        ),
    },
    rtol=1e-12,
)

# ------------------------------------------------------------------------------------------------------ three ways to merge


def _round_trip(weight: Tensor, block_size: int) -> Tensor:
    return dequantize_nf4(quantize_nf4(weight, block_size), torch.float32)


def merge_with(
    scale=lambda alpha, r: alpha / r,
    product=lambda A, B: B @ A,
    requantize=lambda q, decoded, original, delta: _round_trip(decoded + delta, q.block_size),
    dequantized=lambda decoded, original, delta: decoded + delta,
    original_way=lambda decoded, original, delta: original + delta,
    truth=lambda decoded, original, delta: decoded + delta,
    error=lambda merged, true, delta: ((merged - true).norm() / true.norm()).item(),
    decode=lambda q: dequantize_nf4(q, torch.float32),
    update=lambda delta, dtype: delta,
    stored_truth: str = "",
    of_original=None,
    before_rounding: tuple[str, ...] = (),
    in_16_bits: tuple[str, ...] = (),
) -> Callable:
    """The worked answer, with pieces that can be replaced."""

    def answer(q: NF4Tensor, original: Tensor, lora_A: Tensor, lora_B: Tensor, lora_alpha: float) -> dict:
        delta = update(scale(lora_alpha, lora_A.shape[0]) * product(lora_A, lora_B), original.dtype)
        decoded, wide = decode(q), original.float()
        merged = {
            "dequantized": dequantized(decoded, wide, delta).to(original.dtype),
            "requantized": requantize(q, decoded, wide, delta),
            "original": original_way(decoded, wide, delta).to(original.dtype),
        }
        for way in in_16_bits:
            merged[way] = (decoded if way == "dequantized" else wide).to(original.dtype) + delta.to(original.dtype)
        true = merged[stored_truth].float() if stored_truth else truth(decoded, wide, delta)
        exact = {"dequantized": decoded + delta, "original": wide + delta}
        judged = {**merged, **{way: exact[way] for way in before_rounding}}
        errors = {name: error(weight.float(), true, delta) for name, weight in judged.items()}
        if of_original:
            errors["original"] = error(merged["original"].float(), of_original(wide, delta, original.dtype), delta)
        return {"weights": merged, "errors": errors}

    return answer


def _delta_rounded_in_the_truth(q: NF4Tensor, original: Tensor, lora_A: Tensor, lora_B: Tensor, lora_alpha: float) -> dict:
    return merge_with(truth=lambda decoded, wide, delta: decoded + delta.to(original.dtype).float())(
        q, original, lora_A, lora_B, lora_alpha
    )


def _merge_again(q: NF4Tensor, original: Tensor, lora_A: Tensor, lora_B: Tensor, lora_alpha: float) -> dict:
    delta = torch.einsum("or,ri->oi", lora_B.double(), lora_A.double()) * lora_alpha / len(lora_A)
    trained = dequantize_nf4(q, torch.float32) + delta  # float64
    packed = quantize_nf4(trained.float(), q.block_size)
    weights = {
        "original": (original.double() + delta).to(original.dtype),
        "dequantized": trained.to(original.dtype),
        "requantized": dequantize_nf4(packed, torch.float32),
    }
    errors = {}
    for name, weight in weights.items():
        errors[name] = math.sqrt(((weight.double() - trained) ** 2).sum() / (trained**2).sum())
    return {"weights": weights, "errors": errors}


WAYS = ("dequantized", "requantized", "original")


def _on_levels(weight: Tensor, block_size: int) -> str:
    """Whether each block holds nothing but its scale times levels, to more digits than 16 bits have."""
    shares = [block / block.abs().max() for block in weight.flatten().split(block_size)]
    far = max((share[:, None] - NF4_CODEBOOK).abs().amin(1).max().item() for share in shares)
    return "a level times its block's scale" if far < 1e-5 else "near a level times its block's scale" if far < 0.02 else "no such product"


def _observe_merge(answer, seed: int) -> dict:
    g, seen = torch.Generator().manual_seed(seed), {}
    for what, dtype, block_size, n, r, alpha, size, taken in (
        ("", torch.bfloat16, 32, 48, 2, 5, 1, 0),
        (", where the update takes most of the weight away", torch.float16, 128, 32, 4, 6, 1 / 16, 0.9),  # it matters which norm is taken
        (", where the update is large", torch.bfloat16, 256, 24, 4, 2.5, 1 / 512, 0),  # its rounding is as large as W − Ŵ
    ):
        # numbers with few digits, so that ΔW is exact in whatever order it is summed
        lora_A, lora_B = (torch.randint(-8, 9, shape, generator=g) / 16 for shape in ((r, n), (n, r)))
        original = (size * torch.randn(n, n, generator=g) - taken * (alpha / r) * lora_B @ lora_A).to(dtype)
        whole = answer(quantize_nf4(original, block_size), original.clone(), lora_A, lora_B, alpha)
        found = entries(whole, "weights", "errors")
        where = f"what your function returns for a {str(dtype).removeprefix('torch.')} weight{what}"
        if isinstance(found, Mapping) and not found and (flat := entries(whole, *WAYS)):
            return seen | {where: f"a dictionary with the keys {', '.join(map(repr, flat))}"}
        if isinstance(found, Mapping):
            found = {part: entries(inner, *WAYS) for part, inner in found.items()}
        seen[where] = found
        kept = found.get("weights") if isinstance(found, Mapping) else None
        kept = kept.get("requantized") if isinstance(kept, Mapping) else None
        if isinstance(kept, Tensor) and kept.shape == original.shape:
            seen[where.replace("what", "each number of 'requantized' that", 1)] = _on_levels(kept.float(), block_size)
    return seen


merges = Check(
    task="three merges, and how far each is from what was trained",
    observe=_observe_merge,
    reference=merge_with(),
    second=_merge_again,
    misconceptions={
        "the update has no scale: ΔW = (α/r)·B·A": merge_with(scale=lambda alpha, r: 1.0),
        "the update is scaled by α: ΔW = (α/r)·B·A": merge_with(scale=lambda alpha, r: float(alpha)),
        "the update is transposed: ΔW = (α/r)·B·A is (out, in), as the weight is": merge_with(product=lambda A, B: (B @ A).T),
        "the errors compare with W + ΔW: the adapter was trained beside the dequantized weight, so the truth is Ŵ + ΔW": merge_with(
            truth=lambda decoded, original, delta: original + delta
        ),
        "the errors compare with W, the weight before anything was merged: the truth is Ŵ + ΔW, with the update": merge_with(
            truth=lambda decoded, original, delta: original
        ),
        "what was trained was rounded to 16 bits before the errors were taken, so that 'dequantized' is compared with itself: compare with "
        "Ŵ + ΔW in float32": merge_with(stored_truth="dequantized"),
        "the errors compare with the stored W + ΔW, so that 'original' is compared with itself: the adapter was trained beside the "
        "dequantized weight, compare with Ŵ + ΔW": merge_with(stored_truth="original"),
        "the error of 'original' compares it with W + ΔW, the sum that it is made from: compare it with what was trained, Ŵ + ΔW, like the "
        "others": merge_with(of_original=lambda wide, delta, dtype: wide + delta),
        "the error of 'original' is zero: it was compared with itself; compare it with what was trained, Ŵ + ΔW, like the "
        "others": merge_with(of_original=lambda wide, delta, dtype: (wide + delta).to(dtype).float()),
        "the error of 'original' compares it with W, without the update: compare it with what was trained, Ŵ + ΔW, like the "
        "others": merge_with(of_original=lambda wide, delta, dtype: wide),
        "ΔW was rounded to 16 bits before it was added: add in float32, and round once, at the end": merge_with(
            update=lambda delta, dtype: delta.to(dtype).float()
        ),
        "the weights are right, but the errors compare with Ŵ and a ΔW that was rounded to 16 bits: compare with the float32 "
        "sum": _delta_rounded_in_the_truth,
        "the three ways stand at the top: return {'weights': {…}, 'errors': {…}}, each with the keys 'dequantized', 'requantized' and "
        "'original'": lambda *arguments: merge_with()(*arguments)["weights"],
        "the errors compare with Ŵ, without the update: what was trained is Ŵ + ΔW": merge_with(
            truth=lambda decoded, original, delta: decoded
        ),
        "the errors are relative to the update: divide by the norm of the trained weight Ŵ + ΔW": merge_with(
            error=lambda merged, true, delta: ((merged - true).norm() / delta.norm()).item()
        ),
        "the errors are relative to the merged weight's own norm: divide by the norm of the trained weight": merge_with(
            error=lambda merged, true, delta: ((merged - true).norm() / merged.norm()).item()
        ),
        "the errors are in per cent: return ‖merged − trained‖ / ‖trained‖ as it is": merge_with(
            error=lambda merged, true, delta: 100 * ((merged - true).norm() / true.norm()).item()
        ),
        "the errors are of the largest element: the Frobenius norm is the root of the sum of all squares": merge_with(
            error=lambda merged, true, delta: ((merged - true).abs().max() / true.abs().max()).item()
        ),
        "the norm is the spectral one: the Frobenius norm is the root of the sum of all squares, tensor.norm()": merge_with(
            error=lambda merged, true, delta: (torch.linalg.matrix_norm(merged - true, 2) / torch.linalg.matrix_norm(true, 2)).item()
        ),
        "the error of 'dequantized' is zero: it was taken before the weight was rounded to 16 bits, or it was compared with itself; "
        "compare the stored weight with Ŵ + ΔW in float32": merge_with(before_rounding=("dequantized",)),
        "the errors were taken before the weights were rounded to 16 bits: the rounding is part of what merging costs": merge_with(
            before_rounding=("dequantized", "original")
        ),
        "the error of 'original' was taken before the weight was rounded to 16 bits: compare the weight as it is stored": merge_with(
            before_rounding=("original",)
        ),
        "Ŵ was decoded to 16 bits, the default of dequantize_nf4: pass torch.float32, and round once, at the end": merge_with(
            decode=lambda q: dequantize_nf4(q).float()
        ),
        "α/r was cut to a whole number: divide with / and not with //": merge_with(scale=lambda alpha, r: alpha // r),
        "'dequantized' and 'original' are sums of 16-bit numbers: add in float32, and round once, at the end": merge_with(
            in_16_bits=("dequantized", "original")
        ),
        "'dequantized' is a sum of 16-bit numbers: add Ŵ and ΔW in float32, and round once, at the end": merge_with(
            in_16_bits=("dequantized",)
        ),
        "'original' is a sum of 16-bit numbers: add W and ΔW in float32, and round once, at the end": merge_with(in_16_bits=("original",)),
        "'requantized' starts from the merge that was rounded to 16 bits: quantize the float32 sum": merge_with(
            requantize=lambda q, decoded, original, delta: _round_trip((decoded + delta).to(q.dtype).float(), q.block_size)
        ),
        "α/√r is rank-stabilized LoRA; here ΔW = (α/r)·B·A": merge_with(scale=lambda alpha, r: alpha / math.sqrt(r)),
        "the errors are absolute: divide by the norm of the trained weight": merge_with(
            error=lambda merged, true, delta: (merged - true).norm().item()
        ),
        "the errors are squared: take the root, ‖merged − trained‖ / ‖trained‖": merge_with(
            error=lambda merged, true, delta: ((merged - true).norm() / true.norm()).item() ** 2
        ),
        "requantized from the original weights: what is at hand is Ŵ, so quantize Ŵ + ΔW": merge_with(
            requantize=lambda q, decoded, original, delta: _round_trip(original + delta, q.block_size)
        ),
        "'requantized' was decoded to 16 bits: decode it to float32, as it would be for a product": merge_with(
            requantize=lambda q, decoded, original, delta: _round_trip(decoded + delta, q.block_size).to(q.dtype).float()
        ),
        "nothing was requantized: Ŵ + ΔW lies between the levels; quantize the sum, then decode it": merge_with(
            requantize=lambda q, decoded, original, delta: decoded + delta
        ),
        "the update was quantized by itself: quantize the sum Ŵ + ΔW, since that is what is stored": merge_with(
            requantize=lambda q, decoded, original, delta: decoded + _round_trip(delta, q.block_size)
        ),
        "requantized in blocks of 64, whatever q has: use q.block_size": merge_with(
            requantize=lambda q, decoded, original, delta: _round_trip(decoded + delta, 64)
        ),
        "merged into the original weights twice: 'dequantized' starts from Ŵ, what q decodes to": merge_with(
            dequantized=lambda decoded, original, delta: original + delta
        ),
        "'original' starts from the dequantized weight: it is W + ΔW": merge_with(
            original_way=lambda decoded, original, delta: decoded + delta
        ),
    },
    rtol=1e-2,  # a float32 and a float64 sum may round to neighbours in 16 bits
    atol=1e-5,
)

# ---------------------------------------------------------------------------------------------------------------- the 2 % rule


def rule_with(
    differences=lambda b, c: c.mean(1) - b.mean(1),
    half=None,
    share=math.expm1,
    share_of_ends=None,
    returned=lambda value: value,
    verdict=lambda estimate, low, high, tolerance: "within" if high <= tolerance else "beyond" if low > tolerance else "unknown",
) -> Callable:
    """The worked answer, with pieces that can be replaced: paired differences, half the interval's width, nats to a share, the verdict."""

    def answer(baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> dict:
        baseline, candidate = baseline.double(), candidate.double()
        lost = differences(baseline, candidate)
        width = (half or _student)(lost, confidence, baseline, candidate)
        centre = lost.mean().item()
        estimate, (low, high) = share(centre), ((share_of_ends or share)(end) for end in (centre - width, centre + width))
        found = {name: returned(value) for name, value in {"estimate": estimate, "low": low, "high": high}.items()}
        return found | {"verdict": verdict(estimate, low, high, tolerance)}

    return answer


def _student(lost: Tensor, confidence: float, *_) -> float:
    return t.ppf((1 + confidence) / 2, len(lost) - 1) * lost.std().item() / math.sqrt(len(lost))


def _welch(lost: Tensor, confidence: float, baseline: Tensor, candidate: Tensor) -> float:
    rows = [losses.mean(1) for losses in (baseline, candidate)]
    return t.ppf((1 + confidence) / 2, 2 * len(lost) - 2) * math.sqrt(sum(row.var().item() / len(row) for row in rows))


def _rule_again(baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> dict:
    """scipy's own interval, on lists."""
    pairs = [(sum(c) - sum(b)) / len(b) for b, c in zip(baseline.tolist(), candidate.tolist(), strict=True)]
    n = len(pairs)
    mean = sum(pairs) / n
    error = (sum((p - mean) ** 2 for p in pairs) / (n - 1) / n) ** 0.5
    low, high = (math.exp(end) - 1 for end in t.interval(confidence, n - 1, mean, error))
    verdict = "unknown"
    if low > tolerance:
        verdict = "beyond"
    elif high <= tolerance:
        verdict = "within"
    return {"estimate": math.exp(mean) - 1, "low": low, "high": high, "verdict": verdict}


def _shares_of_loss(baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> dict:
    mean = baseline.double().mean().item()
    return rule_with(share=lambda value: value / mean)(baseline, candidate, tolerance, confidence)


def _perplexity_points(baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> dict:
    before = math.exp(baseline.double().mean().item())
    return rule_with(share=lambda value: before * math.expm1(value))(baseline, candidate, tolerance, confidence)


def _shares_first(baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> dict:
    return rule_with(differences=lambda b, c: (c - b).mean(1).expm1(), share=lambda value: value)(
        baseline, candidate, tolerance, confidence
    )


def _nats_around_a_share(baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> dict:
    lost = (candidate.double() - baseline.double()).mean(1)
    estimate, width = math.expm1(lost.mean().item()), _student(lost, confidence)
    low, high = estimate - width, estimate + width
    verdict = "within" if high <= tolerance else "beyond" if low > tolerance else "unknown"
    return {"estimate": estimate, "low": low, "high": high, "verdict": verdict}


def _by_the_slope(baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> dict:
    lost = (candidate.double() - baseline.double()).mean(1)
    slope = math.exp(lost.mean().item())
    low, estimate, high = (slope - 1 + sign * slope * _student(lost, confidence) for sign in (-1, 0, 1))
    verdict = "within" if high <= tolerance else "beyond" if low > tolerance else "unknown"
    return {"estimate": estimate, "low": low, "high": high, "verdict": verdict}


def _observe_rule(answer, seed: int) -> dict:
    g, rng, seen = torch.Generator().manual_seed(seed), random.Random(seed), {}
    # In units of the tolerance: how much is lost, and how much that varies between sequences; exactly, so that the verdict is sure.
    cases = (
        ("12 sequences lose about 0.8 times the tolerance", 0.8, 0.1, 12),
        ("10 sequences lose about 1.25 times the tolerance", 1.25, 0.1, 10),
        ("9 sequences lose 1.2 times the tolerance on average, and vary a lot", 1.2, 1.5, 9),
        ("8 sequences lose 0.8 times the tolerance on average, and vary a lot", 0.8, 1.5, 8),
        ("9 sequences gain about 1.5 times the tolerance", -1.5, 0.1, 9),
        ("10 sequences lose nearly the tolerance in nats, and more than the tolerance as a share", 0.995, 0.001, 10),
    )

    def see(name: str, baseline: Tensor, candidate: Tensor, tolerance: float, confidence: float) -> None:
        found = answer(baseline.float(), candidate.float(), tolerance, confidence)
        seen[f"{name} (tolerance {tolerance:g}, confidence {confidence:g})"] = entries(found, "estimate", "low", "high", "verdict")

    for tolerance, confidence in ((0.02, rng.choice([0.9, 0.98])), (0.05, 0.95)):
        for name, shift, noise, rows in cases:
            lost = torch.randn(rows, 1, generator=g, dtype=torch.float64)
            lost = (shift + noise * (lost - lost.mean()) / lost.std()) * tolerance
            words = torch.randn(rows, 25, generator=g, dtype=torch.float64)
            hard = torch.linspace(1, 3, rows, dtype=torch.float64)[torch.randperm(rows, generator=g)][:, None]
            baseline = hard + torch.rand(rows, 25, generator=g, dtype=torch.float64)
            candidate = baseline + lost + 0.3 * (words - words.mean(1, keepdim=True))
            see(name, baseline, candidate, tolerance, confidence)
    # Both ends at the tolerance: at zero, the one place where no order of sums and no exp rounds. (1 + 1e-18)/2 is ½, whose quantile is 0.
    lost = torch.tensor([1, -1, 2, -2, 3, -3, 4, -4])[torch.randperm(8, generator=g)][:, None]
    baseline = torch.randint(64, 256, (8, 32), generator=g)
    see("8 sequences lose nothing on average, and the interval has no width", baseline / 64, (baseline + lost) / 64, 0.0, 1e-18)
    return seen


rule = Check(
    task="the 2 % rule: a paired interval, and three verdicts",
    observe=_observe_rule,
    reference=rule_with(),
    second=_rule_again,
    misconceptions={
        "the interval is that of two separate samples: both models saw the same sequences, so take the difference of each sequence first; "
        "what makes a text hard then drops out": rule_with(half=_welch),
        "tokens are counted as the sample: neighbours in a text are surprising together; average each sequence, and let sequences be the "
        "sample": rule_with(differences=lambda b, c: (c - b).flatten()),
        "the width is the spread of the sequences: the spread of their mean is smaller by √n": rule_with(
            half=lambda lost, confidence, *_: _student(lost, confidence) * math.sqrt(len(lost))
        ),
        "the standard deviation divides by n: the mean was estimated from the same numbers, divide by n − 1": rule_with(
            half=lambda lost, confidence, *_: _student(lost, confidence) * math.sqrt((len(lost) - 1) / len(lost))
        ),
        "the quantile is the normal one: with few sequences the spread itself is a guess; use Student's t with n − 1 degrees": rule_with(
            half=lambda lost, confidence, *_: norm.ppf((1 + confidence) / 2) * lost.std().item() / math.sqrt(len(lost))
        ),
        "Student's t has n degrees of freedom here: one is spent on the mean, n − 1 are left": rule_with(
            half=lambda lost, confidence, *_: t.ppf((1 + confidence) / 2, len(lost)) * lost.std().item() / math.sqrt(len(lost))
        ),
        "the interval is one-sided: for two sides the quantile is at (1 + confidence)/2": rule_with(
            half=lambda lost, confidence, *_: t.ppf(confidence, len(lost) - 1) * lost.std().item() / math.sqrt(len(lost))
        ),
        "the verdict looks at the estimate alone: it must hold at both ends of the interval": rule_with(
            verdict=lambda estimate, low, high, tolerance: "within" if estimate <= tolerance else "beyond"
        ),
        "what is not shown to be within counts as beyond: if the tolerance lies inside the interval, say 'unknown'": rule_with(
            verdict=lambda estimate, low, high, tolerance: "within" if high <= tolerance else "beyond"
        ),
        "what is not shown to be beyond counts as within: if the tolerance lies inside the interval, say 'unknown'": rule_with(
            verdict=lambda estimate, low, high, tolerance: "beyond" if low > tolerance else "within"
        ),
        "the verdict compares nats with the tolerance: compare the shares, exp(Δ) − 1": rule_with(
            verdict=lambda estimate, low, high, tolerance: (
                "within" if math.log1p(high) <= tolerance else "beyond" if math.log1p(low) > tolerance else "unknown"
            )
        ),
        "a model that is better by more than the tolerance is within it too: only a loss is limited": rule_with(
            verdict=lambda estimate, low, high, tolerance: (
                "within" if high <= tolerance and low >= -tolerance else "beyond" if low > tolerance else "unknown"
            )
        ),
        "an interval that ends at the tolerance is within it: compare its upper end with <=": rule_with(
            verdict=lambda estimate, low, high, tolerance: "within" if high < tolerance else "beyond" if low > tolerance else "unknown"
        ),
        "an interval at the tolerance itself is not beyond it: compare its lower end with >, not with >=": rule_with(
            verdict=lambda estimate, low, high, tolerance: "beyond" if low >= tolerance else "within" if high <= tolerance else "unknown"
        ),
        "the verdict asks whether anything is lost at all: compare the interval with the tolerance, not with 0": rule_with(
            verdict=lambda estimate, low, high, tolerance: "beyond" if low > 0 else "within"
        ),
        "the shares are in per cent: return exp(Δ) − 1 as it is": rule_with(returned=lambda value: 100 * value),
        "the shares are in per cent, and the tolerance is not: 0.02 stands for 2 %; return exp(Δ) − 1 as it is": rule_with(
            share=lambda value: 100 * math.expm1(value)
        ),
        "the ends of the interval are still in nats: take exp(…) − 1 of low and high too, as of the estimate": rule_with(
            share_of_ends=lambda value: value
        ),
        "n stands for n − 1 twice, in the standard deviation and in Student's t: one degree of freedom is spent on the mean": rule_with(
            half=lambda lost, confidence, *_: t.ppf((1 + confidence) / 2, len(lost)) * lost.std(correction=0).item() / math.sqrt(len(lost))
        ),
        "half the width of the interval, in nats, was added to the estimate, a share: take the ends in nats, then exp(…) − 1 of "
        "each": _nats_around_a_share,
        "each sequence's loss was made a share before the mean: take the mean and the interval in nats, then exp(…) − 1 of all "
        "three": _shares_first,
        "the interval is laid around the estimate as a share: take its ends in nats, then exp(…) − 1 of each": _by_the_slope,
        "the variance stands where the standard deviation belongs: take its root": rule_with(
            half=lambda lost, confidence, *_: t.ppf((1 + confidence) / 2, len(lost) - 1) * lost.var().item() / math.sqrt(len(lost))
        ),
        "the sample are the columns: average over the tokens, the second axis": rule_with(differences=lambda b, c: (c - b).mean(0)),
        "the tolerance is always 2 %: use the argument": lambda b, c, tolerance, confidence: rule_with()(b, c, 0.02, confidence),
        "the confidence is always 95 %: use the argument": lambda b, c, tolerance, confidence: rule_with()(b, c, tolerance, 0.95),
        "these are nats per token, not a share of perplexity: a loss of Δ nats is a rise of exp(Δ) − 1": rule_with(
            share=lambda value: value
        ),
        "the share is taken of the loss: 2 % of the nats is not 2 % of the perplexity; a loss of Δ nats is a rise of exp(Δ) − 1, whatever "
        "the loss": _shares_of_loss,
        "these are points of perplexity: divide by the baseline's perplexity, or take exp(Δ) − 1": _perplexity_points,
        "the share is taken of the quantized model's perplexity: the baseline is what 2 % refers to, exp(Δ) − 1": rule_with(
            share=lambda value: 1 - math.exp(-value)
        ),
        "the sign is turned around: what is lost is candidate − baseline, positive where quantizing made the loss higher": rule_with(
            differences=lambda b, c: b.mean(1) - c.mean(1)
        ),
    },
    rtol=1e-3,  # means of float32 losses, of which the difference is a thousandth
    atol=2e-6,
)
