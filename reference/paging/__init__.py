"""Optimizers whose state lives on the host: begin at :mod:`reference.paging.optimizer`."""

from reference.paging.offloaded import OffloadedAdamW
from reference.paging.optimizer import PagedAdamW
from reference.paging.pool import POLICIES, PageEvent

__all__ = ["POLICIES", "OffloadedAdamW", "PageEvent", "PagedAdamW"]
