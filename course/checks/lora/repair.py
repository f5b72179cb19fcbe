"""A training run that learns nothing, mended."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from course.checking import Check, but
from course.checks.lora.shared import nothing, trainable
from reference.lora import LoRALinear, inject_lora


def factors(model: object, letter: str = "") -> list[Tensor]:
    return [p for name, p in model.named_parameters() if f"lora_{letter}" in name] if isinstance(model, nn.Module) else []


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def adapt(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, *,
    prepare=nothing, held=lambda model, before: factors(model), step=step, returned=lambda model: model,
) -> nn.Module:  # fmt: skip
    """The worked answer. ``held``: what the optimizer holds, of the model as it is and the parameters that it had before the adapters."""
    before = list(model.parameters())
    inject_lora(model, r=2, lora_alpha=6)  # freezes the base; lora_A is random, lora_B is zero
    prepare(model)
    optimizer = torch.optim.AdamW(held(model, before), lr=lr)
    for _ in range(steps):
        step(optimizer, F.mse_loss(model(x), y))
    return returned(model)


def by_autograd(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> nn.Module:
    """Gradients that are never accumulated."""
    inject_lora(model, 2, 6, target_modules="all-linear")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    for _ in range(steps):
        for p, gradient in zip(trained, torch.autograd.grad(F.mse_loss(model(x), y), trained), strict=True):
            p.grad = gradient
        optimizer.step()
    return model


LR = 0.05


def observe(answer, seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(64, 8, generator=g)
    with torch.no_grad():
        y = model(x) + x @ torch.randn(8, 1, generator=g) @ torch.randn(1, 4, generator=g) / 3
    original, weights = copy.deepcopy(model), list(model.parameters())
    runs = {40: [], 1: [], 2: []}  # steps -> the optimizer of each step that was taken
    results = []
    watch = register_optimizer_step_post_hook(lambda optimizer, *_: runs[steps].append(optimizer))
    try:
        for steps, each in zip(runs, (model, copy.deepcopy(original), copy.deepcopy(original)), strict=True):
            torch.manual_seed(seed)  # the same start: what is the same after two steps as after 40 does not train
            results.append(answer(each, x, y, steps, LR))
    except NotImplementedError:  # a RuntimeError too
        raise
    except RuntimeError as error:
        found = "backward found nothing to train" if "does not require grad" in str(error) else str(error)
        return {"what your function returns": "the model", "the run": found}
    finally:
        watch.remove()
    result = results[0]
    if not isinstance(result, nn.Module):
        return {"what your function returns": None if result is None else f"a {type(result).__name__}"}
    obeyed = all(len(stepped) in (0, steps) for steps, stepped in runs.items())
    adapters = {name: m for name, m in result.named_modules() if isinstance(m, LoRALinear)}
    # AdamW's first step moves no number by more than lr, but for its last digits: a factor that was zero is within lr of it
    pairs = zip(factors(results[1], "A"), factors(results[1], "B"), strict=True)
    from_zero = all(min(a.abs().max(), b.abs().max()) < 1.02 * LR for a, b in pairs)
    return {
        "what your function returns": "the model",
        "the run": outcome(results, obeyed, original, weights, x, y),
        "what trains": sorted({name.split(".")[-1] for name, p in result.named_parameters() if p.requires_grad}),
        "the adapters": [f"{name}: r = {m.r}, α/r = {m.scaling:g}" for name, m in adapters.items()],
        f"for 40, 1 and 2 steps at lr = {LR}, the optimizer takes": work_of(runs),
        "before the first step the model is": "the pretrained one" if from_zero else "another: neither factor starts at zero",
    }


def outcome(results: list[nn.Module], obeyed: bool, original: nn.Module, weights: list[Tensor], x: Tensor, y: Tensor) -> str:
    """What became of the run of 40 steps; ``weights`` are the parameters of the model that it was given."""
    result, once, twice = results
    a, b = factors(result, "A"), factors(result, "B")
    if not a + b:
        return "there is no adapter in the model"
    own = [p for name, p in result.named_parameters() if "lora_" not in name]  # a copy's, if the model was copied
    if any(not torch.equal(p, old) for found in (weights, own) for p, old in zip(found, original.parameters(), strict=False)):
        return "the base weights moved"
    if not any(p.any() for p in a + b):
        return "lora_A and lora_B are both still zero"
    if not any(p.any() for p in b):
        alive = any(p.grad is not None and p.grad.any() for p in b)
        return "lora_B never moved" + (", though it has gradients" if alive else ", and it has no gradients")
    if obeyed and all(torch.equal(p, early) for p, early in zip(a, factors(twice, "A"), strict=False)):
        return "lora_A never moved"
    with torch.no_grad():
        before, after = (F.mse_loss(model(x), y) for model in (original, result))
    if after < 0.5 * before:
        return "it learned"
    return "the factors moved, but the error did not halve" + ": the gradients of the steps are added up" * added_up(once, twice, x, y)


def added_up(once: nn.Module, twice: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Do two steps leave the sum of their gradients in lora_B.grad, instead of the second one's?"""
    first, both = ([p.grad for p in factors(model, "B")] for model in (once, twice))
    if not first or any(gradient is None for gradient in first + both) or "lora_B" not in trainable(once):
        return False
    second = torch.autograd.grad(F.mse_loss(once(x), y), factors(once, "B"))
    return all(torch.allclose(now, old + new, rtol=1e-3, atol=1e-6) for now, old, new in zip(both, first, second, strict=True))


def work_of(runs: dict[int, list[torch.optim.Optimizer]]) -> str:
    """From the optimizer of each step that was taken in each run: how many steps, of which kind, at which rate."""
    stepped = [optimizer for run in runs.values() for optimizer in run]
    kinds = sorted({type(optimizer).__name__ for optimizer in stepped})
    rates = sorted({float(group["lr"]) for optimizer in stepped for group in optimizer.param_groups})
    several = ", each of a new one" if any(len({id(optimizer) for optimizer in run}) > 1 for run in runs.values()) else ""
    counts = ", ".join(str(len(run)) for run in runs.values())
    return f"{counts} steps of {' and '.join(kinds) or 'none'}, lr {', '.join(f'{rate:g}' for rate in rates)}{several}"


def zero_both(model: nn.Module) -> None:
    for p in factors(model):
        nn.init.zeros_(p)


def draw_B(model: nn.Module) -> None:
    for p in factors(model, "B"):
        nn.init.normal_(p, std=0.5)


def clear_between(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()


def clear_never(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    optimizer.step()


check = Check(
    task="a training run that learns: adapters in the optimizer, one factor random, adapters unfrozen, gradients alive at the step",
    observe=observe,
    reference=adapt,
    second=by_autograd,
    misconceptions={
        "the optimizer does not hold lora_B, whose gradients nobody uses: made before the adapters existed, it holds the frozen weights "
        "alone; build it after inject_lora": but(held=lambda model, before: before),
        "lora_A never moves: does the optimizer hold lora_B alone? Then the update can only use the r directions of the input that lora_A "
        "drew at random; give it both": but(held=lambda model, before: factors(model, "B")),
        "both factors are set to zero: the gradient of each is a product with the other, so nothing will ever move; leave lora_A "
        "random": but(prepare=zero_both),
        "both factors are drawn at random: then the first step starts from a model that is not the pretrained one; one of them must be "
        "zero, and inject_lora leaves lora_B so": but(prepare=draw_B),
        "everything is frozen after the adapters were put in, the adapters too: backward has nothing to train; inject_lora has frozen the "
        "base already": but(prepare=lambda model: model.requires_grad_(False)),
        "the gradients are cleared between backward() and step(): the optimizer sees none; clear them before backward()": but(
            step=clear_between
        ),
        "the gradients are never cleared: backward() adds to what is in .grad, so that every step takes the sum of all steps before; call "
        "optimizer.zero_grad() before each backward()": but(step=clear_never),
        "your function returns None: it must return the model that it trained; end it with `return model`": but(returned=nothing),
        "the base trains too: that is full fine-tuning with extra factors; only lora_A and lora_B may require gradients": but(
            prepare=lambda model: model.requires_grad_(True), held=lambda model, before: model.parameters()
        ),
    },
)
