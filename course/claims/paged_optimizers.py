"""What unit 07 states: bytes and factors from shapes, page counts from traces, and what an H200 measured.

A figure that a GPU measured takes the ``device`` of the record. ``how``, ``policy`` and the like are written as in the records.
"""

import copy
import itertools
from functools import cache

import torch
from torch import nn

from course.claims.shared import UNITS, normal
from course.lab import recorded
from reference.memory import SHAPES
from reference.memory.breakdown import parameter_lines
from reference.memory.recipes import FULL_MIXED, trained_tensors
from reference.offload import OffloadedSequential
from reference.paging import OffloadedAdamW, PagedAdamW

GPU = "h200"
LEAST = 100_000  # numbers of a tensor from which on bitsandbytes pages its state

# Counting


def held_gb(model: str, what: str = "") -> float:
    """Of full fine-tuning in mixed precision, all that is counted by the parameter, or one kind: "optimizer states"."""
    shape = SHAPES[model]
    lines = parameter_lines(shape, FULL_MIXED, trained_tensors(shape, FULL_MIXED, 16, shape.targets()))
    return sum(line.bytes for kind, line in lines.items() if what in kind) / 1e9


def moments_percent(model: str) -> float:
    """Of all that is counted by the parameter in mixed precision: the two moments, 8 of 16 bytes."""
    return 100 * 8 * SHAPES[model].parameters / 1e9 / held_gb(model)


def moments_gb(model: str) -> float:
    """Adam's two, in float32, of every parameter."""
    return 8 * SHAPES[model].parameters / 1e9


def factor_sizes(rank: int, model: str = "Llama-2-7B") -> list[int]:
    """Numbers in each of LoRA's A and B on all linears."""
    shape = SHAPES[model]
    return [rank * width for pair in shape.linears.values() for width in pair] * shape.layers


def factors(rank: int, what: str = "paged") -> float:
    """How many there are in "all", how many bitsandbytes would have "paged", or what "percent" of the numbers those hold."""
    sizes = factor_sizes(rank)
    paged = [size for size in sizes if size >= LEAST]
    return {"all": len(sizes), "paged": len(paged), "percent": 100 * sum(paged) / sum(sizes)}[what]


def factor_state(rank: int, unit: str = "MB") -> float:
    """Both moments of all factors, float32."""
    return 8 * sum(factor_sizes(rank)) / UNITS[unit]


def widest_factor(rank: int) -> int:
    return max(factor_sizes(rank))


def first_paged_rank() -> int:
    """The least rank at which a factor of Llama-2-7B reaches what bitsandbytes pages."""
    return next(rank for rank in range(1, 257) if factors(rank) > 0)


def traffic(how: str, width: int = 4) -> float:
    """Bytes per parameter and step in one direction: "paged" moments in or out; "offloaded" a gradient out or a weight in."""
    return {"paged": 2 * width, "offloaded": width}[how]


def copy_bound_below(bits: float, teraflops: float, gigabytes: float) -> float:
    """Tokens below which copying a layer takes longer than computing it."""
    return bits / 8 * teraflops * 1e12 / (2 * gigabytes * 1e9)


# Identities


@cache
def _scan(policy: str, frames: int, pages: int, steps: int = 9) -> PagedAdamW:
    p = nn.Parameter(normal(128 * pages))
    optimizer = PagedAdamW([p], resident_bytes=1024 * frames, page_bytes=1024, policy=policy)
    for step in range(steps):
        p.grad = normal(128 * pages, seed=step)
        optimizer.step()
    return optimizer


def hits(policy: str, frames: int, pages: int) -> float:
    """Per step, on average from the third step on."""
    events = [event.kind for event in _scan(policy, frames, pages).trace if event.step > 2]
    return events.count("hit") / 7


def _twins(shape: tuple[int, ...] = (40, 50)) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(normal(*shape)), nn.Parameter(normal(*shape))


def paged_equals_torch() -> bool:
    """Ten steps, two page sizes, three policies, with a resume in the middle: every bit of p."""
    for policy in ("alternate", "mru", "lru"):
        for page in (1024, 4096):
            one, other = _twins()
            options = {"resident_bytes": 2 * page, "page_bytes": page, "policy": policy}
            ours, theirs = PagedAdamW([one], **options), torch.optim.AdamW([other], foreach=False)
            for step in range(10):
                one.grad = normal(40, 50, seed=step)
                other.grad = one.grad.clone()
                ours.step()
                theirs.step()
                if step == 5:
                    state = ours.state_dict()
                    ours = PagedAdamW([one], **options)
                    ours.load_state_dict(state)
            if not torch.equal(one, other):
                return False
    return True


def resume_still_pages() -> bool:
    """After load_state_dict no moment is among the optimizer's own tensors, and pages go on moving."""
    first = _scan("lru", 2, 6)
    again = PagedAdamW(first.param_groups[0]["params"], resident_bytes=2048, page_bytes=1024)
    again.load_state_dict(first.state_dict())
    again.step()
    kept = {key for state in again.state.values() for key in state}
    return kept == {"step"} and any(event.kind == "out" for event in again.trace)


def _decayed_late(steps: int, lr: float, decay: float) -> float:
    """Largest difference between decay before the update, as torch does it, and after, as bitsandbytes' CUDA kernels do."""
    one, other = _twins()
    plain = torch.optim.AdamW([one], lr=lr, weight_decay=0.0, foreach=False)
    torchs = torch.optim.AdamW([other], lr=lr, weight_decay=decay, foreach=False)
    for step in range(steps):
        one.grad = normal(40, 50, seed=step)
        other.grad = one.grad.clone()
        plain.step()
        with torch.no_grad():
            one.mul_(1 - lr * decay)
        torchs.step()
    return (one - other).abs().max().item()


def late_decay_differs(decay: float, lr: float = 1e-2, steps: int = 10) -> float:
    """In units of a weight, after ten steps."""
    return _decayed_late(steps, lr, decay)


def clipping_outside_is_seen() -> bool:
    """OffloadedAdamW after clip_grad_norm_, and with max_norm, is torch's step on the clipped gradient; a copy made before is not."""
    results = []
    for way in ("outside", "inside", "torch", "stale"):
        torch.manual_seed(0)
        model = nn.Linear(20, 10)
        offloaded = way in ("outside", "inside")
        make = OffloadedAdamW if offloaded else torch.optim.AdamW
        options = {"max_norm": 0.01} if way == "inside" else {} if offloaded else {"fused": True}
        optimizer = make(model.parameters(), lr=1e-2, eps=1e-2, **options)
        model(normal(5, 20)).square().sum().backward()
        if way in ("outside", "torch"):
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    outside, inside, right, stale = results
    return torch.equal(outside, right) and torch.equal(inside, right) and not torch.allclose(stale, right, rtol=1e-3)


def offloaded_layers_are_equal() -> bool:
    """Output and gradients of adapters, from memory and from disk."""
    for store in ("cpu", "disk"):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        for layer in layers:
            layer.weight.requires_grad_(False)  # biases are what is trained
        resident = copy.deepcopy(layers)
        offloaded, x = OffloadedSequential(layers, "cpu", store), normal(3, 8)
        y, z = offloaded(x), x
        for layer in resident:
            z = layer(z)
        y.square().sum().backward()
        z.square().sum().backward()
        same = [torch.equal(a.bias.grad, b.bias.grad) for a, b in zip(layers, resident, strict=True)]
        if not (torch.equal(y, z) and all(same)):
            return False
    return True


# Measured: optimizers, a billion float32 parameters


def _adamw(device: str = GPU) -> dict:
    return recorded.load("paged_adamw", device)["result"]


def _row(part: str, device: str, **where) -> dict:
    (found,) = [row for row in _adamw(device)[part] if all(row.get(key) == value for key, value in where.items())]
    return found


def bus(way: str = "both", device: str = GPU) -> float:
    """GB/s in one direction of pinned copies: "in", "out", or each direction of "both" at once."""
    return _adamw(device)["bus"][way]


def resident_ms(how: str, model: str = "a billion", device: str = GPU) -> float:
    """Milliseconds of a step with all state on the card."""
    return _row("resident", device, how=how, model=model)["ms"]


def library_times_resident(device: str = GPU) -> float:
    """How many times as long bitsandbytes' paged AdamW takes, with everything on the card."""
    return resident_ms("bitsandbytes, paged", device=device) / resident_ms("paged", device=device)


def step(what: str, policy: str = "alternate", streams: int = 3, device: str = GPU) -> float:
    """Under a budget of 1 GB: "ms", pages that are a "hit", come "in" or go "out", "share in" of the bus; "frames", all "pages"."""
    if what == "ms":
        return 1e3 * step("seconds", policy, streams, device)
    rows = [row for row in _adamw(device)["paged"] if (row["policy"], row["streams"], row["budget"]) == (policy, streams, 10**9)]
    return rows[0][what]


def share_percent(policy: str = "alternate", way: str = "in", streams: int = 3, device: str = GPU) -> float:
    """Of what the bus gives in both directions at once."""
    return 100 * step(f"share {way}", policy, streams, device)


def overlap_gains(policy: str = "alternate", device: str = GPU) -> float:
    """Seconds with one stream over those with three."""
    return step("seconds", policy, 1, device) / step("seconds", policy, 3, device)


def slower_than_resident(device: str = GPU) -> float:
    """The step under 1 GB over the same with all on the card."""
    return step("ms", device=device) / resident_ms("paged", device=device)


def floor_ms(device: str = GPU) -> float:
    """All moments in and out at the rate of the bus in both directions."""
    return 1e3 * state_gb(device) / bus("both", device)


def bits_differ(how: str, device: str = GPU) -> float:
    """Per cent of the numbers that differ from torch's loop after 20 steps on a GPU."""
    found = _adamw(device)["bits"]
    return 100 * found["differ"][how] / found["numbers"]


def offloaded_ms(how: str, device: str = GPU) -> float:
    """Of a training iteration, forward to step, of half a billion float32 parameters."""
    return 1e3 * _row("offloaded", device, how=how)["seconds"]


def state_gb(device: str = GPU) -> float:
    """Both moments of the parameters that were measured."""
    return 8 * _adamw(device)["numbers"] / 1e9


def _cap(device: str = GPU) -> dict:
    return recorded.load("paged_caps", device)["result"]["cap"]


def capped(what: str, device: str = GPU) -> float:
    """The experiment under a cap, GB: the "cap" itself, the "uncapped" peak with torch's AdamW, the "paged" peak."""
    return (_cap(device)[what] if what == "cap" else _cap(device)[what]["peak"]) / 1e9


def capped_weights_are_equal(device: str = GPU) -> bool:
    """Torch's AdamW ran out, the paged one did not, and its weights are the uncapped run's."""
    return "error" in _cap(device)["torch"] and _cap(device)["equal"]


def _library(device: str = GPU) -> dict:
    return recorded.load("paged_library", device)["result"]


def library_decays_late(device: str = GPU) -> float:
    """Largest difference between bitsandbytes' PagedAdamW32bit and torch after ten steps at η = 0.01, weight decay 0.5."""
    return _library(device)["decay"]["apart, decay 0.5"]


def library_agrees_without_decay(device: str = GPU) -> bool:
    """To rounding."""
    return _library(device)["decay"]["apart, decay 0.0"] < 1e-5


def library_resumes_unpaged(device: str = GPU) -> bool:
    """Its states were paged; after saving, loading onto the CPU and load_state_dict none is, and the next step raises no error."""
    found = _library(device)["resume"]
    return all(found["before"]) and not any(found["after"]) and found["stepped"]


def library_keeps_mb(who: str, device: str = GPU) -> float:
    """Of a paged state of 537 MB, what is still on the card when the optimizer is gone: by the counter of "torch" or of the "driver"."""
    return _library(device)["memory"]["gone"][who] / 1e6


def factors_ms(how: str, device: str = GPU) -> float:
    """Milliseconds of a step of LoRA's factors on Llama-2-7B, r = 16, all on the card."""
    return _library(device)["factors"][how]


# Measured: layers


def _layers(device: str = GPU) -> dict:
    return recorded.load("offloaded_layers", device)["result"]


def layers(what: str, device: str = GPU) -> float:
    """GB of the "weights", of the "cap"; GB/s of the "bus" inwards."""
    return _layers(device)[what] / (1 if what == "bus" else 1e9)


def pass_ms(how: str, tokens: int, what: str = "seconds", device: str = GPU) -> float:
    """Milliseconds of a forward pass, or of what was "predicted"."""
    return 1e3 * recorded.row("offloaded_layers", device, how=how, tokens=tokens)[what]


def files_take_times(tokens: int = 16, device: str = GPU) -> float:
    """How many times as long a layer takes from files as from host memory."""
    share = [recorded.row("offloaded_layers", device, how=how, tokens=tokens)["share"] for how in ("memory", "disk")]
    return share[0] / share[1]


def measured_break_even(device: str = GPU) -> float:
    """Tokens at which the resident pass takes as long as copying all weights, between two that were measured; to hundreds."""
    rows = [row for row in _layers(device)["rows"] if row["how"] == "memory" and "copying" in row]
    for one, other in itertools.pairwise(rows):
        if one["computing"] <= one["copying"] <= other["computing"]:
            part = (one["copying"] - one["computing"]) / (other["computing"] - one["computing"])
            return round(one["tokens"] + part * (other["tokens"] - one["tokens"]), -2)
    raise LookupError("no two neighbouring numbers of tokens lie on both sides")
