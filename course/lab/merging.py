"""Two adapters of the small world, "sql" and "clinic", made into one: by which method, and what each of them forgets.

An adapter is trained on one kind of text from the same tiny model. A method turns the two into one update of every weight, which is added
to the base; then the merged model is asked for both kinds, and for the general text that it was pre-trained on.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from course.lab import models, seed_everything
from course.lab.training import above_floor, train, warmup_cosine
from course.lab.world import World
from reference.lora import inject_lora
from reference.multi_lora import Adapter, combine_adapters, factors_of, merged_update

R, ALPHA, RATE, STEPS = 8, 16, 1e-3, 250
TASKS, ASKED = ("sql", "clinic"), ("sql", "clinic", "general")


@dataclass(frozen=True)
class Method:
    """How two adapters become one.

    Attributes:
        weights: of the adapters.
        settings: of :func:`reference.multi_lora.merged_update`, or of ``combine_adapters`` where ``as_factors``.
        as_factors: the result is again an adapter of some rank, not a dense update.
    """

    weights: tuple[float, float] = (1.0, 1.0)
    settings: Mapping = field(default_factory=dict)
    as_factors: bool = False
    random: bool = False


METHODS = {
    "sum": Method(),
    "mean": Method((0.5, 0.5)),
    "sum, cut to r = 8": Method(settings={"method": "svd", "rank": R}, as_factors=True),
    "linear on A and B": Method(settings={"method": "linear", "on": "factors"}, as_factors=True),
    "largest half": Method(settings={"method": "magnitude_prune", "density": 0.5}),
    "DARE": Method(settings={"method": "dare_linear", "density": 0.5}, random=True),
    "TIES": Method(settings={"method": "ties", "density": 0.5}),
    "TIES, largest fifth": Method(settings={"method": "ties", "density": 0.2}),
    "DARE and TIES": Method(settings={"method": "dare_ties", "density": 0.5}, random=True),
    "TIES on A and B": Method(settings={"method": "ties", "density": 0.5, "on": "factors"}, as_factors=True),
}


@functools.cache
def world() -> World:
    return World()


@functools.cache
def base() -> nn.Module:
    """The tiny model, on the CPU; copy it before you change it."""
    return models.load("tiny", where=torch.device("cpu"))[0]


def text(domain: str, step: int, seed: int, rows: int = 8) -> Tensor:
    """Training rows that no other step or seed has."""
    return world().sample(domain, rows, 32, 10_000 * (seed + 1) + step)


def adapter_for(domain: str, seed: int = 0, steps: int = STEPS, r: int = R) -> dict:
    """What a LoRA learns of one kind of text, or of both ("both": half of each batch, twice the rank), as factors."""
    seed_everything(seed)
    model, both = copy.deepcopy(base()), domain == "both"
    inject_lora(model, 2 * r if both else r, 2 * ALPHA if both else ALPHA)

    def batch(step: int) -> Tensor:
        return torch.cat([text(each, step, seed) for each in TASKS]) if both else text(domain, step, seed)

    train(model, batch, steps, RATE, schedule=warmup_cosine(), progress=False)
    return factors_of(model)


def update_of(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW of every layer."""
    return {name: factors.delta() for name, factors in adapter.items()}


def merged(adapters: tuple[Adapter, Adapter], method: Method, seed: int = 0) -> dict[str, Tensor]:
    """ΔW of every layer by ``method``."""
    settings = dict(method.settings) | ({"generator": torch.Generator().manual_seed(seed)} if method.random else {})
    if method.as_factors:
        return update_of(combine_adapters(adapters, method.weights, **settings))
    return {name: merged_update([a[name] for a in adapters], method.weights, **settings) for name in adapters[0]}


@torch.no_grad()
def updated(update: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the tiny model with ``update`` in its weights."""
    model = copy.deepcopy(base())
    for name, delta in update.items():
        model.get_submodule(name).weight.add_(delta)
    return model


def scores(update: Mapping[str, Tensor], rows: int = 64, above: Callable = above_floor) -> dict[str, float]:
    """Nats per token above the floor of the updated model, for each kind of text."""
    model = updated(update)
    return {domain: above(model, world(), domain, rows) for domain in ASKED}
