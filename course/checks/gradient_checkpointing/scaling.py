"""Exercise 5: one update of a dynamic loss scale."""

import math

import torch
from torch import Tensor, nn

from course.checking import Check, Seen, but, unpacked
from reference.precision import LossScaler


def all_finite(grads: list[Tensor]) -> bool:
    return all(bool(grad.isfinite().all()) for grad in grads)


def none(grads: list[Tensor], scale: float) -> None:
    return None


def grown(scale: float) -> float:
    """Doubled, unless float32 has no such number."""
    return 2 * scale if 2 * scale < 2.0**128 else scale


def scaled_step(
    grads: list[Tensor], scale: float, good_steps: int, interval: int, *,
    good=all_finite, unscale=lambda grad, scale: grad / scale, skipped=none, backed_off=lambda scale: scale / 2,
    after_bad=lambda good_steps: 0, grown=grown, due=lambda good_steps, interval: good_steps == interval, after_growth=lambda interval: 0,
) -> tuple[list[Tensor] | None, float, int]:  # fmt: skip
    """The worked answer."""
    if not good(grads):
        return skipped(grads, scale), backed_off(scale), after_bad(good_steps)
    unscaled, good_steps = [unscale(grad, scale) for grad in grads], good_steps + 1
    if due(good_steps, interval):
        return unscaled, grown(scale), after_growth(interval)
    return unscaled, scale, good_steps


def by_the_scaler(grads: list[Tensor], scale: float, good_steps: int, interval: int) -> tuple[list[Tensor] | None, float, int]:
    """reference.precision's, with parameters that hold these gradients."""
    scaler = LossScaler(init_scale=scale, growth_interval=interval)
    scaler.good_steps = good_steps
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad.clone()
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scaler.step(optimizer)
    skipped = bool(scaler._infinite[id(optimizer)])
    scaler.update()
    return None if skipped else [p.grad for p in parameters], scaler.get_scale(), scaler.good_steps


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)

    def draw(bad: float | None = None, where: int = 0) -> list[Tensor]:
        grads = [torch.randn(3, 4, generator=g) * 100, torch.randn(5, generator=g) * 100]
        if bad is not None:
            grads[where].view(-1)[2] = bad
        return grads

    cases = {
        "a good step": (draw(), 1024.0, 3, 10),
        "the last good step of an interval": (draw(), 1024.0, 9, 10),
        "an infinity": (draw(math.inf), 1024.0, 3, 10),
        "an infinity in the last gradient": (draw(-math.inf, 1), 4096.0, 9, 10),
        "a NaN": (draw(math.nan, 1), 1024.0, 3, 10),
        "growth at every step": (draw(), 4.0, 0, 1),
        "the largest scale that float32 has": (draw(), 2.0**127, 0, 1),
        "a scale below one": (draw(), 0.25, 0, 5),
    }
    for label, (grads, *numbers) in cases.items():
        found, scale, good_steps = unpacked(
            answer(grads, *numbers), "the unscaled gradients or None, the scale, the good steps", object, object, object
        )
        yield f"gradients after {label}", found
        yield f"the scale after {label}", scale
        yield f"good steps in a row after {label}", good_steps


check = Check(
    task="a dynamic loss scale: divide, skip, back off, grow",
    observe=observe,
    reference=scaled_step,
    second=by_the_scaler,
    misconceptions={
        "a NaN went through: it compares false with everything; use torch.isfinite": but(
            good=lambda grads: not any(bool(grad.isinf().any()) for grad in grads)
        ),
        "an infinity went through: isnan() does not find it; use torch.isfinite": but(
            good=lambda grads: not any(bool(grad.isnan().any()) for grad in grads)
        ),
        "only the first gradient is looked at: one infinity anywhere spoils the step": but(good=lambda grads: all_finite(grads[:1])),
        "the gradients are multiplied by the scale: the loss was, so divide": but(unscale=lambda grad, scale: grad * scale),
        "the step is skipped and the scale stays: halve it, or the next step overflows as well": but(backed_off=lambda scale: scale),
        "after an infinity the good steps start from 0 again: they have to be in a row": but(after_bad=lambda good_steps: good_steps),
        "the scale grows after every good step: it does after `interval` of them in a row": but(due=lambda good_steps, interval: True),
        "after growing the count starts from 0, or the scale doubles at every step from then on": but(
            after_growth=lambda interval: interval
        ),
        "the scale became infinite: keep it where doubling leaves the range of float32, below 2^128": but(grown=lambda scale: 2 * scale),
        "a bad step must not move the weights: return None, not gradients of zero (Adam would still step)": but(
            skipped=lambda grads, scale: [torch.zeros_like(grad) for grad in grads]
        ),
        "the infinite gradients are returned: return None, so that the step is skipped": but(
            skipped=lambda grads, scale: [grad / scale for grad in grads]
        ),
        "the scale doubles one step late: after this step there are good_steps + 1 in a row": but(
            due=lambda good_steps, interval: good_steps > interval
        ),
    },
)
