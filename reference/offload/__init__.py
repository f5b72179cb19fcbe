"""Layers whose weights are elsewhere: begin at :mod:`reference.offload.sequential`."""

from reference.offload.sequential import OffloadedSequential

__all__ = ["OffloadedSequential"]
