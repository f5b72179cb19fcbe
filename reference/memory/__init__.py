"""What fills the GPU in training, before anything runs: begin at :mod:`reference.memory.budget`."""

from reference.memory.breakdown import Breakdown
from reference.memory.budget import training_memory
from reference.memory.recipes import RECIPES, Line, Recipe
from reference.memory.sharding import received_bytes, sharded_memory
from reference.model_shapes import SHAPES, ModelShape

__all__ = [
    "RECIPES",
    "SHAPES",
    "Breakdown",
    "Line",
    "ModelShape",
    "Recipe",
    "received_bytes",
    "sharded_memory",
    "training_memory",
]
