"""What stays dense in a quantized model, why, and how much of the model that is.

``quantize_linears`` takes ``nn.Linear`` layers whose weight nobody but they read. A model may keep
most of its numbers elsewhere: the experts of Mixtral, Llama 4 and gpt-oss are parameters of shape
(experts, in, out), and no linear layers. Then "a model in four bits" is not true, and this says so.
"""

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from reference.lora import LoRALayer
from reference.lora.called import weight_reads
from reference.lora.weights import unstored
from reference.qlora.layer import NF4Linear

HARMLESS = {"device", "is_cuda", "is_meta", "requires_grad", "grad"}  # true of packed codes as well


@dataclass(frozen=True)
class DenseReport:
    """The answer of :func:`dense_report`; ``print`` it.

    Attributes:
        dense: name of a parameter that stays as it is -> how many numbers, and why.
        quantized: how many weights are in four bits.
    """

    dense: dict[str, tuple[int, str]]
    quantized: int

    @property
    def percent(self) -> float:
        """Share of the parameters that stay dense, from 0 to 100."""
        kept = sum(count for count, _ in self.dense.values())
        return 100 * kept / max(kept + self.quantized, 1)

    def __str__(self) -> str:
        kept = sum(count for count, _ in self.dense.values())
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, (_, why) in self.dense.items():
            reasons[why].append(name)
        sizes = {why: sum(self.dense[name][0] for name in names) for why, names in reasons.items()}
        rows = [f"{self.percent:.1f} % of {kept + self.quantized:,} parameters stay dense"]
        for why in sorted(sizes, key=sizes.get, reverse=True):
            share = 100 * sizes[why] / (kept + self.quantized)
            names = reasons[why]
            rows.append(f"  {share:5.1f} %  {why}: {names[0]}{_more(len(names) - 1)}")
        return "\n".join(rows)


def _more(count: int) -> str:
    return f" and {count} more" if count else ""


def dense_report(model: nn.Module) -> DenseReport:
    """Every parameter of ``model`` that is not quantized. Adapters' factors are not counted."""
    reasons, dense, quantized, seen = left_dense(model), {}, 0, set()
    for prefix, part in model.named_modules():
        for key, parameter in part._parameters.items():
            if parameter is None or id(parameter) in seen or _is_factor(part, key):
                continue
            seen.add(id(parameter))
            if isinstance(part, NF4Linear) and key == "weight":
                quantized += part.shape.numel()
            else:
                why = reasons.get(part) or _kind(part, parameter)
                dense[f"{prefix}.{key}".lstrip(".")] = parameter.numel(), why
    return DenseReport(dense, quantized)


def _is_factor(part: nn.Module, key: str) -> bool:
    return isinstance(part, LoRALayer) and key in ("lora_A", "lora_B")


def _kind(part: nn.Module, parameter: nn.Parameter) -> str:
    name = type(part).__name__
    if isinstance(part, NF4Linear):
        return "biases of quantized layers"
    if type(part) is nn.Linear:
        return "linear layers that were skipped"
    if parameter.ndim >= 3 and not hasattr(part, "kernel_size"):
        return f"tensors of {parameter.ndim} axes in {name}, which are no nn.Linear"
    return name


def left_dense(model: nn.Module) -> dict[nn.Module, str]:
    """Linear layer -> why it can't be quantized in its place."""
    reasons = {
        part: f"nn.Linear that {why}"
        for part in model.modules()
        if type(part) is nn.Linear and (why := unstored(part))
    }
    for holder, layer, after in weight_reads(model):
        ours = isinstance(holder, (LoRALayer, nn.TransformerEncoderLayer))  # see replace_layers
        layer = layer.base if isinstance(layer, LoRALayer) else layer
        if type(layer) is nn.Linear and not ours and not (after and after[0] in HARMLESS):
            reasons[layer] = f"nn.Linear whose weight {type(holder).__name__} reads"
    return reasons
