"""One training loop for the whole course, and the measures that say what a model knows."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from course.lab.world import World


@dataclass
class History:
    """What happened in a run.

    Attributes:
        losses: cross-entropy of each step's batch, nats per predicted token, before the step.
        evaluations: (steps done, what ``evaluate`` gave); the first is before any step.
        seconds: wall time of the steps, evaluations not counted.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it: ids (rows, length) -> scalar, in float32 whatever the model's dtype."""
    logits = model(input_ids=ids[:, :-1]).logits  # (rows, length - 1, vocabulary)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(
    model: nn.Module,
    batch: Callable[[int], Tensor],
    steps: int,
    lr: float,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    evaluate: Callable[[], float] | None = None,
    every: int = 0,
    schedule: Callable[[float], float] | None = None,
    progress: bool = True,
    clip: float = 1.0,
) -> History:
    """Train the parameters that require gradients; AdamW without weight decay unless another optimizer is given.

    Args:
        batch: ``batch(step)`` returns token ids (rows, length).
        lr: learning rate; with ``optimizer`` it replaces the optimizer's own.
        evaluate: called before the first step, every ``every`` steps (0: never between) and after the last.
        schedule: factor on ``lr`` as a function of the share of steps done, 0 to 1; constant if None.
        clip: longest gradient (global norm); 0 turns clipping off.

    Raises:
        ValueError: nothing requires a gradient.
        FloatingPointError: the loss is NaN or infinite; says at which step.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter requires a gradient: inject adapters or unfreeze the model first")
    optimizer = optimizer or torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    where, history = trainable[0].device, History()
    was_training = model.training
    if evaluate:
        history.evaluations.append((0, evaluate()))
    model.train()
    for step in tqdm(range(steps), desc="training", unit="step", disable=not progress, leave=False):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr * (schedule(step / steps) if schedule else 1.0)
        loss = next_token_loss(model, batch(step).to(where))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower lr ({lr}) or look for bad inputs")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(trainable, clip)
        optimizer.step()
        history.losses.append(loss.item())
        history.seconds += time.perf_counter() - started
        if evaluate and ((every and (step + 1) % every == 0) or step + 1 == steps):
            history.evaluations.append((step + 1, evaluate()))
            model.train()
    model.train(was_training)
    return history


def warmup_cosine(warmup: float = 0.05, floor: float = 0.1) -> Callable[[float], float]:
    """A schedule: linear up over the first ``warmup`` share of the steps, then half a cosine down to ``floor``."""

    def factor(done: float) -> float:
        if done < warmup:
            return max(done, 1e-3) / warmup
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))

    return factor


@torch.no_grad()
def cross_entropy(model: nn.Module, ids: Tensor, rows_at_once: int = 64) -> float:
    """Mean nats per predicted token of ``ids`` (rows, length), without dropout; the model's mode is kept."""
    was_training = model.training
    model.eval()
    where = next(model.parameters()).device
    total = sum(next_token_loss(model, part.to(where)).item() * len(part) for part in ids.split(rows_at_once))
    model.train(was_training)
    return total / len(ids)


def above_floor(model: nn.Module, world: World, domain: str, rows: int = 64, length: int = 48, seed: int = 1_000_003) -> float:
    """How far the model is from the best possible, in nats per token: its loss less the exact one *on the same fresh rows*.

    Taking both on the same rows removes most of the sampling noise: the source's own surprise is in both. Around 0 means that nothing is
    left to learn; on a sample it can be slightly negative.
    """
    ids = world.sample(domain, rows, length, seed)
    return cross_entropy(model, ids) + world.log_probs(domain, ids).mean().item()


@torch.no_grad()
def fact_accuracy(model: nn.Module, world: World) -> float:
    """Share of the world's facts for which the model's likeliest next word is the right one."""
    was_training = model.training
    model.eval()
    where, right = next(model.parameters()).device, 0
    questions, answers = zip(*world.facts(), strict=True)
    ids = [world.tokenizer(question).input_ids for question in questions]
    for length in sorted({len(row) for row in ids}):  # equal lengths together: no padding, no mask
        chosen = [i for i, row in enumerate(ids) if len(row) == length]
        logits = model(input_ids=torch.tensor([ids[i] for i in chosen], device=where)).logits[:, -1]
        right += sum(world.vocabulary[best] == answers[i] for best, i in zip(logits.argmax(-1).tolist(), chosen, strict=True))
    model.train(was_training)
    return right / len(answers)
