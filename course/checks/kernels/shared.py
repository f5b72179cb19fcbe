"""How the checks of kernels look at them."""

import torch
from torch import Tensor

from course.checking import NotYet, Seen
from course.lab.kernel_trace import Trace

AROUND = 2048  # numbers before and behind a tensor that are none of its own: more than a tile strays, or it ends in another tensor


def amid(values: Tensor) -> Tensor:
    """The same values, contiguous, in the middle of a larger tensor: of NaN, or of 101 if they are integers."""
    fill = torch.nan if values.is_floating_point() else 101
    larger = torch.full((values.numel() + 2 * AROUND,), fill, dtype=values.dtype)
    own = larger[AROUND : AROUND + values.numel()].view(values.shape)
    own.copy_(values)
    return own


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """NaN everywhere, and all around."""
    return amid(torch.full(shape, torch.nan, dtype=dtype))


def traced(answer, *given) -> Trace:
    """What the kernels touched that ``answer(*given)`` launched.

    Raises:
        NotYet: none was launched.
    """
    with Trace() as trace:
        answer(*given)
    if not trace.launches:
        raise NotYet("no kernel was launched: write a function with @triton.jit and launch it with kernel[(programs,)](...)")
    return trace


def outside(trace: Trace) -> str:
    """What was touched that belongs to no tensor, in words that don't depend on how the work was shared out."""
    kinds = [kind for kind, verb in (("read", " reads "), ("written", " writes ")) if any(verb in line for line in trace.outside)]
    return f"{' and '.join(kinds)}" if kinds else "nothing"


def conflicts(trace: Trace) -> str:
    """Whether two programs want the same place, at least one of them to change it plainly."""
    return "yes" if trace.conflicts else "no"


def seen(trace: Trace, label: str, out: Tensor, *read: Tensor) -> Seen:
    """What all exercises are held to: no place outside, no race, every value, all of it by a kernel that reads what is given."""
    yield f"touched outside of the tensors, {label}", outside(trace)
    yield f"places of the result that no kernel wrote, {label}", trace.unwritten(out)
    yield f"{label}", out.clone()
    yield f"a race between programs, {label}", conflicts(trace)
    yield f"numbers given that no kernel read where they lie, {label}", sum(map(trace.unread, read))
