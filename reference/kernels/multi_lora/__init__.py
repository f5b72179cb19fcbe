"""Rows of different adapters in two launches: begin at :mod:`.grouped`."""

from reference.kernels.multi_lora.grouped import add_updates
from reference.kernels.multi_lora.tables import Plan, Table, aligned, fill, tables

__all__ = ["Plan", "Table", "add_updates", "aligned", "fill", "tables"]
