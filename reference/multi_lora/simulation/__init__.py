"""A server of many adapters, simulated: begin at :mod:`reference.multi_lora.simulation.serve`."""

from reference.multi_lora.simulation.hits import expected_hits
from reference.multi_lora.simulation.load import Costs, Load, arrivals
from reference.multi_lora.simulation.outcome import Outcome, quantile
from reference.multi_lora.simulation.serve import simulate

__all__ = ["Costs", "Load", "Outcome", "arrivals", "expected_hits", "quantile", "simulate"]
