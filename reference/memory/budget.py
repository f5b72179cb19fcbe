"""What fills the GPU in training: every kind of tensor, its bytes, and when most of them meet.

Some tensors are there all the time. For each trained parameter, full fine-tuning with Adam in mixed
precision holds

    2 (bf16 weight) + 2 (its gradient) + 4 (float32 master weight) + 4 + 4 (Adam's two moments) = 16

bytes, and plain float32 holds 4 + 4 + 4 + 4 = 16 as well. LoRA freezes the weights: they keep their
2 bytes (a little over 0.5 in 4 bits, QLoRA) and lose the other 14, which only the adapters need
(Hu et al. 2021; Dettmers et al. 2023). The rest comes and goes within a step, so the peak is not
the sum of all kinds but the largest of a few moments. Each is a function below:

    at the loss              all activations, log-probabilities and two gradients of their size
    in the backward pass     activations not yet used, one layer's temporaries, gradients so far
    in the optimizer's step  all gradients, and the optimizer's own temporaries

The bytes are in :mod:`reference.memory.recipes` (of a parameter) and
:mod:`reference.memory.activations` (of a token). 1 GB is 1e9 bytes. What is not here: the CUDA
context, libraries' workspaces, and the allocator's unused remainders.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from reference.memory import activations
from reference.memory.activations import Run
from reference.memory.breakdown import Breakdown, parameter_lines, token_lines
from reference.memory.recipes import Recipe, step_buffer, trained_tensors
from reference.model_shapes import ModelShape


def training_memory(
    model_shape: ModelShape,
    recipe: Recipe,
    batch: int = 1,
    sequence: int = 2048,
    rank: int = 16,
    targets: str | Iterable[str] = "all-linear",
    checkpointing: bool = False,
    attention: str = "fused",
    padding: bool = False,
) -> Breakdown:
    """Memory of a training step after the first, in bytes.

    Adam's moments exist; gradients are freed between steps (``set_to_none``). Activations are those
    of a Llama in the Hugging Face library; for another family (Gemma 3, GPT-3) they are an
    estimate, while its parameters are exact.

    Args:
        batch, sequence: rows of tokens in a step, and their length.
        rank, targets: of LoRA; ignored by recipes that train the base.
        checkpointing: every decoder layer keeps its input alone and runs again on the way back.
        attention: "fused" or "math"; see :class:`reference.memory.activations.Run`.
        padding: the rows are padded to ``sequence``, and attention is masked.

    Raises:
        TypeError: ``batch`` or ``sequence`` is not an integer.
        ValueError: one of them is below 1; a rank out of range; an unknown target or attention.
    """
    shape, lora = model_shape, not recipe.trains_base
    names = shape.targets(targets) if lora else ()
    if lora:
        shape.adapter_parameters(rank, names)  # refuses a rank out of range
    run = Run(
        batch,
        sequence,
        compute_bytes=recipe.weight_bytes,
        trained=recipe.trains_base,
        targets=names,
        rank=rank * lora,
        adapter_bytes=recipe.adapter_bytes,
        input_copies=recipe.input_copies,
        attention=attention,
        padding=padding,
    )
    tensors = trained_tensors(shape, recipe, rank, names)
    lines = parameter_lines(shape, recipe, tensors)
    lines |= token_lines(shape, run, recipe, checkpointing)
    lines["step buffer"] = step_buffer(recipe, tensors)
    step = _Step(shape, run, recipe, checkpointing, {kind: lines[kind].bytes for kind in lines})
    where = "all linears" if len(names) == len(shape.linears) else ", ".join(names)
    title = f"{shape.name} · {recipe.name}{f' r = {rank} on {where}' * lora}"
    title += f" · {batch} × {sequence:,} tokens{' · padding' * padding}"
    title += " · checkpointing" * checkpointing
    return Breakdown(title, lines, _moments(step))


@dataclass(frozen=True)
class _Step:
    """One training step. ``full``: kind of tensor -> bytes when all of it is there."""

    shape: ModelShape
    run: Run
    recipe: Recipe
    checkpointing: bool
    full: dict[str, int]

    def all_of(self, *kinds: str) -> dict[str, int]:
        """Those of ``kinds`` that the step has at all, in full."""
        return {kind: self.full[kind] for kind in kinds if kind in self.full}

    @property
    def gradients(self) -> str:
        """The kind of gradients that the step makes."""
        return "gradients" if self.run.trained else "adapter gradients"

    def gradients_after(self, layers: int) -> int:
        """Bytes of gradients inside an MLP's backward pass, with ``layers`` others behind it.

        Where the base is trained, the output head has its gradient first, and this MLP's down too.
        """
        shape, each = self.shape, self.recipe.gradient_bytes
        if not self.run.trained:
            return self.full[self.gradients] * layers // shape.layers
        earlier = shape.embedding + shape.hidden * shape.mlp
        return each * (earlier + shape.linear_parameters * layers // shape.layers)


def _moments(step: _Step) -> dict[str, dict[str, int]]:
    """Moment -> kind -> bytes, in the order of time; weights and optimizer states always stay."""
    held = step.all_of(*(kind for kind in step.full if kind.endswith(("weights", "states"))))
    moments = {
        "at the loss": _at_the_loss(step),
        "last layer back": _last_layer_back(step),
        "last attention back": _last_attention_back(step),
        "first layer back": _first_layer_back(step),
        "first attention back": _first_attention_back(step),
        "embedding back": _embedding_back(step),
        "optimizer's step": _optimizers_step(step),
    }
    return {moment: held | passing for moment, passing in moments.items() if passing}


def _at_the_loss(step: _Step) -> dict[str, int]:
    """All activations, the log-probabilities and two gradients of their size; no weight's yet."""
    return step.all_of("activations", "log-probabilities", "loss gradients")


def _last_layer_back(step: _Step) -> dict[str, int]:
    """In the MLP of the last layer: what all layers kept, and the first gradients of weights."""
    kept = activations.layers(step.shape, step.run, step.checkpointing)
    there = {step.gradients: step.gradients_after(0), "activations": kept}
    return there | step.all_of("recomputed layer", "temporaries")


def _last_attention_back(step: _Step) -> dict[str, int]:
    """In the same layer, past its MLP, if attention stores its scores."""
    return _attention_back(step, _last_layer_back(step), inflow=True)


def _first_layer_back(step: _Step) -> dict[str, int]:
    """In the MLP of the first layer: what it kept alone, and the gradients of all other layers."""
    if step.checkpointing:
        kept = activations.layer_input(step.shape, step.run)
    else:
        kept = sum(activations.layer(step.shape, step.run, inflow=step.run.trained).values())
    there = {step.gradients: step.gradients_after(step.shape.layers - 1), "activations": kept}
    return there | step.all_of("recomputed layer", "temporaries")


def _first_attention_back(step: _Step) -> dict[str, int]:
    """In the same layer, past its MLP; a layer that ran again is counted as any other."""
    inflow = step.run.trained or step.checkpointing
    return _attention_back(step, _first_layer_back(step), inflow)


def _attention_back(step: _Step, layer_back: dict[str, int], inflow: bool) -> dict[str, int]:
    """From ``layer_back`` the MLP's share is gone, and the scores' gradients are there instead.

    Empty if attention is fused or has nothing to send back: the MLP is wider then.
    """
    scores = activations.attention_temporaries(step.shape, step.run, inflow)
    if not scores:
        return {}
    there = layer_back | {"temporaries": 0, "scores' gradients": scores}
    done = activations.done_before_attention(step.shape, step.run, inflow)
    there["recomputed layer" if step.checkpointing else "activations"] -= done
    return there


def _embedding_back(step: _Step) -> dict[str, int]:
    """All gradients, and the tied embedding's thrice: the head's, its own, and autograd's new sum.

    Empty if the embedding is frozen, or is not the output head too.
    """
    if not (step.run.trained and step.shape.tied):
        return {}
    twice = 2 * step.recipe.gradient_bytes * step.shape.embedding
    return step.all_of(step.gradients) | {"temporaries": twice}


def _optimizers_step(step: _Step) -> dict[str, int]:
    """All gradients, no activation, and what the optimizer needs for a moment."""
    return step.all_of(step.gradients, "step buffer")
