"""Exercise 3: which parameters get no gradient, though they should."""

import functools
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from course.checking import Check, Seen, but
from reference.lora import inject_lora


def needs_one(p: Tensor) -> bool:
    return p.requires_grad


def cleared(model: nn.Module) -> dict[str, Tensor | None]:
    """All gradients are taken out, and returned."""
    found = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return found


def put_back(model: nn.Module, before: dict[str, Tensor | None]) -> None:
    for name, p in model.named_parameters():
        p.grad = before[name]


def copied(model: nn.Module) -> dict[str, Tensor | None]:
    """The old gradients stay where they are."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def run(loss: Tensor) -> None:
    if loss.requires_grad:
        loss.backward()


def silent_parameters(
    model: nn.Module, compute_loss: Callable[[], Tensor], *,
    take=cleared, run=run, wanted=needs_one, silent=lambda p: p.grad is None, restore=put_back,
) -> list[str]:  # fmt: skip
    """The worked answer."""
    before = take(model)
    run(compute_loss())
    names = [name for name, p in model.named_parameters() if wanted(p) and silent(p)]
    restore(model, before)
    return names


def by_hooks(model: nn.Module, compute_loss: Callable[[], Tensor]) -> list[str]:
    """A hook on each parameter tells whether a gradient came; .grad is put back afterwards."""
    before, came, hooks = {name: p.grad for name, p in model.named_parameters()}, set(), []
    for name, p in model.named_parameters():
        p.grad = None
        if p.requires_grad:
            hooks.append(p.register_post_accumulate_grad_hook(lambda _, name=name: came.add(name)))
    loss = compute_loss()
    if loss.requires_grad:
        loss.backward()
    for hook in hooks:
        hook.remove()
    put_back(model, before)
    return [name for name, p in model.named_parameters() if p.requires_grad and name not in came]


def zero_or_none(p: Tensor) -> bool:
    return p.grad is None or not p.grad.any()


class Model(nn.Module):
    """An embedding, blocks and a head; the blocks are checkpointed in torch's re-entrant way, if at all."""

    def __init__(self, blocks: int, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Sequential(OrderedDict(linear=nn.Linear(6, 6), act=nn.Tanh())) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True) if self.reentrant else block(x)
        return self.head(x)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(ids).square().mean()


def with_old(model: nn.Module) -> nn.Module:
    """As after an earlier step that reached everything."""
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    return model


def cases(seed: int) -> dict[str, nn.Module]:
    blocks = random.Random(seed).randrange(2, 5)
    trap, plain, lora, head_too, all_frozen = (Model(blocks, how) for how in (True, False, False, True, True))
    trap.embedding.requires_grad_(False)
    plain.embedding.requires_grad_(False)
    inject_lora(lora, r=2, lora_alpha=4, target_modules=["linear"])  # B is zero, so A's gradient is zero
    head_too.embedding.requires_grad_(False)
    all_frozen.embedding.requires_grad_(False)
    all_frozen.head.requires_grad_(False)
    return {
        "blocks checkpointed behind a frozen embedding": trap,
        "the same blocks without checkpointing": plain,
        "LoRA in the first step": lora,
        "old gradients from an earlier step": with_old(head_too),
        "a loss that requires no gradient": all_frozen,
    }


def observe(answer, seed: int) -> Seen:
    ids = torch.randint(11, (4, 5))
    for label, model in cases(seed).items():
        before = copied(model)
        try:
            names = answer(model, functools.partial(loss_of, model, ids))
        except NotImplementedError:
            raise
        except RuntimeError as error:
            names = f"a RuntimeError: {str(error).splitlines()[0]}"
        yield f"{label}: without a gradient", names
        yield f"{label}: every .grad afterwards", "as before" if same(before, copied(model)) else "what your code left there"


def same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


check = Check(
    task="the parameters that should train and get no gradient",
    observe=observe,
    reference=silent_parameters,
    second=by_hooks,
    misconceptions={
        "a gradient of zero is a gradient: lora_A's is zero in the first step, because B is; look for None": but(silent=zero_or_none),
        "frozen parameters are in the list: they should have no gradient; look at requires_grad": but(wanted=lambda p: True),
        "an old gradient was taken for a new one: set every .grad to None before the backward": but(take=copied),
        "the gradients of your backward are left in .grad: put back what was there": but(restore=lambda model, before: None),
        "these are the parameters that do have a gradient: the others were asked for": but(silent=lambda p: p.grad is not None),
        "a loss that requires no gradient has no backward: then every parameter that should train is silent": but(
            run=lambda loss: loss.backward()
        ),
        "no backward was run, so nothing has a gradient yet: compute the loss and call backward()": but(run=lambda loss: None),
        "all old gradients are gone afterwards: put back what was there": but(
            restore=lambda model, before: put_back(model, dict.fromkeys(before))
        ),
    },
)
