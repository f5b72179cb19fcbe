"""Rehearsing what the model *said*: a distribution teaches more than the one word that came.

- **Distillation** to the model before: on old rows, or on the new task's own rows, where nothing
  old is kept (learning without forgetting, Li and Hoiem 2016). Both are softened by a temperature.
- **Dark experience** (DER++, Buzzega et al. 2020): the buffer keeps each row's logits from the
  time it was stored; α · MSE of logits on one draw + β · cross-entropy of labels on another.
"""

import torch.nn.functional as F
from torch import Tensor

from reference.arguments import check_number


def distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """temp² · KL(teacher ‖ student), both softened by temp, in the mean over predictions.

    temp² makes up for the gradient, which softening shrinks by as much (Hinton et al. 2015).

    Args:
        student, teacher: logits (..., classes); the teacher's get no gradient.
        temperature: temp, above 0.

    Raises:
        TypeError, ValueError: it is not a positive number, or the shapes differ.
    """
    check_number("temperature", temperature, 0)
    if temperature == 0:
        raise ValueError("temperature must be above 0, got 0")
    _check(student, teacher, "teacher")
    log_p = F.log_softmax(student.flatten(0, -2) / temperature, -1)
    log_q = F.log_softmax(teacher.detach().flatten(0, -2) / temperature, -1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def dark_experience(
    logits: Tensor, stored: Tensor, again: Tensor, labels: Tensor, alpha: float, beta: float
) -> Tensor:
    """α · MSE(logits, stored) + β · cross-entropy(again, labels): what DER++ adds to the loss.

    Args:
        logits, stored: (..., classes), of one draw from the buffer: now, and when it was stored.
        again, labels: (..., classes) and (...), of a second, independent draw.

    Raises:
        TypeError, ValueError: a weight is not a number of at least 0, or shapes don't fit.
    """
    check_number("alpha", alpha, 0)
    check_number("beta", beta, 0)
    _check(logits, stored, "stored")
    if again.shape[:-1] != labels.shape:
        shapes = f"{tuple(labels.shape)} for logits {tuple(again.shape)}"
        raise ValueError(f"labels have the shape {shapes}")
    remembered = F.mse_loss(logits, stored.detach())
    return alpha * remembered + beta * F.cross_entropy(again.flatten(0, -2), labels.flatten())


def _check(ours: Tensor, theirs: Tensor, name: str) -> None:
    if ours.shape != theirs.shape:
        shapes = f"{tuple(theirs.shape)}, the logits {tuple(ours.shape)}"
        raise ValueError(f"{name} has the shape {shapes}")
