"""What unit 14 states: memory by formula, recorded runs, and what earlier units recorded about full fine-tuning."""

import math
import statistics

from course.figures import capstone as figures
from course.lab import harness, instructions, recorded
from course.lab.forgetting import mean_of
from reference.model_shapes import LLAMA_2_70B, LLAMA_3_8B

# Memory


def plan_gb(name: str, kind: str = "peak") -> float:
    """GB of Llama-3-8B, 4 rows of 2,048 tokens, by a plan of the figure; ``kind`` is peak, weights, trained, activations or the loss."""
    return figures.ladder(name).peak / 1e9 if kind == "peak" else figures.grouped(name)[kind]


def adapter_mb(model: str = "8B", r: int = 16, bytes_each: int = 2) -> float:
    """Of one adapter on all linears, in MB."""
    return {"8B": LLAMA_3_8B, "70B": LLAMA_2_70B}[model].adapter_parameters(r) * bytes_each / 1e6


def fifty_gb() -> float:
    """Of fifty adapters, r = 16 on all linears of an 8B model, in 16 bits."""
    return 50 * adapter_mb("8B") / 1e3


def r16_is_too_large_for(megabytes: float) -> bool:
    """An adapter of r = 16 on all linears of a 70B model takes more than that in 16 bits."""
    return adapter_mb("70B") > megabytes


# The recorded runs


def _runs(plan: str) -> list[dict]:
    return [row for row in figures.runs() if row["plan"] == plan]


PLAN = "LoRA r = 16, 10 % replay"


def rate(method: str = "lora") -> float:
    """The learning rate that the search on validation rows chose; ``method`` is lora, qlora or full."""
    return recorded.load("capstone_tiny", "cpu")["result"]["search"]["chosen"][method]


def search_is_bracketed() -> bool:
    """Of each method a lower and a higher rate than the chosen one was tried, and both are worse or diverge."""
    found = recorded.load("capstone_tiny", "cpu")["result"]["search"]
    for method, tried in found["tried"].items():
        losses = {rate: math.inf if loss is None else loss for rate, loss in tried}
        chosen = found["chosen"][method]
        if not min(losses) < chosen < max(losses) or losses[chosen] != min(losses.values()):
            return False
    return True


def right(plan: str = PLAN) -> float:
    """Percent of held-out instructions answered rightly, mean over seeds."""
    return statistics.fmean(100 * figures.change(row, "right answers")["after"] for row in _runs(plan))


def forgotten(plan: str = PLAN) -> float:
    """Nats per token by which old text became harder, mean over seeds."""
    return statistics.fmean(figures.change(row, "loss on old text")["lost"]["estimate"] for row in _runs(plan))


def known(plan: str = PLAN) -> float:
    """Percent of the small world's facts that are still known after the run, mean over seeds; all were before."""
    return statistics.fmean(100 * figures.change(row, "facts known")["after"] for row in _runs(plan))


def facts() -> int:
    """That the small world's people and places are asked for."""
    return len(instructions.world().facts())


def seeds() -> int:
    """Of each plan."""
    return min(len(_runs(plan)) for plan in {row["plan"] for row in figures.runs()})


def points_around() -> float:
    """Half the 95 % interval around the share of right answers of one run, in points."""
    lost = figures.change(_runs(PLAN)[0], "right answers")["lost"]
    return 100 * (lost["high"] - lost["low"]) / 2


def merge_error(way: str = "dequantized") -> float:
    """Of the QLoRA run, relative to the trained weights, in percent; ``way`` is dequantized, original or requantized."""
    merge = _runs("QLoRA r = 16, 10 % replay")[0]["merge"]
    return 100 * (merge["error"] if way == "dequantized" else merge["others"][way])


def exports_changed() -> float:
    """Percent of answers that an export of any plan changed, the largest."""
    changed = [each["changed"] for row in figures.runs() for each in row["exports"] if each["changed"] is not None]
    return 100 * max(changed)


def rule(measure: str, end: str = "estimate", bits: str = "4-bit") -> float:
    """The 2 % rule over the first plan's merged model: what is lost, in percent."""
    return 100 * recorded.load("capstone_tiny", "cpu")["result"]["rule"]["found"][bits][measure][end]


def rule_is_undecided() -> bool:
    """The recorded verdict for the first plan's model is "not enough data"."""
    return recorded.load("capstone_tiny", "cpu")["result"]["rule"]["choice"] == "not enough data"


def replay_forgets_less() -> bool:
    """Over seeds, every run with replay forgets less than every run without."""
    with_replay, without = (
        [figures.change(row, "loss on old text")["lost"]["estimate"] for row in _runs(plan)] for plan in (PLAN, "LoRA r = 16, no replay")
    )
    return max(with_replay) < min(without)


# Full fine-tuning


def near_forgotten(method: str) -> float:
    """Nats of general text forgotten on clinic notes when a quarter of a nat is left to learn (unit 09)."""
    return mean_of(figures.near(method)).mean


def far_left(method: str) -> float:
    """Nats left to learn of the foreign language after all steps (unit 09)."""
    return mean_of(figures.far(method)["left"]).mean


def few_percent(method: str, rows: int = 64) -> float:
    """Right, with so many examples and 30 steps on the tiny model (unit 10)."""
    return statistics.fmean(figures.few(method, str(rows)))


def real_gain(config: str) -> float:
    """Of what full fine-tuning learns about Python code on Gemma 3 270M, what a configuration learns, in percent (unit 02, H100)."""
    base = recorded.load("gemma_lora", "h100")["result"]["base"]["code"]
    return 100 * (base - figures.real(config)["code"][0]) / (base - figures.real("full fine-tuning")["code"][0])


# Evaluation


def items_for(tolerance: float) -> float:
    """Questions without one changed answer that bring the interval's end below ``tolerance``: z²/(n + z²) ≤ tolerance."""
    z2 = 1.959964**2
    return math.ceil(z2 * (1 - tolerance) / tolerance)


def stderr_points(share: float, items: int) -> float:
    """lm-evaluation-harness's standard error of an accuracy, in points."""
    return 100 * math.sqrt(share * (1 - share) / (items - 1))


def acc_and_acc_norm_differ() -> bool:
    """One item that acc counts as right and acc_norm as wrong."""
    item = harness.Item("q", ("yes", "certainly"), 0)
    found = harness.score([(-3.0, -6.0)] * 2, [item] * 2)
    return found.acc == 1 and found.acc_norm == 0


def checks() -> int:
    """Of the audit."""
    from course.capstone.audit import CHECKS

    return len(CHECKS)
