"""The re-entrant checkpoint is one autograd function whose only visible input is the block's.

Behind a frozen embedding that input needs no gradient, so the function's output needs none either, and the block's own parameters are
never reached: their gradients are None. The head behind it trains, and the loss falls. ``use_reentrant=False`` sees the parameters; or
the input is told to require a gradient, which is what ``enable_input_require_grads`` does.
"""

import random

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from course.cases import no_gradient as script
from course.cases.no_gradient import Block
from course.checking import Check, NotYet, Seen


def run_blocks(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """The worked answer."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def varied(through):
    """The worked answer with another way through a block."""

    def answer(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = through(block, x)
        return x

    return answer


def with_an_input_that_requires_a_gradient(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    return script.run_blocks(blocks, x)


def cut_at_each_block(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x.detach().requires_grad_(), use_reentrant=True)


def observe(answer, seed: int) -> Seen:
    rng = random.Random(seed)
    n, depth = rng.randrange(5, 9), rng.randrange(2, 5)
    blocks, runs = nn.ModuleList(Block(n) for _ in range(depth)), [0] * depth
    for i, block in enumerate(blocks):
        nn.init.normal_(block.B.weight)
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    x = torch.randn(6, n)
    torch.manual_seed(seed)
    y = answer(blocks, x)
    if not isinstance(y, Tensor):
        raise NotYet(f"return what comes out of the last block, not {type(y).__name__}")
    yield "the output", y.detach()
    head = torch.randn(n, requires_grad=True)
    (y @ head).sum().backward()
    yield "how often each block has run, after the backward pass", list(runs)
    for name, p in blocks.named_parameters():
        if "W" not in name:
            yield f"the gradient of {name}", torch.zeros(0) if p.grad is None else p.grad
    yield "no gradient reaches a frozen weight", all(p.grad is None for name, p in blocks.named_parameters() if "W" in name)


def thawed(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block.requires_grad_(True), x, use_reentrant=False)


check = Check(
    task="checkpointed blocks whose adapters get their gradients",
    observe=observe,
    reference=run_blocks,
    second=with_an_input_that_requires_a_gradient,
    misconceptions={
        "the re-entrant checkpoint sees the block's input alone: it needs no gradient behind a frozen embedding, so the block's adapters "
        "get none; use_reentrant=False, or an input that requires a gradient": script.run_blocks,
        "the blocks are not checkpointed any more: that trains, and keeps all activations, which is what did not fit": varied(
            lambda block, x: block(x)
        ),
        "each block's input is detached: only the last one gets its gradient; no input but the first may be a leaf": varied(
            cut_at_each_block
        ),
        "the second run draws another dropout than the first, so the gradient belongs to another pass: leave preserve_rng_state as it "
        "is": varied(lambda block, x: checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)),
        "the frozen weights were made trainable: the adapters are reached, and so is the whole base, with gradients of its size": varied(
            thawed
        ),
    },
)
