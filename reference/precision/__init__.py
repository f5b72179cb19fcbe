"""Training in 16 bits: what is added in 32 (masters), what is lifted (scaler), what is rounded."""

from reference.precision.masters import MasterWeights
from reference.precision.rounding import add_kahan_, add_stochastic_, stochastic_round
from reference.precision.scaler import LossScaler

__all__ = ["LossScaler", "MasterWeights", "add_kahan_", "add_stochastic_", "stochastic_round"]
