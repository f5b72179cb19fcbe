"""Exercise 2: checkpoint as an autograd function."""

import contextlib

import torch
from torch import Tensor, nn

from course.checking import Check, NotYet, Seen, but
from course.lab.live import LiveBytes
from reference.checkpointing import checkpoint as by_the_reference

WIDTH, ROWS = 8, 512


def of_all(y: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, grad))


def and_accumulated(y: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Each gradient twice: by backward() into .grad, and returned."""
    found = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    torch.autograd.backward(y, grad)
    return list(found)


def checkpoint(
    block: nn.Module, x: Tensor, *,
    trained=lambda block: [p for p in block.parameters() if p.requires_grad],
    keep=lambda ctx, y: None,
    state=torch.get_rng_state,
    around=torch.random.fork_rng,
    fresh=lambda x, needed: x.detach().requires_grad_(needed),
    recording=torch.enable_grad,
    gradients=of_all,
    returned=lambda found: found,
) -> Tensor:  # fmt: skip
    """The worked answer."""
    parameters = trained(block)

    class Checkpoint(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            ctx.state = state()
            y = block(x)  # autograd records nothing in here
            keep(ctx, y)
            return y

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
            x = fresh(ctx.saved_tensors[0], ctx.needs_input_grad[0])
            with recording(), around():
                if ctx.state is not None:
                    torch.set_rng_state(ctx.state)
                y = block(x)
            inputs = [x, *parameters][not x.requires_grad :]
            found = gradients(y, inputs, grad)
            return tuple(returned(found if x.requires_grad else [None, *found]))

    return Checkpoint.apply(x, *parameters)


class _Aside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, state, x):
        ctx.block, ctx.state = block, state
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng():
            torch.set_rng_state(ctx.state)
            y = ctx.block(x)
        torch.autograd.backward(y, grad)
        return None, None, x.grad


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    """What torch's re-entrant variant does: the parameters' gradients are accumulated on the side."""
    return _Aside.apply(block, torch.get_rng_state(), x)


def not_at_all(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def a_block(g: torch.Generator) -> nn.Sequential:
    """Dropout within; a linear layer is frozen."""
    layers = nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4 * WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)
    )
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 3)
    layers[3].requires_grad_(False)
    return layers


def kept(answer, block: nn.Module, g: torch.Generator) -> str:
    """In words: sizes of a generator's state and of small things differ from answer to answer."""
    x = torch.randn(ROWS, WIDTH, generator=g).requires_grad_()
    with LiveBytes() as live:
        middle = x * 2.0
        size, y = middle.nbytes, answer(block, middle)
        total = y.sum()
        del middle, y
        count = live.bytes - total.nbytes
    if count < size:
        return "less than the input"
    return "the input" if count < 1.6 * size else f"{round(count / size)} times as many bytes as the input has"


def after_backward(y: Tensor, direction: Tensor) -> str:
    """Runs the backward; in words what came of it."""
    try:
        y.backward(direction)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        return f"raises a RuntimeError: {str(error).splitlines()[0]}"
    return "runs"


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)
    block, x, direction = a_block(g), torch.randn(ROWS, WIDTH, generator=g), torch.randn(ROWS, WIDTH, generator=g)
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}

    def fresh() -> None:
        torch.manual_seed(seed)
        block.zero_grad(set_to_none=True)

    def found() -> dict[str, Tensor | None]:
        return {name: p.grad for name, p in trained.items()}

    fresh()
    leaf = x.clone().requires_grad_()
    y = answer(block, leaf)
    yield "the output", y
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return
    yield "kept for the backward", kept(answer, block, g)
    fresh()
    y = answer(block, leaf)
    torch.rand(3)  # a training step goes on drawing before its backward
    yield "the backward", after_backward(y, direction)
    yield "the gradient of x", leaf.grad
    yield "the gradients of the parameters", found()
    yield "a random number drawn after the backward", torch.rand(())
    fresh()
    y = answer(block, x)
    yield "where x needs no gradient, the output requires one", y.requires_grad
    if y.requires_grad:
        yield "the backward where x needs no gradient", after_backward(y, direction)
        yield "the gradients where x needs none", found()
    fresh()
    chain = answer(block, answer(block, leaf.detach().clone().requires_grad_()))
    yield "the backward of the block used twice", after_backward(chain, direction)
    yield "the gradients of the block used twice", found()
    with torch.no_grad(), contextlib.suppress(RuntimeError):
        yield "under no_grad the output requires a gradient", answer(block, leaf).requires_grad
    if any(p.grad is not None for p in block[3].parameters()):
        raise NotYet("a frozen parameter has a gradient: pass autograd only those that require one")


check = Check(
    task="checkpoint: the input is kept, the rest is computed again, and everything has its gradient",
    observe=observe,
    reference=checkpoint,
    second=by_the_reference,
    misconceptions={
        "nothing is checkpointed: the block runs where autograd records it; call it inside the function's forward": not_at_all,
        "the second run draws other random numbers, so dropout has another mask: keep torch.get_rng_state() and set it again": but(
            state=lambda: None
        ),
        "after the backward the random numbers go on from the second run's: put the generator back, torch.random.fork_rng() does": but(
            around=contextlib.nullcontext
        ),
        "where x needs no gradient the parameters get none: autograd sees x alone; pass the parameters to apply as well, and return "
        "their gradients": reentrant,
        "the second run builds no graph: backward() runs without one, unless you say `with torch.enable_grad()`": but(
            recording=contextlib.nullcontext
        ),
        "the second run's graph goes on into the layers below, whose backward is still to come: run the block on x.detach()": but(
            fresh=lambda x, needed: x
        ),
        "the incoming gradient is not used: pass it to torch.autograd.grad as grad_outputs": but(
            gradients=lambda y, inputs, grad: of_all(y, inputs, torch.ones_like(grad))
        ),
        "the parameters have no gradients: return one for each argument of apply, in their order": but(
            returned=lambda found: [found[0], *[None] * (len(found) - 1)]
        ),
        "x has no gradient: the layers below need it; return it first": but(returned=lambda found: [None, *found[1:]]),
        "the output is kept too: the backward needs the input alone": but(keep=lambda ctx, y: setattr(ctx, "y", y.clone())),
        "the gradients of the parameters are there twice: backward() adds them to .grad, and they are returned as well; use "
        "torch.autograd.grad": but(gradients=and_accumulated),
    },
    rtol=1e-3,
    atol=1e-5,
)
