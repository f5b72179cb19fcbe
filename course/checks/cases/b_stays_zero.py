"""The optimizer was made before the adapters existed. It holds the old parameters, which are frozen since, and nobody steps the new ones.

An optimizer takes its list of parameters once. Whatever is put into the model later must be given to it, or it is made later.
"""

import random

import torch
from torch import Tensor, nn

from course.cases import b_stays_zero as script
from course.checking import Check, NotYet, Seen
from reference.lora import inject_lora


def factors(model: nn.Module, letters: str = "AB") -> list[Tensor]:
    return [p for name, p in model.named_parameters() if "lora_" in name and name[-1] in letters]


def prepare(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The worked answer: first the adapters, then the optimizer."""
    inject_lora(model, r=2, lora_alpha=4)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def varied(adapt=lambda model: inject_lora(model, r=2, lora_alpha=4), letters="AB", kind=torch.optim.AdamW, times=1.0):
    """The worked answer with a part replaced."""

    def answer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        adapt(model)
        trained = [p for name, p in model.named_parameters() if p.requires_grad and ("lora" not in name or name[-1] in letters)]
        return kind(trained, lr=times * lr)

    return answer


def by_a_later_group(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The early optimizer is given the factors when they are there."""
    optimizer = script.prepare(model, lr)
    optimizer.add_param_group({"params": factors(model)})
    return optimizer


def unfrozen(model: nn.Module) -> None:
    inject_lora(model, r=2, lora_alpha=4)
    model.requires_grad_(True)


def base_alone(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    optimizer = script.prepare(model, lr)
    model.requires_grad_(True)
    return optimizer


def draw_b(model: nn.Module) -> None:
    inject_lora(model, r=2, lora_alpha=4)
    for p in factors(model, "B"):
        nn.init.normal_(p)


def not_injected(model: nn.Module) -> None:
    """Nothing."""


def observe(answer, seed: int) -> Seen:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n = rng.randrange(6, 10)
    model, x = nn.Sequential(nn.Linear(n, 12), nn.Tanh(), nn.Linear(12, 3)), torch.randn(32, n, generator=g)
    with torch.no_grad():
        start = model(x)
    y, lr = start + torch.randn(32, 3, generator=g), rng.choice((0.01, 0.02, 0.04))
    optimizer = answer(model, lr)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise NotYet(f"return the optimizer, not {type(optimizer).__name__}")
    yield "the optimizer", type(optimizer).__name__
    yield "the model is the pretrained one before the first step", torch.allclose(model(x), start)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    script.train(model, optimizer, x, y, steps=3)
    kinds = {name: "lora_A" if "lora_A" in name else "lora_B" if "lora_B" in name else "the base" for name in before}
    yield "what three steps move", sorted({kinds[name] for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    yield "what three steps leave", sorted({kinds[name] for name, p in model.named_parameters() if torch.equal(p, before[name])})
    yield "the learning rates", sorted({round(group["lr"] / lr, 6) for group in optimizer.param_groups if factors(model)})


check = Check(
    task="an optimizer that holds the adapters",
    observe=observe,
    reference=prepare,
    second=by_a_later_group,
    misconceptions={
        "the optimizer was made before the adapters, and holds the frozen weights alone: make it after inject_lora": script.prepare,
        "everything was made trainable: the loss falls since the base moves with the adapters; only the factors may train": varied(
            adapt=unfrozen
        ),
        "the base was made trainable for the optimizer that holds it: the loss falls, and the adapters are still zero": base_alone,
        "the optimizer holds lora_B alone: lora_A stays what was drawn; give it both": varied(letters="B"),
        "lora_B was drawn at random so that it is not zero at the end: the model is another one before the first step": varied(
            adapt=draw_b
        ),
        "there are no adapters any more: that is full fine-tuning": varied(adapt=not_injected),
        "another optimizer was taken: the list that it holds was wrong, not its kind": varied(kind=torch.optim.SGD),
        "the learning rate was raised as well: the gradients were fine, they were given to nobody; leave it": varied(times=10),
    },
)
