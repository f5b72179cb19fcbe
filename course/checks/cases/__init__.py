"""The judges of the debugging cases, a file a case: why the script fails, the worked answer, and what hides the symptom.

The scripts are in ``course/cases``; a check has the name of its script, and its worked answer the name of what is mended there.
"""

from course.checks.cases.b_stays_zero import check as b_stays_zero
from course.checks.cases.ewc_forgets import check as ewc_forgets
from course.checks.cases.flat_loss import check as flat_loss
from course.checks.cases.good_loss_wrong_answers import check as good_loss_wrong_answers
from course.checks.cases.loss_by_batching import check as loss_by_batching
from course.checks.cases.merged_is_worse import check as merged_is_worse
from course.checks.cases.no_gradient import check as no_gradient
from course.checks.cases.second_evaluation import check as second_evaluation
from course.checks.cases.zero_tokens import check as zero_tokens

__all__ = [
    "b_stays_zero",
    "ewc_forgets",
    "flat_loss",
    "good_loss_wrong_answers",
    "loss_by_batching",
    "merged_is_worse",
    "no_gradient",
    "second_evaluation",
    "zero_tokens",
]
