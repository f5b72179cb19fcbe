"""The checks of unit 11: rows of many adapters, a weighted sum, TIES, a pool with pins, and the numbers of a platform."""

from course.checks.multi_lora.combine import check as combine
from course.checks.multi_lora.platform import check as platform
from course.checks.multi_lora.pool import check as pool
from course.checks.multi_lora.route import check as route
from course.checks.multi_lora.ties import check as ties

__all__ = ["combine", "platform", "pool", "route", "ties"]
