"""What a run is asked to do, read from a TOML file or from options, and the memory it takes, predicted before anything is loaded.

``method = "auto"`` tries three ways in this order and takes the first that fits the budget:

    LoRA                        16 bits a weight: nothing is lost by quantization
    LoRA + checkpointing        a third more compute buys the activations
    QLoRA + checkpointing       about 4.13 bits a weight; the merge has to be right, and the 2 % rule asked

Full fine-tuning is never chosen by itself: it is asked for by name. What doesn't fit is refused in words, with the nearest plan that does.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course.units import CourseError
from reference.memory import training_memory
from reference.memory.breakdown import Breakdown
from reference.memory.recipes import Recipe
from reference.model_shapes import GEMMA_3_270M, ModelShape

METHODS = ("auto", "lora", "qlora", "full")
DTYPES = ("float32", "bfloat16")
EXPORTS = ("adapter", "merged", "gguf")
HEADROOM = 0.10  # of the budget: the allocator's remainders, libraries' workspaces, the CUDA context


@dataclass(frozen=True)
class Plan:
    """One run. Paths are relative to the folder of the TOML file, or to the working folder.

    Attributes:
        base: "tiny", "gemma-3-270m", a hub name, a folder, a .gguf file.
        data: JSONL of conversations, or "course": instructions of the small world, for the tiny model.
        held_out: JSONL that is asked before and after; None takes a part of ``data`` away from training.
        old: a text file of what must not be forgotten, a document a line; None takes the course's own.
        out: the folder of the run.
        method, r, lora_alpha, lora_dropout, targets: what is trained; targets by peft's rules.
        lr, steps, batch, max_length: of training; rows that are longer than ``max_length`` tokens are refused or, by ``overflow``, cut.
        replay: share of each batch's rows that is old text, 0 to 0.9.
        memory_gb: the budget, in 1e9 bytes; None is what the device has free.
        tolerance: the merge error and the loss of the exports that is accepted, as a share.
        licence: of the adapter, and what it inherits; goes into its card.
    """

    base: str = "tiny"
    data: str = "course"
    held_out: str | None = None
    old: str | None = None
    out: str = "capstone"
    method: str = "auto"
    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    lr: float = 1e-3
    steps: int = 150
    batch: int = 16
    max_length: int = 64
    overflow: str = "drop"
    replay: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    memory_gb: float | None = None
    checkpoint_every: int = 50
    checkpointing: bool = False
    new_tokens: int = 16
    ask: int = 120
    tolerance: float = 0.02
    licence: str = ""
    exports: tuple[str, ...] = EXPORTS
    folder: str = field(default=".", repr=False)

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("dtype", DTYPES), ("overflow", ("drop", "keep_start", "keep_end", "raise"))):
            if getattr(self, name) not in known:
                raise CourseError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (
            ("r", 1),
            ("steps", 1),
            ("batch", 1),
            ("max_length", 2),
            ("checkpoint_every", 1),
            ("new_tokens", 1),
            ("ask", 8),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CourseError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, low, high in (("lr", 0, 1), ("lora_alpha", 0, math.inf), ("tolerance", 0, 1), ("memory_gb", 0, math.inf)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and low < value < high):
                raise CourseError(
                    f"{name} must be a number above {low:g}" + f" and below {high:g}" * (high < math.inf) + f", got {value!r}"
                )
        for name, fits, right in (
            ("replay", lambda value: 0 <= value <= 0.9, "from 0 to 0.9"),
            ("lora_dropout", lambda value: 0 <= value < 1, "from 0 to below 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
                raise CourseError(f"{name} must be a number {right}, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise CourseError(f"seed must be an integer from 0 on, got {self.seed!r}")
        for name in ("base", "data", "held_out", "old", "out", "licence"):
            if not isinstance(value := getattr(self, name), str) and not (value is None and name in ("held_out", "old")):
                raise CourseError(f"{name} must be a text, got {value!r}")
        if not isinstance(self.exports, (tuple, list)):
            raise CourseError(f'exports must be a list, such as ["adapter"], got {self.exports!r}')
        if unknown := set(self.exports) - set(EXPORTS):
            raise CourseError(f"exports must be of {', '.join(EXPORTS)}, got {', '.join(sorted(unknown))}")

    def path(self, name: str) -> Path:
        """Of one of the fields that name files."""
        return Path(self.folder) / Path(getattr(self, name)).expanduser()

    def settings(self) -> dict[str, Any]:
        """As JSON and TOML hold it."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items() if key != "folder"
        }


def read(file: Path | None = None, **options: Any) -> Plan:
    """A plan from a TOML file; options that are not None go before it.

    Raises:
        CourseError: there is no such file, it is no TOML, a key is unknown (the known ones are named) or a value out of range.
    """
    given: dict[str, Any] = {}
    if file is not None:
        try:
            given = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CourseError(f"no file {file}: write a plan there, or give --base, --data and --out") from None
        except tomllib.TOMLDecodeError as error:
            raise CourseError(f"{file} is no TOML: {error}") from None
        given["folder"] = str(file.parent)
    given |= {key: value for key, value in options.items() if value is not None}
    known = {each.name for each in dataclasses.fields(Plan)}
    if unknown := sorted(set(given) - known):
        raise CourseError(f"the plan has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known - {'folder'}))}")
    return Plan(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


# Memory


def shape_of(config: Any, name: str = "") -> ModelShape:
    """The sizes of a model from its configuration; Gemma 3's family too.

    Args:
        name: what the plan calls it; the last part of a path is shown. The family's, if not given.

    Raises:
        CourseError: a family whose memory is not known here.
    """
    shown = Path(name).name
    if getattr(config, "model_type", "") == "gemma3_text":
        return dataclasses.replace(
            GEMMA_3_270M,
            name=shown or "Gemma 3",
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )
    try:
        shape = ModelShape.from_config(config)
    except ValueError as error:
        raise CourseError(f"the memory of this base can't be predicted: {error}") from None
    return dataclasses.replace(shape, name=shown or shape.name)


def recipe_of(method: str, dtype: str) -> Recipe:
    """What is kept for a parameter."""
    wide = 4 if dtype == "float32" else 2
    if method == "full":
        return Recipe("full fine-tuning", wide, wide, 4, master_bytes=0 if wide == 4 else 4, step_buffer="largest")
    return Recipe(method.replace("lora", "LoRA").replace("q", "Q"), wide, 4, 4, adapter_bytes=4, quantized=method == "qlora")


def predict(plan: Plan, shape: ModelShape) -> Breakdown:
    """Memory of a training step of a plan whose method is chosen.

    Raises:
        CourseError: the rank or a target does not fit the model.
    """
    targets = plan.targets if plan.targets == "all-linear" or isinstance(plan.targets, tuple) else (plan.targets,)
    recipe = recipe_of(plan.method, plan.dtype)
    try:
        return training_memory(shape, recipe, plan.batch, plan.max_length, plan.r, targets, plan.checkpointing, "fused", True)
    except ValueError as error:
        raise CourseError(str(error)) from None


def options(plan: Plan) -> list[Plan]:
    """What is tried, in this order."""
    if plan.method != "auto":
        return [plan]
    tries = (("lora", plan.checkpointing), ("lora", True), ("qlora", True))
    return [dataclasses.replace(plan, method=method, checkpointing=checkpointing) for method, checkpointing in dict.fromkeys(tries)]


def choose(plan: Plan, shape: ModelShape, free: float | None = None) -> tuple[Plan, Breakdown]:
    """The first option that fits, and its memory.

    Args:
        free: bytes of the device, where the plan names no budget.

    Raises:
        CourseError: none fits. The message says what the smallest needs, what most of it is, and what to change.
    """
    budget = plan.memory_gb * 1e9 if plan.memory_gb else free
    tried = [(each, predict(each, shape)) for each in options(plan)]
    for each, memory in tried:
        if budget is None or memory.peak <= (1 - HEADROOM) * budget:
            return each, memory
    each, memory = min(tried, key=lambda pair: pair[1].peak)
    raise CourseError(refusal(each, memory, shape, budget))


def refusal(plan: Plan, memory: Breakdown, shape: ModelShape, budget: float) -> str:
    """Why a plan is not begun, and which change would do."""
    there = memory.moments[memory.moment]
    largest = max(there, key=there.get)
    words = (
        f"{memory.title} needs {memory.peak / 1e9:.3g} GB at its fullest moment ({memory.moment}), and of {budget / 1e9:.3g} GB "
        f"{100 * (1 - HEADROOM):.0f} % may be planned for. Most of it is {largest}: {there[largest] / 1e9:.3g} GB"
    )
    for what, change in remedies(plan):
        if predict(change, shape).peak <= (1 - HEADROOM) * budget:
            return f"{words}. With {what} it would fit ({predict(change, shape).peak / 1e9:.3g} GB)"
    return f"{words}. Neither a smaller batch, shorter rows nor four bits make it fit: take a smaller base or more memory"


def remedies(plan: Plan) -> list[tuple[str, Plan]]:
    """Changes that cost least first."""
    change = dataclasses.replace
    steps: Mapping[str, Plan] = {
        "checkpointing = true": change(plan, checkpointing=True),
        f"batch = {max(1, plan.batch // 4)} and checkpointing": change(plan, batch=max(1, plan.batch // 4), checkpointing=True),
        "batch = 1 and checkpointing": change(plan, batch=1, checkpointing=True),
    }
    if plan.method in ("full", "lora"):
        lora = change(plan, method="lora", checkpointing=True)
        qlora = change(plan, method="qlora", checkpointing=True)
        steps = steps | {'method = "lora"': lora, 'method = "qlora"': qlora, 'method = "qlora" and batch = 1': change(qlora, batch=1)}
    return list(steps.items())
