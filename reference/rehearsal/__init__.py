"""Learning the new with some of the old: begin at :mod:`reference.rehearsal.buffer`."""

from reference.rehearsal.buffer import ReplayBuffer, mix_batches
from reference.rehearsal.gradients import project_gradient
from reference.rehearsal.logits import dark_experience, distillation
from reference.rehearsal.weights import interpolate

__all__ = [
    "ReplayBuffer",
    "dark_experience",
    "distillation",
    "interpolate",
    "mix_batches",
    "project_gradient",
]
