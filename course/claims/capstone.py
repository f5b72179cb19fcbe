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


PLAN, NO_REPLAY = "LoRA r = 16, 10 % replay", "LoRA r = 16, no replay"
FULL, QLORA = "full fine-tuning, 10 % replay", "QLoRA r = 16, 10 % replay"


def _runs(plan: str, base: str = "tiny") -> list[dict]:
    return [row for row in figures.runs(base) if row["plan"] == plan]


def _forgotten(plan: str, base: str = "tiny") -> list[float]:
    """Of each seed."""
    return [figures.change(row, "loss on old text")["lost"]["estimate"] for row in _runs(plan, base)]


def rate(method: str = "lora", base: str = "tiny") -> float:
    """The learning rate that the search on validation rows chose; ``method`` is lora, qlora or full."""
    return figures.record(base)["search"]["chosen"][method]


def rate_ratio() -> float:
    """Gemma's searched rates: QLoRA's over LoRA's."""
    return rate("qlora", "gemma") / rate("lora", "gemma")


def search_is_bracketed() -> bool:
    """Of each base and method a lower and a higher rate than the chosen one was tried, and both are worse or diverge."""
    for found in (figures.record(base)["search"] for base in figures.RECORDS):
        for method, tried in found["tried"].items():
            losses = {rate: math.inf if loss is None else loss for rate, loss in tried}
            chosen = found["chosen"][method]
            if not min(losses) < chosen < max(losses) or losses[chosen] != min(losses.values()):
                return False
    return True


def right(plan: str = PLAN, base: str = "tiny") -> float:
    """Percent of held-out instructions answered rightly, mean over seeds; ``base`` is tiny or gemma."""
    return statistics.fmean(100 * figures.change(row, "right answers")["after"] for row in _runs(plan, base))


def forgotten(plan: str = PLAN, base: str = "tiny") -> float:
    """Nats per token by which old text became harder, mean over seeds."""
    return statistics.fmean(_forgotten(plan, base))


def known(plan: str = PLAN, base: str = "tiny") -> float:
    """Percent of facts still known after the run, mean over seeds. The tiny model knew all before; Gemma is asked others."""
    return statistics.fmean(100 * figures.change(row, "facts known")["after"] for row in _runs(plan, base))


def known_before(base: str = "gemma") -> float:
    """The same before any training."""
    return 100 * figures.change(_runs(PLAN, base)[0], "facts known")["before"]


def facts() -> int:
    """That the small world's people and places are asked for."""
    return len(instructions.world().facts())


def seeds(base: str = "tiny") -> int:
    """Of each plan, at least."""
    return min(len(_runs(plan, base)) for plan in figures.PLANS)


def points_around(base: str = "tiny") -> float:
    """Half the 95 % interval around the share of right answers of one run, in points."""
    lost = figures.change(_runs(PLAN, base)[0], "right answers")["lost"]
    return 100 * (lost["high"] - lost["low"]) / 2


def merge_error(way: str = "dequantized", base: str = "tiny") -> float:
    """Of the QLoRA run, relative to the trained weights, in percent; ``way`` is dequantized, original or requantized."""
    merge = _runs(QLORA, base)[0]["merge"]
    return 100 * (merge["error"] if way == "dequantized" else merge["others"][way])


def exports_changed(base: str = "tiny") -> float:
    """Percent of answers that an export of any plan changed, the largest."""
    changed = [each["changed"] for row in figures.runs(base) for each in row["exports"] if each["changed"] is not None]
    return 100 * max(changed)


def rule(measure: str, end: str = "estimate", bits: str = "4-bit", base: str = "tiny") -> float:
    """The 2 % rule over the first plan's merged model: what is lost, in percent."""
    return 100 * figures.record(base)["rule"]["found"][bits][measure][end]


def rule_is_undecided() -> bool:
    """On both bases the recorded verdict for the first plan's model is "not enough data"."""
    return all(figures.record(base)["rule"]["choice"] == "not enough data" for base in figures.RECORDS)


def audits_passed() -> bool:
    """Of both bases' first plan every question of the audit is answered, and passed."""
    return all(figures.record(base)["audit"] == {"passed": checks(), "failed": 0, "unknown": 0, "skipped": 0} for base in figures.RECORDS)


def replay_forgets_less() -> bool:
    """On both bases every run of LoRA with replay forgets less than every run without."""
    return all(max(_forgotten(PLAN, base)) < min(_forgotten(NO_REPLAY, base)) for base in figures.RECORDS)


# Gemma 3 270M


def methods_change_places() -> bool:
    """With replay, full fine-tuning forgets less than LoRA in every seed of the tiny model, and more in every seed of Gemma."""
    tiny = max(_forgotten(FULL)) < min(_forgotten(PLAN))
    return tiny and min(_forgotten(FULL, "gemma")) > max(_forgotten(PLAN, "gemma"))


def no_plan_is_shown_better() -> bool:
    """Of Gemma's three methods with replay, no two means of right answers are farther apart than one run's interval reaches."""
    shares = [right(plan, "gemma") for plan in (PLAN, QLORA, FULL)]
    return max(shares) - min(shares) < points_around("gemma")


def four_bits_alone() -> float:
    """Nats per token of prose that Gemma loses by NF4 before anything is trained (unit 06, H100; the same passages, cut otherwise)."""
    return figures.four_bits_alone()["estimate"]


def four_bits_facts() -> float:
    """Percent of the facts that Gemma in NF4 knows before anything is trained (unit 06): the same questions."""
    formats = recorded.load("quantization_quality_gemma", "h100")["result"]["formats"]
    if abs(100 * formats["16-bit"]["cloze"] - known_before()) > 1e-3:
        raise ValueError("the two records asked other facts")
    return 100 * formats["NF4"]["cloze"]


def only_qlora_knows_less() -> bool:
    """Of the facts Gemma loses some, by the interval, in every seed of QLoRA; in no run of the other plans is a change shown."""
    verdicts = {plan: {figures.change(row, "facts known")["verdict"] for row in _runs(plan, "gemma")} for plan in figures.PLANS}
    return verdicts.pop(QLORA) == {"worse"} and set.union(*verdicts.values()) == {"no difference shown"}


def export_mb(kind: str, plan: str = PLAN) -> float:
    """Of Gemma's first seed: the folder's or file's size; ``kind`` is adapter, merged, gguf, or factors: the trained numbers in 32 bits."""
    row = _runs(plan, "gemma")[0]
    if kind == "factors":
        return 4 * row["trained"] / 1e6
    return next(each["bytes"] for each in row["exports"] if each["kind"] == kind) / 1e6


def adapter_rest_is_the_same() -> bool:
    """What lies beside the factors, mostly the tokenizer, has the same size at r = 4 as at r = 16, to a thousandth."""
    rest = [export_mb("adapter", plan) - export_mb("factors", plan) for plan in (PLAN, "LoRA r = 4, 10 % replay")]
    return abs(rest[0] / rest[1] - 1) < 1e-3


def gemma_kinds_checked() -> int:
    """Kinds of export that were loaded again and asked on Gemma."""
    return len({each["kind"] for row in figures.runs("gemma") for each in row["exports"] if each["changed"] is not None})


def peak_gb(kind: str = "predicted", plan: str = PLAN) -> float:
    """Of Gemma's runs: predicted for rows as long as the plan allows, or measured over a whole run, the largest of its seeds."""
    return max(row["predicted" if kind == "predicted" else "peak"] for row in _runs(plan, "gemma")) / 1e9


def every_prediction_holds() -> bool:
    """No run of Gemma took more than was predicted."""
    return all(row["peak"] <= row["predicted"] for row in figures.runs("gemma"))


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
