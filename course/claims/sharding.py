"""What the appendix on several GPUs states: bytes from shapes, and the seconds of a step on one H200."""

import torch

from course.claims.shared import UNITS, normal
from course.lab import recorded
from reference.memory import RECIPES, SHAPES, received_bytes, sharded_memory, training_memory
from reference.memory.sharding import whole_everywhere
from reference.nf4 import quantize_nf4

TOKENS = 2048  # of each card, in one row


def on_a_card(model: str, cards: int, what: str = "shares", bits: int = 4) -> float:
    """GB of "shares", "adapters" (with Adam's moments) or what is "gathered" at once."""
    found = sharded_memory(SHAPES[model], cards, block=64 if bits == 4 else None)
    return {"shares": found.shares, "adapters": found.held - found.shares, "gathered": found.gathered}[what] / 1e9


def rest_gb(model: str) -> float:
    """Of a step of 1 × 2,048 tokens with checkpointing at its fullest: all but what is counted by the parameter."""
    budget = training_memory(SHAPES[model], RECIPES["QLoRA"], 1, TOKENS, checkpointing=True)
    fullest = budget.moments[budget.moment]
    held = ("weights", "adapter weights", "adapter states")
    return sum(count for kind, count in fullest.items() if kind not in held) / 1e9


def peak_gb(model: str, cards: int) -> float:
    """Of a step on each card; on one nothing is gathered."""
    gathered = on_a_card(model, cards, "gathered") if cards > 1 else 0
    return on_a_card(model, cards) + on_a_card(model, cards, "adapters") + gathered + rest_gb(model)


def received(model: str, cards: int, engine: str = "FSDP", unit: str = "GB", tokens: int = TOKENS) -> float:
    """By a card in a step with so many tokens for each card."""
    return received_bytes(engine, SHAPES[model], cards, tokens * cards) / UNITS[unit]


def sixteen_over_four_bits(model: str, cards: int) -> float:
    """What a card receives if the layers are not quantized, over what it receives."""
    dense, packed = (sharded_memory(SHAPES[model], cards, block=block).received for block in (None, 64))
    return dense / packed


def fsdp_over_ddp(model: str, cards: int) -> float:
    """Bytes received."""
    return received(model, cards) / received(model, cards, "DDP")


def whole_everywhere_mb(model: str) -> float:
    """The scales' scales, which no card shares."""
    return whole_everywhere(SHAPES[model]) / 1e6


def wire_ms(model: str, cards: int, gb_a_second: float) -> float:
    """To receive a step's bytes over a link of that rate."""
    return 1000 * received(model, cards) / gb_a_second


def hiding_tokens(cards: int, gb_a_second: float) -> float:
    """T*: tokens of a 7B model that an H200 works on while the step's bytes arrive."""
    row = recorded.row("qlora_step", device="h200", how="llama", batch=4, sequence=2048)
    return wire_ms("Llama-2-7B", cards, gb_a_second) / 1000 * row["batch"] * row["sequence"] / row["seconds"]


def measured(case: str, how: str, what: str, cards: int = 2) -> float:
    """Of ``sharded_N``: "tokens" a second of all cards, GB of a card at its "peak" or "predicted", milliseconds of a "step"."""
    row = recorded.row(f"sharded_{cards}", "h200", case=case, how=how)
    return {
        "tokens": lambda: row["tokens_a_second"],
        "peak": lambda: row["peak"] / 1e9,
        "predicted": lambda: row["predicted_peak"] / 1e9,
        "step": lambda: 1000 * row["seconds"],
    }[what]()


def of_a_copy_each(case: str, how: str) -> float:
    """Percent of the tokens a second that two cards reach with a whole model on each."""
    return 100 * measured(case, how, "tokens") / measured(case, "replicated", "tokens")


def engine_alone(case: str) -> float:
    """Percent of a plain step's speed that the sharded one has on one card, where nothing is sent."""
    return 100 * measured(case, "sharded", "tokens", 1) / measured(case, "replicated", "tokens", 1)


def scaling(case: str) -> float:
    """Tokens a second of the sharded step on two cards over those on one."""
    return measured(case, "sharded", "tokens") / measured(case, "sharded", "tokens", 1)


def ours_over(other: str, case: str) -> float:
    """Tokens a second of the sharded step over another's, on two cards."""
    return measured(case, "sharded", "tokens") / measured(case, other, "tokens")


def step_seconds(how: str, batch: int, sequence: int, which: str = "seconds") -> float:
    """Of the 70B model on two cards, with so many tokens for each card: the median, the "least" or the "most"."""
    return recorded.row("sharded_tokens_2", "h200", how=how, batch=batch, sequence=sequence)[which]


def more_seconds(how: str = "sharded") -> float:
    """That a step with 2,048 tokens takes beyond one with 16."""
    return step_seconds(how, 1, 2048) - step_seconds(how, 1, 16)


def of_a_copy_at(batch: int, sequence: int, how: str = "sharded") -> float:
    """Percent of the speed of a copy on each card, in the same run."""
    return 100 * step_seconds("replicated", batch, sequence) / step_seconds(how, batch, sequence)


def worst_peak_prediction(cards: int = 2) -> float:
    """Largest distance of a predicted peak from the measured one, in percent."""
    rows = recorded.load(f"sharded_{cards}", "h200")["result"]["rows"]
    return max(100 * abs(row["predicted_peak"] / row["peak"] - 1) for row in rows if "predicted_peak" in row)


def codes_changed_percent() -> float:
    """Bytes of codes that are kept as bfloat16 numbers, after a policy has cast them to float16 and the layer cast them back."""
    codes = quantize_nf4(normal(1024, 1024)).packed.view(-1)
    cast = codes.view(torch.bfloat16).to(torch.float16).to(torch.bfloat16).view(torch.uint8)
    return 100 * (cast != codes).double().mean().item()
