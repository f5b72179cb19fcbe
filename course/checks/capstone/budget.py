"""Exercise 1: which plan fits a card, and what it needs."""

import random

from course.checking import Check, but
from reference.memory import training_memory
from reference.memory.recipes import LORA, QLORA
from reference.model_shapes import SHAPES, ModelShape

MODELS = ("Llama-3.2-1B", "Llama-2-7B", "Llama-3-8B", "Llama-2-13B")
LADDER = ((LORA, False), (LORA, True), (QLORA, True))


def peak(shape: ModelShape, recipe, checkpointing: bool, brief: dict, rank: int = 16) -> int:
    return training_memory(shape, recipe, brief["batch"], brief["sequence"], rank, "all-linear", checkpointing).peak


def weights_alone(shape: ModelShape, recipe, checkpointing: bool, brief: dict) -> int:
    return training_memory(shape, recipe, brief["batch"], brief["sequence"], 16, "all-linear", checkpointing)["weights"]


def all_lines(shape: ModelShape, recipe, checkpointing: bool, brief: dict) -> int:
    lines = training_memory(shape, recipe, brief["batch"], brief["sequence"], 16, "all-linear", checkpointing).lines
    return sum(line.bytes for line in lines.values())


def budget(brief: dict, *, ladder=LADDER, room=0.9, size=peak, last=None, unit=1e9) -> dict:
    """The worked answer: the first plan of the ladder whose fullest moment takes at most nine tenths of the card."""
    shape = SHAPES[brief["model"]]
    for recipe, checkpointing in ladder:
        needed = size(shape, recipe, checkpointing, brief) / unit
        if needed <= room * brief["card_gb"]:
            return {"method": recipe.name, "checkpointing": checkpointing, "peak_gb": needed}
    return last or {"method": "refuse", "checkpointing": False, "peak_gb": needed}


def by_filter(brief: dict) -> dict:
    shape = SHAPES[brief["model"]]
    tried = [
        (recipe.name, on, training_memory(shape, recipe, brief["batch"], brief["sequence"], 16, checkpointing=on).peak / 1e9)
        for recipe, on in ((LORA, False), (LORA, True), (QLORA, True))
    ]
    fitting = [each for each in tried if each[2] <= brief["card_gb"] - brief["card_gb"] / 10]
    method, on, needed = fitting[0] if fitting else ("refuse", False, tried[-1][2])
    return {"method": method, "checkpointing": on, "peak_gb": needed}


def briefs(seed: int) -> dict[str, dict]:
    """Cards of such a size that each kind of answer is right once, and each mistake shows."""
    rng = random.Random(seed)

    def brief(rung: int, factor: float) -> dict:
        drawn = {"model": rng.choice(MODELS), "batch": rng.choice((2, 3, 4, 6)), "sequence": rng.choice((1024, 1536, 2048))}
        needed = peak(SHAPES[drawn["model"]], *LADDER[rung], drawn) / 1e9
        return drawn | {"card_gb": needed * factor}

    return {
        "a card with room for all": brief(0, rng.uniform(1.3, 1.6)),
        "a card that the plain step nearly fills": brief(0, rng.uniform(1.02, 1.08)),
        "a card with room once layers run again": brief(1, rng.uniform(1.15, 1.25)),
        "a card for four bits": brief(2, rng.uniform(1.15, 1.25)),
        "a card that is too small": brief(2, rng.uniform(0.6, 0.9)),
    }


def told(brief: dict) -> str:
    """The brief in words, so that a learner can try it."""
    return f"{brief['model']}, batch {brief['batch']}, sequence {brief['sequence']}, card_gb {brief['card_gb']:.1f}"


def observe(answer, seed: int) -> dict:
    seen = {f"{label} ({told(brief)})": answer(dict(brief)) for label, brief in briefs(seed).items()}
    return {label: {key: found[key] for key in sorted(found)} if isinstance(found, dict) else found for label, found in seen.items()}


check = Check(
    task="a plan for a card",
    observe=observe,
    reference=budget,
    second=by_filter,
    misconceptions={
        "you compared the weights with the card: activations and the loss are there at the same time, ask for .peak": but(
            size=weights_alone
        ),
        "you added all kinds of tensors up: they do not meet, the peak is the fullest moment": but(size=all_lines),
        "you planned for the whole card: libraries and the allocator's remainders need some of it, a tenth here": but(room=1.0),
        "you quantized where 16 bits fit: checkpointing costs time, four bits cost quality and a careful merge": but(
            ladder=((LORA, False), (QLORA, True))
        ),
        "you began with four bits: take QLoRA where LoRA does not fit": but(ladder=((QLORA, True),)),
        "you always recompute: where all activations fit, that costs a third more compute for nothing": but(
            ladder=((LORA, True), (QLORA, True))
        ),
        "you never try checkpointing before you give up: it is most of what saves memory here": but(ladder=((LORA, False), (QLORA, False))),
        "nothing fits in the last brief, and you planned all the same: refuse before anything runs": but(
            ladder=(*LADDER[:2], (QLORA, True)), room=0.9, last={"method": QLORA.name, "checkpointing": True, "peak_gb": 0.0}
        ),
        "the memory is not that of the brief: pass its batch and its sequence": but(
            size=lambda shape, recipe, on, brief: training_memory(shape, recipe, checkpointing=on).peak
        ),
        "a GB is 10⁹ bytes, not 2³⁰": but(unit=2**30),
    },
    rtol=1e-6,
)
