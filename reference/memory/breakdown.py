"""The answer to "what fills the GPU?": a line for each kind of tensor, with its formula.

:mod:`reference.memory.budget` puts the lines together and says which of them meet.
"""

from dataclasses import dataclass

from reference.memory import activations
from reference.memory.activations import Run
from reference.memory.recipes import Line, Recipe, optimizer_states, total, weights
from reference.model_shapes import ModelShape


@dataclass(frozen=True)
class Breakdown:
    """The answer of :func:`reference.memory.training_memory`; ``print`` it.

    Attributes:
        lines: kind of tensor -> its bytes when all of it is there, and the formula.
        moments: moment of the step -> kind -> bytes there at that moment.
    """

    title: str
    lines: dict[str, Line]
    moments: dict[str, dict[str, int]]

    def __getitem__(self, kind: str) -> int:
        """Bytes of one kind of tensor, such as ``"weights"``."""
        return self.lines[kind].bytes

    @property
    def moment(self) -> str:
        """The fullest moment of a step."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.moments[self.moment].values())

    def __str__(self) -> str:
        rows = [f"{_row(kind, line.bytes)}   {line.formula}" for kind, line in self.lines.items()]
        totals = [
            _row(moment, sum(there.values())) + "   ◀ peak" * (moment == self.moment)
            for moment, there in self.moments.items()
        ]
        return "\n".join([self.title, *rows, "there at the same time", *totals])


def _row(name: str, count: int) -> str:
    return f"  {name:18s}{count / 1e9:12,.3f} GB"


def parameter_lines(
    shape: ModelShape, recipe: Recipe, tensors: list[tuple[int, int]]
) -> dict[str, Line]:
    """What is counted by the parameter: there however many tokens a step has.

    Args:
        tensors: those that are trained, from :func:`reference.memory.recipes.trained_tensors`.
    """
    trained, lines = total(tensors), {"weights": weights(shape, recipe)}
    prefix = "" if recipe.trains_base else "adapter "
    if prefix:
        lines["gradients"] = lines["optimizer states"] = Line(0, "0: frozen weights have none")
        lines["adapter weights"] = Line.of(recipe.adapter_bytes, trained)
    lines[prefix + "gradients"] = Line.of(recipe.gradient_bytes, trained)
    if recipe.master_bytes:
        lines["master weights"] = Line.of(recipe.master_bytes, trained)
    lines[(prefix or "optimizer ") + "states"] = optimizer_states(recipe, tensors)
    return lines


def token_lines(
    shape: ModelShape, run: Run, recipe: Recipe, checkpointing: bool
) -> dict[str, Line]:
    """What is counted by the token."""
    tokens, head = f"{run.tokens:,} tokens", activations.head(shape, run)
    words = head.pop("log-probabilities, float32")
    layers = activations.layers(shape, run, checkpointing)
    each = f"{layers / (shape.layers * run.tokens):,.0f} B × {shape.layers} layers × {tokens}"
    note = ", and the last norm" + " (estimate)" * (not shape.like_llama)
    lines = {"activations": Line(layers + sum(head.values()), each + note)}
    if checkpointing:
        again = sum(activations.layer(shape, run).values())
        lines["recomputed layer"] = Line(again, f"{again / run.tokens:,.0f} B × {tokens}")
    each = f"4 B × {tokens} × {shape.vocab:,} words"
    lines["log-probabilities"] = Line(words, each)
    lines["loss gradients"] = Line(2 * words, f"2 × {each}")
    widest = "gradients in one MLP" + ", one weight in 16 bits" * recipe.quantized
    lines["temporaries"] = Line(activations.temporaries(shape, run, recipe.quantized), widest)
    if scores := activations.attention_temporaries(shape, run):
        each = f"4 B × {tokens} × {shape.heads} heads × {run.sequence:,} tokens"
        lines["scores' gradients"] = Line(scores, f"3 × {each}")
    return lines
