"""The steps of a run, and how they go on after a kill with the same losses.

Nothing random is carried along: the rows of step k and the dropout of step k follow from the seed and from k alone. So a run's state is its
trained tensors, Adam's two moments of each, and a number. On a CPU a run that was killed and went on gives the losses of one that was not,
bit for bit; on a GPU up to the order in which its kernels add.

    loss = (1 − replay) · (mean over the targets of the new rows) + replay · (mean over the tokens of the old rows)

The two means are taken apart: an old row has a target at every token and an instruction two or three, so in one mean over all targets a
tenth of the rows would be most of the loss.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from course.capstone import checkpoint
from course.capstone.data import Rows
from course.capstone.plan import Plan
from course.units import CourseError
from reference.instruct import Example, pad_batch, target_loss

WARMUP, CLIP = 10, 1.0
FREE = (
    "out",
    "held_out",
    "memory_gb",
    "checkpoint_every",
    "new_tokens",
    "ask",
    "tolerance",
    "licence",
    "exports",
    "method",
    "checkpointing",
)


def train(
    model: nn.Module,
    plan: Plan,
    rows: Rows,
    folder: Path,
    base_hash: str,
    pad: int,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
) -> tuple[list[float], list[str]]:
    """Train what requires a gradient, from the newest checkpoint in ``folder`` or from the start.

    Args:
        folder: of the checkpoints.
        base_hash: of the weights under the adapter; a checkpoint of another base is refused.
        after_step: called with the number of steps done; for tests that interrupt.

    Returns:
        The loss of each step, and what was done besides, in sentences.

    Raises:
        CourseError: the loss is NaN or infinite; a checkpoint is of another run; the disk is full. What was written before stays.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=plan.lr, weight_decay=0.0)
    run = identity(plan, rows, base_hash)
    found, words = checkpoint.newest(folder)
    losses: list[float] = []
    if found is not None:
        check_same(found.run, run, folder)
        restore(trained, optimizer, found)
        losses = list(found.losses)
        words.append(f"went on from step {found.step} of {plan.steps}")
    if plan.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    where, order = next(iter(trained.values())).device, Order(len(rows.train), plan.seed)
    model.train()
    bar = tqdm(range(len(losses), plan.steps), initial=len(losses), total=plan.steps, desc="training", disable=not progress, leave=False)
    for step in bar:
        torch.manual_seed(1_000_003 * plan.seed + step)  # dropout
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * min(1.0, (step + 1) / WARMUP) * (1 - 0.9 * step / plan.steps)
        loss = step_loss(model, plan, rows, order, step, pad, where)
        if not math.isfinite(value := loss.item()):
            raise CourseError(diverged(value, step, plan, folder))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained.values(), CLIP)
        if not torch.isfinite(norm):
            raise CourseError(diverged(norm.item(), step, plan, folder, "gradient"))
        optimizer.step()
        losses.append(value)
        bar.set_postfix(loss=f"{value:.3f}")
        if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps:
            checkpoint.write(folder, step + 1, losses, state(trained, optimizer), run)
        if after_step:
            after_step(step + 1)
    if plan.checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    return losses, words


class Order:
    """Which rows a step takes: all of them once in a random order, then once more in another."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epochs = count, seed, {}

    def __call__(self, start: int, count: int) -> list[int]:
        """The places ``start`` … ``start + count − 1`` of the endless order."""
        return [self._epoch(place // self.count)[place % self.count] for place in range(start, start + count)]

    def _epoch(self, number: int) -> list[int]:
        if number not in self.epochs:
            generator = torch.Generator().manual_seed(7919 * self.seed + number)
            self.epochs = {number - 1: self.epochs.get(number - 1), number: torch.randperm(self.count, generator=generator).tolist()}
        return self.epochs[number]


def step_loss(model: nn.Module, plan: Plan, rows: Rows, order: Order, step: int, pad: int, where: torch.device) -> Tensor:
    old = round(plan.replay * plan.batch)
    fresh = [rows.train[i] for i in order(step * (plan.batch - old), plan.batch - old)]
    loss = part_loss(model, fresh, pad, where)
    if not old:
        return loss
    places = [(step * old + i) % len(rows.replay) for i in range(old)]
    again = [Example(ids := tuple(rows.replay[place].tolist()), ids) for place in places]
    return (1 - plan.replay) * loss + plan.replay * part_loss(model, again, pad, where)


def part_loss(model: nn.Module, examples: list[Example], pad: int, where: torch.device) -> Tensor:
    given = {name: tensor.to(where) for name, tensor in pad_batch(examples, pad).items()}
    labels = given.pop("labels")
    with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
        logits = model(**given, use_cache=False).logits  # (rows, longest, vocabulary)
    return target_loss(logits, labels)


# State


def state(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that a step reads beside the frozen weights and the plan."""
    found = {}
    for name, parameter in trained.items():
        moments = optimizer.state[parameter]
        found |= {f"value/{name}": parameter, f"exp_avg/{name}": moments["exp_avg"], f"exp_avg_sq/{name}": moments["exp_avg_sq"]}
    return found


@torch.no_grad()
def restore(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, found: checkpoint.Checkpoint) -> None:
    wanted = {f"{kind}/{name}" for name in trained for kind in ("value", "exp_avg", "exp_avg_sq")}
    if wanted != set(found.tensors):
        raise CourseError("the checkpoint holds other tensors than this run trains: give another --out")
    for name, parameter in trained.items():
        parameter.copy_(found.tensors[f"value/{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(found.step)),
            **{kind: found.tensors[f"{kind}/{name}"].to(parameter.device) for kind in ("exp_avg", "exp_avg_sq")},
        }


def identity(plan: Plan, rows: Rows, base_hash: str) -> dict:
    """What decides the losses; a run may go on only where all of it is the same."""
    kept = {key: value for key, value in plan.settings().items() if key not in FREE}
    return json.loads(json.dumps(kept | {"method": plan.method, "rows": rows.digest, "base's hash": base_hash}))


def check_plan(plan: Plan, folder: Path) -> None:
    """Refuse another plan before anything of the run in ``folder`` is touched, its base included.

    Raises:
        CourseError: what was changed.
    """
    found, _ = checkpoint.newest(folder)
    if found is not None:
        now = json.loads(json.dumps({key: value for key, value in plan.settings().items() if key not in FREE}))
        check_same({key: value for key, value in found.run.items() if key in now}, now, folder)


def check_same(before: dict, now: dict, folder: Path) -> None:
    if different := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        changed = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in different[:3])
        raise CourseError(f"{folder} holds a run with another plan ({changed}): give another --out, or take the plan back")


def diverged(value: float, step: int, plan: Plan, folder: Path, what: str = "loss") -> str:
    found, _ = checkpoint.newest(folder)
    kept = f"step {found.step} is kept in {folder}" if found else "no checkpoint was written yet"
    if step == 0:
        return f"the {what} is {value} at the first step; {kept}. No rate was at work yet: it is the base's weights, the dtype, or a row"
    return (
        f"the {what} is {value} at step {step + 1}; {kept}. It went well before, so the learning rate is too high: try lr = "
        f"{plan.lr / 3:.2g} with another --out"
    )
