"""Less memory for activations: computed again (checkpointing), or kept elsewhere (offloading)."""

from reference.checkpointing.checkpoint import checkpoint
from reference.checkpointing.hooks import checkpoint_by_hooks
from reference.checkpointing.offload import OffloadActivations
from reference.checkpointing.schedule import (
    best_split,
    checkpoint_binomial,
    extra_runs,
    repetitions,
)
from reference.checkpointing.sequential import (
    activation_cost,
    checkpoint_sequential,
    optimal_segments,
    segment_sizes,
)

__all__ = [
    "OffloadActivations",
    "activation_cost",
    "best_split",
    "checkpoint",
    "checkpoint_binomial",
    "checkpoint_by_hooks",
    "checkpoint_sequential",
    "extra_runs",
    "optimal_segments",
    "repetitions",
    "segment_sizes",
]
