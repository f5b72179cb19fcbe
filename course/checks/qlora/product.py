"""Exercise 1: the product with a frozen, packed weight, and its gradient."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from course.checking import Check, NotYet, Seen, but
from course.lab.live import LiveBytes
from reference.nf4 import NF4Tensor, dequantize_nf4, quantize_nf4
from reference.qlora.product import NF4Product


def decode(packed: Tensor, absmax: Tensor, shape: tuple[int, int], block_size: int, dtype: torch.dtype) -> Tensor:
    """Ŵ, (out, in); the exercise gives this function."""
    return dequantize_nf4(NF4Tensor(packed, absmax, torch.Size(shape), dtype, block_size))


def over_rows(grad: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def nf4_product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    block_size: int,
    *,
    cast=lambda tensor: tensor,
    multiply=F.linear,
    keep=lambda x, packed, absmax, y: None,
    scales=lambda absmax: absmax,
    dtype=lambda grad: grad.dtype,
    through=torch.matmul,
    bias_gradient=over_rows,
    bias_wants_one=lambda ctx: ctx.needs_input_grad[3],
) -> Tensor:
    """The worked answer: decode, multiply, and decode again on the way back."""

    class NF4Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, packed, absmax, bias):
            y = multiply(x, decode(packed, absmax, shape, block_size, x.dtype), bias)  # (..., out)
            ctx.save_for_backward(packed, absmax)
            ctx.kept = keep(x, packed, absmax, y)
            return y

        @staticmethod
        def backward(ctx, grad):
            packed, absmax = ctx.saved_tensors
            weight = decode(packed, scales(absmax), shape, block_size, dtype(grad))
            grad_x = through(grad, weight) if ctx.needs_input_grad[0] else None  # (..., in)
            return grad_x, None, None, bias_gradient(grad) if bias_wants_one(ctx) else None

    return NF4Product.apply(cast(x), packed, absmax, bias if bias is None else cast(bias))


def by_the_reference(x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, shape: tuple, block_size: int) -> Tensor:
    return NF4Product.apply(x, bias, NF4Tensor(packed, absmax, torch.Size(shape), x.dtype, block_size))


def dense(x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, shape: tuple[int, int], block_size: int) -> Tensor:
    """Autograd by itself: it keeps the dequantized weight."""
    return F.linear(x, decode(packed, absmax, shape, block_size, x.dtype), bias)


def beside_the_weights(grad: Tensor, weight: Tensor) -> Tensor:
    """The input's gradient, after a product as large as the weight's, which nobody uses."""
    rows = grad.reshape(-1, grad.shape[-1])
    rows.T @ rows
    return grad @ weight


class Products(TorchDispatchMode):
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


def gradients(y: Tensor, leaves: tuple[Tensor, ...], direction: Tensor) -> list[Tensor | None]:
    if not y.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(y, leaves, direction.to(y.dtype), allow_unused=True))


def kept_bytes(answer, x: Tensor, arguments: tuple) -> int:
    with LiveBytes() as live:
        middle = x * 2.0  # not a leaf: it is freed as soon as nobody needs it
        y = answer(middle, *arguments)
        total = y.sum()  # a sum needs its argument's shape only
        del middle, y
        return live.bytes - total.nbytes


def in_16_bits(answer, x: Tensor, arguments: tuple, direction: Tensor) -> tuple[str, str]:
    """The dtype of the output; whether both gradients are right, as far as 16 bits go."""
    leaves = x.requires_grad_(), arguments[2]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    right = gradients(dense(exact[0], *arguments[:2], exact[1], *arguments[3:]), tuple(exact), direction.float())
    try:
        y = answer(leaves[0], *arguments)
    except RuntimeError as error:
        return f"a RuntimeError: {error}", "none"
    try:
        found = gradients(y, leaves, direction)
    except RuntimeError as error:
        return str(y.dtype), f"a RuntimeError: {error}"
    far = torch.finfo(x.dtype).eps  # twice what rounding at every step gives; in float16 less than a bfloat16 weight is off
    near = [isinstance(g, Tensor) and bool((g.float() - r).norm() < far * r.norm()) for g, r in zip(found, right, strict=True)]
    return str(y.dtype), "right" if all(near) else "wrong"


def observe(answer, seed: int) -> Seen:
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
    y = answer(x, *arguments)
    yield "the output of a (2, 3, 24) input", y
    if not isinstance(y, Tensor):
        return
    plain = answer(x, *arguments[:2], None, *arguments[3:])
    yield "the output without a bias", plain
    yield "the output requires a gradient where the input does", y.requires_grad
    if not y.requires_grad or y.shape != direction.shape:
        return
    with Products(n * n) as products:
        of_x, of_bias = gradients(y, (x, bias), direction)
    yield "the gradient of the input", of_x
    yield "the gradient of the bias", of_bias
    if isinstance(plain, Tensor) and plain.shape == direction.shape:
        try:
            found, how = gradients(plain, (x,), direction)[0], "runs"
        except RuntimeError:
            found, how = of_x, "raises a RuntimeError"
        yield "the backward without a bias", how
        yield "the gradient of the input without a bias", found
    wide, x_wide = make(40, 24, block_size=32), draw(7, 24).requires_grad_()  # input, output and packed weight differ in size
    try:
        y = answer(x_wide, *wide)
        yield "the output of a (40, 24) weight", y.detach()
        yield "the gradient through a (40, 24) weight", gradients(y, (x_wide,), y.detach())[0]
        yield "bytes kept for the backward, beside the packed weight", kept_bytes(answer, x_wide, wide)
    except RuntimeError:
        yield "the output of a (40, 24) weight", "a RuntimeError"
    yield "the backward computes a gradient of the weight", products.found
    one = draw(n).requires_grad_()
    try:
        y = answer(one, *arguments)
        of_one = gradients(y, (one, bias), direction[0, 0])
    except (RuntimeError, IndexError, ValueError) as error:
        raise NotYet(f"for an x without leading axes, (in,), your code raised {type(error).__name__}: {error}") from error
    yield "the output of a vector", y
    yield from zip(("the gradient of a vector", "the gradient of the bias beside a vector"), of_one, strict=True)
    frozen = answer(x, arguments[0], arguments[1], bias.detach(), *arguments[3:])
    yield "the gradient of the input when the bias is frozen", gradients(frozen, (x,), direction)[0]
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        found = in_16_bits(answer, draw(3, n, dtype=dtype), make(n, n, dtype), draw(3, n, dtype=dtype))
        yield from zip((f"with {name} the output is", f"with {name} the gradients are"), found, strict=True)


check = Check(
    task="y = x·Ŵᵀ + b and its gradient; nothing is kept but the packed weight",
    observe=observe,
    reference=nf4_product,
    second=by_the_reference,
    misconceptions={
        "the gradient goes through the transposed weight: y = x·Ŵᵀ gives ∂L/∂x = ∂L/∂y · Ŵ, without the transpose": but(
            through=lambda grad, weight: grad @ weight.T
        ),
        "the output is x·Ŵ: as in nn.Linear the weight is (out, in) and the product is with its transpose": but(
            multiply=lambda x, weight, bias: x @ weight if bias is None else x @ weight + bias
        ),
        "the bias is missing in the output: add it, or pass it to F.linear": but(multiply=lambda x, weight, bias: x @ weight.T),
        "the gradient of the input is missing: adapters in lower layers need it, ∂L/∂x = ∂L/∂y · Ŵ; return it first": but(
            through=lambda grad, weight: None
        ),
        "neither the input nor the bias gets a gradient: backward returns one value for each argument of forward, in their order, and "
        "None only where nothing is to be trained": but(through=lambda grad, weight: None, bias_gradient=lambda grad: None),
        "the bias gets no gradient: its gradient is that of the output, summed over all rows": but(bias_gradient=lambda grad: None),
        "the gradient of the bias is a mean over the rows: it is their sum": but(bias_gradient=lambda grad: over_rows(grad) / 6),
        "a dense copy of the weight is kept until the backward, by ctx or by autograd itself: 4 bytes a weight, for every layer; keep the "
        "packed weight, and decode it again": dense,
        "the input is kept for the backward: it would be needed for the weight's gradient only, and the weight is frozen": but(
            keep=lambda x, packed, absmax, y: x
        ),
        "codes and scales are copied before they are saved: save the tensors themselves, the layer holds them anyway": but(
            keep=lambda x, packed, absmax, y: (packed.clone(), absmax.clone())
        ),
        "the incoming gradient is passed on as it is: that is the straight-through estimator, for training what is rounded; here nothing "
        "is rounded on the way of x, and the product's gradient is ∂L/∂y · Ŵ": but(through=lambda grad, weight: grad.clone()),
        "the output is kept for the backward: the gradient of a product needs the weight only": but(keep=lambda x, packed, absmax, y: y),
        "with a bfloat16 input the backward fails: decode to the dtype of the incoming gradient, not always to float32": but(
            dtype=lambda grad: torch.float32
        ),
        "the gradient goes through the levels without their scales: multiply by absmax in the backward too": but(scales=torch.ones_like),
        "the backward computes a gradient of the weight: it is frozen, return None for it": but(through=beside_the_weights),
        "a bfloat16 input comes out as float32: dequantize to the dtype of x": but(cast=Tensor.float),
        "a float16 input is taken for bfloat16: dequantize to the dtype of x, whatever it is": but(
            cast=lambda tensor: tensor.bfloat16() if tensor.dtype == torch.float16 else tensor
        ),
        "without a bias the backward fails: torch wants None for an argument that was None; ask ctx.needs_input_grad": but(
            bias_wants_one=lambda ctx: True
        ),
    },
    rtol=1e-3,
    atol=1e-4,
)
