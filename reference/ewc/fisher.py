"""The diagonal of the Fisher information, by the four estimators that are all called "the Fisher".

F says how fast a model's distribution changes with a parameter: the mean over inputs x of

    exact       Σ_y p(y|x) · (∂ log p(y|x) / ∂θ)²     every answer, weighed by the model itself
    sampled     (∂ log p(y|x) / ∂θ)²                  one answer y drawn from the model
    empirical   (∂ log p(y|x) / ∂θ)²                  y is the label in the data
    batch       (∂ mean loss of a batch / ∂θ)²        the square of a mean: shrinks like 1/batch

The first two agree in the mean, and at a θ whose loss has converged they are the diagonal of its
Hessian where the model fits. The third agrees with them only as far as the labels look drawn from
the model. The last is another quantity, and what a short implementation computes.

F is per prediction: a mean over all rows and positions, like a mean loss. Positions of one row
share a gradient: their log-probabilities are added up before the square. For exact that changes
nothing, since answers drawn at different positions are independent given their inputs.

Kunstner et al. 2019, "Limitations of the empirical Fisher approximation"; van de Ven 2025, "On the
computation of the Fisher information in continual learning".
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reference.arguments import check_integer
from reference.ewc.penalty import trained_parameters
from reference.ewc.squares import Squares

ESTIMATORS = ("exact", "sampled", "empirical", "batch")
LIKELIHOODS = ("softmax", "gaussian")
IGNORED = -100  # a target of no account, as in torch's cross-entropy
Forward = Callable[[nn.Module, Any], Tensor]


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """What ``model(inputs)`` gives, or its ``.logits``."""
    found = model(inputs)
    return getattr(found, "logits", found)


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor | None]],
    estimator: str = "exact",
    *,
    likelihood: str = "softmax",
    forward: Forward = logits,
    generator: torch.Generator | None = None,
    chunk: int = 256,
    check: bool = True,
) -> dict[str, Tensor]:
    """The diagonal of F for every parameter that requires gradients: name -> tensor of its shape.

    Args:
        model: run in evaluation mode; its mode and its gradients are left as they were. Rows of
            a batch must not mix, and modules that own trained parameters return one tensor.
        batches: (inputs, targets) pairs. Targets, (rows,) or (rows, positions), may be None for
            exact and sampled; a position whose target is -100 is left out.
        estimator: "exact", "sampled", "empirical" or "batch", as above.
        likelihood: "softmax", outputs are logits; or "gaussian", outputs are the means of normal
            distributions with variance 1, and targets have the outputs' shape.
        forward: ``forward(model, inputs)`` gives outputs (rows, [positions,] classes).
        generator: draws the answers of "sampled".
        chunk: how many answers of exact go backward together; more take more memory.
        check: compare once with autograd's own gradient, which costs a backward pass: a parameter
            that is used outside of its module is refused, where F would be wrong.

    Raises:
        ValueError: nothing is trained, no batch, targets that are needed and missing or do not fit,
            outputs that are not finite, an unknown estimator or likelihood; or a trained
            parameter whose gradient can't be told apart row by row.
        TypeError: ``chunk`` is not an integer.
    """
    for name, value, known in (
        ("estimator", estimator, ESTIMATORS),
        ("likelihood", likelihood, LIKELIHOODS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    check_integer("chunk", chunk, 1)
    trained = trained_parameters(model)
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    squares, count, was_training = Squares(model, trained, check), 0, model.training
    model.eval()
    try:
        for inputs, targets in batches:
            if targets is None and estimator in ("empirical", "batch"):
                raise ValueError(f"estimator {estimator!r} needs targets: a batch has None")
            with squares.watching(), torch.enable_grad():
                outputs = forward(model, inputs)  # (rows, [positions,] classes)
            found = outputs.detach()
            if not torch.isfinite(found).all():
                raise ValueError("batches: the model's outputs hold NaN or infinity")
            shaped = found if found.dim() > 2 else found[:, None]  # (rows, positions, classes)
            weight = _weights(shaped, targets, likelihood)  # (rows, positions): 1 or 0
            used = int(weight.sum())
            if used == 0:
                continue
            if estimator == "batch":
                column = _at_labels(shaped, targets, likelihood) * weight[..., None] / used
                squares.add_whole(total, outputs, column.view_as(found), used)
                count += used  # the batch counts as many times as it has predictions
                continue
            for columns in _columns(shaped, targets, estimator, likelihood, generator, chunk):
                columns *= weight[..., None]
                squares.add(total, outputs, columns.view(len(columns), *found.shape))
            count += used
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("batches is empty: F is a mean over predictions and needs at least one")
    return {name: value / count for name, value in total.items()}


def _weights(outputs: Tensor, targets: Tensor | None, likelihood: str) -> Tensor:
    weight = outputs.new_ones(outputs.shape[:2])
    if targets is None:
        return weight
    shape = outputs.shape if likelihood == "gaussian" else outputs.shape[:2]
    if targets.numel() != shape.numel():
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} don't fit outputs {tuple(shape)}"
        )
    return weight if likelihood == "gaussian" else weight * (targets.view(shape) != IGNORED)


def _at_labels(outputs: Tensor, targets: Tensor, likelihood: str) -> Tensor:
    """∂ log p(target) / ∂outputs, in the shape of ``outputs``."""
    if likelihood == "gaussian":
        return targets.view_as(outputs).to(outputs) - outputs
    hot = torch.zeros_like(outputs)
    known = targets.to(outputs.device).view(outputs.shape[:2]).clamp(min=0)
    hot.scatter_(-1, known[..., None], 1.0)
    return hot - outputs.softmax(-1)


def _columns(
    outputs: Tensor,
    targets: Tensor | None,
    estimator: str,
    likelihood: str,
    generator: torch.Generator | None,
    chunk: int,
) -> Iterator[Tensor]:
    """Gradients of outputs (k, rows, positions, classes): squares are summed over k and rows."""
    rows, positions, classes = outputs.shape
    if estimator == "empirical":
        yield _at_labels(outputs, targets, likelihood)[None]
    elif estimator == "sampled" and likelihood == "gaussian":
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        yield noise.to(outputs.device)[None]
    elif estimator == "sampled":
        p = outputs.softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(p.cpu(), 1, generator=generator).view(rows, positions)
        yield _at_labels(outputs, drawn, likelihood)[None]
    else:
        p = outputs.softmax(-1)
        for first in range(0, positions * classes, chunk):
            which = torch.arange(
                first, min(first + chunk, positions * classes), device=outputs.device
            )
            t, c, k = which // classes, which % classes, which - first
            columns = outputs.new_zeros(len(which), rows, positions, classes)
            if likelihood == "gaussian":
                columns[k, :, t, c] = 1.0
            else:  # √p_c (e_c − p): one answer and the root of its probability
                root = p[:, t, c].T.sqrt()  # (k, rows)
                columns[k, :, t] = -root[..., None] * p[:, t].transpose(0, 1)
                columns[k, :, t, c] += root
            yield columns
