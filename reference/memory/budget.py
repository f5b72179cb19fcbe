"""What fills the GPU in training: every kind of tensor, its bytes, and the moment at which most of them are there together.

Some tensors are there all the time. For each trained parameter, full fine-tuning with Adam in mixed precision holds

    2 (bf16 weight)  +  2 (its gradient)  +  4 (float32 master weight)  +  4 + 4 (Adam's two moments)  =  16 bytes

and plain float32 holds 4 + 4 + 4 + 4 = 16 as well. LoRA freezes the weights: they keep their 2 bytes (a little over 0.5 in 4 bits, QLoRA)
and lose the other 14, which only the adapters need (Hu et al. 2021; Dettmers et al. 2023). The rest comes and goes within a step, so the
peak is not the sum of all lines but the largest of a few moments:

    at the loss              held + all activations + log-probabilities and two gradients of their size; no weight gradient yet
    in the backward pass     held + activations not yet used + one layer's temporaries + gradients so far
    in the optimizer's step  held + all gradients + the optimizer's own temporaries

The parts are in :mod:`reference.model_shapes` (how many parameters), :mod:`reference.memory.recipes` (bytes of each) and
:mod:`reference.memory.activations` (bytes of a token). 1 GB is 1e9 bytes. What is not here: the CUDA context, libraries' workspaces, and the
allocator's unused remainders.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from reference.memory import activations
from reference.memory.activations import Run
from reference.memory.recipes import RECIPES, Line, Recipe, optimizer_states, step_buffer, trained_tensors, weights
from reference.model_shapes import SHAPES, ModelShape

__all__ = ["RECIPES", "SHAPES", "Breakdown", "Line", "ModelShape", "Recipe", "training_memory"]


@dataclass(frozen=True)
class Breakdown:
    """The answer of :func:`training_memory`; ``print`` it.

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
        rows = [f"  {kind:18s}{_gigabytes(line.bytes)}   {line.formula}" for kind, line in self.lines.items()]
        totals = [
            f"  {moment:18s}{_gigabytes(sum(there.values()))}   {'◀ peak' if moment == self.moment else ''}".rstrip()
            for moment, there in self.moments.items()
        ]
        return "\n".join([self.title, *rows, "there at the same time", *totals])


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:12,.3f} GB"


def training_memory(
    model_shape: ModelShape,
    recipe: Recipe,
    batch: int = 1,
    sequence: int = 2048,
    rank: int = 16,
    targets: str | Iterable[str] = "all-linear",
    checkpointing: bool = False,
    attention: str = "fused",
) -> Breakdown:
    """Memory of a training step after the first (Adam's moments exist; gradients are freed between steps, ``set_to_none``).

    Activations are those of a Llama in the Hugging Face library; for another family (Gemma 3, GPT-3) they are an estimate, while its
    parameters are exact.

    Args:
        batch, sequence: rows of tokens in a step, and their length.
        rank, targets: of LoRA; ignored by recipes that train the base.
        checkpointing: every decoder layer keeps its input alone and runs again in the backward pass.
        attention: "fused" or "math"; see :class:`reference.memory.activations.Run`.

    Raises:
        ValueError: a size that is not a positive integer, a rank out of range, an unknown target or attention.
    """
    shape, lora = model_shape, not recipe.trains_base
    names = shape.targets(targets) if lora else ()
    if lora:
        shape.adapter_parameters(rank, names)  # refuses a rank out of range
    run = Run(batch, sequence, recipe.weight_bytes, not lora, names, rank * lora, recipe.adapter_bytes, recipe.input_copies, attention)
    tensors = trained_tensors(shape, recipe, rank, names)
    lines = _parameter_lines(shape, recipe, tensors) | _token_lines(shape, run, recipe, checkpointing)
    lines["step buffer"] = step_buffer(recipe, tensors)
    chosen = f" r = {rank} on {'all linears' if len(names) == len(shape.linears) else ', '.join(names)}" if lora else ""
    title = f"{shape.name} · {recipe.name}{chosen} · {batch} × {sequence:,} tokens{' · checkpointing' * checkpointing}"
    return Breakdown(title, lines, _moments(shape, run, recipe, checkpointing, {kind: line.bytes for kind, line in lines.items()}))


def _parameter_lines(shape: ModelShape, recipe: Recipe, tensors: list[tuple[int, int]]) -> dict[str, Line]:
    """What is counted by the parameter: there however many tokens a step has."""
    trained, lines = sum(elements * count for elements, count in tensors), {"weights": weights(shape, recipe)}
    prefix = "" if recipe.trains_base else "adapter "
    if prefix:
        lines["gradients"] = lines["optimizer states"] = Line(0, "0: frozen weights have none")
        lines["adapter weights"] = Line(recipe.adapter_bytes * trained, f"{recipe.adapter_bytes} B × {trained:,}")
    lines[prefix + "gradients"] = Line(recipe.gradient_bytes * trained, f"{recipe.gradient_bytes} B × {trained:,}")
    if recipe.master_bytes:
        lines["master weights"] = Line(recipe.master_bytes * trained, f"{recipe.master_bytes} B × {trained:,}")
    lines[(prefix or "optimizer ") + "states"] = optimizer_states(recipe, tensors)
    return lines


def _token_lines(shape: ModelShape, run: Run, recipe: Recipe, checkpointing: bool) -> dict[str, Line]:
    """What is counted by the token."""
    tokens, head = f"{run.tokens:,} tokens", activations.head(shape, run)
    vocabulary = head.pop("log-probabilities, float32")
    layers, again = activations.layers(shape, run, checkpointing), sum(activations.layer(shape, run).values())
    each = layers / (shape.layers * run.tokens)
    formula = f"{each:,.0f} B × {shape.layers} layers × {tokens}, and the last norm{'' if shape.like_llama else ' (estimate)'}"
    lines = {"activations": Line(layers + sum(head.values()), formula)}
    if checkpointing:
        lines["recomputed layer"] = Line(again, f"{again / run.tokens:,.0f} B × {tokens}")
    lines["log-probabilities"] = Line(vocabulary, f"4 B × {tokens} × {shape.vocab:,} words")
    lines["loss gradients"] = Line(2 * vocabulary, f"2 × 4 B × {tokens} × {shape.vocab:,} words")
    widest = "gradients in one MLP" + (", one weight in 16 bits" if recipe.quantized else "")
    lines["temporaries"] = Line(activations.temporaries(shape, run, recipe.quantized), widest)
    if scores := activations.attention_temporaries(shape, run):
        lines["scores' gradients"] = Line(scores, f"3 × 4 B × {tokens} × {shape.heads} heads × {run.sequence:,} tokens")
    return lines


def _moments(shape: ModelShape, run: Run, recipe: Recipe, checkpointing: bool, full: dict[str, int]) -> dict[str, dict[str, int]]:
    """Kind -> bytes at each moment of the step that can be the fullest; ``full``: kind -> bytes when all of it is there."""
    held = {kind: count for kind, count in full.items() if kind.endswith(("weights", "states"))}
    name = "gradients" if run.trained else "adapter gradients"
    down, head = (shape.linears["down_proj"][0] * shape.mlp, shape.embedding) if run.trained else (0, 0)
    of_layers = full[name] - recipe.gradient_bytes * (shape.parameters - shape.linear_parameters) * run.trained
    first = {name: recipe.gradient_bytes * (head + down)}  # the head has had its turn, and the last layer's down_proj
    inner = {kind: full[kind] for kind in ("recomputed layer", "temporaries") if kind in full}
    one_layer = activations.layer_input(shape, run) if checkpointing else sum(activations.layer(shape, run, run.trained).values())
    moments = {
        "at the loss": {kind: full[kind] for kind in ("activations", "log-probabilities", "loss gradients")},
        "last layer back": first | {"activations": activations.layers(shape, run, checkpointing)} | inner,
        "first layer back": {name: first[name] + of_layers * (shape.layers - 1) // shape.layers, "activations": one_layer} | inner,
        "optimizer's step": {name: full[name], "step buffer": full["step buffer"]},
    }
    for place, inflow in (("last", True), ("first", run.trained or checkpointing)):
        if scores := activations.attention_temporaries(shape, run, inflow):
            back = moments[f"{place} layer back"] | {"temporaries": 0, "scores' gradients": scores}
            back["recomputed layer" if checkpointing else "activations"] -= activations.done_before_attention(shape, run, inflow)
            moments[f"{place} attention back"] = back
    if run.trained and shape.tied:  # three at once: the head's gradient, the embedding's, and their sum, which autograd makes anew
        moments["embedding back"] = {name: full[name], "temporaries": 2 * recipe.gradient_bytes * shape.embedding}
    return {moment: held | passing_now for moment, passing_now in moments.items()}
