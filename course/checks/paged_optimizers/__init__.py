"""The checks of unit 07: pages, which page has to go, AdamW on a page, copies beside the update, layers that are fetched."""

from course.checks.paged_optimizers.evict import check as evict
from course.checks.paged_optimizers.layers import check as layers
from course.checks.paged_optimizers.overlap import check as overlap
from course.checks.paged_optimizers.pages import check as pages
from course.checks.paged_optimizers.update import check as update

__all__ = ["evict", "layers", "overlap", "pages", "update"]
