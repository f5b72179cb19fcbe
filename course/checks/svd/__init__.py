"""The checks of unit 01: factors, energy, effective rank, the break-even rank, truncating an update, and a step inside a subspace."""

from course.checks.svd.break_even import check as break_even
from course.checks.svd.effective_rank import check as effective_rank
from course.checks.svd.factors import check as factors
from course.checks.svd.keep_update import check as keep_update
from course.checks.svd.rank_for_energy import check as rank_for_energy
from course.checks.svd.shared import nearest
from course.checks.svd.subspace_step import check as subspace_step

__all__ = ["break_even", "effective_rank", "factors", "keep_update", "nearest", "rank_for_energy", "subspace_step"]
