"""Every method of units 02 and 10 by name, ready to be put on a Llama-like model: for comparisons on equal terms.

model = METHODS["IA³"].adapt(copy.deepcopy(base), ids)      # frozen but for what the method trains; called as the base is
optimizer = METHODS["IA³"].optimizer(model, lr=0.03)
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from course.lab import recorded
from reference import relatives
from reference.bottleneck import HOULSBY, PARALLEL, PFEIFFER, inject_bottleneck
from reference.fusion import Fusion
from reference.ia3 import inject_ia3
from reference.lora import inject_lora
from reference.lora.dora import inject_dora
from reference.soft_prompts import (
    Prefix,
    PrefixEncoder,
    PrefixTuning,
    Prompt,
    PromptEncoder,
    PromptTuning,
    prefix_sizes,
    text_start,
)

FULL = "full fine-tuning"
R, TOKENS = 8, 16  # rank, and length of soft prompts, where a method has one


class Cut(nn.Module):
    """A model with a prompt, without the logits of the prompt's positions: it is called, and answers, as the base does."""

    def __init__(self, tuned: PromptTuning):
        super().__init__()
        self.tuned, self.config = tuned, tuned.base.config

    def forward(self, input_ids: Tensor, **more):
        out = self.tuned(input_ids, **more)
        out.logits = out.logits[:, -input_ids.shape[1] :]  # fewer than the text's stay as they are
        return out


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        kind: "update" (of weights), "scale", "adapter", "prompt" or "subset" (of the model's own numbers).
        change: ``change(model, ids)`` returns the model to train; ``ids`` is a text that soft prompts may start from.
        rate: where a search for the learning rate begins.
        merges: whether a plain model remains after training, at no cost.
        groups: the optimizer's groups for a rate, if there is more than one.
    """

    kind: str
    change: Callable[[nn.Module, Tensor], nn.Module | None]
    rate: float
    merges: bool = True
    groups: Callable[[nn.Module, float], list[dict]] | None = None

    def adapt(self, model: nn.Module, ids: Tensor) -> nn.Module:
        """``model``, which is changed, or what stands around it. ids: (at least one token,)."""
        changed = self.change(model, ids)
        return changed if isinstance(changed, nn.Module) else model

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """AdamW without weight decay."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(self.groups(model, lr) if self.groups else trained, lr=lr, weight_decay=0.0)


def _prompt(start: Callable[[nn.Module, Tensor], nn.Module]) -> Callable[[nn.Module, Tensor], nn.Module]:
    return lambda model, ids: Cut(PromptTuning(model, start(model, ids)))


def _prefix(start: Callable[[nn.Module, Tensor], nn.Module]) -> Callable[[nn.Module, Tensor], nn.Module]:
    return lambda model, ids: PrefixTuning(model, start(model, ids), lambda: DynamicCache(config=model.config))


def _numbers(model: nn.Module) -> int:
    layers, heads, width = prefix_sizes(model.config)
    return 2 * layers * heads * width


def _width(model: nn.Module) -> int:
    return model.get_input_embeddings().weight.shape[1]


def prefix_of_text(model: nn.Module, ids: Tensor) -> Prefix:
    """The keys and values that TOKENS tokens of a text leave in the model's cache."""
    repeated = ids[torch.arange(TOKENS, device=ids.device) % len(ids)][None]
    with torch.no_grad():
        cache = model(input_ids=repeated.to(model.device), use_cache=True, past_key_values=DynamicCache()).past_key_values
    return Prefix.from_cache([(layer.keys, layer.values) for layer in cache.layers])


METHODS = {
    FULL: Method("subset", lambda m, ids: m.requires_grad_(True), 1e-3),
    "LN tuning": Method("subset", lambda m, ids: relatives.train_norms(m) and None, 1e-2),
    "LoRA, r = 1": Method("update", lambda m, ids: inject_lora(m, 1, 2) and None, 1e-2),
    "LoRA": Method("update", lambda m, ids: inject_lora(m, R, 2 * R) and None, 3e-3),
    "PiSSA": Method("update", lambda m, ids: inject_lora(m, R, R, init="pissa") and None, 3e-3),
    "LoRA+": Method(
        "update", lambda m, ids: inject_lora(m, R, 2 * R) and None, 1e-3, groups=lambda m, lr: relatives.lora_plus_groups(m, lr, 16)
    ),
    "DoRA": Method("update", lambda m, ids: inject_dora(m, R, 2 * R) and None, 3e-3),
    "VeRA": Method("update", lambda m, ids: relatives.inject_vera(m, 64) and None, 3e-2),
    "LoHa": Method("update", lambda m, ids: relatives.inject_loha(m, R // 2, R) and None, 3e-3),
    "LoKr": Method("update", lambda m, ids: relatives.inject_lokr(m, R, 2 * R) and None, 3e-3),
    "OFT": Method("update", lambda m, ids: relatives.inject_oft(m, 32) and None, 3e-3),
    "IA³": Method("scale", lambda m, ids: inject_ia3(m) and None, 3e-2),
    "adapter, Houlsby": Method("adapter", lambda m, ids: inject_bottleneck(m, ["self_attn", "mlp"], **HOULSBY) and None, 3e-3, False),
    "adapter, Pfeiffer": Method("adapter", lambda m, ids: inject_bottleneck(m, r"model\.layers\.\d+", **PFEIFFER) and None, 3e-3, False),
    "adapter, parallel": Method("adapter", lambda m, ids: inject_bottleneck(m, ["mlp"], **PARALLEL) and None, 1e-3, False),
    "prompt, random": Method("prompt", _prompt(lambda m, ids: Prompt(torch.randn(TOKENS, _width(m)))), 1e-1, False),
    "prompt, text": Method(
        "prompt", _prompt(lambda m, ids: Prompt(text_start(m.get_input_embeddings(), ids.tolist(), TOKENS))), 1e-2, False
    ),
    "P-tuning, MLP": Method("prompt", _prompt(lambda m, ids: PromptEncoder(TOKENS, _width(m))), 1e-3, False),
    "P-tuning, LSTM": Method("prompt", _prompt(lambda m, ids: PromptEncoder(TOKENS, _width(m), network="lstm")), 1e-3, False),
    "prefix, random": Method("prompt", _prefix(lambda m, ids: Prefix(torch.randn(TOKENS, _numbers(m)))), 3e-2, False),
    "prefix, text": Method("prompt", _prefix(prefix_of_text), 1e-2, False),
    "prefix, projected": Method("prompt", _prefix(lambda m, ids: PrefixEncoder(TOKENS, _width(m), _width(m), _numbers(m))), 1e-3, False),
}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file of the trained model holds: what is trained or, of an encoder, what comes out of it."""
    for part in model.modules():
        if isinstance(part, (PromptTuning, PrefixTuning)):
            rows = (part.prefix if isinstance(part, PrefixTuning) else part.prompt)()
            return {"prompt_embeddings": rows.detach().contiguous()}
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters() if parameter.requires_grad}


def measured() -> list[dict]:
    """What ``benchmarks/peft_family.py`` and ``peft_costs.py`` recorded: a row for each method, means over the seeds.

    Keys: method, kind, merges, trained (numbers), file_kb, clinic, sql, forgotten (nats per token above the floor), few_16, few_64, few_256
    (accuracy, with the losses that did better at 64), step_ms, peak_mb, latency_ms; and "seeds": the same scores for each seed.
    """
    rows = []
    for row in recorded.load("peft_family")["result"]["methods"]:
        cost = recorded.row("peft_costs", method=row["method"])
        few = max(row["few"].values(), key=lambda sizes: fmean(sizes["64"]))
        seeds = {task: row[task] for task in ("clinic", "sql", "forgotten")} | {f"few_{n}": scores for n, scores in few.items()}
        rows.append(
            {name: row[name] for name in ("method", "kind", "merges")}
            | {"trained": cost["parameters"], "file_kb": cost["file_bytes"] / 1e3, "peak_mb": cost["peak_bytes"] / 1e6}
            | {name: cost[name] for name in ("step_ms", "latency_ms")}
            | {name: fmean(scores) for name, scores in seeds.items()}
            | {"seeds": seeds}
        )
    return rows


@torch.no_grad()
def fusion_weights(model: nn.Module, ids: Tensor) -> list[list[float]]:
    """Mean weight of each adapter at each place of a fused model (``reference.fusion``), over the tokens of ``ids``."""
    fusions, seen = [part for part in model.modules() if isinstance(part, Fusion)], {}
    hooks = [part.register_forward_pre_hook(lambda part, inputs: seen.update({part: inputs[0]})) for part in fusions]
    try:
        model(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = {part: torch.stack([adapter(h) for adapter in part.adapters], -2) for part, h in seen.items()}
    return [part.weights(seen[part], outputs[part]).flatten(0, -2).mean(0).tolist() for part in fusions]
