"""Gradient checkpointing: keep what goes into a block, and compute its inside again when needed.

    forward     y = f(x, θ)                    without a graph: nothing of the inside is kept
    backward    y = f(x, θ)                    once more, now with a graph
                ∂L/∂x, ∂L/∂θ from ∂L/∂y        through that graph, which is then dropped

So a block keeps x alone, and runs forward twice. The second run must be the first one again: the
same random numbers, the same autocast. Chen et al. 2016, "Training deep nets with sublinear memory
cost"; the trick is older (Griewank 1992).

Autograd sees one operation, whose inputs are f's tensor arguments *and the parameters that f
trains*. The second half matters. ``torch.utils.checkpoint(use_reentrant=True)`` shows autograd the
arguments alone: if none of them requires a gradient, as behind a frozen embedding, then neither
does y, and no parameter of the block ever gets a gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from reference.checkpointing.call import Call, as_leaves
from reference.checkpointing.captured import trained_by, unseen
from reference.checkpointing.surroundings import Surroundings


def checkpoint(
    function: Callable, *args: Any, preserve_rng_state: bool = True, **kwargs: Any
) -> Any:
    """``function(*args, **kwargs)``, of which only the tensors among the arguments are kept.

    Values and gradients are those without checkpointing, bit for bit, with dropout too.

    Args:
        function: a module, or a function. What it trains may be among its arguments or be captured:
            a module's parameters, modules and tensors in a closure, a partial or the globals.
        args, kwargs: anything; tensors in tuples, lists and dictionaries are found.
        preserve_rng_state: draw the same random numbers again. Off, it saves a little time.

    Returns:
        What ``function`` returns: tensors, also in tuples, lists and dictionaries.

    Raises:
        ValueError: ``function`` captures a tensor that is computed from trained ones.
        RuntimeError: in the backward, if ``function`` trains something that is neither an argument
            nor captured as above; if a parameter or an argument was changed in place since the
            forward; if the second run returns more or fewer values than the first; or if a second
            derivative is asked for.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    call, trained = Call(function, args, kwargs), trained_by(function)
    if not (trained or any(tensor.requires_grad for tensor in call.tensors)):
        return function(*args, **kwargs)  # nothing to train, so autograd keeps nothing either
    before = Surroundings([*call.tensors, *trained], preserve_rng_state)
    count, tensors = len(call.tensors), (*call.tensors, *trained)
    flat = _Checkpoint.apply(call.without_tensors(), before, count, *tensors)
    return tree_unflatten(flat, call.result)


class _Checkpoint(torch.autograd.Function):
    """Inputs: the call, its surroundings, how many arguments are tensors, these, the trained."""

    @staticmethod
    def forward(ctx, call: Call, before: Surroundings, count: int, *tensors: Tensor) -> tuple:
        given, ctx.trained = tensors[:count], tensors[count:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        ctx.call, ctx.before = call, before
        ctx.versions = [parameter._version for parameter in ctx.trained]
        flat, call.result = call.run_flat(given)  # autograd records nothing in here
        return tuple(flat)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph: the graph made here is gone afterwards
            raise RuntimeError("checkpoint has no second derivative: use checkpoint_by_hooks")
        if ctx.versions != [parameter._version for parameter in ctx.trained]:
            raise RuntimeError("a parameter was changed in place between the two runs")
        given = as_leaves(ctx.saved_tensors)
        with ctx.before.restored(), torch.enable_grad():
            flat, _ = ctx.call.run_flat(given)
        if len(flat) != len(grads):
            raise RuntimeError(f"{len(grads)} results in the forward, {len(flat)} computed again")
        used = [i for i, g in enumerate(grads) if g is not None and flat[i].requires_grad]
        inputs = [*given, *ctx.trained]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        found: list[Tensor | None] = [None] * len(inputs)
        if used and wanted:
            ys = [flat[i] for i in used]
            if (hidden := unseen(ys, inputs)) is not None:
                raise RuntimeError(
                    f"the function trains a tensor of shape {tuple(hidden.shape)} that checkpoint "
                    "cannot see: pass it as an argument, or its module in a closure"
                )
            gs = [grads[i] for i in used]
            computed = torch.autograd.grad(ys, [inputs[i] for i in wanted], gs, allow_unused=True)
            for i, grad in zip(wanted, computed, strict=True):
                found[i] = grad
        return None, None, None, *found
