"""What unit 08 states: bytes by formula, recorded steps, small experiments with the trap, with dropout, and with sixteen bits."""

import contextlib
import copy
import functools
import math
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torchs
from torch.utils.flop_counter import FlopCounterMode

from course.lab import models, recorded, seed_everything, training
from course.lab.live import LiveBytes
from course.lab.world import World
from reference.checkpointing import activation_cost, checkpoint, checkpoint_by_hooks, extra_runs, optimal_segments, repetitions
from reference.llama import Llama
from reference.llama.model import Layer, rotation
from reference.lora import inject_lora
from reference.memory import SHAPES
from reference.memory.activations import Run, layer, layer_input
from reference.model_shapes import ModelShape
from reference.precision import add_kahan_, add_stochastic_

CARD = "h200"

# Bytes


def _run(recipe: str, tokens: int = 2048) -> Run:
    if recipe == "full":
        return Run(1, tokens, compute_bytes=2, trained=True)
    targets = tuple(SHAPES["Llama-2-7B"].linears)
    return Run(1, tokens, compute_bytes=2, trained=False, targets=targets, rank=16, adapter_bytes=2)


def layer_mb(part: str = "all", recipe: str = "full", model: str = "Llama-2-7B") -> float:
    """What one layer keeps of 2,048 tokens in 16 bits, MB; of that a part, by a word of its name.

    Args:
        part: "all", "norm", "attention" (its inputs, its output, the log-sums), "mlp" or "input", the layer's own.
        recipe: "full", or "LoRA" with r = 16 on all linears.
    """
    groups = layer(SHAPES[model], _run(recipe))
    words = {
        "norm": ("norm",),
        "attention": ("q, k, v", "queries", "softmax", "attention"),
        "mlp": ("gate", "down"),
        "A·x": ("A·x",),
        "all": ("",),
    }
    if part == "input":
        return layer_input(SHAPES[model], _run(recipe)) / 1e6
    return sum(count for name, count in groups.items() if any(word in name for word in words[part])) / 1e6


def ratio(model: str = "Llama-2-7B", recipe: str = "full") -> float:
    """ρ: what a layer keeps, over its input."""
    return layer_mb("all", recipe, model) / layer_mb("input", recipe, model)


def all_layers_gb(model: str = "Llama-2-7B", checkpointed: bool = False) -> float:
    """What all layers keep of 2,048 tokens, GB: everything, or with one segment per layer the inputs and one layer in full."""
    count = SHAPES[model].layers
    if not checkpointed:
        return count * layer_mb(model=model) / 1e3
    return activation_cost(count, count, ratio(model)) * layer_mb("input", model=model) / 1e3


def cost(layers: int, segments: int, ratio: float = 1.0) -> float:
    """k + ρ·⌈N/k⌉, in inputs of a layer."""
    return activation_cost(layers, segments, ratio)


def best(layers: int, ratio: float = 1.0) -> int:
    """The number of segments that needs the least."""
    return optimal_segments(layers, ratio)


def best_for(model: str) -> int:
    """The same for a model's layers, all of them trained."""
    return best(SHAPES[model].layers, ratio(model))


def revolve(layers: int, slots: int, what: str) -> int:
    """ "runs" of layers in all, "extra" ones beyond N, or "repetitions", the most that one layer is run again."""
    extra = extra_runs(layers, slots)
    return {"runs": extra + layers, "extra": extra, "repetitions": repetitions(layers, slots)}[what]


# Recorded


def segments_gb(segments: int, what: str = "peak") -> float:
    """64 layers in so many segments on an H200: "kept" by the forward, "peak", "predicted"; GB."""
    return recorded.row("checkpointing", CARD, work="memory", segments=segments)[what] / 1e9


def worst_prediction_percent() -> float:
    """The largest distance of the prediction from a measured peak, over all numbers of segments."""
    rows = [row for row in recorded.load("checkpointing", CARD)["result"]["rows"] if row["work"] == "memory"]
    return max(100 * abs(row["ratio"] - 1) for row in rows)


def recorded_ratio() -> float:
    """ρ of the layers that were measured."""
    row = recorded.row("checkpointing", CARD, work="memory", segments=64)
    return row["layer_bytes"] / row["input_bytes"]


def step(how: str, what: str = "seconds") -> float:
    """A step of 64 layers, all weights trained, with one segment per layer: "seconds", "extra_percent", "over_torch"."""
    return recorded.row("checkpointing", CARD, work="time", how=how)[what]


def within_two_percent_of_torch() -> bool:
    """Either way of doing it beside torch's same way."""
    return all(step(how, "over_torch") <= 1.02 for how in ("ours", "ours, hooks"))


def gradients_are_equal() -> bool:
    """All ways, full and LoRA, bit for bit on a GPU."""
    rows = [row for row in recorded.load("checkpointing_lora", CARD)["result"]["rows"] if row["work"] == "equal"]
    return len(rows) == 10 and all(row["equal"] for row in rows)


def offload(how: str, what: str = "seconds") -> float:
    """Four layers of 7B on an H200: "seconds", "limit", "first" (the first step); "peak" and "activations" in GB."""
    row = recorded.row("activation_offloading", CARD, how=how)
    return row[what] / (1 if what in ("seconds", "limit", "first") else 1e9)


def offload_ms(how: str, what: str = "seconds") -> float:
    """The same in milliseconds."""
    return 1e3 * offload(how, what)


def offload_times(how: str, over: str = "save_on_cpu", what: str = "seconds") -> float:
    """What ``over`` takes, over what ``how`` takes."""
    return offload(over, what) / offload(how, what)


def bus_gb() -> float:
    """A large pinned copy out of the GPU, GB per second."""
    return recorded.load("activation_offloading", CARD)["result"]["bytes_per_second"]["out"] / 1e9


def offloading_within_bars() -> bool:
    """Faster than save_on_cpu, and its peak of a step not passed by more than 10 percent."""
    return offload("ours") < offload("save_on_cpu") and offload("ours", "peak") <= 1.1 * offload("save_on_cpu", "peak")


def way(how: str, what: str = "seconds") -> float:
    """A step of 16 layers in this precision: "seconds"; "held", "kept" and "peak" in GB."""
    row = recorded.row("precision_step", CARD, way=how)
    return row[what] / (1 if what == "seconds" else 1e9)


def way_ms(how: str) -> float:
    """Milliseconds of the step."""
    return 1e3 * way(how)


def way_bytes(how: str) -> float:
    """Held between steps, bytes per parameter."""
    row = recorded.row("precision_step", CARD, way=how)
    return row["held"] / row["parameters"]


def bf16_loss(way: str, rate: float) -> float:
    """Nats per token above the floor after 80 steps, mean of three seeds."""
    rows = recorded.load("bf16_training", "cpu")["result"]["rows"]
    (row,) = [row for row in rows if row["way"] == way and math.isclose(row["rate"], rate)]
    return statistics.fmean(row["losses"])


def bf16_before() -> float:
    """The same before any step."""
    return recorded.load("bf16_training", "cpu")["result"]["before"]


def bf16_unmoved_percent(way: str, rate: float) -> float:
    """Weights that the last step left as they were."""
    rows = recorded.load("bf16_training", "cpu")["result"]["rows"]
    (row,) = [row for row in rows if row["way"] == way and math.isclose(row["rate"], rate)]
    return row["unmoved_percent"]


# Operations


@functools.cache
def more_operations_percent(recipe: str, stops_early: bool = False) -> float:
    """Products of a checkpointed layer's forward and backward, beyond those without checkpointing; a small Llama layer on a CPU.

    Args:
        recipe: "full", or "LoRA" with r = 4 on all linears.
        stops_early: the second run ends with the last kept tensor, as torch's non-re-entrant variant does.
    """
    one, x = Layer(ModelShape("one", 128, 1, 4, 4, 32, 344, 100), 1e-5), torch.randn(2, 64, 128, requires_grad=True)
    positions, counts = rotation(64, 32, 1e4, x.device, x.dtype), []
    if recipe == "LoRA":
        inject_lora(one, 4, 8)
    for how in ("none", "non-re-entrant" if stops_early else "re-entrant"):
        with FlopCounterMode(display=False) as counter:
            HOWS[how](one, x, positions).sum().backward()
        counts.append(counter.get_total_flops())
    return 100 * (counts[1] / counts[0] - 1)


# The trap


@functools.cache
def tiny_llama() -> Llama:
    """The course's tiny model as reference.llama, every layer called by hand below."""
    theirs, _ = models.load("tiny", where=torch.device("cpu"))
    ours = Llama(ModelShape.from_config(theirs.config, "tiny"), theirs.config.rope_parameters["rope_theta"], theirs.config.rms_norm_eps)
    ours.load_state_dict(theirs.state_dict())
    return ours


HOWS: dict[str, Callable] = {
    "none": lambda layer, x, positions: layer(x, positions),
    "re-entrant": functools.partial(torchs, use_reentrant=True),
    "non-re-entrant": functools.partial(torchs, use_reentrant=False),
    "ours": checkpoint,
}


def loss_of(model: Llama, ids: Tensor, how: Callable) -> Tensor:
    """Next-token loss, each layer through ``how``."""
    x = model.model.embed_tokens(ids[:, :-1])
    positions = rotation(x.shape[1], model.shape.head_dim, model.model.theta, x.device, x.dtype)
    for each in model.model.layers:
        x = how(each, x, positions)
    return F.cross_entropy(model.lm_head(model.model.norm(x)).flatten(0, 1), ids[:, 1:].flatten())


@functools.cache
def _trapped(how: str, steps: int = 12) -> tuple[float, float, int, int]:
    """First and last loss, how many parameters of the blocks have no gradient, and how many there are."""
    model, world = copy.deepcopy(tiny_llama()), World()
    model.model.embed_tokens.requires_grad_(False)
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model, world.sample("clinic", 8, 32, seed=number), HOWS[how])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    parameters = list(model.model.layers.parameters())
    return losses[0], losses[-1], sum(p.grad is None for p in parameters), len(parameters)


def trapped(how: str, what: str) -> float:
    """Twelve steps behind a frozen embedding: loss "first" and "last", "without" a gradient of "all" the blocks' parameters."""
    return dict(zip(("first", "last", "without", "all"), _trapped(how), strict=True))[what]


def our_function_trains_behind_a_frozen_embedding() -> bool:
    """As without checkpointing, to the last bit of the loss."""
    return _trapped("ours") == _trapped("none")


# What the comparison does not see


class _Changed(nn.Module):
    """Its factor is another one in the second run."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = (self.factor * x).sin()
        self.factor = 3.0
        return y


def changed_gradient(right: bool = False) -> float:
    """d/dx sin(x) at 1 through torch's checkpoint, if the function multiplies by 3 the second time; the right one is cos(1)."""
    x = torch.ones((), requires_grad=True)
    if right:
        return x.cos().item()
    torchs(_Changed(), x, use_reentrant=False).backward()
    return x.grad.item()


def checked_values_notice() -> bool:
    """reference's hooks do, if asked."""
    x = torch.ones((), requires_grad=True)
    with contextlib.suppress(RuntimeError):
        checkpoint_by_hooks(_Changed(), x, check_values=True).backward()
        return False
    return True


def wrong_gradients_percent(p: float = 0.5) -> float:
    """Of the input's gradients, if dropout is checkpointed without the generator's state."""
    seed_everything(0)
    x, drop = torch.ones(20_000, requires_grad=True), nn.Dropout(p)
    y = torchs(lambda x: drop(x.sin()), x, use_reentrant=False, preserve_rng_state=False)
    torch.rand(1)  # a step draws other numbers in between
    y.sum().backward()
    right = (y != 0) / (1 - p) * x.detach().cos()
    return 100 * (x.grad - right).abs().gt(1e-6).float().mean().item()


# Selective checkpointing

KEPT = {"nothing": (), "attention": ("flash_attention",), "products": ("aten.mm.",)}


@functools.cache
def _selective(keep: str | None) -> tuple[float, float]:
    """Bytes that a layer keeps, in inputs, and operations of its backward, in those of a forward; a word's attention is not counted."""
    shape = ModelShape("one", 128, 1, 4, 4, 32, 352, 100)
    seed_everything(0)
    one, x = Layer(shape, 1e-5), torch.randn(2, 64, 128, requires_grad=True)
    positions = rotation(64, 32, 1e4, x.device, x.dtype)

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        kept = any(word in str(op) for word in KEPT[keep])
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    with FlopCounterMode(display=False) as forward:
        one(x, positions)
    with LiveBytes() as live:
        middle = x * 1
        if keep is None:
            y = one(middle, positions)
        else:
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            y = torchs(one, middle, positions, use_reentrant=False, context_fn=contexts)
        kept = live.bytes - y.nbytes
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return kept / x.nbytes, backward.get_total_flops() / forward.get_total_flops() - 2


def selective(keep: str | None, what: str) -> float:
    """One layer of a small Llama on a CPU, float32: "kept" in inputs of the layer; "again", the products run again over all of them."""
    kept, again = _selective(keep)
    return kept if what == "kept" else 100 * again


# Sixteen bits


@functools.cache
def activation_gradients() -> Tensor:
    """|∂L/∂y| of every linear's output in the tiny model, clinic notes, 8 × 48 tokens; as one row."""
    model, _ = models.load("tiny", where=torch.device("cpu"))
    found: list[Tensor] = []

    def hook(module, inputs, output) -> None:
        output.register_hook(lambda grad: found.append(grad.abs().flatten()))

    hooks = [each.register_forward_hook(hook) for each in model.modules() if isinstance(each, nn.Linear)]
    loss = training.next_token_loss(model.train(), World().sample("clinic", 8, 48, seed=1))
    torch.autograd.grad(loss, list(model.parameters()))
    for each in hooks:
        each.remove()
    return torch.cat(found)


def vanish_percent(exponent: int = 0) -> float:
    """Of these gradients, not zero in float32, those that float16 rounds to zero; the loss is multiplied by 2^exponent."""
    grads = activation_gradients()
    grads = grads[grads > 0]
    return 100 * ((grads * 2.0**exponent).half() == 0).float().mean().item()


def overflow_exponent() -> int:
    """The largest power of two for S at which none of these gradients is infinite in float16."""
    largest = activation_gradients().max().item()
    return math.floor(math.log2(65_504 / largest))


def thousand_steps(how: str) -> float:
    """1 + 1000 × 0.0001 in bfloat16: "nearest", "stochastic" (the mean of 1,000 numbers), "Kahan"; or "float32"."""
    return trajectory(how)[-1]


@functools.cache
def trajectory(how: str, steps: int = 1000) -> list[float]:
    """The number after each 50 of these steps."""
    count, update = 1000, 1e-4
    weight = torch.ones(count, dtype=torch.float32 if how == "float32" else torch.bfloat16)
    lost, generator = torch.zeros_like(weight), torch.Generator().manual_seed(0)
    updates, values = torch.full((count,), update), [1.0]
    for number in range(1, steps + 1):
        if how == "stochastic":
            add_stochastic_(weight, updates, generator)
        elif how == "Kahan":
            add_kahan_(weight, lost, updates)
        else:
            weight += updates.to(weight.dtype)
        if number % 50 == 0:
            values.append(weight.float().mean().item())
    return values


def smallest_step_percent(bits: int = 8) -> float:
    """Half the distance between neighbours, over a number just below a power of two: a smaller step always rounds away."""
    return 100 * 2.0 ** -(bits + 1)
