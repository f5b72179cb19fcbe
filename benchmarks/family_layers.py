"""Speed of one layer, forward and backward, ours against peft's: DoRA, IA³, VeRA, LoHa, LoKr, OFT; and of a model with a soft prompt.

    python -m benchmarks.family_layers             # a CUDA device, half a minute; saves the recorded result "family_layers"
    python -m benchmarks.family_layers --smoke     # small, also on a CPU; saves to a temporary folder

A 4096×4096 bfloat16 linear layer with float32 trained numbers, which is what both sides choose by themselves, over 4,096 rows that need a
gradient. The frozen layer alone is the floor: its two products are the work that no adapter avoids. Times are the device's own, medians of
rounds in which the contestants take turns. "Peak" is the most that a step holds beyond what was there before it, "error" the distance of
output and gradients from float64, relative, the largest of them. A dense float32 ΔW would take 67 MB.

The model is a Llama of four layers, 1,024 wide, 8 × 256 tokens, with 16 tokens of a prompt or prefix.
"""

import copy
import warnings
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.cli import failed, message, record
from benchmarks.lora_layer import in_turns, kept_bytes, training_step
from course.lab import meters
from course.lab.devices import device
from course.lab.tables import columns, wrapped
from reference.ia3 import IA3Layer
from reference.lora.dora import DoRALinear
from reference.relatives import OFT, LoHa, LoKr, VeRA
from reference.relatives.inject import projections
from reference.soft_prompts import Prefix, PrefixTuning, Prompt, PromptTuning, prefix_sizes

R = 16
VERA_R = 256
METHODS = {  # name -> (our layer, peft's config)
    "DoRA": (lambda base: DoRALinear(base, R, 2 * R), lambda: peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"], use_dora=True)),
    "IA³, output": (IA3Layer, lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[])),
    "IA³, input": (lambda base: IA3Layer(base, True), lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=["0"])),
    "VeRA": (
        lambda base: VeRA(base, *(m.to(base.weight.device) for m in projections(VERA_R, base.in_features, base.out_features, 0))),
        lambda: peft.VeraConfig(r=VERA_R, target_modules=["0"]),
    ),
    "LoHa": (lambda base: LoHa(base, R // 2, R), lambda: peft.LoHaConfig(r=R // 2, alpha=R, target_modules=["0"])),
    "LoKr": (lambda base: LoKr(base, R, R), lambda: peft.LoKrConfig(r=R, alpha=R, target_modules=["0"])),
    "OFT": (lambda base: OFT(base, 32), lambda: peft.OFTConfig(oft_block_size=32, target_modules=["0"])),
}


def named(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by a name that both sides share."""
    found = {}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            plain = name.replace(".default", "")
            found[plain.removesuffix(".weight") if "lora_" in plain or "oft_" in plain else plain] = parameter
    return found


def pair(name: str, base: nn.Linear) -> tuple[nn.Module, nn.Module]:
    """Ours and peft's with the same numbers, as in the middle of training."""
    make, config = METHODS[name]
    ours = make(copy.deepcopy(base))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config()).base_model.model[0]
    other = named(theirs)
    with torch.no_grad():
        for key, parameter in named(ours).items():
            parameter.add_(0.02 * torch.randn_like(parameter))
            other[key].copy_(parameter)
    return ours, theirs


def results(layer: nn.Module, x: Tensor, direction: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of what is trained, by name."""
    leaves = {"x": x.detach().clone().requires_grad_(), **dict(sorted(named(layer).items()))}
    y = layer(leaves["x"])
    y.backward(direction)
    found = [y.detach(), *(leaf.grad for leaf in leaves.values())]
    for leaf in leaves.values():
        leaf.grad = None
    return found


def errors(ours: nn.Module, theirs: nn.Module, x: Tensor, direction: Tensor) -> dict[str, float]:
    """Largest relative distance of output and gradients from those in float64."""
    exact = results(copy.deepcopy(ours).double(), x.double(), direction.double())
    found = {}
    for side, layer in (("ours", ours), ("peft", theirs)):
        mine = results(layer, x, direction)
        found[side] = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(mine, exact, strict=True))
    return found


def layer_row(name: str, width: int, rows: int, where: torch.device, rounds: int, repeats: int) -> dict:
    torch.manual_seed(0)
    base = nn.Linear(width, width, bias=False, device=where, dtype=torch.bfloat16)
    x = torch.randn(rows, width, device=where, dtype=torch.bfloat16, requires_grad=True)
    direction = torch.randn_like(x)
    ours, theirs = pair(name, base)
    found = {"method": name, "error": errors(ours, theirs, x[: min(rows, 2048)], direction[: min(rows, 2048)])}
    layers = {"ours": ours, "peft": theirs, "frozen layer": copy.deepcopy(base).requires_grad_(False)}
    steps = {key: training_step(layer, x, direction) for key, layer in layers.items()}
    found["milliseconds"] = in_turns(steps, where, rounds, repeats, queued=True)
    found["times_as_fast"] = found["milliseconds"]["peft"] / found["milliseconds"]["ours"]
    found["kept_bytes"] = {key: kept_bytes(layers[key], x) for key in ("ours", "peft")}
    found["peak_bytes"] = {}
    for key, step in steps.items():
        for layer in layers.values():
            layer.zero_grad(set_to_none=True)
        x.grad = None
        with meters.peak_memory(where) as peak:
            step()
        found["peak_bytes"][key] = peak.bytes
    return found


def prompt_row(kind: str, width: int, depth: int, tokens: int, where: torch.device, rounds: int, repeats: int) -> dict:
    torch.manual_seed(0)
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=width // 64)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_key_value_heads=width // 128, head_dim=64, **sizes)).to(where, torch.bfloat16)
    layers, heads, head = prefix_sizes(model.config)
    if kind == "prompt tuning":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
        ours = PromptTuning(copy.deepcopy(model), Prompt(torch.randn(16, width)))
    else:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
        ours = PrefixTuning(copy.deepcopy(model), Prefix(torch.randn(16, 2 * layers * heads * head)), DynamicCache)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    ids = torch.randint(1024, (8, tokens), device=where)

    def step(tuned: nn.Module) -> Callable[[], None]:
        def work() -> None:
            tuned.zero_grad(set_to_none=True)
            tuned(input_ids=ids, labels=ids).loss.backward()

        return work

    steps = {"ours": step(ours), "peft": step(theirs)}
    times = in_turns(steps, where, rounds, repeats)
    return {"method": kind, "milliseconds": times, "times_as_fast": times["peft"] / times["ours"]}


def measure(small: bool = False, where: torch.device | None = None) -> dict:
    """Everything; ``small`` for a machine without a GPU. A method that fails says so in its row, and costs no other."""
    where = where or device()
    width, rows, rounds, repeats = (64, 32, 1, 2) if small else (4096, 4096, 4, 10)
    found = []
    for name in METHODS:
        try:
            found.append(layer_row(name, width, rows, where, rounds, repeats))
        except Exception as error:
            found.append({"method": name, "failed": message(error)})
    for kind in ("prompt tuning", "prefix tuning"):
        try:
            shape = (128, 2, 16) if small else (1024, 4, 256)
            found.append(prompt_row(kind, *shape, where, rounds, 3 if small else repeats))
        except Exception as error:
            found.append({"method": kind, "failed": message(error)})
    return {"width": width, "rows": rows, "r": R, "peft": peft.__version__, "table": found}


def table(result: dict) -> str:
    rows, lines = [], []
    for row in result["table"]:
        if "failed" in row:
            lines.append(failed(row["method"], row["failed"]))
            continue
        sizes = [
            meters.show_bytes(row[what][who]) if what in row else "" for what in ("peak_bytes", "kept_bytes") for who in ("ours", "peft")
        ]
        times = (f"{row['milliseconds'][who]:.3f}" for who in ("ours", "peft"))
        rows.append([row["method"], *times, row["times_as_fast"], *sizes])
    layers = [row for row in result["table"] if "error" in row]
    about = f"forward + backward, {result['width']}², {result['rows']} rows, bfloat16; × is peft's time over ours"
    heads = ("", "ours ms", "peft ms", "×", "peak ours", "peft", "kept ours", "peft")
    if layers:
        frozen = max(row["milliseconds"]["frozen layer"] for row in layers)
        errors = ", ".join(f"{who} {max(row['error'][who] for row in layers):.1e}" for who in ("ours", "peft"))
        lines.append(wrapped(f"the frozen layer alone takes at most {frozen:.3f} ms; largest error: {errors}"))
    return "\n".join([about, columns(heads, rows), *lines])


def main() -> None:
    record("family_layers", __doc__, measure, table, small={"small": True})


if __name__ == "__main__":
    main()
