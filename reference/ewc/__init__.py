"""Elastic weight consolidation: begin at :mod:`reference.ewc.penalty`."""

from reference.ewc.adapters import LoRAEWC, orthogonality
from reference.ewc.fisher import ESTIMATORS, LIKELIHOODS, fisher_diagonal
from reference.ewc.penalty import EWC, uniform_fisher

__all__ = [
    "ESTIMATORS",
    "EWC",
    "LIKELIHOODS",
    "LoRAEWC",
    "fisher_diagonal",
    "orthogonality",
    "uniform_fisher",
]
