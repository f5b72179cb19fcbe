"""Exercise 5: A-GEM's projection."""

import torch
from torch import Tensor

from course.checking import Check, Seen, but


def dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return sum((a * b).sum() for a, b in zip(one, other, strict=True))


def at_once(new: list[Tensor], old: list[Tensor], step) -> list[Tensor]:
    return step(new, old)


def one_by_one(new: list[Tensor], old: list[Tensor], step) -> list[Tensor]:
    return [step([g], [ref])[0] for g, ref in zip(new, old, strict=True)]


def project(
    new: list[Tensor],
    old: list[Tensor],
    *,
    over=at_once,
    against=lambda along: along < 0,
    size=lambda old: dot(old, old),
    sign=-1,
    left=lambda taken, old: taken,
) -> list[Tensor]:
    """The worked answer: the part of the gradient along the old one is taken out, where it goes against it."""

    def step(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        along = dot(new, old)
        if not against(along):
            return [g.clone() for g in new]
        return left([g + sign * along / size(old) * ref for g, ref in zip(new, old, strict=True)], old)

    return over(new, old, step)


def in_one_vector(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    g, ref = (torch.cat([t.flatten() for t in ts]) for ts in (new, old))
    along = torch.clamp(g @ ref, max=0.0)
    flat = g - along * ref / torch.clamp(ref @ ref, min=1e-30)
    parts = flat.split([t.numel() for t in new])
    return [part.view_as(t) for part, t in zip(parts, new, strict=True)]


def as_list(found: object) -> object:
    return list(found) if isinstance(found, tuple) else found


def observe(answer, seed: int) -> Seen:
    g = torch.Generator().manual_seed(seed)

    def gradients() -> list[Tensor]:
        return [torch.randn(shape, generator=g) for shape in ((3, 2), (4,), (2, 1))]

    new, old = gradients(), [2 * each for each in gradients()]
    sign = 1.0 if dot(new, old) < 0 else -1.0
    old = [sign * each for each in old]
    yield "gradients that go against each other", as_list(answer([t.clone() for t in new], [t.clone() for t in old]))
    agree = [-each for each in old]
    yield "gradients that agree", as_list(answer([t.clone() for t in new], agree))
    mixed = [3 * old[0].abs(), -old[1].abs(), old[2]]  # parts that agree and parts that don't, the sum agrees
    mixed = mixed if dot(mixed, old) > 0 else [-each for each in mixed]
    yield "gradients that agree as a whole, and not in every part", as_list(answer(mixed, [t.clone() for t in old]))
    yield "an old gradient of zero", as_list(answer([t.clone() for t in new], [torch.zeros_like(t) for t in new]))


check = Check(
    task="A-GEM: what would undo the old task is taken out",
    observe=observe,
    reference=project,
    second=in_one_vector,
    misconceptions={
        "you project each parameter by itself. The condition and the projection are over all parameters as one vector": but(
            over=one_by_one
        ),
        "you project always. Where g·g_ref ≥ 0 the step helps the old task too: leave it as it is": but(
            against=lambda along: bool(along != 0)
        ),
        "you project where the gradients *agree*. The trouble is where g·g_ref < 0": but(against=lambda along: along > 0),
        "divide by ‖g_ref‖², not by ‖g_ref‖: the part along g_ref is (g·g_ref / ‖g_ref‖²) g_ref": but(
            size=lambda old: dot(old, old).sqrt()
        ),
        "the part along g_ref is added, not taken out: with g·g_ref < 0 that goes twice as far against the old task": but(sign=1),
        "the gradient is dropped where it goes against the old one. Only its part along g_ref has to go": but(
            left=lambda taken, old: [torch.zeros_like(t) for t in taken]
        ),
        "the step is replaced by the old task's gradient: keep g, without its part along g_ref": but(
            left=lambda taken, old: [ref.clone() for ref in old]
        ),
        "nothing is projected: where g·g_ref < 0 the part of g along g_ref has to go": but(against=lambda along: False),
    },
)
